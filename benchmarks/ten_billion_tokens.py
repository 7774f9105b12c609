"""As many tokens as FineWeb's sample-10BT has, through steps 1 to 3 on this machine, with kills on the way: time,
memory, disk, and whether a single document or token is lost.

    python benchmarks/ten_billion_tokens.py --work_dir=DIR [--tokens=10e9] [--keep] [--output=ten_billion.md]
    python benchmarks/ten_billion_tokens.py --work_dir=DIR --tokens=50e6        # minutes

There is no FineWeb without a network, so the text is made: words of the documentation on this machine by their
frequency, and new words as often as real text has them (benchmarks/web_words.py, web_text.py), in FineWeb's columns,
row groups and lengths of documents. How its distinct words grow is measured beside real text. A byte-level BPE below
65,536 tokens is trained on both, so that a token takes two bytes.

Then optimize_dataset.py, killed with all its processes once two fifths of the units are done, and given again;
merge_files.py, killed when the first chunk stands in the target, and given again; and 100 steps of training by two
processes. Documents, bytes of text and tokens are counted at every end and must be equal. Exit code 1: they are not.

DIR/stages.json records what is done: run the same command again, and it goes on with the stage that was interrupted,
from its start, but for the text, which goes on with the next file (its time is then that of the last try). Nothing is
removed while it runs: text and tokens need about 5 bytes of disk per token together. Where that does not fit, the
largest size that does is said before the work.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(harness.ROOT / "examples"))

import make_demo_corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import supervised
import web_text
import web_words
import yaml

from utils import cli, console
from utils.errors import Problems, UserError
from utils.files import free_bytes, write_json
from utils.manifest import file_entry, read_manifest, write_manifest
from utils.metrics_file import read_metrics

DOCUMENT_TOKENS = 670  # FineWeb's sample-10BT: 10 billion tokens in 15 million documents
SAMPLE_BYTES = 20_000_000  # of made text, beside as much real text, for the tokenizer
COUNTED_BYTES = 4_000_000  # of it, tokenized to learn how many words make a token
GROWTH_WORDS = 100_000_000
CONTEXT = 1024
MARGIN_BYTES = 2_000_000_000
PACKAGES = ("litdata", "pyarrow", "gigatoken", "tokenizers", "torch", "litgpt")


@dataclasses.dataclass
class Settings:
    """How much goes through the steps, and where it lies meanwhile."""

    work_dir: str
    """Directory for text, tokens and the run, and for stages.json, with which an interrupted benchmark goes on."""
    tokens: float = 10e9
    """Tokens of text to make, about."""
    keep: bool = False
    """Keep text, tokens and run at the end; false: only the reports stay."""
    seed: int = 0
    """Decides the text."""
    real_size: str = "40MB"
    """Real text to take words from, as a number with kB, MB or GB; there are about 50 MB of documentation."""
    vocab_size: int = 65000
    """Tokens in the tokenizer's vocabulary; below 65,536 each token takes two bytes."""
    steps: int = 100
    """Steps of training."""
    num_workers: int = 2
    """Processes that make text, that tokenize, and that train."""
    output: str | None = None
    """File that the tables are written to as well; null: none."""


