"""What every script does with its command line, its terminal and its exit code."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
import yaml
from conftest import ROOT

SCRIPTS = {
    "optimize_dataset.py": ["--input_dir={}", "--tokenizer_dir={}", "--output_dir={}/out"],
    "merge_files.py": ["--source_dir={}", "--target_dir={}/out"],
    "distributed_pretrain.py": ["--dataset_path={}", "--out_dir={}/out", "--model_name=pythia-14m"],
    "convert_pretrained_checkpoint.py": ["{}", "{}/out"],
}
ESCAPE = "\x1b["


def on_a_terminal(command: list, **variables: str) -> tuple[int, str]:
    """(exit code, all that appears) of a command whose output is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 200))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", **variables}
    environment.pop("NO_COLOR", None) if "NO_COLOR" not in variables else None
    process = subprocess.Popen(list(map(str, command)), stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            data = b""
        if not data:
            break
        shown += data
    os.close(ours)
    return process.wait(timeout=60), shown.decode(errors="replace")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_directory_is_the_users_error_coloured_on_a_terminal_only(script, tmp_path, run_script):
    arguments = [argument.format(tmp_path) for argument in SCRIPTS[script]]
    piped = run_script(script, *arguments, check=False)
    assert piped.returncode == 2
    assert "\nerror: " in f"\n{piped.stderr}" and "Traceback" not in piped.stderr
    assert ESCAPE not in piped.stdout + piped.stderr and "\r" not in piped.stdout + piped.stderr
    code, shown = on_a_terminal([sys.executable, script, *arguments])
    assert code == 2 and f"{ESCAPE}31;1merror: {ESCAPE}0m" in shown
    code, shown = on_a_terminal([sys.executable, script, *arguments], NO_COLOR="1")
    assert code == 2 and "error: " in shown and ESCAPE not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_the_users_error(script, run_script):
    process = run_script(script, "--no_such_flag=1", check=False)
    assert process.returncode == 2 and "no_such_flag" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_printed_settings_are_a_config_that_gives_the_same_settings(script, tmp_path, run_script):
    arguments = [argument.format(tmp_path) for argument in SCRIPTS[script]]
    printed = run_script(script, *arguments, "--print_config").stdout
    assert isinstance(yaml.safe_load(printed), dict)
    (tmp_path / "c.yaml").write_text(printed)
    assert run_script(script, f"--config={tmp_path / 'c.yaml'}", "--print_config").stdout == printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_defaults_and_every_script_that_works_long_has_a_dry_run(script, run_script):
    shown = run_script(script, "--help").stdout
    assert "--dry_run" in shown and "default: " in shown and "-q, --quiet" in shown


def test_bars_and_quiet(tmp_path, parquet_dir, tokenizer_dir):
    def command(name: str, *more: str) -> list:
        directories = [
            f"--input_dir={parquet_dir}",
            f"--tokenizer_dir={tokenizer_dir}",
            f"--output_dir={tmp_path / name}",
        ]
        return [sys.executable, "optimize_dataset.py", *directories, "--address=local", *more]

    code, shown = on_a_terminal(command("a"))
    assert code == 0 and re.search(r"\rtokenize: +\d+%\|.*tokens/s per core", shown), shown
    code, shown = on_a_terminal(command("b", "-q"))
    assert code == 0 and "\rtokenize" not in shown
    lines = [line for line in shown.splitlines() if "warning" not in line]  # the tokenizer adds no EOS
    assert [line.partition(":")[0] for line in lines] == ["train", "val"]


def said_about(run_script, script: str, *arguments) -> list[str]:
    """The problems that the script names, one line each; the last line says where all settings are listed."""
    process = run_script(script, *arguments, check=False, timeout=30)
    assert process.returncode == 2 and "Traceback" not in process.stderr and process.stdout == ""
    *problems, pointer = process.stderr.splitlines()
    assert pointer.startswith(f"All settings: `python {ROOT / script} --help`")
    assert all(problem.startswith("error: ") for problem in problems), process.stderr
    return [problem.removeprefix("error: ") for problem in problems]


@pytest.mark.parametrize(
    ("flag", "must_be"),
    [
        ("--train.lr_schedule=cosin", "one of cosine, wsd, linear, constant. Did you mean cosine?"),
        ("--precision=fp16", "one of bf16-mixed, float8-mixed, bf16-true, 32-true, or null"),
        ("--train.max_tokens=1.5", "a whole number, or null"),
        ("--train.max_tokens=many", "a whole number, or null"),
        ("--train.micro_batch_size=null", "a whole number"),
        ("--train.max_tokens=1e-3", "a whole number, or null"),
        ("--optimizer.lr=high", "a number"),
        ("--optimizer.betas=[0.9]", "a list of 2, each a number: [..., ...]"),
        ("--dry_run=perhaps", "true or false"),
        ("--data_mixture=3", "a mapping, {KEY: VALUE, ...}, each value a number, or null"),
    ],
)
def test_a_wrong_value_is_told_in_one_line_what_the_setting_takes(run_script, flag, must_be):
    assert said_about(run_script, "distributed_pretrain.py", flag) == [f"{flag}: must be {must_be}"]


def test_a_wrong_entry_of_a_mapping_and_a_section_as_flag(run_script):
    assert said_about(run_script, "distributed_pretrain.py", "--data_mixture.a=x") == [
        "--data_mixture: must be a mapping, {KEY: VALUE, ...}, each value a number, or null"
    ]
    assert said_about(run_script, "distributed_pretrain.py", "--train=3") == [
        "--train: is a section. Give its settings one by one, as --train.KEY=VALUE."
    ]


def test_all_that_is_wrong_with_a_config_file_and_flags_is_said_at_once(tmp_path, run_script):
    (tmp_path / "c.yaml").write_text(
        "train:\n  lr_schedule: cosin\n  max_tokens: 1.5\n  micro_batch_size: null\n  save_intervall: 3\n"
        "max_steps: 3\nnowhere: 1\neval: 5\nmodel_name: 5\nlog:\n"
    )
    config = f"--config={tmp_path / 'c.yaml'}"
    said = said_about(
        run_script,
        "distributed_pretrain.py",
        config,
        "--seed=x",
        "--sede=3",
        "--max_failurs",
        "2",
        "some",
        "--print_config",
    )
    assert sorted(said) == sorted(
        [
            f"{config}: train.lr_schedule: cosin: must be one of cosine, wsd, linear, constant. Did you mean cosine?",
            f"{config}: train.max_tokens: 1.5: must be a whole number, or null",
            f"{config}: train.micro_batch_size: null: must be a whole number",
            f"{config}: unknown key train.save_intervall. Did you mean train.save_interval?",
            f"{config}: unknown key max_steps. Did you mean train.max_steps?",
            f"{config}: unknown key nowhere.",
            f"{config}: eval: 5: must be a section of KEY: VALUE lines",
            f"{config}: model_name: 5: must be text (quote it in YAML), or null",
            "--seed=x: must be a whole number",
            "--sede: unknown flag. Did you mean --seed?",
            "--max_failurs: unknown flag. Did you mean --max_failures?",
            "some: unexpected argument. Flags start with --.",
        ]
    )


def test_whole_numbers_may_have_exponents_and_underscores(tmp_path, run_script):
    (tmp_path / "c.yaml").write_text(
        "train: {max_tokens: 1e6, max_steps: 1_000, save_interval: 2.0, epochs: 1}\nseed: 9007199254740993\nlog:\n"
    )
    flags = ("--train.lr_warmup_steps=1e2", "--train.global_batch_size=1_024", "--profile_steps=9007199254740993")
    printed = run_script("distributed_pretrain.py", f"--config={tmp_path / 'c.yaml'}", *flags, "--print_config").stdout
    settings = yaml.safe_load(printed)
    train = settings["train"]
    whole = [train[key] for key in ("max_tokens", "max_steps", "save_interval", "lr_warmup_steps", "global_batch_size")]
    assert whole == [1_000_000, 1000, 2, 100, 1024] and all(type(number) is int for number in whole)
    assert settings["seed"] == settings["profile_steps"] == 2**53 + 1 and type(train["epochs"]) is float


def test_required_settings_that_are_missing_are_all_named(run_script):
    said = said_about(run_script, "optimize_dataset.py")
    assert [line.partition(". ")[0] for line in said] == [
        f"--{name} is missing" for name in ("input_dir", "tokenizer_dir", "output_dir")
    ]
    assert "Directory with the parquet, Arrow or JSON lines files" in said[0]
    said = said_about(run_script, "convert_pretrained_checkpoint.py")
    assert [line.partition(". ")[0] for line in said] == ["checkpoint_dir is missing", "export_dir is missing"]
    assert said_about(run_script, "merge_files.py", "--sourcedir=a") == [
        "--sourcedir: unknown flag. Did you mean --source_dir?"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file."),
        (b"train:\n  max_steps: [1, 2\nout_dir: x\n", "line 3: did not find expected ',' or ']' (while parsing a flow"),
        (b"train:\n  a: b: c\n", "line 2: mapping values are not allowed"),
        (b"", "holds no settings."),
        (b"- a\n", "holds no settings."),
        (b"a\0b", "unacceptable character"),
        (b"\xff\xfe", "not a text file in UTF-8."),
    ],
)
def test_a_config_that_cannot_be_read_is_named_with_the_line(tmp_path, run_script, content, message):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    process = run_script("distributed_pretrain.py", "--config", path, check=False)
    assert process.returncode == 2 and process.stderr.startswith(f"error: --config={path}: {message}")
    assert "Traceback" not in process.stderr and "unicode string" not in process.stderr
    process = run_script("distributed_pretrain.py", "--config", tmp_path, check=False)
    assert process.returncode == 2 and process.stderr.startswith(f"error: --config={tmp_path}: is a directory")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--train.max_step=5", "--train.max_steps"),
        ("--see=1", "--seed"),
        ("--dry", "--dry_run"),
        ("--print_conf", "--print_config"),
    ],
)
def test_the_beginning_of_a_flag_is_not_taken_for_the_flag(run_script, flag, meant):
    name = flag.partition("=")[0]
    said = said_about(run_script, "distributed_pretrain.py", flag)
    assert said == [f"{name}: unknown flag. Did you mean {meant}?"]


