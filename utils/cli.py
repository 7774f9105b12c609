"""One way for every script to become a command line: a dataclass of settings in, an exit code out.

A field of the dataclass is a flag, its docstring the help text. `--config FILE.yaml` sets any of them,
flags on the command line win over it. Only jsonargparse is imported here, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jsonargparse

from utils import console
from utils.errors import UserError

EXIT_OK = 0
EXIT_OUR_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# What the owner of a disk can mend.
USERS_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

# Configs are files on this machine's file system: no URL, no fsspec path.
jsonargparse.set_parsing_settings(
    docstring_parse_attribute_docstrings=True,
    config_read_mode_urls_enabled=False,
    config_read_mode_fsspec_enabled=False,
)


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None):
        message = message.removeprefix("Validation failed: ").removeprefix("Parser ")
        unknown_key = re.match(r"Key '(.+)' is not expected|Group '.+' does not accept nested key '(.+)'", message)
        if unknown_key:  # flags that do not exist are "Unrecognized arguments": a key stands in a file
            message = f"--config={self.config_file}: unknown key '{unknown_key[1] or unknown_key[2]}'"
        raise UserError(
            f"{message}\nAll settings: `python {self.prog} --help`; as YAML: `python {self.prog} --print_config`."
        ) from ex


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def add_usage(self, usage, actions, groups, prefix=None):
        """The generated usage line of sixty flags tells nobody anything; the docstring has the command lines."""


def make_parser(settings_class: type, description: str, positional: bool = False) -> jsonargparse.ArgumentParser:
    """The parser for a script.

    Args:
        settings_class: dataclass; nested dataclasses become dotted flags (`--train.global_batch_size`).
        description: the script's docstring, shown as it is written.
        positional: whether settings without default are positional arguments. A list of words is a field with
            metadata {"nargs": "+", "help": ..}.
    """
    parser = _Parser(
        prog=sys.argv[0],
        description=description,
        formatter_class=_Help,
        print_config="--print_config",
    )
    parser.add_argument("--config", action="config", help="YAML file with settings; flags win over it.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Only results, warnings and errors.")
    parser.add_argument("-v", "--verbose", action="store_true", help="Details too, and tracebacks.")
    several = [field for field in dataclasses.fields(settings_class) if "nargs" in field.metadata]
    for field in several:  # jsonargparse wants lists as one word, [A,B]; shells make several of A B
        parser.add_argument(field.name, nargs=field.metadata["nargs"], help=field.metadata["help"])
    parser.add_class_arguments(settings_class, as_positional=positional, skip={field.name for field in several})
    return parser


def parse_settings(settings_class: type, description: str, argv: list[str] | None = None, positional: bool = False):
    """Settings from the command line; raises UserError, naming the config file if the fault is there."""
    parser = make_parser(settings_class, description, positional)
    argv = _spell_out_switches(settings_class, sys.argv[1:] if argv is None else argv)
    parser.config_file = _config_file(argv)
    arguments = parser.parse_args(argv)
    if arguments.quiet or arguments.verbose:
        console.VERBOSITY = 0 if arguments.quiet else 2
    for name in ("config", "quiet", "verbose"):
        arguments.pop(name, None)
    return settings_class(**parser.instantiate_classes(arguments).as_dict())


def _switches(settings_class: type, prefix: str = "--") -> Iterator[str]:
    """The flags of all bool settings, nested ones too."""
    types = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        if types[field.name] is bool:
            yield prefix + field.name
        elif dataclasses.is_dataclass(types[field.name]):
            yield from _switches(types[field.name], f"{prefix}{field.name}.")


def _spell_out_switches(settings_class: type, argv: list[str]) -> list[str]:
    """`--dry_run` alone means `--dry_run=true`; jsonargparse asks for the value."""
    switches = set(_switches(settings_class))
    return [
        f"{flag}=true" if flag in switches and following not in ("true", "false", "True", "False") else flag
        for flag, following in zip(argv, [*argv[1:], None])
    ]


def _config_file(argv: list[str]) -> str | None:
    for flag, following in zip(argv, [*argv[1:], None]):
        if flag == "--config":
            return following
        if flag.startswith("--config="):
            return flag.partition("=")[2]
    return None


def run(
    main: Callable[[Any], None],
    settings_class: type,
    description: str,
    positional: bool = False,
) -> None:
    """Parse, call `main(settings)`, and leave with the exit code that tells who must act.

    0: done. 2: the user's error, every problem in one go, no traceback. 130: Ctrl-C.
    1: our error, with traceback. After a failure the command that resumes is printed.
    """
    try:
        main(parse_settings(settings_class, description, positional=positional))
    except UserError as error:
        for problem in error.problems:
            console.error(problem)
        if console.VERBOSITY >= 2:
            traceback.print_exc()
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno not in USERS_ERRNOS:
            raise_ours(error)
        console.error(
            f"{error.filename or 'a file'}: {error.strerror}. Make room, or give a directory that can be written. What is "
            f"finished is kept; the same command goes on:\n  {console.this_command()}"
        )
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        console.error(f"interrupted; what is finished is kept. The same command goes on:\n  {console.this_command()}")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        raise_ours(error)


def raise_ours(error: Exception) -> typing.NoReturn:
    """Leave with a traceback: this is for us to mend."""
    traceback.print_exc()
    console.error(
        f"{type(error).__name__}: {error}\nWhat is finished is kept. The same command goes on:\n  {console.this_command()}"
    )
    sys.exit(EXIT_OUR_ERROR)
