"""What an optimizer can say about its last step, as numbers to log."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvopt.optim.lead import fetch_numbers, square, wide
from curvopt.optim.rate import noise_of
from curvopt.optim.state import sides
from curvopt.parallel.shards import over_shards


@dataclass
class Stats:
    """Numbers to log: of all parameters together, and of each tensor.

    Attributes:
        overall: by name.
        tensors: by name, and by parameter.
    """

    overall: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, dict[Tensor, float]] = field(default_factory=dict)

    def mean(self, key: str, values: dict[Tensor, float]) -> None:
        """Add a number of each tensor, and its mean over all elements."""
        if values:
            total = sum(p.numel() for p in values)
            self.tensors[key] = values
            self.overall[key] = sum(p.numel() * value for p, value in values.items()) / total

    def root_mean_square(self, key: str, values: dict[Tensor, float]) -> None:
        """Add a root mean square of each tensor, and that of all elements."""
        if values:
            self.mean(key, {p: value**2 for p, value in values.items()})
            self.tensors[key], self.overall[key] = values, math.sqrt(self.overall[key])

    def flat(self, names: dict[Tensor, str]) -> dict[str, float]:
        """One dict: ``key``, and ``key/name`` for the parameters that have a name here."""
        parts = {
            f"{key}/{names[p]}": value
            for key, values in self.tensors.items()
            for p, value in values.items()
            if p in names
        }
        return {key: float(value) for key, value in (self.overall | parts).items()}


def fetched(params: list[Tensor], rows: list[list[Tensor]]) -> list[list[float]]:
    """Sums over the parts of parameters that are here, made those over whole ones, as numbers.

    They are fetched from their device at once.
    """
    if not rows:
        return []
    kept = [torch.stack(row) for row in rows]
    sums = torch.stack([row.to(kept[0].device) for row in kept])
    return over_shards(sums, params).tolist()


def diag_ggn(groups: list[dict[str, Any]], states: Any) -> Stats:
    """What `DiagGGNOptimizer` logs, from its state."""
    moved = [(p, g, {**states[p]}) for g in groups for p in g["params"] if states.get(p)]
    fetch_numbers([state for _, _, state in moved])
    rows = []
    for _, _, state in moved:
        m, inverse = wide(state["momentum_buffer"]), wide(state["inverse"])
        rows.append([square(m), square(m * inverse), wide(state["curvature"]).sum()])
    sums = fetched([p for p, _, _ in moved], rows)
    rate: dict[Tensor, float] = {}
    signal, step, curvature = dict(rate), dict(rate), dict(rate)
    for (p, group, state), (mean, newton, h) in zip(moved, sums, strict=True):
        mu, t = group["momentum"], state["step"]
        corrected = 1 / (1 - mu**t)
        rate[p] = float(group["lr"]) * math.exp(state.get("log_rate", 0.0))
        step[p] = rate[p] * min(math.sqrt(newton / p.numel()) * corrected, group["max_step"])
        curvature[p] = h / state["weight"] / p.numel()
        if mu and state.get("energy_weight"):
            signal[p] = _signal(group, state, mean * corrected**2)
    stats = Stats()
    stats.mean("rate", rate)
    stats.mean("signal", signal)
    stats.root_mean_square("step_rms", step)
    stats.mean("curvature", curvature)
    return stats


def _signal(group: dict[str, Any], state: dict[str, Any], mean: float) -> float:
    """The share of signal that the rate follows, from the averaged gradient's squared norm."""
    if state["step"] < 2:
        return 0.0
    noise = noise_of(group["momentum"], state["step"])
    energy = state["energy"] / state["energy_weight"]
    r = min(1.0, mean / energy) if energy > 0 else 1.0
    return (r - noise) / (1 - noise)


def polar(groups: list[dict[str, Any]], states: Any) -> Stats:
    """What `PolarOptimizer` logs, from its state: tables as `DiagGGNOptimizer` does."""
    tables = {p: state for p, state in states.items() if "curvature" in state}
    bounded = [{**group, "max_step": 1.0} for group in groups]
    known = diag_ggn(bounded, tables)
    moved = [
        (p, g, {**states[p]}) for g in groups for p in g["params"] if "signal" in states.get(p, ())
    ]
    fetch_numbers([state for _, _, state in moved])
    parts = [[square(wide(state["momentum_buffer"]))] for _, _, state in moved]
    whole = [[square(wide(state["signal"]))] for _, _, state in moved]  # all processes have it
    momenta = fetched([p for p, _, _ in moved], parts)
    sums = [(m, mean) for (m,), (mean,) in zip(momenta, fetched([], whole), strict=True)]
    rate, signal, step = (known.tensors.get(k, {}) for k in ("rate", "signal", "step_rms"))
    for (p, group, state), (m, mean) in zip(moved, sums, strict=True):
        corrected = 1 / (1 - group["momentum"] ** state["step"])
        rate[p] = float(group["lr"]) * math.exp(state.get("log_rate", 0.0))
        step[p] = rate[p] * corrected * math.sqrt(m * max(sides(p)) / p.numel())
        if group["momentum"] and state.get("energy_weight"):
            signal[p] = _signal(group, state, mean * corrected**2)
    stats = Stats()
    stats.mean("rate", rate)
    stats.mean("signal", signal)
    stats.root_mean_square("step_rms", step)
    stats.mean("curvature", known.tensors.get("curvature", {}))
    return stats


def variance_adaptive(groups: list[dict[str, Any]], states: Any, noise: Any = None) -> Stats:
    """What `VarianceAdaptiveSGD` logs, from its state and its `noise`."""
    moved = [(p, g, states[p]) for g in groups for p in g["params"] if states.get(p)]
    rows = []
    for _, group, state in moved:
        b, s = wide(state["momentum_buffer"]), wide(state["variance"])
        squares, spread = b * b, state["spread"] * s
        factor = squares / (squares + spread)
        if group["debiased"]:
            factor = torch.where(squares > 0, (1 - spread / squares).clamp(min=0), 0)
        rows.append([square(b), square(factor * b), s.sum()])
    sums = fetched([p for p, _, _ in moved], rows)
    stats = Stats()
    if noise is not None:
        fields = {f"noise/{key}": value for key, value in asdict(noise).items()}
        stats.overall.update({key: value for key, value in fields.items() if value is not None})
    if not moved:
        return stats
    gain: dict[Tensor, float] = {}
    step, variance = dict(gain), dict(gain)
    for (p, group, _), (whole, left, total) in zip(moved, sums, strict=True):
        gain[p] = math.sqrt(left / whole) if whole else 1.0
        step[p] = float(group["lr"]) * math.sqrt(left / p.numel())
        variance[p] = total / p.numel()
    whole, left = (sum(column) for column in [*zip(*sums, strict=True)][:2])
    stats.tensors["gain"], stats.overall["gain"] = gain, math.sqrt(left / whole) if whole else 1.0
    stats.root_mean_square("step_rms", step)
    stats.mean("variance", variance)
    return stats