def test_help_lists_settings_not_the_flags_of_sections(run_script):
    lines = run_script("distributed_pretrain.py", "--help").stdout.splitlines()
    flags = [line.split()[0] for line in lines if re.match(r" +--\w", line)]
    assert "--train.max_steps" in flags and "--config" in flags
    assert not {"--train", "--eval", "--log", "--optimizer", "--parallel", "--checkpoint"} & set(flags)


def run_code(directory, code: str, *arguments: str, **keywords) -> subprocess.CompletedProcess:
    """A script of one setting, `size`, whose main is the code."""
    (directory / "small.py").write_text(
        "import dataclasses\nfrom utils import cli, console\n"
        "@dataclasses.dataclass\nclass Settings:\n    'What is small.'\n    size: int = 1\n    'A size.'\n"
        f"def main(settings):\n    {code}\n"
        "cli.run(main, Settings, 'Small.')\n"
    )
    return subprocess.run(
        [sys.executable, directory / "small.py", *arguments],
        text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}, **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("say", ["console.say('a')", "print('a')"])
def test_a_reader_who_left_ends_the_script_quietly(tmp_path, say):
    reader, writer = os.pipe()
    os.close(reader)  # as after `... | head -1`
    process = run_code(tmp_path, say, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, "")


def test_another_broken_pipe_than_the_terminals_is_our_error(tmp_path):
    process = run_code(tmp_path, "raise BrokenPipeError(32, 'a socket')", capture_output=True)
    assert process.returncode == 1 and "a socket" in process.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_packages_is_told_how_to_get_them(script):
    process = subprocess.run(
        [sys.executable, "-S", script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr == (
        f"error: the package jsonargparse is not installed in this Python ({sys.executable}). "
        "Run: make setup && source .venv/bin/activate\n"
    )


def test_a_package_that_the_work_misses_is_named_and_a_missing_part_is_our_error(tmp_path):
    process = run_code(tmp_path, "import no_such_package_at_all.part", capture_output=True)
    assert process.returncode == 2 and "the package no_such_package_at_all is not installed" in process.stderr
    process = run_code(tmp_path, "import yaml.no_such_part", capture_output=True)
    assert process.returncode == 1 and "No module named 'yaml.no_such_part'" in process.stderr


def test_our_own_error_leaves_with_1_a_traceback_and_the_command_that_goes_on(tmp_path):
    process = run_code(tmp_path, "raise ZeroDivisionError('by mistake')", "--size=3", capture_output=True)
    assert process.returncode == 1
    assert "Traceback" in process.stderr and "ZeroDivisionError: by mistake" in process.stderr
    assert "The same command goes on" in process.stderr and "small.py --size=3" in process.stderr


def test_a_closed_stdout_costs_nothing_but_what_is_printed(tmp_path):
    """And no file that is opened later takes its place: what C code prints would land in it."""
    code = "print('a'); file = open('f', 'w'); file.write(str(file.fileno()))"
    (tmp_path / "work").mkdir()
    run_code(tmp_path, code, capture_output=True, cwd=tmp_path)  # makes the script
    for closed in (">&-", ">&- 2>&-"):
        line = f"exec {sys.executable} ../small.py {closed}"
        process = subprocess.run(
            ["sh", "-c", line],
            cwd=tmp_path / "work",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
        )
        assert (process.returncode, process.stderr) == (0, b"")
        assert int((tmp_path / "work" / "f").read_text()) > 2


def test_letters_that_the_terminal_lacks_are_printed_as_codes(tmp_path):

    process = run_code(tmp_path, r"console.say('caf\u00e9')", capture_output=True)
    assert (process.returncode, process.stdout) == (0, "caf\u00e9\n")
    process = subprocess.run(
        [sys.executable, tmp_path / "small.py"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (process.returncode, process.stdout, process.stderr) == (0, "caf\\xe9\n", "")


def test_a_locale_that_mangles_names_is_refused(tmp_path):
    run_code(tmp_path, "print('a')", capture_output=True)
    variables = {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.run(
        [sys.executable, tmp_path / "small.py"], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert process.returncode == 2 and process.stdout == ""
    assert "locale is ascii" in process.stderr and "LC_ALL=C.UTF-8" in process.stderr


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    process = run_code(tmp_path, "print('a')", b"--size=caf\xe9", capture_output=True)
    assert process.returncode == 2
    assert process.stderr == "error: --size=caf\\xe9: not UTF-8. Rename the file or directory.\n"


@pytest.mark.parametrize(
    ("name", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM")]
)
def test_a_signal_ends_the_work_once_however_often_it_comes(tmp_path, name, code, said):
    """The second to fifth arrive while the work is being put away."""
    raised = f"import os, signal; once = lambda: os.kill(os.getpid(), signal.{name})"
    tidy = "[once() for _ in range(4)]; print('put away')"
    process = run_code(
        tmp_path, f"{raised}\n    try:\n        once()\n    finally:\n        {tidy}", "--size=3", capture_output=True
    )
    assert (process.returncode, process.stdout) == (code, "put away\n")
    assert process.stderr.startswith(f"error: {said}; what is finished is kept. The same command goes on:\n")
    assert len(process.stderr.splitlines()) == 2 and "small.py --size=3" in process.stderr


IMPORTS_LATE = """
import dataclasses, time
from utils import cli

@dataclasses.dataclass
class Settings: pass

def main(settings):
    import pressed
    time.sleep(60)

cli.run(main, Settings, "")
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_comes_inside_an_import_ends_the_work_after_it(tmp_path, name, code):
    """Python's import calls back from where an exception is printed and swallowed: rarely, so here it is made so."""
    (tmp_path / "script.py").write_text(IMPORTS_LATE)
    (tmp_path / "pressed.py").write_text(
        f"import signal, sys\nnumber = signal.{name}\nsignal.getsignal(number)(number, sys._getframe(1))\n"
        "print('imported')\n"
    )
    process = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (code, "imported\n")
    assert "Traceback" not in process.stderr and process.stderr.count("The same command goes on") == 1


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "early.py").write_text("from utils import cli, console\nimport slow\n")
    process = subprocess.run(
        [sys.executable, tmp_path / "early.py"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (130, "error: interrupted before anything was done\n")


def test_a_lack_of_memory_is_no_bug(tmp_path):
    process = run_code(tmp_path, "raise MemoryError('malloc of size 9 failed')", capture_output=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "out of memory (malloc of size 9 failed)" in process.stderr


def test_a_full_disk_is_named(tmp_path):
    code = (
        "from utils.files import atomic_write\n    with atomic_write('whole') as f: raise OSError(28, 'No space left')"
    )
    process = run_code(tmp_path, code, capture_output=True, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.startswith("error: whole: No space left. Make room")
