"""Random programs: whatever they do with their parameters, the numbers are those of the loops."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import curvopt
from tests import oracles
from tests.cases import Problem
from tests.test_quantities import check

FIELDS = ["batch_grad", "batch_l2", "sum_grad_squared", "clipped_grad_sum", "diag_ggn_exact"]
SIZES = st.integers(1, 4)  # of batches too: an axis that has the size of the batch is a trap


class Program(nn.Module):
    """Lines of code, each for a value ``v[i]`` (``[N, D]`` or ``[N, T, D]``); v[0] is the input.

    The output joins the last values, so that they are computed for a reason.
    """

    def __init__(self, code, shapes):
        super().__init__()
        self.code = code
        self.weights = nn.ParameterList(torch.randn(shape) * 0.7 for shape in shapes)

    def forward(self, x):
        values = [x]
        for line in self.code:
            values.append(eval(line, {"v": values, "w": self.weights, "torch": torch, "F": F}))
        return torch.cat([v.sum(1) if v.ndim == 3 else v for v in values[-3:]], 1)


class Writer:
    """Writes a program.

    Args:
        draw: of Hypothesis.
        shape: shape of the input, without the samples.
    """

    def __init__(self, draw, shape):
        self.draw, self.values, self.weights = draw, [shape], []

    def one_of(self, *options):
        return self.draw(st.sampled_from(options))

    def weight(self, *shape):
        """A new parameter, or one that is in use already, perhaps derived."""
        same = [f"w[{i}]" for i, other in enumerate(self.weights) if other == shape]
        turned = [f"w[{i}].t()" for i, s in enumerate(self.weights) if s[::-1] == shape != s[:1]]
        name = self.one_of("new", *same, *turned)
        if name == "new":
            name = f"w[{len(self.weights)}]"
            self.weights.append(shape)
        form = self.one_of(*["{}"] * 6, "{}.tanh()", "({} * 2)", "({0} * ({0} > 0))")
        return form.format(name)

    def value(self, ndim=None):
        """A value so far, a late one more often, and its shape; None if none has these axes."""
        fits = [i for i, shape in enumerate(self.values) if ndim in (None, len(shape))]
        if not fits:
            return None
        index = self.one_of(*fits, *fits[-2:])
        return f"v[{index}]", self.values[index]

    def line(self):
        """Write a line."""
        make, ndim = self.one_of(*KINDS)
        operand = self.value(ndim)
        code, shape = make(self, *operand) if operand else linear(self, *self.value())
        self.values.append(shape)
        return code


KINDS = []


def kind(ndim=None):
    """Register a maker of lines: from a value and its shape to code and the shape of the result.

    Args:
        ndim: number of axes that the value must have, the samples' not counted.
    """

    def decorate(make):
        KINDS.append((make, ndim))
        return make

    return decorate


@kind()
def linear(write, x, shape):
    out = write.draw(SIZES)
    bias = write.weight(out) if write.draw(st.booleans()) else None
    return f"F.linear({x}, {write.weight(out, shape[-1])}, {bias})", (*shape[:-1], out)


@kind()
def product(write, x, shape):
    out = write.draw(SIZES)
    weight = write.weight(shape[-1], out)
    form = write.one_of("{} @ {}", "torch.einsum('...d,do->...o', {}, {})")
    return form.format(x, weight), (*shape[:-1], out)


@kind(2)
def left_product(write, x, shape):
    out = write.draw(SIZES)
    return f"{write.weight(out, shape[0])} @ {x}", (out, shape[1])


@kind(2)
def sequence_first(write, x, shape):
    out = write.draw(SIZES)
    weight = write.weight(out, shape[1])
    # One time step, seen first, looks like a batch of one.
    turned = "{}" if shape[0] == 1 else "{}.transpose(0, 1)"
    return turned.format(f"F.linear({turned.format(x)}, {weight}).tanh()"), (shape[0], out)


@kind(2)
def flattened(write, x, shape):
    out = write.draw(SIZES)
    rows = f"F.linear({x}.flatten(0, 1), {write.weight(out, shape[1])})"
    return f"{rows}.unflatten(0, (-1, {shape[0]}))", (shape[0], out)


@kind()
def elementwise(write, x, shape):
    """With a parameter that is broadcast over some axes, and has axes of size 1 or lacks them."""
    sizes = [size if write.draw(st.booleans()) else 1 for size in shape]
    if write.draw(st.booleans()):
        sizes = [1, *sizes]
    while sizes and sizes[0] == 1 and write.draw(st.booleans()):
        sizes = sizes[1:]
    form = write.one_of("{} + {}", "{} * {}", "{1} - {0}", "{} / ({}.exp() + 1)")
    return form.format(x, write.weight(*sizes)), shape


@kind()
def in_place(write, x, shape):
    form = write.one_of("{}.clone().mul_({})", "{}.clone().add_({})")
    return form.format(x, write.weight(shape[-1])), shape


@kind()
def residual(write, x, shape):
    same = [i for i, other in enumerate(write.values) if other == shape]
    return f"{x} + v[{write.one_of(*same)}]", shape


@kind()
def join(write, x, shape):
    alike = [i for i, other in enumerate(write.values) if other[:-1] == shape[:-1]]
    other = write.one_of(*alike)
    width = min(4, shape[-1] + write.values[other][-1])
    return f"torch.cat([{x}, v[{other}]], -1)[..., :4]", (*shape[:-1], width)


@kind()
def activation(write, x, shape):
    form = write.one_of("{}.tanh()", "F.relu({}.clone(), inplace=True)", "{}.sigmoid()")
    return form.format(x), shape


@kind()
def norm(write, x, shape):
    d = shape[-1]
    return f"F.layer_norm({x}, [{d}], {write.weight(d)}, {write.weight(d)})", shape


@kind(2)
def convolution(write, x, shape):
    out = write.draw(SIZES)
    return f"F.conv1d({x}.mT, {write.weight(out, shape[1], 1)}).mT", (shape[0], out)


@kind(2)
def attention(write, x, shape):
    d = shape[1]
    q, k, v = (f"{x} @ {write.weight(d, d)}" for _ in range(3))
    bias = f", attn_mask={write.weight(shape[0], shape[0])}" if write.draw(st.booleans()) else ""
    return f"F.scaled_dot_product_attention({q}, {k}, {v}{bias})", shape


@kind()
def lookup(write, x, shape):
    """One lookup or many per sample, by numbers that depend on the data."""
    size, d = write.draw(SIZES), write.draw(SIZES)
    numbers = f"({x}[..., 0].detach() * 9).long() % {size}"
    form = write.one_of("F.embedding({0}, {1})", "{1}[{0}]")
    return form.format(numbers, write.weight(size, d)), (*shape[:-1], d)


@kind(2)
def positions(write, x, shape):
    """One table for all samples."""
    table = write.weight(shape[0] + write.one_of(0, 2), shape[1])
    form = write.one_of("{}[:{}]", "{}[torch.arange({})]", "F.embedding(torch.arange({1}), {0})")
    return f"{x} + {form.format(table, shape[0])}", shape


@kind(2)
def class_token(write, x, shape):
    token = write.weight(1, 1, shape[1])
    return f"torch.cat([{token}.expand(len({x}), -1, -1), {x}], 1)", (shape[0] + 1, shape[1])


@kind(2)
def pool(write, x, shape):
    if shape[0] * shape[1] < 6 and write.draw(st.booleans()):
        return f"{x}.flatten(1)", (shape[0] * shape[1],)
    return f"{x}.mean(1)", shape[1:]


@kind(1)
def as_token(write, x, shape):
    return f"{x}.unsqueeze(1)", (1, *shape)


@kind()
def without_a_rule(write, x, shape):
    if write.draw(st.booleans()):
        return f"torch.maximum({x}, {write.weight(shape[-1])})", shape
    out = write.draw(SIZES)
    return f"torch.cdist({x}, {write.weight(out, shape[-1])})", (*shape[:-1], out)


@st.composite
def problems(draw):
    """A program, the shapes of its parameters and of its input, and a number of samples."""
    writer = Writer(draw, tuple(draw(st.lists(SIZES, min_size=1, max_size=2))))
    code = [writer.line() for _ in range(draw(st.integers(1, 7)))]
    return code, writer.weights, writer.values[0], draw(SIZES)


def build(code, shapes, shape, n):
    torch.manual_seed(0)
    model = Program(code, shapes).double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    with torch.no_grad():
        y = torch.randn_like(model(x))
    return Problem(model, F.mse_loss, x, y, list(model.parameters()))


def is_constant(problem):
    return not problem.params or not problem.loss().requires_grad


@given(drawn=problems())
def test_never_a_wrong_number(drawn):
    problem = build(*drawn)
    if is_constant(problem):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", curvopt.SlowPathWarning)
        check(problem, fields=FIELDS)


@given(drawn=problems())
def test_samples_that_mix_are_refused(drawn):
    problem = build(*drawn)
    mixed = problem._replace(model=lambda x: problem.model(x) - problem.model(x).mean(0))
    if is_constant(problem) or all(g.abs().max() < 1e-9 for g in oracles.grad(*mixed).values()):
        return
    refusal = curvopt.CurvoptError, curvopt.SlowPathWarning  # a path without samples cannot tell
    with pytest.raises(refusal, match="separate|no rule|ambiguous"):
        curvopt.compute(mixed.loss, mixed.params, curvopt.BatchGrad())
