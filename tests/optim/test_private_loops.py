"""Private steps in the loops that people run: accumulation, clipping, penalties, state."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt
from curvopt.privacy import EmptyBatchCollate, PoissonBatchSampler
from tests.oracles import assert_close

N, PARTS, CLIP = 96, 3, 0.2


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=draw, dtype=dtype)
    return TensorDataset(x, x[:, :3].argmax(1))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def poisson(size=24):
    return PoissonBatchSampler(N, expected_batch_size=size, generator=seeded(1))


def loader_of(sampler, rows=None):
    rows = rows or data()
    return DataLoader(rows, batch_sampler=sampler, collate_fn=EmptyBatchCollate(rows))


def private(params, sampler, cls=curvopt.DPSGD, **options):
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": 24}
    return cls(params, 0.5, sampler=sampler, **{**settings, **options})


def clipped_sum(model, x, y):
    """The sum of clipped gradients, as one vector: a loop over batches of one."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total += row * min(1.0, CLIP / (row.norm().item() + 1e-6))
    return total


def expected(epochs=2, size=24, scale=1.0, penalty=None):
    """The parameters after plain loops over whole logical batches, without noise."""
    model, sampler = network(), poisson(size)
    x, y = data().tensors
    for _ in range(epochs):
        for batch in sampler:
            grad = clipped_sum(model, x[batch], y[batch]) / 24
            if penalty is not None:
                more = torch.autograd.grad(penalty(model), list(model.parameters()))
                grad += torch.cat([g.flatten() for g in more])
            with torch.no_grad():
                for p, g in zip(
                    model.parameters(), grad.split([p.numel() for p in model.parameters()]),
                    strict=True,
                ):  # fmt: skip
                    p -= 0.5 * scale * g.view_as(p)
    return list(model.parameters())


def assert_same(model, theirs, rtol=1e-9):
    for p, q in zip(model.parameters(), theirs, strict=True):
        assert_close(p.detach(), q.detach(), rtol)


def refused(match):
    return pytest.raises(curvopt.CurvoptError, match=match)


# -- accumulation in a plain loop ------------------------------------------------------------------


def test_a_plain_loop_accumulates_the_parts_of_a_logical_batch():
    model, sampler = network(), poisson().in_parts(PARTS)
    loader = loader_of(sampler)
    opt = private(model.parameters(), loader)
    for _ in range(2):
        for index, (x, y) in enumerate(loader):
            with opt.record():
                F.cross_entropy(model(x), y).backward()
            if (index + 1) % PARTS == 0:
                opt.step()
                opt.zero_grad()
    assert_same(model, expected())
    assert (opt.ledger.steps, opt.sampler, opt.sample_rate) == (8, "poisson", 0.25)


