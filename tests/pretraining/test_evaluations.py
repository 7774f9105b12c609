"""Tasks and samples of a run: the numbers of lm_eval and the text of transformers, both of the exported model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from own_tasks import TASKS, prepare, write_tasks
from pretrain_ranks import metrics_of, run_ranks, settings_of
from tiny_runs import write_config

from pretraining.loss import IGNORED_TARGET, token_scores
from pretraining.metrics_writer import rewind_metrics, samples_of
from pretraining.plan import make_plan
from utils.errors import UserError

NUM_EXAMPLES = 30
TRAIN = {"max_steps": 12, "save_interval": 12, "min_lr": 1e-3}
PROMPTS = ["The value of", "It"]  # of unlike lengths
SAMPLE = {"sample_tokens": 12, "sample_temperature": 0.8}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, documents) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own", documents[:NUM_EXAMPLES])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tasks, dataset, tokenizer_dir) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("prepared")
    return {name: prepare(name, tasks, directory / name, dataset, tokenizer_dir) for name in TASKS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset, tokenizer_dir, prepared) -> Path:
    """A run of two processes, FSDP2 over both, evaluated before its first and after its last step."""
    return train(tmp_path_factory.mktemp("trained"), dataset, tokenizer_dir, prepared, 2)


def settings_for(directory: Path, dataset: Path, tokenizer_dir: Path, prepared: dict, ranks: int, **flags):
    tasks = {name: str(path) for name, path in prepared.items()}
    config = write_config(
        directory / "tiny.yaml",
        train=TRAIN,
        eval={"interval": None, "max_iters": 1, "tasks": tasks, "prompts": PROMPTS, **SAMPLE},
        tokenizer_dir=str(tokenizer_dir),
        optimizer={"lr": 1e-2},
    )
    return settings_of(config, dataset, directory / "run", ranks, **flags)


def train(directory: Path, dataset: Path, tokenizer_dir: Path, prepared: dict, ranks: int, **flags) -> Path:
    settings = settings_for(directory, dataset, tokenizer_dir, prepared, ranks, **flags)
    run_ranks([settings], ranks, directory / "ranks")
    return directory / "run"


def export(run: Path, target: Path) -> Path:
    import convert_pretrained_checkpoint

    convert_pretrained_checkpoint.main(convert_pretrained_checkpoint.Settings(str(run / "final"), str(target)))
    return target


def by_lm_eval(model: Path, tasks: Path) -> dict[str, dict[str, float]]:
    """What `lm_eval --model hf` says of an export, without network, in float32."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would start a process per core
    return simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=1000,
        log_samples=False,
    )["results"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, trained) -> Path:
    return export(trained, tmp_path_factory.mktemp("export") / "model")


def assert_equal(found: dict, expected: dict[str, dict[str, float]]) -> None:
    exact = [("ending", name) for name in ("acc", "acc_norm", "acc_bytes")] + [("last_word", "acc")]
    for task, metric in exact:
        assert found[f"task_{task}_{metric}"] == expected[task][f"{metric},none"], (task, metric)
        error = expected[task][f"{metric}_stderr,none"]
        assert found[f"task_{task}_{metric}_stderr"] == pytest.approx(error, rel=1e-12)
    perplexities = [("document", name) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    for task, metric in [*perplexities, ("last_word", "perplexity")]:
        assert found[f"task_{task}_{metric}"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-5)
    # lm_eval draws samples, of which it takes 1,000 here.
    error = expected["last_word"]["perplexity_stderr,none"]
    assert found["task_last_word_perplexity_stderr"] == pytest.approx(error, rel=0.2)


def evaluated(run: Path) -> list[dict]:
    return [record for record in metrics_of(run) if "val_loss" in record]


def test_the_same_number_is_right_as_lm_eval_finds_in_the_export(trained, exported, tasks):
    first, *_, last = evaluated(trained)
    assert_equal(last, by_lm_eval(exported, tasks))
    assert 0 < last["task_ending_acc"] < 1 and 0 < last["task_last_word_acc"] < 1, "a number that tells nothing"
    assert len({last[f"task_ending_{name}"] for name in ("acc", "acc_norm", "acc_bytes")}) > 1
    assert last["task_ending_bits_per_byte"] < first["task_ending_bits_per_byte"]


def test_the_likeliest_tokens_are_those_of_transformers_in_the_export(trained, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    samples = samples_of(trained, TRAIN["max_steps"])
    greedy = [sample for sample in samples if sample["temperature"] == 0]
    assert [sample["prompt"] for sample in samples] == 2 * PROMPTS and len(greedy) == len(PROMPTS)
    for sample in greedy:
        inputs = tokenizer(sample["prompt"], return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=SAMPLE["sample_tokens"], do_sample=False)
        new = written[0, inputs["input_ids"].shape[1] :].tolist()
        assert sample["tokens"] == new and sample["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert greedy[0]["tokens"] != samples_of(trained, 0)[0]["tokens"], "it has learnt something in between"
    assert [sample["tokens"] for sample in samples[2:]] != [sample["tokens"] for sample in greedy]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, {}),
        (2, {"parallel__sharding": "replicate"}),
        (2, {"parallel__context_parallel_size": 2}),
        (2, {"train__tie_embeddings": "true"}),
    ],
    ids=["one process", "without sharding", "shared sequences", "tied embeddings"],
)
def test_it_is_the_same_however_the_model_is_spread(
    ranks, flags, tmp_path, trained, tasks, prepared, dataset, tokenizer_dir
):
    run = train(tmp_path, dataset, tokenizer_dir, prepared, ranks, **flags)
    assert_equal(evaluated(run)[-1], by_lm_eval(export(run, tmp_path / "model"), tasks))
    if "train__tie_embeddings" not in flags:
        assert samples_of(run, 0) == samples_of(trained, 0)
        assert evaluated(run)[0]["task_ending_acc"] == evaluated(trained)[0]["task_ending_acc"]


