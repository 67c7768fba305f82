"""Tables: tokens, positions, bags; padding and repeated indices; nothing of the table's size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.structures import Lookup, Outer, Tied
from tests.cases import LOSSES, Model, build, function
from tests.ops.rows import exact
from tests.oracles import assert_close, batch_grad
from tests.test_quantities import check


def ids(x, size):
    """Indices made of data; repeated within a sample and across samples."""
    return x.mul(3).long().remainder(size)


def table(look_up, *shape):
    """`look_up(indices, table)`."""
    return function(lambda x, w: look_up(ids(x, shape[0]), w).sigmoid(), w=shape)


class Language(nn.Module):
    """Tokens and positions; the positions made in the forward pass, kept as a buffer, or sliced."""

    def __init__(self, positions, tied=False):
        super().__init__()
        self.kind = positions
        self.tokens, self.positions = nn.Embedding(5, 3, padding_idx=1), nn.Embedding(6, 3)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.register_buffer("steps", torch.arange(6))

    def forward(self, x):
        size = x.shape[1]
        if self.kind == "made":
            positions = self.positions(torch.arange(size).unsqueeze(0))
        elif self.kind == "buffer":
            positions = self.positions(self.steps[:size])
        elif self.kind == "first":
            positions = self.positions(self.steps[None, :size])
        else:
            positions = self.positions.weight[:size]
        h = self.tokens(ids(x, 5)) + positions
        return self.head(self.mix(h.mT).mT.tanh())


class Relative(nn.Module):
    """A bias per distance, looked up once for all samples."""

    def __init__(self, size=4):
        super().__init__()
        self.table, self.linear = nn.Parameter(torch.randn(2 * size - 1, 2)), nn.Linear(3, 3)
        steps = torch.arange(size)
        self.register_buffer("index", steps[:, None] - steps + size - 1)

    def forward(self, x):
        h = self.linear(x)
        bias = self.table[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1)
        return ((h @ h.mT).unsqueeze(1) + bias.unsqueeze(0)).softmax(-1)


def bags(**options):
    """Bags of equal length, as a matrix of indices."""
    return function(lambda x, w: F.embedding_bag(ids(x, 5), w, **options).sigmoid(), w=(5, 3))


def weighted_bag(x, w):
    return F.embedding_bag(ids(x, 5), w, mode="sum", per_sample_weights=x).sin()


class Ragged(nn.Module):
    """Offsets and their bags for any batch: a sample's first lookups, or those its data say."""

    def __init__(self, last=False, of_data=False, **options):
        super().__init__()
        self.weight, self.last, self.options = nn.Parameter(torch.randn(5, 3)), last, options
        self.of_data = of_data

    def forward(self, x):
        kept = torch.arange(6).expand(len(x), 6) < 4
        if self.of_data:
            kept = x > 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(1).cumsum(0)])
        offsets = offsets if self.last else offsets[:-1]
        options = {**self.options, "include_last_offset": self.last}
        return F.embedding_bag(ids(x, 5)[kept], self.weight, offsets, **options).sigmoid()


ROWS = {
    "embedding": Model((), table(F.embedding, 5, 3)),
    "embedding-tokens": Model((6,), table(F.embedding, 5, 3)),
    "embedding-axes": Model((2, 6), table(F.embedding, 3, 2)),
    "embedding-padding": Model((6,), table(lambda i, w: F.embedding(i, w, 1), 5, 3)),
    "embedding-padding-negative": Model((6,), table(lambda i, w: F.embedding(i, w, -1), 3, 2)),
    "embedding-time-first": Model(
        (6,), table(lambda i, w: F.embedding(i.T, w).transpose(0, 1), 5, 3)
    ),
    "embedding-flattened": Model(
        (6,), table(lambda i, w: F.embedding(i.flatten(), w).view(*i.shape, -1), 5, 3)
    ),
    "language": Model((4,), lambda: Language("made")),
    "language-buffer": Model((4,), lambda: Language("buffer")),
    "language-buffer-first": Model((4,), lambda: Language("first")),
    "language-sliced": Model((4,), lambda: Language("sliced")),
    "language-tied": Model((4,), lambda: Language("made", tied=True)),
    "relative-bias": Model((4, 3), Relative),
    "index": Model((6,), table(lambda i, w: w[i], 5, 3)),
    "index-negative": Model((6,), table(lambda i, w: w[-i - 1], 5, 3)),
    "index-vector": Model((6,), table(lambda i, w: w[i], 5)),
    "index-matrices": Model((), table(lambda i, w: w[i], 5, 2, 3)),
    "index-select": Model((), table(lambda i, w: w.index_select(0, i), 5, 3)),
}

BAGS = {
    "bag-mean": Model((6,), bags()),
    "bag-sum": Model((6,), bags(mode="sum")),
    "bag-padding": Model((6,), bags(padding_idx=0)),
    "bag-weights": Model((6,), function(weighted_bag, w=(5, 3))),
    "bag-offsets": Model((6,), lambda: Ragged(mode="sum")),
    "bag-offsets-last": Model((6,), lambda: Ragged(last=True)),
    "bag-offsets-padding": Model((6,), lambda: Ragged(padding_idx=2)),
}

