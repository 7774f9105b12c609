"""One way for every script to become a command line: a dataclass of settings in, an exit code out.

A field of the dataclass is a flag, its docstring the help text. `--config FILE.yaml` sets any of them; flags on the
command line win over it. Nothing heavier than jsonargparse is imported here, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from utils import console
from utils.errors import UserError

EXIT_USER_ERROR = 2
EXIT_BUG = 1
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # as a shell reports a process that SIGPIPE ended

# What the owner of the disk can fix.
USERS_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
DEAF_S = 3.0
"""After the first Ctrl-C or SIGTERM the work is put away undisturbed for so long; the next one ends it at once."""


def _say_interrupted(kind: type[BaseException], *error) -> None:
    """Ctrl-C while modules are imported, before `run` is there to hear of it."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, *error)
    console.error("interrupted before anything was done")
    os._exit(EXIT_INTERRUPTED)


sys.excepthook = _say_interrupted


def exit_if_not_installed(error: ModuleNotFoundError) -> None:
    """A missing package means another Python, or no `make setup`; a missing part of one that is there is our bug."""
    package = (error.name or "utils").partition(".")[0]
    if importlib.util.find_spec(package) is None:
        console.error(
            f"the package {package} is not installed in this Python ({sys.executable}). "
            "Run: make setup && source .venv/bin/activate"
        )
        sys.exit(EXIT_USER_ERROR)


try:
    from utils.cli_parser import ConfigFile, Help, Parser
except ModuleNotFoundError as error:
    exit_if_not_installed(error)
    raise


def make_parser(settings_class: type, description: str, positional: bool = False) -> Parser:
    """The parser for a script.

    Args:
        settings_class: dataclass; nested dataclasses become dotted flags (`--train.global_batch_size`).
        description: the script's docstring, shown as it is written.
        positional: whether settings without a default are positional arguments. A field that takes several words has
            the metadata {"nargs": "+", "help": "..."}.
    """
    parser = Parser(
        prog=sys.argv[0],
        description=description,
        formatter_class=Help,
        print_config="--print_config",
        allow_abbrev=False,  # --train.max_step=5 is a slip, not --train.max_steps
    )
    parser.add_argument("--config", action=ConfigFile, help="YAML file with settings; flags win over it.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Only results, warnings and errors.")
    parser.add_argument("-v", "--verbose", action="store_true", help="Details as well, and tracebacks.")
    several = [field for field in dataclasses.fields(settings_class) if "nargs" in field.metadata]
    for field in several:  # jsonargparse wants a list as one word, [A,B]; a shell makes several words of A B
        parser.add_argument(field.name, nargs=field.metadata["nargs"], help=field.metadata["help"])
    parser.add_class_arguments(settings_class, as_positional=positional, skip={field.name for field in several})
    for action in parser._actions:
        if action.dest in parser.groups:  # `--train FILE`, which jsonargparse adds for each section
            action.help = argparse.SUPPRESS
    return parser


def parse_settings(settings_class: type, description: str, argv: list[str] | None = None, positional: bool = False):
    """Settings from the command line; raises UserError with everything that is wrong with flags and config files."""
    parser = make_parser(settings_class, description, positional)
    arguments = parser.parse_args(_spell_out_switches(parser, sys.argv[1:] if argv is None else argv))
    if arguments.quiet or arguments.verbose:
        console.VERBOSITY = 0 if arguments.quiet else 2
    for name in ("config", "quiet", "verbose"):
        arguments.pop(name, None)
    return settings_class(**parser.instantiate_classes(arguments).as_dict())


def _spell_out_switches(parser: Parser, argv: list[str]) -> list[str]:
    """`--dry_run` alone means `--dry_run=true`; jsonargparse asks for the value."""
    switches = {f"--{action.dest}" for action in parser._actions if getattr(action, "_typehint", None) is bool}
    return [
        f"{flag}=true" if flag in switches and following not in ("true", "false", "True", "False") else flag
        for flag, following in zip(argv, [*argv[1:], None])
    ]


def run(main: Callable[[Any], None], settings_class: type, description: str, positional: bool = False) -> None:
    """Parse, call `main(settings)`, and leave with the exit code that tells who must act.

    0: done. 2: the user's error, every problem at once, no traceback. 130: Ctrl-C. 143: SIGTERM.
    1: a bug of ours, with traceback. After a failure the command that resumes is printed.
    141: nobody reads what is printed any more (`... | head`), and nothing is said.
    """
    _end_in_order()
    _make_streams_usable()
    try:
        try:
            _check_encoding()
            main(parse_settings(settings_class, description, positional=positional))
        finally:
            sys.stdout.flush()
    except UserError as error:
        for problem in error.problems:
            console.error(problem)
        if console.VERBOSITY >= 2:
            traceback.print_exc()
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _leave("interrupted;", EXIT_INTERRUPTED)
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # Ray's own handler, which takes the place of ours, raises the same
            _leave("ended by SIGTERM;", 128 + signal.SIGTERM)
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            exit_if_not_installed(error)
        if isinstance(error, BrokenPipeError) and _drop_unread_streams():
            sys.exit(EXIT_NO_READER)
        if isinstance(error, OSError) and error.errno in USERS_ERRNOS:
            place = f"{error.filename or 'a file'}: {error.strerror}"
            _leave(f"{place}. Make room, or give a directory that can be written to;", EXIT_USER_ERROR)
        if isinstance(error, MemoryError):
            _leave(f"out of memory ({error or 'no more is to be had'}). Give it more;", EXIT_USER_ERROR)
        traceback.print_exc()
        _leave(f"{type(error).__name__}: {error}\n", EXIT_BUG)


def _leave(why: str, exit_code: int) -> NoReturn:
    console.error(f"{why} what is finished is kept. The same command goes on:\n  {console.this_command()}")
    sys.exit(exit_code)


def _end_in_order() -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt and SystemExit once, and not again while the work is put away."""
    first: list[float] = []

    def end(number, frame):
        if first and time.monotonic() - first[0] > DEAF_S:
            os._exit(128 + number)
        if frame and frame.f_code.co_filename.startswith("<frozen importlib"):  # its callbacks swallow exceptions
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        elif not first:
            first.append(time.monotonic())
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(number)

    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is default:  # a shell lets what it starts in the background ignore Ctrl-C
            signal.signal(number, end)


def _make_streams_usable() -> None:
    """Print to nowhere where a stream was closed (`>&-`), and letters that a stream's encoding lacks as `\\xe9`."""
    while os.open(os.devnull, os.O_RDWR) <= 2:  # or a file that is opened later would get what C code prints
        pass
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _check_encoding() -> None:
    """Raises UserError where paths would not survive: in this shell, or on this command line."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise UserError(f"this shell's locale is {encoding}, so file names would be lost. Set LC_ALL=C.UTF-8.")
    wrong = [word for word in sys.argv if any("\udc80" <= c <= "\udcff" for c in word)]  # as Python reads other bytes
    if wrong:
        raise UserError([f"{console.printable(word)}: not UTF-8. Rename the file or directory." for word in wrong])


def _drop_unread_streams() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads; what is still to be flushed there is then dropped."""
    unread = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or without a file descriptor
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                unread = True
    return unread
