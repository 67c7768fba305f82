"""Tables that samples look rows up in: embeddings, bags of them, indexing with a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from curvopt.engine.evidence import has_data, indexes_samples, looks_up_samples
from curvopt.engine.registry import rule
from curvopt.errors import CurvoptError, Uncovered
from curvopt.structures import Lookup

if TYPE_CHECKING:
    from curvopt.engine.registry import Applies, Arguments
    from curvopt.engine.tape import Tape, UseView


def _plain(applies: Applies) -> Applies:
    """Refuse options under which a row's gradient is no sum over its lookups."""
    advice = {
        "max_norm": "rescales the table in place during the forward pass; rescale it after a step",
        "scale_grad_by_freq": "divides by counts over the batch, so that no sample has a gradient "
        "of its own; leave it out",
        "sparse": "asks for sparse gradients, and curvopt's are dense; leave it out",
    }

    def checked(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
        for option, reason in advice.items():
            if arguments[option]:
                shape = list(arguments["weight"].shape)
                raise CurvoptError(
                    f"an embedding {shape} with {option}={arguments[option]}: it {reason}"
                )
        return applies(tape, arguments, all_shared)

    return checked


def owners(use: UseView) -> Tensor:
    """The sample of every element of the output's leading axes: ``[N * K]`` or ``[K, N]``."""
    n, k = use.layout.n, use.layout.k
    return use.layout.merge(torch.arange(n, device=use.raw.device).unsqueeze(1).expand(n, k))


def lookup(use: UseView, table: Tensor, indices: Tensor, padding: int | None = None) -> Lookup:
    """Structure of a table whose rows at the indices are the output."""
    owner = owners(use)
    owner = owner.view(*owner.shape, *[1] * (indices.ndim - owner.ndim)).expand(indices.shape)
    values = use.raw.reshape(len(use.raw), indices.numel(), -1)
    return flat_lookup(use, table, values, owner.reshape(-1), indices.reshape(-1), padding)


def flat_lookup(
    use: UseView,
    table: Tensor,
    values: Tensor,
    samples: Tensor,
    indices: Tensor,
    padding: int | None,
) -> Lookup:
    """`Lookup` with negative indices counted from the end, and without those that are padding."""
    size = len(table)
    indices = indices.long().remainder(size) if size else indices.long()
    if padding is not None:
        kept = indices != padding % size
        values, samples, indices = values[:, kept], samples[kept], indices[kept]
    return Lookup(values, samples, indices, use.layout.n, table.shape)


@rule(F.embedding, parameters="weight", applies=_plain(looks_up_samples))
def embedding(
    use: UseView, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
    sparse: bool = False,
):  # fmt: skip
    """``weight[input]``; lookups of ``padding_idx`` have no gradient."""
    return {"weight": lookup(use, weight, input, padding_idx)}


@rule(F.embedding_bag, parameters="weight", applies=_plain(has_data))
def embedding_bag(
    use: UseView, input: Tensor, weight: Tensor, offsets: Tensor | None = None,
    max_norm: float | None = None, norm_type: float = 2, scale_grad_by_freq: bool = False,
    mode: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
):  # fmt: skip
    """Weighted sum or mean of the rows of every bag; a bag is a sample."""
    if mode == "max":
        raise Uncovered("embedding_bag with mode='max'")
    bags = use.raw.shape[1]
    indices = input.reshape(-1)
    if offsets is None:
        bag = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    else:
        starts = offsets[:bags]
        positions = torch.arange(len(indices), device=input.device)
        bag = torch.searchsorted(starts.long(), positions, right=True) - 1
    values = use.raw[:, bag]
    if per_sample_weights is not None:
        values = values * per_sample_weights.reshape(-1, 1)
    if mode == "mean":
        counted = torch.ones_like(bag) if padding_idx is None else (indices != padding_idx).long()
        sizes = bag.new_zeros(bags).index_add(0, bag, counted)
        values = values / sizes[bag].clamp(min=1).unsqueeze(-1)
    return {"weight": flat_lookup(use, weight, values, owners(use)[bag], indices, padding_idx)}


@rule(
    Tensor.__getitem__,
    parameters="input",
    applies=indexes_samples,
)
def getitem(use: UseView, input: Tensor, index: Tensor):
    """``input[index]`` with one tensor of indices."""
    return {"input": lookup(use, input, index)}


def _selects_rows(tape: Tape, arguments: Arguments, all_shared: bool) -> bool:
    return arguments["dim"] in (0, -arguments["input"].ndim) and indexes_samples(
        tape, arguments, all_shared
    )


@rule(torch.index_select, Tensor.index_select, parameters="input", applies=_selects_rows)
def index_select(use: UseView, input: Tensor, dim: int, index: Tensor):
    """``input[index]``."""
    return {"input": lookup(use, input, index)}
