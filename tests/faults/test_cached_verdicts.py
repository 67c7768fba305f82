"""What was found of one pass says nothing of another: samples are proved separate by code."""

import os
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import curvopt
from tests.faults.situations import (
    COUPLED,
    OPTIMIZERS,
    C,
    D,
    Family,
    H,
    N,
    Pass,
    batch,
    bounded,
    ce,
    every_optimizer,
    exact,
    exact_or_refused,
    made,
    network,
    private,
    quiet,
    refused,
    same_gradient,
)

# First a pass whose samples are separate by their values, then one whose samples are not.

LATER = Family()


def between(mix, *rest, outlier=50.0, scale=10.0):
    """`mix(h, *rest)` between two layers; `rest` is that of the passes, in turn."""
    net, (x, y) = network(), batch(outlier=outlier)

    def loss(x, y, *rest):
        return ce(net[2](scale * mix(net[0](x).tanh(), *rest)), y)

    def own(n, x, y, *rest):
        return ce(net[2](scale * net[0](x[n : n + 1]).tanh()), y[n : n + 1])

    passes = [(x, y, *values) for values in rest]
    return made(net.parameters(), loss, *passes, own=own, coupled=True)


def centred(h, w):
    return h - w * h.mean(0)


def wired(h, mix):
    c = torch.zeros(len(h), H)
    return h - (h if mix else c).mean(0)


def wired_to_constants(h, mix):
    c = h * 0.0
    return h - (h if mix else c).sum(0)


def mixup(h, lam, shift):
    permutation = torch.arange(len(h)).roll(shift)
    return lam * h + (1 - lam) * h[permutation]


def attention(h, full):
    mask = torch.ones(len(h), len(h)).bool() if full else torch.eye(len(h)).bool()
    return (h @ h.t()).masked_fill(~mask, -torch.inf).softmax(-1) @ h


def attention_of_torch(h, full):
    mask = torch.ones(len(h), len(h)).bool() if full else torch.eye(len(h)).bool()
    h = h[None]
    return F.scaled_dot_product_attention(h, h, h, attn_mask=mask)[0]


def graph_convolution(h, edge):
    return (torch.eye(len(h)) + torch.diag(torch.full((len(h) - 1,), edge), 1)) @ h


def graph_convolution_by_index(h, shift):
    nodes = torch.arange(len(h))
    return h.index_add(0, nodes, h[nodes.roll(shift)]) / 2


def sparse_graph_convolution(h, edge):
    dense = torch.eye(len(h)) + torch.diag(torch.full((len(h) - 1,), edge), 1)
    return dense.to_sparse() @ h


def shifted(h, s):
    return (h + torch.cat([h[s:], h[:s]])) / 2


def rolled(h, s):
    return (h + h.roll(s, 0)) / 2


def gathered(h, s):
    rows = torch.arange(len(h)).roll(s)
    return (h + h.gather(0, rows[:, None].expand(-1, h.shape[1]))) / 2


def scattered(h, s):
    rows = torch.arange(len(h)).roll(s)
    return torch.zeros(len(h), H).scatter(0, rows[:, None].expand(-1, H), h)


def sliced_in_place(h, s):
    out = h.clone()
    out[: len(h) - s] = (h[: len(h) - s] + h[s:]) / 2
    return out


def strided(h, s):
    return (h + h.as_strided(h.shape, (s * H, 1))) / 2


def chosen(h, mix):
    other = h.flip(0)
    return torch.where(torch.full((len(h), 1), mix), other, h)


def gated(h, threshold):
    """A neighbour takes part where it is large enough."""
    return h * (1 + F.relu(h.roll(1, 0).amax(1, keepdim=True) - threshold))


for mix, *values in [
    (centred, (0.0,), (1.0,)),
    (wired, (False,), (True,)),
    (wired_to_constants, (False,), (True,)),
    (mixup, (1.0, 1), (0.7, 1)),
    (mixup, (0.7, 0), (0.7, 1)),
    (attention, (False,), (True,)),
    (attention_of_torch, (False,), (True,)),
    (graph_convolution, (0.0,), (1.0,)),
    (graph_convolution_by_index, (0,), (1,)),
    (sparse_graph_convolution, (0.0,), (1.0,)),
    (shifted, (0,), (1,)),
    (rolled, (0,), (1,)),
    (gathered, (0,), (1,)),
    (sliced_in_place, (0,), (1,)),
    (chosen, (False,), (True,)),
    (gated, (9.0,), (0.0,)),
]:
    name = mix.__name__.replace("_", "-")
    at_first = "-".join(str(v) for v in values[0])
    LATER.add(f"{name}-{at_first}", between, mix, *values)


@LATER
def scattered_to_other_labels():
    """A permutation alone is separate; what makes it wrong is that labels do not follow."""
    net, (x, y) = network(), batch(outlier=50)

    def loss(x, y, s):
        h = net[0](x).tanh()
        return ce(net[2](h + scattered(h, s)), y)

    def own(n, x, y, s):
        h = net[0](x[n : n + 1]).tanh()
        return ce(net[2](2 * h), y[n : n + 1])

    return made(net.parameters(), loss, (x, y, 0), (x, y, 1), own=own, coupled=True)


