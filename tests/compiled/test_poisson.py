"""Poisson batches, which have another size each time, are filled up to few sizes."""

import pytest
import torch
import torch.nn.functional as F

import curvopt

from .common import Both, batches, cross_entropy, network


def poisson(make, **options):
    private = {"noise_multiplier": 0.5, "max_grad_norm": 0.3, "expected_batch_size": 9}
    private |= {"sampler": "poisson", "num_samples": 900, "lr": 0.1} | options
    return lambda p: make(p, generator=torch.Generator().manual_seed(3), **private)


def sized(*sizes):
    draw = torch.Generator().manual_seed(2)
    for n in sizes:
        x = torch.randn(n, 6, generator=draw).double()
        yield x, torch.randint(3, (n,), generator=draw)


SIZES = (9, 7, 12, 8, 11, 10, 12)


def smooth(model, x, y):
    return F.cross_entropy(model(x), y, label_smoothing=0.1)


def by_hand(model, x, y):
    return (model(x) - F.one_hot(y, 3)).square().sum(1).mean()


def ignoring(model, x, y):
    penalty = sum(p.square().sum() for p in model.parameters())
    return 0.5 * F.cross_entropy(model(x), y.masked_fill(y == 2, -100)) + 0.1 * penalty


def likelihood(model, x, y):
    return F.nll_loss(F.log_softmax(model(x), 1), y)


@pytest.mark.parametrize("loss", [cross_entropy, smooth, by_hand, ignoring, likelihood])
def test_losses(loss):
    """Steps, losses and norms are those of the samples alone."""
    both = Both(network(), poisson(curvopt.DPSGD), loss)
    for batch in sized(*SIZES):
        both.run([batch])
        torch.testing.assert_close(both.opts[1].norms, both.opts[0].norms)
    both.check(compiled=len(SIZES) - 1)  # all of them filled up to 12
    one, two = (opt.ledger.state_dict()["phases"] for opt in both.opts)
    assert one == two


@pytest.mark.parametrize("clipping", ["per_layer"])
def test_adam(clipping):
    both = Both(network(), poisson(curvopt.DPAdam, clipping=clipping))
    both.run(sized(*SIZES))
    both.check(rtol=1e-10, compiled=len(SIZES) - 1)


def with_output(model, x, y):
    output = model(x)
    return F.cross_entropy(output, y), output


def with_note(model, x, y):
    model.seen = model(x)
    return F.cross_entropy(model.seen, y), (model.seen.argmax(1) == y).double().mean()


@pytest.mark.parametrize("loss", [with_output, with_note])
def test_what_else_a_function_gives(loss):
    """It is of the samples alone: batches are not filled up for it."""
    both = Both(network(), poisson(curvopt.DPSGD), loss)
    first, *rest = sized(9, 7, 8)
    both.take(*first)
    with pytest.warns(UserWarning, match="gives more than the loss, which would hold samples"):
        found = [both.take(*batch) for batch in rest]
    for eager, compiled in found:
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(b, a.detach())
    both.check(compiled=0)


def test_few_sizes():
    both = Both(network(), poisson(curvopt.DPSGD))
    both.run(sized(9, 7, 5, 3, 6, 12, 1, 11))
    both.check(compiled=6)


def test_empty_batches():
    """They are stepped eagerly, as ever."""
    both = Both(network(), poisson(curvopt.DPSGD))
    for batch in sized(9, 0, 8, 0, 7):
        eager, compiled = both.take(*batch)
        torch.testing.assert_close(compiled, eager.detach(), equal_nan=True)
    both.check(compiled=2)


def summed(model, x, y):
    return F.cross_entropy(model(x), y, reduction="sum")


def counted(model, x, y):
    return F.cross_entropy(model(x), y) * (len(x) / 9)


def scaled(model, x, y):
    return F.cross_entropy(F.dropout(model(x), 0.5) * len(x) ** -0.5, y)


@pytest.mark.parametrize("loss", [summed, counted, scaled])
def test_a_loss_that_has_a_use_for_the_number_of_samples(loss):
    """In Python it would count those that fill the batch up: a graph is for one size then."""
    both = Both(network(), poisson(curvopt.DPSGD), loss)
    for batch in sized(9, 8, 7, 9, 8):
        both.run([batch])
        torch.testing.assert_close(both.opts[1].norms, both.opts[0].norms)
    both.check(compiled=2)


def over_count(model, x, y):
    return F.cross_entropy(model(x), y, reduction="sum") / len(x)


def test_a_sum_that_is_scaled():
    both = Both(network(), poisson(curvopt.DPSGD, reduction="mean"), over_count)
    both.run(sized(9))
    with pytest.warns(UserWarning, match="the loss is no mean over the samples"):
        both.run(sized(8, 7))
    both.check(compiled=0)


def test_dropout():
    """Batches are filled up all the same: what is drawn does not count when that is decided."""
    both = Both(network().append(torch.nn.Dropout(0.3)), poisson(curvopt.DPSGD))
    both.run(sized(9, 7, 8, 12))
    both.check(compiled=3)


def test_other_samplers_are_not_filled_up():
    both = Both(network(), poisson(curvopt.DPSGD, sampler="shuffle"))
    with pytest.warns(UserWarning, match="Shuffled batches are accounted"):
        both.run(batches(1))
    both.run(batches(2))
    both.check(compiled=2)


def test_a_sample_that_is_not_finite():
    both = Both(network(), poisson(curvopt.DPSGD, noise_multiplier=0.0))
    for t, (x, y) in enumerate(sized(9, 8, 7, 8)):
        if t == 2:
            x[0] = torch.inf
        eager, compiled = both.take(x, y)
        torch.testing.assert_close(compiled, eager, equal_nan=True)
    assert [opt.nonfinite_samples for opt in both.opts] == [1, 1]
    both.check(compiled=2)
