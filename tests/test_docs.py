"""What the documentation shows must exist: every script, module, flag, file and link."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [
    *ROOT.glob("*.py"),
    *ROOT.glob("*.sh"),
    *(ROOT / "config_hub").glob("*.yaml"),
    *(ROOT / "examples").rglob("*.*"),
]
# Of other programs, or generic.
COMMAND = re.compile(
    r"python (?:-m )?((?:examples/|benchmarks/)?[a-z_]+\.py(?!\w)|tools\.[a-z_]+)((?: [^\n`|]*)?(?:\\\n[^\n`]*)*)"
)


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(script, flags) of each command of ours in a file."""
    text = re.sub(r"\n#\s*", "\n", path.read_text()) if path.suffix in (".yaml", ".sh") else path.read_text()
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for script, arguments in COMMAND.findall(text):
        flags = re.findall(r"(?<![\w-])--([a-zA-Z_.]+)", arguments.split("#")[0].split(", then")[0])
        found.append((script, flags))
    return found


@cache
def known_flags(script: str) -> set[str]:
    """From --help."""
    command = ["-m", script] if script.startswith("tools.") else [script]
    process = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert process.returncode == 0, process.stderr
    return set(re.findall(r"--([a-zA-Z_.]+)", process.stdout))


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_scripts_and_flags_that_exist(path):
    for script, flags in commands(path):
        unknown = set(flags) - known_flags(script) - {"help", "config"}
        assert not unknown, f"{path.name}: {script} has no {unknown}"


# Where each command of the pages is run: by a test, by .ci/run, or not here, for want of what the page then names.
RUN_BY = {
    r"make (demo|test|lint|setup|clean|PYTHON=\S+ demo)\b": ".ci/run",
    r"make (test-all|format|requirements)\b": "by hand: a subset runs in .ci/run",
    r"poetry ": "needs Poetry",
    r"python optimize_dataset\.py ": "test_pipeline.py::test_tokens_are_counted_alike_by_every_step",
    r"python merge_files\.py ": "test_pipeline.py::test_tokens_are_counted_alike_by_every_step",
    r"python distributed_pretrain\.py --config config_hub/llama3-8b\.yaml.* --dry_run": (
        "test_config_hub.py::test_dry_run_plans_it_on_80_gb"
    ),
    r"python distributed_pretrain\.py --config config_hub/llama3-8b\.yaml": "needs GPUs",
    r"python distributed_pretrain\.py --config config_hub/llama3\.2-1b\.yaml.* --dry_run --tokens": (
        "pretraining/test_dry_run.py::test_it_needs_neither_data_nor_a_tokenizer_and_says_how_long_a_run_takes"
    ),
    r"python distributed_pretrain\.py --config config_hub/demo-cpu\.yaml": ".ci/run",
    r"python -m lightning\.pytorch\.utilities\.consolidate_checkpoint ": (
        "test_pipeline.py::test_consolidation_with_its_renames_then_conversion_gives_the_same_model"
    ),
    r"python convert_pretrained_checkpoint\.py --help": (
        "test_pipeline.py::test_help_is_quick_and_has_the_command_lines"
    ),
    r"python convert_pretrained_checkpoint\.py ": (
        "test_pipeline.py::test_the_model_loads_in_litgpt_and_transformers_alike_and_has_learnt"
    ),
    r"litgpt chat ": "export/test_convert_pretrained_checkpoint_commands.py::test_litgpt_chat",
    r"litgpt evaluate |lm_eval ": (
        "export/test_convert_pretrained_checkpoint_commands.py::test_litgpt_evaluate_and_lm_eval"
    ),
    r"litgpt finetune ": (
        "export/test_convert_pretrained_checkpoint_commands.py::test_litgpt_finetune_accepts_the_directory"
    ),
    r"python -m tools\.check_cluster ": "tools/test_check_cluster.py::test_a_sound_cluster_shows_a_table_and_a_report",
    r"python -m tools\.find_fastest ": (
        "tools/test_find_fastest.py::test_each_combination_is_a_row_whatever_becomes_of_it"
    ),
    r"python -m tools\.inspect_dataset ": "tools/test_inspect_dataset.py::test_shows_counts_samples_and_a_picture",
    r"python -m tools\.run_page ": (
        "tools/test_run_page.py::test_every_record_event_sample_setting_and_dataset_is_in_the_page"
    ),
    r"python -m tools\.plot_curves ": "tools/test_plot_curves.py::test_one_picture_of_one_and_of_several_runs",
    r"python -m tools\.verify ": ("tools/test_verify.py::test_everything_agrees_from_the_export_to_the_parquet_files"),
    r"python -m tools\.show_batch ": ("tools/test_show_batch.py::test_every_batch_is_the_one_whose_digest_was_logged"),
    r"python -m tools\.prepare_task ": (
        "tools/test_prepare_task.py::test_the_tokens_are_those_that_lm_eval_gives_a_model"
    ),
    r"python -m tools\.sweep_learning_rate ": (
        "tools/test_sweep_learning_rate.py::test_each_rate_is_a_run_and_a_finished_one_is_not_trained_again"
    ),
    r"python -m tools\.suggest ": "tools/test_suggest.py::test_training_accepts_the_yaml",
    r"python distributed_pretrain\.py --config my-run\.yaml": "tools/test_suggest.py::test_training_accepts_the_yaml",
    r"python benchmarks/gpu_acceptance\.py": "test_gpu_acceptance.py::test_every_row_runs_in_small_and_without_ray",
    r"python benchmarks/ten_billion_tokens\.py": "test_made_up_text.py::test_nothing_is_lost_between_text_and_training",
    r"python benchmarks/": "test_benchmarks.py::test_every_benchmark_runs",
    r"bash pipeline\.sh": "test_pipeline.py::test_again_has_nothing_to_do",
    r"(hf|litgpt) download |pip install |git clone |docker |wandb sync": "needs a network",
    r"ray (start|stop|status|get-auth-token)\b": (
        "test_cluster_examples.py::test_cluster_with_a_token_serves_who_has_it_and_nobody_else"
    ),
    r"ray (up|down|exec|attach|dashboard|symmetric-run)\b|kubectl |sbatch |sky ": "needs a cluster",
}


