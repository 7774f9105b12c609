"""What an earlier version left half done is finished by this one, with the earlier one's result; see
released/README.md."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_a_script

from utils.files import write_json

RELEASED = ROOT / "tests" / "released"
TOKENIZE = [
    "--input_dir=parquet", "--tokenizer_dir=tokenizer", "--output_dir=tokens", "--val_fraction=0.15", "--add_eos=true",
    "--unit_bytes=2500", "--chunk_tokens=500", "--address=local", "--num_workers=1",
]  # fmt: skip
TRAIN = ["--config=config.yaml", "--dataset_path=dataset", "--tokenizer_dir=tokenizer", "--address=local"]
CHECKPOINT_STEP, LAST_STEP = 6, 16
VERSIONS = ("made_by", "tokenized_by")  # keys of a manifest that name packages' versions


def bring(directory: Path, *names: str) -> Path:
    """Copies of released directories and files, below `directory`."""
    for name in names:
        if name == "run":
            shutil.unpack_archive(RELEASED / "run.tar.xz", directory)
        elif (RELEASED / name).is_dir():
            shutil.copytree(RELEASED / name, directory / name)
        else:
            shutil.copy(RELEASED / name, directory / name)
    return directory


def expected(name: str):
    return json.loads((RELEASED / name).read_bytes())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_below(directory: Path) -> dict[str, Path]:
    return {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}


def without_versions(manifest: Path) -> dict:
    """A manifest without what may change: the packages' versions, and how many documents the encoder was checked on."""
    kept = {key: value for key, value in json.loads(manifest.read_bytes()).items() if key not in VERSIONS}
    return kept | {"content": {k: v for k, v in kept["content"].items() if k != "checked_documents"}}


# --- steps 1 and 2 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory) -> tuple[Path, str]:
    """The directory in which the killed tokenization was run again, and what that printed."""
    directory = bring(tmp_path_factory.mktemp("tokenized"), "parquet", "tokenizer", "tokens", "merging", "dataset")
    return directory, run_a_script("optimize_dataset.py", *TOKENIZE, cwd=directory).stdout


def test_a_killed_tokenization_ends_with_the_bytes_of_one_that_nothing_happened_to(tokenized):
    directory, printed = tokenized
    assert "resume: 3 of 5 units were finished" in printed
    found, wanted = files_below(directory / "tokens"), expected("tokens.json")
    assert found.keys() == {*wanted["sha256"], *wanted["manifests"], "progress.jsonl"}
    assert {name: sha256(found[name]) for name in wanted["sha256"]} == wanted["sha256"]
    assert {name: without_versions(found[name]) for name in wanted["manifests"]} == wanted["manifests"]


def test_the_records_of_finished_units_stay_and_only_the_others_are_made(tokenized):
    before = (RELEASED / "tokens" / "progress.jsonl").read_bytes()
    after = (tokenized[0] / "tokens" / "progress.jsonl").read_bytes()
    assert after.startswith(before)
    assert sorted(json.loads(line)["unit"] for line in after[len(before) :].splitlines()) == [2, 4]


def test_a_killed_merge_is_finished_and_a_finished_one_is_left_alone(tokenized, run_script):
    directory, _ = tokenized
    merge = ["merge_files.py", "--source_dir=tokens/train", "--mode=copy"]
    run_script(*merge, "--target_dir=merging/train", cwd=directory)
    found, wanted = files_below(directory / "merging" / "train"), files_below(RELEASED / "dataset" / "train")
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name == "manifest.json":
            assert without_versions(found[name]) == without_versions(wanted[name])
        else:
            assert found[name].read_bytes() == wanted[name].read_bytes(), name
    again = run_script(*merge, "--target_dir=dataset/train", cwd=directory)
    assert "merged already, nothing to do" in again.stdout


def test_a_killed_merge_of_small_chunks_is_finished_without_gathering_them(tokenized, run_script):
    """As it was begun: a dataset that a training run reads must not change."""
    directory, wanted = tokenized[0], files_below(RELEASED / "dataset" / "val")
    shutil.copytree(RELEASED / "dataset" / "val", directory / "merging" / "val")
    for name in ("manifest.json", "index.json", "chunk-0000003-0.bin"):
        (directory / "merging" / "val" / name).unlink()
    merge = ["merge_files.py", "--source_dir=tokens/val", "--mode=copy"]
    run_script(*merge, "--target_dir=merging/val", cwd=directory)
    found = files_below(directory / "merging" / "val")
    assert found.keys() == wanted.keys()
    assert all(found[name].read_bytes() == wanted[name].read_bytes() for name in wanted if name != "manifest.json")
    assert without_versions(found["manifest.json"]) == without_versions(wanted["manifest.json"])
    assert "2 small chunks become 1" in run_script(*merge, "--target_dir=gathered/val", cwd=directory).stdout


