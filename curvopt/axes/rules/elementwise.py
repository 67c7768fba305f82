"""Ops that work element by element, copies, and ops that make a tensor from nothing."""

from __future__ import annotations

from curvopt.axes.lattice import State
from curvopt.axes.ops import Facts
from curvopt.axes.rules.base import KNOWS_RAGGED, Call, Refuse, Result, Rule, broadcast, rule

# Element by element, although not every torch release says so by a tag.
_POINTWISE = frozenset(
    "where masked_fill clamp clamp_min clamp_max relu elu celu leaky_relu softplus addcmul addcdiv "
    "lerp pow hardtanh hardswish hardsigmoid mish _prelu_kernel log_sigmoid_forward isnan isinf "
    "isfinite nan_to_num xlogy heaviside bernoulli floor_divide remainder fmod bitwise_and "
    "bitwise_or bitwise_xor bitwise_not logical_not logical_and logical_or logical_xor __and__ "
    "__or__ __xor__ rsub polar complex copysign rrelu_with_noise "
    "threshold_backward tanh_backward sigmoid_backward gelu_backward silu_backward elu_backward "
    "leaky_relu_backward softplus_backward hardtanh_backward hardswish_backward "
    "hardsigmoid_backward mish_backward log_sigmoid_backward native_dropout_backward "
    "mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward "
    "soft_margin_loss_backward".split()
)


def pointwise(call: Call) -> Result:
    """An element of the output depends on the elements at its place."""
    ndim = max((ref.ndim for ref in call.outputs), default=0)
    return [broadcast(call, call.inputs, ndim)] * len(call.outputs)


def is_pointwise(facts: Facts) -> bool:
    """Whether `pointwise` is the rule for an op that has none of its own."""
    return facts.pointwise or facts.name in _POINTWISE


KNOWS_RAGGED.add(pointwise)


@rule("copy", ragged=True)
def copy(call: Call) -> Result:
    """The destination becomes the source."""
    state = broadcast(call, call.inputs[1:2], call.outputs[0].ndim)
    source = call.state(call.inputs[1])
    if state is not None and state.ragged is not None:
        at = state.ragged[0]
        if call.inputs[1].shape[at] != call.outputs[0].shape[at]:
            raise Refuse  # one element today, which a place for more took
    if state is not None and source is not None and call.inputs[1].ndim == call.outputs[0].ndim:
        state = state._replace(lines=source.lines)
    return state


@rule(
    "clone detach detach_copy alias alias_copy _to_copy lift lift_fresh lift_fresh_copy "
    "_conj _neg_view _conj_physical native_dropout _fused_dropout",
    ragged=True,
)
def same(call: Call) -> Result:
    """Every element stays at its place."""
    return [call.state(call.x)] * len(call.outputs)


@rule("tril triu")
def triangle(call: Call) -> Result:
    """Elements stay or become 0, by their position: no rule for a ragged axis."""
    return call.state(call.x)


@rule(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty "
    "new_zeros new_ones new_full new_empty_strided zero uniform random exponential geometric "
    "log_normal cauchy _local_scalar_dense equal _has_same_storage_numel",
    ragged=True,
)
def made(call: Call) -> Result:
    """The values of the inputs are not read."""
    return [None] * len(call.outputs)


@rule("normal")
def normal(call: Call) -> Result:
    """In place by numbers; else element by element from the given mean or deviation."""
    return made(call) if call.op.facts.writes else pointwise(call)


@rule("fill")
def fill(call: Call) -> Result:
    """Every element becomes the value."""
    value = call.state(call.arg("value"))
    return None if value is None else State(value.owners.reshape((1,) * call.x.ndim))


@rule("view_as_real")
def view_as_real(call: Call) -> Result:
    """A dim for the two parts."""
    return State(call.full(call.x, call.x.ndim).unsqueeze(-1))


@rule("view_as_complex")
def view_as_complex(call: Call) -> Result:
    """The two parts become one element."""
    merged = call.merged(call.x, [-1])
    return None if merged is None else State(merged.squeeze(-1))


def rule_for(facts: Facts, rules: dict[str, Rule]) -> Rule | None:
    """The rule of an op, or None: all samples that reach it are mixed."""
    found = rules.get(facts.name)
    return pointwise if found is None and is_pointwise(facts) else found
