"""The slow path: exact rows of whatever no rule covers, one backward pass per sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from curvopt.axes.layout import Layout
from curvopt.engine.backward import pull_back
from curvopt.errors import CurvoptError, SlowPathWarning

# Bytes of cotangents that one chunk of columns may hold at the uses.
CHUNK_BYTES = 1 << 25


def warn(names: Iterable[str], op: str) -> None:
    """Say that the slow path is taken, and how not to take it."""
    warnings.warn(
        f"no rule covers {op} with {', '.join(names)}: its per-sample gradients are exact but "
        "slow, one backward pass per sample; teach curvopt the op with curvopt.register_rule",
        SlowPathWarning,
        stacklevel=2,
    )


def rows_by_sample(
    outputs: list[Tensor],
    cotangents: list[Tensor],
    layouts: Sequence[Layout | None],
    targets: list[Tensor],
    *,
    samples: int,
    elements: int,
    create_graph: bool,
    name: Callable[[Tensor], str],
    batched: bool = True,
) -> list[Tensor]:
    """Rows ``[V, N, *target.shape]`` from passes with one sample's cotangent each.

    Args:
        outputs: of the terms.
        cotangents: one per output, ``[V, *output.shape]``.
        layouts: where the outputs hold the samples.
        targets: parameters.
        samples: N.
        elements: of the cotangents that a pass holds, for its memory.
        create_graph: keep the rows differentiable.
        name: of a parameter, for messages.
        batched: the passes of a chunk in one, where every node allows it.
    """
    columns = len(cotangents[0])
    size = max(1, CHUNK_BYTES // (4 * columns * max(1, elements)))
    chunks = []
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        one_hot = torch.eye(samples, device="cpu")[start:stop]
        masked = []
        for output, cotangent, layout in zip(outputs, cotangents, layouts, strict=True):
            if layout is None:
                raise CurvoptError(
                    f"{', '.join(map(name, targets))} is used by an op without a rule, and the "
                    f"loss's rows {list(output.shape)} cannot be told apart by sample: register a "
                    "rule for the op (curvopt.register_rule)"
                )
            split = layout.split(cotangent, 1)
            hot = one_hot.to(split).view(-1, 1, samples, *[1] * (split.ndim - 2))
            rows = (hot * split).flatten(0, 1)
            masked.append(layout.merge(rows, 1, output.shape[: layout.axes]))
        pulled = pull_back(outputs, masked, targets, batched=batched, create_graph=create_graph)
        chunks.append(
            [
                target.new_zeros(()).expand(stop - start, columns, *target.shape)
                if row is None
                else row.unflatten(0, (stop - start, columns))
                for row, target in zip(pulled, targets, strict=True)
            ]
        )
    return [torch.cat(parts).transpose(0, 1) for parts in zip(*chunks, strict=True)]