def shown_commands(page: Path) -> list[str]:
    """Every command of a page that one can paste: in code blocks, and in line where it has an argument."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    programs = r"(?:python|bash|make|poetry|pip|git|hf|litgpt|lm_eval|ray|docker|kubectl|sbatch|sky|wandb)"
    blocks = [*re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S), *re.findall(r"^ {4}\S.*$", text, re.M)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in lines]  # VARIABLE=value command
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    in_line = [code for code in re.findall(r"`([^`]+)`", prose) if len(code.split()) > 2]  # `litgpt chat` is a name
    return [line for line in [*lines, *in_line] if re.match(rf"{programs} \S", line)]


def test_every_command_is_run_by_a_test_or_says_what_it_needs():
    used = set()
    for page in PAGES:
        for command in shown_commands(page):
            pattern = next((pattern for pattern in RUN_BY if re.match(pattern, command)), None)
            assert pattern, f"{page.name}: nobody runs `{command}`"
            used.add(pattern)
    assert used == set(RUN_BY), f"no page shows {set(RUN_BY) - used}"
    for where in RUN_BY.values():
        if "::" in where:
            name, test = where.split("::")
            assert f"def {test}(" in (ROOT / "tests" / name).read_text(), where


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://", "#")):
            continue
        name, _, heading = target.partition("#")
        linked = path.parent / name
        assert linked.exists(), f"{path.name}: {target}"
        if heading:
            slugs = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in linked.read_text().splitlines()
                if line.startswith("#")
            ]
            assert heading in slugs, f"{path.name}: {target}"


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page.resolve())
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            linked = (page.parent / target).resolve()
            if linked not in reached:
                todo.append(linked)
    assert {page.resolve() for page in PAGES} <= reached


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"^ {4}make ([a-z.-]+)", page.read_text(), re.M):
            assert target in targets, f"{page.name}: make {target}"


def test_shell_words_are_balanced():
    for page in PAGES:
        for line in re.findall(r"^ {4}(python [^\n\\]*)$", page.read_text(), re.M):
            shlex.split(line)


def test_the_project_speaks_of_itself_alone():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    machine = re.compile(r"(?<![\w.])/(?:work|farm)/|py" + r"pi\.org|python" + "hosted")
    for name in files:
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".lock"):
            assert not machine.search(path.read_text(errors="replace")), name
