"""Sums of outer products: linear layers, and convolutions on patches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Size, Tensor

from curvopt.looks import may_look
from curvopt.structures.base import BLOCK, SPREAD, Dense, Structure
from curvopt.structures.kronecker import Factors
from curvopt.structures.numerics import (
    cancels,
    scale_smaller,
    squared_norm,
    sum_tensors,
    units,
    widened,
)

# Tokens of which all pairs are contracted, which is cheaper than rows that are formed.
PAIRED = 4


class Outer(Structure):
    """Rows ``sum_t left[v, n, t] (x) right[n, t]``, the gradient of a matrix that acts on tokens.

    For ``y = x W^T`` the left factor is the cotangent of y, the right one is x. With G groups the
    parameter is block diagonal and its blocks are stacked: ``[G * O, I]``.

    Args:
        left: cotangents ``[V, N, G, T, O]``.
        right: inputs ``[N, G, T, I]``.
        shape: the parameter's shape; its elements in order are ``[G, O, I]``.
        transposed: the parameter's elements are ``[G, I, O]`` instead (``y = x W``).
    """

    def __init__(self, left: Tensor, right: Tensor, shape: Size, *, transposed: bool = False):
        self.left, self.right, self.shape, self.transposed = left, right, shape, transposed
        self.columns, self.samples, self.groups, self.tokens, self.outputs = left.shape
        self.inputs = right.shape[-1]

    def rows(self, start: int, stop: int) -> Tensor:
        left, right = self.left[:, start:stop], self.right[start:stop]
        if self.columns == 1:
            product = _products(left[0], right, self.transposed).unsqueeze(0)
        else:
            # Columns are folded into the output axis: a broadcast product would copy the inputs.
            v, o = self.columns, self.outputs
            if left.stride(-1) == 1:
                folded = left.movedim(0, -2).flatten(-2).mT
            else:  # as convolutions have it: tokens last in memory
                folded = left.mT.movedim(0, 2).flatten(2, 3)
            product = (folded @ right).unflatten(2, (v, o)).movedim(2, 0)
            product = product.mT if self.transposed else product
        return product.reshape(*product.shape[:2], *self.shape)

    def take(self, samples: Sequence[int]) -> Structure:
        at = list(samples)
        return self._taken(samples, left=self.left[:, at], right=self.right[at])

    def sum(self, weights: Tensor | None = None) -> Tensor:
        left = self.left.sum(0) if self.columns > 1 else self.left[0]
        right = self.right
        if weights is not None:
            left, right = scale_smaller(left, right, weights)
        return self._contract(left, right)

    def sum_of_squares(self) -> Tensor:
        if self.tokens == 1:
            return self._contract(self._left_energy(), self.right * self.right)
        if self._pairs_up():
            squares, terms = self._paired()
            if (squares >= units(squares, SPREAD) * terms).all():  # False where one is NaN
                return squares
        return super().sum_of_squares()

    def moments(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        if self.columns != 1 or not (self.tokens == 1 or self._pairs_up()):
            return super().moments(scale)
        scaled = self
        if scale != 1:  # the factor is smaller than the product
            scaled = copy(self)
            scaled.left = self.left * scale
        total = scaled.sum()
        return total, scaled.scatter(total)

    def scatter(self, total: Tensor) -> Tensor:
        if self.columns == 1 and self.tokens > 1 and self._pairs_up():
            return self._paired_scatter(total)
        if self.tokens != 1 or self.columns != 1:
            return super().scatter(total)
        scatter, share = self.sum_of_squares(), 1 / max(1, self.samples)
        # Two products tell of every element but those where the rows hardly differ.
        limit = units(total, SPREAD)
        scatter.addcmul_(total, total, value=-share * (1 + limit))
        where = None
        with torch.no_grad():
            if may_look() and scatter.numel() and scatter.amin() < 0:
                where = scatter < 0
        scatter.addcmul_(total, total, value=share * limit)
        if not may_look():  # to some units of the squared sum, where nothing is done again
            scatter.clamp_(min=0)
        if where is not None:
            self._spread_again(scatter, where)
        return scatter

    def _spread_again(self, scatter: Tensor, where: Tensor) -> None:
        """Compute some elements of the scatter from their rows' own elements."""
        left = self.left[0].permute(1, 3, 2, 0).contiguous()  # [G, O, T, N]
        right = self.right.permute(1, 3, 2, 0).contiguous()
        scatter, where = self._matrix(scatter), self._matrix(where)
        size = max(1, BLOCK // max(1, self.samples * self.tokens * self.inputs))
        for outputs in where.any(-1).nonzero().split(size):
            index, i = where[outputs[:, 0], outputs[:, 1]].nonzero(as_tuple=True)
            g, o = outputs[index].unbind(1)
            rows = (left[g, o] * right[g, i]).sum(1)
            scatter[g, o, i] = (rows - rows.mean(-1, keepdim=True)).square().sum(-1)

    def _pairs_up(self) -> bool:
        differentiated = self.left.requires_grad or self.right.requires_grad
        return 1 < self.tokens <= PAIRED and may_look() and not differentiated

    def _paired(self) -> tuple[Tensor, Tensor]:
        """Elementwise `sum_of_squares` as a sum over pairs of tokens, and how large its terms are.

        ``(sum_t a_t)^2 = sum_t a_t^2 + 2 sum_(s < t) a_s a_t``, of terms below ``T sum_t a_t^2``.
        """
        s, t = torch.triu_indices(self.tokens, self.tokens, 1, device=self.left.device)
        left, right = self.left, self.right
        own = self._contract(self._left_energy(), right * right)
        across = (left[..., s, :] * left[..., t, :]).sum(0)
        across = self._contract(across, right[..., s, :] * right[..., t, :])
        return own.add(across, alpha=2), own.mul_(self.tokens)

    def _paired_scatter(self, total: Tensor) -> Tensor:
        scatter, terms = self._paired()
        scatter.addcmul_(total, total, value=-1 / max(1, self.samples))
        doubt = ~(scatter >= units(total, SPREAD) * terms)
        number = int(doubt.sum())
        if number > doubt.numel() // 8:
            return super().moments()[1]
        if number:
            self._spread_again(scatter, doubt)
        return scatter

    def batch_sum_of_squares(self) -> Tensor:
        if self.tokens != 1:
            return super().batch_sum_of_squares()
        energy = self._left_energy().unsqueeze(0)
        return Outer(energy, self.right.square(), self.shape, transposed=self.transposed).form()[0]

    def cross(self, other: Structure, batch: bool = False) -> Tensor:
        if self.tokens != 1 or not isinstance(other, Outer):
            return super().cross(other, batch)
        energy = (self.left * other.left).sum(0)
        right = self.right * other.right
        if batch:
            return Outer(energy[None], right, self.shape, transposed=self.transposed).form()[0]
        return self._contract(energy, right)

    def gauge(self) -> tuple[Tensor, Tensor | None]:
        if self.tokens == 1:
            return (squared_norm(self.left, 3) * squared_norm(self.right, 2)).sum(-1), None
        t, o, i = self.tokens, self.outputs, self.inputs
        # Gram matrices of the tokens, 2 T^2 (O + I) flops, or the formed rows, 2 T O I.
        if t * (o + i) >= o * i:
            return super().gauge()
        return gram_norms(self.left, self.right @ self.right.mT)

    def reach(self) -> Tensor | None:
        if self.tokens == 1:
            return None
        norm = torch.linalg.vector_norm
        return (norm(self.left.detach(), dim=-1) * norm(self.right.detach(), dim=-1)).sum((-2, -1))

    def wide(self, samples: Sequence[int]) -> Tensor:
        at = list(samples)
        left, right = widened(self.left[:, at]), widened(self.right[at])
        return self._taken(at, left=left, right=right).form()

    def settled(self) -> Structure:
        t, o, i = self.tokens, self.outputs, self.inputs
        return Dense(self.form()) if t > 1 and t * (o + i) >= o * i else self

    def rank_one(self, a: Tensor, b: Tensor) -> Tensor:
        rows = self.inputs if self.transposed else self.outputs
        if len(a) != self.groups * rows:  # the first axis of the parameter is none of the matrix
            return super().rank_one(a, b)
        left = self.left.sum(0) if self.columns > 1 else self.left[0]
        along, across = (b, a) if self.transposed else (a, b)
        return torch.sum(self._along(left, along) * self._along(self.right, across))

    def _along(self, factor: Tensor, vector: Tensor) -> Tensor:
        """A factor's inner products with a vector, or each group's with its part: [N, G, T]."""
        if len(vector) == factor.shape[-1]:
            return factor @ vector
        return (factor @ vector.view(self.groups, -1, 1)).squeeze(-1)

    def dots(self, direction: Tensor) -> Tensor:
        matrix = self._matrix(direction)
        if self.outputs <= self.inputs:
            return torch.einsum("vngto,ngto->vn", self.left, self.right @ matrix.mT)
        return torch.einsum("vngti,ngti->vn", self.left @ matrix, self.right)

    def weighted(self, weights: Tensor) -> Tensor:
        return self._contract(torch.einsum("vn,vngto->ngto", weights, self.left), self.right)

    def gram(self, other: Structure) -> Tensor:
        t, o, i = self.tokens, self.outputs, self.inputs
        if not isinstance(other, Outer) or (t > 1 and t * (o + i) >= o * i):
            return super().gram(other)
        return sum_tensors([self._group_gram(other, g) for g in range(self.groups)])

    def _group_gram(self, other: Outer, group: int) -> Tensor:
        """``sum_ts <left_vnt, left_ums> <right_nt, right_ms>``, two columns at a time."""
        right = torch.tensordot(self.right[:, group], other.right[:, group], dims=([2], [2]))

        def pair(one: Tensor, their: Tensor) -> Tensor:
            return torch.tensordot(one, their, dims=([2], [2])).mul(right).sum((1, 3))

        theirs = other.left[:, :, group]
        return torch.stack(
            [torch.stack([pair(one, v) for v in theirs], 1) for one in self.left[:, :, group]]
        )

    def kronecker(
        self, *, reduce: bool = False, bias: bool = False, inputs: bool = True
    ) -> Factors:
        """As in `Structure.kronecker`: inputs are averaged over samples, cotangents summed.

        Tokens taken for samples are summed in the inputs' factor and averaged in the other.
        """
        left, right = self.left, self.right
        if bias:
            right = torch.cat([right, right.new_ones(*right.shape[:-1], 1)], -1)
        if reduce:
            left, right = left.sum(-2, keepdim=True), right.mean(-2, keepdim=True)
        right = (right if inputs else right[:0]).transpose(0, 1).flatten(1, 2)
        left = left.movedim(2, 0).flatten(1, 3)
        ours = right.mT @ right / max(1, self.samples)
        theirs = left.mT @ left / (1 if reduce else max(1, self.tokens))
        if self.groups == 1:
            ours, theirs = ours[0], theirs[0]
        pair = (ours, theirs) if self.transposed else (theirs, ours)
        return Factors(pair, outputs=int(self.transposed))

    def _matrix(self, value: Tensor) -> Tensor:
        o, i = self.outputs, self.inputs
        if self.transposed:
            return value.reshape(self.groups, i, o).mT
        return value.reshape(self.groups, o, i)

    def _left_energy(self) -> Tensor:
        if self.columns == 1:
            return self.left[0] * self.left[0]
        return self.left.square().sum(0)

    def _contract(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum of the outer products over samples and tokens, in the parameter's shape."""
        if self.groups == 1:
            left, right = left.flatten(0, 2), right.flatten(0, 2)
        else:
            left = left.transpose(0, 1).flatten(1, 2)
            right = right.transpose(0, 1).flatten(1, 2)
        return _products(left, right, self.transposed).reshape(self.shape)


def gram_norms(left: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of sums of outer products, as `Structure.gauge` gives them.

    Args:
        left: ``[V, N, G, T, O]``.
        gram: inner products of the right factors, ``[N, G, T, T]``.
    """
    squares, absolute, axes = [], [], (-3, -2, -1)
    for factor in left:
        products = (factor @ factor.mT).mul(gram)
        squares.append(products.sum(axes))
        absolute.append(torch.linalg.vector_norm(products.detach(), 1, axes))
    total = torch.stack(squares)
    return total, cancels(total, torch.stack(absolute))


def _products(left: Tensor, right: Tensor, transposed: bool) -> Tensor:
    return right.mT @ left if transposed else left.mT @ right
