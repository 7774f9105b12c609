"""The export's main path, what it refuses, and that nothing half-made appears; on real shards of two processes."""

from __future__ import annotations

import enum
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from cyclonedx_schema import components, problems_of, reached_from
from export_checkpoints import TINY, write_checkpoint_manifest, write_random_weights, write_sharded_checkpoint

from export.checkpoint_weights import find_in_torch_file, find_weights

SCRIPT = "convert_pretrained_checkpoint.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_dir) -> Path:
    """RUN/final of a Llama with AdamW state, sharded over two processes, and RUN/metrics.jsonl."""
    directory = tmp_path_factory.mktemp("run") / "final"
    write_sharded_checkpoint(directory, "Llama-3.2-1B", {**TINY, "padded_vocab_size": 1088, "n_query_groups": 2})
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, directory)
    with open(directory.parent / "metrics.jsonl", "w") as file:
        for step in range(1, 4):
            file.write(json.dumps({"step": step, "tokens": 64 * step, "loss": 7.0 - step}) + "\n")
    write_checkpoint_manifest(directory)
    return directory


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "model"
    process = run_export(checkpoint, directory)
    assert process.returncode == 0, process.stderr
    return directory


def run_export(*arguments, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        **kwargs,
    )


def copy_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage; without manifest, so that the damage itself must be noticed."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / "manifest.json").unlink()
    return copy


def full_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights as Lightning's own consolidation reads them."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(checkpoint / "lit_model.pth")["model"]


def export_in_process(checkpoint: Path, target: Path, **settings) -> None:
    import convert_pretrained_checkpoint

    convert_pretrained_checkpoint.main(convert_pretrained_checkpoint.Settings(str(checkpoint), str(target), **settings))


def test_litgpt_file_is_what_consolidation_gives(checkpoint, exported):
    expected = full_state(checkpoint)
    state = torch.load(exported / "lit_model.pth", weights_only=True, mmap=True)
    assert list(state) == [name for name in state if name in expected] and len(state) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert zipfile.ZipFile(exported / "lit_model.pth").testzip() is None


