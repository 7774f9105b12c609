"""Prove where something came from: walk from it back to the files of text, and compare everything on the way.

    python -m tools.verify EXPORT
    python -m tools.verify RUN --deep

DIRECTORY is anything that a step published: an export, a checkpoint or a run with several, a merged dataset, the
output of optimize_dataset.py, a demo corpus or tokenizer. Each is compared with its manifest, every byte, and with what
it was made from: checksums, counts, settings. What the steps before published is looked for where the manifests say
and beside it; a flag names another place.

Exit code 0: everything that is here agrees. 1: something is changed or missing; the tree says what. 2: wrong usage.
"""

from __future__ import annotations

import dataclasses
import sys

from utils import cli, console
from utils.errors import UserError

EXIT_CHANGED = 1


@dataclasses.dataclass
class Settings:
    """What is verified, how deeply, and where its origins are."""

    directory: str
    """What to verify: EXPORT, RUN, RUN/final, DATA, DATA/train, OUT, or the demo's corpus or tokenizer."""
    deep: bool = False
    """Also tokenize some of the text again, read some batches again, and compare all exported weights by value."""
    num_units: int = 3
    """For --deep: how many units of the text are tokenized again, spread over all of them."""
    checkpoint_dir: str | None = None
    """The checkpoint that EXPORT was made from; null: where the manifest says, or near EXPORT."""
    dataset_dir: str | None = None
    """Directory with train/ and val/, or the directory above those of a mixture; null: where the manifest says."""
    tokens_dir: str | None = None
    """The output of optimize_dataset.py; null: near the dataset."""
    parquet_dir: str | None = None
    """The input of optimize_dataset.py, a path or a URL; null: near the tokens."""
    tokenizer_dir: str | None = None
    """The tokenizer that made the tokens; null: near them."""


def main(settings: Settings) -> None:
    if settings.num_units < 1:
        raise UserError(f"--num_units={settings.num_units}: must be at least 1.")
    from tools.provenance import AGREES, CHANGED, MISSING, UNKNOWN, count_statuses
    from tools.provenance_walk import Walk

    walk = Walk(settings)
    roots = walk.verify()
    for root in roots:
        for line in root.render():
            console.result(line)
    counts = count_statuses(roots)
    wrong = counts[CHANGED] + counts[MISSING]
    verdict = f"{counts[CHANGED]:,} changed, {counts[MISSING]:,} missing" if wrong else "all that is here agrees"
    console.result(f"\n{verdict}: {counts[AGREES]:,} comparisons agree, {counts[UNKNOWN]:,} cannot be made")
    if wrong:
        sys.exit(EXIT_CHANGED)


if __name__ == "__main__":
    sys.argv[0] = "-m tools.verify"  # as messages name the command
    cli.run(main, Settings, __doc__, positional=True)
