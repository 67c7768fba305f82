"""Convolutions: one weight gradient per sample, by the cheaper of two contractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from curvopt.structures.base import BLOCK, Structure
from curvopt.structures.formed import Formed
from curvopt.structures.kronecker import Factors
from curvopt.structures.numerics import scale_smaller, sum_tensors, widened
from curvopt.structures.outer import Outer, gram_norms

# Input channels (of images) up to which convolution kernels with a group per sample are slow,
# unless they have so many groups at once, and so many elements of patches in each.
FEW_CHANNELS, MANY_GROUPS, LARGE = 4, 16, 1 << 14


class Conv(Structure):
    """Rows are the weight gradients of a convolution, one per cotangent column and sample.

    They are formed either as *one* weight gradient of a grouped convolution, a group per sample,
    or as outer products of cotangents and patches (`Outer`).

    Args:
        cotangent: ``[V, N, K, O, *outputs]``.
        input: ``[N, K, C, *inputs]``.
        shape: the weight's shape, ``[O, C / groups, *kernel]``.
        stride: one number per spatial axis.
        padding: one number per spatial axis, on both sides.
        dilation: one number per spatial axis.
        groups: number of groups.
    """

    def __init__(
        self,
        cotangent: Tensor,
        input: Tensor,
        shape: Size,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ):
        self.cotangent, self.input, self.shape = cotangent, input, shape
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups = groups
        self.columns, self.samples = cotangent.shape[:2]
        self.positions = math.prod(cotangent.shape[4:]) * cotangent.shape[2]

    def patches(self, start: int = 0, stop: int | None = None) -> Outer:
        """The same structure as outer products of cotangents and patches."""
        cotangent, input = self.cotangent[:, start:stop], self.input[start:stop]
        left = cotangent.unflatten(3, (self.groups, -1)).flatten(5)  # [V, N, K, G, O/G, T]
        left = left.movedim(2, 4).flatten(4, 5).mT if left.shape[2] > 1 else left.squeeze(2).mT
        return Outer(left, self._unfolded(input), self.shape)

    def _unfolded(self, input: Tensor) -> Tensor:
        """Patches ``[N, G, K * positions, C/G * kernel]``."""
        kernel = self.shape[2:]
        n, k = input.shape[:2]
        windows = self._padded(input).flatten(0, 1)
        for axis, size in enumerate(kernel):
            reach = (size - 1) * self.dilation[axis] + 1
            windows = windows.unfold(axis + 2, reach, self.stride[axis])
            windows = windows[..., :: self.dilation[axis]]
        spatial = len(kernel)
        order = [0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial)]
        # One strided copy: several times as fast as torch.nn.functional.unfold.
        columns = windows.permute(order).reshape(n, k, self.groups, self.shape[1:].numel(), -1)
        return columns.movedim(1, 3).flatten(3).mT if k > 1 else columns.squeeze(1).mT

    def _padded(self, input: Tensor) -> Tensor:
        sides = [size for pad in reversed(self.padding) for size in (pad, pad)]
        return F.pad(input, sides) if any(sides) else input

    def block(self) -> int:
        if not self.by_patches:
            return super().block()
        # Patches fit the cache as well as the rows formed from them.
        patches = self.positions * self.groups * self.shape[1:].numel()
        return min(super().block(), max(1, BLOCK // max(1, patches)))

    @property
    def by_patches(self) -> bool:
        """Many columns share the patches; of small maps and few channels they are cheap."""
        few = self.groups == 1 and self.shape[1] <= FEW_CHANNELS
        large = self.positions * self.shape[1:].numel() >= LARGE
        few = few and not (large and min(self.samples, super().block()) >= MANY_GROUPS)
        return self.columns > 2 or self.positions <= 64 or few

    def rows(self, start: int, stop: int) -> Tensor:
        if self.by_patches:
            return self.patches(start, stop).form()
        cotangent, input = self.cotangent[:, start:stop], self.input[start:stop]
        n, k = input.shape[:2]
        v, g = self.columns, self.groups
        # One group per sample (and per group of the convolution), all columns' outputs in it.
        outputs = cotangent.unflatten(3, (g, -1)).movedim(0, 3).flatten(3, 4)
        outputs = outputs.reshape(1, -1, *outputs.shape[4:])
        inputs = input.reshape(1, -1, *input.shape[3:])
        grad = self._weight_gradient(outputs, inputs, n * k * g)
        grad = grad.view(n, k, g, v, -1, *self.shape[1:]).movedim(3, 0).flatten(3, 4)
        return grad.sum(2) if k > 1 else grad.squeeze(2)

    def form(self) -> Tensor:
        return self._collected((rows for _, _, rows in self.blocks()), 1)

    def take(self, samples: Sequence[int]) -> Structure:
        at = list(samples)
        return self._taken(samples, cotangent=self.cotangent[:, at], input=self.input[at])

    def sum(self, weights: Tensor | None = None) -> Tensor:
        cotangent = self.cotangent.sum(0) if self.columns > 1 else self.cotangent[0]
        input = self.input
        if weights is not None:
            cotangent, input = scale_smaller(cotangent, input, weights)
        return self._weight_gradient(cotangent.flatten(0, 1), input.flatten(0, 1), self.groups)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        t, (o, i) = self.positions, (self.shape[0] // self.groups, self.shape[1:].numel())
        # Gram matrices of the positions, 2 T^2 (O + I) flops, or the formed rows, 2 T O I.
        if t * (o + i) >= o * i:
            return super().gauge()
        sizes = zip(self.input.shape[3:], self.padding, strict=True)
        pixels = math.prod(size + 2 * padding for size, padding in sizes)
        dear = pixels**2 > t**2 * self.shape[2:].numel()
        if self.groups > 1 or self.input.shape[1] > 1 or dear:
            return self.patches().gauge()
        return gram_norms(self.cotangent.flatten(4).mT, self._patch_gram())

    def _patch_gram(self) -> Tensor:
        """Inner products of the patches of a sample, ``[N, 1, T, T]``, from those of its pixels."""
        pixels = self._padded(self.input)
        sizes, flat = pixels.shape[3:], pixels.flatten(3)
        products = (flat.mT @ flat).view(-1, *sizes, *sizes)
        parts = []
        for offset in itertools.product(*map(range, self.shape[2:])):
            part = products
            for axis, at in enumerate(offset):
                stride, first = self.stride[axis], at * self.dilation[axis]
                last = first + (self.cotangent.shape[4 + axis] - 1) * stride
                for side in (axis, axis + len(sizes)):
                    part = part.narrow(side + 1, first, last - first + 1)
                    part = part[(*[slice(None)] * (side + 1), slice(None, None, stride))]
            parts.append(part)
        return sum_tensors(parts).reshape(-1, 1, self.positions, self.positions)

    def reach(self) -> Tensor:
        # By Cauchy and Schwarz; an element is in as many patches as the kernel is large, at most.
        left, right = self.cotangent.detach().flatten(2), self.input.detach().flatten(1)
        norm = torch.linalg.vector_norm
        return norm(left, dim=-1) * norm(right, dim=-1) * self.shape[2:].numel() ** 0.5

    def wide(self, samples: Sequence[int]) -> Tensor:
        at = list(samples)
        cotangent, input = widened(self.cotangent[:, at]), widened(self.input[at])
        return self._taken(at, cotangent=cotangent, input=input).form()

    def weighted(self, weights: Tensor) -> Tensor:
        cotangent = torch.einsum("vn,vn...->n...", weights, self.cotangent)
        return self._weight_gradient(cotangent.flatten(0, 1), self.input.flatten(0, 1), self.groups)

    def gram(self, other: Structure) -> Tensor:
        t, (o, i) = self.positions, (self.shape[0] // self.groups, self.shape[1:].numel())
        if t * (o + i) < o * i and isinstance(other, Conv):
            return self.patches().gram(other.patches())
        return super().gram(other)

    def kronecker(
        self, *, reduce: bool = False, bias: bool = False, inputs: bool = True
    ) -> Factors:
        if reduce or bias or self.groups > 1:
            return self.patches().kronecker(reduce=reduce, bias=bias, inputs=inputs)
        cotangent = self.cotangent.flatten(0, 2).flatten(2)
        outputs = _gram(cotangent) / max(1, self.positions)
        if not inputs:
            return Factors((outputs, outputs.new_empty(0)))
        patches = self._unfolded(self.input)[:, 0]
        return Factors((outputs, _gram(patches.mT) / max(1, self.samples)))

    def settled(self) -> Structure:
        t, (o, i) = self.positions, (self.shape[0] // self.groups, self.shape[1:].numel())
        kept = self.cotangent.numel() + self.input.numel()
        small = self.columns * self.samples * self.shape.numel() <= 4 * kept
        if not small or t * (o + i) < o * i:
            return self
        return Formed(self)

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        if self.groups > 1:
            return super().rank_one(a, b)
        output = self._convolved(b.view(1, *self.shape[1:]))
        cotangent = self.cotangent.sum(0) if self.columns > 1 else self.cotangent[0]
        return torch.einsum("o,nkop,nkp->", a, cotangent.flatten(3), output.flatten(2))

    def dots(self, direction: Tensor) -> Tensor:
        # <row, d> is the cotangent's product with the convolution of the input by d.
        return (self.cotangent * self._convolved(direction)).flatten(2).sum(-1)

    def _convolved(self, kernel: Tensor) -> Tensor:
        output = torch.convolution(
            self.input.flatten(0, 1),
            kernel,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
        )
        return output.unflatten(0, self.input.shape[:2])

    def _weight_gradient(self, cotangent: Tensor, input: Tensor, groups: int) -> Tensor:
        shape = (cotangent.shape[1], input.shape[1] // groups, *self.shape[2:])
        weight = cotangent.new_empty(1).expand(shape)  # only its shape is read
        _, grad, _ = torch.ops.aten.convolution_backward(
            cotangent,
            input,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            groups,
            (False, True, False),
        )
        return grad


def _gram(rows: Tensor) -> Tensor:
    """``sum_b rows_b rows_b^T`` of ``[B, D, T]``, without a copy of the rows."""
    size = rows.shape[1]
    return torch.addbmm(rows.new_zeros(size, size), rows, rows.mT)
