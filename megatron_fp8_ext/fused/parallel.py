"""Tensor parallelism of the fused functions: what is gathered is FP8, half of the bytes of BF16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_fp8_ext.fp8.collectives import gather_first, reduce_scatter_first
from megatron_fp8_ext.fp8.reference import BLOCK
from megatron_fp8_ext.kernels.cast import BlockCast, Operand


@dataclass(frozen=True)
class Parallel:
    """A tensor-parallel group of more than one rank.

    Attributes:
        group: the process group.
        sequence: whether activations between the blocks are split along the tokens (sequence parallelism).
            Each rank's tokens are then whole blocks of 128, so that a cast of a part is a part of the cast.
    """

    group: Any
    sequence: bool

    def gather(self, cast: BlockCast) -> BlockCast:
        """Return the 1x128 cast of all tokens from this rank's; as it is without sequence parallelism.

        Raises:
            ValueError: this rank's tokens are not whole blocks.
        """
        if not self.sequence:
            return cast
        rows, columns = cast.rows, cast.columns
        if rows is not None:
            _whole_blocks(rows.codes.shape[0])
            rows = Operand(gather_first(rows.codes, self.group), self._side_by_side(rows.scale_inv))
        if columns is not None:
            _whole_blocks(columns.codes.shape[1])
            columns = Operand(
                self._side_by_side(columns.codes), gather_first(columns.scale_inv, self.group)
            )
        return BlockCast(rows, columns)

    def _side_by_side(self, part: Tensor) -> Tensor:
        """The ranks' matrices `[k, m]` next to each other, `[k, ranks m]`."""
        k, m = part.shape
        ranks = self.group.size()
        stacked = gather_first(part, self.group).view(ranks, k, m)
        return stacked.transpose(0, 1).reshape(k, ranks * m)

    def reduce(self, partial: Tensor) -> Tensor:
        """Sum `[M, N]` over the ranks; this rank's tokens of it under sequence parallelism."""
        if self.sequence:
            return reduce_scatter_first(partial, self.group)
        dist.all_reduce(partial, group=self.group)
        return partial


def _whole_blocks(tokens: int) -> None:
    if tokens % BLOCK:
        raise ValueError(
            f"{tokens} tokens on a rank: sequence parallelism needs a multiple of {BLOCK}"
        )
