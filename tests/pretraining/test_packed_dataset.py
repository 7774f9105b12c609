"""Training on packed blocks: steps 1 and 2 with --pack_tokens, a run that is killed and goes on, and what tools say."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_a_script, said_by, write_parquet
from litgpt.config import Config
from litgpt.model import GPT
from pretrain_ranks import (
    digests_of,
    kill_when,
    losses_of,
    metrics_of,
    run_ranks,
    settings_of,
    start_ranks,
    weights_of,
)
from tiny_runs import TINY_MODEL, write_config

from pretraining.data import Sequences
from pretraining.model import initialise
from tokenization.chunk_reader import read_documents
from tools import inspect_dataset, show_batch, verify
from tools.read_documents import Blocks
from utils.chunks import read_index
from utils.manifest import read_manifest
from utils.metrics_file import read_metrics

pytestmark = pytest.mark.long

BLOCK, NUM_STEPS, BATCH = 33, 12, 16
DATASETS = {"bos": ("--add_bos=true", "--add_eos=true"), "eos": ("--add_bos=false", "--add_eos=true")}
PACKED = (f"--pack_tokens={BLOCK}", "--pack_window_tokens=1024")


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    """Shorter than a block for the most part, so that blocks hold several, and some that are longer."""
    texts = [document[: 8 + 67 * i % 100] for i, document in enumerate(documents) if document.isascii()][:400]
    return list(dict.fromkeys(texts))


@pytest.fixture(scope="module")
def work(tmp_path_factory, texts, tokenizer_dir) -> Path:
    """Two packed datasets, and runs on them: `whole`, `killed` and resumed, and one of documents that only EOS ends."""
    work = tmp_path_factory.mktemp("packed")
    write_parquet(work / "parquet" / "a.parquet", texts)
    for name, separators in DATASETS.items():
        places = [f"--input_dir={work}/parquet", f"--tokenizer_dir={tokenizer_dir}", f"--output_dir={work}/{name}/OUT"]
        how = ["--address=local", "--num_workers=1", "--unit_bytes=9000", "--val_fraction=0.15"]
        run_a_script("optimize_dataset.py", *places, *how, *separators)
        for split in ("train", "val"):
            merge = [f"--source_dir={work}/{name}/OUT/{split}", f"--target_dir={work}/{name}/DATA/{split}"]
            run_a_script("merge_files.py", *merge, *PACKED)

    train = {"global_batch_size": BATCH, "micro_batch_size": 2, "max_steps": NUM_STEPS, "save_interval": 4}
    train |= {"document_masking": True, "lr_schedule": "constant"}
    config = write_config(work / "tiny.yaml", train=train, eval={"interval": 4}, tokenizer_dir=str(tokenizer_dir))

    def settings(run: str, dataset: str = "bos", **changes):
        return settings_of(config, work / dataset / "DATA", work / run, 2, **changes)

    run_ranks([settings("whole"), settings("ended", "eos", train__max_steps=1)], 2, work / "job-whole")
    killed, out_dir = settings("killed"), work / "killed"
    steps_done = lambda: [record["step"] for record in read_metrics(out_dir)]  # noqa: E731
    kill_when(start_ranks([killed], 2, work / "job-killed"), lambda: max([0, *steps_done()]) >= 6)
    assert not (out_dir / "final").exists(), "it was done before it was killed"
    run_ranks([killed], 2, work / "job-resumed")
    return work


def test_a_killed_run_goes_on_bit_identical(work):
    whole, killed = work / "whole", work / "killed"
    assert len(losses_of(whole)) == NUM_STEPS and losses_of(whole)[-1] < losses_of(whole)[0]
    assert {record.get("epoch") for record in metrics_of(whole)} >= {0, 1}, "no epoch ended"
    assert losses_of(killed) == losses_of(whole)
    assert digests_of(killed) == digests_of(whole)
    validated = [[r["val_loss"] for r in metrics_of(run) if "val_loss" in r] for run in (whole, killed)]
    assert validated[0] == validated[1] != []
    expected, found = (weights_of(run / "final")["model"] for run in (whole, killed))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def loss_of_pieces_alone(blocks: Blocks, numbers: list[int]) -> float:
    """By litgpt's own model with the first weights of the runs. The pieces are those that the chunks' headers count."""
    model = GPT(Config(**TINY_MODEL))
    initialise(model, model.config, seed=42)
    total = num_several = 0
    for number in numbers:
        pieces = [blocks.tokens(part)[part.first : part.end] for part in blocks.parts(number)]
        begins = np.cumsum([0, *map(len, pieces)])[:-1]
        row = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
        bounds = [*begins[begins < BLOCK - 1].tolist(), BLOCK - 1]
        num_several += len(bounds) > 2
        for begin, end in itertools.pairwise(bounds):
            logits = model(row[None, begin:end])[0]
            total += F.cross_entropy(logits, row[begin + 1 : end + 1], reduction="sum").item()
    assert num_several > len(numbers) / 4
    return total / (len(numbers) * (BLOCK - 1))


@pytest.mark.parametrize("run, dataset", [("whole", "bos"), ("ended", "eos")])
def test_every_token_counts_in_the_loss_and_no_piece_sees_another(work, run, dataset):
    directory = work / dataset / "DATA"
    sequences = Sequences([directory / "train"], None, BLOCK, seed=42)
    numbers = sequences.order.locate(np.arange(BATCH)).block.tolist()
    first = next(record for record in metrics_of(work / run) if "loss" in record)
    alone = loss_of_pieces_alone(Blocks(0, read_index(directory / "train", "test"), BLOCK), numbers)
    assert first["loss"] == pytest.approx(alone, abs=1e-5)
    assert first["tokens"] == BATCH * (BLOCK - 1)


@pytest.mark.parametrize("dataset", DATASETS)
def test_an_epoch_has_every_token_of_the_text_once_and_nothing_else(work, dataset, texts, tokenizer_dir):
    """Compared with what `tokenizers` itself makes of the texts, each with its separators."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    before = [tokenizer.token_to_id("<|begin_of_text|>")] if dataset == "bos" else []
    after = [tokenizer.token_to_id("<|end_of_text|>")]
    expected = np.zeros(1024, np.int64)
    for text in texts:
        ids = [*before, *tokenizer.encode(text, add_special_tokens=False).ids, *after]
        expected += np.bincount(ids, minlength=1024)
    for split in ("train", "val"):
        directory = work / dataset / "DATA" / split
        sequences = Sequences([directory], None, BLOCK, seed=42)
        rows = sequences.read(np.arange(sequences.num_blocks[0])).numpy()
        rest = read_manifest(directory, "dataset")["packing"]["rest_tokens"]
        assert rest < BLOCK
        last = np.concatenate(read_documents(sorted(directory.glob("packed-*"))[-1], "uint16"))
        expected -= np.bincount([*rows.flatten(), *last[len(last) - rest :]], minlength=1024)
    assert not expected.any()


