"""The loss of a batch without the samples that only fill it up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvopt.axes.layout import Layout
from curvopt.compiled.tracing import Unsuited
from curvopt.engine.computation import Computation
from curvopt.losses import Loss
from curvopt.losses.cross_entropy import CrossEntropy, Likelihood
from curvopt.losses.handwritten import Reduction


def loss_without(computation: Computation, kept: Tensor) -> Tensor:
    """The loss that the samples that count would have without the others.

    It is linear in its terms, so that it changes as they do: by their derivatives.

    Args:
        computation: of the loss of all samples.
        kept: ``[N]``, which of them count.

    Raises:
        Unsuited: it is not known how a term would change.
    """
    loss = computation.loss.detach()
    for term, layout, up in zip(
        computation.terms, computation.term_layouts, computation.upstream, strict=True
    ):
        if layout is None or len(kept) != computation.samples:
            raise Unsuited("a batch of another size is not known to be the same loss")
        loss = loss + up * (_mean_of(term, layout, kept) - term.value.detach())
    return loss


def _mean_of(term: Loss, layout: Layout, kept: Tensor) -> Tensor:
    """A mean over the samples that count alone."""
    if term.reduction != "mean":
        raise Unsuited(
            "the loss is no mean over the samples, so that batches cannot be filled up to few sizes"
        )
    output = term.output.detach()
    if type(term) is Reduction:
        rows, weights = output, torch.ones_like(output)
    elif isinstance(term, CrossEntropy) and type(term) in (CrossEntropy, Likelihood):
        options: dict[str, Any] = {"weight": term.weight, "reduction": "none"}
        if type(term) is Likelihood:
            rows = F.nll_loss(output, term.target, ignore_index=term.ignore_index, **options)
        elif term.probabilities_given:
            rows = F.cross_entropy(output, term.target, label_smoothing=term.smoothing, **options)
        else:
            rows = F.cross_entropy(
                output, term.target, ignore_index=term.ignore_index,
                label_smoothing=term.smoothing, **options,
            )  # fmt: skip
        weights = torch.ones_like(rows) if term.probabilities_given else term.label_weights
    else:
        raise Unsuited(f"batches cannot be filled up to few sizes: {term.name} gives no rows")
    masks = [layout.split(part).flatten(1).sum(1) * kept for part in (rows, weights)]
    return masks[0].sum() / masks[1].sum()
