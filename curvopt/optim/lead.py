"""How far each parameter goes, without a look at any number: what `Plan` and `adapt` say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvopt.looks import may_look
from curvopt.optim.rate import LARGEST, noise_of
from curvopt.parallel.shards import local

#: Numbers of a parameter's state that follow from values, so that a device may have them.
NUMBERS = ("energy", "energy_weight", "log_rate")


class Known(NamedTuple):
    r"""What the host knows of the coming step of P parameters, ``[P]`` each, in double precision.

    Attributes:
        lr: the learning rate.
        correction: of the averaged gradient's bias, ``1 / (1 - mu^t)``.
        noise: :math:`\rho`, see `noise_of`.
    """

    lr: Tensor
    correction: Tensor
    noise: Tensor


def lead(
    numbers: Tensor, squares: Tensor, known: Known, bound: Tensor | None, group: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The numbers to come, and the factors of the steps.

    Args:
        numbers: `NUMBERS` of P parameters, ``[3, P]``.
        squares: of the step u, the averaged gradient m, both without correction of the bias, and
            the gradient, ``[P, 3]``.
        known: of the step.
        bound: of the step's length, ``[P]``; None if there is none.
        group: the settings of all of them, ``lr`` aside.
    """
    length, mean, gradient = squares.to(numbers.dtype).unbind(1)
    energy, weight, rate = numbers.unbind(0)
    mu = group["momentum"]
    if mu and group["adaptation"]:
        finite = gradient.isfinite()  # else it would stay in the average for ever
        energy = torch.where(finite, mu * energy + (1 - mu) * gradient, energy)
        weight = torch.where(finite, mu * weight + (1 - mu), weight)
        average = energy / weight
        signal = (mean * known.correction.square() / average).clamp(max=1)
        grown = (signal - known.noise) / (1 - known.noise) - group.get("margin", 0.0)
        grown = (rate + group["adaptation"] * grown).clamp(max=LARGEST)
        # What stands still agrees.
        moves = finite & (average > 0) & (known.noise < 1) & (known.lr > 0)
        rate = torch.where(moves, grown, rate)
    factor = known.lr * known.correction * rate.exp()
    if bound is not None:
        length = length.sqrt() * known.correction
        factor = torch.where(length > bound, factor * (bound / length), factor)
    return torch.stack([energy, weight, rate]), factor if group["maximize"] else -factor


def known_of(
    steps: Sequence[int], rates: Sequence[float], group: dict[str, Any]
) -> tuple[list[float], list[float], list[float]]:
    r"""What the host knows of the coming step, as the numbers of `Known`.

    Args:
        steps: t of each parameter.
        rates: the learning rate of each.
        group: the settings of all of them.
    """
    mu = group["momentum"]
    alike = {t: (1 / (1 - mu**t), noise_of(mu, t)) for t in set(steps)}
    return [*rates], [alike[t][0] for t in steps], [alike[t][1] for t in steps]


def numbers_of(states: Sequence[dict[str, Any]]) -> Tensor:
    """`NUMBERS` of P parameters, ``[3, P]``."""
    rows = [[state.get(name, 0.0) for state in states] for name in NUMBERS]
    given = [value for row in rows for value in row]
    like = next((value for value in given if isinstance(value, Tensor)), None)
    if like is None:
        return torch.tensor(rows, dtype=torch.float64, device="cpu")
    if not all(isinstance(value, Tensor) for value in given):
        given = [like.new_full((), float(value)) for value in given]
    return torch.stack(given).view(len(NUMBERS), -1)


def put(rows: Sequence[Sequence[float]], like: Tensor) -> tuple[Tensor, ...]:
    """Numbers of the host on a tensor's device, which they reach without anybody waiting."""
    made = torch.tensor(rows, dtype=torch.float64, device="cpu")
    if like.device.type == "cuda":
        made = made.pin_memory().to(like.device, non_blocking=True)
    return made.to(like.device, like.dtype).unbind(0)


def fetch_numbers(states: Sequence[dict[str, Any]]) -> None:
    """Put the numbers that a device holds on the host, all at once."""
    given = [(s, name) for s in states for name in NUMBERS if isinstance(s.get(name), Tensor)]
    if given:
        fetched = torch.stack([state[name] for state, name in given]).tolist()
        for (state, name), value in zip(given, fetched, strict=True):
            state[name] = value


def seen(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state whose numbers the host has, where it may look."""
    state = dict(state)
    if may_look():
        fetch_numbers([state])
    return state


def lead_unseen(
    moves: Sequence[Any],
    group: dict[str, Any],
    lr: float,
    whole: Callable[[list[Tensor], Any], Any],
) -> None:
    """Find how far each parameter goes, on the device: nobody waits for the numbers.

    Args:
        moves: what is known of the parameters, see `curvopt.optim.diag_ggn.Move`.
        group: their settings.
        lr: the learning rate.
        whole: makes sums over parts of tensors those over all of them.
    """
    found, means, weight = [], [], 1 - group["momentum"]
    for move in moves:
        means.append(move.m.lerp(move.grad, weight))
        both = wide(means[-1]), wide(move.grad)
        found.append(torch.stack([square(part) for part in (both[0] * move.inverse, *both)]))
        move.state["step"] += 1
    sums = torch.stack([*whole(found, moves)])
    known = known_of([move.state["step"] for move in moves], [lr] * len(moves), group)
    numbers = numbers_of([move.state for move in moves]).to(sums)
    bound = [group["max_step"] * move.p.numel() ** 0.5 for move in moves]
    rows = put([*known, bound], sums)
    numbers, factors = lead(numbers, sums, Known(*rows[:3]), rows[3], group)
    for index, (move, mean_of) in enumerate(zip(moves, means, strict=True)):
        if group["momentum"] and group["adaptation"]:
            move.state.update(zip(NUMBERS, numbers[:, index].unbind(), strict=True))
        factor = factors[index].to(move.m)
        move.step = mean_of.mul_(move.inverse).mul_(factor).to(move.p.dtype)


def wide(x: Tensor) -> Tensor:
    """The part that is here in double precision, where a device has it: no square overflows."""
    part: Tensor = local(x)
    return part.float() if part.device.type == "mps" else part.double()


def square(x: Tensor) -> Tensor:
    """The squared norm."""
    return torch.linalg.vector_norm(x).square()
