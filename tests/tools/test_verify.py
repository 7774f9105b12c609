"""The command that proves where something came from: one small real pipeline, and damage of every kind to copies."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_a_script, said_by
from pretrain_ranks import run_ranks, settings_of
from tiny_runs import TINY_MODEL, write_config

from export.bill_of_materials import write_bill
from tools.verify import Settings, main
from utils.manifest import file_entry

TOKENIZE = ["--address=local", "--num_workers=1", "--val_fraction=0.1", "--unit_bytes=60000", "--chunk_tokens=8000"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Corpus, tokenizer, tokens, dataset, a run of six steps, its export; moved since, as a whole."""
    work = tmp_path_factory.mktemp("made") / "work"
    work.mkdir()
    corpus = ["--output_dir=corpus", "--tokenizer_dir=tokenizer", "--size=400kB", "--num_files=2", "--vocab_size=512"]
    run_a_script("examples/make_demo_corpus.py", *corpus, cwd=work)
    places = ["--input_dir=corpus", "--tokenizer_dir=tokenizer", "--output_dir=tokens"]
    run_a_script("optimize_dataset.py", *places, *TOKENIZE, cwd=work)
    for split in ("train", "val"):
        run_a_script("merge_files.py", f"--source_dir=tokens/{split}", f"--target_dir=dataset/{split}", cwd=work)
    model = {**TINY_MODEL, "vocab_size": 512, "padded_vocab_size": 512}
    config = write_config(work / "tiny.yaml", model_config=model, tokenizer_dir=str(work / "tokenizer"))
    run_ranks([settings_of(config, work / "dataset", work / "run", 1)], 1, work / "job")
    run_a_script("convert_pretrained_checkpoint.py", work / "run" / "final", work / "export")
    return work.rename(work.with_name("kept"))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def verify(capsys, directory: Path, code: int = 0, **settings) -> str:
    return said_by(capsys, lambda: main(Settings(str(directory), **settings)), code)


def wrong_lines(said: str) -> list[str]:
    """(directory: line) for each line of the tree that says CHANGED or MISSING."""
    lines, title = [], ""
    for line in said.splitlines():
        if named := re.match(r"[|` -]*((?:export|checkpoint|dataset|tokens|input files|tokenizer)  .*)", line):
            title = named[1]
        elif found := re.match(r"[| ]*(CHANGED|MISSING) +(.*)", line):
            lines.append(f"{title}: {found[1]} {found[2]}")
    return lines


def test_everything_agrees_from_the_export_to_the_parquet_files(made, capsys):
    said = verify(capsys, made / "export", deep=True, num_units=2)
    assert "all that is here agrees" in said and "0 cannot be made" in said
    for what in ("export", "checkpoint", "dataset", "tokens", "input files", "tokenizer"):
        assert re.search(rf"^[|` -]*{what}  ", said, re.M), said
    assert "2 of 5 units tokenized again" in said
    assert "stored values equal the checkpoint's" in said
    assert "batches of steps 1, 2, 3, 4, 6: digests" in said


@pytest.mark.parametrize("name", ["run", "run/step-00000003", "dataset", "dataset/val", "tokens/train/0", "tokenizer"])
def test_one_can_begin_anywhere(made, capsys, name):
    assert "all that is here agrees" in verify(capsys, made / name)


@pytest.mark.parametrize("gone", ["corpus", "tokens", "dataset", "run"])
def test_what_is_not_here_is_said_and_is_no_damage(copy, capsys, gone):
    shutil.rmtree(copy / gone)
    said = verify(capsys, copy / "export")
    assert "not here" in said and "name its place with --" in said


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(path: Path, change, entry_in: Path | None = None) -> None:
    """Change a JSON file; `entry_in`: the manifest that lists it is put right, as a forger would do."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    if entry_in is not None:
        put_right(entry_in, path.name)


def put_right(manifest: Path, name: str) -> None:
    value = json.loads(manifest.read_text())
    value["files"] = [
        {**entry, **file_entry(manifest.parent, name)} if entry["name"] == name else entry for entry in value["files"]
    ]
    for entry in value["files"]:
        if entry["name"] == name and "sha256" in entry:
            entry["sha256"] = hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest()
    manifest.write_text(json.dumps(value))


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def replace_row(path: Path) -> None:
    """One row of a parquet file, the same number of bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    texts = table["text"].to_pylist()
    texts[3] = texts[3][::-1]
    place = table.schema.get_field_index("text")
    pq.write_table(table.set_column(place, "text", pa.array(texts)), path, row_group_size=8, compression="zstd")


