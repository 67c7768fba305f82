"""What a sample's own loss is: that of a batch of one, or a question that `reduction=` answers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests import oracles
from tests.faults.situations import (
    CLIP,
    COUPLED,
    C,
    D,
    Family,
    H,
    N,
    backward,
    batch,
    bounded,
    ce,
    clipped,
    every_optimizer,
    exact,
    exact_or_refused,
    filled,
    made,
    network,
    private,
    private_sum,
    quiet,
    refused,
    rows_of,
    same_gradient,
    says,
)
from tests.oracles import assert_close


def none(z, y):
    return ce(z, y, reduction="none")


def summed(z, y):
    return ce(z, y, reduction="sum")


# A sum divided by something.


@dataclass
class Ambiguous:
    """A loss `of(z, *rest)` of the model's output.

    `part(n, z, *rest)` is sample n's part of it, from the output of the batch; `own(z, *rest)` its
    value for a batch of one, by default `of` itself. `by_hand`: it needs `(loss, output)` for its
    curvature. `count`: the divisor is computed from the batch, in the closure.
    """

    of: Callable
    part: Callable
    rest: Callable = lambda: (torch.arange(N) % C,)
    own: Callable | None = None
    by_hand: bool = False
    count: bool = False


def weights():
    return torch.arange(N) % C, torch.linspace(0.5, 2, N)


def mask():
    return torch.arange(N) % C, (torch.arange(N) % 3 > 0).double()


def ignored():
    y = torch.arange(N) % C
    y[2] = y[5] = -100
    return (y,)


def by_class(z, y):
    return (z - F.one_hot(y, C)).square()


AMBIGUOUS = {
    "sum-over-length": Ambiguous(
        lambda z, y: summed(z, y) / len(z), lambda n, z, y: none(z, y)[n] / N
    ),
    "sum-over-a-number": Ambiguous(
        lambda z, y: summed(z, y) / N,
        lambda n, z, y: none(z, y)[n] / N,
        own=lambda z, y: summed(z, y) / N,
    ),
    "times-the-reciprocal": Ambiguous(
        lambda z, y: summed(z, y) * (1 / len(z)), lambda n, z, y: none(z, y)[n] / N
    ),
    "rows-over-shape": Ambiguous(
        lambda z, y: none(z, y).sum() / z.shape[0], lambda n, z, y: none(z, y)[n] / N
    ),
    "rows-divided-first": Ambiguous(
        lambda z, y: (none(z, y) / len(z)).sum(), lambda n, z, y: none(z, y)[n] / N
    ),
    "einsum-over-length": Ambiguous(
        lambda z, y: torch.einsum("n->", none(z, y)) / len(z), lambda n, z, y: none(z, y)[n] / N
    ),
    "squares-over-length": Ambiguous(
        lambda z, y: by_class(z, y).sum() / len(z),
        lambda n, z, y: by_class(z, y)[n].sum() / N,
        by_hand=True,
    ),
    "over-a-tensor": Ambiguous(
        lambda z, y: summed(z, y) / torch.tensor(float(len(z))), lambda n, z, y: none(z, y)[n] / N
    ),
    "over-ones": Ambiguous(
        lambda z, y: summed(z, y) / torch.ones(len(z)).sum(), lambda n, z, y: none(z, y)[n] / N
    ),
    "over-those-not-ignored": Ambiguous(
        lambda z, y: summed(z, y) / (y != -100).sum(),
        lambda n, z, y: none(z, y)[n] / (y != -100).sum(),
        rest=ignored,
        own=summed,
        count=True,
    ),
    "weighted": Ambiguous(
        lambda z, y, w: (none(z, y) * w).sum() / w.sum(),
        lambda n, z, y, w: none(z, y)[n] * w[n] / w.sum(),
        rest=weights,
        count=True,
    ),
    "weighted-by-a-number": Ambiguous(
        lambda z, y, w: (none(z, y) * w).sum() / w.sum().item(),
        lambda n, z, y, w: none(z, y)[n] * w[n] / w.sum(),
        rest=weights,
    ),
    "masked": Ambiguous(
        lambda z, y, k: (none(z, y) * k).sum() / k.sum(),
        lambda n, z, y, k: none(z, y)[n] * k[n] / k.sum(),
        rest=mask,
        own=lambda z, y, k: summed(z, y) * k.sum(),
        count=True,
    ),
    "masked-and-clamped": Ambiguous(
        lambda z, y, k: (none(z, y) * k).sum() / k.sum().clamp(min=1),
        lambda n, z, y, k: none(z, y)[n] * k[n] / k.sum(),
        rest=mask,
        count=True,
    ),
    "selected": Ambiguous(
        lambda z, y, k: none(z, y)[k > 0].mean(),
        lambda n, z, y, k: none(z, y)[n] * k[n] / k.sum(),
        rest=mask,
        own=lambda z, y, k: summed(z, y) * k.sum(),
        count=True,
    ),
    "selected-sum": Ambiguous(
        lambda z, y, k: none(z, y)[k > 0].sum() / (k > 0).sum(),
        lambda n, z, y, k: none(z, y)[n] * k[n] / k.sum(),
        rest=mask,
        own=lambda z, y, k: summed(z, y) * k.sum(),
        count=True,
    ),
    "normalized-weights": Ambiguous(
        lambda z, y, w: (none(z, y) * w / w.sum()).sum(),
        lambda n, z, y, w: none(z, y)[n] * w[n] / w.sum(),
        rest=weights,
        count=True,
    ),
    "normalized-weights-first": Ambiguous(
        lambda z, y, w: ((w / w.sum()) * none(z, y)).sum(),
        lambda n, z, y, w: none(z, y)[n] * w[n] / w.sum(),
        rest=weights,
        count=True,
    ),
    "product-with-weights": Ambiguous(
        lambda z, y, w: none(z, y) @ (w / w.sum()),
        lambda n, z, y, w: none(z, y)[n] * w[n] / w.sum(),
        rest=weights,
        count=True,
    ),
    "two-terms": Ambiguous(
        lambda z, y: (
            summed(z, y) / len(z) + F.mse_loss(z, torch.zeros_like(z), reduction="sum") / len(z)
        ),
        lambda n, z, y: (none(z, y)[n] + z[n].square().sum()) / N,
    ),
}

QUESTION = r"reduction="
every_loss = pytest.mark.parametrize("name", AMBIGUOUS)


def ambiguous(name, reading=None):
    """`reading`: the own loss is N parts ("mean"), one part ("sum"), or that of a batch of one."""
    row, net = AMBIGUOUS[name], network()
    x, rest = torch.randn(N, D), row.rest()

    def loss(x, *rest):
        return row.of(net(x), *rest)

    def own(n, x, *rest):
        if reading is None:
            one = [d[n : n + 1] for d in rest]
            return (row.own or row.of)(net(x[n : n + 1]), *one)
        return row.part(n, net(x), *rest) * (len(x) if reading == "mean" else 1)

    return made(net.parameters(), loss, (x, *rest), own=own)


def situation_of(build, *args, **settings):
    family = Family()
    family.add("situation", build, *args, **settings)
    return family[0]


@every_loss
def test_the_parts_add_up(name):
    """Of the oracle: N parts on average, or the sum of the parts, are the loss as written."""
    for reading, total in (("mean", torch.mean), ("sum", torch.sum)):
        m = situation_of(ambiguous, name, reading).make()
        (data,) = [step.data for step in m.passes]
        rows = rows_of(m, data)
        grads = backward(m.params, lambda m=m, data=data: m.loss(*data))
        for p, grad in zip(m.params, filled(m.params, grads), strict=True):
            assert_close(total(rows[p], 0), grad)


@every_loss
def test_without_an_answer(name):
    exact_or_refused(situation_of(ambiguous, name), QUESTION)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every_loss
def test_the_answer_is_honoured(name, reduction):
    exact(situation_of(ambiguous, name, reduction), reduction=reduction)


@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
@every_loss
def test_batch_quantities_need_no_answer(name, reduction):
    row = AMBIGUOUS[name]
    torch.manual_seed(0)
    net, x, rest = network(), torch.randn(N, D), row.rest()
    params = list(net.parameters())

    def closure():
        z = net(x)
        return (row.of(z, *rest), z) if row.by_hand else row.of(z, *rest)

    def loss_fn(z, rest):
        return row.of(z, *rest)

    result = quiet(curvopt.compute, closure, params, curvopt.DiagGGNExact(), reduction=reduction)
    assert_close(result.grad, oracles.grad(net, loss_fn, x, rest, params))
    assert_close(result.diag_ggn_exact, oracles.diag_ggn(net, loss_fn, x, rest, params))


@every_loss
@pytest.mark.parametrize("optimizer", ["diag_ggn", "diag_ggn-exact"])
def test_steps_that_need_no_answer(name, optimizer):
    by_hand = r"\(loss, output\)" if AMBIGUOUS[name].by_hand else None
    same_gradient(situation_of(ambiguous, name), optimizer, by_hand)


@every_loss
def test_steps_of_variance_ask(name):
    same_gradient(situation_of(ambiguous, name), "variance_adaptive", QUESTION)


def private_data(name):
    """Seven samples that agree and one that outweighs them, against them."""
    m = ambiguous(name)
    torch.manual_seed(0)
    x, (y, *rest) = torch.randn(1, D) + 0.1 * torch.randn(N, D), AMBIGUOUS[name].rest()
    y = torch.where(y == -100, y, 0)
    y[0] = 1
    if AMBIGUOUS[name].rest is weights:
        rest[0][0] = 50.0
    m.passes[0].data = (x, y, *rest)
    return m


def private_ambiguous(name, reading=None):
    m = ambiguous(name, reading)
    m.passes[0].data = private_data(name).passes[0].data
    return m


@every_loss
def test_private_steps_ask_or_hold_the_bound(name):
    bounded(
        situation_of(private_ambiguous, name),
        match=f"{QUESTION}|{COUPLED}|coefficient|weight|scale",
        max_grad_norm=0.3,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", [name for name, row in AMBIGUOUS.items() if row.count])
def test_private_steps_refuse_a_count_whatever_the_answer(name, reduction):
    """The divisor belongs to the batch."""
    bounded(
        situation_of(private_ambiguous, name, reduction),
        match=f"{QUESTION}|{COUPLED}|coefficient|weight|scale",
        max_grad_norm=0.3,
        reduction=reduction,
    )


@pytest.mark.parametrize("name", ["sum-over-length", "rows-over-shape", "two-terms"])
def test_private_steps_with_the_answer(name):
    """N times the part is the sample's own: nothing is left of the others."""
    bounded(situation_of(private_ambiguous, name, "mean"), accepted=True, reduction="mean")


