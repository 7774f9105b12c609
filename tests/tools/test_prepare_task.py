"""What lm_eval asks, as files; what cannot be prepared is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from own_tasks import prepare, write_task, write_tasks

from pretraining.tasks import read_task
from utils.errors import UserError


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, documents) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own", documents[:8])


def test_the_tokens_are_those_that_lm_eval_gives_a_model(tasks, dataset, tokenizer_dir, tmp_path):
    from tokenizers import Tokenizer

    task = read_task("ending", prepare("ending", tasks, tmp_path / "long", dataset, tokenizer_dir, context_tokens=512))
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    questions = [json.loads(line) for line in (tasks / "ending.jsonl").read_text().splitlines()]
    assert len(task.examples) == 8 and len(task.tokens) == 32 and task.row_tokens % 16 == 0
    assert [example["right"] for example in task.examples] == [[question["right"]] for question in questions]
    for row, (_, num_tokens, num_scored) in enumerate(task.rows.tolist()):
        question = questions[row // 4]
        ids = task.tokens[row, :num_tokens].tolist()
        context, answer = question["text"].rstrip(), " " + question["choices"][row % 4]
        spaces = question["text"][len(context) :]
        assert ids == tokenizer.encode(context + spaces + answer).ids and ids[0] == 0, "BOS, as in training"
        assert num_scored == num_tokens - len(tokenizer.encode(context).ids)
        assert task.scored(np.array([row]))[0].nonzero()[0].tolist() == list(range(num_tokens))[-num_scored:]
    # In a short context the same texts, without their beginnings.
    short = read_task("ending", prepare("ending", tasks, tmp_path / "short", dataset, tokenizer_dir))
    assert short.row_tokens == 32 and short.manifest["content"]["rows_without_beginning"] > 20
    ends = [ids[:n].tolist()[-min(n, 33) :] for ids, n in zip(task.tokens, task.rows[:, 1])]
    assert [ids[:n].tolist() for ids, n in zip(short.tokens, short.rows[:, 1])] == ends


def test_again_there_is_nothing_to_do_and_another_task_is_not_written_over(
    tasks, dataset, tokenizer_dir, tmp_path, capsys
):
    output = prepare("last_word", tasks, tmp_path / "task", dataset, tokenizer_dir, limit=3)
    before = {path: path.read_bytes() for path in output.iterdir()}
    capsys.readouterr()
    prepare("last_word", tasks, output, dataset, tokenizer_dir, limit=3)
    said = capsys.readouterr().out
    assert "nothing to do" in said and "3 examples, 3 rows of 32 tokens; metrics: perplexity, acc" in said
    with pytest.raises(UserError, match="limit: was 3, is 4"):
        prepare("last_word", tasks, output, dataset, tokenizer_dir, limit=4)
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    # The same bytes from the same command, elsewhere.
    again = prepare("last_word", tasks, tmp_path / "again", dataset, tokenizer_dir, limit=3)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {p.name: b for p, b in before.items()}


def test_what_cannot_be_answered_in_training_is_refused(tasks, dataset, tokenizer_dir, tmp_path, documents):
    own = write_tasks(tmp_path / "own", documents[:2])

    def refused(name: str, **settings) -> str:
        with pytest.raises(UserError) as error:
            prepare(name, own, tmp_path / "output", dataset, settings.pop("tokenizer_dir", tokenizer_dir), **settings)
        assert not (tmp_path / "output").exists()
        return str(error.value)

    last_word = (own / "last_word.jsonl").read_text()
    (own / "written.jsonl").write_text(last_word)
    write_task(own, "written", output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{end}}")
    (own / "correlated.jsonl").write_text((own / "ending.jsonl").read_text())
    write_task(own, "correlated", output_type="multiple_choice", doc_to_text="{{text}}", doc_to_choice="choices",
               doc_to_target="right", metric_list=[{"metric": "mcc"}])  # fmt: skip
    (own / "empty.jsonl").write_text("")
    write_task(own, "empty", output_type="loglikelihood", doc_to_text="{{text}}", doc_to_target="{{end}}")
    assert "its requests are generate_until" in refused("written")
    assert "has the metrics mcc; known are acc" in refused("correlated")
    assert "--task=empty: lm_eval cannot" in refused("empty")
    assert "answers are longer than --context_tokens=4" in refused("ending", context_tokens=4)
    other = tmp_path / "tokenizer"
    other.mkdir()
    content = json.loads((tokenizer_dir / "tokenizer.json").read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(content, indent=1))
    said = refused("ending", tokenizer_dir=other, context_tokens=0, include_path=str(tmp_path / "nowhere"))
    for expected in ("not the tokenizer that made the dataset", "--context_tokens=0", "no such directory"):
        assert expected in said