@pytest.mark.slow
def test_compiled_blocks_answer_alike_and_are_not_compiled_for_other_shapes(
    tmp_path, trained, prepared, dataset, tokenizer_dir
):
    """Two graphs: one for training, one for validation."""
    flags = {"parallel__compile": "true"}
    settings = settings_for(tmp_path, dataset, tokenizer_dir, prepared, 2, **flags)
    run_ranks([settings], 2, tmp_path / "ranks", env={"TORCH_LOGS": "recompiles"})
    log = (tmp_path / "ranks" / "rank-0.log").read_text()
    assert "size mismatch" not in log, log[-3000:]
    for name, value in evaluated(trained)[0].items():
        if name.startswith("task_"):
            assert evaluated(tmp_path / "run")[0][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_token_scores_are_those_of_whole_logits(softcap):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(50, 16), torch.randn(97, 16), torch.randn(97)
    logits = hidden @ weight.T + bias
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    targets = torch.where(torch.arange(50) % 2 == 0, logits.argmax(dim=1), torch.arange(50))
    targets[::5] = IGNORED_TARGET
    scores, likeliest = token_scores(hidden, weight, bias, targets, chunk_tokens=7, softcap=softcap)
    counted = targets != IGNORED_TARGET
    expected = logits.log_softmax(dim=1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(scores, expected * counted)
    assert likeliest.tolist() == (~counted | (logits.argmax(dim=1) == targets)).tolist()


def test_what_was_written_after_the_checkpoint_is_dropped(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"step": step, "n": n}) + "\n" for step in (0, 3, 6) for n in
                                             (1, 2)) + '{"step": 6, "cut')  # fmt: skip
    assert [record["step"] for record in rewind_metrics(tmp_path, 3)] == [0, 0, 3, 3]
    assert [record["n"] for record in samples_of(tmp_path, 3)] == [1, 2] and samples_of(tmp_path, 6) == []


def test_what_does_not_fit_the_run_is_refused(prepared, dataset, tokenizer_dir, tmp_path):
    def problems(**flags) -> str:
        with pytest.raises(UserError) as error:
            make_plan(settings_of(config, dataset, tmp_path / "run", 1, **flags))
        return str(error.value)

    config = write_config(tmp_path / "tiny.yaml", eval={"tasks": {"ending": str(prepared["ending"])}})
    assert "has texts of 32 tokens, the run's context is 16" in problems(train__max_seq_length=16)
    manifest = json.loads((prepared["ending"] / "manifest.json").read_bytes())
    changed = {**manifest, "tokenizer": {**manifest["tokenizer"], "sha256": "0" * 64}, "settings": {"bos_id": 7}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(changed))
    tasks = {"a task": str(prepared["ending"]), "other": str(tmp_path / "other"), "none": str(tmp_path)}
    write_config(config, eval={"tasks": tasks, "prompts": ["What", ""]})
    said = problems()
    for expected in (
        "{a task: ", "another tokenizer than the dataset's", "with 7 as BOS before each text, the dataset has 0",
        "tokens.npy: missing",
        f"{{none: {tmp_path}}}: no prepared task", "--eval.prompts: writing needs the tokenizer",
    ):  # fmt: skip
        assert expected in said
    write_config(config, eval={"prompts": ["What"], "sample_tokens": 40}, tokenizer_dir=str(tokenizer_dir))
    assert "more than the context of 32" in problems()
