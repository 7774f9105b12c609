"""What step 1 promises of its result: token ids, types, splits, and that nothing but text and settings shapes it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_parquet

from tokenization.chunk_reader import read_documents
from tokenization.encoder import Encoder
from tokenization.input_files import FileEntry
from tokenization.job import Unit
from tokenization.parquet import Footer, read_footer
from tokenization.units import UnitPacker, default_chunk_tokens, default_unit_bytes
from utils.chunks import read_index
from utils.manifest import read_manifest


def odd_documents(documents: list[str]) -> list[str]:
    """Real text, and text that breaks encoders."""
    rng = random.Random(0)
    letters = [
        chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2FFF), 0x1F600 + rng.randrange(64)]))
        for _ in range(5000)
    ]
    return [
        *documents,
        "a\0b\0\0c",
        "日本語の文章。中文文本，没有空格。한국어",
        "👩‍👩‍👧‍👦 🇩🇪 e\u0301 é \u200b\ufeff",
        "<|begin_of_text|>literal<|end_of_text|><|end_of_text|>",
        "   leading and trailing   \n\n\n\t\t ",
        " ",
        "\n",
        "x",
        "".join(letters),
        "word " * 5000,
        "1234567890" * 300,
        "\r\nwindows\r\nlines\r\n",
    ]


def split_tokens(output_dir: Path, split: str) -> list[list[int]]:
    folders = sorted(path.parent for path in (output_dir / split).glob("*/index.json"))
    return [
        document.tolist()
        for folder in folders
        for chunk in read_index(folder, "test").chunks
        for document in read_documents(folder / chunk.name, read_index(folder, "test").dtype)
    ]


@pytest.mark.parametrize("parse_special_tokens", [False, True])
def test_ids_equal_those_of_tokenizers_on_every_document(documents, tokenizer_dir, parse_special_tokens):
    from tokenizers import Tokenizer

    texts = odd_documents(documents)
    raw = (tokenizer_dir / "tokenizer.json").read_bytes()
    encoder = Encoder(raw, parse_special_tokens)
    assert encoder.backend == "gigatoken"
    ids, ends = encoder.encode(pa.array(texts))
    reference = Tokenizer.from_str(raw.decode())
    reference.encode_special_tokens = not parse_special_tokens
    for i, text in enumerate(texts):
        assert ids[ends[i] : ends[i + 1]].tolist() == reference.encode(text, add_special_tokens=False).ids, text[:80]
    literal = texts.index("<|begin_of_text|>literal<|end_of_text|><|end_of_text|>")
    found = {0, 1} & set(ids[ends[literal] : ends[literal + 1]].tolist())
    assert found == ({0, 1} if parse_special_tokens else set())


def test_sliced_and_large_arrays_encode_alike(documents, tokenizer_dir):
    encoder = Encoder((tokenizer_dir / "tokenizer.json").read_bytes())
    whole = pa.array(documents[:40])
    ids, ends = encoder.encode(whole[10:30])
    for other in (pa.array(documents[10:30]), pa.array(documents[10:30], pa.large_string())):
        other_ids, other_ends = encoder.encode(other)
        assert ids.tolist() == other_ids.tolist() and ends.tolist() == other_ends.tolist()


def test_a_wrong_encoder_is_noticed(documents, tokenizer_dir):
    from tokenization.encoder import EncodingMismatch

    encoder = Encoder((tokenizer_dir / "tokenizer.json").read_bytes())
    texts = pa.array(documents[:4])
    ids, ends = encoder.encode(texts)
    assert encoder.check(texts, ids, ends, [0, 3]) == 2
    wrong = ids.copy()
    wrong[ends[3]] += 1
    with pytest.raises(EncodingMismatch):
        encoder.check(texts, wrong, ends, [0, 3])


def test_tokenizer_that_gigatoken_cannot_load_falls_back(documents, tmp_path, run_script):
    """A word-level tokenizer: no byte-level BPE, so Hugging Face tokenizers does the work."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        documents, trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"])
    )
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "add_eos_token": True}))
    write_parquet(tmp_path / "in" / "a.parquet", documents[:60])
    process = run_script(
        "optimize_dataset.py",
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tmp_path / 'tok'}",
        f"--output_dir={tmp_path / 'out'}",
        "--val_fraction=0.2",
    )
    assert "encoder: tokenizers" in process.stdout
    found = sorted(split_tokens(tmp_path / "out", "train") + split_tokens(tmp_path / "out", "val"))
    assert found == sorted([*tokenizer.encode(text).ids, 1] for text in documents[:60])