@LATER
def entropy_of_the_mean_prediction():
    net, (x, y) = network(), batch(outlier=50)

    def loss(x, y, w):
        z = net(x)
        mean = z.softmax(1).mean(0)
        return ce(z, y) + w * (mean * mean.log()).sum()

    def own(n, x, y, w):
        return ce(net(x[n : n + 1]), y[n : n + 1])

    return made(net.parameters(), loss, (x, y, 0.0), (x, y, 1.0), own=own, coupled=True)


@LATER
def mixup_of_the_labels_too():
    net, (x, y) = network(), batch(outlier=50)

    def loss(x, y, lam):
        other = torch.arange(len(x)).roll(1)
        h = net[0](x).tanh()
        z = net[2](10 * (lam * h + (1 - lam) * h[other]))
        return lam * ce(z, y) + (1 - lam) * ce(z, y[other])

    def own(n, x, y, lam):
        return ce(net[2](10 * net[0](x[n : n + 1]).tanh()), y[n : n + 1])

    return made(net.parameters(), loss, (x, y, 1.0), (x, y, 0.7), own=own, coupled=True)


@LATER
def other_model_with_the_same_first_parameter():
    first, last = nn.Linear(D, 5), nn.Linear(5, C)
    x, y = batch(outlier=50)

    def loss(x, y, mix):
        h = first(x).tanh()
        k = h.roll(1, 0)
        z = k if mix else h
        return ce(last(h + z) * 1.0 + 0.0 * last(h + k), y)

    def own(n, x, y, mix):
        return ce(last(2 * first(x[n : n + 1]).tanh()), y[n : n + 1])

    params = [*first.parameters(), *last.parameters()]
    return made(params, loss, (x, y, False), (x, y, True), own=own, coupled=True)


FRESH = Family()  # the coupled pass of each, with nothing before it


def only_last(build):
    m = build()
    m.passes = m.passes[-1:]
    return m


for row in LATER:
    FRESH.add(row.id, only_last, row.build)


@LATER.each
def test_coupled_after_a_separate_pass(situation):
    refused(situation)


@FRESH.each
def test_coupled_at_once(situation):
    refused(situation)


@LATER.each
def test_coupled_after_a_separate_pass_in_private_steps(situation):
    bounded(situation)


@LATER.each
@every_optimizer
def test_coupled_after_a_separate_pass_in_steps(situation, optimizer):
    """Torch's gradient, or an error on measured steps."""
    same_gradient(situation, optimizer, COUPLED)


# A gate in front of batch statistics.


class Gated(nn.Module):
    def __init__(self, statistics):
        super().__init__()
        self.a, self.b, self.statistics = nn.Linear(D, 5), nn.Linear(5, C), statistics
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(h + self.gate * self.statistics(h))


def mean_of_the_batch(h):
    return h.mean(0, keepdim=True).expand_as(h)


def normalized(h):
    return (h - h.mean(0)) / (h.std(0) + 1e-5)


GATES = Family()


def gate(statistics, start):
    net, data = Gated(statistics), batch(outlier=50)
    with torch.no_grad():
        net.b.weight.mul_(20)
        net.gate.fill_(start)

    def opened():
        net.gate.data.fill_(3.0)

    passes = [Pass(data, coupled=True), Pass(data, coupled=True, before=opened)]
    return made(net.parameters(), lambda x, y: ce(net(x), y), *passes)


for statistics in (mean_of_the_batch, normalized):
    for start in (0.0, 3.0):
        GATES.add(f"{statistics.__name__}-{start}", gate, statistics, start)


@GATES.each
def test_gate_in_front_of_batch_statistics(situation):
    refused(situation)


@GATES.each
def test_gate_in_front_of_batch_statistics_in_private_steps(situation):
    bounded(situation)


# A batch that is not finite proves nothing.


def not_finite(value):
    net, (x, y) = network(), batch(outlier=50)
    broken = x.clone()
    broken[0, 0] = value

    def loss(x, y):
        return ce(10 * net[2](normalized(net[0](x)).tanh()), y)

    passes = [Pass((broken, y), coupled=True), Pass((x, y), coupled=True)]
    return made(net.parameters(), loss, *passes)


