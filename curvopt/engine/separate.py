"""Whether a function treats samples one by one: by its ops, or else by its slopes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvopt.axes.lattice import NONE, along
from curvopt.axes.owners import Replay
from curvopt.axes.trace import Trace
from curvopt.engine.backward import pull_back
from curvopt.engine.paths import walk
from curvopt.errors import CurvoptError
from curvopt.recording.functions import HOOKING, is_torchs

CHUNK_BYTES = 1 << 26  # cotangents and slopes of one chunk of columns
KEPT = 256
# Verdicts by the whole code of the function, as the engine's plans: what values decided is no part.
_VERDICTS: OrderedDict[Any, bool] = OrderedDict()


class _Hooks(TorchFunctionMode):
    """Notes whether code of the user's was attached to the backward pass."""

    met = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.met = self.met or (func in HOOKING and not is_torchs(args))
        return func(*args, **(kwargs or {}))


def watched(f: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, bool]:
    """Run f, and tell whether its ops prove that ``f(x)[n]`` depends on ``x[n]`` alone.

    What is proved holds for all values of the inputs and of whatever else f uses, and so for
    derivatives of any order. Where it is not proved, samples need not mix.

    Args:
        f: the function.
        x: ``[N, *in]``, which requires a gradient.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:  # tensors have a hidden axis
        return f(x), False
    trace, hooks, inner = Trace(), _Hooks(), x.view_as(x)
    trace.ref(inner)
    with hooks, trace:
        y = f(inner)
    if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
        return y, False
    return y, not hooks.met and _is_all(y, inner, x) and _apart(trace, inner, y)


def _is_all(y: Tensor, inner: Tensor, x: Tensor) -> bool:
    """Whether the ops are all there is: no way to x beside f's argument, no derivative by hand.

    Compiled code and extensions in C++ have nodes of the last kind, too.
    """
    start, end = inner.grad_fn, get_gradient_edge(x).node
    seen, stack = {start}, [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        custom = isinstance(node, BackwardCFunction) or type(node).__name__ == "CppFunction"
        if node is end or custom:
            return False
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
    return True


def _apart(trace: Trace, x: Tensor, y: Tensor) -> bool:
    """Whether row n of y holds elements of sample n, or of none."""
    before, after = trace.ref(x), (len(trace.ops), trace.ref(y))
    if trace.unsupported:
        return False
    key = trace.key, before, after
    known = _VERDICTS.get(key)
    if known is not None:
        _VERDICTS.move_to_end(key)
        return known
    replay = Replay(trace, {before.storage: along(x.shape, 0)}, marks=[after]).run()
    state = replay.marked[after]
    apart = True
    if state is not None:
        fits = (state.owners == NONE) | (state.owners == along(y.shape, 0))
        apart = state.ragged is None and bool(fits.all())
    if not replay.value_dependent:
        _VERDICTS[key] = apart
        while len(_VERDICTS) > KEPT:
            _VERDICTS.popitem(last=False)
    return apart


def check_slopes(y: Tensor, x: Tensor, *, further: bool) -> None:
    """Outputs of some samples must not depend on the inputs of the others.

    Of all pairs of samples: for each binary digit of their numbers, those with a 0 and those with a
    1, so that any two are apart both ways in some column. The columns' weights are random, so that
    slopes do not cancel.

    Args:
        y: outputs ``[N, *out]``.
        x: inputs ``[N, *in]``.
        further: slopes between samples must not depend on anything either, as their derivatives, in
            x or in parameters, are asked for.

    Raises:
        CurvoptError: samples mix.
    """
    if not y.requires_grad or not y.numel():
        return
    n, generator = len(x), torch.Generator().manual_seed(0)
    bits = (
        torch.arange(n, device="cpu") >> torch.arange((n - 1).bit_length(), device="cpu")[:, None]
        & 1
    )
    sides = torch.cat([bits, 1 - bits]).bool().to(y.device)
    noise = torch.rand(y.shape, generator=generator, device="cpu").add_(0.5).to(y)
    step = max(1, CHUNK_BYTES // max(1, y.element_size() * (x.numel() + y.numel())))
    for part in sides.split(step):
        cotangents = noise * part.view(*part.shape, *[1] * (y.ndim - 1))
        options = {"batched": True, "create_graph": further}
        (slopes,) = pull_back([y], [cotangents], [x], **options)
        if slopes is None:
            return
        others = slopes[~part.to(slopes.device)]
        wrong = bool((others != 0).any())
        if further and not wrong and others.requires_grad:
            weights = (
                torch.rand(others.shape, generator=generator, device="cpu").add_(0.5).to(others)
            )
            leaves = [x, *walk(others, ())[1]]
            again = torch.autograd.grad(
                others, leaves, weights, retain_graph=True, allow_unused=True
            )
            wrong = any(bool((g != 0).any()) for g in again if g is not None)
        if wrong:
            raise CurvoptError(
                f"the outputs {list(y.shape)} mix samples: those of one sample depend on the "
                "inputs of others, so there is no Jacobian sample by sample. Use a function that "
                "treats samples one by one (no statistics over the batch), or torch.func.jacrev "
                "for all blocks"
            )