# Models that bring their own divisor.


def autoencoder():
    encoder, decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def loss(x):
        mean, scale = encoder(x).chunk(2, 1)
        rebuilt = F.mse_loss(decoder(mean), x, reduction="sum")
        divergence = -0.5 * (1 + scale - mean.square() - scale.exp()).sum()
        return (rebuilt + divergence) / len(x)

    return made([*encoder.parameters(), *decoder.parameters()], loss, (torch.randn(N, D),))


def autoencoder_with_a_mean():
    encoder, decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def loss(x):
        mean, scale = encoder(x).chunk(2, 1)
        rebuilt = F.mse_loss(decoder(mean), x, reduction="sum") / len(x)
        return rebuilt - 0.5 * (1 + scale - mean.square() - scale.exp()).sum(1).mean()

    return made([*encoder.parameters(), *decoder.parameters()], loss, (torch.randn(N, D),))


def autoencoder_by_the_number_of_elements():
    """A mean over elements beside a sum that is divided by their number, as people write it."""
    encoder, decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def loss(x):
        mean, scale = encoder(x).chunk(2, 1)
        divergence = -0.5 * (1 + scale - mean.square() - scale.exp()).sum()
        return F.mse_loss(decoder(mean), x) + divergence / x.numel()

    return made([*encoder.parameters(), *decoder.parameters()], loss, (torch.randn(N, D),))


