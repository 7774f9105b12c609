"""Write a page about one training run or several: curves to point at, tasks, samples, events, settings, data.

    python -m tools.run_page RUN [RUN ...] --output=run.html
    python -m tools.run_page RUN --serve

RUN is the --out_dir of distributed_pretrain.py. The page is one HTML file that needs no network. With --serve it is
shown at http://127.0.0.1:8000, to this machine alone, and follows the run while it trains.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.plot_curves import names_of
from utils import cli, console
from utils.errors import Problems, UserError
from utils.files import atomic_write

PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


@dataclasses.dataclass
class Settings:
    """Which runs to show, and where."""

    run_dirs: list[str] = dataclasses.field(metadata={"nargs": "+", "help": "Directories of runs."})
    output: str = "run.html"
    """File to write."""
    serve: bool = False
    """Show it at http://127.0.0.1:PORT instead, and keep it fresh, until Ctrl-C."""
    port: int = 8000
    """For --serve (0: any that is free)."""


def main(settings: Settings) -> None:
    runs = collect_all(settings.run_dirs)  # what is wrong is said before anything is written or served
    if settings.serve:
        with make_server(settings) as server:
            console.result(f"http://127.0.0.1:{server.server_port}  (on this machine; Ctrl-C ends it)")
            server.serve_forever()
    output = Path(settings.output)
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: no directory {output.parent}. Make it first.")
    with atomic_write(output) as file:
        file.write(render(runs, live=False).encode())
    console.say(f"{output}: {console.human_bytes(output.stat().st_size)}; open it in a browser")


def collect_all(run_dirs: list[str]) -> list[dict[str, Any]]:
    """Each run's part of the page; raises UserError with every directory that is no run's."""
    from tools.run_page_data import read_run

    problems = Problems()
    found = [problems.collect(read_run, run, name) for run, name in zip(run_dirs, names_of(run_dirs))]
    problems.raise_if_any()
    return found


def render(runs: list[dict[str, Any]], live: bool) -> str:
    """The whole page.

    Args:
        live: whether it asks for `data.json` every few seconds.
    """
    import jinja2

    def read(name: str) -> str:
        return (PAGE / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(read("page.html.jinja"))
    return template.render(
        title=", ".join(run["name"] for run in runs),
        policy=POLICY,
        style=read("uPlot.min.css") + read("page.css"),
        script=read("uPlot.iife.min.js") + "\n" + read("page.js"),
        data=as_json(runs),
        live=live,
    )


def as_json(runs: list[dict[str, Any]]) -> str:
    """JSON that can stand inside a script element: text that the model wrote must not end it."""
    return json.dumps({"runs": runs}, allow_nan=False).replace("<", "\\u003c")


def make_server(settings: Settings) -> http.server.ThreadingHTTPServer:
    """A server for this machine alone.

    Raises:
        UserError: the port is taken.
    """
    answers: dict[str, tuple[str, Callable[[], str]]] = {
        "/": ("text/html; charset=utf-8", lambda: render(collect_all(settings.run_dirs), live=True)),
        "/data.json": ("application/json", lambda: as_json(collect_all(settings.run_dirs))),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's page, whose name is made to lead here, must not read this one.
            host = self.headers.get("Host", "").rpartition(":")[0]
            if self.path not in answers or host not in ("127.0.0.1", "localhost"):
                return self.send_error(404)
            kind, make = answers[self.path]
            try:
                body = make().encode()
            except UserError as error:  # the run is starting again, or was removed
                return self.send_error(503, explain=str(error))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            """One line per poll says nothing."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", settings.port), Handler)
    except OSError as error:
        raise UserError(f"--port={settings.port}: {error.strerror}. Give another one, or 0 for any.") from error


if __name__ == "__main__":
    sys.argv[0] = "-m tools.run_page"
    cli.run(main, Settings, __doc__, positional=True)
