"""What the engine knows of torch's functions: rules, compositions, losses.

A *rule* says how the per-sample gradients of an op's parameters follow from its inputs and its
output's cotangent. A *composition* replaces a torch function that hides several ops by the same
computation in recorded ops. Losses register themselves in `curvopt.losses`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from curvopt.errors import CurvoptError
from curvopt.ops.use import UseView
from curvopt.structures import Dense, Structure

Function = Callable[..., Any]
Arguments = dict[Any, Any]
Fits = Callable[[Arguments], bool]
Opens = Callable[[Arguments, Callable[[Tensor], bool]], bool]
Names = Callable[[Arguments], Iterable[str]]
Nodes = Callable[[Arguments], Iterable[tuple[Any, Any]]]


def nothing(arguments: Arguments) -> Iterable[Any]:
    """No names, no nodes."""
    return ()


def always(arguments: Arguments) -> bool:
    """Any arguments fit."""
    return True


def never(arguments: Arguments, is_shared: Callable[[Tensor], bool]) -> bool:
    """Where an argument may hold samples, the output holds them."""
    return False


class Rule:
    """A rule for one op.

    Args:
        function: ``function(use, **arguments) -> {argument name: Structure}``.
        parameters: names of the arguments that may hold a tracked value.
        fits: whether the rule covers a call with these arguments, if the output holds samples.
        opens: whether the output may be a value made of parameters although not all of the
            arguments are known to be the same for all samples: ``opens(arguments, is_shared)``.
        one_of: arguments of which one alone may be a tracked value.
        unread: names of arguments whose values the rule does not read, given the arguments: data
            that need not be kept, and may change in place.
        nodes: pairs of graph nodes that belong to the op as well: one that a path may enter, and
            the one behind it that leads to a parameter.
        again: names of parameters, given the arguments, that also act on what became of the output:
            what they do to the loss is no function of the output alone.
    """

    def __init__(
        self,
        function: Function,
        parameters: str,
        *,
        fits: Fits = always,
        opens: Opens = never,
        one_of: str = "",
        unread: Names = nothing,
        nodes: Nodes = nothing,
        again: Names = nothing,
    ):
        signature = list(inspect.signature(function).parameters.values())[1:]
        self.function, self.fits, self.opens = function, fits, opens
        self.unread, self.nodes, self.again = unread, nodes, again
        self.parameters, self.one_of = frozenset(parameters.split()), frozenset(one_of.split())
        self.names = tuple(p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.rest = next((p.name for p in signature if p.kind is p.VAR_POSITIONAL), None)
        self.defaults = {p.name: p.default for p in signature if p.default is not p.empty}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
        """Arguments by name, as Python would bind them."""
        bound = dict(self.defaults)
        bound.update(zip(self.names, args, strict=False))
        bound.update(kwargs)
        if self.rest is not None:
            bound[self.rest] = args[len(self.names) :]
        return bound

    def covers(self, tracked: Iterable[Any]) -> bool:
        """Whether the rule answers for tracked values in these arguments, all of them."""
        names = set(tracked)
        return names <= self.parameters and len(names & self.one_of) < 2

    def structures(self, use: UseView, arguments: dict[Any, Any]) -> dict[Any, Structure]:
        """Structures by argument name."""
        return self.function(use, **{k: v for k, v in arguments.items() if k != self.rest})


class FunctionRule(Rule):
    """A user's rule for a torch function; its arguments go by position or keyword."""

    def __init__(self, function: Function):
        self.function, self.fits, self.opens = function, always, never
        self.unread = self.nodes = self.again = nothing

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
        return {**dict(enumerate(args)), **kwargs}

    def covers(self, tracked: Iterable[Any]) -> bool:
        return True

    def structures(self, use: UseView, arguments: dict[Any, Any]) -> dict[Any, Structure]:
        values = {k: v if k in use.parameters else use.data(v) for k, v in arguments.items()}
        args = [value for key, value in values.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in values.items() if isinstance(key, str)}
        return checked(self.function(use.flat, *args, **kwargs), use, arguments)


