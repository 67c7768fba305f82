"""Send cotangents from outputs back to the recorded uses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvopt.errors import CurvoptError

# Elements of all uses' outputs above which columns are sent one by one: batching them costs
# autograd more (copies, worse cache use) than it saves in calls.
BATCH_BELOW = 1 << 18


def pull_back(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Any],
    *,
    batched: bool,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Cotangents ``[V, *output.shape]`` at the outputs, carried to the inputs.

    Args:
        outputs: tensors of the forward pass.
        cotangents: one per output, all with the same V.
        inputs: gradient edges or tensors.
        batched: all columns in one vectorized pass, where every node allows it.
        retain_graph: keep the graph for a further pass.
        create_graph: keep the result differentiable.

    Returns:
        ``[V, *input.shape]`` per input, None where no path leads there.
    """
    if not inputs:
        return []
    columns = len(cotangents[0])
    options = {"allow_unused": True, "create_graph": create_graph}
    if batched and columns > 1 and not torch.is_anomaly_check_nan_enabled():
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                return list(
                    torch.autograd.grad(
                        outputs,
                        inputs,
                        cotangents,
                        is_grads_batched=True,
                        retain_graph=True,
                        **options,
                    )
                )
        except RuntimeError as error:
            # A node that cannot be vectorized (a custom autograd.Function, compiled code).
            if "vmap" not in str(error) and "compiled" not in str(error):
                raise
    found: list[Any] = [None] * len(inputs)
    for column in range(columns):
        grads = torch.autograd.grad(
            outputs,
            inputs,
            [cotangent[column] for cotangent in cotangents],
            retain_graph=retain_graph or create_graph or column < columns - 1,
            **options,
        )
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            if columns == 1:
                found[index] = grad.unsqueeze(0)
            elif create_graph:
                found[index] = [*(found[index] or ()), grad]
            else:  # one column's copy at a time
                if not column:
                    found[index] = grad.new_empty(columns, *grad.shape)
                found[index][column] = grad
    return [torch.stack(part) if isinstance(part, list) else part for part in found]


@contextmanager
def unspent() -> Iterator[None]:
    """Say what happened where the graph is gone."""
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise CurvoptError(
            "the graph of the loss was freed before: torch.autograd.backward() went over it "
            "unseen, or backward() went over it twice; call loss.backward() instead, once"
        ) from error


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Say what to do where an op has no second derivative."""
    try:
        yield
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise CurvoptError(
            f"an op on the way has no second derivative ({error}); write it in plain ops. For "
            "attention, run the model under "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        ) from error