def language(divide):
    """Tokens of all sequences, divided by a count that the loop made, as transformers does."""
    net, ids = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 11)), torch.randint(11, (4, 7))
    labels = ids.clone()
    labels[0, 4:] = labels[1, 3:] = -100

    def loss(ids, labels, count):
        z = net(ids[:, :-1]).flatten(0, 1)
        return F.cross_entropy(z, labels[:, 1:].flatten(), reduction="sum") / count

    def counted(labels):
        return divide((labels[:, 1:] != -100).sum())

    def own(n, ids, labels, count):  # a batch of one has a count of its own
        one = labels[n : n + 1]
        return loss(ids[n : n + 1], one, counted(one))

    def without(n, ids, labels, count):
        keep = [k for k in range(4) if k != n]
        return ids[keep], labels[keep], counted(labels[keep])

    data = (ids, labels, counted(labels))
    return made(net.parameters(), loss, data, own=own, without=without)


DIVIDED = Family()
DIVIDED.add("autoencoder", autoencoder)
DIVIDED.add("autoencoder-with-a-mean", autoencoder_with_a_mean)
DIVIDED.add("autoencoder-by-elements", autoencoder_by_the_number_of_elements)
DIVIDED.add("items-in-batch", language, lambda count: count)
DIVIDED.add("items-in-batch-as-a-number", language, lambda count: count.item())


