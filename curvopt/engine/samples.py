"""The sample axis: where a tensor keeps its N samples, and how to bring them to the front.

Canonical layout everywhere in the package: ``[V, N, K, *rest]`` for cotangents and
``[N, K, *rest]`` for data, with V cotangent columns, N samples and K rows per sample (1 for an
ordinary layer, the number of tokens where the model flattened them into the batch axis or put time
first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the leading axes of a tensor hold N samples.

    Attributes:
        kind: ``"batch"`` (axis 0 is N * K rows, a sample's rows together), ``"time"`` (axis 0 is
            K, axis 1 is N), or ``"time-flat"`` (axis 0 is K * N rows, a time step's rows together).
        n: number of samples N.
        k: rows per sample K.
    """

    kind: str
    n: int
    k: int

    def split(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Return ``tensor`` as ``[*lead axes, N, K, *rest]`` (a view)."""
        if self.kind == "time":
            return tensor.transpose(lead, lead + 1)
        if self.kind == "batch":
            if self.k == 1:
                return tensor.unsqueeze(lead + 1)
            return tensor.unflatten(lead, (self.n, self.k))
        return tensor.unflatten(lead, (self.k, self.n)).transpose(lead, lead + 1)

    def merge(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Inverse of `split`."""
        if self.kind == "time":
            return tensor.transpose(lead, lead + 1)
        if self.kind == "time-flat":
            tensor = tensor.transpose(lead, lead + 1)
        return tensor.squeeze(lead + 1) if self.k == 1 else tensor.flatten(lead, lead + 1)


def layouts(shape: tuple[int, ...], n: int) -> Iterator[Layout]:
    """Yield the ways in which a tensor of this shape can hold ``n`` samples, likeliest first."""
    if not shape or n < 0:
        return
    if n == 1:
        yield Layout("batch", 1, shape[0])
        return
    if shape[0] == n:
        yield Layout("batch", n, 1)
    if len(shape) > 1 and shape[1] == n:
        yield Layout("time", n, shape[0])
    if n and shape[0] != n and shape[0] % n == 0:
        yield Layout("batch", n, shape[0] // n)
        yield Layout("time-flat", n, shape[0] // n)


def sample_counts(
    first_use: tuple[int, ...], rows: tuple[int, ...], hint: int | None = None
) -> list[int]:
    """Numbers of samples that agree with the first recorded use and the loss, likeliest first.

    Equal leading sizes settle it. Otherwise the loss may have several rows per sample (a language
    model's flattened tokens), the op several (patches), or the model may work time first.

    Args:
        first_use: shape of the first recorded op's output.
        rows: shape of the loss's first argument.
        hint: leading size of the first data that the model met.
    """
    if not first_use or not rows:
        return []
    first, loss_rows = first_use[0], rows[0]
    hint = first if hint is None else hint
    if first == loss_rows == hint:
        return [first]
    agrees = all(next(layouts(shape, hint), None) for shape in (first_use, rows))
    counts = [hint] if agrees else []
    if first and loss_rows % first == 0:
        counts.append(first)
    if next(layouts(first_use, loss_rows), None) is not None:
        counts.append(loss_rows)
    if len(first_use) > 2 and first_use[1] and loss_rows % first_use[1] == 0:
        counts.append(first_use[1])
    return list(dict.fromkeys(counts))
