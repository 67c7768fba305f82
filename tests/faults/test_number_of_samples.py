"""The number of samples is found, whatever a closure touches before the model's first op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import curvopt
from tests.faults.situations import (
    CLIP,
    COUPLED,
    C,
    D,
    Family,
    H,
    N,
    batch,
    bounded,
    ce,
    clipped,
    computed,
    every_optimizer,
    exact,
    exact_or_refused,
    judge,
    made,
    must_refuse,
    network,
    one,
    private,
    quiet,
    rows_of,
    same_gradient,
)
from tests.oracles import assert_close

# Parameters and gradients are touched first.


def zero_grad_of_the_module(net):
    net.zero_grad(set_to_none=False)


def zero_grad_of_an_optimizer(net):
    torch.optim.SGD(net.parameters(), lr=0.1).zero_grad(set_to_none=False)


def zeroed_in_place(net):
    for p in net.parameters():
        if p.grad is not None:
            p.grad.zero_()


def norms_of_the_gradients_logged(net):
    return [p.grad.norm().item() for p in net.parameters() if p.grad is not None]


def norms_of_the_parameters_logged(net):
    return [p.detach().norm().item() for p in net.parameters()]


def norms_of_the_parameters_with_a_graph(net):
    return sum(p.square().sum() for p in net.parameters()).sqrt()


def gradients_clipped(net):
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)


def gradients_clipped_by_value(net):
    if any(p.grad is not None for p in net.parameters()):
        nn.utils.clip_grad_value_(net.parameters(), 1.0)


def weights_clamped(net):
    for p in net.parameters():
        p.data.clamp_(-10, 10)


def moving_average(net):
    if not hasattr(net, "average"):
        net.average = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for mean, p in zip(net.average, net.parameters(), strict=True):
            mean.mul_(0.9).add_(p, alpha=0.1)


def moving_average_by_foreach(net):
    if not hasattr(net, "average"):
        net.average = [p.detach().clone() for p in net.parameters()]
    torch._foreach_lerp_(net.average, [p.detach() for p in net.parameters()], 0.1)


def averaged_model(net):
    if not hasattr(net, "averaged"):
        object.__setattr__(net, "averaged", AveragedModel(network()))
    net.averaged.update_parameters(net)


FIRST = (
    zero_grad_of_the_module,
    zero_grad_of_an_optimizer,
    zeroed_in_place,
    norms_of_the_gradients_logged,
    norms_of_the_parameters_logged,
    norms_of_the_parameters_with_a_graph,
    gradients_clipped,
    gradients_clipped_by_value,
    weights_clamped,
    moving_average,
    moving_average_by_foreach,
    averaged_model,
)


def touched(first, grads):
    net, (x, y) = network(), batch()
    if grads:
        ce(net(x), y).backward()

    def loss(x, y):
        first(net)
        return ce(net(x), y)

    return made(net.parameters(), loss, (x, y), (x.flip(0), y))


TOUCHED = Family()
CLEAN = Family()
for first in FIRST:
    TOUCHED.add(first.__name__, touched, first, True)
    CLEAN.add(first.__name__, touched, first, False)


def judge_rows(situation):
    """Without `result.grad`: the closure changes what is in `p.grad`."""
    m = situation.make()
    for step in m.passes:
        result = quiet(
            curvopt.compute, lambda step=step: m.loss(*step.data), m.params, curvopt.BatchGrad()
        )
        assert_close(result.batch_grad, rows_of(m, step.data))


@TOUCHED.each
def test_gradients_are_there_and_touched(situation):
    judge_rows(situation)


@CLEAN.each
def test_parameters_are_touched(situation):
    exact(situation)


@CLEAN.each
def test_parameters_are_touched_in_private_steps(situation):
    bounded(situation, accepted=True)


@CLEAN.each
@every_optimizer
def test_parameters_are_touched_in_steps(situation, optimizer):
    """Twice, with the optimizer's own gradients the second time."""
    same_gradient(situation, optimizer)


# Constants and other tensors come first.

CONSTANTS = Family()  # exact in `compute`; a private step may ask to register them


@CONSTANTS
def normalized():
    net = network()
    mean, scale = [0.1307], [0.3081]

    def loss(x, y):
        return ce(net((x - torch.tensor(mean)) / torch.tensor(scale)), y)

    return made(net.parameters(), loss, batch(outlier=30))


@CONSTANTS
def normalized_constant_first():
    net = network()
    return made(net.parameters(), lambda x, y: ce(net(-torch.tensor([0.1307]) + x), y), batch())


@CONSTANTS
def scaled_by_one_element():
    net, scale = network(), torch.tensor([0.5])
    return made(net.parameters(), lambda x, y: ce(net(scale * x), y), batch(outlier=30))


@CONSTANTS
def scaled_by_a_number_without_axes():
    net, scale = network(), torch.tensor(0.5)
    return made(net.parameters(), lambda x, y: ce(net(scale * x), y), batch())


@CONSTANTS
def positions_added():
    net, pos = network(), torch.randn(1, D)
    return made(net.parameters(), lambda x, y: ce(net(pos + x), y), batch(outlier=30))