test_exact = exact(ROWS)
test_exact_bags = exact(BAGS, slopes=False)  # torch has no second derivative of them


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model_loss_on_flattened_tokens(n, tied):
    make = ROWS["language-tied" if tied else "language-buffer"].make
    check(build(make, (4,), LOSSES["tokens"], n))


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"max_norm": 1.0}, r"embedding \[5, 3\] with max_norm=1.0"),
        ({"scale_grad_by_freq": True}, "counts over the batch"),
        ({"sparse": True}, "sparse gradients"),
    ],
)
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_options_that_are_refused(layer, option, match):
    layer = layer(5, 3, **option)
    with pytest.raises(curvopt.CurvoptError, match=match):
        curvopt.compute(
            lambda: layer(torch.zeros(2, 4).long()).mean(), layer.parameters(), curvopt.BatchGrad()
        )


def test_bags_with_max_are_slow_but_exact():
    problem = build(bags(mode="max"), (6,), LOSSES["mse"])
    with pytest.warns(curvopt.SlowPathWarning, match="embedding_bag"):
        result = curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad())
    assert_close(result.batch_grad, batch_grad(*problem))


def test_large_tables_are_never_formed(monkeypatch):
    layer, ids = nn.Embedding(10**6, 4), torch.randint(10**6, (64, 8))
    monkeypatch.setattr(Lookup, "rows", None)
    quantities = curvopt.Variance(), curvopt.ClippedGradSum(1.0)
    curvopt.compute(lambda: layer(ids).square().sum(), layer.parameters(), *quantities)


def test_tied_tables_are_never_formed(monkeypatch):
    layer, ids = nn.Embedding(10**4, 16), torch.randint(10**4, (4, 8))
    monkeypatch.setattr(Tied, "rows", None)
    monkeypatch.setattr(Outer, "rows", None)

    def closure():
        return F.cross_entropy(F.linear(layer(ids), layer.weight).mT, ids)

    curvopt.compute(closure, layer.parameters(), curvopt.ClippedGradSum(1.0))


def test_offsets_that_follow_from_the_data_are_refused():
    """Where a bag begins depends on the samples in front of it."""
    problem = build(lambda: Ragged(of_data=True), (6,), LOSSES["mse"])
    with pytest.raises(curvopt.CurvoptError, match="not separate.*cumsum"):
        curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad())


COLLATED = {
    "empty": ([0, 3, 3, 8, 14], 15),
    "one-each": ([0, 1, 2, 3, 4], 5),
    "as-many-as-bags": ([0, 0, 1, 2, 4], 5),
    "equal": ([0, 4, 8, 12, 16], 20),
}


@pytest.mark.parametrize("last", [False, True], ids=["starts", "last"])
@pytest.mark.parametrize(("offsets", "size"), COLLATED.values(), ids=COLLATED)
def test_bags_as_a_loader_collates_them(offsets, size, last):
    """Texts of a batch in one vector, and where each begins: a bag is a sample's."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(10, 4, include_last_offset=last).double()
    head = nn.Linear(4, 3).double()
    net = nn.ModuleList([bag, head])
    words, y = torch.randint(10, (size,)), torch.tensor([0, 1, 2, 0, 1])
    starts = torch.tensor(offsets + [size] * last)
    with curvopt.record(net.parameters()) as tape:
        loss = F.cross_entropy(head(bag(words, starts)), y)
    found = tape.compute(loss, curvopt.BatchGrad()).batch_grad
    for n, (start, end) in enumerate(zip(offsets, [*offsets[1:], size], strict=True)):
        one = F.embedding_bag(words[start:end], bag.weight, torch.tensor([0]))
        grads = torch.autograd.grad(F.cross_entropy(head(one), y[n : n + 1]), net.parameters())
        for p, grad in zip(net.parameters(), grads, strict=True):
            torch.testing.assert_close(found[p][n], grad)


def test_a_private_step_with_bags_is_bounded():
    """Each text is clipped, however many words it has."""
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(10, 4), nn.Linear(4, 3)
    net = nn.ModuleList([bag, head])
    opt = curvopt.DPSGD(
        net.parameters(), lr=1.0, noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=5
    )
    words, starts = torch.randint(10, (15,)), torch.tensor([0, 3, 3, 8, 14])
    y = torch.tensor([0, 1, 2, 0, 1])
    sums = torch.zeros(sum(p.numel() for p in net.parameters()))
    for n, (start, end) in enumerate(zip(starts, [*starts[1:], torch.tensor(15)], strict=True)):
        one = F.embedding_bag(words[start:end], bag.weight, torch.tensor([0]))
        grads = torch.autograd.grad(F.cross_entropy(head(one), y[n : n + 1]), net.parameters())
        flat = torch.cat([grad.flatten() for grad in grads])
        sums += flat * min(1.0, 0.1 / float(flat.norm()))
    opt.step(lambda: F.cross_entropy(head(bag(words, starts)), y))
    given = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(given, sums / 5)
