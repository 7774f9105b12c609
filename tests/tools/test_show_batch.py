"""The command that shows what a run read: a mixture of two datasets, one of them shuffled and read several times, by a
run that was interrupted and went on with another number of processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_a_script, said_by
from pretrain_ranks import run_ranks, settings_of
from tiny_runs import write_config

from tools.read_documents import Blocks
from tools.run_data import RunData, find_datasets, find_run
from tools.show_batch import Settings, main
from utils.errors import UserError

NUM_STEPS, INTERRUPTED_AT, BATCH = 24, 9, 8


def write_parquet(path: Path, texts: list[str | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=4)


@pytest.fixture(scope="module")
def work(tmp_path_factory, documents, tokenizer_dir) -> Path:
    work = tmp_path_factory.mktemp("work")
    large = [None, *documents[:5], "", *documents[5:14]]
    small = [*documents[20:22], None, *documents[22:25]]
    for name, texts, flags in (("large", large, []), ("small", small, ["--shuffle_seed=3"])):
        write_parquet(work / name / "parquet" / "a.parquet", texts[: len(texts) // 2])
        write_parquet(work / name / "parquet" / "sub" / "b.parquet", texts[len(texts) // 2 :])
        places = ["--input_dir=parquet", f"--tokenizer_dir={tokenizer_dir}", "--output_dir=tokens"]
        how = ["--address=local", "--num_workers=1", "--unit_bytes=9000", "--chunk_tokens=900", "--val_fraction=0.2"]
        run_a_script("optimize_dataset.py", *places, *how, *flags, cwd=work / name)
        for split in ("train", "val"):
            merge = [f"--source_dir=tokens/{split}", f"--target_dir=dataset/{split}"]
            run_a_script("merge_files.py", *merge, cwd=work / name)
    mixture = {str(work / name / "dataset"): weight for name, weight in (("large", 1), ("small", 3))}
    train = {"max_steps": NUM_STEPS, "save_interval": 3}
    config = write_config(
        work / "tiny.yaml", data_mixture=mixture, train=train, eval={"interval": 50}, tokenizer_dir=str(tokenizer_dir)
    )

    def part(num_ranks: int, steps: int):
        settings = settings_of(config, "null", work / "run", num_ranks, train__max_steps=steps)
        return run_ranks([settings], num_ranks, work / f"job-{steps}")

    part(2, INTERRUPTED_AT)
    part(1, NUM_STEPS)
    return work


def show(capsys, work: Path, code: int = 0, **settings) -> str:
    return said_by(capsys, lambda: main(Settings(str(work / "run"), **settings)), code)


def test_every_batch_is_the_one_whose_digest_was_logged(work, capsys):
    said = show(capsys, work, step=f"1:{NUM_STEPS}", rows=False)
    assert len(re.findall(r"^step \d+: .*, as logged$", said, re.M)) == NUM_STEPS
    assert len(re.findall(r"^position ", said, re.M)) == NUM_STEPS * BATCH
    epochs = {int(epoch) for epoch in re.findall(r"small/dataset/train, epoch (\d+)", said)}
    assert {0, 1} <= epochs  # it was read to its end


def test_the_documents_of_a_sequence_are_its_tokens(work):
    run = find_run(str(work / "run"))
    data = RunData(run.manifest["settings"], find_datasets(run, None), run.left_out)
    blocks = [Blocks(i, index, data.block_tokens) for i, index in enumerate(data.indexes)]
    positions = np.arange(NUM_STEPS * BATCH)
    located, num_several = data.sequences.order.locate(positions), 0
    for i, row in enumerate(data.sequences.read(positions).numpy()):
        parts = blocks[located.source[i]].parts(int(located.block[i]))
        pieces = [blocks[located.source[i]].tokens(part)[part.first : part.end] for part in parts]
        np.testing.assert_array_equal(np.concatenate(pieces), row)
        assert all(int(located.block[i]) in blocks[located.source[i]].blocks_of(part) for part in parts)
        num_several += len(parts) > 1
    assert num_several > 0


def test_each_row_that_is_named_holds_the_document(work, capsys, tokenizer_dir):
    """Read from the parquet file at the printed place, and encoded by tokenizers itself."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    said = show(capsys, work, step="1:12", text_chars=0)
    assert "row not" not in said and "OTHER TOKENS" not in said
    pattern = r"tokens ([\d,]+) to ([\d,]+) of ([\d,]+); (\S+), row group (\d+), row (\d+)\n    (.*)"
    found, dataset = set(), ""
    for line, following in zip(said.splitlines(), [*said.splitlines()[1:], ""]):
        if line.startswith("position "):
            dataset = "small" if "small/dataset" in line else "large"
        elif match := re.search(pattern, f"{line}\n{following}"):
            first, last, total, path, group, row, shown = match.groups()
            texts = pq.ParquetFile(work / dataset / "parquet" / path).read_row_group(int(group))["text"].to_pylist()
            ids = tokenizer.encode(texts[int(row)]).ids
            assert len(ids) == int(total.replace(",", ""))
            part = ids[int(first.replace(",", "")) : int(last.replace(",", "")) + 1]
            assert repr(tokenizer.decode(part, skip_special_tokens=False)) == shown
            found.add((dataset, path, group, row))
    assert {dataset for dataset, *_ in found} == {"small", "large"} and len(found) > 8