# One of their terms says itself that it is a mean.
MEANS = {"autoencoder-with-a-mean", "autoencoder-by-elements"}


@DIVIDED.each
def test_models_that_divide(situation):
    exact_or_refused(situation, QUESTION)


@DIVIDED.each
def test_models_that_divide_in_private_steps(situation):
    bounded(situation, match=f"{QUESTION}|coefficient|scale", max_grad_norm=1.0)


@DIVIDED.each
def test_models_that_divide_honour_the_answer(situation):
    """ "sum": the parts of the loss as written, which add up to its gradient; "mean": N of them."""
    for reduction, total in (("mean", torch.mean), ("sum", torch.sum)):
        if reduction == "sum" and situation.id in (
            "autoencoder-with-a-mean",
            "autoencoder-by-elements",
        ):
            continue
        m = situation.make()
        data = m.passes[0].data
        grads = backward(m.params, partial(m.loss, *data))
        result = quiet(
            curvopt.compute, lambda m=m, data=data: m.loss(*data), m.params,
            curvopt.BatchGrad(), reduction=reduction,
        )  # fmt: skip
        for p, grad in zip(m.params, grads, strict=True):
            assert len(result.batch_grad[p]) == len(data[0])
            assert_close(total(result.batch_grad[p], 0), grad)


# Shapes that broadcast.

BROADCAST = Family()


def regression(loss_fn):
    net = network((D, H, 1))
    data = (torch.randn(N, D), torch.randn(N))
    return made(net.parameters(), lambda x, t: loss_fn(net(x), t), data, coupled=True)


BROADCAST.add("by-hand", regression, lambda z, t: ((z - t) ** 2).mean())
BROADCAST.add("by-hand-sum", regression, lambda z, t: ((z - t) ** 2).sum())
BROADCAST.add("absolute", regression, lambda z, t: (t - z).abs().mean())
BROADCAST.add("mse-loss", regression, F.mse_loss)
BROADCAST.add("smooth-l1", regression, F.smooth_l1_loss)


@BROADCAST.each
def test_column_against_row(situation):
    refused(situation, f"{COUPLED}|(?i:broadcast)|target")


@BROADCAST.each
def test_column_against_row_in_private_steps(situation):
    bounded(situation, match=f"{COUPLED}|(?i:broadcast)|target")


# The samples come in several terms.

PIECES = Family()  # one batch, in pieces


def in_pieces(join):
    net, data = network(), batch()
    return made(net.parameters(), lambda x, y: join(net, x, y), data)


def written_row_by_row(net, x, y):
    out = x.new_zeros(len(x), C)
    for k in range(len(x)):
        out[k] = net(x[k : k + 1])[0]
    return ce(out, y)


def loss_row_by_row(net, x, y):
    out = x.new_zeros(len(x))
    for k in range(len(x)):
        out[k] = ce(net(x[k : k + 1]), y[k : k + 1])
    return out.mean()


def losses(net, x, y):
    return [ce(net(x[k : k + 1]), y[k : k + 1]) for k in range(len(x))]


PIECES.add(
    "outputs-cat", in_pieces,
    lambda net, x, y: ce(torch.cat([net(x[k : k + 1]) for k in range(len(x))]), y),
)  # fmt: skip
PIECES.add(
    "outputs-stacked", in_pieces,
    lambda net, x, y: ce(torch.stack([net(x[k]) for k in range(len(x))]), y),
)  # fmt: skip
PIECES.add("outputs-written", in_pieces, written_row_by_row)
PIECES.add(
    "chunks-cat", in_pieces, lambda net, x, y: ce(torch.cat([net(c) for c in x.split(2)]), y)
)
PIECES.add(
    "uneven-chunks-cat", in_pieces,
    lambda net, x, y: ce(torch.cat([net(c) for c in x.split(3)]), y),
)  # fmt: skip
PIECES.add("losses-stacked", in_pieces, lambda net, x, y: torch.stack(losses(net, x, y)).mean())
PIECES.add("losses-added", in_pieces, lambda net, x, y: sum(losses(net, x, y)) / len(x))
PIECES.add("losses-summed", in_pieces, lambda net, x, y: sum(losses(net, x, y)))
PIECES.add("losses-stacked-sum", in_pieces, lambda net, x, y: torch.stack(losses(net, x, y)).sum())
PIECES.add("losses-written", in_pieces, loss_row_by_row)

HINT = r"reduction=|batch_size=|(?i:terms?|several|cat|stack|add|loop)"


@PIECES.each
def test_pieces_of_a_batch(situation):
    exact_or_refused(situation, HINT)


