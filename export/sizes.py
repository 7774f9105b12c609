"""Sizes of files as a person writes them."""

from __future__ import annotations

import re

from utils.errors import UserError


def parse_bytes(text: str, flag: str) -> int:
    """The bytes that a person wrote as 10MB, 1.5 GiB or 2000; raises UserError where it is not a size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)(i?)B?\s*", text, re.IGNORECASE)
    scale = (1024 if match[3] else 1000) ** " kmg".index(match[2].lower() or " ") if match else 0
    size = int(float(match[1]) * scale) if match else 0
    if size <= 0:
        raise UserError(f"{flag}={text}: not a size. Write it as 500MB or 5GB.")
    return size