class Bench:
    """The stages, each done once; what they took and counted is in stages.json."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.work = Path(settings.work_dir).resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        names = ("real", "sample", "tokenizer", "text", "tokens", "dataset", "run")
        self.real, self.sample, self.tokenizer, self.text, self.tokens, self.dataset, self.run = (
            self.work / name for name in names
        )
        self.log = self.work / "command.log"
        asked = {key: getattr(settings, key) for key in ("tokens", "seed", "real_size", "vocab_size", "steps")}
        self.state_path = self.work / "stages.json"
        self.state: dict[str, Any] = {"settings": asked, "environment": harness.environment(*PACKAGES)}
        if self.state_path.exists():
            self.state = json.loads(self.state_path.read_text())
        if self.state["settings"] != asked:
            raise UserError(f"--work_dir={self.work}: has a benchmark with other settings. Give another, or delete it.")

    def once(self, name: str, work: Callable[[], Any], *outputs: Path) -> Any:
        """What `work` returned, now or before; `outputs` of a try that was interrupted are removed first."""
        if name not in self.state:
            for directory in outputs:
                shutil.rmtree(directory, ignore_errors=True)
            self.state[name] = work()
            write_json(self.state_path, self.state)
        return self.state[name]

    def stage(self, name: str, script: str, *arguments: Any, kills: list[supervised.Kill] | None = None) -> dict:
        return supervised.run_stage(name, script, *arguments, kills=kills or [], log=self.log).as_json()

    # --- the text -----------------------------------------------------------------------------------------------------

    def make_real(self) -> dict[str, Any]:
        flags = (f"--output_dir={self.real}", f"--size={self.settings.real_size}", "--source=documentation")
        return self.stage("collect real text", "examples/make_demo_corpus.py", *flags)

    def make_tokenizer(self) -> dict[str, Any]:
        """A tokenizer for made and real text; from it, how many documents of how many words make the tokens wanted."""
        from tokenizers import Tokenizer

        start = time.perf_counter()
        vocabulary = web_words.Vocabulary(web_text.read_texts(self.real))
        random = np.random.default_rng([self.settings.seed, 1 << 31])
        batches, size = [], 0
        while size < SAMPLE_BYTES:
            batches.append(web_text.draw_documents(vocabulary, random, web_text.draw_lengths(random, 1000, 460)))
            size += batches[-1].buffers()[2].size
        self.sample.mkdir()
        made = web_text.row_group(pa.concat_arrays(batches), random, 0)
        # As web_text.py writes it, to learn what it takes on disk.
        pq.write_table(pa.table(made), self.sample / "0-made.parquet", compression="zstd", compression_level=1)
        for path in self.real.glob("*.parquet"):
            shutil.copy(path, self.sample / f"1-{path.name}")
        files = [file_entry(self.sample, path.name) for path in sorted(self.sample.glob("*.parquet"))]
        write_manifest(self.sample, {**read_manifest(self.real), "files": files})
        make_demo_corpus.make_tokenizer(
            make_demo_corpus.Settings(
                output_dir=str(self.sample), tokenizer_dir=str(self.tokenizer), vocab_size=self.settings.vocab_size
            )
        )
        tokenizer = Tokenizer.from_file(str(self.tokenizer / "tokenizer.json"))
        texts = batches[0].to_pylist()
        while sum(map(len, texts)) > COUNTED_BYTES:
            texts.pop()
        tokens = sum(len(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=False))
        words = sum(len(text.split()) for text in texts)
        text_bytes = sum(len(text.encode()) for text in texts)
        return {
            "seconds": time.perf_counter() - start,
            "tokens_per_word": tokens / words,
            "text_bytes_per_token": text_bytes / tokens,
            "parquet_bytes_per_token": (self.sample / "0-made.parquet").stat().st_size / size * text_bytes / tokens,
        }

    def check_disk(self) -> None:
        """Raises UserError, which says what would fit."""
        per_token = self.state["tokenizer"]["parquet_bytes_per_token"] + 2.02  # uint16 and a document's offset
        free = free_bytes(self.work) + sum(map(harness.directory_bytes, (self.text, self.tokens)))
        most = (free - MARGIN_BYTES) / per_token
        console.say(
            f"disk: {console.human_bytes(per_token * self.settings.tokens)} for text and tokens, "
            f"{console.human_bytes(free)} free or theirs already: at most {console.human_count(most)} tokens fit"
        )
        if self.settings.tokens > most:
            raise UserError(f"--tokens={self.settings.tokens:g}: do not fit on the disk. Give --tokens={most:.2g}.")

    def make_text(self) -> dict[str, Any]:
        made = self.stage(
            "make text", "benchmarks/web_text.py", f"--real_dir={self.real}", f"--output_dir={self.text}",
            f"--num_documents={round(self.settings.tokens / DOCUMENT_TOKENS)}", f"--seed={self.settings.seed}",
            f"--document_words={(DOCUMENT_TOKENS - 1) / self.state['tokenizer']['tokens_per_word']}",
            f"--num_workers={self.settings.num_workers}",
        )  # fmt: skip
        files = sorted(web_text.made_files(self.text).values(), key=lambda entry: entry["name"])
        totals = {key: sum(entry[key] for entry in files) for key in ("documents", "words", "text_bytes")}
        return {
            **made,
            **totals,
            "bytes": harness.directory_bytes(self.text),
            "files": files,
        }

    def measure_growth(self) -> dict[str, Any]:
        """Distinct words by length, of the real and of the made text."""
        real = [pa.array(web_text.read_texts(self.real))]
        num_real = sum(len(text.split()) for text in real[0].to_pylist())
        marks = web_words.marks_up_to(min(GROWTH_WORDS, self.state["text"]["words"]))
        grown = {"real": web_words.growth_of(real, web_words.marks_up_to(num_real))}
        grown["made"] = web_words.growth_of(self.batches(), marks)
        return {key: {**dataclasses.asdict(one), "exponent": one.exponent} for key, one in grown.items()}

    def batches(self):
        for path in sorted(self.text.glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
                yield batch.column("text")

    # --- steps 1 to 3 -------------------------------------------------------------------------------------------------

    def tokenize(self) -> dict[str, Any]:
        def two_fifths_done() -> bool:
            planned = re.search(r"([\d,]+) units? of about", self.log.read_text(errors="replace"))
            progress = self.tokens / "progress.jsonl"
            if not planned or not progress.exists():
                return False
            return progress.read_bytes().count(b"\n") >= 0.4 * int(planned[1].replace(",", ""))

        done = self.stage(
            "step 1", "optimize_dataset.py", f"--input_dir={self.text}", f"--tokenizer_dir={self.tokenizer}",
            f"--output_dir={self.tokens}", "--address=local", f"--num_workers={self.settings.num_workers}",
            kills=[supervised.Kill(two_fifths_done, "with two fifths of the units done")],
        )  # fmt: skip
        return {**done, "bytes": harness.directory_bytes(self.tokens)}

    def merge(self) -> dict[str, Any]:
        target = self.dataset / "train"
        kill = supervised.Kill(
            lambda: target.is_dir() and any(target.glob("chunk-*.bin")), "with the first chunks in the target"
        )
        train = self.stage("step 2, train", "merge_files.py", *self.merge_flags("train"), kills=[kill])
        val = self.stage("step 2, val", "merge_files.py", *self.merge_flags("val"))
        stats = [path.stat() for path in self.dataset.rglob("*") if path.is_file()]
        own_bytes = sum(stat.st_size for stat in stats if stat.st_nlink == 1)  # links take none
        return {"train": train, "val": val, "bytes": own_bytes}

    def merge_flags(self, split: str) -> tuple[str, str]:
        return f"--source_dir={self.tokens / split}", f"--target_dir={self.dataset / split}"

    def train(self) -> dict[str, Any]:
        size = self.settings.vocab_size
        config = {
            "model_config": {
                "name": "ten-billion-tokens", "block_size": CONTEXT, "vocab_size": size, "padded_vocab_size": size,
                "n_layer": 2, "n_embd": 128, "n_head": 4, "n_query_groups": 2, "intermediate_size": 344,
                "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm",
                "mlp_class_name": "LLaMAMLP",
            },
            "accelerator": "cpu", "num_devices": self.settings.num_workers, "precision": "32-true",
            "train": {"global_batch_size": self.settings.num_workers, "micro_batch_size": 1, "lr_warmup_steps": 10,
                      "max_steps": self.settings.steps, "save_interval": None},
            "eval": {"max_iters": 4},
            "optimizer": {"lr": 1e-3},
        }  # fmt: skip
        path = self.work / "train.yaml"
        path.write_text(yaml.safe_dump(config))
        flags = (
            f"--dataset_path={self.dataset}",
            f"--tokenizer_dir={self.tokenizer}",
            f"--out_dir={self.run}",
            "--address=local",
        )
        done = self.stage("step 3", "distributed_pretrain.py", f"--config={path}", *flags)
        losses = [record["loss"] for record in read_metrics(self.run) if record.get("loss") is not None]
        return {
            **done,
            "bytes": harness.directory_bytes(self.run),
            "losses": [losses[0], losses[-1]],
            "steps": len(losses),
        }

    def look_up_first_batch(self) -> dict[str, Any]:
        """Read the first batch of the run back to the rows of the parquet files, whose text is encoded again."""
        words = (str(self.run), "--step=1", f"--dataset_dir={self.dataset}", f"--parquet_dir={self.text}")
        seen = harness.run(sys.executable, "-m", "tools.show_batch", *words, f"--tokenizer_dir={self.tokenizer}")
        rows = re.findall(r"row group \d+, row \d+", seen.output)
        right = "as logged" in seen.output and "row not" not in seen.output and "OTHER TOKENS" not in seen.output
        return {"equal": right, "rows": len(rows)}

    # --- counts -------------------------------------------------------------------------------------------------------

    def count(self) -> dict[str, dict[str, int]]:
        """Documents, bytes of text and tokens, where each end knows them."""
        from litdata import StreamingDataset, TokensLoader

        from utils.chunks import read_index

        made = self.state["text"]
        counts = {"text made": {"documents": made["documents"], "text_bytes": made["text_bytes"]}}
        for name, root in (("step 1's manifests", self.tokens), ("step 2's manifests", self.dataset)):
            paths = root.glob("*/*/manifest.json" if root == self.tokens else "*/manifest.json")
            contents = [read_manifest(path.parent)["content"] for path in paths]
            keys = ("documents", "text_bytes", "tokens")
            counts[name] = {key: sum(content[key] for content in contents) for key in keys}
        splits = [self.dataset / split for split in ("train", "val")]
        indices = [read_index(split, "--work_dir") for split in splits]
        counts["step 2's indices"] = {
            "documents": sum(index.documents for index in indices),
            "tokens": sum(index.tokens for index in indices),
        }
        # In blocks of one token nothing is left over at the end of a chunk.
        blocks = [len(StreamingDataset(str(split), item_loader=TokensLoader(block_size=1))) for split in splits]
        counts["litdata's StreamingDataset"] = {"tokens": sum(blocks)}
        return counts


def unequal(counts: dict[str, dict[str, int]]) -> list[str]:
    """The quantities on which two ends differ."""
    keys = ("documents", "text_bytes", "tokens")
    return [key for key in keys if len({ends[key] for ends in counts.values() if key in ends}) > 1]


def report(state: dict[str, Any], counts: dict[str, dict[str, int]]) -> str:
    """Tables in Markdown: what each stage took, what each end counted, how the words grow."""
    text, step_2 = state["text"], state["step 2"]
    stages = [("make text", text, text["bytes"]), ("step 1: tokenize", state["step 1"], state["step 1"]["bytes"])]
    stages += [("step 2: merge train", step_2["train"], step_2["bytes"]), ("step 2: merge val", step_2["val"], 0)]
    stages += [(f"step 3: {state['step 3']['steps']} steps", state["step 3"], state["step 3"]["bytes"])]
    rows = [
        (
            name, console.human_seconds(stage["seconds"]), ", ".join(f"{s:.0f} s" for s in stage["tries_s"]),
            "; ".join(stage["killed"]) or "-", console.human_bytes(stage["peak_pss_bytes"]), console.human_bytes(size),
        )
        for name, stage, size in stages
    ]  # fmt: skip
    together = sum(stage["seconds"] for _, stage, _ in stages)
    disk = console.human_bytes(sum(size for *_, size in stages))
    rows.append(("together", console.human_seconds(together), "", "", "", disk))
    header = ["", "whole command, all tries", "tries", "killed", "peak memory, all processes", "disk"]
    parts = [harness.environment_line(*PACKAGES), harness.table(header, rows)]
    keys = ("documents", "text_bytes", "tokens")
    lines = [(name, *(f"{ends[key]:,}" if key in ends else "-" for key in keys)) for name, ends in counts.items()]
    parts.append(harness.table(["counted by", "documents", "bytes of text", "tokens"], lines))
    grown = state["growth"]
    lengths = sorted({n for one in grown.values() for n in one["num_words"] if n in grown["made"]["num_words"]})
    found = {key: dict(zip(one["num_words"], one["distinct"])) for key, one in grown.items()}
    lines = [(f"{n:,}", *(f"{found[key][n]:,}" if n in found[key] else "-" for key in found)) for n in lengths]
    lines.append(("exponent over the last factor of ten", *(f"{one['exponent']:.3f}" for one in grown.values())))
    parts.append(harness.table(["words", *(f"distinct, {key} text" for key in grown)], lines))
    seconds = state["step 1"]["seconds"] + step_2["train"]["seconds"] + step_2["val"]["seconds"]
    tokens, first = counts["step 2's indices"]["tokens"], state["first batch"]
    parts.append(
        f"{tokens:,} tokens tokenized and merged in {console.human_seconds(seconds)}. The first batch of training is "
        f"{'' if first['equal'] else 'NOT '}what {first['rows']} rows of the text give."
    )
    return "\n\n".join(parts)


def check_settings(settings: Settings) -> None:
    problems = Problems()
    if not settings.tokens >= 1e6:
        problems.add(f"--tokens={settings.tokens:g}: give at least 1e6.")
    if not 260 <= settings.vocab_size < 2**16:
        problems.add(f"--vocab_size={settings.vocab_size}: give 260 to 65535, for tokens of two bytes.")
    for flag in ("steps", "num_workers"):
        if getattr(settings, flag) < 1:
            problems.add(f"--{flag}={getattr(settings, flag)}: give at least 1.")
    problems.raise_if_any()


def main(settings: Settings) -> None:
    check_settings(settings)
    bench = Bench(settings)
    bench.once("real", bench.make_real, bench.real)
    bench.once("tokenizer", bench.make_tokenizer, bench.sample, bench.tokenizer)
    if "step 1" not in bench.state:
        bench.check_disk()
    bench.once("text", bench.make_text)
    bench.once("growth", bench.measure_growth)
    bench.once("step 1", bench.tokenize, bench.tokens)
    bench.once("step 2", bench.merge, bench.dataset)
    bench.once("step 3", bench.train, bench.run)
    bench.once("first batch", bench.look_up_first_batch)
    counts = bench.once("counts", bench.count)
    said = report(bench.state, counts)
    console.result(said)
    if settings.output:
        Path(settings.output).write_text(said + "\n")
    wrong = unequal(counts)
    if not bench.state["first batch"]["equal"]:
        wrong.append("the first batch")
    if not settings.keep and not wrong:
        for directory in (bench.real, bench.sample, bench.text, bench.tokens, bench.dataset, bench.run):
            shutil.rmtree(directory, ignore_errors=True)
    if wrong or not bench.state["first batch"]["equal"]:
        console.error(f"the ends differ: {', '.join(wrong) or 'first batch'}. Nothing was removed.")
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
