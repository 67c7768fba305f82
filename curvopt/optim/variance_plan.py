"""How parameters move along momentum that their variance slows down."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a block: 256 KiB of float32.
BLOCK = 1 << 16
# Elements of a parameter whose calls cost more than its arithmetic.
SMALL = 1 << 12


class Row(NamedTuple):
    """A parameter, its gradient, momentum buffer and S, what is new in S, and its state to come.

    Tensors are the parts that this process has; `key` is the parameter itself.
    """

    p: Tensor
    grad: Tensor
    b: Tensor
    s: Tensor
    scatter: Tensor | None
    state: dict[str, Any]
    key: Tensor


class Plan:
    """What one step does to some parameters: `VarianceAdaptiveSGD` says it, ``r = spread``.

    Whatever can fail is done before anything changes. One by one, parameters then move by
    arithmetic that is in place and has its memory already; together, by steps computed before.

    Args:
        group: the settings.
        spread: r.
        share: of the news in S.
        new: factor of the scatter.
        rows: the parameters.
    """

    def __init__(
        self, group: dict[str, Any], spread: float, share: float, new: float, rows: list[Row]
    ):
        lr = float(group["lr"])
        self.spread, self.share, self.new, self.rows = spread, share, new, rows
        self.momentum, self.debiased = group["momentum"], group["debiased"]
        self.rate = lr if group["maximize"] else -lr
        self.shrink = 1 - lr * group["weight_decay"]
        self.floor = floor(rows[0].s.dtype)
        self.together: list[Row] = []
        apart: list[Row] = []
        for row in rows:
            (self.together if self._is_joined(row, group["foreach"]) else apart).append(row)
        if self.together:
            self.made = self._become(*(list(part) for part in zip(*self.together, strict=True)))
        self.blocks = [block for row in apart for block in _blocks(*row[:5])]
        sizes: dict[torch.device, int] = {}
        for _, _, b, _, _ in self.blocks:
            sizes[b.device] = max(b.numel(), sizes.get(b.device, 0))
        self.scratch = {
            device: torch.empty(2, size, dtype=rows[0].b.dtype, device=device)
            for device, size in sizes.items()
        }

    @staticmethod
    def _is_joined(row: Row, foreach: bool | None) -> bool:
        """Whether a parameter moves together with others: the small ones, by default on a CPU."""
        if foreach is None:
            foreach = row.p.device.type != "cpu" or row.p.numel() <= SMALL
        return foreach and row.p.dtype == row.b.dtype

    def _move(self, p: Tensor, grad: Tensor, b: Tensor, s: Tensor, scatter: Tensor | None) -> None:
        """Move one parameter, or a block of it."""
        if scatter is not None:
            self._spread(s, scatter)
        torch.add(grad, b, alpha=self.momentum, out=b)
        squares, other = (part[: b.numel()].view(b.shape) for part in self.scratch[b.device])
        torch.mul(b, b, out=squares)
        # gamma = top / bottom
        if self.debiased:
            top = torch.sub(squares, s, alpha=self.spread, out=other).clamp_(min=0)
            bottom = squares.clamp_(min=self.floor)
        else:
            top, bottom = squares, torch.add(squares, s, alpha=self.spread, out=other)
        step = torch.div(b, bottom, out=bottom)
        if self.shrink != 1:
            p.mul_(self.shrink)
        if p.dtype == step.dtype:
            p.addcmul_(top, step, value=self.rate)
        else:
            p.add_(step.mul_(top), alpha=self.rate)

    def _spread(self, s: Tensor, scatter: Tensor) -> Tensor:
        return s.mul_(1 - self.share).add_(scatter, alpha=self.new).clamp_(min=self.floor)

    def _become(
        self, _: Any, grads: Any, buffers: Any, spreads: Any, scatters: Any, *__: Any
    ) -> Any:
        """What many parameters become by each call: S, b, and the two factors of their steps."""
        if scatters[0] is not None:
            spreads = torch._foreach_mul(spreads, 1 - self.share)
            torch._foreach_add_(spreads, scatters, alpha=self.new)
            torch._foreach_clamp_min_(spreads, self.floor)
        buffers = torch._foreach_add(grads, buffers, alpha=self.momentum)
        squares = top = torch._foreach_mul(buffers, buffers)
        if self.debiased:
            top = torch._foreach_add(squares, spreads, alpha=-self.spread)
            torch._foreach_clamp_min_(top, 0)
            torch._foreach_clamp_min_(squares, self.floor)
            bottom = squares
        else:
            bottom = torch._foreach_add(squares, spreads, alpha=self.spread)
        return spreads, buffers, top, torch._foreach_div(buffers, bottom)

    def carry_out(self, states: Any) -> None:
        """Change parameters and states, in place and without memory: nothing that could fail."""
        for row in self.rows:
            states[row.key].update(row.state)
        for block in self.blocks:
            self._move(*block)
        if not self.together:
            return
        params, _, buffers, spreads, scatters, *_ = (
            list(part) for part in zip(*self.together, strict=True)
        )
        made = self.made
        if scatters[0] is not None:
            torch._foreach_copy_(spreads, made[0])
        torch._foreach_copy_(buffers, made[1])
        if self.shrink != 1:
            torch._foreach_mul_(params, self.shrink)
        torch._foreach_addcmul_(params, made[2], made[3], value=self.rate)


def _blocks(*row: Tensor | None) -> Iterator[Any]:
    """Large tensors in blocks, which stay in a core's cache over the calls of `Plan._move`."""
    given = [tensor for tensor in row if tensor is not None]
    if given[0].numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in given):
        yield row
    else:
        yield from zip_longest(*([] if t is None else t.view(-1).split(BLOCK) for t in row))


def floor(dtype: torch.dtype) -> float:
    """The smallest S: far below any square that matters, and still normal when it is divided."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps
