"""Batches that samples without a weight fill up, and their loss without those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvopt.axes.layout import Layout
from curvopt.compiled.tracing import Unsuited, kept_randomness
from curvopt.engine.computation import Computation
from curvopt.losses import Loss
from curvopt.losses.cross_entropy import CrossEntropy, Likelihood
from curvopt.losses.handwritten import Reduction

# Units of rounding by which a loss may differ from that of the batch twice.
UNITS = 64.0


class Unlucky(TorchDispatchMode):
    """What is drawn is the same for all elements: nothing is dropped."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        drawn = func(*args, **kwargs)
        if func is torch.ops.aten.bernoulli_.float:
            return drawn.fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        return drawn.zero_() if isinstance(drawn, Tensor) else drawn


def is_mean(function: Callable[..., Any], batch: Sequence[Tensor]) -> bool:
    """Whether a loss is that of the batch twice: it has no use for the number of samples.

    What is in Python, as in ``loss * len(x)``, would count the samples that fill a batch up.

    Args:
        function: of a batch, gives the loss, or a tuple that begins with it.
        batch: samples on the first axis of each tensor.
    """
    device = batch[0].device.type
    try:
        with torch.no_grad(), kept_randomness(batch[0].device), Unlucky():
            found = [function(*batch), function(*(torch.cat([part, part]) for part in batch))]
    except Exception:  # whatever it is, an eager step says it
        return False
    one, two = (loss[0] if isinstance(loss, tuple) else loss for loss in found)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else one.dtype
    apart = (one.double() - two.double()).abs()
    return bool(apart <= UNITS * torch.finfo(dtype).eps * one.double().abs())


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
