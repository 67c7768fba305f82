"""Several views of a sample: their mean is its gradient, whatever the order of the rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests.oracles import assert_close

CLIP = 0.3


def dense():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5)


def images():
    layers = nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    return nn.Sequential(*layers), torch.randn(2, 6, 6)


def tokens():
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), torch.arange(5)


MODELS = {"dense": dense, "images": images, "tokens": tokens}


def make(name, n, k):
    torch.manual_seed(0)
    model, one = MODELS[name]()
    shape = (n, k, *one.shape)
    x = torch.randint(7, shape) if name == "tokens" else torch.randn(shape, dtype=torch.float64)
    return model.double(), x, torch.randint(3, (n,))


def loop(model, x, y):
    """The clipped sum: a sample's gradient is that of the mean over its views."""
    params, rows = list(model.parameters()), []
    for views, label in zip(x, y, strict=True):
        loss = F.cross_entropy(model(views), label.expand(len(views)))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    norms = torch.stack([row.norm() for row in rows])
    return sum(r * (CLIP / (r.norm() + 1e-6)).clamp(max=1) for r in rows), norms


def private(model, **options):
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": 1}
    return curvopt.DPSGD(model.parameters(), 0.0, **{**settings, **options})


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def rows_in(order, x, y):
    k = x.shape[1]
    if order == "sample":
        return x.flatten(0, 1), y.repeat_interleave(k)
    return x.transpose(0, 1).flatten(0, 1), y.repeat(k)


@pytest.mark.parametrize("order", ["sample", "view"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("n", "k"), [(4, 3), (4, 4), (1, 3), (7, 1)])
def test_rows_are_views_of_samples(name, order, n, k):
    model, x, y = make(name, n, k)
    expected, norms = loop(model, x, y)
    rows, labels = rows_in(order, x, y)
    opt = private(model, views=k, view_order=order)
    for _ in range(2):
        opt.step(lambda: F.cross_entropy(model(rows), labels))
        assert_close(flat(model), expected)
        assert_close(opt.norms, norms)


@pytest.mark.parametrize("order", ["sample", "view"])
def test_views_that_are_made_in_the_closure_are_known(order):
    model, x, y = make("dense", 4, 3)
    expected, norms = loop(model, x, y)
    opt = private(model)
    opt.step(lambda: F.cross_entropy(model(rows_in(order, x, y)[0]), rows_in(order, x, y)[1]))
    assert_close(flat(model), expected)
    assert_close(opt.norms, norms)


@pytest.mark.parametrize("order", ["sample", "view"])
def test_other_optimizers_and_losses(order):
    model, x, y = make("images", 4, 3)
    expected, _ = loop(model, x, y)
    rows, labels = rows_in(order, x, y)
    opt = curvopt.DPAdam(
        model.parameters(), 0.0, noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=1,
        views=3, view_order=order, batch_size=4, reduction="mean",
    )  # fmt: skip
    opt.step(lambda: F.cross_entropy(model(rows), labels, reduction="sum") / len(rows))
    assert_close(flat(model), expected)


@pytest.mark.parametrize("order", ["sample", "view"])
def test_all_views_of_a_sample_together_contribute_at_most_the_clipping_norm(order):
    model, x, y = make("dense", 5, 4)

    def total(keep):
        rows, labels = rows_in(order, x[keep], y[keep])
        model.zero_grad()
        opt = private(model, views=4, view_order=order, max_grad_norm=1e-3)
        opt.step(lambda: F.cross_entropy(model(rows), labels))
        return flat(model).clone()

    whole = total(slice(None))
    for n in range(5):
        change = (whole - total([m for m in range(5) if m != n])).norm()
        assert change <= 1e-3 * (1 + 1e-9)


def refused(match):
    return pytest.raises(curvopt.CurvoptError, match=match)


def test_what_contradicts_the_data_is_refused():
    model, x, y = make("dense", 4, 3)
    rows, labels = rows_in("sample", x, y)
    with refused("views=5: the data flow keeps 12 rows apart, which is no multiple"):
        private(model, views=5).step(lambda: F.cross_entropy(model(rows), labels))
    model, x, y = make("dense", 6, 3)  # the sample is known: six of them are not two
    with refused(r"views=3: data of shape \[6, 3, 5\] may have the views on an axis of their own"):
        private(model, views=3).step(
            lambda: F.cross_entropy(model(x.flatten(0, 1)), y.repeat_interleave(3))
        )
    with refused(r"Invalid views: 0 \(an integer >= 1\)"):
        private(model, views=0)
    with refused("Invalid view_order: major"):
        private(model, views=2, view_order="major")


def test_noise_is_that_of_samples():
    model, x, y = make("dense", 4, 3)
    rows, labels = rows_in("view", x, y)
    unused = nn.Parameter(torch.zeros(50_000))
    opt = curvopt.DPSGD(
        [*model.parameters(), unused], 0.0, noise_multiplier=2.0, max_grad_norm=CLIP,
        expected_batch_size=1, views=3, view_order="view",
    )  # fmt: skip
    opt.step(lambda: F.cross_entropy(model(rows), labels))
    assert unused.grad.std().item() == pytest.approx(2 * CLIP, rel=0.02)
    assert len(opt.norms) == 4