@CONSTANTS
def positions_without_a_batch_axis():
    net, pos = network(), torch.randn(D)
    return made(net.parameters(), lambda x, y: ce(net(pos + x), y), batch())


@CONSTANTS
def scale_of_a_divisor_of_the_samples():
    net, scale = network((4, H, C)), torch.randn(4)
    return made(net.parameters(), lambda x, y: ce(net(scale * x), y), batch(d=4))


@CONSTANTS
def where_with_a_condition_of_the_features():
    net, keep = network((4, H, C)), torch.tensor([True, False, True, False])

    def loss(x, y):
        return ce(net(torch.where(keep, x, torch.zeros(()))), y)

    return made(net.parameters(), loss, batch(d=4))


@CONSTANTS
def codebook_in_einsum():
    head, book = nn.Linear(4, C), torch.randn(4, D)

    def loss(x, y):
        return ce(head(torch.einsum("kd,nd->nk", book, x).cos()), y)

    return made(head.parameters(), loss, batch())


@CONSTANTS
def distances_to_anchors():
    head, anchors = nn.Linear(4, C), torch.randn(4, D)
    return made(
        head.parameters(), lambda x, y: ce(head(torch.cdist(anchors, x).t().cos()), y), batch()
    )


@CONSTANTS
def class_weights_normalized():
    net, weight = network((D, H, 4)), torch.tensor([1.0, 2.0, 3.0, 4.0])

    def loss(x, y):
        return ce(net(x), y, weight=weight / weight.sum())

    return made(net.parameters(), loss, batch(classes=4))


@CONSTANTS
def prior_of_the_classes():
    net, prior = network((D, H, 4)), torch.tensor([0.1, 0.2, 0.3, 0.4])

    def loss(x, y):
        shift = prior.log()
        return ce(net(x) + shift, y)

    return made(net.parameters(), loss, batch(classes=4))


@CONSTANTS
def weights_of_the_positives():
    net, weight = network(), torch.rand(C)

    def loss(x, y):
        return F.binary_cross_entropy_with_logits(net(x), F.one_hot(y, C) * 1.0, pos_weight=weight)

    return made(net.parameters(), loss, batch())


@CONSTANTS
def more_weights_than_samples():
    net, weight = network((D, H, 10)), torch.rand(10)

    def loss(x, y):
        return ce(net(x), F.one_hot(y, 10) * 0.5 + 0.05, weight=weight)

    return made(net.parameters(), loss, batch(classes=10))


@CONSTANTS
def targets_scaled_by_constants():
    net, mean, scale = network(), torch.randn(C), torch.rand(C) + 0.5
    return made(
        net.parameters(), lambda x, t: F.mse_loss(net(x), (t - mean) / scale),
        (torch.randn(N, D), torch.randn(N, C)),
    )  # fmt: skip


@CONSTANTS
def quantiles():
    net, levels = network(), torch.tensor([0.1, 0.5, 0.9])

    def loss(x, t):
        apart = t - net(x)
        return torch.maximum(levels * apart, (levels - 1) * apart).mean()

    return made(net.parameters(), loss, (torch.randn(N, D), torch.randn(N, 1)))


def test_a_sequence_alone_with_flat_labels_asks():
    """Six tokens that do not meet are one sample or six; of two sequences they are two."""
    net = network((4, H, C))

    def loss(x, y):
        return ce(net(x).flatten(0, 1), y)

    for n in (2, 1):
        x, y = torch.randn(n, 6, 4), torch.randint(C, (n * 6,))
        m = made(net.parameters(), loss, (x, y), n=n, options={"batch_size": n} if n == 1 else {})
        m.own = lambda k, x, y: loss(x[k : k + 1], y[6 * k : 6 * k + 6])
        judge(m, (x, y), computed(m, (x, y)))
    m.options = {}
    must_refuse(m, (x, y), "batch_size=1 or batch_size=6")


@CONSTANTS.each
def test_constants_come_first(situation):
    exact(situation)


@CONSTANTS.each
def test_constants_come_first_in_private_steps(situation):
    bounded(situation)


DRAWS = Family()


def flipped_at_random(seed):
    net = network()

    def loss(x, y):
        torch.manual_seed(seed)
        if torch.rand(1) < 0.5:
            x = x.flip(1)
        return ce(net(x), y)

    return made(net.parameters(), loss, batch(outlier=30))


DRAWS.add("flipped", flipped_at_random, 0)
DRAWS.add("as-it-was", flipped_at_random, 1)


@DRAWS
def number_drawn_and_multiplied():
    net = network()

    def loss(x, y):
        torch.manual_seed(3)
        return ce(net(x * (0.8 + 0.4 * torch.rand(1).item())), y)

    return made(net.parameters(), loss, batch(outlier=30))


@DRAWS
def permutation_of_the_features():
    net = network()

    def loss(x, y):
        torch.manual_seed(3)
        return ce(net(x[:, torch.randperm(D)]), y)

    return made(net.parameters(), loss, batch(outlier=30))


@DRAWS.each
def test_draws_come_first(situation):
    exact(situation)


@DRAWS.each
def test_draws_come_first_in_private_steps(situation):
    bounded(situation, accepted=situation.id != "permutation-of-the-features")


