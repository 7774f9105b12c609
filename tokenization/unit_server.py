"""What a process of `worker_process` does: the units that come through its pipe, one after the other."""

from __future__ import annotations

import contextlib
import pickle
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from tokenization.encoder import import_gigatoken, load_reference
from tokenization.tokenize_unit import process_encoder, tokenize_unit

FOLDER = "0"
"""Sub-folder of train/ and val/: this machine is the only node."""


def serve_units(pipe: Connection, tokenizer_json: Path | None) -> None:
    """Take the tokenizer first, then units until the pipe ends; answer each with its record or its error.

    Args:
        tokenizer_json: a file to load before the tokenizer comes, which it is probably made from.
    """
    with contextlib.suppress(Exception):  # the unit that needs it will fail with the error
        import_gigatoken()
        if tokenizer_json:
            load_reference(tokenizer_json.read_bytes())
    try:
        tokenizer, job = pipe.recv(), None
        while True:
            new_job, unit = pipe.recv()
            job = new_job or job
            try:
                encoder = process_encoder(job, lambda: tokenizer)
                answer = tokenize_unit(job, unit, FOLDER, encoder)
            except BaseException as error:  # a panic in Rust code is not an Exception
                answer = _as_message(error)
            pipe.send(answer)
    except (EOFError, OSError):  # the parent is gone or has closed
        return


def _as_message(error: BaseException) -> Exception:
    """The error as the parent gets it: itself if it survives the pipe, else its text."""
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(text)
        if isinstance(pickle.loads(pickle.dumps(error)), Exception):
            return error
    except Exception:
        pass
    return RuntimeError(text)
