"""Random access to the training sequences of merged datasets, and their delivery ahead of time.

The files are read by litdata's own `TokensLoader`, without the cache and the download threads that
`litdata.StreamingDataset` puts around it: nothing can evict a chunk of a local dataset. Block i is the same as
`StreamingDataset(directory, item_loader=TokensLoader(block_tokens))[i]`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import xxhash
from litdata.streaming.item_loader import TokensLoader
from litdata.streaming.serializers import _get_serializers

from pretraining.context_parallel import ALONE, ContextGroup
from pretraining.data_order import SequenceOrder
from pretraining.documents import Separator, document_offsets
from pretraining.plan import Plan
from pretraining.settings import TrainSettings
from utils.chunks import CODE_OF_DTYPE, Index, read_index
from utils.errors import UserError
from utils.machine import raise_open_file_limit

# Each mapped chunk holds a file descriptor and a mapping; the kernel's default limit is 65,530 mappings per process.
_MAX_MAPPED_CHUNKS = 16384


class TokenBlocks:
    """The blocks of one dataset by number.

    Args:
        directory: holds index.json and the chunk files.
        block_tokens: tokens of a block; context plus one, because targets are inputs moved by one.

    Raises:
        UserError: no chunk holds a block of this size, or a file is missing or has another size than its index says.
    """

    def __init__(self, directory: str | Path, block_tokens: int):
        index = read_index(directory, "--dataset_path")
        self.block_tokens = block_tokens
        self._paths = [str(index.directory / chunk.name) for chunk in index.chunks]
        self._bytes = [chunk.bytes for chunk in index.chunks]
        _check_files(index)
        self._begins = np.concatenate([[0], np.cumsum([chunk.tokens // block_tokens for chunk in index.chunks])])
        if len(self) == 0:
            raise UserError(
                f"--dataset_path: {directory} has {index.tokens} tokens in {len(index.chunks)} chunks, too few for one "
                f"block of {block_tokens}. Give more text, or a smaller --train.max_seq_length."
            )
        entries = [
            {"chunk_bytes": c.bytes, "chunk_size": c.documents, "dim": c.tokens, "filename": c.name}
            for c in index.chunks
        ]
        mapped = min(len(entries), _MAX_MAPPED_CHUNKS, raise_open_file_limit(4 * _MAX_MAPPED_CHUNKS) // 2)
        self._loader = TokensLoader(block_tokens)
        config = {
            "data_format": [f"no_header_tensor:{CODE_OF_DTYPE[index.dtype]}"],
            "data_spec": None,
            "compression": None,
        }
        self._loader.setup(config, entries, _get_serializers(None))
        self._loader.set_posix_fast(True, keep=mapped)

    def __len__(self) -> int:
        return int(self._begins[-1])

    def _chunk_of(self, block: int) -> int:
        return int(np.searchsorted(self._begins, block, side="right")) - 1

    def describe(self, block: int, place: int) -> str:
        """Where a token of a block is, for messages."""
        chunk = self._chunk_of(block)
        token = (block - int(self._begins[chunk])) * self.block_tokens + place
        return f"token {token} of {self._paths[chunk]}"

    def __getitem__(self, block: int) -> torch.Tensor:
        """The tokens of a block: shape (block_tokens,) of the dataset's integer type."""
        chunk = self._chunk_of(block)
        return self._loader.load_item_from_chunk(
            int(block), chunk, self._paths[chunk], int(self._begins[chunk]), self._bytes[chunk]
        )