def test_a_search_finds_every_step_at_which_a_text_was_read(work, capsys, tokenizer_dir):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    run = find_run(str(work / "run"))
    data = RunData(run.manifest["settings"], find_datasets(run, None), run.left_out)
    sequences = {
        step: tokenizer.decode_batch(data.sequences.read(data.positions(step)).tolist(), skip_special_tokens=False)
        for step in range(1, NUM_STEPS + 1)
    }
    several = 0
    for text in (sequences[2][1][30:42], sequences[20][3][30:42], "the", "statement"):
        wanted = {step for step, texts in sequences.items() if any(text in sequence for sequence in texts)}
        said = show(capsys, work, search=text, rows=False)
        # A text across two sequences is in neither; the search names the steps of both.
        apart = {
            int(step)
            for entry in re.split(r"\n(?=/)", said)
            if len(re.findall(r"^    block ", entry, re.M)) == 1
            for step in re.findall(r"step (\d+) \(", entry)
        }
        everywhere = {int(step) for step in re.findall(r"step (\d+) \(", said)}
        assert apart <= wanted <= everywhere, text
        several += len(wanted) > 1
    assert several


def test_a_text_that_no_document_has_is_an_error(work):
    with pytest.raises(UserError, match="in no document of"):
        main(Settings(str(work / "run"), search="no such text anywhere"))


def test_a_rank_shows_its_own_sequences(work, capsys):
    said = show(capsys, work, step="4", rank=1, num_processes=2, rows=False)
    assert [int(p) for p in re.findall(r"^position (\d+) \(rank 1 of 2\)", said, re.M)] == [25, 27, 29, 31]
    assert "(rank 0 of 1)" in show(capsys, work, step="20", rows=False)  # as the last part of the run had it
    assert "position 100 (by itself)" in show(capsys, work, position=100, rows=False)


def test_a_batch_that_is_not_the_logged_one_is_told(work, capsys, tmp_path):
    shutil.copytree(work / "run", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["step"] == 5:
            record["batch_digest"] = "0" * 16
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = show(capsys, tmp_path, code=1, step="4:5", rows=False)
    assert said.count("as logged") == 1 and said.count("NOT THE ONE THAT WAS LOGGED, 0000000000000000") == 1


def test_other_data_is_refused_and_other_text_is_told(work, capsys, tmp_path):
    """Whoever asks must not be shown a document that was never read."""
    parquet = Path(shutil.copytree(work / "large" / "parquet", tmp_path / "parquet"))
    write_parquet(parquet / "a.parquet", ["another text"])
    said = show(capsys, work, step="1", parquet_dir=str(parquet))
    assert "is not what was tokenized (a.parquet: another file" in said and "row group" not in said
    other = Path(shutil.copytree(work / "large" / "dataset", tmp_path / "dataset"))
    with pytest.raises(UserError, match="not the dataset that this run read"):
        main(Settings(str(work / "run"), step="1", dataset_dir=str(work / "small" / "dataset")))
    shutil.rmtree(other / "train")
    with pytest.raises(UserError, match="Give the directory with train/"):
        main(Settings(str(work / "run"), step="1", dataset_dir=str(other)))


def test_where_the_text_is_far_away_the_rows_are_not_known(work, capsys, tmp_path):
    places = {work / name / "parquet": tmp_path / "far" / "away" / name for name in ("large", "small")}
    (tmp_path / "far" / "away").mkdir(parents=True)
    try:
        for near, far in places.items():
            shutil.move(near, far)
        said = show(capsys, work, step="1")
    finally:
        for near, far in places.items():
            shutil.move(far, near)
    assert "row not known: the input files of step 1 are not near the dataset (--parquet_dir)" in said


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give one of them, not none"),
        ({"step": "1", "search": "x"}, "not --step and --search"),
        ({"step": "0"}, f"this run has steps 1 to {NUM_STEPS}"),
        ({"step": "20:99"}, f"this run has steps 1 to {NUM_STEPS}"),
        ({"step": "three"}, "give a step as 100"),
        ({"search": ""}, "not empty"),
        ({"position": 1, "rank": 0}, "needs --step"),
        ({"position": -1}, "begin with 0"),
        ({"step": "1", "rank": 5}, "--rank=5"),
        ({"step": "1", "tokenizer_dir": "nowhere"}, "no tokenizer.json"),
    ],
)
def test_wrong_settings_are_named(work, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main(Settings(str(work / "run"), **settings))
