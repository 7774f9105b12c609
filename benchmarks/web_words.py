"""The words of made-up web text: real words by their real frequency, and new ones coined for ever, as real text does.

Text drawn from a list of words stops growing in words; real text never does: its distinct words grow as a power of its
length (Heaps' law). Here the words that a real text has at least twice keep their frequency. The rest of the
probability belongs to a tail without end: word number r of it has a frequency of r ** (-1 / exponent), and its letters
follow from r alone. A document costs a table look-up per word and one copy of bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

SLOTS = 3  # a coined word is a beginning, a middle and an end
CLASSES = 16
ENTRIES = 4096  # of each slot of each class; their product is the number of words that can be coined
PIECE = re.compile(r"(\s*)(\S+)")


@dataclasses.dataclass(frozen=True)
class Growth:
    """How the distinct words of a text grow with its length."""

    num_words: list[int]
    distinct: list[int]

    @property
    def exponent(self) -> float:
        """Of Heaps' law, distinct = k * words ** exponent, over the last factor of ten."""
        last = np.array(self.num_words) >= self.num_words[-1] / 10
        return float(np.polyfit(np.log(self.num_words)[last], np.log(self.distinct)[last], 1)[0])


def growth_of(texts: Iterable[pa.StringArray], marks: Iterable[int]) -> Growth:
    """Count the distinct words, separated by white space, of the first words of `texts`, at each of `marks`."""
    import pyarrow.compute as pc

    left, seen, total = sorted(marks), set(), 0
    growth = Growth([], [])
    for batch in texts:
        words = pc.utf8_split_whitespace(batch).flatten()
        words = words.filter(pc.not_equal(words, ""))  # before and after the white space at a text's ends
        while left and total + len(words) >= left[0]:
            seen.update(words[: left[0] - total].unique().to_pylist())
            growth.num_words.append(left[0])
            growth.distinct.append(len(seen))
            words, total = words[left[0] - total :], left.pop(0)
        if not left:
            break
        seen.update(words.unique().to_pylist())
        total += len(words)
    return growth


def marks_up_to(num_words: int) -> list[int]:
    """10,000, 20,000, 50,000 and so on, and `num_words` itself."""
    return sorted({m * 10**e for e in range(4, 12) for m in (1, 2, 5) if m * 10**e <= num_words} | {num_words})


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn from


