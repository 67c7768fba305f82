"""A compiled step is the step, to rounding: all optimizers, on models of all kinds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.compiled.capture import inductor

from .common import ROWS, Both, batches, cross_entropy, network

every = pytest.mark.parametrize("row", ROWS)
some = pytest.mark.parametrize("row", ["variance", "diag_ggn-exact", "polar", "dp_adam"])


@every
def test_steps_are_equal(row):
    both = Both(network(), ROWS[row])
    both.run(batches(9))
    both.check(compiled=8)


@some
def test_parameter_groups(row):
    """Settings and learning rates of their own, and a schedule."""

    def make(params):
        first, second, *rest = params
        groups = [{"params": [first, second], "lr": 0.02, "weight_decay": 0.3}, {"params": rest}]
        return ROWS[row](groups)

    both = Both(network(), make)
    for t, batch in enumerate(batches(7)):
        for opt in both.opts:
            opt.param_groups[1]["lr"] = 0.1 / (1 + t)
        both.run([batch])
    both.check(compiled=6)


def test_inductor():
    """In float32, as users have it."""
    both = Both(network(torch.float32, (6, 3)), ROWS["diag_ggn"], compiler=inductor)
    both.run(batches(10, dtype=torch.float32))
    both.check(rtol=1e-5, atol=2e-6, compiled=9)


class Attention(nn.Module):
    """One block of a transformer, tied to its embedding."""

    def __init__(self, words=7, width=8):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("place", torch.randn(5, width))

    def forward(self, x):
        h = self.table(x) + self.place
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h + self.back(a.transpose(1, 2).flatten(2)))


def words(count, n=4):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randint(7, (n, 5), generator=draw),) * 2 for _ in range(count)]


def next_word(model, x, y):
    return F.cross_entropy(model(x)[:, :-1].flatten(0, 1), y[:, 1:].flatten())


@some
def test_transformer(row):
    torch.manual_seed(0)
    both = Both(Attention().double(), ROWS[row], next_word)
    both.run(words(4))
    both.check(rtol=1e-9, atol=1e-11, compiled=3)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Linear(16, 3)

    def forward(self, x):
        h = F.max_pool2d(self.norm(self.first(x)).relu(), 2)
        return self.last(self.second(F.pad(h, (1, 1, 1, 1))).flatten(1))


@some
def test_convolutions(row):
    """Also batch norm in evaluation mode, whose buffers are as many as there are samples."""
    torch.manual_seed(0)
    model = Images().double().eval()
    model.norm.running_var.uniform_(0.5, 2)
    draw = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(4, 2, 8, 8, generator=draw).double(), torch.randint(3, (4,), generator=draw))
        for _ in range(6)
    ]
    both = Both(model, ROWS[row])
    both.run(data)
    both.check(rtol=1e-9, atol=1e-11, compiled=5)


def summed(model, x, y):
    return 0.5 * F.mse_loss(model(x), F.one_hot(y, 3).to(x.dtype), reduction="sum")


def by_hand(model, x, y):
    return ((model(x) - F.one_hot(y, 3)) ** 2).mean()


def smooth(model, x, y):
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=x.dtype)
    return F.cross_entropy(model(x), y, weight, label_smoothing=0.1)


LOSSES = [("variance", by_hand)]
THREE = ("variance", "diag_ggn-exact", "polar")
LOSSES += [(row, loss) for row in THREE for loss in (summed, smooth)]


def test_without_damping():
    """Elements without curvature stay where they are."""

    def make(params):
        return curvopt.DiagGGNOptimizer(params, 1e-2, estimator="exact", damping=0.0)

    both = Both(network(), make)
    both.run((torch.cat([x[:, :3], 0 * x[:, 3:]], 1), y) for x, y in batches(6))
    both.check(rtol=1e-9, atol=1e-11, compiled=5)


@pytest.mark.parametrize(("row", "loss"), LOSSES)
def test_losses(row, loss):
    both = Both(network(), ROWS[row], loss)
    both.run(batches(6))
    both.check(rtol=1e-9, compiled=5)


def penalized(model, x, y):
    return cross_entropy(model, x, y) + 0.1 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("row", ["variance", "dp_sgd"])
def test_penalties(row):
    both = Both(network(), ROWS[row], penalized)
    both.run(batches(6))
    both.check(compiled=5)


@pytest.mark.parametrize("row", ["variance", "diag_ggn", "polar-decay"])
def test_tied_layers(row):
    layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)]).double()

    def loss(model, x, y):
        return F.cross_entropy(model[1](model[0](model[0](x).relu()).relu()), y)

    both = Both(layers, ROWS[row], loss)
    both.run(batches(6))
    both.check(rtol=1e-10, compiled=5)


@pytest.mark.parametrize("row", ["diag_ggn", "polar", "dp_sgd"])
def test_recurrent_layers(row):
    """Dynamo leaves them out by default."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)]).double()

    def loss(model, x, y):
        return F.cross_entropy(model[1](model[0](x.view(4, 2, 3))[0][:, -1]), y)

    both = Both(model, ROWS[row], loss)
    both.run(batches(5))
    both.check(rtol=1e-9, compiled=4)


@pytest.mark.parametrize("row", ["variance", "polar"])
def test_gpt2_as_it_comes(row):
    transformers = pytest.importorskip("transformers", reason="it is of the dev extra alone")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=7, n_positions=8, attn_pdrop=0, embd_pdrop=0,
        resid_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    both = Both(model, ROWS[row], lambda m, x, y: m(x, labels=y).loss)
    both.run(words(4))
    both.check(rtol=1e-9, atol=1e-10, compiled=3)


def test_encoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    model = nn.ModuleList([layer, nn.Linear(6, 3)]).double()

    def loss(model, x, y):
        return F.cross_entropy(model[1](model[0](x.view(4, 1, 6).expand(4, 3, 6)).mean(1)), y)

    both = Both(model, ROWS["variance"], loss)
    both.run(batches(5))
    both.check(rtol=1e-9, compiled=4)


@pytest.mark.parametrize("row", ["variance", "dp_sgd"])
def test_dropout_draws_the_same_masks(row):
    model = network().append(nn.Dropout(0.3))
    both = Both(model, ROWS[row])
    torch.manual_seed(5)
    both.run(batches(6))
    both.check(compiled=5)


@pytest.mark.parametrize("row", ["variance", "polar"])
def test_half_precision_parameters(row):
    both = Both(network(torch.bfloat16), ROWS[row])
    for batch in batches(5, dtype=torch.bfloat16):
        both.take(*batch)
    both.check(rtol=2e-2, atol=2e-2, compiled=4)


@pytest.mark.parametrize("row", ["diag_ggn-exact", "polar"])
def test_autocast(row):
    """Inside of the function and around the step."""

    def loss(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    both = Both(network(torch.float32), ROWS[row], loss)
    both.run(batches(5, dtype=torch.float32))
    both.check(rtol=1e-3, atol=1e-4, compiled=4)


def test_loss_and_output():
    """A function may return the model's output as well."""

    def loss(model, x, y):
        output = model(x)
        return F.cross_entropy(output, y), output

    both = Both(network(), ROWS["variance"], loss)
    for batch in batches(4):
        (_, wanted), (value, output) = both.take(*batch)
        torch.testing.assert_close(output, wanted.detach())
        assert not value.requires_grad
        assert not output.requires_grad
    both.check(compiled=3)