def _check_files(index: Index) -> None:
    wrong = []
    for chunk in index.chunks:
        path = index.directory / chunk.name
        size = path.stat().st_size if path.is_file() else None
        if size != chunk.bytes:
            wrong.append(f"{path}: {'missing' if size is None else f'{size} bytes'}, index.json says {chunk.bytes}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"--dataset_path: {'; '.join(wrong[:3])}{more}. Merge the dataset again.")


class Sequences:
    """The endless sequence of training blocks of one or several datasets, by position.

    Args:
        vocab_size: of the model; None: ids are not looked at.
        separators: of the datasets, where documents are masked from one another.
    """

    def __init__(
        self,
        directories: list[Path],
        weights: list[float] | None,
        block_tokens: int,
        seed: int,
        vocab_size: int | None = None,
        separators: list[Separator] | None = None,
    ):
        self._vocab_size = vocab_size
        self.datasets = [TokenBlocks(directory, block_tokens) for directory in directories]
        self.separators = separators
        self.num_blocks = [len(dataset) for dataset in self.datasets]
        self.order = SequenceOrder(self.num_blocks, weights, seed)

    def read(self, positions: np.ndarray) -> torch.Tensor:
        """int64, shape (len(positions), block_tokens)."""
        return self.read_with_offsets(positions)[0]

    def read_with_offsets(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens, and where documents start in all but the last of each block, which is no input.

        Returns:
            int64, shape (len(positions), block_tokens), and int32 as `document_offsets` says, None without separators.

        Raises:
            UserError: a token id has no embedding. On a GPU it would be an assertion in a kernel, without a place.
        """
        located = self.order.locate(positions)
        sources = located.source.tolist()
        tokens = torch.stack([self.datasets[s][b] for s, b in zip(sources, located.block.tolist())]).long()
        if self._vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            row, place = ((tokens < 0) | (tokens >= self._vocab_size)).nonzero()[0].tolist()
            where = self.datasets[sources[row]].describe(int(located.block[row]), place)
            raise UserError(
                f"--dataset_path: token id {int(tokens[row, place])} at {where}; the model has {self._vocab_size} "
                "embeddings. The dataset is damaged, or was made with another tokenizer: make it again."
            )
        if self.separators is None:
            return tokens, None
        offsets = document_offsets(tokens[:, :-1].numpy(), [self.separators[s] for s in sources])
        return tokens, torch.from_numpy(offsets)


def plan_sequences(plan: Plan, directories: list[str], seed: int) -> Sequences:
    """The sequences of a plan's training or validation data."""
    return Sequences(
        [Path(path) for path in directories],
        plan.weights,
        plan.context_tokens + 1,
        seed,
        plan.model_config["padded_vocab_size"],
        plan.separators,
    )


def rank_positions(first: int, count: int, rank: int, world_size: int) -> np.ndarray:
    """Those of the `count` positions from `first` on that a rank reads: position p belongs to rank p mod world_size.

    Where processes share sequences, `rank` and `world_size` are those of their groups (ContextGroup.index and .count).
    """
    positions = np.arange(first, first + count, dtype=np.int64)
    return positions[positions % world_size == rank]


def even_batches(count: int, size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The positions below `count` that a rank computes, at most `size` at a time; see `rank_positions`.

    As many batches for every rank, the last of them possibly empty: all processes must make the same number of forward
    passes, for they gather weights together.
    """
    mine = rank_positions(0, count, rank, world_size)
    num_batches = math.ceil(math.ceil(count / world_size) / size)
    return [mine[i * size : (i + 1) * size] for i in range(num_batches)]


def rank_micro_batches(steps: range, train: TrainSettings, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """The positions of each micro-batch that a rank computes in these steps; see `rank_positions`."""
    for step in steps:
        mine = rank_positions(step * train.global_batch_size, train.global_batch_size, rank, world_size)
        for start in range(0, len(mine), train.micro_batch_size):
            yield mine[start : start + train.micro_batch_size]


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    tokens: torch.Tensor
    """int64, shape (sequences, block_tokens). Members of a group that shares sequences have their part of these, as
    `ContextGroup.part_of` says."""
    offsets: torch.Tensor | None
    """Where documents start in the whole sequences, if they are masked from one another: int32, of one length for all
    micro-batches, as `documents.document_offsets` says."""
    digest: int
    """Sum over sequences of a 64-bit hash of position and tokens, modulo 2^64: it tells which sequences a global batch
    holds, in whatever pieces they were read. 0 for all members of a group but the first."""

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the model takes: inputs, targets and offsets. From page-locked memory no one waits for the copy."""
        tokens = self.tokens.to(device, non_blocking=True)
        offsets = self.offsets if self.offsets is None else self.offsets.to(device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:], offsets


def read_micro_batch(
    sequences: Sequences, positions: np.ndarray, pin_memory: bool, group: ContextGroup = ALONE
) -> MicroBatch:
    tokens, offsets = sequences.read_with_offsets(positions)
    digest = 0
    if group.member == 0:
        numbered = zip(tokens, positions.tolist())
        digest = sum(xxhash.xxh3_64_intdigest(row.numpy(), seed=position) for row, position in numbered)
    tokens = group.part_of(tokens)
    if pin_memory:
        tokens, offsets = tokens.pin_memory(), offsets if offsets is None else offsets.pin_memory()
    return MicroBatch(tokens, offsets, digest % 2**64)


def prefetch(
    sequences: Sequences,
    batches: Iterator[np.ndarray],
    pin_memory: bool,
    depth: int = 8,
    group: ContextGroup = ALONE,
) -> Iterator[MicroBatch]:
    """Read micro-batches in a thread, ahead of the training loop. The thread ends when the generator is closed.

    Args:
        batches: the positions of each micro-batch, in the order of use.
        pin_memory: whether to copy into page-locked memory, so that the copy to a GPU overlaps with work.
        depth: how many micro-batches are ready at most.
        group: the processes that share each sequence.
    """

    def read_next() -> MicroBatch | None:
        positions = next(batches, None)
        return None if positions is None else read_micro_batch(sequences, positions, pin_memory, group)

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        ready = collections.deque(pool.submit(read_next) for _ in range(depth))
        while (batch := ready.popleft().result()) is not None:
            ready.append(pool.submit(read_next))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