def not_finite_but_separate(value):
    net, (x, y) = network(), batch()
    broken = x.clone()
    broken[0, 0] = value
    return made(net.parameters(), lambda x, y: ce(net(x), y), (x, y)), broken


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_batch_that_is_not_finite_before_clean_ones(value):
    family = Family()
    family.add("not-finite", not_finite, value)
    refused(family[0], f"finite|{COUPLED}")
    bounded(family[0], match=f"finite|{COUPLED}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sample_that_is_not_finite_is_left_out_of_private_steps(value):
    torch.manual_seed(0)
    m, broken = not_finite_but_separate(value)
    opt, (x, y) = private(m), m.passes[0].data
    opt.step(lambda: m.loss(broken, y))
    whole = [p.grad.clone() for p in m.params]
    assert opt.nonfinite_samples == 1
    opt.step(lambda: m.loss(x[1:], y[1:]))
    for p, grad in zip(m.params, whole, strict=True):
        torch.testing.assert_close(p.grad, grad)


# Fixed draws and thresholds.

EDGES = [(24, 4), (4, 24), (0, 1), (63, 0), (17, 31)]


def edge(i, j, weight, n=64):
    net, (x, y) = network(), batch(n)
    matrix = torch.eye(n)
    matrix[i, j] = weight

    def loss(x, y):
        return ce(net[2](matrix @ net[0](x).tanh()), y)

    return made(net.parameters(), loss, (x, y), coupled=True)


def indexed_edge(i, j, n=64):
    """Row i also reads row j: by index, so that nothing else tells."""
    net, (x, y) = network(), batch(n)
    other = torch.arange(n)
    other[i] = j

    def loss(x, y):
        h = net[0](x).tanh()
        return ce(net[2](h + h[other]), y)

    return made(net.parameters(), loss, (x, y), coupled=True)


COUPLED_PAIRS = Family()
for i, j in EDGES:
    COUPLED_PAIRS.add(f"matrix-{i}-{j}", edge, i, j, 1.0)
    COUPLED_PAIRS.add(f"index-{i}-{j}", indexed_edge, i, j)
COUPLED_PAIRS.add("matrix-1e-3", edge, 0, 1, 1e-3)
COUPLED_PAIRS.add("matrix-1e-9", edge, 0, 1, 1e-9)


@COUPLED_PAIRS.each
def test_two_samples_of_64_are_coupled(situation):
    refused(situation, f"{COUPLED}|\\[64, 64\\]")


def slightly(w):
    return between(centred, (w,))


SLIGHTLY = Family()
for w in (1e-2, 1e-3, 1e-6, 1e-12):
    SLIGHTLY.add(str(w), slightly, w)


@SLIGHTLY.each
def test_slightly_coupled(situation):
    refused(situation)


HALVES = {
    "first-two": lambda h: torch.cat([h[:2].flip(0), h[2:]]),
    "within-both-halves": lambda h: h.unflatten(0, (2, -1)).flip(1).flatten(0, 1),
    "even-and-odd": lambda h: h.unflatten(0, (-1, 2)).flip(1).flatten(0, 1),
    "across-the-halves": lambda h: h.roll(N // 2, 0),
    "slightly": lambda h: h + 1e-4 * h.mean(0),
}


@pytest.mark.parametrize("mix", HALVES)
@pytest.mark.parametrize("derivative", ["batch_jacobian", "batch_hessian", "batch_hessian_diag"])
def test_derivatives_in_inputs_check_all_pairs(derivative, mix):
    net, (x, _) = network(), batch()

    def f(x):
        h = net(x)
        return (h + HALVES[mix](h)).tanh()

    if derivative != "batch_jacobian":
        g, f = f, lambda x: g(x).sum(1)
    with pytest.raises(curvopt.CurvoptError, match="(?i:sample)"):
        getattr(curvopt, derivative)(f, x)


# Scripted code and custom functions.


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        x = x - x.mean(0)
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        back = g @ w
        return back - back.mean(0), g.t() @ x


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class Statistics(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0) + 1.0)


class Trunk(nn.Module):
    """A scripted trunk and an eager head."""

    def __init__(self, *layers):
        super().__init__()
        self.trunk = torch.jit.script(nn.Sequential(*layers))
        self.head = nn.Linear(5, C)

    def forward(self, x):
        return self.head(self.trunk(x))


def scripted(*layers):
    return torch.jit.script(nn.Sequential(*layers))


def traced(*layers):
    with warnings.catch_warnings():  # that a batch norm in training mode is no function
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Sequential(*layers), torch.randn(N, D), check_trace=False)


def of_model(make):
    net, data = make(), batch(outlier=50)
    return made(net.parameters(), lambda x, y: ce(20 * net(x), y), data, coupled=True)


def of_weights(forward, coupled=True):
    w, v = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.randn(C, 5))
    return made([w, v], lambda x, y: ce(forward(x, w, v), y), batch(outlier=50), coupled=coupled)


def layers(norm):
    return nn.Linear(D, 5), norm, nn.Tanh(), nn.Linear(5, C)


UNRECORDED = Family()
UNRECORDED.add("scripted-batch-norm", of_model, lambda: scripted(*layers(nn.BatchNorm1d(5))))
UNRECORDED.add("scripted-statistics", of_model, lambda: scripted(*layers(Statistics())))
UNRECORDED.add("traced-batch-norm", of_model, lambda: traced(*layers(nn.BatchNorm1d(5))))
UNRECORDED.add("traced-statistics", of_model, lambda: traced(*layers(Statistics())))
UNRECORDED.add(
    "scripted-trunk", of_model, lambda: Trunk(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Tanh())
)
UNRECORDED.add(
    "scripted-statistics-between", of_model,
    lambda: nn.Sequential(nn.Linear(D, 5), torch.jit.script(Statistics()), nn.Linear(5, C)),
)  # fmt: skip
UNRECORDED.add(
    "function-that-centres", of_weights,
    lambda x, w, v: F.linear(Centred.apply(x, w).tanh(), v),
)  # fmt: skip
UNRECORDED.add(
    "function-that-centres-last", of_weights,
    lambda x, w, v: Centred.apply(F.linear(x, w).tanh(), v),
)  # fmt: skip
UNRECORDED.add(
    "centred-between-functions", of_weights,
    lambda x, w, v: Linear.apply(normalized(Linear.apply(x, w)).tanh(), v),
)  # fmt: skip
UNRECORDED.add(
    "centred-after-a-function", of_weights,
    lambda x, w, v: F.linear(normalized(Linear.apply(x, w)).tanh(), v),
)  # fmt: skip
UNRECORDED.add(
    "centred-before-a-function", of_weights,
    lambda x, w, v: Linear.apply(normalized(F.linear(x, w)).tanh(), v),
)  # fmt: skip