class Vocabulary:
    """Pieces of text, and how they are drawn.

    A piece is a word with the white space before it. Their numbers: the words of the real text, then the parts of
    coined words by slot, class and entry; and all of them again without white space, to begin a document with.
    """

    def __init__(self, texts: list[str]):
        spaced = collections.Counter((_space(space), word) for text in texts for space, word in PIECE.findall(text))
        words: collections.Counter[str] = collections.Counter()
        for (_, word), count in spaced.items():
            words[word] += count
        self.num_real_words = words.total()
        self.exponent = _exponent(texts, self.num_real_words)
        tail_share, self.first_rank = _tail(self.num_real_words, len(words), self.exponent)
        # By frequency, so that the words that are drawn most lie side by side in memory.
        head = sorted(((n, piece) for piece, n in spaced.items() if words[piece[1]] > 1), reverse=True)
        self.tail_piece = len(head)
        counts = np.array([n for n, _ in head], float)
        self.threshold, self.alias = _alias_table(np.append(counts / counts.sum() * (1 - tail_share), tail_share))
        pieces = [space + word for _, (space, word) in head] + _parts_of_words([word for _, (_, word) in head])
        self.num_pieces = len(pieces)
        self.pieces = pa.array(pieces + [piece.lstrip() for piece in pieces], pa.string())

    def draw(self, random: np.random.Generator, num_words: int, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of `num_words` words.

        Args:
            starts: numbers of the words that begin a document, ascending.

        Returns:
            numbers of pieces, and where in them the documents of `starts` begin.
        """
        bits = random.integers(0, 1 << 64, num_words, np.uint64)
        # Walker's alias method: a uniform choice, and one comparison.
        choice = ((bits & np.uint64(0xFFFFFFFF)) * np.uint64(len(self.alias)) >> np.uint64(32)).astype(np.uint32)
        refused = (bits >> np.uint64(32)).astype(np.uint32) >= self.threshold[choice]
        drawn = np.where(refused, self.alias[choice], choice)

        coined = np.flatnonzero(drawn == self.tail_piece)
        place = np.ones(num_words, np.int64)
        place[coined] = SLOTS
        place = np.cumsum(place) - place
        pieces = np.empty(num_words + (SLOTS - 1) * len(coined), np.uint32)
        pieces[place] = drawn
        parts = self.parts(self.draw_ranks(random, len(coined)))
        for slot in range(SLOTS):
            pieces[place[coined] + slot] = parts[slot]
        begins = place[starts]
        pieces[begins] += np.uint32(self.num_pieces)
        return pieces, begins

    def draw_ranks(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Numbers of coined words, from `first_rank`; number r is r ** (-1 / exponent) as frequent as the first."""
        power = -self.exponent / (1 - self.exponent)
        return np.minimum(self.first_rank * (1 - random.random(count)) ** power, 2.0**62).astype(np.uint64)

    def parts(self, ranks: np.ndarray) -> list[np.ndarray]:
        """The pieces that each coined word consists of: slot -> an array as long as `ranks`."""
        mixed = ranks * np.uint64(0x9E3779B97F4A7C15)  # splitmix64: neighbours in rank have nothing in common
        mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        kind = (mixed & np.uint64(CLASSES - 1)).astype(np.uint32)
        found = []
        for slot in range(SLOTS):
            entry = (mixed >> np.uint64(8 + 12 * slot) & np.uint64(ENTRIES - 1)).astype(np.uint32)
            found.append(np.uint32(self.tail_piece) + (np.uint32(slot * CLASSES) + kind) * np.uint32(ENTRIES) + entry)
        return found


def _space(space: str) -> str:
    return "\n\n" if space.count("\n") > 1 else "\n" if "\n" in space else " "


def _exponent(texts: list[str], num_words: int) -> float:
    return growth_of((pa.array([text]) for text in texts), marks_up_to(num_words)).exponent


def _tail(num_words: int, num_distinct: int, exponent: float) -> tuple[float, float]:
    """(share of the words that are coined, number of the first of them), so that growth goes on as it was.

    With distinct(n) = k * n ** b, a text has b * distinct words once, and these and all that it does not have make up
    b * (2 - b) * distinct / n of the language. Words with a frequency above x number c * x ** -b, c = k / gamma(1 - b).
    """
    share = exponent * (2 - exponent) * num_distinct / num_words
    c = num_distinct / num_words**exponent / math.gamma(1 - exponent)
    highest = (share * (1 - exponent) / (c * exponent)) ** (1 / (1 - exponent))
    return share, c * highest**-exponent


def _alias_table(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(threshold, alias): entry i stays i where 32 random bits are below threshold[i], else it becomes alias[i]."""
    scaled = (shares * len(shares)).tolist()
    alias = np.arange(len(shares), dtype=np.uint32)
    small = [i for i, share in enumerate(scaled) if share < 1]
    large = [i for i, share in enumerate(scaled) if share >= 1]
    while small and large:
        few, many = small.pop(), large[-1]
        alias[few] = many
        scaled[many] -= 1 - scaled[few]
        if scaled[many] < 1:
            small.append(large.pop())
    threshold = np.minimum(np.array(scaled), 1) * 0xFFFFFFFF
    return threshold.astype(np.uint32), alias


def _parts_of_words(words: list[str]) -> list[str]:
    """SLOTS * CLASSES * ENTRIES parts, by slot, class and entry."""
    random = np.random.default_rng(0)
    plain = sorted({word for word in words if word.isascii() and word.isalpha() and word.islower() and len(word) > 4})
    ends = sorted({word[-n:] for word in words for n in (2, 3, 4) if len(word) > 5 and word[-n].isalpha()})
    begins = sorted({word[:n] for word in plain for n in (2, 3, 4)})
    middles = sorted({word[i : i + n] for word in plain for i in (2, 3) for n in (1, 2, 3)} | {""})

    def some(options: list[str]) -> list[str]:
        # Each as often as the others where there are not enough.
        picked = random.permutation(np.resize(random.permutation(len(options)), ENTRIES))
        return [options[i] for i in picked]

    def letters(low: int, high: int) -> list[str]:
        drawn = random.integers(low, high + 1, (ENTRIES, 4)).tolist()
        return ["".join(map(chr, row[: 1 + i % 4])) for i, row in enumerate(drawn)]

    def parts(kind: int) -> list[list[str]]:
        if kind < 10:
            first = some(begins) if kind < 7 else [part.capitalize() for part in some(begins)]
            return [first, some(middles), some(ends)]
        numbers = [str(number) for number in range(ENTRIES)]
        addresses = [
            [f"https://{host}" for host in some(plain)],
            some(begins),
            [f".com/{name}" for name in some(plain)],
        ]
        return {
            10: [numbers, some(["", ".", ",", "-", "/", ":"]), numbers],
            11: addresses,
            12: [some(plain), ["-"] * ENTRIES, some(plain)],
            13: [some(begins), letters(0xE0, 0xFF), some(ends)],  # accents
            14: [letters(0x430, 0x44F), letters(0x430, 0x44F), letters(0x430, 0x44F)],  # Cyrillic
            15: [letters(0x4E00, 0x5E00), [""] * ENTRIES, letters(0x4E00, 0x5E00)],  # Chinese
        }[kind]

    slots = [[], [], []]
    for kind in range(CLASSES):
        for slot, entries in enumerate(parts(kind)):
            space = [("\n" if i % 32 == 31 else " ") if slot == 0 else "" for i in range(ENTRIES)]
            slots[slot] += [before + entry for before, entry in zip(space, entries)]
    return slots[0] + slots[1] + slots[2]