@pytest.mark.parametrize("flag, around", [("--add_eos=true", (0, 1)), ("--add_bos=false --add_eos=true", (None, 1))])
def test_flags_choose_bos_and_eos(documents, tokenizer_dir, tmp_path, run_script, flag, around):
    from tokenizers import Tokenizer

    write_parquet(tmp_path / "in" / "a.parquet", documents[:30])
    arguments = [
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    run_script("optimize_dataset.py", *arguments, "--val_fraction=0.2", *flag.split())
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    bos, eos = ([token] if token is not None else [] for token in around)
    expected = sorted([*bos, *tokenizer.encode(text, add_special_tokens=False).ids, *eos] for text in documents[:30])
    assert sorted(split_tokens(tmp_path / "out", "train") + split_tokens(tmp_path / "out", "val")) == expected


def test_vocabulary_above_65536_is_stored_as_int32_and_read_by_litdata_and_litgpt(
    documents, tokenizer_dir, tmp_path, run_script
):
    tokenizer = json.loads((tokenizer_dir / "tokenizer.json").read_bytes())
    tokenizer["model"]["vocab"] |= {f"unused {i}": i for i in range(1024, 70000)}
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 70000, "content": "<|far|>"})
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (tmp_path / "tok" / name).write_bytes((tokenizer_dir / name).read_bytes())
    texts = [text + "<|far|>" for text in documents[:40]]
    write_parquet(tmp_path / "in" / "a.parquet", texts)
    arguments = [
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tmp_path / 'tok'}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    run_script("optimize_dataset.py", *arguments, "--val_fraction=0.2", "--parse_special_tokens")
    assert read_manifest(tmp_path / "out")["settings"]["dtype"] == "int32"
    train = split_tokens(tmp_path / "out", "train")
    assert all(document[-1] == 70000 for document in train)

    from litdata import StreamingDataset, TokensLoader
    from litgpt.data import LitData

    folder = tmp_path / "out" / "train" / "0"
    flat = np.concatenate([np.array(document) for document in train])
    assert StreamingDataset(str(folder), item_loader=TokensLoader(block_size=65))[3].tolist() == flat[195:260].tolist()
    data = LitData(data_path=folder, num_workers=0)
    data.connect(batch_size=1, max_seq_length=64)
    blocks = {tuple(flat[i * 65 : (i + 1) * 65].tolist()) for i in range(len(flat) // 65)}
    assert {tuple(batch[0].tolist()) for batch in data.train_dataloader()} == blocks


def test_split_depends_on_the_text_alone(documents, tokenizer_dir, tmp_path, run_script, ray_address):
    """Other file names, another order, other row groups, a duplicate: the same documents are validation data."""
    layouts = {
        "plain": {"a.parquet": documents[:200]},
        "shuffled": {
            "z/9.parquet": list(reversed(documents[:120])),
            "b.parquet": documents[120:200] + documents[:5],
        },
    }
    val = {}
    for name, files in layouts.items():
        for path, texts in files.items():
            write_parquet(tmp_path / name / path, texts, row_group_size=7 if name == "shuffled" else 50)
        run_script(
            "optimize_dataset.py",
            f"--input_dir={tmp_path / name}",
            f"--tokenizer_dir={tokenizer_dir}",
            f"--output_dir={tmp_path / 'out' / name}",
            "--val_fraction=0.1",
            f"--unit_bytes={40000 if name == 'shuffled' else 1 << 30}",
            f"--address={ray_address}",
        )
        val[name] = {tuple(document) for document in split_tokens(tmp_path / "out" / name, "val")}
        train = {tuple(document) for document in split_tokens(tmp_path / "out" / name, "train")}
        assert not val[name] & train
    assert val["plain"] == val["shuffled"]
    assert 5 <= len(val["plain"]) <= 40  # about a tenth of 200


def test_val_is_never_empty(documents, tokenizer_dir, tmp_path, run_script, ray_address):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:30], row_group_size=5)
    run_script(
        "optimize_dataset.py",
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
        "--val_fraction=0.00001",
        "--unit_bytes=10000",
        f"--address={ray_address}",
    )
    assert len(split_tokens(tmp_path / "out", "val")) == 1
    assert len(split_tokens(tmp_path / "out", "train")) == 29


