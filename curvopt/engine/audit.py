"""The audit: what the structures add up to, against the gradient that autograd has.

It sees a wrong rule and a lost path, by one random direction of rank one per parameter. It cannot
see how a sum is divided among the samples, so it replaces no part of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Generator, Tensor

from curvopt.dtypes import at_least_float32
from curvopt.errors import CurvoptError
from curvopt.structures import Structure

#: Equal passes whose gradient torch's own backward pass leaves on the parameters: one audit in so
#: many, which then costs the rank-one products alone.
EVERY = 16
#: Equal passes of private steps of which one audits a parameter.
PRIVATE_EVERY = 8
# Sums may differ by this part of the gradient, or by so many units of precision: an op may keep
# an intermediate value that its rule computes again.
PART, UNITS = 1e-3, 32.0
# Random signs of the terms that are tried, for their size.
DRAWS = 4

#: Of a parameter: the product of its sum with ``a (x) b`` once each cotangent's element has a
#: random sign of a generator's; how many elements there are; and the sum of their absolute values.
Shuffled = Callable[[Tensor, Tensor, Tensor, Generator], tuple[float, int, float]]


def audit(
    structures: Mapping[Tensor, Structure],
    gradients: Mapping[Tensor, Tensor | None],
    name: Callable[[Tensor], str],
    *,
    number: int,
    precision: float,
    shuffled: Shuffled,
) -> None:
    """Compare ``a^T (sum_n row_n) b`` of each parameter with ``a^T G b``, signs a and b random.

    Over a and b, the standard deviation of ``a^T E b`` is the Frobenius norm of E. So the two may
    differ by multiples of what rounding makes of G, and of the terms that cancelled in it: those
    are looked at where G alone does not explain the difference.

    Args:
        structures: of one cotangent column.
        gradients: G of the parameters to compare; None where no path led.
        name: a parameter's name and shape, for messages.
        number: seeds the signs: the number of the pass.
        precision: eps of the coarsest type in which G was added up.
        shuffled: the size of the terms, for parameters in doubt.

    Raises:
        CurvoptError: the two differ by more than rounding.
    """
    generators: dict[torch.device, Generator] = {}
    directions, rows = [], []
    for p, gradient in gradients.items():
        if p.device not in generators:
            generators[p.device] = Generator(p.device).manual_seed(number)
        a, b = _signs(p, generators[p.device])
        directions.append((a, b))
        got = structures[p].rank_one(a, b).to(a.dtype)
        wanted = size = torch.zeros_like(got)
        if gradient is not None:
            dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
            matrix = dense.reshape(len(a), len(b)).to(a.dtype)
            wanted, size = a @ (matrix @ b), torch.linalg.vector_norm(matrix)
        rows.append(torch.stack([got, wanted, size]))
    if not rows:
        return
    values = torch.stack([row.to(rows[0].device) for row in rows]).tolist()  # the host waits once
    for (p, direction), (got, wanted, size) in zip(
        zip(gradients, directions, strict=True), values, strict=True
    ):
        apart, bound = abs(got - wanted), max(PART, UNITS * precision) * size + _least(p)
        if apart <= bound or not math.isfinite(apart):  # of no number nothing can be said
            continue
        tried = [shuffled(p, *direction, generators[p.device]) for _ in range(DRAWS)]
        terms, (_, count, sent) = max(abs(term) for term, *_ in tried), tried[0]
        # G is added up in float32 at least, one by one at worst, and then rounded.
        units = precision + torch.finfo(torch.float32).eps * count**0.5
        # What cotangents are multiplied by may be rounding alone, of numbers about as large as one:
        # rows that do not vary, normalized. Then no term is left here, and G is not quite zero.
        if apart > bound + UNITS * (units * terms + precision * sent):
            raise CurvoptError(
                f"the samples' parts of the gradient of {name(p)} do not add up to it: along a "
                f"random direction they give {got:.6g}, the gradient {wanted:.6g}. Either a rule "
                "is wrong (find the layer with curvopt.verify, and correct what was given to "
                "curvopt.register_rule), or the parameter reaches the loss by a path that was not "
                "recorded (compute all of the model and the loss inside the closure, by torch's "
                "own functions)"
            )


def _signs(p: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Random signs for the first axis of a parameter, and for all others together."""
    length = p.shape[0] if p.ndim else 1
    dtype = at_least_float32(p.dtype)
    signs = torch.empty(length + p.shape[1:].numel(), dtype=dtype, device=p.device)
    a, b = signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1).tensor_split([length])
    return a, b


def _least(p: Tensor) -> float:
    """What may get lost of a gradient that is too small for its type."""
    info = torch.finfo(p.dtype)
    least = max(torch.finfo(torch.float32).tiny, info.tiny * info.eps)
    return float(UNITS * least * p.numel() ** 0.5)


def precision_of(tensors: Iterable[Tensor]) -> float:
    """Eps of the coarsest type among tensors, float32's at least: what sums are rounded to."""
    single = torch.finfo(torch.float32).eps
    eps = max([single, *(torch.finfo(dtype).eps for dtype in {t.dtype for t in tensors})])
    coarse = any(t.device.type == "cuda" for t in tensors) and (
        torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    )
    return max(eps, 2.0**-10) if coarse else eps


def hooked(p: Tensor) -> bool:
    """Whether code of the user's would see or change a gradient on its way to a parameter."""
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


def averaged() -> bool:
    """Whether a wrapper may average gradients over processes as they arrive."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
