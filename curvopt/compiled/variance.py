"""`VarianceAdaptiveSGD` in a graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvopt.compiled.tracing import Proof, Unsuited
from curvopt.compiled.updates import Groups, Moved, Traced, Update, Write, all_or_none
from curvopt.engine.computation import Computation
from curvopt.optim.noise import Batch, Moments, observed
from curvopt.optim.variance_plan import floor
from curvopt.quantities import Quantity


class VarianceUpdate(Update):
    """Momentum that the samples' variance slows down; the state's numbers stay on the host."""

    _averages: dict[str, Tensor] | None = None
    _table: Tensor

    def mode(self, params: Sequence[Tensor]) -> Hashable | None:
        """Whether S is measured."""
        opt = self.opt
        if any(p not in opt.state for p in params) or opt.samples < 2 or not opt.averages:
            return None
        return all_or_none([opt._due(p) for p in params])

    def settings(self) -> Hashable:
        """As in the base class."""
        opt = self.opt
        return super().settings(), opt.noise_decay, opt.noise_tests, tuple(opt.averages)

    def quantities(self, mode: Hashable) -> list[Quantity]:
        """The moments, where S is measured."""
        return [Moments(self.opt.noise_tests)] if mode else []

    def measure(
        self,
        computation: Computation,
        quantities: list[Quantity],
        numbers: Sequence[Tensor] | None = None,
        drawn: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor | None], dict[str, Any]]:
        """As in the base class; of one sample there is no variance."""
        computation.prepare()
        if computation.samples < 2:
            raise Unsuited("one sample has no variance")
        return super().measure(computation, quantities)

    def tensors(self, mode: Hashable, params: Sequence[Tensor], groups: Groups) -> list[Tensor]:
        """Momentum, S, and the averages of the noise in one."""
        opt = self.opt
        state = [opt.state[p][key] for key in ("momentum_buffer", "variance") for p in params]
        if not mode:
            return state
        if opt.averages is not self._averages:
            self._table = torch.stack([*opt.averages.values()])
            opt.averages = self._averages = dict(
                zip(opt.averages, self._table.unbind(), strict=True)
            )
        return [*state, self._table]

    def numbers(
        self, mode: Hashable, params: Sequence[Tensor], groups: Groups, samples: int
    ) -> Sequence[Sequence[float]]:
        """Learning rates, r, and the shares of news in S."""
        opt, news = self.opt, 1 / (samples or self.opt.samples)
        rates, rows = [], []
        for p, group in zip(params, groups, strict=True):
            state, mu = opt.state[p], group["momentum"]
            rates.append(float(group["lr"]))
            share = max(1 / (state["measured"] + 1), 1 - mu**opt.variance_every) if mode else 0.0
            rows.append((mu**2 * state["spread"] + news, share))
        return [rates, *zip(*rows, strict=True)]

    def move(self, traced: Traced) -> Moved:
        """The formulas of `VarianceAdaptiveSGD`."""
        count, n = len(traced.params), traced.samples
        rates, spreads, shares = traced.numbers
        writes: list[Write] = []
        scatters: dict[Tensor, Tensor] = {}
        if traced.quantities:
            (moments,) = traced.quantities
            assert isinstance(moments, Moments)
            values = traced.values[moments.field]
            sums = {p: total for p, (total, _) in values.items()}
            scatters = {p: part for p, (_, part) in values.items()}
            batch = Batch.made(n, traced.loss.detach(), sums, scatters, moments.products)
            rows = [k for k, p in enumerate(traced.params) if p in scatters]
            table = traced.state[-1]
            names = list(self.opt.averages)
            before = dict(zip(names, table.unbind(), strict=True))
            lr = torch.stack([rates[k] for k in rows]).to(batch.spreads)
            after = observed(before, batch, lr, self.opt.noise_decay)
            writes.append((table, torch.stack([after[name] for name in names]).to(table)))
        for k, (p, grad, group) in enumerate(
            zip(traced.params, traced.grads, traced.groups, strict=True)
        ):
            b, s = traced.state[k], traced.state[count + k]
            rate, spread, share = (part[k].to(b) for part in (rates, spreads, shares))
            least = floor(b.dtype)
            spread_by = s
            if p in scatters:
                news = scatters[p].to(b.dtype) * (share * (n * n / (n - 1)))
                spread_by = (s * (1 - share) + news).clamp(min=least)
                writes.append((s, spread_by))
            moved = grad.to(b.dtype) + group["momentum"] * b
            top = squares = moved * moved
            bottom = squares + spread * spread_by
            if group["debiased"]:
                top = (squares - spread * spread_by).clamp(min=0)
                bottom = squares.clamp(min=least)
            step = top * (moved / bottom) * (rate if group["maximize"] else -rate)
            kept = p * (1 - rate * group["weight_decay"]) if group["weight_decay"] else p
            writes += [(b, moved), (p, (kept + step).to(p.dtype))]
        return Moved(writes, traced.grads)

    def done(
        self,
        mode: Hashable,
        params: Sequence[Tensor],
        groups: Groups,
        proof: Proof,
        seen: Sequence[Tensor],
    ) -> None:
        """Count."""
        opt = self.opt
        opt.samples = proof.samples or opt.samples
        for p, group in zip(params, groups, strict=True):
            state = opt.state[p]
            state["spread"] = group["momentum"] ** 2 * state["spread"] + 1 / opt.samples
            state["step"] += 1
            state["measured"] += bool(mode)