def test_shuffle_is_seeded_and_within_a_unit(documents, tokenizer_dir, tmp_path, run_script, ray_address):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:100], row_group_size=10)
    outputs = {}
    for name, seed in (("none", None), ("one", 1), ("again", 1), ("two", 2)):
        run_script(
            "optimize_dataset.py",
            f"--input_dir={tmp_path / 'in'}",
            f"--tokenizer_dir={tokenizer_dir}",
            f"--output_dir={tmp_path / name}",
            "--val_fraction=0.1",
            "--unit_bytes=60000",
            f"--address={ray_address}",
            *([] if seed is None else [f"--shuffle_seed={seed}"]),
        )
        folder = tmp_path / name / "train" / "0"
        outputs[name] = {
            path.name: [tuple(document.tolist()) for document in read_documents(path, "uint16")]
            for path in sorted(folder.glob("*.bin"))
        }
    assert outputs["one"] == outputs["again"] != outputs["two"]
    assert outputs["none"] != outputs["one"] and len(outputs["none"]) > 1
    for name, unit in outputs["none"].items():
        assert sorted(unit) == sorted(outputs["one"][name])  # the same documents, in the same unit's chunk


def test_null_and_empty_texts_are_counted_and_odd_shapes_work(documents, tokenizer_dir, tmp_path, run_script):
    """Zero-row files, one-row row groups, dictionary and large strings, nulls: nothing lost, nothing invented."""
    inputs = tmp_path / "in"
    write_parquet(inputs / "a.parquet", [None, "", documents[0], None, documents[1], ""], row_group_size=1)
    write_parquet(inputs / "b_empty.parquet", [])
    write_parquet(inputs / "c_all_null.parquet", [None, None], row_group_size=2)
    pq.write_table(pa.table({"text": pa.array(documents[2:6]).dictionary_encode()}), inputs / "d.parquet")
    pq.write_table(pa.table({"text": pa.array(documents[6:9], pa.large_string())}), inputs / "e.parquet")
    (inputs / "readme.md").write_text("not data")
    (inputs / "_metadata.parquet").write_bytes(b"hidden")
    arguments = [f"--input_dir={inputs}", f"--tokenizer_dir={tokenizer_dir}", f"--output_dir={tmp_path / 'out'}"]
    process = run_script("optimize_dataset.py", *arguments, "--val_fraction=0.3", "--chunk_tokens=1")
    content = read_manifest(tmp_path / "out")["content"]
    assert (content["skipped_null"], content["skipped_empty"]) == (4, 2)
    assert "4 null and 2 empty" in process.stdout
    assert content["train"]["documents"] + content["val"]["documents"] == 9
    assert content["train"]["chunks"] == content["train"]["documents"]  # every chunk full with one document


