"""What goes wrong with steps 1 and 2 at a user's desk: one clear message each, and nothing lost."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizer_kinds as kinds
from conftest import ROOT, write_parquet
from test_optimize_dataset import user_error
from test_optimize_dataset_crashes import ended, local_workers, wait_for

from optimize_dataset import record_or_user_error
from tokenization.encoder import MAX_REFERENCE_BYTES
from tokenization.plan import make_plan
from utils.errors import UserError
from utils.tokenizer import read_tokenizer_info


def arguments(source: Path, tokenizer_dir: Path, output: Path, *more: str) -> list[str]:
    directories = [f"--input_dir={source}", f"--tokenizer_dir={tokenizer_dir}", f"--output_dir={output}"]
    return [*directories, "--address=local", "--val_fraction=0.2", *more]


@pytest.fixture
def some_parquet(tmp_path, documents) -> Path:
    write_parquet(tmp_path / "some in" / "a.parquet", documents[:40], row_group_size=10)
    return tmp_path / "some in"


def test_two_columns_of_the_same_name(tmp_path, tokenizer_dir, documents, run_script):
    (tmp_path / "in").mkdir()
    column = pa.array(documents[:9])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "in" / "a.parquet")
    said = user_error(run_script, *arguments(tmp_path / "in", tokenizer_dir, tmp_path / "out"))
    assert "a.parquet: 2 columns are called 'text'. Name the column of the text with --text_column" in said


@pytest.mark.parametrize("what", ["a link to nowhere", "a name that is too long"])
def test_an_output_directory_that_cannot_be(some_parquet, tokenizer_dir, tmp_path, run_script, what):
    output = tmp_path / ("o" * 300 if "long" in what else "out")
    if "link" in what:
        output.symlink_to(tmp_path / "nowhere")
    said = user_error(run_script, *arguments(some_parquet, tokenizer_dir, output))
    expected = f"is a link to {tmp_path / 'nowhere'}, which is missing" if "link" in what else "File name too long"
    assert expected in said


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_several_tokens_as_a_separator(tokenizer_dir, tmp_path, kind):
    shutil.copytree(tokenizer_dir, tmp_path / "tok")
    config = {"bos_token": "<|begin_of_text|>", f"{kind}_token": ["<|end_of_text|>", "a"]}
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"its {kind}_token is \['<\|end_of_text\|>', 'a'\]. Name one token"):
        read_tokenizer_info(tmp_path / "tok")


@pytest.mark.parametrize("processor", ["RobertaProcessing", "BertProcessing"])
def test_what_a_post_processor_by_name_adds(tokenizer_dir, tmp_path, processor):
    shutil.copytree(tokenizer_dir, tmp_path / "tok")
    tokenizer = json.loads((tokenizer_dir / "tokenizer.json").read_bytes())
    names = {"cls": ["<|begin_of_text|>", 0], "sep": ["<|end_of_text|>", 1]}
    tokenizer["post_processor"] = {"type": processor, **names, "trim_offsets": True, "add_prefix_space": False}
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(tokenizer))
    info = read_tokenizer_info(tmp_path / "tok")
    assert (info.adds_bos, info.adds_eos) == (True, True)


@pytest.mark.parametrize("line", ["null", "[]", '"unit"', "3", "unit null", "unit 999", "split null"])
def test_lines_of_the_progress_file_that_are_no_units_of_this_run(
    some_parquet, tokenizer_dir, tmp_path, run_script, line
):
    output = tmp_path / "out"
    command = arguments(some_parquet, tokenizer_dir, output)
    run_script("optimize_dataset.py", *command)
    expected = json.loads((output / "manifest.json").read_bytes())["content"]
    (output / "manifest.json").unlink()
    progress = output / "progress.jsonl"
    record = json.loads(progress.read_text().splitlines()[-1])
    changed = {
        "unit null": {**record, "unit": None},
        "unit 999": {**record, "unit": 999},
        "split null": {**record, "train": None},
    }
    with open(progress, "a") as file:
        file.write((json.dumps(changed[line]) if line in changed else line) + "\n")
    run_script("optimize_dataset.py", *command)
    assert json.loads((output / "manifest.json").read_bytes())["content"] == expected


def test_too_few_open_files_for_the_workers(some_parquet, tokenizer_dir, tmp_path):
    command = [sys.executable, "optimize_dataset.py", *arguments(some_parquet, tokenizer_dir, tmp_path / "out")]
    line = f"ulimit -n 32; exec {shlex.join(command)} --num_workers=40"
    process = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr
    assert "--num_workers=40: " in process.stderr and "Too many open files" in process.stderr
    assert "ulimit -n" in process.stderr


def test_a_reader_short_of_memory_does_not_call_the_file_bad(tmp_path):
    """Or --on_bad_file=quarantine would leave good rows out."""
    pq.write_table(pa.table({"text": ["a" * 300_000_000]}), tmp_path / "a.parquet")
    code = (
        "import resource, sys\nfrom tokenization.parquet import stream_texts\n"
        "limit = int(open('/proc/self/statm').read().split()[0]) * 4096 + (100 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n    list(stream_texts(sys.argv[1], 'a.parquet', 0, [0], 'text'))\n"
        "except MemoryError as error:\n    print('MemoryError')\n"
    )
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, tmp_path]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert process.stdout == "MemoryError\n", process.stderr


def settings_of(source: Path, tokenizer_dir: Path, output: Path):
    from optimize_dataset import Settings

    return Settings(str(source), str(tokenizer_dir), str(output), val_fraction=0.2)


def test_a_worker_short_of_memory_is_named_with_the_remedy(some_parquet, tokenizer_dir, tmp_path):
    plan = make_plan(settings_of(some_parquet, tokenizer_dir, tmp_path / "out"))
    with pytest.raises(UserError, match=r"ran out of memory \(malloc of size 9 failed\). Lower --num_workers"):
        record_or_user_error(pa.ArrowMemoryError("malloc of size 9 failed"), plan)


def test_next_commands_can_be_pasted_and_one_document_is_not_documents(documents, tokenizer_dir, tmp_path, run_script):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:2])
    output = tmp_path / "my tokens" / "out"
    process = run_script(
        "optimize_dataset.py", *arguments(tmp_path / "in", tokenizer_dir, output, "--val_fraction=0.001")
    )
    for split in ("train", "val"):
        assert f"{split}: 1 document, " in process.stdout
    assert "1 documents" not in process.stdout
    said = [line.strip() for line in process.stdout.splitlines() if line.startswith("  python merge_files.py")]
    assert len(said) == 2
    for line, split in zip(said, ("train", "val")):
        script, *flags = shlex.split(line)[1:]
        assert flags[0] == f"--source_dir={output / split}"
        merged = run_script(script, *flags)
        assert ": 1 document, " in merged.stdout
    target = shlex.split(said[0])[3].partition("=")[2]
    assert f"--source_dir={shlex.quote(str(output / 'val'))}" in run_script(
        "merge_files.py", f"--source_dir={output / 'train'}", f"--target_dir={target}"
    ).stdout.replace("'--source_dir=", "--source_dir='")


def test_a_full_disk_in_the_merge_names_the_file(documents, tokenizer_dir, tmp_path, small_disk, run_script):
    write_parquet(tmp_path / "in" / "a.parquet", 3 * documents)
    run_script("optimize_dataset.py", *arguments(tmp_path / "in", tokenizer_dir, tmp_path / "out"))
    target = small_disk / "train"
    process = run_script(
        "merge_files.py", f"--source_dir={tmp_path / 'out' / 'train'}", f"--target_dir={target}", check=False
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert f"error: {target}/chunk-0000000-0.bin: No space left on device" in process.stderr
    assert not target.exists() or os.listdir(target) == []


def test_a_document_too_large_for_the_only_encoder(tmp_path, documents, run_script):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(kinds.KINDS["no pattern"]()))
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    write_parquet(tmp_path / "in" / "a.parquet", [*documents[:5], "word " * (MAX_REFERENCE_BYTES // 5 + 1)])
    said = user_error(run_script, *arguments(tmp_path / "in", tmp_path / "tok", tmp_path / "out", "--add_eos=true"))
    assert f"--input_dir={tmp_path / 'in'}: a.parquet: a document of 67 MB, which only Hugging Face tokenizers" in said
    assert "Split the document into several rows or remove it" in said


def test_how_many_documents_went_to_the_reference_is_recorded(tmp_path, documents, run_script):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(kinds.KINDS["a word as token"]()))
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    texts = documents[:30]
    write_parquet(tmp_path / "in" / "a.parquet", texts, row_group_size=10)
    command = arguments(tmp_path / "in", tmp_path / "tok", tmp_path / "out", "--add_eos=true", "--unit_bytes=1")
    process = run_script("optimize_dataset.py", *command)
    records = [json.loads(line) for line in (tmp_path / "out" / "progress.jsonl").read_text().splitlines()]
    by_reference = sum("the" in text or "is" in text for text in texts)
    assert 0 < by_reference < 30 or by_reference == 30
    assert sum(record["reference_documents"] for record in records) == by_reference
    assert (
        f"encoder: gigatoken, but tokenizers for what it may encode differently in {by_reference} document"
        in process.stdout
    )


def test_sigterm_says_what_is_kept_and_how_to_go_on(tokenizer_dir, tmp_path, some_parquet):
    output = tmp_path / "out"
    command = [sys.executable, "optimize_dataset.py", *arguments(some_parquet, tokenizer_dir, output)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    workers = wait_for(lambda: local_workers(process), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said
    assert "ended by SIGTERM; what is finished is kept" in said and f"--output_dir={output}" in said
    assert ended(workers)


def test_units_without_documents_have_a_speed_too():
    """They took no time that anything is divided by."""
    import types

    from optimize_dataset import run_units
    from tokenization.job import SplitRecord, Unit, UnitRecord
    from tokenization.workers import Workers

    class AtOnce(Workers):
        unit = None

        def num_free(self):
            return int(self.unit is None)

        def submit(self, job, unit):
            self.unit = unit

        def finished(self):
            unit, self.unit = self.unit, None
            return [(unit, UnitRecord(unit.index, "0", SplitRecord(), SplitRecord(), skipped_null=5))]

    kept = []
    units = [Unit(index, (), rows=5, text_bytes=0) for index in range(2)]
    run_units(types.SimpleNamespace(text_bytes=1), None, units, AtOnce(), kept.append)
    assert [record.unit for record in kept] == [0, 1]