def out_of_sight(x, w, v):
    with torch._C.DisableTorchFunction():
        h = normalized(F.linear(x, w)).tanh()
    return F.linear(h, v)


UNRECORDED.add("disabled-torch-function", of_weights, out_of_sight)

scripts = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning"
)


@scripts
@UNRECORDED.each
def test_coupled_where_nothing_is_recorded(situation):
    refused(situation)


@scripts
@UNRECORDED.each
def test_coupled_where_nothing_is_recorded_in_private_steps(situation):
    bounded(situation)


SEPARATE = Family()  # the same without the statistics: exact


def separate_model(make):
    m = of_model(make)
    m.passes[-1].coupled = False
    return m


SEPARATE.add("scripted", separate_model, lambda: scripted(*layers(nn.LayerNorm(5))))
SEPARATE.add("traced", separate_model, lambda: traced(*layers(nn.Tanh())))
SEPARATE.add("scripted-trunk", separate_model, lambda: Trunk(nn.Linear(D, 5), nn.Tanh()))
SEPARATE.add(
    "scripted-batch-norm-in-eval-mode", separate_model,
    lambda: torch.jit.script(nn.Sequential(*layers(nn.BatchNorm1d(5))).eval()),
)  # fmt: skip
SEPARATE.add(
    "functions", of_weights, lambda x, w, v: Linear.apply(Linear.apply(x, w).tanh(), v), False
)
SEPARATE.add(
    "a-function-first", of_weights, lambda x, w, v: F.linear(Linear.apply(x, w).tanh(), v), False
)
SEPARATE.add(
    "a-function-last", of_weights, lambda x, w, v: Linear.apply(F.linear(x, w).tanh(), v), False
)


@scripts
@SEPARATE.each
def test_separate_where_nothing_is_recorded(situation):
    exact(situation)


@scripts
@SEPARATE.each
@every_optimizer
def test_separate_where_nothing_is_recorded_in_steps(situation, optimizer):
    same_gradient(situation, optimizer, warm=4)


# What gradients cannot see.

UNSEEN = Family()


def in_front(prepare):
    net, data = network(), batch(outlier=50)
    return made(net.parameters(), lambda x, y: ce(20 * net(prepare(x)), y), data, coupled=True)


def in_the_middle(change):
    net, data = network(), batch(outlier=50)
    return made(
        net.parameters(),
        lambda x, y: ce(20 * net[2](change(net[0](x)).tanh()), y),
        data,
        coupled=True,
    )


def batch_norm(x):
    return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


def without_gradient(statistics):
    def change(h):
        with torch.no_grad():
            mean, scale = statistics(h)
        return (h - mean) / (scale + 1e-3)

    return change


def detached(h):
    return (h - h.detach().mean(0)) / (h.detach().std(0) + 1e-3)


def moments(h):
    return h.mean(0), h.std(0)


def frozen_extractor(script=False, track=True):
    extractor = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, track_running_stats=track)).train()
    extractor = torch.jit.script(extractor) if script else extractor

    def prepare(x):
        with torch.no_grad():
            return extractor(x)

    return in_front(prepare)


def frozen_by_flags():
    extractor = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).requires_grad_(False)
    return in_front(extractor)


class Context(nn.Module):
    """Its mean over what lies in a buffer is taken from all samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, H), nn.Linear(H, C)
        self.register_buffer("context", torch.zeros(1, D))

    def forward(self, x):
        return self.b(self.a(x).tanh() - self.a(self.context).tanh().mean(0))


def kept_in_a_buffer(keep):
    net = Context()

    def loss(x, y):
        net.context = keep(x)
        return ce(20 * net(x), y)

    return made(net.parameters(), loss, batch(outlier=50), coupled=True)


class Filled(nn.Module):
    """Has its batch in a buffer before it is called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, C)
        self.register_buffer("x", torch.zeros(N, D))

    def forward(self):
        return self.linear(normalized(self.x))


def filled_before(fill):
    net = Filled()

    def loss(x, y):
        fill(net, x)
        return ce(20 * net(), y)

    return made(net.parameters(), loss, batch(outlier=50), coupled=True)


class Weighed(nn.Module):
    """Has its batch in itself, and is called with something else beside it."""

    def __init__(self, prepare, parameter):
        super().__init__()
        self.linear, self.prepare = nn.Linear(D, C), prepare
        if parameter:
            self.x = nn.Parameter(torch.zeros(N, D), requires_grad=False)
        else:
            self.register_buffer("x", torch.zeros(N, D))

    def forward(self, mask):
        return self.linear(self.prepare(self.x) * mask)