def test_limit_documents_and_other_text_column(documents, tokenizer_dir, tmp_path, run_script):
    write_parquet(tmp_path / "in" / "a.parquet", documents[:50], row_group_size=10, column="body")
    arguments = [
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    run_script("optimize_dataset.py", *arguments, "--text_column=body", "--limit_documents=23", "--val_fraction=0.2")
    content = read_manifest(tmp_path / "out")["content"]
    assert content["train"]["documents"] + content["val"]["documents"] == 23


def packed(footers: list[tuple[int, Footer]], unit_bytes: int, limit_rows: int | None = None) -> list[Unit]:
    packer = UnitPacker(unit_bytes, limit_rows)
    for file_index, footer in footers:
        packer.add(file_index, footer)
    return packer.finish()


def test_units_cover_every_row_group_once():
    rng = random.Random(1)
    footers = []
    for i in range(300):
        rows = tuple(rng.randrange(0, 50) for _ in range(rng.randrange(0, 9)))
        footers.append((i, Footer(rows, tuple(r * 100 for r in rows), "")))
    units = packed(footers, 10_000)
    covered = [
        (piece.file_index, group) for unit in units for piece in unit.ranges for group in range(piece.first, piece.last)
    ]
    assert covered == [(i, g) for i, footer in footers for g, rows in enumerate(footer.rows) if rows]
    assert sum(unit.rows for unit in units) == sum(sum(footer.rows) for _, footer in footers)
    assert all(unit.text_bytes >= 10_000 for unit in units[:-1])
    assert [unit.index for unit in units] == list(range(len(units)))

    limited = packed(footers, 10_000, limit_rows=777)
    assert sum(unit.rows if unit.max_rows is None else unit.max_rows for unit in limited) == 777


def test_defaults_hold_from_megabytes_to_all_of_fineweb():
    fineweb_bytes = 27_000 * 2_000_000_000
    units = fineweb_bytes * 1.5 / default_unit_bytes(fineweb_bytes)
    assert 10_000 < units < 200_000
    assert 15e12 / default_chunk_tokens(fineweb_bytes) < 300_000
    assert default_unit_bytes(10_000_000) == 4 << 20
    assert default_chunk_tokens(10_000_000) == 2049 * 8012


def test_footer_fingerprint_changes_with_the_content(documents, tmp_path):
    write_parquet(tmp_path / "a.parquet", documents[:40])
    before = read_footer(str(tmp_path), FileEntry("a.parquet", 0), "text")
    write_parquet(tmp_path / "a.parquet", documents[1:41])
    assert read_footer(str(tmp_path), FileEntry("a.parquet", 0), "text").fingerprint != before.fingerprint


def test_a_few_validation_documents_do_not_keep_their_batches_in_memory(tmp_path):
    from tokenization.chunk_writer import ChunkWriter
    from tokenization.job import chunk_name

    writer = ChunkWriter(tmp_path, lambda i: chunk_name(0, i), "int32", chunk_tokens=1 << 30)
    batch = np.zeros(1 << 20, np.int32)
    writer.add(batch, np.array([100, len(batch) - 200, 100]))
    for first in (0, 200):
        writer.add(batch[first : first + 100], np.array([100]))
    assert [np.shares_memory(piece, batch) for piece in writer._pieces] == [True, False, False]


def test_struct_columns_before_the_text_do_not_confuse_its_size(tmp_path):
    """Row groups count leaves, the schema counts columns."""
    from tokenization.parquet import leaf_index

    table = pa.table({"meta": [{"a": 1, "b": "x"}] * 3, "text": ["long text " * 1000] * 3})
    pq.write_table(table, tmp_path / "nested.parquet", compression="none", use_dictionary=False)
    metadata = pq.read_metadata(tmp_path / "nested.parquet")
    assert leaf_index(metadata, "text") == 2
    assert read_footer(str(tmp_path), FileEntry("nested.parquet", 0), "text").text_bytes[0] > 25_000


def test_an_interrupted_raise_of_the_threshold_is_finished(documents, tokenizer_dir, tmp_path, run_script, ray_address):
    """Two copies of the one validation document in two units; a crash after the first was done again."""
    for name in ("a", "b"):
        write_parquet(tmp_path / "in" / f"{name}.parquet", documents[:20], row_group_size=20)
    arguments = [
        f"--input_dir={tmp_path / 'in'}",
        f"--tokenizer_dir={tokenizer_dir}",
        f"--output_dir={tmp_path / 'out'}",
        "--val_fraction=0.00001",
        "--unit_bytes=10000",
        f"--address={ray_address}",
    ]
    run_script("optimize_dataset.py", *arguments)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.bin")}
    assert len(split_tokens(tmp_path / "out", "val")) == 2
    lines = (tmp_path / "out" / "progress.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4  # two units, both done twice
    (tmp_path / "out" / "progress.jsonl").write_bytes(b"".join(lines[:3]))
    for path in (tmp_path / "out").rglob("manifest.json"):
        path.unlink()
    run_script("optimize_dataset.py", *arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.bin")} == whole
