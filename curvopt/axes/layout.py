"""Where a tensor keeps its N samples, and how to bring them to the front.

Canonical layout everywhere in the package: ``[V, N, K, *rest]`` for cotangents and
``[N, K, *rest]`` for data, with V cotangent columns, N samples and K rows per sample (1 for an
ordinary layer, the number of tokens where the model flattened them into the batch axis or put time
first).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvopt.axes.lattice import MIXED, squash


@dataclass(frozen=True, eq=False)
class Layout:
    """How the leading axes of a tensor hold N samples.

    Attributes:
        kind: ``"batch"`` (axis 0 is N * K rows, a sample's rows together), ``"time"`` (axis 0 is
            K, axis 1 is N), ``"time-flat"`` (axis 0 is K * N rows, a time step's rows together),
            or ``"gather"`` (rows anywhere, any number of a sample's: experts, ragged rows, parts
            of a batch).
        n: number of samples N.
        k: rows per sample K, the largest number where they differ.
        owners: ``"gather"`` alone: the sample of each row of the flattened leading axes.
        axes: how many leading axes hold the rows; 0 for a number that is one sample's.
    """

    kind: str
    n: int
    k: int
    owners: Tensor | None = None
    axes: int = 1

    def split(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """Return ``tensor`` as ``[*lead axes, N, K, *rest]``: a view, unless rows are gathered.

        Where a sample has fewer than K rows, the others are zero.
        """
        if self.kind == "time":
            return tensor.transpose(lead, lead + 1)
        if self.kind == "batch":
            if self.k == 1:
                return tensor.unsqueeze(lead + 1)
            return tensor.unflatten(lead, (self.n, self.k))
        if self.kind == "gather":
            return self._gathered(tensor, lead)
        return tensor.unflatten(lead, (self.k, self.n)).transpose(lead, lead + 1)

    def merge(self, tensor: Tensor, lead: int = 0, shape: torch.Size | None = None) -> Tensor:
        """Inverse of `split`.

        Args:
            tensor: ``[*lead axes, N, K, *rest]``.
            lead: number of axes in front.
            shape: of the merged leading axes, where rows lie on several; one axis by default.
        """
        if self.kind == "time":
            return tensor.transpose(lead, lead + 1)
        if self.kind == "gather":
            return self._scattered(tensor, lead, shape)
        if self.kind == "time-flat":
            tensor = tensor.transpose(lead, lead + 1)
        return tensor.squeeze(lead + 1) if self.k == 1 else tensor.flatten(lead, lead + 1)

    @cached_property
    def table(self) -> Tensor:
        """Row numbers by sample, ``[N, K]``; -1 where a sample has no more rows."""
        assert self.owners is not None
        owners = self.owners
        order = torch.argsort(owners, stable=True)
        counts = torch.bincount(owners[order], minlength=self.n)
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(order), device=owners.device) - starts[owners[order]]
        table = owners.new_full((self.n, self.k), -1, dtype=torch.int64)
        table[owners[order].long(), places] = order
        return table

    def _gathered(self, tensor: Tensor, lead: int) -> Tensor:
        flat = tensor.flatten(lead, lead + self.axes - 1) if self.axes > 1 else tensor
        flat = flat if self.axes else flat.unsqueeze(lead)
        table = self.table.to(tensor.device)
        rows = flat.index_select(lead, table.clamp(min=0).flatten())
        rows = rows.unflatten(lead, (self.n, self.k))
        if self.full:
            return rows
        kept = (table >= 0).view(self.n, self.k, *[1] * (rows.ndim - lead - 2))
        return torch.where(kept, rows, 0)

    def _scattered(self, tensor: Tensor, lead: int, shape: torch.Size | None) -> Tensor:
        assert self.owners is not None
        table = self.table.to(tensor.device).flatten()
        flat = tensor.flatten(lead, lead + 1)
        some = table >= 0
        if not self.full:
            flat, table = flat.movedim(lead, 0)[some].movedim(0, lead), table[some]
        size = list(flat.shape)
        size[lead] = len(self.owners)
        merged = flat.new_zeros(size).index_copy(lead, table, flat)
        if not self.axes:
            return merged.squeeze(lead)
        return merged.unflatten(lead, shape) if shape is not None and len(shape) > 1 else merged

    @cached_property
    def present(self) -> int:
        """How many samples have rows at all."""
        return self.n if self.owners is None else len(self.owners.unique())

    def share(self, like: Tensor) -> float | Tensor:
        """Each sample's share of a mean over all rows: a number, or ``[N]`` where they differ."""
        if self.owners is None:
            return 1.0 / max(1, self.n)
        counts = torch.bincount(self.owners, minlength=self.n)
        if int(counts.max()) * self.present == len(self.owners):
            return 1.0 / self.present
        return (counts / len(self.owners)).to(like)

    @cached_property
    def full(self) -> bool:
        """Whether every sample has K rows."""
        return bool((self.table >= 0).all())


def owned(owners: Tensor, shape: tuple[int, ...], n: int) -> Layout | None:
    """The layout of a tensor whose elements have these owners; None if samples mix in it.

    Args:
        owners: broadcasts against the tensor; an axis of size 1 where the owner is constant.
        shape: the tensor's shape.
        n: number of samples.
    """
    owners = squash(owners)
    along = [axis for axis, size in enumerate(owners.shape) if size != 1]
    if n == 0:
        return Layout("batch", 0, 1)
    if n == 1 and shape:  # all there is belongs to it
        return Layout("batch", 1, shape[0])
    if not shape or 0 in shape or bool(((owners == MIXED) | (owners < 0)).any()):
        return None
    axes = 1 + (along[-1] if along else 0)
    if along == [1] and shape[1] == n and _counts_up(owners.flatten(), n, 1):
        return Layout("time", n, shape[0], axes=2)
    leading = owners.expand(*shape[:axes], *owners.shape[axes:]).reshape(-1)
    rows = len(leading)
    if axes == 1 and rows % n == 0:
        if _counts_up(leading, n, rows // n):
            return Layout("batch", n, rows // n)
        if torch.equal(
            leading.view(-1, n), torch.arange(n, device="cpu").to(leading).expand(rows // n, n)
        ):
            return Layout("time-flat", n, rows // n)
    counts = torch.bincount(leading, minlength=n)
    return Layout("gather", n, int(counts.max()), leading, axes)


def single(owners: Tensor, n: int) -> Layout | None:
    """The layout of a number; None if it depends on several samples."""
    owner = owners.reshape(1)
    return None if int(owner) in (MIXED, -1) else Layout("gather", n, 1, owner, 0)


def _counts_up(owners: Tensor, n: int, k: int) -> bool:
    """Whether each of n samples has k rows, one after the other."""
    return torch.equal(
        owners.view(n, k), torch.arange(n, device="cpu").to(owners)[:, None].expand(n, k)
    )