def test_transformers_gives_the_logits_of_litgpt(exported):
    from litgpt import GPT, Config
    from transformers import AutoModelForCausalLM

    hf_model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lit_model = GPT(Config.from_file(exported / "model_config.yaml"))
    lit_model.load_state_dict(torch.load(exported / "lit_model.pth", weights_only=True))
    tokens = torch.randint(0, 1024, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(hf_model(tokens).logits, lit_model(tokens), atol=1e-4, rtol=0)


def test_config_has_the_tokenizers_ids_and_the_shapes(exported):
    config = json.loads((exported / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert config["vocab_size"] == 1088  # the padded one: slicing to the tokenizer's would cut special tokens
    assert config["tie_word_embeddings"] is False
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 1


def test_manifest_leads_back_to_the_parquet_files(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    dataset = manifest["inputs"][0]["manifest"]["inputs"][0]["manifest"]
    assert dataset["inputs"][0]["path"] == "fineweb/000_00000.parquet"
    listed = {entry["name"] for entry in manifest["files"]}
    assert listed == {path.name for path in exported.iterdir()} - {"manifest.json"}


def test_bill_of_materials_is_valid_and_leads_back_to_the_parquet_files(exported):
    bill = json.loads((exported / "model.cdx.json").read_text())
    assert problems_of(bill) == []
    (parquet,) = components(bill, "text/")
    assert parquet["name"] == "fineweb/000_00000.parquet" and parquet["bom-ref"] in reached_from(bill, "model")
    listed = {part["name"]: part["hashes"][0]["content"] for part in bill["metadata"]["component"]["components"]}
    others = {"README.md", "loss.png", "manifest.json", "model.cdx.json"}
    assert listed.keys() == {path.name for path in exported.iterdir()} - others
    assert all(hashlib.sha256((exported / name).read_bytes()).hexdigest() == sha256 for name, sha256 in listed.items())


def test_model_card_says_what_the_manifests_say(exported):
    card = (exported / "README.md").read_text()
    front_matter = card.split("---")[1]
    assert 'library_name: "transformers"' in front_matter and '"llama"' in front_matter
    for fact in ("6,400", "3.2500 nats per token", "1.5000", "000_00000.parquet", "90 documents", "AdamW", "loss.png"):
        assert fact in card, fact
    assert (exported / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_model_card_lists_some_of_many_files_and_leaves_out_what_is_unknown(checkpoint, tmp_path):
    from litgpt import Config

    from export.model_card import write_model_card
    from tokenization.input_names import describe_inputs

    files = [{"path": f"web|text/{i:03}.parquet", "rows": 10, "bytes": 1000} for i in range(1100)]
    dataset = {"split": "train|1", "content": {"tokens": 5}, "inputs": files}
    manifest = {
        "settings": {"optimizer": {"name": "adamw", "lr": 3e-05}, "seed": None},
        "content": {"step": 2, "val_loss": None},
        "inputs": [{"path": "data", "manifest": None}, {"path": "data", "manifest": dataset}],
    }
    exported = {
        "name": "model",
        "config": Config.from_file(checkpoint / "model_config.yaml"),
        "model_type": None,
        "architecture": None,
        "for_litgpt": True,
        "parameters": 7,
        "tied": True,
        "dtype": "float32",
        "tokenizer": None,
        "proof": {"mode": "off"},
        "made_by": {"script": "x.py", "versions": {}},
    }
    write_model_card(tmp_path, exported, tmp_path / "run" / "final", manifest, describe_inputs)
    card = (tmp_path / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]  # no picture of a run that logged nothing
    assert "Made from 1,100 parquet files, 11,000 rows (1.1 MB): `000.parquet`, `001.parquet`," in card
    assert "`019.parquet` and 1,080 more. manifest.json names all.\n" in card and "020.parquet" not in card
    assert "| train\\|1 | 5 tokens |" in card
    assert "| Optimizer | adamw |\n| Optimizer: lr | 3e-05 |\n\n## Verification\n" in card
    assert not any(word in card for word in ("Seed", "Validation", "from_pretrained", "lm_eval", "Tokenizer", "None"))


@pytest.mark.parametrize(("model", "formats", "warns"), [
    ("Llama-3.2-1B", "all", True), ("Llama-3.2-1B", "litgpt", False), ("Llama-3-8B", "all", False),
])  # fmt: skip
def test_a_model_that_ctranslate2_gets_wrong_says_so(tmp_path, capsys, model, formats, warns):
    """It reads Hugging Face's format, and ignores the scaling of positions of Llama 3.1 and later."""
    (tmp_path / "checkpoint").mkdir()
    write_random_weights(tmp_path / "checkpoint", model, {"n_query_groups": 2})
    export_in_process(tmp_path / "checkpoint", tmp_path / "model", formats=formats, verify="off")
    sentence = "ctranslate2 4.8.5, which ignores this model's scaling of positions: its logits are wrong"
    assert (f"\nnot for {sentence}\n" in capsys.readouterr().out) == warns
    assert (f"\nIt is not for {sentence}.\n" in (tmp_path / "model" / "README.md").read_text()) == warns


def test_model_card_names_the_kinds_of_the_files_of_text(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (of_step_1,) = {json.dumps(dataset["manifest"]["inputs"]) for dataset in manifest["inputs"]}
    arrow = json.loads(of_step_1)[0] | {"path": "train/data-00000-of-00002.arrow", "rows": 70}
    lines = {"path": "more/text.jsonl.zst", "bytes": 55, "fingerprint": "0"}
    for inputs, expected in (
        ([arrow, arrow | {"path": "train/data-00001-of-00002.arrow"}], "2 Arrow files, 140 rows (24.7 kB)"),
        ([arrow, lines], "1 Arrow file, 70 rows, and 1 JSON lines file (12.4 kB)"),
    ):
        for dataset in manifest["inputs"]:
            dataset["manifest"]["inputs"] = inputs
        (copy / "manifest.json").write_text(json.dumps(manifest))
        target = tmp_path / expected[:13]
        export_in_process(copy, target, verify="off")
        assert f"\nMade from {expected}: `" in (target / "README.md").read_text()


def test_same_command_again_does_nothing_and_is_quick(checkpoint, exported):
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    process = run_export(checkpoint, exported, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert process.returncode == 0 and "nothing to do" in process.stdout
    assert " torch\n" not in process.stderr and " litgpt\n" not in process.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}


def test_same_checkpoint_gives_the_same_bytes(checkpoint, exported, tmp_path):
    export_in_process(checkpoint, tmp_path / "model")
    for path in exported.iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_consolidated_file_gives_the_same_weights(checkpoint, exported, tmp_path, key):
    copy = tmp_path / "consolidated"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("lit_model.pth"))
    state = full_state(checkpoint)
    torch.save({key: state, "step": 3} if key else state, copy / "lit_model.pth")
    shutil.copy(checkpoint.parent / "metrics.jsonl", tmp_path)
    export_in_process(copy, tmp_path / "model")
    for name in ("lit_model.pth", "model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "model" / name).read_bytes() == (exported / name).read_bytes(), name


def test_an_export_can_be_exported_again(exported, tmp_path):
    (copy := tmp_path / "litgpt").mkdir()
    for name in ("lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported / name, copy)
    export_in_process(copy, tmp_path / "model")
    assert (tmp_path / "model" / "lit_model.pth").read_bytes() == (exported / "lit_model.pth").read_bytes()


def test_shards_index_and_dtype(checkpoint, exported, tmp_path):
    from transformers import AutoModelForCausalLM

    target = tmp_path / "model"
    export_in_process(checkpoint, target, formats="hf", dtype="bfloat16", max_shard_size="100KB")
    assert not (target / "lit_model.pth").exists()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(names) > 2 and set(index["weight_map"].values()) == set(names)
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    expected = torch.load(exported / "lit_model.pth", weights_only=True)["transformer.wte.weight"]
    assert torch.equal(model.get_input_embeddings().weight, expected.bfloat16())


def test_litgpt_format_alone(checkpoint, tmp_path):
    export_in_process(checkpoint, tmp_path / "model", formats="litgpt")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "lit_model.pth" in names and not names & {"config.json", "model.safetensors"}


def test_tied_weights_are_stored_once_and_untied_heads_are_kept(tmp_path):
    from litgpt import GPT, Config
    from litgpt.utils import save_config
    from transformers import AutoModelForCausalLM

    # Gemma's default is tied: a head that was trained by itself must survive it.
    config = Config.from_name("Gemma-2b", **{**TINY, "n_query_groups": 1})
    for tied in (True, False):
        checkpoint = tmp_path / f"checkpoint-{tied}"
        checkpoint.mkdir()
        model = GPT(config)
        if tied:
            model.lm_head.weight = model.transformer.wte.weight
        torch.save(model.state_dict(), checkpoint / "lit_model.pth")
        save_config(config, checkpoint)
        export_in_process(checkpoint, tmp_path / f"export-{tied}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"export-{tied}")
        assert loaded.config.tie_word_embeddings is tied
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert torch.equal(loaded.get_input_embeddings().weight, model.transformer.wte.weight)


# What is refused ------------------------------------------------------------------------------------------------------


def refused(checkpoint: Path, target: Path, *arguments) -> str:
    process = run_export(checkpoint, target, *arguments)
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert not target.exists()
    assert not list(target.parent.glob(".tmp-*"))
    return process.stderr


def test_missing_directory_and_wrong_flags(tmp_path):
    assert "no such directory" in refused(tmp_path / "nothing", tmp_path / "out")
    assert "--max_shard_size=lots" in refused(tmp_path, tmp_path / "out", "--max_shard_size=lots")
    assert "formats" in refused(tmp_path, tmp_path / "out", "--formats=onnx")


def test_a_dry_run_tells_the_sizes_and_writes_nothing(checkpoint, exported, tmp_path):
    process = run_export(checkpoint, tmp_path / "out", "--dry_run=true")
    assert process.returncode == 0, process.stderr
    assert not any(tmp_path.iterdir())
    for name in ("lit_model.pth", "model.safetensors"):
        told = re.search(rf"^{name}: ([\d.]+) kB$", process.stdout, re.MULTILINE)
        assert float(told[1]) * 1000 == pytest.approx((exported / name).stat().st_size, rel=0.1)


def test_a_disk_that_cannot_hold_it_is_named_before_the_work(checkpoint, small_disk):
    message = refused(checkpoint, small_disk / "out")
    assert f"export_dir={small_disk / 'out'}: needs " in message and "are free" in message


@pytest.mark.slow
def test_what_an_interrupted_export_left_does_not_count_against_the_next(checkpoint, small_disk):
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    left = small_disk / ".tmp-out-0123456789ab"
    left.mkdir()
    (left / "lit_model.pth").write_bytes(bytes(3_800_000))
    process = run_export(checkpoint, small_disk / "out")
    assert process.returncode == 0, process.stderr
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_mount_point_or_a_link_is_refused_before_the_work(checkpoint, small_disk, tmp_path):
    process = run_export(checkpoint, small_disk)
    assert process.returncode == 2 and "a mount point, which cannot appear all at once" in process.stderr
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    process = run_export(checkpoint, tmp_path / "link")
    assert process.returncode == 2 and "a symbolic link" in process.stderr
    assert not any((tmp_path / "real").iterdir()) and not any(small_disk.iterdir())


def test_several_problems_are_told_at_once(checkpoint, tmp_path):
    (damaged := tmp_path / "damaged").mkdir()
    (damaged / "lit_model.pth").write_bytes(b"no weights")
    message = refused(damaged, tmp_path / "out")
    assert "model_config.yaml: missing" in message and "lit_model.pth: " in message


def test_what_is_no_checkpoint_is_told_before_the_imports_that_take_seconds(tmp_path):
    program = (
        "import sys; from pathlib import Path; from convert_pretrained_checkpoint import *\n"
        "try: check(Settings(sys.argv[1], 'out'))\n"
        "except UserError as error: print(error, 'torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert f"checkpoint_dir={tmp_path}: no lit_model.pth in it. Give " in process.stdout
    assert process.stdout.endswith("False\n"), process.stdout + process.stderr


def test_an_existing_directory_is_never_mixed_into(checkpoint, exported, tmp_path):
    (target := tmp_path / "mine").mkdir()
    (target / "thesis.txt").write_text("three years of work")
    process = run_export(checkpoint, target)
    assert process.returncode == 2 and "did not write (thesis.txt)" in process.stderr
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    process = run_export(checkpoint, exported, "--dtype=bfloat16")
    assert process.returncode == 2 and "settings.dtype: was 'same', is 'bfloat16'" in process.stderr


def in_process_refusal_at(checkpoint: Path, target: Path) -> str:
    from utils.errors import UserError

    with pytest.raises(UserError) as caught:
        export_in_process(checkpoint, target)
    assert not target.exists()
    return str(caught.value)


def in_process_refusal(checkpoint: Path, tmp_path: Path) -> str:
    message = in_process_refusal_at(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob(".tmp-*"))
    return message


def test_missing_marker_metadata_or_shard(checkpoint, tmp_path):
    for number, name in enumerate(("meta.pt", ".metadata", "__1_0.distcp")):
        copy = copy_checkpoint(checkpoint, tmp_path / str(number))
        (copy / "lit_model.pth" / name).unlink()
        message = in_process_refusal(copy, tmp_path)
        assert name in message and "missing" in message


def test_damaged_and_truncated_shards(checkpoint, tmp_path):
    weight = find_weights(checkpoint)["transformer.h.1.mlp.proj.weight"].pieces[1]
    copy = copy_checkpoint(checkpoint, tmp_path / "flipped")
    with open(copy / "lit_model.pth" / weight.path.name, "r+b") as file:
        file.seek(weight.first_byte + 100)
        byte = file.read(1)[0]
        file.seek(weight.first_byte + 100)
        file.write(bytes([byte ^ 1]))
    message = in_process_refusal(copy, tmp_path)
    assert weight.path.name in message and "checksum" in message and "transformer.h.1.mlp.proj.weight" in message

    copy = copy_checkpoint(checkpoint, tmp_path / "truncated")
    shard = copy / "lit_model.pth" / weight.path.name
    os.truncate(shard, weight.first_byte + 100)
    assert "truncated" in in_process_refusal(copy, tmp_path)

    # The manifest tells of damage in what is not read, too.
    shutil.copy(checkpoint / "manifest.json", copy)
    shutil.copy(checkpoint / "lit_model.pth" / shard.name, shard)
    os.truncate(shard, shard.stat().st_size - 1)
    assert "the manifest says" in in_process_refusal(copy, tmp_path)


def test_shards_split_by_columns_are_refused_with_the_reason(checkpoint, tmp_path):
    """As tensor parallelism splits them: what it would say of its chunks is put into the metadata."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    copy = copy_checkpoint(checkpoint, tmp_path)
    path = copy / "lit_model.pth" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    stored = metadata.state_dict_metadata["model.transformer.h.0.mlp.proj.weight"]
    rows, columns = stored.size
    halves = (ChunkStorageMetadata(torch.Size((0, c)), torch.Size((rows, columns // 2))) for c in (0, columns // 2))
    stored.chunks = list(halves)
    path.write_bytes(pickle.dumps(metadata))
    message = in_process_refusal(copy, tmp_path)
    assert "'transformer.h.0.mlp.proj.weight' is split by columns, as tensor parallelism splits it" in message


def test_truncated_and_foreign_files(checkpoint, tmp_path):
    copy = tmp_path / "file"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("lit_model.pth", "manifest.json"))
    torch.save(full_state(checkpoint), copy / "lit_model.pth")
    os.truncate(copy / "lit_model.pth", 100_000)
    assert "truncated or damaged" in in_process_refusal(copy, tmp_path)
    torch.save(full_state(checkpoint), copy / "lit_model.pth", _use_new_zipfile_serialization=False)
    assert "the format of torch before 1.6" in in_process_refusal(copy, tmp_path)
    torch.save({"model": {"layers.0.weight": torch.zeros(2)}}, copy / "lit_model.pth")
    assert "no weights of a litgpt model" in in_process_refusal(copy, tmp_path)
    torch.save({"lora_A.weight": torch.zeros(2)}, copy / "lit_model.pth")
    assert "litgpt merge_lora" in in_process_refusal(copy, tmp_path)


def test_config_of_another_model(checkpoint, tmp_path):
    copy = copy_checkpoint(checkpoint, tmp_path)
    path = copy / "model_config.yaml"
    path.write_text(path.read_text().replace("n_layer: 2", "n_layer: 3"))
    assert "'transformer.h.2.norm_1.weight' missing" in in_process_refusal(copy, tmp_path)
    path.write_text("n_layer: [")
    assert "not a model configuration" in in_process_refusal(copy, tmp_path)
    path.write_text("n_layer: 2\nnumber_of_wings: 4\n")
    assert "number_of_wings" in in_process_refusal(copy, tmp_path)


def test_family_that_transformers_has_not(checkpoint, tmp_path):
    copy = copy_checkpoint(checkpoint, tmp_path)
    path = copy / "model_config.yaml"
    path.write_text(path.read_text().replace("final_logit_softcapping: null", "final_logit_softcapping: 30.0"))
    message = in_process_refusal(copy, tmp_path)
    assert "final_logit_softcapping is 30.0" in message and "--formats litgpt" in message


def test_weights_that_are_not_numbers(tmp_path):
    from litgpt import GPT, Config
    from litgpt.utils import save_config

    config = Config.from_name("Llama-2-7b-hf", **TINY)
    model = GPT(config)
    model.transformer.h[0].mlp.proj.weight.data[0, 0] = float("nan")
    (checkpoint := tmp_path / "checkpoint").mkdir()
    torch.save(model.state_dict(), checkpoint / "lit_model.pth")
    save_config(config, checkpoint)
    assert "NaN" in in_process_refusal(checkpoint, tmp_path)


def test_a_wrong_config_json_is_not_published(checkpoint, tmp_path, monkeypatch):
    """The proof must notice what is wrong in the configuration alone: weights are right, the model is not."""
    import export.hf_config

    right = export.hf_config.hf_config
    for wrong in ({"rope_theta": 10_000.0}, {"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}, {"rope_scaling": None}):
        monkeypatch.setattr(export.hf_config, "hf_config", lambda *args, wrong=wrong: {**right(*args), **wrong})
        message = in_process_refusal(checkpoint, tmp_path)
        assert "logits differ" in message or "different angles" in message, wrong


@pytest.mark.parametrize(
    ("formats", "name"), [("litgpt", "lit_model.pth"), ("hf", "model.safetensors"), ("gguf", "model.gguf")]
)
def test_weights_proof_notices_one_changed_bit(checkpoint, tmp_path, formats, name):
    from export.checkpoint_files import read_checkpoint_manifest
    from export.checks import make_plan
    from export.proof import compare_weights, find_exported
    from utils.errors import UserError

    export_in_process(checkpoint, tmp_path / "model", formats=formats)
    manifest = read_checkpoint_manifest(checkpoint)
    plan = make_plan(checkpoint, manifest, formats, dtype="same", pad_token=None)
    exported = find_exported(plan, tmp_path / "model")
    assert compare_weights(plan, exported) == 201024
    tensors = exported.lit or exported.hf or exported.gguf
    tensor = next(found for found in tensors.values() if "1" in found.name)
    with open(tmp_path / "model" / name, "r+b") as file:
        file.seek(tensor.pieces[0].first_byte)
        byte = file.read(1)[0]
        file.seek(tensor.pieces[0].first_byte)
        file.write(bytes([byte ^ 128]))
    with pytest.raises(UserError, match=f"{name}: '{tensor.name}' differs from the checkpoint"):
        compare_weights(plan, exported)


@pytest.mark.parametrize("verify", ["weights", "off"])
def test_less_proof_is_recorded_as_such(checkpoint, tmp_path, verify):
    export_in_process(checkpoint, tmp_path / "model", verify=verify)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["content"]["verification"]["mode"] == verify
    assert "max_abs_logit_difference" not in manifest["content"]["verification"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("was not verified" in card) == (verify == "off") and "logits differ" not in card


class Bomb:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_pickle_runs_code(checkpoint, tmp_path):
    trace = tmp_path / "executed"
    copy = copy_checkpoint(checkpoint, tmp_path / "metadata")
    with open(copy / "lit_model.pth" / ".metadata", "wb") as file:
        pickle.dump(Bomb(str(trace)), file)
    assert "has no place in a checkpoint's metadata" in in_process_refusal(copy, tmp_path)
    copy = tmp_path / "file"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("lit_model.pth", "manifest.json"))
    torch.save({"model": Bomb(str(trace))}, copy / "lit_model.pth")
    assert "could run code" in in_process_refusal(copy, tmp_path)
    assert not trace.exists()


class OlderPickler(pickle.Pickler):
    """Pickles members of enums as Python 3.11.2 does."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_pickled_by_an_older_python_is_read(checkpoint, tmp_path):
    copy = copy_checkpoint(checkpoint, tmp_path)
    path = copy / "lit_model.pth" / ".metadata"
    content = path.read_bytes()
    with open(path, "wb") as file:
        OlderPickler(file).dump(pickle.loads(content))
    assert b"getattr" in path.read_bytes()
    ours, theirs = find_weights(copy), find_weights(checkpoint)
    assert ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape for name in theirs)


def test_an_attribute_in_metadata_is_not_looked_up(checkpoint, tmp_path):
    copy = copy_checkpoint(checkpoint, tmp_path)

    class Attribute:
        def __reduce__(self):
            return getattr, (torch.Size, "mro")

    (copy / "lit_model.pth" / ".metadata").write_bytes(pickle.dumps(Attribute()))
    assert "has no place in a checkpoint's metadata" in in_process_refusal(copy, tmp_path)


def test_names_in_metadata_cannot_lead_out(checkpoint, tmp_path):
    copy = copy_checkpoint(checkpoint, tmp_path)
    path = copy / "lit_model.pth" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../" + info.relative_path
    path.write_bytes(pickle.dumps(metadata))
    assert "leads out" in in_process_refusal(copy, tmp_path)


# Interruption ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when", [pytest.param("lit_model.pth", marks=pytest.mark.slow), "model.safetensors", "README.md"]
)
def test_killed_at_any_moment(checkpoint, exported, tmp_path, when):
    """SIGKILL as soon as a file appears; nothing is under the final name, and the same command finishes."""
    target = tmp_path / "model"
    process = subprocess.Popen([sys.executable, str(ROOT / SCRIPT), str(checkpoint), str(target)])
    while not list(tmp_path.glob(f".tmp-model-*/{when}")):
        assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists() and list(tmp_path.glob(".tmp-model-*"))
    export_in_process(checkpoint, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    digest = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert digest == hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()


def test_another_exports_temporaries_stay(tmp_path):
    from export.publishing import remove_interrupted

    own, others = ".tmp-model[1]-0123456789ab", {".tmp-model[1]-bf16-0123456789ab", ".tmp-model1-0123456789ab"}
    for name in (own, *others):
        (tmp_path / name).mkdir()
    remove_interrupted(tmp_path / "model[1]", "export_dir")
    assert {path.name for path in tmp_path.iterdir()} == others


@pytest.mark.slow
def test_two_at_once_do_not_disturb_each_other(checkpoint, tmp_path):
    target = tmp_path / "model"
    process = subprocess.Popen([sys.executable, str(ROOT / SCRIPT), str(checkpoint), str(target)])
    while not list(tmp_path.glob(".tmp-model-*/config.json")):
        assert process.poll() is None, "it ended before another could come"
    process.send_signal(signal.SIGSTOP)
    assert "another process is making it" in in_process_refusal_at(checkpoint, target)
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert (target / "manifest.json").is_file()


def test_checksums_cover_every_weight(checkpoint, exported):
    assert all(piece.crc32 for tensor in find_weights(checkpoint).values() for piece in tensor.pieces)
    assert all(piece.crc32 for t in find_in_torch_file(exported / "lit_model.pth").values() for piece in t.pieces)
