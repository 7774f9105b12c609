"""The page of a run: what is in it, what must not be, `--serve`, and a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import said_by

from pretraining.events import record_event
from pretraining.metrics_writer import MetricsFile
from pretraining.throughput import PEAK_FLOPS, Throughput
from tools.run_page import Settings, as_json, collect_all, main, make_server, render
from tools.run_page_data import MAX_RECORDS, thinned, with_hours
from utils.errors import UserError
from utils.manifest import write_manifest

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def write_run(directory: Path, lr: float = 1e-3, steps: int = 40) -> Path:
    """What a run leaves: a step per record, a restart, a sample that would like to run, a checkpoint's manifest."""
    directory.mkdir(parents=True)
    records = [{"step": 0, "tokens": 0, "val_loss": 9.0, "task_order_acc": 0.25}]
    records += [
        {"step": step, "tokens": 100 * step, "loss": 9 - step / 10, "lr": lr, "tokens_per_s": 5000.0, "mfu": None}
        for step in range(1, steps + 1)
    ]
    records[-1] |= {"val_loss": 5.125, "val_bits_per_byte": 1.75, "task_order_acc": 0.75, "grad_norm": float("nan")}
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines + '{"step": 41, "lo')
    event = {"time": "2026-11-24T10:00:00+00:00", "event": "restart", "step": 7, "message": f"rank 1 died {HOSTILE}"}
    (directory / "events.jsonl").write_text(json.dumps(event) + "\n")
    sample = {"step": 40, "prompt": "Return", "text": HOSTILE, "temperature": 0, "tokens": [1, 2]}
    (directory / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    dataset = {"split": "train", "content": {"documents": 12, "tokens": 3456, "text_bytes": 7890},
               "tokenizer": {"sha256": "ab" * 32}, "inputs": [{}, {}]}  # fmt: skip
    checkpoint = directory / "step-00000040"
    checkpoint.mkdir()
    write_manifest(
        checkpoint,
        {
            "kind": "checkpoint",
            "made_by": {"script": "distributed_pretrain.py", "versions": {}},
            "settings": {"optimizer": {"lr": lr}, "seed": 42},
            "content": {"step": 40},
            "files": [],
            "inputs": [{"path": "data/train", "sha256": "cd" * 32, "manifest": dataset}],
        },
    )
    return directory


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return [str(write_run(tmp_path / name, lr)) for name, lr in (("first", 1e-3), ("second", 2e-3))]


def test_every_record_event_sample_setting_and_dataset_is_in_the_page(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    said_by(capsys, lambda: main(Settings(runs, str(page))))
    content = json.loads(re.search(r'id="content">(.*?)</script>', page.read_text(), re.S)[1])
    first, second = content["runs"]
    assert [run["name"] for run in (first, second)] == ["first", "second"]
    assert len(first["records"]) == 41 and first["records"][-1]["val_loss"] == 5.125
    assert first["records"][-1]["grad_norm"] is None, "JSON has no NaN"
    assert first["events"][0]["step"] == 7 and first["samples"][0]["text"] == HOSTILE
    assert [run["settings"]["optimizer.lr"] for run in (first, second)] == ["0.001", "0.002"]
    assert first["data"][0] == {"path": "data/train", "split": "train", "documents": 12, "tokens": 3456,
                                "text_bytes": 7890, "tokenizer": "ab" * 8, "manifest": "cd" * 8,
                                "sources": 2}  # fmt: skip


def test_nothing_comes_from_the_network_and_no_text_becomes_code(runs):
    page = render(collect_all(runs), live=False)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page) and "@import" not in page
    assert page.count("<script") == 2 and HOSTILE not in page
    assert "default-src &#39;none&#39;" in page
    assert as_json([{"name": HOSTILE}]).count("<") == 0


def test_a_run_that_has_written_little_is_shown(tmp_path):
    run = tmp_path / "young"
    run.mkdir()
    with pytest.raises(UserError, match=r"no metrics.jsonl there"):
        collect_all([str(run)])
    (run / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(UserError, match="no step was logged yet"):
        collect_all([str(run)])
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 9.5}\n')
    (found,) = collect_all([str(run)])
    assert found["records"] == [{"step": 1, "loss": 9.5}]
    assert not any(found[part] for part in ("events", "samples", "settings", "data", "checkpoint"))


def test_a_long_run_is_thinned_by_means_and_keeps_its_validations():
    records = [{"step": step, "loss": float(step % 2)} for step in range(10 * MAX_RECORDS)]
    records[12345]["val_loss"] = 3.0
    found = thinned(records)
    assert len(found) <= MAX_RECORDS + 1 and found[-1]["step"] == records[-1]["step"]
    assert {record["loss"] for record in found if "val_loss" not in record} == {0.5}
    assert [record["val_loss"] for record in found if "val_loss" in record] == [3.0]


def test_hours_count_every_step_once():
    records = [{"step": 0, "val_loss": 9.0}, {"step": 10, "step_s": 36.0}, {"step": 15}, {"step": 20, "step_s": 72.0}]
    assert [record["hours"] for record in with_hours(records)] == pytest.approx([0, 0.1, 0.1, 0.3])
    assert with_hours([{"step": 1, "loss": 9.0}]) == [{"step": 1, "loss": 9.0}]


def test_served_to_this_machine_alone_and_fresh(tmp_path):
    run = write_run(tmp_path / "run")
    with make_server(Settings([str(run)], port=0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        place = f"http://127.0.0.1:{server.server_port}"

        def get(path: str, **headers) -> str:
            request = urllib.request.Request(place + path, headers=headers)
            return urllib.request.urlopen(request, timeout=20).read().decode()

        assert 'data-live="yes"' in get("/")
        assert len(json.loads(get("/data.json"))["runs"][0]["records"]) == 41
        with open(run / "metrics.jsonl", "a") as file:
            file.write('ss": 5.0}\n')
        assert json.loads(get("/data.json"))["runs"][0]["records"][-1] == {"step": 41, "loss": 5.0}
        for path, headers in (("/metrics.jsonl", {}), ("/../run/metrics.jsonl", {}), ("/", {"Host": "example.com:80"})):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(path, **headers)
        with pytest.raises(UserError, match=f"--port={server.server_port}: "):
            make_server(Settings([str(run)], port=server.server_port))
        server.shutdown()


def in_browser(page: str, script: str, directory: Path, width: int) -> dict[str, Any]:
    """What `script`, the body of an async function, returns in the page; it is drawn in a frame of that width.

    A window would be 500 pixels wide at least. The page allows the script for this test alone.
    """
    asking = f"""<script>
    const errors = []; addEventListener("error", (e) => errors.push(e.message));
    const settled = () => new Promise((resolve) => setTimeout(resolve, 20));  // virtual time does not wait for frames
    addEventListener("load", () => setTimeout(async () => {{
      const answer = await (async () => {{ {script} }})().catch((e) => ({{ thrown: String(e) }}));
      parent.postMessage(JSON.stringify({{ ...answer, errors, width: innerWidth }}), "*");
    }}, 300));</script></body>"""
    (directory / "page.html").write_text(page.replace("</body>", asking))
    (
        directory / "frame.html"
    ).write_text(f"""<iframe src="page.html" width={width} height=1600 style="border: 0"></iframe>
    <script>addEventListener("message", (e) => document.body.append(
      Object.assign(document.createElement("pre"), {{ id: "answer", textContent: e.data }})));</script>""")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = ["chromium", *flags.split(), "--disable-component-update", f"--user-data-dir={directory / 'profile'}"]
    command += ["--window-size=1600,1700", "--virtual-time-budget=20000", "--dump-dom"]
    command += [(directory / "frame.html").as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="answer">(.*?)</pre>', process.stdout, re.S)
    assert found, process.stderr[-2000:]
    answer = json.loads(html.unescape(found[1]))
    assert "thrown" not in answer and answer["errors"] == [] and answer["width"] == width, answer
    return answer


needs_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_draws_it_without_an_error_and_shows_values_where_one_points(runs, tmp_path, width):
    script = """
    const refreshed = async () => {  // records come, the page was zoomed into, its settings are folded
      const { plot } = charts[0];
      document.querySelector("details").open = false;
      plot.setScale("x", { min: 1000, max: 2000 });
      await settled();
      const fresh = structuredClone(runs);
      fresh[0].records.push({ step: 41, tokens: 4100, loss: 4.5 });
      refresh(fresh);
      await settled();
      const { min, max } = plot.scales.x;
      return { zoom: [min, max], same: charts[0].plot === plot, end: plot.data[0].at(-1),
        open: document.querySelector("details").open, step: document.querySelector(".run dd").textContent };
    };
    const byKeys = () => {
      const { plot } = charts[0];
      const press = (key) => plot.root.parentNode.dispatchEvent(new KeyboardEvent("keydown", { key }));
      ["Home", "ArrowRight"].forEach(press);
      return plot.data[0][plot.cursor.idx];
    };
    const { plot } = charts[0];
    plot.setCursor({ left: plot.valToPos(2000, "x"), top: 20 });
    await settled();
    return { charts: charts.length, pointed: plot.root.querySelector(".u-legend").textContent, title: document.title,
      keyed: byKeys(), ...await refreshed(), samples: document.querySelector("#samples td.text").textContent,
      differs: [...document.querySelectorAll("tr.differs td:first-child")].map((td) => td.textContent) };"""
    answer = in_browser(render(collect_all(runs), live=False), script, tmp_path, width)
    assert answer["title"] == "first, second"
    assert answer["charts"] == 5, "loss, bits per byte, rate, speed, the task"
    assert "first training" in answer["pointed"] and "7.000" in answer["pointed"]
    assert HOSTILE in answer["samples"] and answer["differs"] == ["optimizer.lr"]
    assert answer["keyed"] == 100, "Home, then the next record"
    assert answer["zoom"] == [1000, 2000] and answer["same"] and answer["end"] == 4100
    assert not answer["open"] and answer["step"] == "41"


def write_crowded_run(directory: Path, lr: float) -> Path:
    """A run of which everything is wide: MFU, tasks, prompts, texts without a space, an event about a long path."""
    write_run(directory, lr)
    (directory / "metrics.jsonl").unlink()
    metrics = MetricsFile(directory)
    throughput = Throughput(tokens_per_step=10**6, flops_per_token=2e8, num_devices=1, device=torch.device("cpu"))
    throughput._peak_flops = PEAK_FLOPS["H200"]  # no CPU has one
    for step in range(1, 41):
        throughput.add_step(loss=9 - step / 10, step_s=0.5 + step / 10**4, data_wait_s=0.01)
        record = {"step": step, "tokens": step * 10**6, "lr": lr, **throughput.record(40 - step)}
        if step % 10 == 0:
            record |= {f"task_{'mmlu_high_school_european_history_' * 2}{i}_acc": step / 50 for i in range(4)}
        metrics.write(record)
    record_event(directory, "restart", f"rank 1 died; see /tmp{'/session_0123456789' * 20}", tell=False, step=17)
    with open(directory / "samples.jsonl", "a") as file:
        for prompt in ("The user " * 60, "x" * 500):
            sample = {"step": 40, "prompt": prompt, "text": f"{'word ' * 100}\n{'w' * 1000}", "temperature": 0.7}
            file.write(json.dumps(sample) + "\n")
    return directory


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(tmp_path, width):
    names = ("short", "a-run-whose-name-is-wider-than-a-telephone" * 3)
    runs = [str(write_crowded_run(tmp_path / name, 1e-3 * i)) for i, name in enumerate(names, 1)]
    script = """
    for (const details of document.querySelectorAll("details")) details.open = true;
    const found = [];
    const measure = (when) => {
      const page = document.documentElement;
      if (page.scrollWidth > page.clientWidth) found.push(`${when}: the page, ${page.scrollWidth}`);
      for (const each of document.querySelectorAll("header *, main *")) {
        const cut = each.matches(".scroll") && each.scrollWidth > each.clientWidth;
        const beyond = each.getBoundingClientRect().right > page.clientWidth;
        if (cut || beyond) found.push(`${when}: ${each.outerHTML.slice(0, 80)}`);
      }
    };
    for (const x of ["tokens", "steps", "hours"]) {
      [...document.querySelectorAll(".choice button")].find((button) => button.textContent === x).click();
      await settled();
      measure(x);
    }
    for (const value of [0, 1, 2]) {
      const choice = document.querySelector("#samples select");
      choice.value = value;
      choice.dispatchEvent(new Event("change"));
      measure(`prompt ${value}`);
    }
    const mfu = charts.find(({ title }) => title.startsWith("Model FLOPs"));
    return { found, mfu: mfu.plot.root.querySelector(".u-legend").textContent,
      run: document.querySelector(".run").textContent,
      tasks: charts.filter(({ title }) => title.startsWith("mmlu")).length,
      ticks: [ticks([0.411, 0.412, 0.413], true), ticks([0, 2.25e6, 4.5e6]), ticks([123400, 123450]),
        ticks([1, null, 10])] };"""
    answer = in_browser(render(collect_all(runs), live=False), script, tmp_path, width)
    assert answer["found"] == []
    mfu = f"{100 * 2e8 * 1e6 / 0.504 / 989e12:.1f}%"
    assert f"MFU{mfu}" in answer["run"] and mfu in answer["mfu"] and answer["tasks"] == 4
    assert answer["ticks"] == [["41.1%", "41.2%", "41.3%"], ["0", "2.25 M", "4.5 M"], ["123.4 k", "123.45 k"],
                               ["1", "", "10"]]  # fmt: skip


@needs_browser
def test_a_single_record_is_a_point(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 100, "loss": 9.5}\n')
    script = """
    const { ctx } = charts[0].plot, { data } = ctx.getImageData(0, 0, ctx.canvas.width, ctx.canvas.height);
    const drawn = [...Array(data.length / 4).keys()].filter((i) => data[4 * i + 2] > data[4 * i] + 100);
    return { blue: drawn.length };"""
    assert in_browser(render(collect_all([str(tmp_path)]), live=False), script, tmp_path, 400)["blue"] > 10