def test_litgpts_own_reader_gives_the_same_blocks(work):
    from litdata import StreamingDataset, TokensLoader
    from litgpt.data import LitData

    directory = work / "bos" / "DATA"
    ours = Sequences([directory / "train"], None, BLOCK, seed=42)
    num_blocks = ours.num_blocks[0]
    streamed = StreamingDataset(str(directory / "train"), item_loader=TokensLoader(block_size=BLOCK))
    assert len(streamed) == num_blocks
    for number in range(num_blocks):
        np.testing.assert_array_equal(streamed[number], ours.datasets[0][number])

    data = LitData(data_path=directory, split_names=("train", "val"), num_workers=0)
    data.connect(batch_size=1, max_seq_length=BLOCK - 1)
    for loader, split in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        mine = Sequences([directory / split], None, BLOCK, seed=42)
        expected = sorted(mine.read(np.arange(mine.num_blocks[0])).tolist())
        assert sorted(batch[0].tolist() for batch in loader) == expected


# --- tools ------------------------------------------------------------------------------------------------------------


def plain(shown: str) -> str:
    return re.sub(r"<\|(begin|end)_of_text\|>", "", shown)


def test_show_batch_shows_pieces_of_documents(work, capsys, texts, tokenizer_dir):
    from tokenizers import Tokenizer

    run = str(work / "killed")
    show = lambda **how: said_by(capsys, lambda: show_batch.main(show_batch.Settings(run, **how)))  # noqa: E731
    said = show(step=f"1:{NUM_STEPS}", text_chars=0)
    assert len(re.findall(r"^step \d+: .*, as logged$", said, re.M)) == NUM_STEPS
    assert not re.search(r"^  document ", said, re.M)
    pieces = re.findall(r"^  piece .*, tokens (.*) to (.*) of (.*); row not known: .* packed.*\n    (.*)$", said, re.M)
    assert len(pieces) > 1.5 * NUM_STEPS * BATCH
    num_whole = 0
    for first, last, total, shown in pieces:
        assert (int(first), int(last) + 1) == (0, int(total)), "a piece stands in one block as it is"
        shown = ast.literal_eval(shown)
        is_whole = shown.startswith("<|begin_of_text|>") and shown.endswith("<|end_of_text|>")
        num_whole += is_whole
        assert plain(shown) in texts if is_whole else any(plain(shown) in text for text in texts)
    assert num_whole > len(pieces) / 3

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    rows = Sequences([work / "bos" / "DATA" / "train"], None, BLOCK, seed=42).read(np.arange(NUM_STEPS * BATCH))
    decoded = tokenizer.decode_batch(rows.tolist(), skip_special_tokens=False)
    for text in (plain(decoded[40])[5:12], "the"):
        wanted = {i // BATCH + 1 for i, sequence in enumerate(decoded) if text in sequence}
        assert {int(step) for step in re.findall(r"step (\d+) \(", show(search=text))} == wanted != set()


def test_a_run_on_packed_data_is_traced_back_to_its_text(work, capsys, texts):
    settings = verify.Settings(str(work / "killed" / "final"), deep=True, num_units=100)
    said = said_by(capsys, lambda: verify.main(settings))
    assert said.count("packed again from the tokens") == 2
    assert f"tokenized again: {len(texts)} documents" in said and "CHANGED" not in said


def test_inspect_dataset_shows_pieces_and_says_so(work, capsys, texts, tokenizer_dir):
    directory = work / "bos" / "DATA" / "train"
    settings = inspect_dataset.Settings(str(directory), tokenizer_dir=str(tokenizer_dir), num_samples=40)
    said = said_by(capsys, lambda: inspect_dataset.main(settings))
    manifest = read_manifest(directory, "dataset")
    assert f"{manifest['packing']['pieces']:,} pieces of {manifest['content']['documents']:,} documents" in said
    assert "every checksum" in said and f"most {BLOCK}" in said
    samples = re.split(r"\n--- piece .*\n", said)[1:]
    assert len(samples) == 40 and "--- document" not in said
    for shown in samples:
        assert any(plain(shown).removesuffix("\n") in text for text in texts), shown
