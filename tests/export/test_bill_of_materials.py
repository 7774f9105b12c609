"""model.cdx.json: what CycloneDX's own schema says of it, and what it says of inputs of every kind."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from conftest import ROOT
from cyclonedx_schema import components, problems_of, properties, reached_from

from export.bill_of_materials import bill_of_materials
from utils.manifest import as_input

CHECKPOINT = ROOT / "tests" / "released" / "run-tensor-parallel" / "step-00000001"


@pytest.fixture
def manifest() -> dict[str, Any]:
    """Of an export of a released checkpoint, whose own manifests are those of real directories."""
    source = as_input(CHECKPOINT)
    weights = {"name": "model.safetensors", "bytes": 5, "xxh3_128": "a" * 32, "sha256": "b" * 64}
    card = {"name": "README.md", "bytes": 7, "xxh3_128": "c" * 32, "sha256": "d" * 64}
    return {
        "kind": "export",
        "made_by": {"script": "convert_pretrained_checkpoint.py", "versions": {"torch": "2.14.1"}},
        "settings": {},
        "tokenizer": source["manifest"]["tokenizer"],
        "content": {
            "model": "tiny-llama",
            "parameters": 8400,
            "dtype": "float32",
            "tied_embeddings": True,
            "training": source["manifest"]["content"],
        },
        "files": [weights, card],
        "inputs": [source],
    }


def datasets_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["inputs"][0]["manifest"]["inputs"]


def names_of(bill: dict[str, Any], aggregate: str) -> list[str]:
    return next((part["dependencies"] for part in bill["compositions"] if part["aggregate"] == aggregate), [])


def test_it_leads_from_the_model_to_the_parquet_files(manifest):
    bill = bill_of_materials(manifest)
    assert problems_of(bill) == []
    kinds = [ref.partition("/")[0] for ref in reached_from(bill, "model") if not ref.startswith("pkg:")]
    assert list(dict.fromkeys(kinds)) == ["model", "checkpoint", "dataset", "tokenizer", "tokens", "text"]
    (tokens,) = components(bill, "tokens/")  # training and validation data were split from the same
    assert properties(tokens)["settings.val_fraction"] == "0.15"
    parquet = components(bill, "text/")
    assert [(part["name"], properties(part)["rows"]) for part in parquet] == [
        ("000.parquet", "13"), ("001.parquet", "23"), ("sub/002.parquet", "18"),
    ]  # fmt: skip
    model = bill["metadata"]["component"]
    (weights,) = model["components"]
    assert weights["hashes"] == [{"alg": "SHA-256", "content": "b" * 64}]
    assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": "dataset/0"}, {"ref": "dataset/1"}]
    assert "pkg:pypi/ray@2.60.0" in reached_from(bill, "checkpoint")
    assert "unknown" not in [part["aggregate"] for part in bill["compositions"]]


def test_a_directory_is_known_by_its_manifest(manifest):
    bill = bill_of_materials(manifest)
    recorded = [manifest["inputs"][0]["sha256"], *(record["sha256"] for record in datasets_of(manifest))]
    found = [part["components"] for part in [*components(bill, "checkpoint"), *components(bill, "dataset/")]]
    assert found == [
        [{"type": "file", "name": "manifest.json", "hashes": [{"alg": "SHA-256", "content": sha256}]}]
        for sha256 in recorded
    ]


def test_no_directory_of_the_machine_is_in_it(manifest):
    source = manifest["inputs"][0]
    source["path"] = "/home/somebody/run/final"
    source["manifest"]["settings"]["initial_checkpoint_dir"] = "/home/somebody/llama"
    text = json.dumps(bill_of_materials(manifest))
    assert str(datasets_of(manifest)[0]["path"]).startswith("/srv/") and "/srv" not in text
    assert "somebody" not in text and '"llama"' in text


def test_equal_manifests_give_equal_bills_and_others_another_serial_number(manifest):
    other = copy.deepcopy(manifest)
    assert bill_of_materials(other) == bill_of_materials(manifest)
    other["files"].append({"name": "model.cdx.json", "bytes": 1, "xxh3_128": "e" * 32, "sha256": "f" * 64})
    assert bill_of_materials(other) == bill_of_materials(manifest), "it does not list itself"
    datasets_of(other)[0]["manifest"]["content"]["documents"] += 1
    assert bill_of_materials(other)["serialNumber"] != bill_of_materials(manifest)["serialNumber"]


def test_weights_that_training_began_with_are_an_input_of_which_nothing_is_known(manifest):
    manifest["inputs"][0]["manifest"]["settings"]["initial_checkpoint_dir"] = "checkpoints/meta/llama"
    bill = bill_of_materials(manifest)
    assert problems_of(bill) == []
    assert components(bill, "initial-weights")[0]["name"] == "llama"
    assert names_of(bill, "unknown") == ["initial-weights"]


def test_a_checkpoint_without_manifest_is_listed_by_its_files(manifest):
    files = [{"name": "lit_model.pth", "bytes": 9}, {"name": "model_config.yaml", "bytes": 3}]
    manifest |= {"inputs": [{"path": "litgpt", "manifest": None, "files": files}], "tokenizer": None}
    manifest["content"]["training"] = {}
    bill = bill_of_materials(manifest)
    assert problems_of(bill) == []
    (checkpoint,) = components(bill, "checkpoint")
    assert [(part["name"], properties(part)) for part in checkpoint["components"]] == [
        ("lit_model.pth", {"bytes": "9"}), ("model_config.yaml", {"bytes": "3"}),
    ]  # fmt: skip
    assert names_of(bill, "unknown") == ["checkpoint"]


def test_data_of_which_less_is_recorded_is_said_to_be_unknown(manifest):
    train, val = datasets_of(manifest)
    train["manifest"]["inputs"] = []  # a folder that was merged by itself
    val |= {"manifest": None}
    val.pop("sha256")
    bill = bill_of_materials(manifest)
    assert problems_of(bill) == []
    (tokens,) = components(bill, "tokens/")
    assert names_of(bill, "unknown") == ["dataset/1", tokens["bom-ref"]]


def test_corpora_of_a_mixture_keep_their_files_of_the_same_name_apart(manifest):
    datasets_of(manifest).append(other := copy.deepcopy(datasets_of(manifest)[0]))
    other["manifest"]["inputs"][0]["fingerprint"] = "0123456789abcdef"
    bill = bill_of_materials(manifest)
    assert problems_of(bill) == []
    assert [part["name"] for part in components(bill, "text/")].count("000.parquet") == 2
    assert [part["name"] for part in components(bill, "text/")].count("001.parquet") == 1
    assert len(components(bill, "tokens/")) == 2 and len(components(bill, "dataset/")) == 3


def test_each_of_thousands_of_files_is_an_input_once(manifest):
    files = [
        {"path": f"{i:05}.parquet", "bytes": 2 << 30, "rows": 10**6, "fingerprint": f"{i:016x}"} for i in range(5000)
    ]
    for record in datasets_of(manifest):
        record["manifest"]["inputs"] = files
    bill = bill_of_materials(manifest)
    assert len(components(bill, "text/")) == 5000
    named = [ref for entry in bill["dependencies"] for ref in entry["dependsOn"] if ref.startswith("text/")]
    assert len(named) == 5000  # by the tokens, not by each dataset
    assert len(json.dumps(bill)) < 600 * 5000


def test_the_versions_of_packages_are_those_of_the_step_that_used_them(manifest):
    manifest["made_by"]["versions"]["torch"] = "2.15.0+cpu"
    bill = bill_of_materials(manifest)
    assert problems_of(bill) == []
    made_from = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert "pkg:pypi/torch@2.15.0%2Bcpu" in made_from["model"]
    assert "pkg:pypi/torch@2.14.1" in made_from["checkpoint"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda bill: bill["components"][0].update(kind="data"), "Additional properties are not allowed"),
        (lambda bill: bill["metadata"]["component"]["components"][0]["hashes"][0].update(alg="XXH3"), "'XXH3' is not"),
        (lambda bill: bill["components"].pop(), "no component has this name"),
        (lambda bill: bill["dependencies"].sort(key=lambda entry: entry["dependsOn"].clear() or 0), "nothing is made"),
        (lambda bill: bill["components"].append(dict(bill["components"][0], name="x")), "the name of two"),
    ],
)
def test_these_tests_notice_a_wrong_bill(manifest, damage, said):
    damage(bill := bill_of_materials(manifest))
    assert any(said in problem for problem in problems_of(bill)), problems_of(bill)