def registered(k):
    """A table of K rows that is a buffer, K = N too."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("book", torch.randn(k, D))
            self.head = nn.Linear(k, C)

        def forward(self, x):
            return self.head(torch.einsum("kd,nd->nk", self.book, x).cos())

    net = Features()
    return made(net.parameters(), lambda x, y: ce(net(x), y), batch())


BUFFERS = Family()
for k in (4, N):
    BUFFERS.add(f"{k}-rows", registered, k)


@BUFFERS.each
def test_codebook_in_a_buffer(situation):
    exact(situation)


@BUFFERS.each
def test_codebook_in_a_buffer_in_private_steps(situation):
    bounded(situation, accepted=True)


def codebook_with_a_row_per_sample():
    head, book = nn.Linear(N, C), torch.randn(N, D)

    def loss(x, y):
        return ce(head(torch.einsum("kd,nd->nk", book, x).cos()), y)

    return made(head.parameters(), loss, batch())


def test_codebook_that_could_be_data():
    """A plain tensor with N rows: it may be asked what it is."""
    family = Family()
    family.add("plain", codebook_with_a_row_per_sample)
    exact_or_refused(family[0], r"\[8, 6\]|shared|buffer|batch_size|separate")


# Graphs.


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x, edges, owner, graphs):
        source, target = edges[0], edges[1]
        h = self.a(x)
        h = h.index_add(0, target, h[source]).tanh()
        return self.b(torch.zeros(graphs, 5).index_add(0, owner, h))


def test_an_edge_between_graphs():
    """In a later pass: the nodes belong to no graph alone, and are no data that graphs share."""
    m = graphs([3, 2, 3])
    x, edges, owner, y = m.passes[0].data
    judge(m, (x, edges, owner, y), computed(m, (x, edges, owner, y)))
    across = torch.cat([edges, torch.tensor([[2], [3]])], 1)
    must_refuse(m, (x, across, owner, y), f"{COUPLED}|ambiguous")


def graphs(sizes):
    """Chains of nodes; `edge_index` is met first."""
    net, xs = GraphNet(), [torch.randn(n, D) for n in sizes]

    def joined(xs, y):
        counts = torch.tensor([len(x) for x in xs])
        starts = counts.cumsum(0) - counts
        owner = torch.arange(len(xs)).repeat_interleave(counts)
        left = torch.cat([torch.arange(len(x) - 1) + s for x, s in zip(xs, starts, strict=True)])
        return torch.cat(xs), torch.stack([left, left + 1]), owner, y

    def loss(x, edges, owner, y):
        return ce(net(x, edges, owner, len(y)), y)

    def own(k, x, edges, owner, y):
        return loss(*joined([x[owner == k]], y[k : k + 1]))

    def without(k, x, edges, owner, y):
        kept = [i for i in range(len(y)) if i != k]
        return joined([x[owner == i] for i in kept], y[kept])

    return made(
        net.parameters(),
        loss,
        joined(xs, torch.randint(C, (len(sizes),))),
        own=own,
        without=without,
        size=lambda x, edges, owner, y: len(y),
    )


GRAPHS = Family()
GRAPHS.add("equal", graphs, [3, 3, 3, 3])
GRAPHS.add("several-sizes", graphs, [2, 5, 3, 2])
GRAPHS.add("as-many-nodes-as-would-divide", graphs, [1, 4, 2, 5])


@GRAPHS.each
def test_batch_of_graphs(situation):
    exact(situation)


@GRAPHS.each
def test_batch_of_graphs_in_private_steps(situation):
    bounded(situation, accepted=True)


# Several tensors hold the samples.

TWICE = Family()


@TWICE
def two_batches():
    net, (xa, ya), (xb, yb) = network(), batch(), batch()

    def loss(xa, xb, ya, yb):
        return ce(net(torch.cat([xa, xb])), torch.cat([ya, yb]))

    def own(n, xa, xb, ya, yb):
        k = n % N
        return ce(net([xa, xb][n // N][k : k + 1]), [ya, yb][n // N][k : k + 1])

    return made(net.parameters(), loss, (xa, xb, ya, yb), own=own, n=2 * N)


@TWICE
def critic_of_real_and_fake():
    net, (real, _), (fake, _) = network((D, H, 1)), batch(), batch()
    judged = F.binary_cross_entropy_with_logits

    def loss(real, fake):
        labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(fake), 1)])
        return judged(net(torch.cat([real, fake])), labels)

    def own(n, real, fake):
        k = n % N
        label = torch.full((1, 1), float(n < N))
        return judged(net([real, fake][n // N][k : k + 1]), label)

    return made(net.parameters(), loss, (real, fake), own=own, n=2 * N)


@TWICE
def critic_of_a_generator():
    net, generator, (real, _) = network((D, H, 1)), nn.Linear(2, D), batch()
    judged = F.binary_cross_entropy_with_logits

    def loss(real, noise):
        labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        return judged(net(torch.cat([real, generator(noise).detach()])), labels)

    def own(n, real, noise):
        k = n % N
        row = real[k : k + 1] if n < N else generator(noise[k : k + 1]).detach()
        return judged(net(row), torch.full((1, 1), float(n < N)))

    return made(net.parameters(), loss, (real, torch.randn(N, 2)), own=own, n=2 * N)


@TWICE
def stacked_views():
    net, (xa, ya), (xb, yb) = network(), batch(), batch()

    def loss(xa, xb, ya, yb):
        return ce(net(torch.stack([xa, xb]).flatten(0, 1)), torch.cat([ya, yb]))

    def own(n, xa, xb, ya, yb):
        k = n % N
        return ce(net([xa, xb][n // N][k : k + 1]), [ya, yb][n // N][k : k + 1])

    return made(net.parameters(), loss, (xa, xb, ya, yb), own=own, n=2 * N)


@TWICE.each
def test_two_batches_are_twice_as_many_samples(situation):
    exact(situation)


@TWICE.each
def test_as_many_samples_as_said(situation):
    exact(situation, batch_size=2 * N)


@TWICE.each
def test_two_views_are_one_sample(situation):
    """With `batch_size=N`, rows i and i + N are sample i: its own loss is that of its two rows."""
    m = situation.make()
    m.own, m.size = None, lambda *data: N
    family = Family()
    family.add(situation.id, lambda: m)
    exact(family[0], batch_size=N)


@TWICE.each
def test_two_batches_in_private_steps(situation):
    """Without batch_size every row is a sample, and one sample is left out of its own tensor."""
    m = situation.make()
    opt = private(m)
    try:
        quiet(opt.step, lambda: m.loss(*m.passes[0].data))
    except curvopt.CurvoptError as error:
        assert "batch_size" in str(error)  # noqa: PT017 (either is right)
        return
    assert len(opt.norms) == 2 * N
    expected = clipped(rows_of(m, m.passes[0].data), CLIP)
    for p in m.params:
        # The factor is C / (norm + 1e-6), which takes 1e-6 of a sample's contribution at most.
        assert (p.grad - expected[p]).norm() <= 1.1e-6 * 2 * N


VIEWS = Family()  # the views of a sample share its label or its input


def views(repeat, labels):
    net, (x, y) = network(), batch()
    return made(net.parameters(), lambda x, y: ce(net(repeat(x)), labels(y)), (x, y))


VIEWS.add("repeat", views, lambda x: x.repeat(2, 1), lambda y: y.repeat(2))
VIEWS.add("cat-of-noisy", views, lambda x: torch.cat([x, x * 1.1]), lambda y: torch.cat([y, y]))
VIEWS.add(
    "repeat-interleave",
    views,
    lambda x: x.repeat_interleave(2, 0),
    lambda y: y.repeat_interleave(2),
)
VIEWS.add(
    "stack-in-the-middle", views, lambda x: torch.stack([x, -x], 1).flatten(0, 1),
    lambda y: y.repeat_interleave(2),
)  # fmt: skip
VIEWS.add(
    "stack-outside", views, lambda x: torch.stack([x, -x]).flatten(0, 1), lambda y: y.repeat(2)
)


@VIEWS.each
def test_views_with_batch_size(situation):
    """Said to be N: a sample has all of its views, wherever they stand."""
    exact(situation, batch_size=N)


@VIEWS.each
def test_views_without_batch_size(situation):
    """N samples with two rows each, or 2N samples; or an error that asks."""
    m = situation.make()
    ((x, y),) = [step.data for step in m.passes]
    try:
        result = quiet(curvopt.compute, lambda: m.loss(x, y), m.params, curvopt.BatchGrad())
    except curvopt.CurvoptError as error:
        assert "batch_size" in str(error)  # noqa: PT017 (either is right)
        return
    pairs = rows_of(m, (x, y))
    found = len(result.batch_grad[m.params[0]])
    assert found in (N, 2 * N)
    if found == N:
        assert_close(result.batch_grad, pairs)
        return
    major = "interleave" not in situation.id and "middle" not in situation.id
    for p in m.params:
        rows = result.batch_grad[p]
        rows = (rows[:N], rows[N:]) if major else (rows[::2], rows[1::2])
        assert_close((rows[0] + rows[1]) / 2, pairs[p])


@VIEWS.each
def test_views_in_private_steps(situation):
    bounded(situation, accepted=True, batch_size=N)


# Transforms of functions inside the forward pass.

MAPPED = Family()


@MAPPED
def model_mapped_over_samples():
    net = network()
    return made(net.parameters(), lambda x, y: ce(vmap(net)(x), y), batch())


@MAPPED
def derivative_of_a_network_mapped():
    net = network((2, H, 1))

    def loss(x, t):
        return F.mse_loss(vmap(jacrev(lambda z: net(z)[0]))(x), t)

    return made(net.parameters(), loss, (torch.randn(N, 2), torch.randn(N, 2)))


@MAPPED
def derivative_beside_the_value():
    net = network((2, H, 1))

    def loss(x, t):
        slope = vmap(torch.func.grad(lambda z: net(z).sum()))(x)
        return ((slope[:, 0] + net(x)[:, 0] - t) ** 2).mean()

    return made(net.parameters(), loss, (torch.randn(N, 2), torch.randn(N)))


@MAPPED.each
def test_vmap_in_the_forward_pass(situation):
    exact_or_refused(situation, "vmap|torch.func")


@MAPPED.each
def test_vmap_in_private_steps(situation):
    bounded(situation, match="vmap|torch.func")


# Data made in the closure.

INSIDE = Family()
SEED = torch.Generator()


def made_inside(make, target=None, sizes=(D, H, C)):
    net = network(sizes)
    x, y = make(), target() if target else torch.arange(N) % C

    def loss():
        return ce(net(make()), target() if target else y)

    return made(net.parameters(), loss, (), own=lambda n: ce(net(x[n : n + 1]), y[n : n + 1]), n=N)


NUMBERS = [[((3 * i + j * j) % 7) / 3 - 1 for j in range(D)] for i in range(N)]
LABELS = [i % C for i in range(N)]


def arrays():
    import numpy

    return numpy.array(NUMBERS), numpy.array(LABELS)


INSIDE.add("tensor-of-a-list", made_inside, lambda: torch.tensor(NUMBERS))
INSIDE.add("labels-too", made_inside, lambda: torch.tensor(NUMBERS), lambda: torch.tensor(LABELS))
INSIDE.add(
    "as-tensor-of-an-array", made_inside, lambda: torch.as_tensor(arrays()[0]),
    lambda: torch.as_tensor(arrays()[1]),
)  # fmt: skip
INSIDE.add("from-numpy", made_inside, lambda: torch.from_numpy(arrays()[0]))
INSIDE.add("stack-of-tensors", made_inside, lambda: torch.stack([*map(torch.tensor, NUMBERS)]))
INSIDE.add(
    "normal-in-place", made_inside,
    lambda: torch.zeros(N, D).normal_(generator=SEED.manual_seed(1)),
)  # fmt: skip
INSIDE.add("drawn", made_inside, lambda: torch.randn(N, D, generator=SEED.manual_seed(1)))
INSIDE.add(
    "drawn-and-transformed", made_inside,
    lambda: torch.rand(N, D, generator=SEED.manual_seed(1)) * 2 - 1,
)  # fmt: skip
INSIDE.add(
    "drawn-as-wide-as-deep", made_inside,
    lambda: torch.randn(N, D, generator=SEED.manual_seed(1)), None, (D, N, N),
)  # fmt: skip
INSIDE.add(
    "counted-as-wide-as-deep", made_inside,
    lambda: torch.linspace(-1, 1, N)[:, None].expand(N, D), None, (D, N, N),
)  # fmt: skip


@INSIDE
def collocation_points():
    net = network((1, H, 1))

    def points():
        return torch.linspace(0, 1, N)[:, None]

    def loss():
        x = points()
        return (net(x) - torch.sin(3 * x)).square().mean()

    def own(n):
        x = points()[n : n + 1]
        return (net(x) - torch.sin(3 * x)).square().mean()

    return made(net.parameters(), loss, (), own=own, n=N)


@INSIDE.each
def test_data_made_in_the_closure(situation):
    exact(situation)


@INSIDE.each
def test_data_made_in_the_closure_with_batch_size(situation):
    exact(situation, batch_size=N)


# A last batch of one.

LAST = Family()


def squeezed(loss_fn, sizes, **settings):
    net, x = network((D, H, 1)), torch.randn(N, D)
    t = torch.rand(N)
    passes = [(x[:n], t[:n]) for n in sizes]
    return made(
        net.parameters(), lambda x, t: loss_fn(net(x).squeeze(), t.squeeze()), *passes, **settings
    )


for loss_fn in (F.mse_loss, F.binary_cross_entropy_with_logits):
    for sizes in ([1], [N, 1]):
        LAST.add(f"{loss_fn.__name__}-{sizes[0]}-{sizes[-1]}", squeezed, loss_fn, sizes)


@LAST.each
def test_last_batch_of_one_squeezed(situation):
    exact(situation)


@LAST.each
def test_last_batch_of_one_squeezed_with_batch_size(situation):
    m = situation.make()
    m.passes = m.passes[-1:]
    family = Family()
    family.add(situation.id, lambda: m)
    exact(family[0], batch_size=1)


@LAST.each
@every_optimizer
def test_last_batch_of_one_squeezed_in_steps(situation, optimizer):
    same_gradient(situation, optimizer)


CUTS = {
    "label": lambda net, row, x, y: ce(net(row), y[3:4]),
    "label-by-index": lambda net, row, x, y: ce(net(row), y[torch.tensor([3])]),
    "both": lambda net, row, x, y: ce(net(x[3:4]), y[3:4]),
    "target": lambda net, row, x, y: F.mse_loss(net(row), x[3:4, :C]),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_last_batch_of_one_whose_label_is_cut_in_the_pass(cut):
    """The loss sees one of many labels, and the data have a size of 1 in front."""
    net, (x, y) = network(), batch()
    row, params = x[3:4].clone(), list(net.parameters())
    expected = torch.autograd.grad(cut(net, row, x, y), params)
    result = curvopt.compute(lambda: cut(net, row, x, y), params, curvopt.BatchGrad())
    for p, grad in zip(params, expected, strict=True):
        assert result.batch_grad[p].shape == (1, *p.shape)
        torch.testing.assert_close(result.batch_grad[p][0], grad)
    opt = curvopt.DPSGD(
        params, 0.1, noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=1
    )
    opt.step(lambda: cut(net, row, x, y))
    assert sum(float(p.grad.square().sum()) for p in params) ** 0.5 <= CLIP * (1 + 1e-6)


# Samples in tensors of their own, one by one.

LOOPS = Family()


def one_by_one(losses, give=lambda x: x, join=lambda rows: torch.stack(rows).mean(), **options):
    """`losses(net, x, y, k)`: of sample k."""
    net, (xs, ys) = network(), batch()
    xs, ys = [give(x).clone() for x in xs], [give(y).clone() for y in ys]

    def loss(*data):
        xs, ys = data[: len(data) // 2], data[len(data) // 2 :]
        return join([losses(net, x, y, k) for k, (x, y) in enumerate(zip(xs, ys, strict=True))])

    def own(n, *data):
        return losses(net, data[n], data[len(data) // 2 + n], n)

    def without(n, *data):
        return tuple(d for k, d in enumerate(data) if k % (len(data) // 2) != n)

    return made(
        net.parameters(), loss, (*xs, *ys), own=own, without=without,
        size=lambda *data: len(data) // 2, options=options,
    )  # fmt: skip


def in_front(x):
    return x[None]


def plain(net, x, y, k):
    return ce(net(x), y)


def of_its_own_size(net, x, y, k):
    return ce(net(x.repeat(1 + int(x[0, 0] > 0), 1)).mean(0, keepdim=True), y)


CLASSES = torch.rand(C) + 0.5

LOOPS.add("unbatched", one_by_one, plain)
LOOPS.add("unbatched-sum", one_by_one, plain, join=lambda rows: torch.stack(rows).sum())
LOOPS.add(
    "unbatched-cat", one_by_one, lambda *a: plain(*a)[None], join=lambda r: torch.cat(r).sum()
)
LOOPS.add(
    "unbatched-and-class-weights", one_by_one,
    lambda net, x, y, k: F.cross_entropy(net(x) * CLASSES, y),
)  # fmt: skip
LOOPS.add("batches-of-one", one_by_one, plain, in_front)
LOOPS.add("batches-of-one-added", one_by_one, plain, in_front, sum)
LOOPS.add(
    "batches-of-one-mean", one_by_one, plain, in_front, lambda rows: sum(rows) / len(rows),
    reduction="mean",
)  # fmt: skip
LOOPS.add("of-their-own-sizes", one_by_one, of_its_own_size, in_front)


@LOOPS.each
def test_samples_one_by_one(situation):
    exact(situation)


@LOOPS.each
def test_samples_one_by_one_in_private_steps(situation):
    bounded(situation)


def test_samples_one_by_one_with_weights_of_their_own():
    def build():
        weights = [torch.rand(1) for _ in range(N)]
        return one_by_one(lambda net, x, y, k: weights[k].squeeze() * ce(net(x), y), in_front)

    family = Family()
    family.add("weighed", build)
    exact(family[0])


@pytest.mark.parametrize("give", [lambda x: x, in_front])
def test_samples_one_by_one_with_a_constant_that_could_be_one(give):
    """A constant that all of them meet may as well be what makes them one sample."""
    mean = torch.randn(1, D)

    def shifted(net, x, y, k):
        return ce(net(x - mean), y[None] if give is not in_front else y)

    def build(join=lambda rows: torch.stack(rows).mean(), **options):
        return one_by_one(shifted, give, join, **options)

    family = Family()
    family.add("with-batch-size", build, batch_size=N)
    exact(family[0])
    m = build()
    must_refuse(m, m.passes[0].data, rf"batch_size=1 or batch_size={N}")
    m = build(batch_size=1)
    params = list(m.params)
    grads = torch.autograd.grad(m.loss(*m.passes[0].data), params)
    found = curvopt.compute(
        lambda: m.loss(*m.passes[0].data), params, curvopt.BatchGrad(), batch_size=1
    )
    assert_close(found.batch_grad, {p: g[None] for p, g in zip(params, grads, strict=True)})


@pytest.mark.parametrize("give", [lambda x: x, in_front])
def test_one_sample_of_two_tasks_is_one(give):
    """Its data is what both losses share; without a size of 1 in front it may be asked."""
    net, (x, y) = network(), batch(2)
    params, x, first, second = list(net.parameters()), give(x[0]), give(y[0]), give(y[1])

    def loss():
        out = net(x)
        return torch.stack([ce(out, first), ce(2 * out, second)]).sum()

    settings = {"batch_size": 1} if give is not in_front else {}
    found = curvopt.compute(loss, params, curvopt.BatchGrad(), **settings)
    grads = torch.autograd.grad(loss(), params)
    assert_close(found.batch_grad, {p: g[None] for p, g in zip(params, grads, strict=True)})


def test_two_views_of_one_sample_are_one():
    """Its label, or the time at which both are taken, is what links them."""
    net, (x, y), (other, _), t = network(), batch(1), batch(1), torch.rand(1)
    params = list(net.parameters())
    losses = {
        "label": lambda: ce(net(x), y) + ce(net(other), y),
        "time": lambda: ce(net(x * t), y) + net(other * t).square().mean(),
    }
    for loss in losses.values():
        found = curvopt.compute(loss, params, curvopt.BatchGrad())
        grads = torch.autograd.grad(loss(), params)
        assert_close(found.batch_grad, {p: g[None] for p, g in zip(params, grads, strict=True)})


def test_labeled_and_unlabeled_data_of_one_sample_each():
    """As 8 and 16 of them are 24 samples, 1 and 1 are 2."""

    def build():
        net, (x, y), (other, _) = network(), batch(1), batch(1)

        def loss(x, other, y):
            return ce(net(x), y) + net(other).square().mean()

        def own(n, x, other, y):
            return net(other).square().mean() if n else ce(net(x), y)

        return made(net.parameters(), loss, (x, other, y), own=own, n=2)

    family = Family()
    family.add("one-of-each", build)
    exact(family[0])


# Sequences that were packed before the pass began.

PACKED = Family()
LENGTHS = [2, 5, 1, 4, 4, 5, 3, 1]


class Tagger(nn.Module):
    """A recurrent network on a packed sequence: its last states, or all of them."""

    def __init__(self, kind, embeds, **options):
        super().__init__()
        self.embed = nn.Embedding(7, D) if embeds else None
        self.net = kind(D, H, batch_first=True, **options)
        self.head = nn.Linear(H * (1 + self.net.bidirectional), C)

    def forward(self, p, every):
        if self.embed is not None:
            p = PackedSequence(self.embed(p.data).tanh(), *p[1:])
        out, last = self.net(p)
        if every:
            return self.head(out.data)
        last = last[0] if isinstance(last, tuple) else last
        return self.head(torch.cat([*last[-1 - self.net.bidirectional :]], 1))


def packed_before(kind, *orders, embeds=False, every=False, ordered=False, **options):
    net = Tagger(kind, embeds, **options)

    def given(lengths):
        lengths = sorted(lengths, reverse=True) if ordered else lengths
        rows = [torch.randint(7, (n,)) if embeds else torch.randn(n, D) for n in lengths]
        labels = [torch.randint(C, (n,)) if every else torch.randint(C, ()) for n in lengths]
        return rows, labels

    def packed(rows, labels):
        y = pack_sequence(labels, ordered).data if every else torch.stack(labels)
        return pack_sequence(rows, ordered), y, rows, labels

    def loss(p, y, rows, labels):
        return ce(net(p, every), y, reduction="sum" if every else "mean")

    def alone(n, p, y, rows, labels):
        return loss(*packed([rows[n]], [labels[n]]))

    def rest(n, p, y, rows, labels):
        return packed(rows[:n] + rows[n + 1 :], labels[:n] + labels[n + 1 :])

    passes = [packed(*given(lengths)) for lengths in orders]
    return made(
        net.parameters(), loss, *passes, own=alone, without=rest,
        size=lambda p, y, rows, labels: len(rows),
    )  # fmt: skip


ORDERS = LENGTHS, LENGTHS[::-1], [5, 4, 5, 4, 2, 1, 3, 1]
for kind in (nn.RNN, nn.GRU, nn.LSTM):
    PACKED.add(kind.__name__, packed_before, kind, *ORDERS)
PACKED.add("sorted", packed_before, nn.GRU, *ORDERS, ordered=True)
PACKED.add("both-ways", packed_before, nn.GRU, *ORDERS, bidirectional=True, num_layers=2)
PACKED.add("embedded", packed_before, nn.GRU, *ORDERS, embeds=True)
PACKED.add("every-token", packed_before, nn.LSTM, *ORDERS, every=True)
PACKED.add("every-token-embedded", packed_before, nn.GRU, *ORDERS, every=True, embeds=True)
PACKED.add("as-many-as-steps", packed_before, nn.GRU, [N, 1, *range(2, N)], [*range(1, N), N])


@PACKED.each
def test_sequences_packed_before(situation):
    exact(situation)


@pytest.mark.parametrize("options", [{}, {"ordered": True}, {"every": True, "embeds": True}])
def test_sequences_packed_before_in_private_steps(options):
    family = Family()
    family.add("packed", packed_before, nn.GRU, [2, 4, 1, 3, 1], **options)
    bounded(family[0], accepted=True)


def test_sequences_packed_before_that_mix():
    m = packed_before(nn.GRU, LENGTHS)
    plain = m.loss

    def loss(p, *rest):
        data = p.data - p.data.mean(0)
        return plain(PackedSequence(data, *p[1:]), *rest)

    m.loss = loss
    must_refuse(m, m.passes[0].data, "they meet in mean")
    must_refuse(m, m.passes[0].data, "they meet in mean", batch_size=N)


def test_rows_beside_sequences_that_were_packed_before():
    """As many rows as the sequences have tokens, of a loss of their own: a sample each."""

    def build():
        m, total = packed_before(nn.GRU, LENGTHS), sum(LENGTHS)
        net, z, t = network(), torch.randn(total, D), torch.randint(C, (total,))
        m.params += net.parameters()
        of_sequences, alone, size = m.loss, m.own, m.size
        m.loss = lambda *data: of_sequences(*data) + ce(net(z), t)
        m.size = lambda *data: size(*data) + total

        def own(n, *data):
            k = n - len(LENGTHS)
            return alone(n, *data) if k < 0 else ce(net(z[k : k + 1]), t[k : k + 1])

        m.own = own
        return m

    family = Family()
    family.add("beside", build)
    exact(family[0])


# Micro-batches.


class Images(torch.utils.data.Dataset):
    def __init__(self, count=24):
        self.x, self.y = torch.randn(count, 2, 4, 4), torch.randint(C, (count,))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        return self.x[n], self.y[n]


def micro_batches():
    torch.manual_seed(0)
    data = Images()
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, C))
    m = made(net.parameters(), lambda x, y: ce(net(x), y), (data.x, data.y))
    return m, DataLoader(data, batch_size=8)


def test_micro_batches_of_a_loader_in_one_private_record():
    m, loader = micro_batches()
    opt = private(m)
    with opt.record():
        for x, y in loader:  # collate touches one image after the other
            m.loss(x, y).backward()
    quiet(opt.step)
    assert len(opt.norms) == 24
    expected = clipped(rows_of(m, m.passes[0].data), CLIP)
    for p in m.params:
        assert_close(p.grad, expected[p], 1e-5)


@pytest.mark.parametrize("make", [curvopt.DiagGGNOptimizer, curvopt.VarianceAdaptiveSGD])
def test_micro_batches_of_a_loader_in_one_record(make):
    m, loader = micro_batches()
    opt = make(m.params, lr=0.0)
    for x, y in loader:
        m.loss(x, y).backward()
    expected = [p.grad.clone() for p in m.params]
    opt.zero_grad()
    with opt.record():
        for x, y in loader:
            m.loss(x, y).backward()
    opt.step()
    for p, grad in zip(m.params, expected, strict=True):
        assert torch.equal(p.grad, grad)


# All sizes equal, and samples that do not come first.

SIZES = Family()


@SIZES
def all_sizes_equal():
    net = network((4, 4, 4))
    return made(net.parameters(), lambda x, y: ce(net(x), y), batch(4, 4, 4))


@SIZES
def tokens_of_all_sizes_equal():
    net = network((4, 4, 4))
    x, y = torch.randn(4, 4, 4), torch.randint(4, (4,))
    return made(net.parameters(), lambda x, y: ce(net(x).mean(1), y), (x, y))


@SIZES
def time_first_of_all_sizes_equal():
    net = network((4, 4, 4))
    x, y = torch.randn(4, 4, 4), torch.randint(4, (4,))

    def own(n, x, y):
        return ce(net(x[:, n : n + 1]).mean(0), y[n : n + 1])

    def without(n, x, y):
        keep = [k for k in range(len(y)) if k != n]
        return x[:, keep], y[keep]

    return made(
        net.parameters(),
        lambda x, y: ce(net(x).mean(0), y),
        (x, y),
        own=own,
        without=without,
        size=lambda x, y: len(y),
    )


@SIZES
def features_first_of_all_sizes_equal():
    a, b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    x, y = batch(8, 8, 8)
    return made([a, b], lambda x, y: ce((b @ (a @ x.t()).tanh()).t(), y), (x, y))


@SIZES
def convolution_of_all_sizes_equal():
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Tanh(), nn.Conv1d(4, 4, 1))
    x, y = torch.randn(4, 4, 4), torch.randint(4, (4,))
    return made(net.parameters(), lambda x, y: ce(net(x).mean(2), y), (x, y))


@SIZES
def language_model_with_as_many_tokens_as_samples():
    net = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 11))

    def loss(ids):
        return ce(net(ids[:, :-1]).reshape(-1, 11), ids[:, 1:].reshape(-1))

    return made(net.parameters(), loss, (torch.randint(11, (6, 7)),))


@SIZES
def positions_as_many_as_samples():
    table, head = nn.Parameter(torch.randn(N, D)), nn.Linear(D, C)
    x, y = torch.randn(N, N, D), torch.randint(C, (N,))

    def loss(x, y):
        return ce(head((x + table).tanh().mean(1)), y)

    return made([table, *head.parameters()], loss, (x, y))


@SIZES
def scale_of_features_as_many_as_samples():
    scale, head = nn.Parameter(torch.randn(N)), nn.Linear(N, C)
    return made([scale, *head.parameters()], lambda x, y: ce(head(scale * x), y), batch(N, N))


@SIZES
def one_sample():
    net = network()
    return made(net.parameters(), lambda x, y: ce(net(x), y), batch(1))


@SIZES
def a_last_batch_of_one():
    net, (x, y) = network(), batch()
    return made(net.parameters(), lambda x, y: ce(net(x), y), (x, y), (x[:1], y[:1]), (x, y))


@SIZES
def a_last_batch_of_one_as_wide_as_deep():
    net, (x, y) = network((1, 1, 2)), batch(4, 1, 2)
    return made(net.parameters(), lambda x, y: ce(net(x), y), (x, y), (x[:1], y[:1]))


@SIZES.each
def test_sizes(situation):
    exact(situation)


@SIZES.each
def test_sizes_in_private_steps(situation):
    bounded(situation, accepted=True)


def test_one_helper_slices_as_the_oracle_should():
    x, y = batch()
    table = torch.zeros(3)
    assert [d.shape for d in one((x, y, table, 2.0), 3, N)[:3]] == [(1, D), (1,), (3,)]
