"""Facts about torch's own functions that recording needs."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from curvopt.losses import LOSSES

Function = Callable[..., Any]

# Questions about a tensor: they return no tensor, or one that has no history.
PASSIVE: frozenset[Function] = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in (
            "shape dtype device ndim requires_grad is_leaf grad_fn grad layout is_cuda is_sparse "
            "is_nested is_quantized is_meta is_mkldnn data _version is_cpu itemsize nbytes"
        ).split()
        if hasattr(Tensor, name)  # they differ between releases
    ]
    + [
        getattr(Tensor, name)
        for name in (
            "dim size stride numel nelement element_size is_contiguous is_floating_point "
            "is_complex data_ptr storage_offset get_device __len__ __hash__ __repr__ item tolist "
            "detach untyped_storage requires_grad_ is_inference register_hook retain_grad numpy"
        ).split()
        if hasattr(Tensor, name)
    ]
    + [getattr(Tensor, name).__set__ for name in ("grad",)]
    + [Tensor._is_view, torch.is_tensor, torch.numel, torch.detach]
    + [torch.is_floating_point, torch.is_complex, torch._C._set_grad_enabled]
)

# What may attach code to the backward pass; a node, once it is had, takes hooks unseen.
HOOKING: frozenset[Function] = frozenset(
    [Tensor.register_hook, *(getattr(Tensor, name).__get__ for name in ("grad_fn",))]
)


_APPLY: Any = torch.autograd.Function.__dict__["apply"].__func__


def is_torchs(args: tuple[Any, ...]) -> bool:
    """Whether a hook is one by which torch's own wrappers learn that a gradient has come by."""
    module = getattr(args[1], "__module__", None) if len(args) > 1 else None
    return isinstance(module, str) and module.startswith("torch.distributed.")


# Functions whose output is not the same for all samples although no argument says so.
RANDOM: frozenset[Function] = frozenset(
    [torch.rand, torch.randn, torch.randint, torch.empty, torch.randperm, torch.normal]
)

# Functions that only select and rearrange elements, each at most once.
_SELECTING: frozenset[Function] = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "t transpose permute reshape view flatten unflatten squeeze unsqueeze narrow select split "
        "chunk unbind swapaxes swapdims movedim moveaxis clone contiguous ravel detach adjoint "
        "tensor_split split_with_sizes"
    ).split()
    if hasattr(owner, name)
) | frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT"))

_BASIC_INDEX = (int, slice, type(None), type(Ellipsis))


def selects(func: Function, args: tuple[Any, ...]) -> bool:
    """Whether the call only selects and rearranges elements, each at most once."""
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(isinstance(item, _BASIC_INDEX) for item in index)
    return func in _SELECTING


def reentrant(values: list[Tensor]) -> bool:
    """Whether a custom autograd.Function's forward is under way that was not given all values.

    Their gradients then come from a backward pass inside of its own, which no graph shows: that is
    how reentrant checkpoints work, torch's and home-made ones.

    Args:
        values: parameters, or made of some, that are used without gradients.
    """
    frame: types.FrameType | None = sys._getframe(1)
    checkpoint, apply = CheckpointFunction.forward.__code__, _APPLY.__code__
    while frame is not None:
        if frame.f_code is checkpoint:
            return True
        if frame.f_code is apply:
            given = {id(value) for value in frame.f_locals["args"]}
            if any(id(value) not in given for value in values):
                return True
        frame = frame.f_back
    return False


def in_ddp_sink() -> bool:
    """Whether DistributedDataParallel hands on an output of its model: a copy, with its gradient.

    It does so in an autograd function of its own, with unused parameters or a static graph.
    """
    distributed = sys.modules.get("torch.nn.parallel.distributed")
    sink = getattr(distributed, "_DDPSink", None)
    code = None if sink is None else sink.forward.__code__
    frame: types.FrameType | None = sys._getframe(1)
    while code is not None and frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return code is not None and frame is not None


# Losses that give the same value with either tensor first.
SYMMETRIC: frozenset[Function] = frozenset([F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])

# Losses that torch itself composes of their rows and an ordinary mean or sum of them.
COMPOSED: frozenset[Function] = frozenset(
    [
        F.cosine_embedding_loss,
        F.gaussian_nll_loss,
        F.hinge_embedding_loss,
        F.kl_div,
        F.l1_loss,
        F.margin_ranking_loss,
        F.poisson_nll_loss,
        F.triplet_margin_loss,
        F.triplet_margin_with_distance_loss,
    ]
)


@cache
def signature(func: Function) -> inspect.Signature:
    """The signature of a torch function."""
    return inspect.signature(func)


def op_name(func: Function) -> str:
    """A short name for messages: ``linear``, ``Tensor.__getitem__``."""
    name = getattr(func, "__name__", None) or repr(func)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return f"Tensor.{name}" if name.startswith("__") else name


def _false(*_: Any) -> bool:
    return False


@cache
def unwrapped(func: Function) -> Function | None:
    """The body of a torch function that is written in Python, without its torch-function check.

    Run while recording, it shows the ops that the function consists of.
    """
    if not isinstance(func, types.FunctionType) or not func.__module__.startswith("torch."):
        return None
    checks = [name for name in func.__globals__ if name.startswith("has_torch_function")]
    if not checks or not set(checks) & set(func.__code__.co_names):
        return None
    scope = func.__globals__ | dict.fromkeys(checks, _false)
    body = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body


REDUCTIONS: frozenset[Function] = frozenset([torch.mean, torch.sum, Tensor.mean, Tensor.sum])


def _special() -> dict[Function, str]:
    table: dict[Function, str] = dict.fromkeys(COMPOSED, "_composed")
    table |= dict.fromkeys(LOSSES, "_loss")
    function: Function
    for function in (F.log_softmax, torch.log_softmax, Tensor.log_softmax):
        table[function] = "_log_softmax"
    for function in REDUCTIONS:
        table[function] = "_reduction"
    table[Tensor.backward] = "_backward"
    return table


SPECIAL = _special()
