"""Tables that samples look rows up in: embeddings, bags of them, indexing with a tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from curvopt.errors import CurvoptError, Uncovered
from curvopt.ops.registry import Arguments, rule
from curvopt.ops.use import UseView
from curvopt.structures import Lookup, Structure


def _plain(arguments: Arguments) -> bool:
    """Refuse options under which a row's gradient is no sum over its lookups."""
    advice = {
        "max_norm": "rescales the table in place during the forward pass; rescale it after a step",
        "scale_grad_by_freq": "divides by counts over the batch, so that no sample has a gradient "
        "of its own; leave it out",
        "sparse": "asks for sparse gradients, and curvopt's are dense; leave it out",
    }
    for option, reason in advice.items():
        if arguments[option]:
            shape = list(arguments["weight"].shape)
            raise CurvoptError(
                f"an embedding {shape} with {option}={arguments[option]}: it {reason}"
            )
    return True


def _integers(arguments: Arguments) -> bool:
    """One tensor of indices, no mask."""
    index = arguments["index"]
    return isinstance(index, Tensor) and index.dtype != torch.bool


def _of_rows(arguments: Arguments) -> bool:
    return arguments["dim"] in (0, -arguments["input"].ndim)


def lookup(values: Tensor, indices: Tensor, table: Tensor) -> Lookup:
    """Structure of a table.

    Args:
        values: cotangents of the table rows that were looked up, ``[V, N, K, *lookups, *rest]``.
        indices: of the table rows, ``[N, K, *lookups]``; negative ones count from the end.
        table: the table, ``[R, *rest]``.
    """
    v, n, width = len(values), len(indices), table.shape[1:].numel()
    count = indices.shape[1:].numel()
    indices = indices.long().remainder(max(1, len(table)))
    return Lookup(values.reshape(v, n, count, width), indices.reshape(n, count), table.shape)


@rule(F.embedding, parameters="weight", fits=_plain)
def embedding(
    use: UseView, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Structure]:  # fmt: skip
    """``weight[input]``; lookups of ``padding_idx`` have no gradient."""
    values, indices = use.cotangent, use.rows(input)
    if padding_idx is not None:
        values = values * (indices != padding_idx % len(weight)).unsqueeze(-1)
    return {"weight": lookup(values, indices, weight)}


@rule(F.embedding_bag, parameters="weight", fits=_plain)
def embedding_bag(
    use: UseView, input: Tensor, weight: Tensor, offsets: Tensor | None = None,
    max_norm: float | None = None, norm_type: float = 2, scale_grad_by_freq: bool = False,
    mode: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> dict[str, Structure]:  # fmt: skip
    """Weighted sum or mean of the rows of every bag; a bag is a sample."""
    if mode == "max":
        raise Uncovered("embedding_bag with mode='max'")
    factors = torch.ones_like(input, dtype=use.dtype)
    if per_sample_weights is not None:
        factors = per_sample_weights.to(use.dtype)
    if offsets is not None:
        input, factors = _in_rows(input, factors, offsets[: use.raw.shape[1]])
    if padding_idx is not None:
        factors = factors * (input != padding_idx % len(weight))
    if mode == "mean":
        factors = factors / factors.sum(1, keepdim=True).clamp(min=1)
    values = use.cotangent.unsqueeze(-2) * use.rows(factors).unsqueeze(-1)
    return {"weight": lookup(values, use.rows(input), weight)}


def _in_rows(indices: Tensor, factors: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Bags one after the other as rows of a matrix, filled up with lookups of factor zero."""
    positions = torch.arange(len(indices), device=indices.device)
    bags = torch.searchsorted(starts.long(), positions, right=True) - 1
    places = positions - starts[bags]
    shape = len(starts), int(places.max()) + 1 if len(places) else 0
    where = (bags, places)
    return (
        indices.new_zeros(shape).index_put(where, indices),
        factors.new_zeros(shape).index_put(where, factors),
    )


@rule(
    Tensor.__getitem__,
    parameters="input",
    fits=_integers,
)
def getitem(use: UseView, input: Tensor, index: Tensor) -> dict[str, Structure]:
    """``input[index]`` with one tensor of indices."""
    return {"input": lookup(use.cotangent, use.rows(index), input)}


@rule(torch.index_select, Tensor.index_select, parameters="input", fits=_of_rows)
def index_select(use: UseView, input: Tensor, dim: int, index: Tensor) -> dict[str, Structure]:
    """``input[index]``."""
    return {"input": lookup(use.cotangent, use.rows(index), input)}