@PIECES.each
def test_pieces_of_a_batch_in_private_steps(situation):
    bounded(situation, match=HINT)


@PIECES.each
@every_optimizer
def test_pieces_of_a_batch_in_steps(situation, optimizer):
    same_gradient(situation, optimizer, HINT)


TERMS = Family()  # samples of several batches


def terms(weigh, *sizes, scale=1.0, heads=None):
    """`scale * sum_k weigh[k] * mean of loss k over its own batch`; heads share a trunk."""
    trunk = nn.Linear(D, 5)
    outs = [nn.Linear(5, C) for _ in (heads or [0])]
    batches = [batch(n) for n in sizes]
    params = [*trunk.parameters(), *[p for out in outs for p in out.parameters()]]

    def term(k, x, y):
        if weigh[k][1] == "residual":  # of a differential equation
            x = x.detach().clone().requires_grad_()
            u = outs[k if heads else 0](trunk(x).tanh())
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return weigh[k][0] * (slope.sum(1, keepdim=True) + u).square().sum(1).mean()
        z = outs[k if heads else 0](trunk(x).tanh())
        return weigh[k][0] * (ce(z, y) if weigh[k][1] == "ce" else z.square().sum(1).mean())

    def loss(*tensors):
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return scale * sum(term(k, x, y) for k, (x, y) in enumerate(pairs))

    def place(n, tensors):
        for k, x in enumerate(tensors[::2]):
            if n < len(x):
                return k, n
            n -= len(x)

    def own(n, *tensors):
        k, j = place(n, tensors)
        x, y = tensors[2 * k : 2 * k + 2]
        return scale * term(k, x[j : j + 1], y[j : j + 1])

    def without(n, *tensors):
        k, j = place(n, tensors)
        kept = list(tensors)
        for i in (2 * k, 2 * k + 1):
            kept[i] = torch.cat([tensors[i][:j], tensors[i][j + 1 :]])
        return tuple(kept)

    return made(
        params,
        loss,
        tuple(t for pair in batches for t in pair),
        own=own,
        without=without,
        size=lambda *tensors: sum(map(len, tensors[::2])),
    )


TERMS.add("two-chunks-averaged", terms, [(1, "ce"), (1, "ce")], 4, 4, scale=0.5)
TERMS.add("two-chunks-added", terms, [(1, "ce"), (1, "ce")], 4, 4)
TERMS.add("uneven-chunks", terms, [(1, "ce"), (1, "ce")], 5, 3)
TERMS.add("heads-8-and-4", terms, [(1, "ce"), (1, "ce")], 8, 4, heads=[0, 1])
TERMS.add("heads-8-and-5", terms, [(1, "ce"), (0.5, "ce")], 8, 5, heads=[0, 1])
TERMS.add("labeled-and-unlabeled", terms, [(1, "ce"), (0.3, "square")], 8, 16)
TERMS.add("boundary-and-interior", terms, [(10, "square"), (1, "square")], 4, 8)
TERMS.add("equation-and-boundary", terms, [(1, "residual"), (10, "square")], 8, 3)
TERMS.add("boundary-and-equation", terms, [(1, "square"), (1, "residual")], 4, 7)
TERMS.add("three-terms", terms, [(1, "ce"), (2, "ce"), (0.1, "square")], 4, 8, 3)


def shares(m):
    """The other reading: a sample's part of the whole loss, times the number of all samples."""
    own, (data,) = m.own, [step.data for step in m.passes]
    sizes = [len(x) for x in data[::2]]
    counts = [size for size in sizes for _ in range(size)]
    return lambda n, *data: own(n, *data) * len(counts) / counts[n]


@TERMS.each
def test_terms_with_samples_of_their_own(situation):
    """Each row once, by either reading of a mean of several batches; or an error that says how."""
    m = situation.make()
    data = m.passes[0].data
    try:
        result = quiet(curvopt.compute, lambda: m.loss(*data), m.params, curvopt.BatchGrad())
    except curvopt.CurvoptError as error:
        says(error, HINT)
        return
    found = []
    for own in (m.own, shares(m)):
        m.own = own
        found.append(rows_of(m, data))
    p = m.params[0]
    assert result.batch_grad[p].shape == found[0][p].shape, "the number of samples"
    error = [(rows[p] - result.batch_grad[p]).norm() for rows in found]
    assert_close(result.batch_grad, found[error.index(min(error))])