def other_step(work: Path) -> None:
    shutil.rmtree(work / "run" / "final")
    shutil.copytree(work / "run" / "step-00000003", work / "run" / "final")


def forged_state(work: Path) -> None:
    import torch

    path = work / "run" / "final" / "lit_model.pth" / "meta.pt"
    torch.save({**torch.load(path, weights_only=True), "position": 8}, path)
    put_right(work / "run" / "final" / "manifest.json", "lit_model.pth/meta.pt")


def forged_weights(work: Path) -> None:
    manifest = work / "export" / "manifest.json"
    flip(work / "export" / "model.safetensors")
    put_right(manifest, "model.safetensors")
    write_bill(manifest.parent, json.loads(manifest.read_text()))
    put_right(manifest, "model.cdx.json")


def without_bill(work: Path) -> None:
    """As an earlier version exported."""
    (work / "export" / "model.cdx.json").unlink()
    edit(work / EXPORT, lambda m: m.update(files=[e for e in m["files"] if e["name"] != "model.cdx.json"]))


def edit_bill(work: Path, change) -> None:
    edit(work / "export" / "model.cdx.json", change, entry_in=work / EXPORT)


def component(bill: dict, ref: str) -> dict:
    return next(part for part in bill["components"] if part["bom-ref"].startswith(ref))


def swapped_chunks(index: dict) -> None:
    index["chunks"][0], index["chunks"][1] = index["chunks"][1], index["chunks"][0]


