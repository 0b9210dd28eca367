"""The residual stream: its sums inside the GEMM before them, its gradients inside the norm's backward.

In `x + f(norm(x))` autograd sends the sum's gradient back twice, to x and into f, and adds what comes out of
the norm to the first in a pass of its own: 6 bytes an element, twice a layer. Here the sum gives its gradient
to the branch, and the norm's backward, which writes x's gradient anyway, adds it while it does: 2 bytes.
Where the layer says beforehand that the sum follows, the branch's last GEMM adds the residual to its result.

    the layer       `follows` around a block: its module, and the residual that is added to its result
    norm functions  `offer` a Branch: the autograd edge of their input
    last GEMM       `expected_by` its module: the residual to add; `done` says that it has
    the sum         `add`: nothing where that is done; else claims the branch of the residual, if there is one
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_open = threading.local()


class Branch:
    """A norm's input that may also be a residual.

    Attributes:
        edge: where the input's gradient goes in autograd's graph.
    """

    def __init__(self, edge: tuple[Any, int]) -> None:
        self.edge = edge
        self._claimed = False
        self._gradient: Tensor | None = None

    def claim(self) -> None:
        """Say that the sum's gradient will come by `give`."""
        self._claimed = True

    def give(self, gradient: Tensor) -> None:
        """Leave the gradient of the sum, before the norm's backward."""
        self._gradient = gradient

    def take(self) -> Tensor | None:
        """Return the gradient that the norm's backward must add, as a matrix; None where none was claimed.

        Raises:
            RuntimeError: it has not come: the sum does not depend on this norm.
        """
        if not self._claimed:
            return None
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            raise RuntimeError(
                "the residual's gradient did not reach the norm before its backward; "
                "train with --no-infir2-fused and report the model"
            )
        return gradient.reshape(-1, gradient.shape[-1]).contiguous()


def _edge(x: Tensor) -> tuple[Any, int] | None:
    return None if x.grad_fn is None else (x.grad_fn, x.output_nr)


def offer(x: Tensor) -> Branch | None:
    """Offer a norm's input to the next sum; None for one without a graph, whose gradient nobody else has."""
    edge = _edge(x)
    if edge is None:
        return None
    branch = Branch(edge)
    # Weak: it holds the graph before x, and lives as long as the norm's own node.
    _open.branch = weakref.ref(branch)
    return branch


def claimed(residual: Tensor) -> Branch | None:
    """Claim the branch last offered, if it begins at `residual`."""
    found = getattr(_open, "branch", None)
    branch: Branch | None = None if found is None else found()
    if branch is None or branch.edge != _edge(residual):
        return None
    _open.branch = None
    branch.claim()
    return branch


@contextlib.contextmanager
def follows(module: Any, residual: Tensor) -> Iterator[None]:
    """Inside, `module` runs, and what it returns is summed with `residual` by `add`.

    Raises:
        RuntimeError: it was not, but `module` had added it.
    """
    _open.expected, _open.summed = (module, residual), None
    try:
        yield
    finally:
        _open.expected = None
    if _open.summed is not None:
        _open.summed = None
        raise RuntimeError(
            "a fused layer added the residual, and the layer around it did not ask for that sum; "
            "train with --no-infir2-fused and report the model"
        )


def expected_by(module: Any) -> Tensor | None:
    """Return the residual that this module's last GEMM is to add; None: it adds nothing."""
    expected = getattr(_open, "expected", None)
    if expected is None or expected[0] is not module or not torch.is_grad_enabled():
        return None
    _open.expected = None
    residual: Tensor = expected[1]
    return residual if residual.dtype is torch.bfloat16 and residual.requires_grad else None


def done(out: Tensor) -> Tensor:
    """Say that `out` has the residual in it, and return it."""
    _open.summed = weakref.ref(out)
    return out


def add(x: Tensor, residual: Tensor) -> Tensor:
    """Return residual + x, or x where it is that sum already.

    Args:
        x: `[..., H]`, what the branch gave.
        residual: the same shape and dtype.
    """
    summed = getattr(_open, "summed", None)
    if summed is not None and summed() is x:
        _open.summed = None
        return x
    if x.shape != residual.shape or not (x.dtype is residual.dtype is torch.bfloat16):
        return residual + x
    branch = claimed(residual)
    if branch is None:
        return residual + x
    out: Tensor = _Add.apply(x, residual, branch)
    return out


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, branch: Branch) -> Tensor:
        ctx.branch = branch
        return residual + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.branch.give(grad)
        return grad, None, None