class ModuleRule(FunctionRule):
    """A user's rule for a module class; its arguments are module, inputs, output, parameters."""

    def structures(self, use: UseView, arguments: dict[Any, Any]) -> dict[Any, Structure]:
        module, inputs, output = arguments[0], arguments[1], arguments[2]
        inputs = tuple(map(use.data, inputs))
        answer = self.function(module, inputs, use.data(output), use.flat)
        return checked(answer, use, dict(module.named_parameters()))


RULES: dict[Function, Rule] = {}
COMPOSITIONS: dict[Function, Function] = {}
MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}


def rule(*functions: Function, parameters: str, **options: Any) -> Callable[[Function], Function]:
    """Register the decorated function as the rule of some torch functions.

    Its first argument is the `UseView` (cotangent and sample axis), the others are the op's own.

    Args:
        *functions: torch functions with the same arguments.
        parameters: names of the arguments that may be parameters, separated by blanks.
        **options: see `Rule`.
    """

    def decorate(function: Function) -> Function:
        RULES.update(dict.fromkeys(functions, Rule(function, parameters, **options)))
        return function

    return decorate


def composition(*functions: Function) -> Callable[[Function], Function]:
    """Register the decorated function in place of some torch functions while recording."""

    def decorate(function: Function) -> Function:
        COMPOSITIONS.update(dict.fromkeys(functions, function))
        return function

    return decorate


def register_rule(target: Any) -> Callable[[Function], Function]:
    """Register a rule for an op that the package does not know.

    One rule serves every quantity, of first and second order: the backward pass through the op is
    autograd's own, the rule only says what the op's parameters get from a cotangent.

    * For a ``torch.nn.Module`` class the rule is ``rule(module, inputs, output, cotangent)``; the
      module is opaque, whatever happens inside. ``inputs`` (the positional ones) and ``output``
      have the samples first, ``[N, ...]`` (N times K where the model flattened K rows per sample
      into that axis), and ``cotangent`` is ``[V, N, ...]`` with V cotangent columns. It returns a
      dict from the module's parameter names to the rows ``[V, N, *parameter.shape]``, or to a
      `curvopt.structures.Structure` that knows them without forming them.
    * For a torch function the rule is ``rule(cotangent, *args, **kwargs)`` with the function's own
      arguments; the dict's keys are the argument's position or keyword.

    A wrong rule is found by `curvopt.verify`.

    Args:
        target: a module class, or a torch function.

    Raises:
        TypeError: the target is neither.

    Example:
        >>> class ScaleLayer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.tensor(2.0))
        ...
        ...     def forward(self, x):
        ...         return self.weight * x
        >>> @curvopt.register_rule(ScaleLayer)
        ... def scale_layer(module, inputs, output, cotangent):
        ...     return {"weight": (cotangent * inputs[0]).flatten(2).sum(-1)}
    """

    def decorate(function: Function) -> Function:
        if isinstance(target, type) and issubclass(target, nn.Module):
            MODULE_RULES[target] = ModuleRule(function)
        elif callable(target) and not isinstance(target, nn.Module):
            RULES[target] = FunctionRule(function)
        else:
            raise TypeError(f"a rule is for a module class or a torch function, not {target!r}")
        return function

    return decorate


def checked(answer: Any, use: UseView, names: Container[Any]) -> dict[Any, Structure]:
    """A custom rule's answer, checked, as structures.

    Args:
        answer: rows or structures by parameter name, as the rule returned them.
        use: the use.
        names: what may be named.
    """
    if not isinstance(answer, Mapping):
        raise CurvoptError(
            f"the rule of {use.op} returned {type(answer).__name__}, not a dict by parameter name"
        )
    result: dict[Any, Structure] = {}
    for key, value in answer.items():
        if key not in names:
            raise CurvoptError(f"the rule of {use.op} returned {key!r}, which is none of its names")
        if key not in use.parameters:
            continue  # frozen
        expected = (*use.flat.shape[:2], *use.parameters[key].shape)
        known = isinstance(value, Structure)
        found = (value.columns, value.samples, *value.shape) if known else tuple(value.shape)
        if found != expected:
            raise CurvoptError(
                f"the rule of {use.op} returned shape {found} for {key!r}; "
                f"its rows are [V, N, *parameter.shape] = {list(expected)}"
            )
        if expected[1] != use.layout.n:  # K rows per sample
            value, known = use.summed(value.form() if known else value), False
        result[key] = value if known else Dense(value)
    return result