@pytest.mark.parametrize("sizes", [(8, 3), (4, 7), (5, 5)])
def test_an_equation_and_its_boundary_are_no_penalty(sizes):
    """Where a slope is ones times weights, nothing but the weights meets the points."""
    m = terms([(1, "residual"), (1, "square")], *sizes)
    data = m.passes[0].data
    result = quiet(curvopt.compute, lambda: m.loss(*data), m.params, curvopt.BatchGrad())
    assert_close(result.batch_grad, rows_of(m, data))


@TERMS.each
def test_terms_in_private_steps(situation):
    bounded(situation, match=HINT, readings=lambda m: [m.own, shares(m)])


@TERMS.each
@every_optimizer
def test_terms_in_steps(situation, optimizer):
    by_hand = r"|\(loss, output\)|none that curvopt knows" if "ggn" in optimizer else ""
    same_gradient(situation, optimizer, HINT + by_hand)


@pytest.mark.parametrize("half", [4, 3])
def test_a_loss_of_some_and_a_loss_of_all(half):
    """Domain adaptation: labels for the first ones, the domain of all."""
    trunk, first, second = nn.Linear(D, 5), nn.Linear(5, C), nn.Linear(5, 2)
    params = [*trunk.parameters(), *first.parameters(), *second.parameters()]
    (x, y), domain = batch(), (torch.arange(N) >= half).long()

    def loss():
        h = trunk(x).tanh()
        return ce(first(h)[:half], y[:half]) + ce(second(h), domain)

    def reading(weight):
        def own(n):
            h = trunk(x[n : n + 1]).tanh()
            labeled = weight * ce(first(h), y[n : n + 1]) if n < half else 0.0
            return ce(second(h), domain[n : n + 1]) + labeled

        return made(params, loss, (), own=own, n=N)

    with pytest.raises(
        curvopt.CurvoptError, match=rf"a mean over {half} of {N} .*reduction='mean'"
    ):
        curvopt.compute(loss, params, curvopt.BatchGrad())
    result = quiet(curvopt.compute, loss, params, curvopt.BatchGrad(), reduction="mean")
    assert_close(result.batch_grad, rows_of(reading(N / half), ()))
    assert_close(result.grad, {p: rows.mean(0) for p, rows in result.batch_grad.items()})


# Losses of torch.nn.functional, and those written by hand.


def functional(loss_fn, target, inputs=1, width=C, **options):
    net = network((D, H, width))
    xs = [torch.randn(N, D) for _ in range(inputs)]
    targets = target()

    def loss(*data):
        return loss_fn(*map(net, data[:inputs]), *data[inputs:], **options)

    return made(net.parameters(), loss, (*xs, *targets))


def signs():
    return (torch.where(torch.arange(N) % 2 > 0, 1.0, -1.0),)


def real():
    return (torch.randn(N, C),)


def classes():
    return (torch.arange(N) % C,)


def binary():
    return (torch.rand(N, C).round(),)


def probabilities():
    return (torch.rand(N, C).softmax(1),)


def ranking(a, b, t, **options):
    return F.margin_ranking_loss(a[:, 0], b[:, 0], t, **options)


def divergence(z, t, **options):
    return F.kl_div(z.log_softmax(1), t, **options)


def gaussian(z, t, **options):
    return F.gaussian_nll_loss(z[:, :1], t[:, :1], z[:, 1:2].exp(), **options)


def connectionist(z, t, **options):
    """Six steps of one letter's scores each."""
    z = z.unflatten(1, (4, 3)).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((len(t),), 4), torch.full((len(t),), 2)
    return F.ctc_loss(z, t, *lengths, **options)


LOSSES = {
    "ctc": (connectionist, lambda: (torch.tensor([[1, 2]] * N),), {"width": 12}),
    "triplet": (F.triplet_margin_loss, lambda: (), {"inputs": 3}),
    "triplet-with-distance": (F.triplet_margin_with_distance_loss, lambda: (), {"inputs": 3}),
    "cosine-embedding": (F.cosine_embedding_loss, signs, {"inputs": 2}),
    "margin-ranking": (ranking, signs, {"inputs": 2}),
    "hinge-embedding": (lambda z, t, **o: F.hinge_embedding_loss(z, t[:, None].expand_as(z), **o),
                        signs, {}),
    "multi-margin": (F.multi_margin_loss, classes, {}),
    "multilabel-margin": (F.multilabel_margin_loss,
                          lambda: (torch.tensor([[0, 2, -1]] * N),), {}),
    "multilabel-soft-margin": (F.multilabel_soft_margin_loss, binary, {}),
    "soft-margin": (lambda z, t, **o: F.soft_margin_loss(z, t[:, None].expand_as(z), **o),
                    signs, {}),
    "gaussian-nll": (gaussian, real, {}),
    "poisson-nll": (F.poisson_nll_loss, lambda: (torch.rand(N, C),), {}),
    "kl-div": (divergence, probabilities, {}),
    "smooth-l1": (F.smooth_l1_loss, real, {}),
    "huber": (F.huber_loss, real, {}),
    "l1": (F.l1_loss, real, {}),
}  # fmt: skip
every_functional = pytest.mark.parametrize("name", LOSSES)