def weighed(prepare, shape, parameter=False):
    net = Weighed(prepare, parameter)
    mask = torch.rand(shape).round() + 0.5

    def loss(x, y, mask):
        net.x = nn.Parameter(x, requires_grad=False) if parameter else x
        return ce(20 * net(mask), y)

    coupled = prepare is not same
    params = net.linear.parameters()
    return made(params, loss, (*batch(outlier=50 if coupled else 1), mask), coupled=coupled)


def same(x):
    return x


class Handed(nn.Module):
    """Gives its child the batch, in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.child = nn.Linear(D, C), nn.Module()
        self.child.register_buffer("x", None)
        self.child.forward = lambda: normalized(self.child.x)

    def forward(self, x):
        self.child.x = x if isinstance(x, torch.Tensor) else x.value
        return self.linear(self.child())


@dataclass
class Held:
    value: torch.Tensor


def handed_to_a_child(call):
    net = Handed()
    net(torch.zeros(2, D))
    return made(
        net.parameters(), lambda x, y: ce(20 * call(net, x), y), batch(outlier=50), coupled=True
    )


def two_towers():
    users, items = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(6, 4))

    def loss(i, j):
        return ce(users[i] @ items[j].T, torch.arange(len(i)))

    data = torch.randint(5, (N,)), torch.randint(6, (N,))
    return made([users, items], loss, data, coupled=True)


def by_labels(pick, reduce=torch.mean):
    net = network()
    return made(
        net.parameters(), lambda x, y: -reduce(pick((20 * net(x)).log_softmax(1), y)),
        batch(outlier=50), coupled=True,
    )  # fmt: skip


def of_the_losses(reduce):
    net, data = network(), batch(outlier=50)
    return made(
        net.parameters(),
        lambda x, y: reduce(ce(10 * net(x), y, reduction="none")),
        data,
        coupled=True,
    )


UNSEEN.add("centred-input", in_front, lambda x: x - x.mean(0))
UNSEEN.add("standardized-input", in_front, normalized)
UNSEEN.add("ranked-input", in_front, lambda x: x.argsort(0).argsort(0).to(x) / len(x))
UNSEEN.add("largest-features-of-the-batch", in_front, lambda x: x * (x >= x.amax(0) / 2))
UNSEEN.add("input-scaled-by-its-norm", in_front, lambda x: x / torch.linalg.vector_norm(x))
UNSEEN.add("batch-norm-of-the-input", in_front, batch_norm)
UNSEEN.add("functional-batch-norm", in_front, lambda x: F.batch_norm(x, None, None, training=True))
UNSEEN.add(
    "module-without-statistics", in_front,
    nn.BatchNorm1d(D, affine=False, track_running_stats=False),
)  # fmt: skip
UNSEEN.add("batch-norm-in-the-middle", in_the_middle, batch_norm)
UNSEEN.add("no-grad-statistics", in_the_middle, without_gradient(moments))
UNSEEN.add("detached-statistics", in_the_middle, detached)
UNSEEN.add("detached-largest", in_the_middle, lambda h: h / h.detach().abs().max())
UNSEEN.add(
    "top-k-of-the-batch", in_the_middle,
    lambda h: h * (h.detach().norm(dim=1) >= h.detach().norm(dim=1).topk(4).values[-1])[:, None],
)  # fmt: skip
UNSEEN.add(
    "features-chosen-by-variance", in_the_middle,
    lambda h: h * torch.zeros(H).index_fill(0, h.detach().var(0).topk(2).indices, 1.0),
)  # fmt: skip
UNSEEN.add("frozen-extractor", frozen_extractor)
UNSEEN.add("scripted-frozen-extractor", frozen_extractor, script=True)
UNSEEN.add("scripted-frozen-extractor-without-buffers", frozen_extractor, script=True, track=False)
UNSEEN.add("frozen-extractor-by-flags", frozen_by_flags)
UNSEEN.add("batch-in-a-buffer", kept_in_a_buffer, lambda x: x)
UNSEEN.add("batch-in-a-buffer-as-a-view", kept_in_a_buffer, lambda x: x.detach()[:, :])
UNSEEN.add("batch-in-a-buffer-before-the-call", filled_before, lambda net, x: net.x.copy_(x))
UNSEEN.add("batch-for-a-buffer-before-the-call", filled_before, lambda net, x: setattr(net, "x", x))
UNSEEN.add("batch-in-a-childs-buffer", handed_to_a_child, lambda net, x: net(x))
UNSEEN.add("batch-in-a-childs-buffer-by-keyword", handed_to_a_child, lambda net, x: net(x=x))
UNSEEN.add("batch-in-a-childs-buffer-in-an-object", handed_to_a_child, lambda net, x: net(Held(x)))
WEIGHED = Family()
for name, shape in {"features": (D,), "rows": (N, 1), "elements": (N, D)}.items():
    for parameter in (False, True):
        place = "frozen-parameter" if parameter else "buffer"
        UNSEEN.add(f"batch-in-a-{place}-beside-{name}", weighed, normalized, shape, parameter)
        WEIGHED.add(f"{place}-beside-{name}", weighed, same, shape, parameter)
UNSEEN.add("softmax-of-a-batch-in-a-buffer", weighed, lambda x: x.softmax(0), (N, 1))
UNSEEN.add("batch-norm-of-a-batch-in-a-buffer", weighed, batch_norm, (N, 1))
UNSEEN.add("items-of-the-batch-as-negatives", two_towers)
UNSEEN.add("labels-as-columns", by_labels, lambda lp, y: lp[:, y])
UNSEEN.add("label-of-one-for-all", by_labels, lambda lp, y: lp.index_select(1, y[:1]))
UNSEEN.add("labels-in-another-order", by_labels, lambda lp, y: lp[torch.arange(len(y)), y.flip(0)])
UNSEEN.add(
    "rows-above-the-mean", by_labels, lambda lp, y: lp[lp[:, 0] > lp[:, 0].mean()].sum()[None]
)
UNSEEN.add(
    "elements-by-the-labels-of-others", by_labels,
    lambda lp, y: lp.masked_select(F.one_hot(y.flip(0), C) == 1),
)  # fmt: skip
UNSEEN.add("rows-by-the-labels-of-others", by_labels, lambda lp, y: lp[y.flip(0) > 0, 0])
UNSEEN.add(
    "rows-found-by-the-labels-of-others", by_labels,
    lambda lp, y: lp[(y.roll(1) > 0).nonzero()[:, 0]].sum(1),
)  # fmt: skip
UNSEEN.add(
    "rows-chosen-by-the-labels-of-others", by_labels,
    lambda lp, y: lp[:, 0].index_select(0, (y.flip(0) == 2).nonzero()[:, 0]), torch.sum,
)  # fmt: skip
UNSEEN.add("labels-one-row-late", by_labels, lambda lp, y: lp[:-1][y[1:] > 0, 0])
UNSEEN.add("loss-by-itself", of_the_losses, lambda rows: rows.mean() / rows.mean().detach())
UNSEEN.add("hardest-losses", of_the_losses, lambda rows: rows.topk(4).values.mean())
UNSEEN.add("largest-loss", of_the_losses, lambda rows: rows.max())
UNSEEN.add(
    "weighted-by-detached-softmax", of_the_losses,
    lambda rows: (rows * rows.detach().softmax(0)).sum(),
)  # fmt: skip
UNSEEN.add(
    "weighted-by-standardized", of_the_losses,
    lambda rows: (rows * normalized(rows.detach())).mean(),
)  # fmt: skip


@scripts
@UNSEEN.each
def test_coupling_that_gradients_cannot_see(situation):
    refused(situation, f"{COUPLED}|topk|coefficient|weights")


@scripts
@UNSEEN.each
def test_coupling_that_gradients_cannot_see_in_private_steps(situation):
    bounded(situation, match=f"{COUPLED}|topk|coefficient|weights")


@WEIGHED.each
def test_batch_kept_beside_what_the_model_is_called_with(situation):
    exact(situation)


@WEIGHED.each
def test_batch_kept_beside_what_the_model_is_called_with_in_private_steps(situation):
    shared = situation.id.endswith("features")  # a mask for all samples is to be a buffer
    bounded(situation, accepted=not shared, match="all samples share data" if shared else None)


class Aligned(nn.Module):
    """Constants as long as the batch, on other axes than the samples'; its state is theirs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, N), nn.Linear(N, C)
        self.mix = nn.Parameter(torch.randn(N, N), requires_grad=False)
        self.norm = nn.BatchNorm1d(N).requires_grad_(False).eval()
        self.register_buffer("places", torch.randn(N, N))
        self.register_buffer("order", torch.randperm(N))
        self.register_buffer("table", torch.randn(N, N))

    def forward(self, x, k):
        h = self.norm(self.a(x)) @ self.mix + self.places.mean(0)
        h = h[:, self.order] + (h @ self.places.T).softmax(1) @ self.places.cos()
        tokens = (h[:, :, None] * self.places + self.table[k][:, None]).tanh()
        return self.b(tokens.mean(1) + tokens[torch.arange(len(x)), k])


