"""The samples of real situations: their number is right, or the refusal that is right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvopt.axes import Replay, Trace, infer
from curvopt.errors import CurvoptError

N, D, C = 8, 6, 3
CE = F.cross_entropy
MIXES = "samples are not separate"


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setattr(Replay, "strict", True)


class World:
    """Data and models, made anew for every test."""

    def __init__(self):
        torch.manual_seed(0)
        self.x, self.x2, self.y = torch.randn(N, D), torch.randn(N, D), torch.randint(C, (N,))
        self.y2, self.w = torch.randint(C, (N,)), torch.rand(N)
        self.x4, self.y4 = torch.randn(4, D), torch.randint(C, (4,))
        self.x16 = torch.randn(16, D)
        self.seq, self.tags = torch.randn(4, 5, D), torch.randint(C, (4, 5))
        self.kept = torch.tensor([True, False, True, True, False, True, True, True])
        self.rows = torch.arange(5)[None] < torch.tensor([1, 5, 2, 4])[:, None]
        self.nodes, self.tags1 = torch.randn(12, D), self.tags[:1].clone()
        self.numbers = {n: torch.rand(n) for n in (1, 4, D)}
        self.table, self.labels = torch.randn(50, D), torch.randint(C, (50,))
        self.draw = torch.tensor([3, 7, 7, 1, 0, 49, 2, 3])
        self.order = torch.tensor([3, 0, 1, 2, 7, 4, 5, 6])
        self.m = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
        self.other = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
        self.bn = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
        self.gn = nn.Sequential(nn.Linear(D, 4), nn.GroupNorm(2, 4), nn.Linear(4, C))
        self.one = nn.Linear(1, 1)
        self.words, self.head = nn.Embedding(10, D), nn.Linear(D, 10)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.lstm = nn.LSTM(D, 4)
        self.gate = nn.Parameter(torch.zeros(()))
        modules = [self.m, self.other, self.bn, self.gn, self.one, self.words, self.head]
        self.modules = nn.ModuleList([*modules, self.attention, self.lstm])

    def silent(self, trace):
        tensors = [*self.modules.parameters(), *self.modules.buffers(), self.gate]
        return {trace.ref(tensor).storage for tensor in tensors}

    def hidden(self, change):
        """The model with a change between its layers."""
        return self.m[2](change(self.m[1](self.m[0](self.x))))

    def lm(self, ids, labels):
        h = self.words(ids)
        return CE(self.head(self.attention(h, h, h)[0]).flatten(0, 1), labels.flatten())


def found(function, batch_size=None, world=None):
    world = world or World()
    with Trace() as trace:
        loss = function(world)
    return infer(trace, loss, silent=world.silent(trace), batch_size=batch_size)


def per_sample(w):
    return CE(w.m(w.x), w.y, reduction="none")


def zeroed(w):
    for p in w.m.parameters():
        p.grad = torch.zeros_like(p)
    w.m.zero_grad(set_to_none=False)
    nn.utils.clip_grad_norm_(w.m.parameters(), 1.0)
    with torch.no_grad():
        for p, q in zip(w.m.parameters(), w.other.parameters(), strict=True):
            q.lerp_(p, 0.1)
    return CE(w.m(w.x), w.y)


def forces(w):
    x = w.x.clone().requires_grad_()
    energy = w.m(x).square().sum()
    return F.mse_loss(torch.autograd.grad(energy, x, create_graph=True)[0], w.x2)


def experts(w):
    h = w.seq.flatten(0, 1)
    route = (w.tags.flatten() == 0).nonzero().squeeze(1)
    square = w.m[0].weight.t() @ w.m[0].weight
    h = h.index_add(0, route, F.linear(h[route], square).tanh())
    return CE(w.m(h.view(4, 5, D).mean(1)), w.tags[:, 0])


def ragged(w):
    h = w.m(w.seq[w.rows]).tanh()
    pooled = torch.zeros(4, C).index_add(0, w.rows.nonzero()[:, 0], h)
    return CE(pooled, w.y4)


def graphs(w):
    """Four graphs of three nodes, edges within them."""
    nodes, of = w.nodes, torch.arange(4).repeat_interleave(3)
    source, target = torch.tensor([0, 1, 3, 4, 6, 7]), torch.tensor([1, 2, 4, 5, 7, 8])
    h = w.m[0](nodes)
    h = h.index_add(0, target, h[source]).tanh()
    return CE(w.m[2](torch.zeros(4, 4).index_add(0, of, h)), w.y4)


def class_token(w):
    token = w.gate.expand(4, 1, D)
    h = torch.cat([token, w.seq], 1)
    return CE(w.m(w.attention(h, h, h)[0][:, 0]), w.y4)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g


SEPARABLE = {
    "plain": (lambda w: CE(w.m(w.x), w.y), 8),
    "group norm": (lambda w: CE(w.gn(w.x), w.y), 8),
    "batch norm in evaluation mode": (lambda w: CE(w.bn.eval()(w.x), w.y), 8),
    "a random number first": (lambda w: CE(w.m(w.x * (torch.rand(1) < 2)), w.y), 8),
    "gradients zeroed, clipped, averaged first": (zeroed, 8),
    "a constant of one": (lambda w: CE(w.m(w.numbers[1] * w.x), w.y), 8),
    "normalized by channel": (lambda w: CE(w.m((w.x - w.numbers[D]) / w.numbers[D]), w.y), 8),
    "class weights": (lambda w: CE(w.m(w.x), w.y, weight=w.numbers[4][:C] / 2), 8),
    "concatenated": (lambda w: CE(w.m(torch.cat([w.x, w.x2])), torch.cat([w.y, w.y2])), 16),
    "stacked views": (
        lambda w: CE(w.m(torch.stack([w.x, w.x2]).flatten(0, 1)), torch.cat([w.y, w.y2])),
        16,
    ),
    "repeated": (lambda w: CE(w.m(w.x.repeat(2, 1)), w.y.repeat(2)), 8),
    "repeat_interleave": (
        lambda w: CE(w.m(w.x.repeat_interleave(2, 0)), w.y.repeat_interleave(2)),
        8,
    ),
    "cdist": (lambda w: CE(w.head(torch.cdist(w.table[:D], w.x).t()), w.y), 8),
    "einsum": (lambda w: CE(w.m(torch.einsum("kd,nd->nk", w.table[:D], w.x)), w.y), 8),
    "drawn": (lambda w: CE(w.m(w.table[w.draw]), w.labels[w.draw]), 8),
    "a list in the closure": (
        lambda w: CE(w.m(torch.tensor(w.x.tolist())), torch.tensor(w.y.tolist())),
        8,
    ),
    "arrays": (lambda w: CE(w.m(torch.from_numpy(w.x.numpy().copy())), w.y), 8),
    "linspace": (lambda w: w.one(torch.linspace(0, 1, N)[:, None]).square().mean(), 8),
    "latents": (lambda w: F.softplus(-w.m(torch.zeros(N, D).normal_())).mean(), 8),
    "randn": (lambda w: F.softplus(-w.m(torch.randn(N, D))).mean(), 8),
    "stacked tensors": (lambda w: CE(w.m(torch.stack([t.clone() for t in w.x4])), w.y4), 4),
    "a loop": (
        lambda w: torch.stack([CE(w.m(w.x[i : i + 1]), w.y[i : i + 1]) for i in range(N)]).mean(),
        8,
    ),
    "a sum of a loop": (
        lambda w: sum(CE(w.m(w.x[i : i + 1]), w.y[i : i + 1]) * w.w[i] for i in range(N)) / N,
        8,
    ),
    "two chunks": (lambda w: CE(w.m(w.x[:4]), w.y[:4]) + CE(w.m(w.x[4:]), w.y[4:]), 8),
    "chunks concatenated": (lambda w: CE(torch.cat([w.m(c) for c in w.x.chunk(2)]), w.y), 8),
    "heads of 8 and 4": (lambda w: CE(w.m(w.x), w.y) + CE(w.other(w.x4), w.y4), 12),
    "labeled and unlabeled": (
        lambda w: CE(w.m(w.x), w.y) + (w.m(w.x16).square().sum(1) * 0.5).mean(),
        24,
    ),
    "boundary and interior": (
        lambda w: w.m(w.x4).square().mean() + (w.m(w.x) - 1).square().mean(),
        12,
    ),
    "a penalty": (
        lambda w: CE(w.m(w.x), w.y) + 0.1 * sum((p**2).sum() for p in w.m.parameters()),
        8,
    ),
    "swapped arguments": (lambda w: F.mse_loss(torch.zeros(N, C), w.m(w.x)), 8),
    "two models": (lambda w: F.mse_loss(w.m(w.x), w.other(w.x2)), 8),
    "focal": (lambda w: ((1 - (-per_sample(w)).exp()) ** 2 * per_sample(w)).mean(), 8),
    "triplet": (lambda w: F.triplet_margin_loss(w.m(w.x), w.m(w.x2), w.m(w.x * 0.5)), 8),
    "gaussian": (lambda w: F.gaussian_nll_loss(w.m(w.x)[:, 0], w.w, w.m(w.x)[:, 1].exp()), 8),
    "ctc": (
        lambda w: F.ctc_loss(
            w.head(w.seq).log_softmax(2).transpose(0, 1),
            w.tags[:, :2] + 1,
            torch.full((4,), 5),
            torch.full((4,), 2),
        ),
        4,
    ),
    "weighted": (lambda w: (per_sample(w) * w.w).sum(), 8),
    "weights by dot": (lambda w: torch.dot(per_sample(w), w.w), 8),
    "accumulated": (lambda w: CE(w.m(w.x), w.y) / 4, 8),
    "scaled": (lambda w: CE(w.m(w.x), w.y) * torch.tensor(1024.0), 8),
    "identity permutation": (lambda w: CE(w.hidden(lambda h: h + h[torch.arange(N)]), w.y), 8),
    "shift by nothing": (lambda w: CE(w.hidden(lambda h: h + torch.cat([h[0:], h[:0]])), w.y), 8),
    "forces": (forces, 8),
    "vmap": (lambda w: CE(torch.vmap(w.m)(w.x), w.y), 8),
    "experts": (experts, 4),
    "ragged": (ragged, 4),
    "graphs": (graphs, 4),
    "a class token": (class_token, 4),
    "tokens": (lambda w: w.lm(w.tags, w.tags), 4),
    "positions": (lambda w: CE(w.m((w.seq + w.words(torch.arange(5))).mean(1)), w.y4), 4),
    "gan": (lambda w: F.softplus(-w.m(w.x)).mean() + F.softplus(w.m(w.x2)).mean(), 16),
    "masked rows, summed": (lambda w: (per_sample(w)[w.kept]).sum(), 8),
    "mask by labels, summed": (
        lambda w: CE(w.m(w.x)[w.y != 0], w.y[w.y != 0], reduction="sum"),
        8,
    ),
    "fourier": (
        lambda w: torch.view_as_real(torch.fft.fft(w.m(w.x) * (1 + 2j))).square().mean(),
        8,
    ),
    "one of one": (lambda w: CE(w.m(w.x[:1]), w.y[:1]), 1),
    "one from outside": (lambda w: CE(w.m(w.table[None, 0]), w.labels[None, 0]), 1),
    "one sequence": (lambda w: w.lm(w.tags1, w.tags1), 1),
    "none": (lambda w: CE(w.m(w.x[:0].clone()), w.y[:0].clone(), reduction="sum"), 0),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable(name):
    function, n = SEPARABLE[name]
    samples = found(function)
    assert (samples.n, samples.kind, samples.reason) == (n, "separable", "")
    if n:
        owners = samples.owners[samples.owners >= 0].unique().tolist()
        assert set(owners) <= set(range(n))


COUPLED = {
    "batch norm": (lambda w: CE(w.bn(w.x), w.y), "native_batch_norm"),
    "batch mean": (lambda w: CE(w.hidden(lambda h: h - h.mean(0)), w.y), "mean of"),
    "times nothing": (lambda w: CE(w.hidden(lambda h: h - 0.0 * h.mean(0)), w.y), "mean of"),
    "a closed gate": (
        lambda w: CE(w.hidden(lambda h: h + w.gate * h.std(0)), w.y),
        "std of",
    ),
    "weak": (lambda w: CE(w.hidden(lambda h: h - 1e-7 * h.mean(0)), w.y), "mean of"),
    "detached": (lambda w: CE(w.hidden(lambda h: h - h.detach().mean(0)), w.y), "mean of"),
    "before the model": (lambda w: CE(w.m(w.x - w.x.mean(0)), w.y), "mean of"),
    "custom function": (lambda w: CE(w.m(Centred.apply(w.x)), w.y), "mean of"),
    "attention over the batch": (
        lambda w: CE(w.hidden(lambda h: (h @ h.T).softmax(-1) @ h), w.y),
        "mm of",
    ),
    "shift": (lambda w: CE(w.hidden(lambda h: h + torch.cat([h[1:], h[:1]])), w.y), "add of"),
    "mixup": (lambda w: CE(w.hidden(lambda h: 0.7 * h + 0.3 * h[w.order]), w.y), "add of"),
    "similarities": (lambda w: CE((lambda h: h @ h.T)(w.m(w.x)), torch.arange(N)), "mm of"),
    "root of the mean": (lambda w: F.mse_loss(w.m(w.x), w.x[:, :C]).sqrt(), "mse_loss"),
    "largest losses": (lambda w: per_sample(w).topk(4).values.mean(), "topk"),
    "sorted losses": (lambda w: (per_sample(w).sort().values * w.w).mean(), "sort"),
    "broadcast": (lambda w: ((w.m(w.x)[:, :1] - w.w) ** 2).mean(), "broadcast"),
    "one row for all": (lambda w: CE(w.m(w.x2 + w.x[0]), w.y), "met by several"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled(name):
    function, why = COUPLED[name]
    with pytest.raises(CurvoptError, match=f"{MIXES}.*{why}"):
        found(function)


WEIGHTS = {
    "a count": lambda w: (per_sample(w) * w.kept).sum() / w.kept.sum(),
    "a count of labels": lambda w: CE(w.m(w.x), w.y, reduction="sum") / (w.y != 2).sum(),
    "a count that Python read": lambda w: (per_sample(w) * w.kept).sum() / w.kept.sum().item(),
    "normalized weights": lambda w: (per_sample(w) * (w.w / w.w.sum())).sum(),
    "normalized advantages": lambda w: (per_sample(w) * (w.w - w.w.mean()) / w.w.std()).mean(),
    "the loss itself": lambda w: (lambda loss: loss / loss.detach())(CE(w.m(w.x), w.y)),
    "softmax of losses": lambda w: (lambda loss: (loss * loss.detach().softmax(0)).sum())(
        per_sample(w)
    ),
    "the weight of another sample": lambda w: CE(w.m(w.x), w.y) * w.w[0],
    "an input as a weight": lambda w: CE(w.m(w.x), w.y) * w.x[0, 0],
    "mean of masked rows": lambda w: per_sample(w)[w.kept].mean(),
    "mean of rows masked by labels": lambda w: per_sample(w)[w.y != 0].mean(),
    "mean over masked logits": lambda w: CE(w.m(w.x)[w.kept], w.y[w.kept]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    samples = found(WEIGHTS[name])
    assert (samples.n, samples.kind) == (N, "weights")
    [weighing, *_] = samples.weighings
    kind = "number" if "Python" in name else "count" if name.startswith("mean") else "coefficient"
    assert (weighing.kind, weighing.why) == (kind, samples.reason)
    names = {
        "coefficient": ("mul", "div"),
        "count": ("mean", "nll_loss_forward"),
        "number": ("div",),
    }
    assert samples.trace.ops[weighing.op].name in names[kind]


# ---- batch_size is a constraint


@pytest.mark.parametrize("batch_size", [None, N])
@pytest.mark.parametrize("name", ["plain", "repeated", "drawn", "forces", "vmap"])
def test_the_right_batch_size_changes_nothing(name, batch_size):
    assert found(SEPARABLE[name][0], batch_size).n == N


def labeled_only(w):
    """As DebertaForSequenceClassification computes its loss."""
    rows = (w.y >= 0).nonzero()
    logits = w.m(w.x).gather(0, rows.expand(-1, C))
    return CE(logits, w.y.gather(0, rows.view(-1)))


def test_rows_gathered_by_positions():
    samples = found(labeled_only)
    assert samples.n == N
    assert [weighing.kind for weighing in samples.weighings] == ["count"]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("name", ["plain", "repeated"])
def test_a_wrong_batch_size_is_refused(name, batch_size):
    with pytest.raises(CurvoptError, match=rf"batch_size={batch_size} contradicts.* 8 samples"):
        found(SEPARABLE[name][0], batch_size)


@pytest.mark.parametrize("name", ["concatenated", "stacked views", "gan"])
def test_views_of_one_sample(name):
    function, n = SEPARABLE[name]
    assert found(function, n).n == n
    samples = found(function, N)
    assert samples.n == N
    assert samples.owners.tolist()[: n // 2 * 0 + 1] == [0]
    owners = samples.owners.reshape(2, N, -1)
    assert torch.equal(owners[0], owners[1])


def test_batch_size_does_not_help_coupled_samples():
    for batch_size in (N, 1):
        with pytest.raises(CurvoptError):
            found(COUPLED["batch norm"][0], batch_size)


def test_an_unbatched_loss_asks():
    for function in (
        lambda w: CE(w.m(w.x[0]), w.y[0]),
        lambda w: CE(w.m(w.table[0].clone()), w.labels[0].clone()),
        lambda w: F.mse_loss(w.m(torch.tensor(w.x[0].tolist())), torch.tensor([1.0, 2.0, 3.0])),
    ):
        with pytest.raises(CurvoptError, match="batch_size=1"):
            found(function)
        assert found(function, 1).n == 1


def test_one_sequence_or_as_many_samples_as_labels():
    def flat(w):
        return w.lm(w.tags1, torch.tensor([1, 2, 0, 1, 2]))

    with pytest.raises(CurvoptError, match=r"ambiguous.*\[1, 5\].*5 samples.*batch_size=1 or"):
        found(flat)
    assert found(flat, 1).n == 1
    with pytest.raises(CurvoptError, match=MIXES):
        found(flat, 5)


def test_other_dims_by_batch_size():
    def elements(w):
        return (w.seq[:, :, 0] * w.gate - 1).square().mean()

    assert found(elements).n == 4
    assert found(elements, 5).n == 5


def test_a_feature_axis_of_one_is_no_batch_of_one():
    def features(w):
        return F.mse_loss(w.one(w.w[:, None].clone()), w.w[:, None] * 2)

    assert found(features).n == N


def test_a_row_for_all_of_the_length_of_the_batch():
    def shifted(w):
        x, row = torch.tensor(torch.randn(6, 6).tolist()), torch.tensor([[1.0, 2, 3, 4, 5, 6]])
        return CE(w.m(x + row), torch.tensor([0, 1, 2, 0, 1, 2]))

    with pytest.raises(CurvoptError, match="batch_size=1 or batch_size=6"):
        found(shifted)
    samples = found(shifted, 6)
    assert samples.n == 6
    assert [ref.shape for ref in samples.shared] == [(1, 6)]


def test_no_data():
    with pytest.raises(CurvoptError, match="no samples found"):
        found(lambda w: sum((p**2).sum() for p in w.m.parameters()))


def test_a_loss_from_elsewhere():
    world = World()
    loss = CE(world.m(world.x), world.y)
    with Trace() as trace:
        world.m(world.x)
    with pytest.raises(CurvoptError, match="not computed in the recorded pass"):
        infer(trace, loss, silent=world.silent(trace))


# ---- shared data


def test_shared_and_drawn_data_are_named():
    samples = found(SEPARABLE["normalized by channel"][0])
    assert [ref.shape for ref in samples.shared] == [(D,)]
    samples = found(SEPARABLE["drawn"][0])
    assert {tuple(ref.shape) for ref in samples.drawn} == {(50, D), (50,)}
    assert not samples.value_dependent
    assert not found(SEPARABLE["plain"][0]).shared


# ---- holes that were found, each closed


def test_hole_1_unseeded_data_is_no_constant():
    """x mixes along all its dims, and the labels alone would carry the samples."""
    with pytest.raises(CurvoptError, match=MIXES):
        found(lambda w: CE(w.m(w.x - w.x.mean(0)), w.y))


def test_hole_2_coefficients_are_checked():
    assert found(WEIGHTS["normalized advantages"]).kind == "weights"
    assert found(lambda w: CE(w.m(w.x), w.y) / w.w.std()).kind == "weights"


def test_hole_3_rows_picked_for_all():
    for function in (
        lambda w: CE(w.m(w.x2 + w.x[3]), w.y),
        lambda w: CE(w.m(w.x[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])]), w.y),
    ):
        with pytest.raises(CurvoptError, match=MIXES):
            found(function)


def test_hole_4_owners_claimed_in_the_middle_hide_nothing():
    """A stack that the pass made of mixed data is no place to find samples."""
    with pytest.raises(CurvoptError, match=MIXES):
        found(lambda w: F.softplus(w.m(torch.stack(list((w.x - w.x.mean(0)).unbind())))).mean())


def test_hole_5_a_cut_that_does_not_cut_this_time():
    def cut(w):
        i = (w.tags.flatten() >= 0).nonzero().squeeze(1)[:99]
        h = w.seq.flatten(0, 1)
        return CE(w.m(h.index_add(0, i, h[i].tanh()).view(4, 5, D).mean(1)), w.y4)

    with pytest.raises(CurvoptError, match=MIXES):
        found(cut)


def test_hole_6_shapes_in_place_write_nothing():
    def squeezed(w):
        x = w.x[:, None].clone()
        x.squeeze_(1)
        return CE(w.m(x), w.y)

    assert found(squeezed).n == N


def test_hole_7_what_an_owned_index_does_not_hit_depends_on_it():
    def one_hot(w):
        hot = torch.zeros(N, N).scatter(0, w.y[None], 1.0)
        return CE(w.m(w.x) + hot[:, :C], w.y)

    with pytest.raises(CurvoptError, match=MIXES):
        found(one_hot)


def test_hole_8_positions_on_a_ragged_axis():
    def counted(w):
        i = (w.tags.flatten() == 1).nonzero().squeeze(1)
        h = w.seq.flatten(0, 1)
        scaled = h[i] * torch.arange(len(i))[:, None]
        return CE(w.m(h.index_add(0, i, scaled).view(4, 5, D).mean(1)), w.y4)

    with pytest.raises(CurvoptError, match=MIXES):
        found(counted)


def test_running_statistics_of_other_data():
    """Written by a kernel whose schema does not say so, and read in the same pass."""

    def normalized(w):
        mean, var = torch.zeros(D), torch.ones(D)
        F.batch_norm(w.x2, mean, var, training=True)
        return CE(w.m(F.batch_norm(w.x, mean, var)), w.y)

    with pytest.raises(CurvoptError, match=f"{MIXES}.*batch_norm"):
        found(normalized)


def test_a_loss_without_a_rule_for_its_call_is_mixed():
    """Rows that a rule did not work out do not count as constant."""

    def unbatched(w):
        return CE(w.m(w.x).mean(0)[None].expand(2, -1), w.y[:2])

    with pytest.raises(CurvoptError, match=MIXES):
        found(unbatched)


# ---- what is asked of the samples later


def test_rows_and_paths():
    def loss(w):
        return CE(w.m(w.x), w.y, reduction="sum") / N + 0.5 * (w.m(w.x2) ** 2).mean(0).sum()

    samples = found(loss)
    assert samples.n == 2 * N
    kernel = next(row for row in samples.rows if row.kind == "loss")
    square = next(row for row in samples.rows if row.kind == "input")
    [[divided]] = kernel.paths
    assert (divided.name, divided.number) == ("div", N)
    [path] = square.paths
    assert [(p.name, p.number, p.dims) for p in path] == [
        ("mul", 0.5, None),
        ("sum", None, (0,)),
        ("mean", None, (0,)),
    ]
    assert path[-1].length == N
    assert samples.frontier.numbers == [N, 0.5] or samples.frontier.numbers == [0.5, N]
    n = samples.rows.index(square)
    assert samples.owners_of(n).shape == (N, C)
    assert torch.equal(samples.owners_of(n)[:, 0], samples.owners_of(n)[:, 2])


def test_a_row_that_counts_twice_has_two_paths():
    samples = found(lambda w: (lambda rows: rows.mean() + 2 * rows.sum())(per_sample(w)))
    [row] = samples.rows
    assert {tuple(p.name for p in path) for path in row.paths} == {("mean",), ("mul", "sum")}


def test_further_claims_are_verified():
    world = World()
    with Trace() as trace:
        copies = world.gate.expand(4, 1, D)
        k = len(trace.ops)
        h = torch.cat([copies, world.seq], 1)
        loss = CE(world.m(world.attention(h, h, h)[0][:, 0]), world.y4)
    samples = infer(trace, loss, silent=world.silent(trace))
    ref, end = trace.ref(copies), len(trace.ops)
    claim = torch.arange(4, dtype=torch.int32).reshape(4, 1, 1)
    marked = samples.replay([(end, trace.ref(h))], {(k, ref): claim}).marked
    owners = marked[end, trace.ref(h)].owners.expand(h.shape)
    assert owners[:, 0, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(CurvoptError, match=MIXES):
        samples.replay(claims={(k, ref): claim.flip(0)})


def test_positions_without_owner_belong_to_their_slice():
    world = World()
    with Trace() as trace:
        h = torch.cat([torch.zeros(4, 1, D), world.seq], 1)
        k = len(trace.ops)
        loss = CE(world.m(world.attention(h, h, h)[0][:, 0]), world.y4)
    samples = infer(trace, loss, silent=world.silent(trace))
    owners = samples.replay([(k, trace.ref(h))]).marked[k, trace.ref(h)].owners
    assert owners.expand(h.shape)[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_follow_decides_by_the_values_of_the_pass():
    world = World()
    order = torch.arange(N)

    def run():
        with Trace() as trace:
            loss = CE(world.hidden(lambda h: h + h[order]), world.y)
        return trace, infer(trace, loss, silent=world.silent(trace))

    trace, samples = run()
    assert samples.value_dependent
    order = order.roll(1)
    with Trace() as later:
        CE(world.hidden(lambda h: h + h[order]), world.y)
    assert later.key == trace.key
    with pytest.raises(CurvoptError, match=MIXES):
        samples.follow(later)
    assert samples.follow(trace).n == N


def test_follow_needs_one_replay(monkeypatch):
    """Rows of other lengths: the samples lie where they lay."""
    world = World()
    with Trace() as trace:
        loss = ragged(world)
    samples = infer(trace, loss, silent=world.silent(trace))
    assert samples.value_dependent
    assert samples.steady
    world.rows = world.rows[[1, 0, 3, 2]]
    with Trace() as later:
        ragged(world)
    assert later.key == trace.key
    calls = []
    monkeypatch.setattr(Replay, "run", lambda self, run=Replay.run: calls.append(1) or run(self))
    followed = samples.follow(later)
    assert (followed.n, followed.trace, len(calls)) == (4, later, 1)


def test_unused_samples_of_a_mask_are_samples():
    samples = found(SEPARABLE["mask by labels, summed"][0])
    assert samples.n == N
    assert samples.owners.tolist() == [i for i, y in enumerate(World().y.tolist()) if y != 0]


def test_samples_on_an_inner_axis_are_asked_for():
    """A model that mixes the batch may treat the steps of time apart: which one is a sample?"""

    def time_first(w):
        return CE(w.m[2](w.lstm(w.seq)[0]).flatten(0, 1), w.tags.flatten())

    with pytest.raises(CurvoptError, match="along dim 0, which the model mixes.*batch_size=5"):
        found(time_first)
    assert found(time_first, 5).n == 5