def functional_row(name, **options):
    loss_fn, target, settings = LOSSES[name]
    return functional(loss_fn, target, **settings, **options)


def by_rows(name):
    loss_fn, target, settings = LOSSES[name]
    return functional(lambda *args: loss_fn(*args, reduction="none").mean(), target, **settings)


@every_functional
def test_losses_of_torch(name):
    """Right, or an error that names it and the way out."""
    named = name.replace("-", "_").removesuffix("_with_distance")
    exact_or_refused(situation_of(functional_row, name), f"{named}|reduction")


@every_functional
def test_sums_of_losses_of_torch(name):
    named = name.replace("-", "_").removesuffix("_with_distance")
    exact_or_refused(situation_of(functional_row, name, reduction="sum"), f"{named}|reduction")


@every_functional
def test_the_way_out(name):
    """`reduction="none"`, then `mean()`; for ctc_loss that is another loss, and exact as well."""
    exact(situation_of(by_rows, name))


@every_functional
def test_losses_of_torch_in_private_steps(name):
    named = name.replace("-", "_").removesuffix("_with_distance")
    bounded(situation_of(functional_row, name), match=f"{named}|reduction")


@every_functional
def test_losses_of_torch_in_steps(name):
    named = name.replace("-", "_").removesuffix("_with_distance")
    same_gradient(situation_of(functional_row, name), "variance_adaptive", f"{named}|reduction")


def test_divergence_over_the_batch():
    exact_or_refused(
        situation_of(functional, divergence, probabilities, reduction="batchmean"),
        "kl_div|reduction",
    )


WRITTEN = Family()


def focal(z, y, cut=lambda t: t):
    rows = none(z, y)
    return ((1 - torch.exp(-cut(rows))) ** 2 * rows).mean()


WRITTEN.add("target-first", functional, lambda z, t: F.mse_loss(t, z), real)
WRITTEN.add("target-first-sum", functional, lambda z, t: F.mse_loss(t, z, reduction="sum"), real)
WRITTEN.add("target-first-l1", functional, lambda z, t: F.l1_loss(t, z), real)
WRITTEN.add("focal", functional, focal, classes)
WRITTEN.add("focal-detached", functional, lambda z, y: focal(z, y, torch.Tensor.detach), classes)
WRITTEN.add(
    "label-by-gather", functional,
    lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(), classes,
)  # fmt: skip
WRITTEN.add(
    "label-by-one-hot", functional,
    lambda z, y: -(F.one_hot(y, C) * z.log_softmax(1)).sum(1).mean(), classes,
)  # fmt: skip
WRITTEN.add(
    "label-by-index", functional,
    lambda z, y: -z.log_softmax(1)[torch.arange(len(z)), y].mean(), classes,
)  # fmt: skip
WRITTEN.add(
    "weights-of-the-samples", functional,
    lambda z, y, w: (w * none(z, y)).mean(), weights,
)  # fmt: skip
WRITTEN.add("accumulation", functional, lambda z, y: ce(z, y) / 4, classes)


@WRITTEN.each
def test_losses_written_by_hand(situation):
    exact(situation)


@WRITTEN.each
def test_losses_written_by_hand_in_private_steps(situation):
    bounded(situation, accepted=True)


def masked_tokens(select):
    """Logits of some tokens only; a sequence's own loss is the mean over its tokens."""
    net, ids = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 11)), torch.randint(11, (4, 7))
    keep = torch.arange(7)[None] < torch.tensor([[3], [5], [2], [6]])
    return made(net.parameters(), lambda ids, keep: select(net(ids), ids, keep), (ids, keep))