@pytest.mark.parametrize("draw", [torch.randperm, lambda n: torch.arange(n).flip(0) // 2])
def test_constants_as_long_as_the_batch_are_no_data(draw):
    """A table of which every sample draws another row, too."""

    def build():
        net, (x, y) = Aligned(), batch()
        params = [p for p in net.parameters() if p.requires_grad]
        return made(params, lambda x, k, y: ce(net(x, k), y), (x, draw(N), y))

    family = Family()
    family.add("aligned", build)
    exact(family[0])
    bounded(family[0], accepted=True)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_frozen_weights_as_long_as_the_batch_are_no_data(kind):
    """At the first step a state that is no sample's meets them, with as many rows as samples."""

    def build():
        net = nn.ModuleList([kind(N, N, batch_first=True), nn.Linear(N, C)])
        net[0].requires_grad_(False)

        def loss(x, y):
            return ce(net[1](net[0](x)[0][:, -1]), y)

        return made(net[1].parameters(), loss, (torch.randn(N, 3, N), torch.arange(N) % C))

    family = Family()
    family.add("frozen", build)
    exact(family[0])


# Rows of several lengths, and experts.


class Ragged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x, mask):
        rows, owner = self.a(x[mask]).tanh(), mask.nonzero()[:, 0]
        return self.b(torch.zeros(len(x), 5).index_add(0, owner, rows))


class RaggedWritten(Ragged):
    def forward(self, x, mask):
        h = x.new_zeros(*x.shape[:2], 5)
        h[mask] = self.a(x[mask]).tanh()
        return self.b(h.sum(1))


def lengths(n, t, *counts):
    return torch.arange(t)[None] < torch.tensor(counts)[:, None]


def ragged(kind, *all_counts, n=4, t=6):
    net, x, y = kind(), 3 * torch.randn(n, t, D), torch.randint(C, (n,))
    passes = [(x, lengths(n, t, *counts), y) for counts in all_counts]
    return made(net.parameters(), lambda x, mask, y: ce(net(x, mask), y), *passes)


def packed_rows(*all_counts, n=4, t=6):
    """A linear layer on the data of a packed sequence."""
    first, recurrent, head = nn.Linear(D, 5), nn.GRU(5, 5, batch_first=True), nn.Linear(5, C)
    x, y = torch.randn(n, t, D), torch.randint(C, (n,))

    def loss(x, counts, y):
        p = pack_padded_sequence(x, counts, batch_first=True, enforce_sorted=False)
        p = p._replace(data=first(p.data))
        return ce(head(recurrent(p)[1][-1]), y)

    params = [*first.parameters(), *recurrent.parameters(), *head.parameters()]
    return made(params, loss, *[(x, torch.tensor(counts), y) for counts in all_counts])


RAGGED = Family()
EQUAL, UNEQUAL, OTHER, ODD = (3, 3, 3, 3), (1, 5, 2, 4), (4, 2, 5, 1), (1, 5, 2, 5)
for kind in (Ragged, RaggedWritten):
    name = kind.__name__.lower()
    RAGGED.add(f"{name}-equal-then-unequal", ragged, kind, EQUAL, UNEQUAL)
    RAGGED.add(f"{name}-unequal", ragged, kind, UNEQUAL, OTHER, EQUAL)
    RAGGED.add(f"{name}-no-multiple", ragged, kind, ODD, UNEQUAL)
    RAGGED.add(f"{name}-as-many-samples-as-tokens", ragged, kind, (1, 2, 3, 4), n=4, t=4)
RARE = Family()  # right, or refused
RARE.add("packed-equal-then-unequal", packed_rows, EQUAL, UNEQUAL)
RARE.add("packed-unequal", packed_rows, UNEQUAL, ODD)


class Experts(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.first, self.last, self.write = nn.Linear(D, 5), nn.Linear(5, C), write
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x, route):
        h = self.first(x).tanh()
        flat, out = h.flatten(0, 1), torch.zeros(h.shape[0] * h.shape[1], 5)
        for k, expert in enumerate(self.experts):
            out = self.write(out, flat, route.flatten() == k, expert)
        return self.last(out.view_as(h).mean(1))


def by_index_add(out, flat, chosen, expert):
    rows = chosen.nonzero()[:, 0]
    return out.index_add(0, rows, expert(flat[rows]).tanh())


def by_index_select(out, flat, chosen, expert):
    rows = chosen.nonzero(as_tuple=True)[0]
    return out.index_add_(0, rows, expert(flat.index_select(0, rows)).tanh())


def by_mask(out, flat, chosen, expert):
    out = out.clone()
    out[chosen] = expert(flat[chosen]).tanh()
    return out


def by_masked_scatter(out, flat, chosen, expert):
    return out.masked_scatter(chosen[:, None], expert(flat[chosen]).tanh())


def routed(write, *routes):
    """Two samples of eight tokens."""
    net, x, y = Experts(write), torch.randn(2, 8, D), torch.randint(C, (2,))
    passes = [(x, torch.tensor([[0] * a + [1] * (8 - a), [0] * b + [1] * (8 - b)]), y)
              for a, b in routes]  # fmt: skip
    return made(net.parameters(), lambda x, route, y: ce(net(x, route), y), *passes)


for write in (by_index_add, by_index_select, by_mask, by_masked_scatter):
    name = write.__name__.replace("_", "-")
    family = RARE if write is by_masked_scatter else RAGGED
    family.add(f"experts-{name}-even-then-uneven", routed, write, (4, 4), (6, 2))
    family.add(f"experts-{name}-uneven", routed, write, (5, 2), (2, 6), (6, 2))


@RAGGED.each
def test_rows_of_several_lengths(situation):
    exact(situation)


@RAGGED.each
def test_rows_of_several_lengths_in_private_steps(situation):
    bounded(situation, accepted=True)


@RAGGED.each
@every_optimizer
def test_rows_of_several_lengths_in_steps(situation, optimizer):
    same_gradient(situation, optimizer)


@RARE.each
def test_rows_of_several_lengths_written_otherwise(situation):
    exact_or_refused(situation, COUPLED)


@RARE.each
def test_rows_of_several_lengths_written_otherwise_in_private_steps(situation):
    bounded(situation, match=COUPLED)


def mixture(words, n, t):
    """A small Qwen2-MoE as transformers has it, with its experts one after the other."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=words, hidden_size=8, intermediate_size=8, moe_intermediate_size=4,
        shared_expert_intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
        max_position_embeddings=16, experts_implementation="eager", attn_implementation="eager",
    )  # fmt: skip
    net = Qwen2MoeForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) / 4)  # routers start at zero
    passes = [(torch.randint(1, words, (n, t)),) for _ in range(BATCHES)]
    params = list(net.parameters())

    def loss(ids):
        return net(input_ids=ids, labels=ids, use_cache=False).loss

    # Its router goes through float32.
    return made(params, loss, *passes, rtol=1e-4)


BATCHES = int(os.environ.get("CURVOPT_MIXTURE_BATCHES", "12"))  # 200 before a release
MIXTURES = Family()
MIXTURES.add("2-samples", mixture, 7, 2, 4)
MIXTURES.add("4-samples", mixture, 7, 4, 4)


@MIXTURES.each
def test_mixture_of_experts_of_hugging_face(situation):
    exact(situation)


def test_mixture_of_experts_of_hugging_face_in_private_steps():
    m = MIXTURES[1].make()
    m.passes = m.passes[:3]
    family = Family()
    family.add("mixture", lambda: m)
    bounded(family[0], accepted=True)


# Code that is switched on later: right at once, and afterwards.


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.register_buffer("ids", torch.arange(4))

    def forward(self, h):
        return h + self.table(self.ids)


class Later(nn.Module):
    """An embedding, and a second stage that is chosen from pass to pass."""

    def __init__(self, stage):
        super().__init__()
        self.words, self.out = nn.Embedding(10, 4), nn.Linear(4, C)
        self.positions, self.recurrent = Positions(), nn.LSTM(4, 4, batch_first=True)
        self.script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.stage = stage

    def forward(self, ids, counts, on):
        h = self.words(ids)
        return self.out(self.stage(self, h, counts) if on else h.mean(1))


def with_positions(net, h, counts):
    return net.positions(h).mean(1)


def with_packed_recurrence(net, h, counts):
    p = pack_padded_sequence(h, counts, batch_first=True, enforce_sorted=False)
    return net.recurrent(p)[1][0][-1]


def with_a_script(net, h, counts):
    return net.script(h).mean(1)


def with_a_function(net, h, counts):
    return Linear.apply(h.mean(1), net.positions.table.weight)


def switched(stage, first):
    net = Later(stage)
    ids, y = torch.randint(10, (4, 4)), torch.randint(C, (4,))
    counts = torch.tensor([2, 4, 3, 1])
    passes = [(ids, counts, y, on) for on in (first, first, not first, not first, first)]
    return made(net.parameters(), lambda i, n, y, on: ce(net(i, n, on), y), *passes)


SWITCHED = Family()
for stage in (with_positions, with_packed_recurrence, with_a_script, with_a_function):
    for first in (False, True):
        name = stage.__name__.replace("_", "-")
        SWITCHED.add(f"{name}-{'off' if first else 'on'}-later", switched, stage, first)


@scripts
@SWITCHED.each
def test_branch_switched_later(situation):
    exact(situation)


@scripts
@SWITCHED.each
def test_branch_switched_later_in_private_steps(situation):
    """Parameters that take no part in a pass get a sum of zero."""
    bounded(situation, accepted=True)


@scripts
@SWITCHED.each
@every_optimizer
def test_branch_switched_later_in_steps(situation, optimizer):
    same_gradient(situation, optimizer, warm=4)


@scripts
@SWITCHED.each
@every_optimizer
def test_every_step_measures_a_branch_switched_later(situation, optimizer):
    """With a measurement at every step, so that the switch meets one."""
    m = situation.make()
    name = "variance_every" if optimizer == "variance_adaptive" else "curvature_every"
    opt = OPTIMIZERS[optimizer](m.params, lr=0.0, **{name: 1})
    for step in m.passes:
        quiet(opt.step, lambda step=step: m.loss(*step.data))
    assert opt.steps == len(m.passes)


# Buffers that are updated where no module hook can see it.


class Counts(nn.Module):
    """Remembers the largest activation, and uses it for nothing."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(5))
        self.layer = nn.Linear(D, 5)

    def forward(self, x):
        h = self.layer(x)
        self.largest.copy_(torch.maximum(self.largest, h.detach().abs().amax(0)))
        return h.tanh()


def by_script():
    return nn.Sequential(torch.jit.script(Counts()), nn.Linear(5, C))


def by_layers_script():
    return nn.Sequential(torch.jit.script(nn.Sequential(Counts())), nn.Linear(5, C))


def by_view():
    class Viewed(Counts):
        def forward(self, x):
            h = self.layer(x)
            self.largest.view(1, 5)[0, 1:].copy_(h.detach().abs().amax(0)[1:])
            return h.tanh()

    return nn.Sequential(Viewed(), nn.Linear(5, C))


def by_data():
    class Data(Counts):
        def forward(self, x):
            h = self.layer(x)
            self.largest.data.copy_(h.detach().abs().amax(0))
            return h.tanh()

    return nn.Sequential(Data(), nn.Linear(5, C))


@scripts
@pytest.mark.parametrize("make", [by_script, by_layers_script, by_view, by_data])
def test_buffers_that_see_samples_are_refused_in_private_steps(make):
    net, (x, y) = make(), batch()
    opt = curvopt.DPSGD(
        net.parameters(), 0.1, noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=N
    )
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        with pytest.raises(curvopt.CurvoptError, match="buffer"):
            opt.step(lambda: ce(net(x), y))
    assert all(map(torch.equal, before, net.parameters()))