def test_a_closure_may_hold_all_parts():
    model, sampler = network(), poisson().in_parts(PARTS)
    opt = private(model.parameters(), sampler)
    x, y = data().tensors
    for _ in range(2):
        parts = iter(sampler)
        for _ in range(len(sampler) // PARTS):

            def closure(parts=parts):
                for _ in range(PARTS):
                    rows = next(parts)
                    F.cross_entropy(model(x[rows]), y[rows]).backward()

            opt.step(closure)
    assert_same(model, expected())


def test_noise_and_account_are_those_of_one_step():
    model, sampler = network(), poisson().in_parts(PARTS)
    unused = nn.Parameter(torch.zeros(50_000))
    opt = private([*model.parameters(), unused], sampler, noise_multiplier=2.0, generator=seeded())
    x, y = data().tensors
    for rows in [[0, 1], [2], []]:
        with opt.record():
            F.cross_entropy(model(x[rows]), y[rows]).backward()
    opt.step()
    assert unused.grad.std().item() == pytest.approx(2.0 * CLIP / 24, rel=0.02)
    assert (opt.ledger.steps, len(opt.norms)) == (1, 3)


def test_a_step_before_all_parts_are_there_is_refused():
    model, sampler = network(), poisson().in_parts(PARTS)
    opt = private(model.parameters(), sampler, noise_multiplier=1.0)
    x, y = data().tensors
    before = copy.deepcopy(model)
    for rows in ([0], [1]):
        with opt.record():
            F.cross_entropy(model(x[rows]), y[rows]).backward()
    with refused("in 3 parts, and 2 were recorded: let the framework accumulate"):
        opt.step()
    with refused("in 3 parts, and 2 were recorded"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.empty_batch()
    opt.step()
    for rows in ([0], [1], [2]):
        with opt.record():
            F.cross_entropy(model(x[rows]), y[rows]).backward()
    with refused("not followed by step"):
        opt.record()
    assert opt.ledger.steps == 1
    assert not any(map(torch.equal, model.parameters(), before.parameters()))


def test_a_pass_that_is_left_over_leads_to_parts():
    model = network()
    opt = private(model.parameters(), "none")
    x, y = data().tensors
    with opt.record():
        F.cross_entropy(model(x), y).backward()
    with refused(r"in as many parts: DataLoader\(data, batch_sampler=poisson_sampler.in_parts"):
        opt.record()


@pytest.mark.parametrize("backward", [False, True])
def test_a_pass_that_is_left_over_is_not_joined_with_a_closure(backward):
    """It may hold a sample that the closure has as well."""
    model = network()
    opt = private(model.parameters(), "none")
    x, y = data().tensors

    def closure():
        loss = F.cross_entropy(model(x[:8]), y[:8])
        if backward:
            loss.backward()
        return loss

    with opt.record():
        closure().backward() if not backward else closure()
    with refused("not followed by step"):
        opt.step(closure)
    assert opt.ledger.steps == 0
    opt.step(lambda: None)  # what was recorded, once
    assert len(opt.norms) == 8
    opt.step(closure)
    assert len(opt.norms) == 8


# -- clipping, reading, adding ---------------------------------------------------------------------


def flat(params):
    return torch.cat([p.grad.flatten() for p in params]).clone()


@pytest.mark.parametrize("place", ["closure", "record"])
def test_clipping_acts_on_the_private_gradient(place):
    def run(limit):
        model = network()
        opt = private(
            model.parameters(), "none", noise_multiplier=3.0, generator=seeded(), momentum=0.9
        )
        x, y = data().tensors
        found = []
        for _ in range(2):

            def backward():
                opt.zero_grad()
                F.cross_entropy(model(x[:8]), y[:8]).backward()
                if limit:
                    found.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())

            if place == "closure":
                opt.step(backward)
            else:
                with opt.record():
                    backward()
                opt.step()
            found.append(flat(model.parameters()))
        return model, found, opt.ledger.steps

    _, (first, _), _ = run(None)
    model, (norm, clipped, *_), steps = run(1e-3)
    assert steps == 2
    assert norm == pytest.approx(first.norm().item())
    assert_close(clipped, first * 1e-3 / first.norm(), 1e-5)
    moved = torch.cat([(p - q).flatten() for p, q in zip(
        model.parameters(), network().parameters(), strict=True)]).detach()  # fmt: skip
    assert moved.norm() <= 0.5 * 2.9e-3


def test_a_gradient_that_is_looked_at_has_noise_and_is_accounted():
    model = network()
    opt = private(model.parameters(), "none", noise_multiplier=3.0, generator=seeded())
    x, y = data().tensors
    with opt.record():
        F.cross_entropy(model(x[:8]), y[:8]).backward()
    seen = [p.grad.clone() for p in model.parameters()]
    assert opt.ledger.steps == 1
    opt.step()
    assert opt.ledger.steps == 1
    for p, grad in zip(model.parameters(), seen, strict=True):
        assert torch.equal(p.grad, grad)
    std = torch.cat([g.flatten() for g in seen]).std().item()
    assert std == pytest.approx(3.0 * CLIP / 24, rel=0.3)


def test_the_batch_is_complete_when_a_gradient_is_looked_at():
    model = network()
    opt = private(model.parameters(), "none", noise_multiplier=3.0)
    x, y = data().tensors

    def closure():
        for rows in (slice(8), slice(8, 24)):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    with refused("looked at before the logical batch was complete"):
        opt.step(closure)
    opt.zero_grad()
    opt.step(lambda: F.cross_entropy(model(x[:24]), y[:24]))
    assert opt.ledger.steps == 2  # the noisy gradient was seen


@pytest.mark.parametrize(
    "add",
    [
        lambda p, loss: loss.backward(),
        lambda p, loss: p.grad.add_(1.0),
        lambda p, loss: p.grad.copy_(p),
        lambda p, loss: p.grad + 1.0,
    ],
)
def test_nothing_is_added_to_a_gradient_that_has_no_noise_yet(add):
    model = network()
    opt = private(model.parameters(), "none", noise_multiplier=1.0)
    x, y = data().tensors
    with opt.record():
        F.cross_entropy(model(x[:8]), y[:8]).backward()
    with refused("would have no noise"):
        add(model[0].weight, F.cross_entropy(model(x), y))
    assert opt.ledger.steps == 0


# -- terms of the parameters alone -----------------------------------------------------------------


def decay(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters())


def proximal(start):
    def penalty(model):
        pairs = zip(model.parameters(), start, strict=True)
        return 0.3 * sum((p - q).square().sum() for p, q in pairs)

    return penalty


def orthogonal(model):
    w = model[2].weight
    return (w @ w.t() - torch.eye(3, dtype=w.dtype)).norm()


STARTS = {
    "tensors": [p.detach().clone() + 0.1 for p in network().parameters()],
    "model": list(network().requires_grad_(False).parameters()),
}
PENALTIES = {
    "decay": decay,
    "proximal": proximal(STARTS["tensors"]),
    "proximal-model": proximal(STARTS["model"]),
    "orthogonal": orthogonal,
    "norm": lambda model: model[0].weight.norm(),
    "mse": lambda model: F.mse_loss(model[0].weight, STARTS["tensors"][0]),
    "scaled": lambda model: torch.tensor(0.5, dtype=torch.float64) * decay(model) / 3,
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_adds_its_own_gradient_after_the_noise(name):
    penalty = PENALTIES[name]
    model, sampler = network(), poisson()
    opt = private(model.parameters(), sampler)
    x, y = data().tensors
    for _ in range(2):
        for batch in sampler:
            opt.step(lambda b=batch: F.cross_entropy(model(x[b]), y[b]) + penalty(model))

    def whole(model):  # some do not depend on all parameters
        return penalty(model) + 0 * decay(model)

    assert_same(model, expected(penalty=whole))


def test_a_penalty_is_neither_clipped_nor_divided():
    model = network()
    opt = private(model.parameters(), "none", max_grad_norm=1e-9, expected_batch_size=1000)
    x, y = data().tensors
    opt.step(lambda: F.cross_entropy(model(x), y) + 100 * decay(model))
    for p, q in zip(model.parameters(), network().parameters(), strict=True):
        assert_close(p.grad, 20 * q.detach(), 1e-6)


class Tempered(nn.Module):
    """Logits times a temperature, which a penalty may hold as well."""

    def __init__(self):
        super().__init__()
        self.model, self.log = network(), nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.temperature = self.log.exp()
        return self.model(x) * self.temperature


@pytest.mark.parametrize(
    "joined",
    [
        lambda ce, t: ce + t,
        lambda ce, t: torch.stack([ce, t]).sum(),
        lambda ce, t: 2 * (ce / 2 + t),
    ],
)
def test_nothing_of_the_samples_comes_by_a_value_that_a_penalty_shares_with_the_model(joined):
    model = Tempered()
    opt = private(model.parameters(), "none", max_grad_norm=1e-9, expected_batch_size=N)
    x, y = data().tensors
    opt.step(lambda: joined(F.cross_entropy(model(10 * x), y), model.temperature))
    weight = joined(torch.zeros(()), torch.ones(()))
    assert_close(model.log.grad, weight.double(), 1e-6)  # the derivative of exp(0), no sample's


@pytest.mark.parametrize(
    ("term", "match"),
    [
        (lambda m, x, ce: ce * decay(m), "no weighted sum|holds samples|not known"),
        (lambda m, x, ce: ce + ce.detach() * decay(m), "does not enter the loss linearly"),
        (lambda m, x, ce: ce + x.abs().mean() * decay(m), "does not enter the loss linearly"),
        (lambda m, x, ce: ce + x[0, 0] * decay(m), r"scaled by \[\] of the samples"),
        (lambda m, x, ce: ce + x.std().item() * decay(m), "which was read from a tensor"),
        (lambda m, x, ce: ce + decay(m) / ce.item(), "which was read from a tensor"),
        (lambda m, x, ce: x.std().item() * decay(m), "which was read from a tensor"),
        (lambda m, x, ce: ce + OUTSIDE * m[0].weight.sum(), "before recording began"),
        (lambda m, x, ce: ce + (m[0].weight @ STATISTIC).norm(), r"data of shape \[4\]"),
    ],
    ids="product detached scale sample read divided alone outside statistic".split(),
)
def test_what_is_not_of_the_parameters_alone_is_refused(term, match):
    model = network()
    opt = private(model.parameters(), "none", noise_multiplier=1.0)
    x, y = data().tensors

    def closure():
        return term(model, x, F.cross_entropy(model(x), y))

    with refused(match):
        opt.step(closure)
    assert opt.ledger.steps == 0


LEAF = torch.ones((), dtype=torch.float64, requires_grad=True)
OUTSIDE = LEAF * 2
STATISTIC = torch.ones(4, dtype=torch.float64)


def test_an_empty_batch_must_have_the_penalty_too():
    """A step without it would tell that the batch was empty."""
    model = network()
    opt = private(model.parameters(), "none", noise_multiplier=1.0)
    x, y = data().tensors
    opt.step(lambda: F.cross_entropy(model(x[:24]), y[:24]) + decay(model))
    with refused("would tell that the batch was empty: .*empty_step"):
        opt.empty_step()
    opt.noise_multiplier = 0.0
    before = copy.deepcopy(model)
    opt.empty_step(lambda: decay(model))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert_close(p.grad, 0.2 * q.detach())
    assert opt.ledger.steps == 2
    with refused("data of shape"):
        opt.empty_step(lambda: F.cross_entropy(model(x), y))
    nobody, none = x[:0].clone(), y[:0].clone()
    before = copy.deepcopy(model)
    opt.step(lambda: F.cross_entropy(model(nobody), none, reduction="sum") + decay(model))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert_close(p.grad, 0.2 * q.detach())
    outside = F.cross_entropy(model(x), y)
    with refused("not computed in the recorded pass"):
        opt.step(lambda: outside)
    assert opt.ledger.steps == 3


# -- empty batches ---------------------------------------------------------------------------------


def test_a_closure_without_samples_is_the_step_of_an_empty_batch():
    model = network()
    opt = private(model.parameters(), "none", noise_multiplier=1.0)
    x, y = data().tensors

    def closure(x, y):
        if not len(x):
            return None
        return F.cross_entropy(model(x), y)

    none = x[:0], y[:0]
    assert opt.step(lambda: closure(*none)) is None
    assert (opt.ledger.steps, len(opt.norms)) == (1, 0)
    opt.step(lambda: closure(x[:24], y[:24]))

    def skips():  # it has seen the samples
        F.cross_entropy(model(x[:24]), y[:24])

    with refused("(?i)loss"):
        opt.step(skips)
    assert opt.ledger.steps == 2


# -- state that is put back ------------------------------------------------------------------------


def steps(opt, model, count):
    x, y = data().tensors
    for k in range(count):
        opt.step(lambda k=k: F.cross_entropy(model(x[k::4]), y[k::4]))


def noise_of(opt, p):
    opt.zero_grad()
    opt.empty_step()
    return p.grad.clone()


def test_a_state_put_back_forgets_no_step_and_repeats_no_noise():
    model = network()
    unused = nn.Parameter(torch.zeros(1000))
    opt = private([*model.parameters(), unused], poisson(), noise_multiplier=1.0)
    steps(opt, model, 2)
    state = copy.deepcopy(opt.state_dict())
    seen = []
    for _ in range(3):
        seen.append(noise_of(opt, unused))
        opt.load_state_dict(state)
        assert opt.steps == 2
    assert opt.ledger.steps == 5
    assert opt.privacy_spent(1e-3) > 0
    assert len(torch.stack(seen).unique(dim=0)) == 3


def test_a_fresh_optimizer_goes_on_as_the_saved_one_would():
    model = network()
    unused = nn.Parameter(torch.zeros(1000))
    params = [*model.parameters(), unused]
    opt = private(params, poisson(), noise_multiplier=1.0)
    steps(opt, model, 2)
    state = copy.deepcopy(opt.state_dict())
    following = noise_of(opt, unused)
    twin = private(params, poisson(), noise_multiplier=1.0)
    twin.load_state_dict(state)
    assert torch.equal(noise_of(twin, unused), following)
    assert twin.ledger.steps == 3
    # ... and put back in the middle of that run, its own step counts beside those of the state.
    twin.load_state_dict(state)
    assert twin.ledger.steps == 3
    assert not torch.equal(noise_of(twin, unused), following)
    assert twin.ledger.steps == 4


def test_a_state_of_another_branch_counts_beside_the_own_steps():
    model = network()
    unused = nn.Parameter(torch.zeros(10))
    params = [*model.parameters(), unused]
    opts = [private(params, poisson(), noise_multiplier=1.0 + k) for k in range(2)]
    noise_of(opts[0], unused)
    start = copy.deepcopy(opts[0].state_dict())
    opts[1].load_state_dict(start)
    for opt, count in zip(opts, (2, 3), strict=True):
        for _ in range(count):
            noise_of(opt, unused)
    opts[0].load_state_dict(copy.deepcopy(opts[1].state_dict()))
    assert opts[0].ledger.steps == 1 + 3 + 2
    phases = [(p.noise_multiplier, p.steps) for p in opts[0].ledger.phases]
    assert sorted(phases) == [(1.0, 1), (1.0, 2), (2.0, 3)]
    stranger = private(params, poisson(), noise_multiplier=1.0)
    noise_of(stranger, unused)
    stranger.load_state_dict(start)
    assert stranger.ledger.steps == 2


def test_private_steps_in_two_threads():
    """Hooks on modules are those of the whole process: each step looks at its own thread's."""
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def train(k, found):
        net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        for n, p in enumerate(net.parameters()):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(10 * k + n))
        opt = curvopt.DPSGD(
            net.parameters(), lr=0.1, noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=8
        )
        for _ in range(20):
            opt.step(lambda: F.cross_entropy(net(x + k), y))
        found[k] = torch.cat([p.detach().flatten() for p in net.parameters()])

    alone, together = {}, {}
    for k in (0, 1):
        train(k, alone)
    threads = [threading.Thread(target=train, args=(k, together)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in (0, 1):
        assert torch.equal(alone[k], together[k])


# -- samples that come twice -----------------------------------------------------------------------

SET = torch.randn(50, 4, generator=seeded(3), dtype=torch.float64)
CLASSES = SET[:, :3].argmax(1)


def in_turn(*parts):
    """A closure of a backward pass for each part; a part is made when its turn comes."""

    def closure(model):
        for part in parts:
            x, y = part()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        return loss

    return closure


def rows(which):
    return lambda: (SET[which], CLASSES[which])


def filled(first, second):
    """Parts that come in one buffer, one after the other."""
    x, y = torch.empty(2, 4, dtype=torch.float64), torch.empty(2, dtype=torch.int64)

    def fill(begin):
        def make():
            return x.copy_(SET[begin : begin + 2]), y.copy_(CLASSES[begin : begin + 2])

        return make

    return fill(first), fill(second)


def indices(*numbers):
    return torch.tensor(numbers)


AGAIN = {
    "batch": [rows(slice(0, 4)), rows(slice(0, 4))],
    "moved": [rows(slice(0, 4)), lambda: (SET[:4] + 0.1, CLASSES[:4])],
    "overlapping": [rows(slice(0, 4)), rows(slice(3, 6))],
    "overlapping-before": [rows(slice(8, 12)), rows(slice(3, 9))],
    "one": [rows(slice(2, 3)), rows(slice(2, 3))],
    "drawn": [rows(indices(1, 2, 3)), rows(indices(4, 2))],
    "drawn-from-behind": [rows(indices(1, 49)), rows(indices(4, -1))],
}
ONCE = {
    "slices": [rows(slice(0, 4)), rows(slice(4, 6))],
    "slices-before": [rows(slice(8, 12)), rows(slice(3, 8))],
    "ones": [rows(slice(2, 3)), rows(slice(3, 4))],
    "drawn": [rows(indices(1, 2, 3)), rows(indices(4, 5))],
    "buffer": filled(0, 2),
}


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("habit", ["closure", "record"])
def test_a_second_pass_over_samples_of_a_logical_batch_is_refused(name, habit):
    """One sample would contribute twice as much as is accounted."""
    model, closure = network(), in_turn(*AGAIN[name])
    opt = private(model.parameters(), "none")
    with refused("an earlier one of this logical batch went over"):
        if habit == "closure":
            opt.step(lambda: closure(model))
        else:
            with opt.record():
                closure(model)
    assert opt.ledger.steps == 0


@pytest.mark.parametrize("name", ONCE)
def test_passes_over_other_samples_add_up(name):
    model, closure = network(), in_turn(*ONCE[name])
    opt = private(model.parameters(), "none")
    opt.step(lambda: closure(model))
    start, total = network(), 0
    for part in ONCE[name]:
        total = total + clipped_sum(start, *part())
    assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), total / 24, 1e-9)


def test_a_column_that_all_passes_share_is_no_second_pass():
    model, ones = network(), torch.ones(4, 1, dtype=torch.float64)
    opt = private(model.parameters(), "none")

    def closure():
        for x, y in zip(SET[:8].split(4), CLASSES[:8].split(4), strict=True):
            loss = F.cross_entropy(model(torch.cat([x[:, :3], ones], 1)), y)
            loss.backward()
        return loss

    opt.step(closure)
    assert len(opt.norms) == 8


@pytest.mark.parametrize("which", [indices(3, 3, 1, 2), indices(-1, 49)])
def test_a_row_that_is_drawn_twice_is_refused(which):
    """As by `torch.randint`, on a new pass and on a known one."""
    model = network()
    opt = private(model.parameters(), "none")
    other = torch.arange(len(which))
    opt.step(lambda: F.cross_entropy(model(SET[other]), CLASSES[other]))
    with refused(r"several samples are the same row of \[50, 4\], drawn by an index"):
        opt.step(lambda: F.cross_entropy(model(SET[which]), CLASSES[which]))
    assert opt.ledger.steps == 1


def test_what_is_drawn_twice_and_is_no_row_of_the_model():
    """Targets of classes, and tables that are said to be no data."""
    model, table = network(), torch.eye(3, dtype=torch.float64)
    opt = private(model.parameters(), "none")
    opt.step(lambda: F.mse_loss(model(SET[:8]), table[CLASSES[:8]]))

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", SET)
            self.net = network()

        def forward(self, i):
            return self.net(self.table[i])

    model = Table()
    opt = private(model.parameters(), "none")
    opt.step(lambda: F.cross_entropy(model(indices(1, 1, 2)), CLASSES[:3]))
    assert opt.ledger.steps == 1