TOKENS = Family()
TOKENS.add("logits-by-mask", masked_tokens, lambda z, ids, keep: ce(z[keep], ids[keep]))
TOKENS.add(
    "logits-by-mask-sum", masked_tokens,
    lambda z, ids, keep: ce(z[keep], ids[keep], reduction="sum"),
)  # fmt: skip
TOKENS.add(
    "ignored-labels", masked_tokens,
    lambda z, ids, keep: ce(z.flatten(0, 1), ids.masked_fill(~keep, -100).flatten()),
)  # fmt: skip
TOKENS.add(
    "mean-per-sequence", masked_tokens,
    lambda z, ids, keep: (
        (ce(z.mT, ids, reduction="none") * keep).sum(1) / keep.sum(1)
    ).mean(),
)  # fmt: skip


#: Anything that leads out, but no penalty.
SELECTED = r"(?is)^(?!.*penalty).*(mask|index|ragged|reduction=|batch_size=)"


@TOKENS.each
def test_losses_of_some_tokens(situation):
    """Right, or a message that is not about penalties and names the mask."""
    exact_or_refused(situation, SELECTED)


@TOKENS.each
def test_losses_of_some_tokens_in_private_steps(situation):
    bounded(situation, match=SELECTED)


PENALTY = r"(?i:penalt|weight.decay|regulari|holds no sample|no samples?)"
PENALTIES = Family()


def penalized(penalty):
    net = network()
    start = [p.detach().clone() + 0.1 for p in net.parameters()]
    return made(net.parameters(), lambda x, y: ce(net(x), y) + 0.1 * penalty(net, start), batch())


def proximal(net, start):
    return sum((p - q).square().sum() for p, q in zip(net.parameters(), start, strict=True))


PENALTIES.add(
    "squares", penalized, lambda net, start: sum(p.square().sum() for p in net.parameters())
)
PENALTIES.add("norm-of-one", penalized, lambda net, start: net[0].weight.norm())
PENALTIES.add("absolute", penalized, lambda net, start: net[2].weight.abs().mean())
PENALTIES.add("proximal", penalized, proximal)
PENALTIES.add(
    "orthogonality", penalized,
    lambda net, start: (net[2].weight @ net[2].weight.t() - torch.eye(C)).square().sum(),
)  # fmt: skip


@PENALTIES.each
def test_penalties(situation):
    exact_or_refused(situation, PENALTY)


@PENALTIES.each
def test_penalties_in_private_steps(situation):
    """Its own gradient, after the noise: neither clipped nor part of what a sample contributes."""
    m = situation.make()
    x, y = m.passes[0].data
    opt = private(m)
    whole = private_sum(opt, m, (x, y))
    (term,) = [row.build.args[0] for row in PENALTIES if row.id == situation.id]
    net = network()
    net.load_state_dict(dict(zip(net.state_dict(), m.params, strict=True)))
    start = [p.detach() + 0.1 for p in m.params]
    rows = clipped(rows_of(made(net.parameters(), lambda x, y: ce(net(x), y)), (x, y)), CLIP)
    (0.1 * term(net, start)).backward()
    sums = [rows[p] + (0 if p.grad is None else p.grad) for p in net.parameters()]
    assert_close(whole, torch.cat([part.flatten() for part in sums]), 1e-5)
    for n in range(len(x)):
        less = private_sum(opt, m, m.rest(n, (x, y)))
        assert (whole - less).norm() <= CLIP * (1 + 1e-9)


@PENALTIES.each
@every_optimizer
def test_penalties_in_steps(situation, optimizer):
    """Simply part of the gradient."""
    same_gradient(situation, optimizer)


def test_loss_computed_outside_of_the_closure():
    net, (x, y) = network(), batch()
    loss = ce(net(x), y)
    with pytest.raises(curvopt.CurvoptError, match="(?i:outside|in(side)? the closure|record)"):
        curvopt.compute(lambda: loss, net.parameters(), curvopt.BatchGrad())
    for make in (curvopt.DiagGGNOptimizer, curvopt.VarianceAdaptiveSGD):
        with pytest.raises(curvopt.CurvoptError, match="(?i:outside|in(side)? the closure|record)"):
            make(net.parameters()).step(lambda: loss)


def test_output_computed_outside_of_the_closure():
    """Exact, if slow, for the graph is there; or a message that leads into the closure."""
    m = situation_of(in_pieces, lambda net, x, y: ce(net(x), y)).make()
    net, (x, y) = network(), m.passes[0].data
    z = net(x)
    try:
        result = quiet(curvopt.compute, lambda: ce(z, y), net.parameters(), curvopt.BatchGrad())
    except curvopt.CurvoptError as error:
        says(error, "(?i:outside|in(side)? the closure|record)")
        return
    rows = rows_of(made(net.parameters(), lambda x, y: ce(net(x), y)), (x, y))
    assert_close(result.batch_grad, rows)
