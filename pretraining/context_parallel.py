"""Long context: the processes of a group share each sequence (DeepSpeed Ulysses, arXiv:2309.14509).

Of a sequence of T tokens each of the N members of a group computes T / N neighbouring ones, through the whole model and
the loss. Only attention looks beyond a member's own tokens. There the members exchange: tokens of all heads become all
tokens of H / N heads, ordinary attention runs on these, and a second exchange takes the result back:

    member                0      1                                              0      1
    q, k, v      tokens  0..3   4..7    all-to-all, attention, all-to-all      0..7   0..7
                 heads   0..7   0..7                 <->                       0..3   4..7

Keys and values go as the groups that they are, unless there are fewer groups than members. Each gradient finds its way
back through the same exchanges, so the sum over all processes is the gradient of the whole batch, as it is without.
"""

from __future__ import annotations

import datetime
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # gives the exchange its derivative
from torch import Tensor


class ContextGroup(NamedTuple):
    """The processes that share sequences, as one of them sees it; the default is a process that shares with none."""

    size: int = 1
    member: int = 0
    """Of this process in its group, from 0; it computes the tokens in that place."""
    index: int = 0
    """Of this group among all."""
    count: int = 1
    """Groups in all. Each reads sequences of its own."""
    name: str = ""
    """torch's, of the process group."""

    def part_of(self, tokens: Tensor) -> Tensor:
        """What this member computes, and the token after it, which is its last target.

        Args:
            tokens: whole sequences, each with the token after it; shape (B, T + 1).

        Returns:
            Shape (B, T / size + 1).
        """
        length = (tokens.size(1) - 1) // self.size
        return tokens[:, self.member * length : (self.member + 1) * length + 1]


ALONE = ContextGroup()


def join_context_group(size: int, timeout: datetime.timedelta | None = None) -> ContextGroup:
    """Divide all processes into groups of `size` consecutive ones; every process must call this.

    Args:
        timeout: of an exchange (None: torch's own).
    """
    rank, count = dist.get_rank(), dist.get_world_size() // size
    name = dist.new_subgroups(size, timeout=timeout)[0].group_name if size > 1 else ""
    return ContextGroup(size, rank % size, rank // size, count, name)


class Ulysses(NamedTuple):
    """Attention over the tokens of all members, between two exchanges."""

    pattern: Any
    """One of `attention.Pattern`, for the whole sequence."""
    size: int
    """Members of the group."""
    group_name: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Queries of shape (B, heads, T / size, head_size), and keys and values of as many groups as there are."""
        # Query head h uses group h * groups / heads. That stays so for each member, if groups are repeated until their
        # number divides by the members'.
        repeats = self.size // math.gcd(self.size, k.size(1))
        if repeats > 1:
            k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        # One exchange for all three, laid out as (size, B, T / size, heads / size, head_size): with one sequence per
        # micro-batch what arrives lies as attention takes it, token by token.
        by_member = [part.unflatten(1, (self.size, -1)).permute(1, 0, 3, 2, 4) for part in (q, k, v)]
        arrived = self._exchange(torch.cat(by_member, dim=3)).transpose(0, 1).flatten(1, 2)  # (B, T, .., head_size)
        q, k, v = arrived.transpose(1, 2).split([part.size(3) for part in by_member], dim=1)
        y = self.pattern.attend(q, k, v, scale, softcap)  # (B, heads / size, T, head_size)
        y = y.transpose(1, 2).unflatten(1, (self.size, -1)).transpose(0, 1)
        y = self._exchange(y.contiguous())  # (size, B, T / size, heads / size, head_size)
        return y.permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """parts[i] goes to member i; in its place comes what member i has for this process."""
        # By the operation itself, which autograd, compilation and recomputation all know, and which needs no process
        # group where nothing is sent: on tensors without storage, when memory is planned.
        sizes = [1] * self.size
        sent = torch.ops._c10d_functional.all_to_all_single(parts, sizes, sizes, self.group_name)
        return torch.ops._c10d_functional.wait_tensor(sent)
