"""Random networks, losses and batches: the numbers are those of the loops, whatever is drawn."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import curvopt
from tests.cases import ANY, LOSSES, Loss, build, classes
from tests.test_quantities import ALL, check

WIDTHS = st.integers(1, 4)
ACTIVATIONS = st.sampled_from([nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ReLU, nn.GELU, nn.Identity])


@st.composite
def linears(draw):
    """Makers of linear layers, on vectors or on tokens with up to two axes, and the input shape."""
    axes = draw(st.lists(st.integers(1, 3), max_size=2))
    widths = draw(st.lists(WIDTHS, min_size=2, max_size=4))
    layers = []
    for i, o in pairwise(widths):
        layers += [partial(nn.Linear, i, o, bias=draw(st.booleans())), draw(ACTIVATIONS)]
    return layers, (*axes, widths[0])


@st.composite
def convolution(draw, channels, sizes):
    """One layer that fits an input with these channels and sizes."""
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    kernel = [draw(st.integers(1, min(3, size))) for size in sizes]
    fits = [1 if 2 * (k - 1) >= size else 2 for k, size in zip(kernel, sizes, strict=True)]
    padding = draw(st.sampled_from(["", "same", "valid"]))
    return partial(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1],
        channels,
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=1 if padding == "same" else [draw(st.integers(1, 3)) for _ in sizes],
        padding=padding or [draw(st.integers(0, min(2, size - 1))) for size in sizes],
        dilation=[draw(st.integers(1, most)) for most in fits],
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    )


@st.composite
def convolutions(draw):
    """One or two convolutions in one to three dimensions, a linear layer on top where it helps."""
    sizes = draw(
        st.lists(st.integers(1, 6), min_size=1, max_size=1)
        | st.lists(st.integers(1, 4), min_size=2, max_size=2)
        | st.lists(st.integers(1, 3), min_size=3, max_size=3)
    )
    layers, shape = [], (draw(st.integers(1, 4)), *sizes)
    inner = shape
    for _ in range(draw(st.integers(1, 2))):
        layers += [draw(convolution(inner[0], inner[1:])), draw(ACTIVATIONS)]
        inner = network(layers)(torch.zeros(1, *shape)).shape[1:]
    if math.prod(inner) > 20 or draw(st.booleans()):
        layers += [nn.Flatten, partial(nn.Linear, math.prod(inner), draw(WIDTHS))]
    return layers, shape


def network(layers, frozen=()):
    model = nn.Sequential(*(make() for make in layers))
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i not in frozen)
    return model


# Every token or position is a row of the loss, as in a language model.
TOKENS = Loss(
    lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten()),
    lambda z: classes(z.movedim(-1, 1)),
)
POSITIONS = Loss(lambda z, y: TOKENS.fn(z.movedim(1, -1), y), classes)


@st.composite
def problems(draw):
    """A random network with a random loss, as makers; then how many samples, which are frozen."""
    layers, shape = draw(linears() | convolutions())
    losses = [LOSSES[name] for name in ANY]
    if len(shape) > 1 and nn.Flatten not in layers:
        losses.append(TOKENS if layers[0].func is nn.Linear else POSITIONS)
    frozen = draw(st.sets(st.integers(0, 5), max_size=3))
    n, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**16))
    return partial(network, layers, frozen), shape, draw(st.sampled_from(losses)), n, seed


@given(
    drawn=problems(),
    precision=st.sampled_from([(torch.float64, 1e-9), (torch.float32, 1e-4)]),
    fields=st.sets(st.sampled_from(ALL), min_size=1).map(sorted),
)
def test_never_a_wrong_number(drawn, precision, fields):
    (make, shape, loss, n, seed), (dtype, rtol) = drawn, precision
    problem, exact = (build(make, shape, loss, n, d, seed) for d in (dtype, torch.float64))
    assume(problem.params)
    if problem.loss().isfinite():
        check(problem, exact, fields, rtol)
    else:  # a mean over targets that are all ignored
        with pytest.raises(curvopt.CurvoptError, match="finite"):
            curvopt.compute(problem.loss, problem.params)