# --- step 3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The run directory in which the killed training was run again, and how that went."""
    directory = bring(tmp_path_factory.mktemp("resumed"), "tokenizer", "dataset", "config.yaml", "run")
    return directory / "run", run_a_script("distributed_pretrain.py", *TRAIN, "--out_dir=run", cwd=directory)


def records_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_goes_on_from_the_released_checkpoint(resumed, tmp_path):
    run, process = resumed
    assert f"resume: from {run / 'step-00000006'}" in process.stdout
    assert "resume with another" not in process.stdout + process.stderr, "no setting has changed for its user"
    assert "skipped" not in process.stdout + process.stderr
    kept = [record for record in records_of(bring(tmp_path, "run") / "run") if record["step"] <= CHECKPOINT_STEP]
    assert records_of(run)[: len(kept)] == kept, "with their timings: they were not made again"
    assert json.loads((run / "final" / "manifest.json").read_bytes())["content"]["step"] == LAST_STEP


def test_a_resumed_run_has_the_losses_and_batches_of_one_that_nothing_happened_to(resumed):
    run, _ = resumed
    for ours, kept in zip(records_of(run), expected("run.json"), strict=True):
        for key, value in kept.items():
            if key == "batch_digest":
                assert ours[key] == value, f"step {kept['step']}"
            else:  # kernels differ between processors in the last bits
                np.testing.assert_allclose(ours[key], value, rtol=1e-3, err_msg=f"step {kept['step']}, {key}")


def test_a_checkpoint_with_tensor_parallelism_is_refused_with_the_reason(tmp_path, run_script):
    bring(tmp_path, "tokenizer", "dataset", "config.yaml", "run-tensor-parallel")
    checkpoint = tmp_path / "run-tensor-parallel" / "step-00000001"
    for entry in json.loads((checkpoint / "manifest.json").read_bytes())["files"]:
        path = checkpoint / entry["name"]  # the weights are not here: files of their sizes, which is as far as it gets
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(bytes(entry["bytes"]))
    before = files_below(tmp_path).keys()
    process = run_script("distributed_pretrain.py", *TRAIN, "--out_dir=run-tensor-parallel", cwd=tmp_path, check=False)
    assert process.returncode == 2, process.stdout + process.stderr
    assert "tensor_parallel_size" in process.stderr and "skipped" not in process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert files_below(tmp_path).keys() == before, "nothing was trained, and nothing deleted"


# --- step 5 -----------------------------------------------------------------------------------------------------------


# What later versions add on purpose, since clients took its absence for something else; see docs/export.md.
ADDED = {
    "config.json": {"transformers_version": "5.0.0"},
    "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False},
}


def test_the_released_checkpoint_is_exported_to_the_same_weights_and_configurations(tmp_path, run_script):
    bring(tmp_path, "run")
    process = run_script("convert_pretrained_checkpoint.py", "run/step-00000006", "export", cwd=tmp_path)
    assert "verified: litgpt and transformers" in process.stdout
    wanted = expected("export.json")
    for name, added in ADDED.items():
        path = tmp_path / "export" / name
        content = json.loads(path.read_bytes())
        assert {key: content.pop(key) for key in added} == added
        write_json(path, content)
    # Formerly a copy of the tokenizer's own file, whose entries stood in another order.
    copied = RELEASED / "tokenizer" / "tokenizer_config.json"
    assert sha256(copied) == wanted["tokenizer_config.json"]
    assert json.loads((tmp_path / "export" / copied.name).read_bytes()) == json.loads(copied.read_bytes())
    del wanted["tokenizer_config.json"]
    assert {name: sha256(tmp_path / "export" / name) for name in wanted} == wanted
    others = set(files_below(tmp_path / "export")) - set(wanted)
    # model.cdx.json lists the inputs, which the earlier version did only in its manifest.
    assert others == {"README.md", "loss.png", "manifest.json", "model.cdx.json", "tokenizer_config.json"}
