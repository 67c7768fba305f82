"""The contract of torch.optim: parameter groups, names, state that is saved and loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from curvopt.optim.automatic import Watch
from curvopt.optim.checkpoint import PLACES, pack, refuse_foreign, reserve, unpack
from curvopt.optim.stats import Stats
from curvopt.parallel.shards import local


class Contract(torch.optim.Optimizer):
    """What `torch.optim` asks of an optimizer, beside its step.

    Attributes:
        saved: names of the attributes, numbers or tensors, that a checkpoint needs.
        generator: source of what the optimizer draws, if not torch's global one.
        collected: what the backward passes since the last step left.
    """

    saved: ClassVar[tuple[str, ...]] = ()
    generator: Generator | None
    _watch: Watch | None = None

    def _forget(self) -> None:
        self.collected: list[Any] = []
        self._left: list[tuple[Tensor, Tensor, int]] = []  # parameter, gradient, its version
        self._recorded = False
        self._failed: Exception | None = (
            None  # what a backward pass that was recorded left for `step`
        )
        if self._watch is not None:
            self._watch.unseen.clear()

    def _arm(self) -> None:
        """Get ready for the coming step."""

    def _validate(self, group: dict[str, Any]) -> None:
        """Raise ValueError for settings that make no sense; called for every new group."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Invalid learning rate: {lr} (a tensor must have one element)")
        names = {"lr": "learning rate", "weight_decay": "weight_decay", "momentum": "momentum"}
        for key, name in names.items():
            if not 0 <= group.get(key, 0) < float("inf"):
                raise ValueError(f"Invalid {name}: {group[key]}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own or the defaults.

        Raises:
            ValueError: a setting is invalid, or a parameter is complex or given twice.
        """
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):
            param_group["params"] = params = list(params)
            seen: set[int] = set()
            for index, item in enumerate(params):
                name, p = item if isinstance(item, tuple) else (f"parameter {index}", item)
                if id(p) in seen:
                    raise ValueError(f"Invalid params: {name} is given twice")
                if isinstance(p, Tensor) and p.is_complex():
                    raise ValueError(f"Invalid params: {name} is complex; use its real view")
                seen.add(id(p))
        self._validate(self.defaults | param_group)
        super().add_param_group(param_group)
        if self._watch is not None:
            self._watch.arm()

    def _begun(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter before its first step, with all that it may come to hold."""
        raise NotImplementedError

    def _begin_states(self) -> bool:
        """Fill the state before the first step, where that is what is asked for.

        `torch.distributed.checkpoint` asks for it by a step of lr 0 along gradients of 0.
        """
        params = [p for p in self._parameters() if p.requires_grad]
        asked = (
            not self.state
            and not any(float(group["lr"]) for group in self.param_groups)
            and not any(p.grad is None or local(p.grad).any() for p in params)
        )
        for group in self.param_groups if asked else ():
            for p in group["params"]:
                if p.requires_grad:
                    state = self._begun(p, group)
                    if state:
                        self.state[p] = state
        return asked

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with one more entry, ``"engine"``: counters and the generator's state.

        A copy of it is in the first group, for `torch.distributed.checkpoint`.
        """
        engine = {name: deepcopy(getattr(self, name)) for name in self.saved}
        engine["optimizer"] = type(self).__name__
        if self.generator is not None:
            engine["generator"] = self.generator.get_state()
        return pack(super().state_dict() | {"engine": engine})

    def _reserve(self) -> None:
        """Make places in the first group for what `state_dict` puts there."""
        reserve(self.param_groups, noise=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its dtype: float32 also for half-precision parameters.

        Raises:
            CurvoptError: the state is another optimizer's, or of parameters of other shapes.
        """
        final: dict[str, Any] = {}
        passing = self.collected, self._left, self._recorded, self._failed  # p.grad stays as well

        def check(_: Any, loaded: dict[str, Any]) -> None:
            kinds = [one.__name__ for one in type(self).__mro__]
            refuse_foreign(loaded, kinds, self._parameters(), type(self).__name__)
            final.update(loaded)

        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(unpack(state_dict))
        finally:
            hook.remove()
        self.collected, self._left, self._recorded, self._failed = passing
        indices = (index for group in final["param_groups"] for index in group["params"])
        for index, p in zip(indices, self._parameters(), strict=True):
            for key, value in final["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device, copy=True)
        engine = dict(final["engine"])
        engine.pop("optimizer", None)
        generator = engine.pop("generator", None)
        for name, value in engine.items():
            setattr(self, name, deepcopy(value))
        if generator is not None and self.generator is not None:
            self.generator.set_state(generator.cpu())
        self._reserve()
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks, gradients of a step under way, and ``step``, which schedulers wrap."""
        kept = vars(self).items()
        passing = ("step", "collected", "_left", "_recorded", "_failed", "_watch")
        return {k: v for k, v in kept if k not in passing and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:  # of an older version, which lacked some settings
            for key in self.defaults.keys() - {"differentiable"}:  # which torch adds
                group.setdefault(key, self.defaults[key])
        self._arm()

    # -- what can be seen -------------------------------------------------------------------------

    def stats(self, *, per_tensor: bool = True) -> dict[str, float]:
        """Numbers to log, at any time: a flat dict of floats, for TensorBoard, W&B, ``log_dict``.

        They are computed when asked for, from the state as it is, with one read from the device
        for all tensors: nothing is spent in `step`. What is not known (yet) is left out; the
        first entries, ``steps`` and ``lr`` (``lr/0``, ``lr/1``, ... of several groups), always
        are. The rest is listed with each optimizer. Where `fully_shard` divides parameters, all
        processes must ask.

        Args:
            per_tensor: also each tensor's own numbers, ``"key/name"`` beside ``"key"``, where the
                name is that of `named_parameters()`, or ``parameter_0`` and so on.

        Example:
            >>> model = torch.nn.Linear(4, 3)
            >>> opt = curvopt.DiagGGNOptimizer(model.named_parameters())
            >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
            >>> loss = opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
            >>> opt.stats(per_tensor=False).keys()
            dict_keys(['steps', 'lr', 'rate', 'signal', 'step_rms', 'curvature'])
        """
        wrapped = vars(self).get("_optimizer")  # Lightning's
        if wrapped is not None:
            return wrapped.stats(per_tensor=per_tensor)
        rates = {
            f"lr/{k}" if len(self.param_groups) > 1 else "lr": float(group["lr"])
            for k, group in enumerate(self.param_groups)
        }
        named = self._named() if per_tensor else []
        names = {p: name.replace(" ", "_") for name, p in named}
        return {"steps": float(getattr(self, "steps", 0)), **rates} | self._stats().flat(names)

    def _stats(self) -> Stats:
        """What this optimizer adds to `stats`."""
        return Stats()

    def __repr__(self) -> str:
        """As in torch, and the settings that all groups share."""
        own = {name: self._setting(name) for name in _arguments(type(self)) - self.defaults.keys()}
        lines = "".join(f"    {name}: {value}\n" for name, value in sorted(own.items()))
        told = super().__repr__().splitlines(keepends=True)[:-1]
        told = [line for line in told if line.partition(":")[0].strip() not in PLACES]
        return f"{''.join(told)}All groups\n{lines})"

    def _setting(self, name: str) -> Any:
        """What an argument of the constructor was, or is by now."""
        return getattr(self, name)

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _named(self) -> list[tuple[str, Tensor]]:
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            params = group["params"]
            names = group.get("param_names") or [
                f"parameter {len(named) + i}" for i in range(len(params))
            ]
            named += zip(names, params, strict=True)
        return named

    def _name(self, parameter: Tensor) -> str:
        """The parameter's name and shape, for messages."""
        name = next(name for name, p in self._named() if p is parameter)
        return f"{name} {list(parameter.shape)}"


def _arguments(cls: type) -> set[str]:
    """Names of the constructor's arguments, with those that ``**`` passes on to its base class."""
    names: set[str] = set()
    for base in cls.__mro__:
        # mypy fears for subclasses with other arguments: it is they that are asked for.
        signature = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        more = [p.name for p in signature.values() if p.kind is p.VAR_KEYWORD]
        names |= signature.keys() - set(more)
        if not more:
            break
    return names - {"self", "params", "defaults"}