def drop_unit(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def first_chunk(directory: Path) -> Path:
    return sorted(directory.glob("*.bin"))[0]


EXPORT, FINAL, TRAIN = "export/manifest.json", "run/final/manifest.json", "dataset/train/manifest.json"
DAMAGES = {
    # export
    "export: weight flipped": (
        lambda w: flip(w / "export/model.safetensors"),
        "export",
        "model.safetensors: its content",
    ),
    "export: litgpt weight": (
        lambda w: flip(w / "export/lit_model.pth", 20000),
        "export",
        "lit_model.pth: its content",
    ),
    "export: config.json": (
        lambda w: edit(w / "export/config.json", lambda c: c.update(rope_theta=1)),
        "export",
        "config.json",
    ),
    "export: file gone": (
        lambda w: (w / "export/generation_config.json").unlink(),
        "export",
        "MISSING generation_config",
    ),
    "export: tokenizer.json": (
        lambda w: replace_text(w / "export/tokenizer.json", '"version"', '"version" '),
        "export",
        "tokenizer.json: ",
    ),
    "export: training": (
        lambda w: edit(w / EXPORT, lambda m: m["content"]["training"].update(step=5)),
        "export",
        "content.training.step",
    ),
    "export: parameters": (
        lambda w: edit(w / EXPORT, lambda m: m["content"].update(parameters=7)),
        "export",
        "lit_model.pth.parameters",
    ),
    "export: manifest cut": (
        lambda w: edit(w / EXPORT, lambda m: m["content"].pop("dtype")),
        "export",
        "lacks what it should have",
    ),
    "export: model_config": (
        lambda w: (
            replace_text(w / "export/model_config.yaml", "n_layer: 2", "n_layer: 3"),
            put_right(w / EXPORT, "model_config.yaml"),
        ),
        "export",
        "model_config.yaml: not the checkpoint's",
    ),
    "export: SHA-256": (
        lambda w: edit(w / EXPORT, lambda m: m["files"][0].update(sha256="0" * 64)),
        "export",
        "its content is not the one whose SHA-256",
    ),
    "export: bill changed": (
        lambda w: replace_text(w / "export/model.cdx.json", "self-supervised", "semi-supervised"),
        "export",
        "model.cdx.json: its content",
    ),
    "export: bill gone": (
        lambda w: (w / "export/model.cdx.json").unlink(),
        "export",
        "MISSING model.cdx.json",
    ),
    "export: bill, counts": (
        lambda w: edit_bill(w, lambda b: component(b, "dataset/0")["properties"][2].update(value="7")),
        "export",
        "model.cdx.json.components.dataset/0.properties.pretrain-toolkit:documents.value: '7', manifest.json says",
    ),
    "export: bill, parquet file": (
        lambda w: edit_bill(w, lambda b: b["components"].remove(component(b, "text/"))),
        "export",
        ".parquet: None, manifest.json says",
    ),
    "export: bill, hash": (
        lambda w: edit_bill(
            w, lambda b: component(b, "dataset/1")["components"][0]["hashes"][0].update(content="0" * 64)
        ),
        "export",
        "model.cdx.json.components.dataset/1.components.manifest.json.hashes.SHA-256.content: '0000",
    ),
    "export: bill, dependency": (
        lambda w: edit_bill(w, lambda b: b["dependencies"][0]["dependsOn"].pop()),
        "export",
        "model.cdx.json.dependencies.checkpoint.dependsOn",
    ),
    "export: bill, order": (
        lambda w: edit_bill(w, lambda b: b["components"].reverse()),
        "export",
        "model.cdx.json: in another order",
    ),
    "export: bill of another export": (
        lambda w: edit(w / EXPORT, lambda m: m["content"].update(model="other")),
        "export",
        "model.cdx.json.metadata.component.name",
    ),
    "export: bill is none": (
        lambda w: ((w / "export/model.cdx.json").write_text("[1]"), put_right(w / EXPORT, "model.cdx.json")),
        "export",
        "model.cdx.json: not a bill of materials that an export has",
    ),
    # checkpoint
    "checkpoint: shard flipped": (
        lambda w: flip(w / "run/final/lit_model.pth/__0_0.distcp", 5000),
        "checkpoint",
        "__0_0.distcp: its content",
    ),
    "checkpoint: shard gone": (
        lambda w: (w / "run/final/lit_model.pth/__0_0.distcp").unlink(),
        "checkpoint",
        "MISSING lit_model.pth/__0_0",
    ),
    "checkpoint: another step's": (
        other_step,
        "checkpoint",
        "not the one that this was made from: content.step: was 6",
    ),
    "checkpoint: another run's": (
        lambda w: edit(w / FINAL, lambda m: m["settings"].update(seed=7)),
        "checkpoint",
        "settings.seed: was 42, is 7",
    ),
    "checkpoint: state": (forged_state, "checkpoint", "meta.pt.position: 8, manifest.json says 48"),
    "checkpoint: hyperparameters": (
        lambda w: (
            replace_text(w / "run/final/hyperparameters.yaml", "weight_decay: 0.1", "weight_decay: 0.2"),
            put_right(w / FINAL, "hyperparameters.yaml"),
        ),
        "checkpoint",
        "hyperparameters.yaml.optimizer.weight_decay: 0.2, manifest.json says 0.1",
    ),
    "checkpoint: model_config": (
        lambda w: replace_text(w / "run/final/model_config.yaml", "n_head: 4", "n_head: 2"),
        "checkpoint",
        "model_config.yaml.n_head: 2, manifest.json says 4",
    ),
    "checkpoint: tokenizer.json": (
        lambda w: replace_text(w / "run/final/tokenizer.json", '"version"', '"version" '),
        "checkpoint",
        "tokenizer.sha256",
    ),
    "checkpoint: tokens": (
        lambda w: edit(w / FINAL, lambda m: m["content"].update(tokens=5)),
        "checkpoint",
        "content.tokens: was 1536, is 5",
    ),
    "checkpoint: manifest unreadable": (lambda w: truncate(w / FINAL), "export", "not readable as JSON"),
    "checkpoint: metrics": (
        lambda w: replace_text(w / "run/metrics.jsonl", '"tokens": 1536', '"tokens": 1537'),
        "checkpoint",
        "metrics.jsonl.tokens: 1537, manifest.json says 1536",
    ),
    # dataset
    "dataset: byte flipped": (
        lambda w: flip(first_chunk(w / "dataset/train")),
        "dataset",
        "chunk-0000000-0.bin: its content",
    ),
    "dataset: val byte flipped": (lambda w: flip(first_chunk(w / "dataset/val")), "dataset", ".bin: its content"),
    "dataset: header flipped": (lambda w: flip(first_chunk(w / "dataset/train"), 4), "dataset", "document offsets"),
    "dataset: chunk gone": (
        lambda w: first_chunk(w / "dataset/train").unlink(),
        "dataset",
        "MISSING chunk-0000000-0.bin",
    ),
    "dataset: chunk cut short": (
        lambda w: truncate(first_chunk(w / "dataset/train")),
        "dataset",
        "100 bytes, the index",
    ),
    "dataset: count": (
        lambda w: edit(w / "dataset/train/index.json", lambda i: i["chunks"][1].update(dim=1)),
        "dataset",
        "index.json: chunk-0000000-1.bin.tokens",
    ),
    "dataset: order": (
        lambda w: edit(w / "dataset/train/index.json", swapped_chunks),
        "dataset",
        "another order of the chunks",
    ),
    "dataset: order, to the run": (
        lambda w: edit(w / "dataset/train/index.json", swapped_chunks),
        "checkpoint",
        "its chunks are not those of the run",
    ),
    "dataset: index gone": (lambda w: (w / "dataset/train/index.json").unlink(), "dataset", "no index.json in it"),
    "dataset: stamp": (
        lambda w: edit(w / "dataset/val/index.json", lambda i: i.update(updated_at="1")),
        "dataset",
        "updated_at",
    ),
    "dataset: setting": (
        lambda w: edit(w / TRAIN, lambda m: m["settings"].update(bos_id=3)),
        "dataset",
        "settings.bos_id: was",
    ),
    "dataset: text_bytes": (
        lambda w: edit(w / TRAIN, lambda m: m["content"].update(text_bytes=1)),
        "dataset",
        "content.text_bytes",
    ),
    "dataset: fingerprint": (
        lambda w: edit(w / TRAIN, lambda m: m.update(fingerprint="0" * 64)),
        "dataset",
        "fingerprint of its chunks",
    ),
    "dataset: manifest unreadable": (lambda w: truncate(w / TRAIN), "checkpoint", "not readable as JSON"),
    # tokens
    "tokens: byte flipped": (
        lambda w: flip(first_chunk(w / "tokens/train/0")),
        "tokens",
        "train/0: chunk-0000000-0.bin",
    ),
    "tokens: chunk gone": (lambda w: first_chunk(w / "tokens/val/0").unlink(), "tokens", "MISSING val/0: chunk-"),
    "tokens: setting": (
        lambda w: edit(w / "tokens/manifest.json", lambda m: m["settings"].update(val_fraction=0.2)),
        "tokens",
        "fingerprint of settings",
    ),
    "tokens: setting, to the dataset": (
        lambda w: edit(w / "tokens/manifest.json", lambda m: m["settings"].update(val_fraction=0.2)),
        "dataset",
        "settings.val_fraction: 0.1, tokens/manifest.json says 0.2",
    ),
    "tokens: plan": (
        lambda w: edit(w / "tokens/plan.json", lambda p: p["settings"].update(bos_id=9)),
        "tokens",
        "plan.json.settings",
    ),
    "tokens: split": (
        lambda w: edit(w / "tokens/train/manifest.json", lambda m: m["content"].update(documents=1)),
        "tokens",
        "train/manifest.json: content.documents",
    ),
    "tokens: folder": (
        lambda w: edit(w / "tokens/train/0/manifest.json", lambda m: m["content"].update(tokens=1)),
        "tokens",
        "train/0: index.json: tokens",
    ),
    "tokens: folder gone": (lambda w: shutil.rmtree(w / "tokens/val/0"), "tokens", "MISSING val/0/manifest.json"),
    "tokens: record gone": (
        lambda w: drop_unit(w / "tokens/progress.jsonl"),
        "tokens",
        "progress.jsonl: train.documents",
    ),
    "tokens: rows": (
        lambda w: edit(w / "tokens/manifest.json", lambda m: m["content"].update(skipped_null=2)),
        "tokens",
        "rows that became documents",
    ),
    # input files and tokenizer
    "parquet: row replaced": (
        lambda w: replace_row(w / "corpus/000_00000.parquet"),
        "input files",
        "another file than was",
    ),
    "parquet: file replaced": (
        lambda w: shutil.copy(w / "corpus/001_00000.parquet", w / "corpus/000_00000.parquet"),
        "input files",
        "000_00000.parquet: another file than was tokenized: bytes was",
    ),
    "parquet: file gone": (
        lambda w: (w / "corpus/001_00000.parquet").unlink(),
        "input files",
        "MISSING 001_00000.parquet",
    ),
    "parquet: not parquet": (
        lambda w: truncate(w / "corpus/001_00000.parquet"),
        "input files",
        "not a readable parquet file",
    ),
    "parquet: page flipped": (
        lambda w: flip(w / "corpus/001_00000.parquet", 400),
        "input files",
        "001_00000.parquet: its content is not",
    ),
    "tokenizer: changed": (
        lambda w: replace_text(w / "tokenizer/tokenizer.json", '"version"', '"version" '),
        "tokenizer",
        "tokenizer.sha256",
    ),
    "tokenizer: of another corpus": (
        lambda w: edit(w / "tokenizer/manifest.json", lambda m: m["settings"].update(corpus="0")),
        "tokenizer",
        "corpus that it was trained on",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named_where_it_is(copy, capsys, name):
    damage, where, text = DAMAGES[name]
    damage(copy)
    found = wrong_lines(verify(capsys, copy / "export", code=1))
    assert [line for line in found if line.startswith(where) and text in line], found


def test_forged_weights_are_found_by_their_values(copy, capsys):
    """Whoever puts the manifest right too is found by comparing with the checkpoint."""
    forged_weights(copy)
    verify(capsys, copy / "export")
    found = wrong_lines(verify(capsys, copy / "export", code=1, deep=True, num_units=1))
    assert len(found) == 1 and "--deep" in found[0] and "differs from the checkpoint" in found[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_bill, "model.cdx.json: none, as in the exports of earlier versions"),
        (
            lambda w: edit_bill(w, lambda b: b["metadata"]["properties"][0].update(value="2")),
            "layout '2', this version",
        ),
    ],
)
def test_a_bill_of_another_version_cannot_be_compared_and_is_no_damage(copy, capsys, change, said):
    change(copy)
    printed = verify(capsys, copy / "export")
    assert re.search(f"cannot tell +.*{re.escape(said)}", printed) and "1 cannot be made" in printed


# --- text that was changed without a trace ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["in order", "shuffled"])
def tokens_of_plain_text(request, tmp_path_factory, documents, tokenizer_dir) -> Path:
    """Uncompressed parquet files without checksums: some bytes can be other ones, and no footer shows it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    work = tmp_path_factory.mktemp("plain")
    (work / "parquet").mkdir()
    for number in range(2):
        texts = [*documents[40 * number : 40 * number + 30], None, ""]
        path = work / "parquet" / f"{number}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=8, compression="none", use_dictionary=False)
    flags = ["--input_dir=parquet", f"--tokenizer_dir={tokenizer_dir}", "--output_dir=tokens", *TOKENIZE]
    flags += ["--shuffle_seed=5"] * (request.param == "shuffled")
    run_a_script("optimize_dataset.py", *flags, "--unit_bytes=12000", cwd=work)
    return work


def test_a_changed_letter_is_found_by_tokenizing_again(
    tokens_of_plain_text, capsys, tmp_path, documents, tokenizer_dir
):
    work = Path(shutil.copytree(tokens_of_plain_text, tmp_path / "copy"))
    settings = {"tokenizer_dir": str(tokenizer_dir), "deep": True, "num_units": 100}
    said = verify(capsys, work / "tokens", **settings)
    assert "60 documents" in said and "cannot tell  text of the files" in said
    path = work / "parquet" / "1.parquet"
    text = documents[40 + 13].encode()
    content = path.read_bytes()
    assert content.count(text) == 1
    path.write_bytes(content.replace(text, text[:50] + b"~" + text[51:]))
    verify(capsys, work / "tokens")  # sizes, rows and footers are the same
    found = wrong_lines(verify(capsys, work / "tokens", code=1, **settings))
    assert len(found) == 1 and "1.parquet, row group 1, row 5" in found[0], found


def test_a_dataset_of_gathered_chunks_is_tokenized_again_without_the_tokens(
    tokens_of_plain_text, capsys, tmp_path, tokenizer_dir
):
    work = Path(shutil.copytree(tokens_of_plain_text, tmp_path / "a" / "b" / "copy"))
    for split in ("train", "val"):
        run_a_script("merge_files.py", f"--source_dir={work}/tokens/{split}", f"--target_dir={work}/dataset/{split}")
    assert list(work.glob("dataset/train/*-to-*.bin"))
    verify(capsys, work / "dataset")
    shutil.rmtree(work / "tokens")
    settings = {"tokenizer_dir": str(tokenizer_dir), "deep": True, "num_units": 100}
    said = verify(capsys, work / "dataset" / "train", **settings)
    assert re.search(r"tokenized again: 5\d documents", said), said
    flip(first_chunk(work / "dataset" / "train"))
    found = wrong_lines(verify(capsys, work / "dataset" / "train", code=1, **settings))
    assert [line for line in found if "its content is not the one" in line], found


def test_a_packed_dataset_is_packed_again_from_its_tokens(
    tokens_of_plain_text, capsys, tmp_path, documents, tokenizer_dir
):
    work = Path(shutil.copytree(tokens_of_plain_text, tmp_path / "a" / "b" / "copy"))
    flags = ["--pack_tokens=129", "--pack_window_tokens=4096"]
    for split in ("train", "val"):
        places = [f"--source_dir={work}/tokens/{split}", f"--target_dir={work}/dataset/{split}"]
        run_a_script("merge_files.py", *places, *flags)
    said = verify(capsys, work / "dataset")
    assert said.count("packed again from the tokens") == 2 and "CHANGED" not in said
    deep = {"deep": True, "num_units": 100, "tokenizer_dir": str(tokenizer_dir)}
    said = verify(capsys, work / "dataset", **deep)
    assert "tokenized again: 60 documents" in said and said.count("packed again from the tokens") == 2
    path, text = work / "parquet" / "1.parquet", documents[40 + 13].encode()
    content = path.read_bytes()
    assert content.count(text) == 1
    path.write_bytes(content.replace(text, text[:50] + b"~" + text[51:]))
    found = wrong_lines(verify(capsys, work / "dataset", code=1, **deep))
    assert len(found) == 1 and "1.parquet, row group 1, row 5" in found[0], found
    path.write_bytes(content)
    forged = json.loads((work / "dataset/train/manifest.json").read_text())
    forged["packing"]["cut_at_end"] = False
    (work / "dataset/train/manifest.json").write_text(json.dumps(forged))
    found = wrong_lines(verify(capsys, work / "dataset" / "train", code=1))
    assert found and all("not what the tokens' chunks give when they are packed" in line for line in found), found
    shutil.rmtree(work / "tokens")
    said = verify(capsys, work / "dataset" / "val", tokenizer_dir=str(tokenizer_dir), deep=True)
    assert "of a packed dataset, text is compared with the tokens, which are not here" in said


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.verify", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip


def test_exit_codes(copy, tmp_path):
    assert command(copy / "dataset").returncode == 0
    flip(first_chunk(copy / "dataset" / "train"))
    changed = command(copy / "dataset")
    assert changed.returncode == 1 and "CHANGED" in changed.stdout and not changed.stderr
    for arguments in ([tmp_path / "nowhere"], [tmp_path], [copy / "dataset", "--num_units=0"]):
        refused = command(*arguments)
        assert refused.returncode == 2 and refused.stderr.startswith("error: "), refused.stderr


def test_named_places_come_first(copy, capsys, tmp_path):
    elsewhere = tmp_path / "quite" / "elsewhere"
    elsewhere.parent.mkdir()
    shutil.move(copy / "corpus", elsewhere)
    said = verify(capsys, copy / "tokens")
    assert "not here" in said and "input files  (2)" in said and "with --parquet_dir" in said
    said = verify(capsys, copy / "tokens", parquet_dir=str(elsewhere))
    assert "not here" not in said and re.search(r"agrees +2 parquet files, \d+ rows: size, rows and footer", said)


def test_chunks_that_were_moved_into_the_dataset_are_no_damage(copy, capsys):
    shutil.rmtree(copy / "dataset")
    for split in ("train", "val"):
        flags = [f"--source_dir={copy}/tokens/{split}", f"--target_dir={copy}/dataset/{split}", "--mode=move"]
        run_a_script("merge_files.py", *flags)
    assert "moved into the dataset" in verify(capsys, copy / "export", deep=True, num_units=1)


def test_an_export_whose_tokenizer_json_was_rewritten_is_that_of_training(tmp_path, tokenizer_dir):
    from tools.provenance import Node
    from tools.provenance_models import check_export
    from utils.manifest import read_manifest, write_manifest
    from utils.tokenizer import read_tokenizer_info

    recorded = read_tokenizer_info(tokenizer_dir).record()
    export = Path(shutil.copytree(tokenizer_dir, tmp_path / "export"))
    edit(export / "tokenizer.json", lambda content: content.update(post_processor=None))
    files = [file_entry(export, path.name) for path in export.iterdir()]
    manifest = {"kind": "export", "settings": {}, "content": {}, "inputs": [], "files": files}
    for wrong in ({}, {"vocab_size": 7}):
        write_manifest(export, {**manifest, "tokenizer": {**recorded, **wrong}})
        check_export(node := Node("export"), export, read_manifest(export))
        assert [text for status, text in node.lines if status == "CHANGED"] == [
            f"tokenizer.{key}: {recorded[key]}, manifest.json says 7" for key in wrong
        ]


def test_only_tokens_and_parquet_files_of_the_same_inputs_are_taken_for_the_origin(tmp_path):
    from tools.provenance_places import find_inputs, find_tokens
    from utils.manifest import write_manifest

    inputs = [{"path": f"{i}.parquet", "bytes": 9} for i in range(2)]
    made = {"kind": "tokens", "settings": {"bos_id": 0}, "tokenizer": {"sha256": "t"}, "content": {}, "files": []}
    for name, its in (("a", inputs[:1]), ("b", inputs)):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, {**made, "inputs": its})
    dataset = {**made, "inputs": inputs, "settings": {"bos_id": 1}}
    assert find_tokens(dataset, tmp_path / "data" / "train") == tmp_path / "b"
    assert find_tokens({**made, "inputs": [{"path": "other.parquet", "bytes": 9}]}, tmp_path / "data" / "train") is None
    for name, names in (("c", inputs[:1]), ("d", inputs), ("e", inputs)):
        (tmp_path / name).mkdir()
        for entry in names:
            (tmp_path / name / entry["path"]).write_bytes(b"another size")
        if name == "d":
            assert find_inputs(inputs, tmp_path / "data") == tmp_path / "d"
    assert find_inputs(inputs, tmp_path / "data") is None  # either may be it
