"""Other people's functions, batches and models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt

from .common import ROWS, Both, batches, cross_entropy, network

few = pytest.mark.parametrize(
    "row", ["variance-debiased", "diag_ggn-exact", "polar-decay", "dp_sgd"]
)


@few
def test_all_sizes_are_equal(row):
    """As many samples as inputs, units and classes."""
    both = Both(network(sizes=(4, 4, 4)), ROWS[row])
    both.run(batches(5, n=4, inputs=4, classes=4))
    both.check(compiled=4)


def test_a_batch_as_a_dict():
    both = Both(network(), ROWS["variance"], lambda m, b: F.cross_entropy(m(b["x"]), b["y"]))
    both.run(({"x": x, "y": y},) for x, y in batches(4))
    both.check(compiled=3)


def test_without_gradients_enabled():
    both = Both(network(), ROWS["variance"])
    with torch.no_grad():
        both.run(batches(4))
    both.check(compiled=3)


def test_a_group_is_added():
    model = network()
    for p in [*model.parameters()][2:]:
        p.requires_grad_(False)
    both = Both(model, lambda p: ROWS["variance-debiased"]([*p][:2]))
    both.run(batches(3))
    for model, opt in zip(both.models, both.opts, strict=True):
        rest = [p.requires_grad_() for p in [*model.parameters()][2:]]
        opt.add_param_group({"params": rest, "lr": 0.2})
    both.run(batches(5))
    both.check(compiled=2 + 3)  # not the first of the group, nor the first with its graph


def test_a_parameter_is_taken_out():
    """The graph that moved it is not used any more."""
    both = Both(network(), ROWS["variance"])
    both.run(batches(3))
    for opt in both.opts:
        opt.param_groups[0]["params"].pop()
    before = [*both.models[1].parameters()][-1].clone()
    with pytest.warns(UserWarning, match="not the optimizer's gets a gradient as well"):
        both.run(batches(1))
    both.run(batches(2))
    assert torch.equal([*both.models[1].parameters()][-1], before)


@pytest.mark.parametrize("others", [False, True])
def test_frozen_from_the_start(others):
    """Parameters without a part in the loss, frozen ones, and those of another optimizer."""
    model = nn.ModuleList([network(), nn.Linear(3, 3).double(), nn.Linear(2, 2).double()])
    for p in [*model[0].parameters()][3 if others else 2 :]:
        p.requires_grad_(False)

    def make(params):
        of = [*params]
        return ROWS["diag_ggn-exact"]([*of[:2], *of[6:]])

    both = Both(model, make, lambda m, x, y: F.cross_entropy(m[1](m[0](x)), y))
    both.run(batches(1))
    if others:
        with pytest.warns(UserWarning, match="not the optimizer's gets a gradient as well"):
            both.run(batches(1))
    both.run(batches(4))
    both.check(compiled=0 if others else 4)


def test_two_losses_of_parts_of_the_model():
    def loss(model, x, y):
        h = model[:2](x)
        return F.cross_entropy(model[2:](h), y) + 0.5 * h.square().sum(1).mean()

    both = Both(network(), ROWS["variance"], loss)
    both.run(batches(5))
    both.check(compiled=4)


def test_time_first():
    """Samples on the second axis; as many of them as steps."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(6, 3), nn.Linear(3, 3)]).double()

    def loss(model, x, y):
        return F.cross_entropy(model[1](model[0](x.unsqueeze(0).expand(4, 4, 6))[0][-1]), y)

    both = Both(model, ROWS["variance-debiased"], loss)
    both.run(batches(4))
    both.check(rtol=1e-9, compiled=3)


def test_one_sample():
    """Of which there is no variance: S is guessed, eagerly."""
    both = Both(network(), ROWS["variance"])
    both.run(batches(2, n=1))
    with pytest.warns(UserWarning, match="eagerly"):
        both.run([*batches(3), *batches(3, n=1)])
    both.check()


@few
def test_columns_in_memory(row):
    """Weights that are no contiguous tensors."""

    def model():
        net = network()
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
        return net

    both = Both(model(), ROWS[row])
    both.run(batches(5))
    both.check(compiled=4)


def test_a_mean_over_tokens_with_padding():
    """As GPT-2's: tokens of samples that are ignored, others in each batch."""
    both = Both(
        network(),
        ROWS["diag_ggn-exact"],
        lambda m, x, y: F.cross_entropy(m(x).view(2, 2, 3).flatten(0, 1), y),
    )
    for t, (x, y) in enumerate(batches(5)):
        y[t % 4] = -100
        both.run([(x, y)])
    both.check(rtol=1e-10, compiled=4)


def test_batch_size_and_reduction_are_given():
    def make(params):
        return curvopt.DPSGD(
            params, 0.1, noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=4,
            reduction="mean", batch_size=4,
        )  # fmt: skip

    def loss(model, x, y):
        return F.cross_entropy(model(x), y, reduction="sum") / len(x)

    both = Both(network(), make, loss)
    both.run(batches(4))
    both.check(compiled=3)


def test_views_of_a_sample():
    """Two rows of the data are one sample's."""

    def make(params):
        return curvopt.DPSGD(
            params, 0.1, noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=2, views=2
        )

    both = Both(network(), make)
    both.run(batches(4))
    assert len(both.opts[1].norms) == 2
    both.check(compiled=3)


def test_the_same_function_twice():
    """Two optimizers of two models, one function: each has graphs of its own."""
    pairs = [Both(network(), ROWS["variance"]) for _ in range(3)]
    for both in pairs:
        both.run(batches(4))
        both.check(compiled=3)


def test_what_is_returned_has_no_graph():
    both = Both(network(), ROWS["variance"])
    for batch in batches(3):
        loss = both.step(*batch)
        assert loss.grad_fn is None
        assert not loss.requires_grad
    kept = loss.clone()
    both.step(*batch)
    assert torch.equal(loss, kept)


def test_zero_grad_between():
    both = Both(network(), ROWS["variance"])
    for t, batch in enumerate(batches(6)):
        for opt in both.opts:
            opt.zero_grad(set_to_none=bool(t % 2))
        both.run([batch])
    both.check(compiled=5)


@pytest.mark.parametrize("row", ["variance-debiased", "diag_ggn-exact", "polar"])
def test_ordinary_steps_afterwards(row):
    """A loop of the usual kind goes on with the optimizer, also where it measures."""
    both = Both(network(), ROWS[row])
    both.run(batches(3))
    for batch in batches(3):
        for model, opt in zip(both.models, both.opts, strict=True):
            opt.zero_grad()
            cross_entropy(model, *batch).backward()
            opt.step()
    both.run(batches(2))
    both.check(compiled=4)


def test_a_batch_in_a_buffer_is_data():
    """What a buffer holds may be the batch: it is not the same for all samples."""

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            self.register_buffer("seen", torch.zeros(4, 6).double())

        def forward(self, x):
            return self.inner(x + 0.1 * self.seen)

    def loss(model, x, y):
        return F.cross_entropy(model(x), y)

    both = Both(Kept(), ROWS["variance"], loss)
    for x, y in batches(4):
        for model in both.models:
            model.seen = x
        both.run([(x, y)])
    both.check()
