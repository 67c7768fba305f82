"""PolarOptimizer: its steps by hand, the ways to them, and what they cost."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import curvopt
from curvopt.optim import polar as module
from curvopt.optim import polar_step
from curvopt.optim.rate import adapt, noise_of
from tests.optim.test_atomic import NoMemory, NoRoom
from tests.oracles import assert_close
from tests.parallel.ranks import alone, part, ranks, same_everywhere

WIDE, N = 90, 6


def wide(dtype=torch.float64):
    """A net whose first layers are wider than a batch, and whose last one is not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(40, WIDE), nn.Tanh(), nn.Linear(WIDE, 70), nn.Tanh(), nn.Linear(70, 3)
    ).to(dtype)


def batch(t=0, n=N, dtype=torch.float64):
    draw = torch.Generator().manual_seed(t)
    x = torch.randn(n, 40, generator=draw, dtype=torch.float64)
    return x.to(dtype), x[:, :3].argmax(1)


def loss_of(model, t=0, n=N):
    x, y = batch(t, n, next(model.parameters()).dtype)
    return F.cross_entropy(model(x), y)


def train(model, opt, steps, start=0):
    return [opt.step(lambda t=t: loss_of(model, t)).item() for t in range(start, start + steps)]


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def by_rows(opt):
    """Shapes of the matrices that are stepped by their rows."""
    return {tuple(p.shape) for p in opt._measured()[1]}


def directions(model, loss, **options):
    """What a first step without adaptation moves each parameter by, in units of lr."""
    opt = curvopt.PolarOptimizer(model.named_parameters(), lr=1e-3, adaptation=0, **options)
    before = values(model)
    opt.step(loss)
    moved = [(q - p) / 1e-3 for p, q in zip(model.parameters(), before, strict=True)]
    return moved, opt


def polar(grad, eps=1e-3):
    """The direction by a singular value decomposition: a vector is a column."""
    g = grad.reshape(len(grad), -1)
    a, s, b = torch.linalg.svd(g, full_matrices=False)
    u = (a * (s / (s.square() + (eps * s[0]) ** 2).sqrt())) @ b
    return (u * max(g.shape) ** 0.5).reshape(grad.shape)


# The step.


def check(model, loss, **options):
    moved, opt = directions(model, loss, **options)
    for p, step in zip(model.parameters(), moved, strict=True):
        if "curvature" not in opt.state[p]:
            assert_close(step, polar(p.grad, options.get("eps", 1e-3)), 1e-9)
    return opt


@pytest.mark.parametrize("n", [1, 3, N, 200])
@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_first_step_is_the_polar_factor(n, eps):
    model, (x, y) = wide(), batch(n=n)
    opt = check(model, lambda: F.cross_entropy(model(x), y), eps=eps)
    assert bool(by_rows(opt)) == (n <= N)


class Twice(nn.Module):
    """A shared layer, one on tokens, one without bias, one that multiplies from the left."""

    def __init__(self):
        super().__init__()
        self.shared, self.on_tokens = nn.Linear(50, 50), nn.Linear(50, 60, bias=False)
        self.left = nn.Parameter(torch.randn(60, 80) / 8)

    def forward(self, x):
        return self.on_tokens(self.shared(torch.tanh(self.shared(x)))) @ self.left


def test_shared_layers_and_tokens():
    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    opt = check(model, lambda: model(x).square().sum((1, 2)).mean())
    assert by_rows(opt) == {(50, 50), (60, 50), (60, 80)}
    assert opt.state[model.shared.weight]["rows"] == 12  # two uses of three tokens of two samples


def test_convolutions_norms_recurrence():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(2)).double()
    rnn = nn.GRU(8, 6, batch_first=True).double()
    both = nn.ModuleList([model, rnn])
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    check(both, lambda: rnn(model(x).mT)[0].square().sum((1, 2)).mean())


def test_memory_in_another_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)).double()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for net in (model, twin):
        opt = curvopt.PolarOptimizer(net.parameters())
        for _ in range(4):
            opt.step(lambda net=net: net(x).square().sum((1, 2, 3)).mean())
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert a.ndim == 1 or a.is_contiguous(memory_format=torch.channels_last)
        assert_close(a, b, 1e-9)


class Tables(nn.Module):
    """A tied embedding, a table that is added, a convolution by groups: no matrices."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.zeros(4, 8))
        self.mix = nn.Conv1d(8, 8, 2, groups=4)

    def forward(self, x):
        h = self.mix((self.tokens(x) + self.positions).mT).mT
        return (torch.tanh(h).mean(1)) @ self.tokens.weight.T


def tables():
    torch.manual_seed(0)
    return Tables().double()


def test_tables_take_the_steps_of_the_diagonal():
    model = tables()
    x, y = torch.randint(9, (6, 4)), torch.randint(9, (6,))
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    opt = curvopt.PolarOptimizer(model.parameters(), lr=1e-3, margin=0.0, adaptation=0.3)
    other = curvopt.DiagGGNOptimizer(twin.parameters(), lr=1e-3)
    for steps in range(12):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data.copy_(p)
        for net, o in ((model, opt), (twin, other)):
            torch.manual_seed(steps)
            o.step(lambda net=net: F.cross_entropy(net(x), y))
        for name, p in model.named_parameters():
            assert ("curvature" in opt.state[p]) == (p.ndim > 1), name
        for name in ("tokens.weight", "positions", "mix.weight"):
            assert_close(model.get_parameter(name), twin.get_parameter(name), 1e-12)


def test_loss_without_a_root_needs_no_curvature():
    """Curvature is asked for where there are tables alone."""
    model = wide()
    opt = curvopt.PolarOptimizer(model.parameters())
    x, _ = batch()
    losses = [opt.step(lambda: torch.exp(model(x).sin()).sum(1).mean()).item() for _ in range(9)]
    assert losses[-1] < losses[0]


def test_rate_by_hand():
    """gamma follows the averages of the gradient and of its square."""
    p = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 5.0], dtype=torch.float64)
    x = torch.zeros(4, 2, dtype=torch.float64)
    mu, kappa, tau, lr = 0.8, 0.2, 0.1, 0.05
    opt = curvopt.PolarOptimizer([p], lr, mu, adaptation=kappa, margin=tau, eps=1e-6)
    theta, m, s, e, log_rate = p.detach().clone(), 0, 0, 0, 0.0
    for t in range(1, 30):
        opt.step(lambda: ((x + p).square() * scale / 2).sum(1).mean())
        g = scale * theta
        m, s, e = mu * m + (1 - mu) * g / g.norm(), mu * s + (1 - mu) * g, mu * e + (1 - mu) * g @ g
        w = 1 - mu**t
        rho = (1 - mu) * (1 + mu**t) / ((1 + mu) * w)
        if t > 1:  # one gradient agrees with itself
            r = min(1.0, float(s @ s / w**2 / (e / w)))
            log_rate = min(log_rate + kappa * ((r - rho) / (1 - rho) - tau), math.log(100))
        theta = theta - lr * math.exp(log_rate) * 2**0.5 * m / w
        assert_close(p, theta, 1e-9)


def test_margin_and_noise_of_the_rate():
    group = {"momentum": 0.9, "adaptation": 0.5, "lr": 1.0}
    rates = []
    for margin in (0.0, 0.2):
        state = {"step": 50}
        adapt(state, {**group, "margin": margin}, 4.0, 1.0)
        rates.append(state["log_rate"])
    assert rates[0] - rates[1] == pytest.approx(0.5 * 0.2)
    draws = torch.randn(4000, 40, generator=torch.Generator().manual_seed(0))
    weights = 0.9 ** torch.arange(39, -1, -1.0)
    mean = draws @ (weights / weights.sum())
    assert noise_of(0.9, 40) == pytest.approx(mean.square().mean().item(), rel=0.05)


# The ways to a step.


def test_rows_and_gram_matrices_take_the_same_steps(monkeypatch):
    runs = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            if not allowed:
                for place in (module, polar_step):
                    patch.setattr(place, "by_factors", lambda *_: False)
            model = wide()
            opt = curvopt.PolarOptimizer(model.parameters())
            train(model, opt, 8)
            assert bool(by_rows(opt)) is allowed
            runs.append(values(model))
    for a, b in zip(*runs, strict=True):
        assert_close(a, b, 1e-7)  # 1e-11 a step, which the net amplifies


def used(monkeypatch):
    """Counts the matrices that were stepped by their rows."""
    count = []
    real = polar_step.polar_of_rows
    monkeypatch.setattr(polar_step, "polar_of_rows", lambda *a: (count.append(1), real(*a))[1])
    return count


def changes():
    def clip_norm(model):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    def clip_value(model):
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)

    def by_hand(model):
        model[0].weight.grad[0, 0] += 1.0
        model[2].weight.grad.neg_()

    return {"norm": (clip_norm, 2), "value": (clip_value, 0), "hand": (by_hand, 0)}


@pytest.mark.parametrize("change", ["norm", "value", "hand"])
def test_gradients_that_were_changed(change, monkeypatch):
    """The factor is that of what `p.grad` holds, and rows are used where they still make it."""
    alter, expected = changes()[change]
    count, model = used(monkeypatch), wide()

    def closure():
        loss = loss_of(model)
        loss.backward()
        alter(model)
        return loss

    opt = curvopt.PolarOptimizer(model.named_parameters(), lr=1e-3, adaptation=0)
    before = values(model)
    with opt.record():
        loss_of(model).backward()
    alter(model)
    opt.step()
    assert len(count) == expected
    for p, q in zip(model.parameters(), before, strict=True):
        assert_close((q - p) / 1e-3, polar(p.grad), 1e-8)


@pytest.mark.parametrize("build", [wide, tables])
def test_scaled_loss(build):
    """By GradScaler's power of two: rows and the curvature of tables, bit for bit."""
    runs = []
    for enabled in (True, False):
        model = build().float()
        opt = curvopt.PolarOptimizer(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for t in range(4):
            torch.manual_seed(t)
            x, y = batch(t, dtype=torch.float32)
            if build is tables:
                x, y = torch.randint(9, (6, 4)), torch.randint(9, (6,))
            opt.zero_grad()
            with opt.record():
                scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(opt)
            scaler.update()
        runs.append(values(model))
    assert all(map(torch.equal, *runs))


def test_penalty_in_the_loss(monkeypatch):
    count, model = used(monkeypatch), wide()
    check(model, lambda: loss_of(model) + 0.1 * model[0].weight.square().sum())
    assert len(count) == 1  # the other wide layer


def test_accumulation_is_one_batch(monkeypatch):
    count, model, twin = used(monkeypatch), wide(), wide()
    opt = curvopt.PolarOptimizer(model.parameters())
    other = curvopt.PolarOptimizer(twin.parameters())
    for t in range(5):
        x, y = batch(t)
        opt.zero_grad()
        for half in (slice(0, 3), slice(3, N)):
            with opt.record():
                (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
        opt.step()
        other.step(lambda x=x, y=y: F.cross_entropy(twin(x), y))
    assert len(count) == 20
    for a, b in zip(values(model), values(twin), strict=True):
        assert_close(a, b, 1e-8)


def test_failed_factorization_is_counted(monkeypatch):
    model = wide()
    monkeypatch.setattr(polar_step, "polar_of_rows", lambda *_: None)
    opt = check(model, lambda: loss_of(model))
    assert opt.failed == 2
    assert opt.state_dict()["engine"]["failed"] == 2


def test_small_nets_are_not_recorded(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    opt = curvopt.PolarOptimizer(model.parameters())
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    opt.step(lambda: F.cross_entropy(model(x), y))

    def refused(*_, **__):
        raise AssertionError("recorded")

    monkeypatch.setattr(module, "Tape", refused)
    for _ in range(30):
        opt.step(lambda: F.cross_entropy(model(x), y))


def test_other_batch_sizes_are_noticed():
    model = wide()
    opt = curvopt.PolarOptimizer(model.parameters())
    opt.step(lambda: loss_of(model, n=200))
    assert not by_rows(opt)
    for _ in range(module.LOOK):
        opt.step(lambda: loss_of(model))
    assert by_rows(opt) == {(WIDE, 40), (70, WIDE)}
    opt.step(lambda: loss_of(model, n=200))
    assert not by_rows(opt)


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 40)), nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.Flatten()),
        *(nn.Linear(228, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 3)),
    ).double()


def test_coupled_samples_have_no_rows():
    """Batch norm in training mode, and a loss that compares samples with each other."""
    model, (x, y) = normed(), batch()
    assert not by_rows(check(model, lambda: F.cross_entropy(model(x), y)))
    model = wide()
    assert not by_rows(check(model, lambda: (model(x) @ model(x).mT).logsumexp(1).mean()))


def test_coupled_samples_train(monkeypatch):
    monkeypatch.setattr(module, "LOOK", 16)
    model, (x, y) = normed(), batch()
    opt = curvopt.PolarOptimizer(model.parameters())
    losses = [opt.step(lambda: F.cross_entropy(model(x), y)).item() for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]
    model.eval()  # the rows are found at the next look
    for _ in range(7):
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert by_rows(opt) == {(50, 228)}
    model.train()
    opt.step(lambda: F.cross_entropy(model(x), y))


def test_tables_among_coupled_samples_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    opt = curvopt.PolarOptimizer(model.parameters())
    x, y = torch.randint(9, (6, 2)), torch.randint(3, (6,))
    with pytest.raises(curvopt.CurvoptError, match="not separate|training mode"):
        opt.step(lambda: F.cross_entropy(model(x), y))


# Precision.


@pytest.mark.parametrize("n", [N, 200])
def test_single_precision(n):
    model, exact = wide(torch.float32), wide().float().double()
    moved, _ = directions(model, lambda: loss_of(model, n=n))
    expected, _ = directions(exact, lambda: loss_of(exact, n=n))
    for a, b in zip(moved, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) < 2e-2 * torch.linalg.vector_norm(b)  # of lr 1e-3
    for p, step in zip(model.parameters(), moved, strict=True):
        u = polar(p.grad.double())
        assert torch.linalg.vector_norm(step - u) < 1e-3 * torch.linalg.vector_norm(u)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast, monkeypatch):
    count, model = used(monkeypatch), wide(torch.float32 if autocast else torch.bfloat16)
    opt = curvopt.PolarOptimizer(model.parameters(), lr=1e-2)

    def closure():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_of(model)

    losses = [opt.step(closure).item() for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert len(count) == 24
    for state in opt.state.values():
        assert state["momentum_buffer"].dtype == torch.float32


# Checkpoints and failures, by the rows.


def test_resumed_run_is_the_uninterrupted_one():
    for kill in (1, 7):
        model = wide(torch.float32)
        opt = curvopt.PolarOptimizer(model.parameters())
        train(model, opt, kill)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        train(model, opt, 12 - kill, start=kill)
        other = wide(torch.float32)
        resumed = curvopt.PolarOptimizer(other.parameters())
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        train(other, resumed, 12 - kill, start=kill)
        assert all(map(torch.equal, values(other), values(model)))


def test_step_that_runs_out_of_memory_changes_nothing():
    model = wide(torch.float32)
    opt = curvopt.PolarOptimizer(model.parameters(), weight_decay=0.1)
    train(model, opt, 3)
    failures = 0
    for at in range(1, 400, 7):
        before, state = values(model), copy.deepcopy(opt.state_dict())
        opt.zero_grad()
        with opt.record():
            loss_of(model).backward()
        try:
            with NoMemory(at):
                opt.step()
        except NoRoom:
            failures += 1
            assert all(map(torch.equal, values(model), before))
            after = opt.state_dict()
            assert after["engine"] == state["engine"]
            for index, kept in state["state"].items():
                for key, value in kept.items():
                    now = after["state"][index][key]
                    same = torch.equal(now, value) if torch.is_tensor(value) else now == value
                    assert same, key
        else:
            break
    assert failures > 3


@pytest.mark.parametrize("scale", [1e-12, 1e-20, 1e-30, 1e-36, 1e-44])
def test_gradients_near_nothing(scale):
    """Down to denormal numbers: steps are as long as others, as far as there are digits."""
    model = wide(torch.float32)
    opt = curvopt.PolarOptimizer(model.parameters(), lr=1e-3, adaptation=0)
    before = values(model)
    for t in range(3):
        opt.step(lambda t=t: scale * loss_of(model, t))
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all()
        moved = torch.linalg.vector_norm(p - q) / q.numel() ** 0.5
        assert moved < 4e-3
        assert scale < 1e-40 or moved > 1e-5


@pytest.mark.parametrize("layer", [0, 4])
def test_gradient_that_is_no_number(layer):
    model = wide()
    opt = curvopt.PolarOptimizer(model.named_parameters())
    train(model, opt, 2)
    before = values(model)
    with opt.record():
        loss_of(model).backward()
    for p in (model[layer].weight, model[layer].bias):
        p.grad[0] = math.inf
    with pytest.raises(curvopt.CurvoptError, match=rf"gradient of {layer}\.weight .* not finite"):
        opt.step()
    assert all(map(torch.equal, values(model), before))
    opt.zero_grad()
    with opt.record():
        loss_of(model).backward()
    model[layer].bias.grad[0] = math.nan
    with pytest.raises(curvopt.CurvoptError, match=rf"gradient of {layer}\.bias .* not finite"):
        opt.step()


def test_momentum_that_fades_leaves_no_denormal_numbers(monkeypatch):
    monkeypatch.setattr(polar_step, "CLEAN", 8)
    model = wide(torch.float32)
    opt = curvopt.PolarOptimizer(model.parameters(), momentum=0.05)
    train(model, opt, 2)
    for _ in range(32):  # up to one that cleans, which is the 33rd
        opt.step(lambda: 0.0 * loss_of(model))
    tiny = torch.finfo(torch.float32).tiny
    for state in opt.state.values():
        m = state["momentum_buffer"].abs()
        assert not ((m > 0) & (m < tiny)).any()


def test_empty_parameters_stay():
    torch.manual_seed(0)
    model, empty = nn.Linear(3, 2), nn.Parameter(torch.zeros(0, 3))
    opt = curvopt.PolarOptimizer([*model.parameters(), empty])
    x = torch.randn(4, 3)
    for _ in range(3):
        opt.step(lambda: (model(x).square().sum(1) + F.linear(x, empty).sum(1)).mean())
    assert empty not in opt.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "Invalid eps: 0.0"),
        ({"margin": 2.0}, "Invalid margin: 2.0"),
        ({"adaptation": -1.0}, "Invalid adaptation: -1.0"),
        ({"curvature_every": 0}, "Invalid curvature_every: 0"),
        ({"momentum": 1.0}, "Invalid momentum: 1.0"),
    ],
)
def test_invalid_settings(options, message):
    with pytest.raises(ValueError, match=message):
        curvopt.PolarOptimizer(wide().parameters(), **options)


def test_state_is_little_more_than_the_momentum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 100))
    opt = curvopt.PolarOptimizer(model.parameters())
    x = torch.randn(8, 784)
    opt.step(lambda: model(x).square().sum(1).mean())
    numbers = sum(
        value.numel()
        for state in opt.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    assert numbers < 1.01 * sum(p.numel() for p in model.parameters())


# Structures for others.


def test_structures_are_the_rows_of_batch_grad():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(5, 2, 5, dtype=torch.float64), torch.randint(4, (5,))
    weight = torch.rand(4, dtype=torch.float64)
    result = curvopt.compute(
        lambda: F.cross_entropy(model(x), y, weight=weight),
        model.parameters(),
        curvopt.Structures(),
        curvopt.BatchGrad(),
        curvopt.Gradient(),
    )
    for p in model.parameters():
        assert_close(result.structures[p].form()[0], result.batch_grad[p], 1e-12)
    outer = result.structures[model[2].weight]
    assert outer.left.shape == (1, 5, 1, 1, 4)
    assert outer.right.shape == (5, 1, 1, 12)


# Two processes.


def steps_of(model, wrapped, rows=lambda *batch: batch, **options):
    opt = curvopt.PolarOptimizer(model.parameters(), **options)
    for t in range(5):
        x, y = rows(*batch(t))
        opt.step(lambda x=x, y=y: F.cross_entropy(wrapped(x), y))
    return values(model), by_rows(opt), [opt.state[p].get("rows") for p in model.parameters()]


@pytest.mark.parametrize("wrap", [DistributedDataParallel, None])
@ranks()
def test_two_processes_take_the_steps_of_one(wrap):
    model, single = wide(), wide()
    expected, alone_by, numbers = steps_of(single, single, process_group=alone())
    group = dist.group.WORLD if wrap is None else None
    found, by, rows = steps_of(model, wrap(model) if wrap else model, part, process_group=group)
    assert by == alone_by
    assert rows == numbers  # those of both
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-8)
    same_everywhere(found)


@ranks()
def test_two_processes_do_not_drift_apart_over_tables():
    model = tables()
    wrapped = DistributedDataParallel(model)
    opt = curvopt.PolarOptimizer(model.parameters())
    torch.manual_seed(dist.get_rank())
    for _ in range(4):
        x, y = torch.randint(9, (6, 4)), torch.randint(9, (6,))
        opt.step(lambda x=x, y=y: F.cross_entropy(wrapped(x), y))
    same_everywhere(values(model))


@ranks()
def test_more_rows_together_than_are_cheap():
    """Each process alone would go by its rows; both together do not."""
    model, single = wide(), wide()
    x, y = batch(n=78)
    one = curvopt.PolarOptimizer(single.parameters(), process_group=alone())
    one.step(lambda: F.cross_entropy(single(x), y))
    opt, wrapped = curvopt.PolarOptimizer(model.parameters()), DistributedDataParallel(model)
    mine, labels = part(x, y)
    opt.step(lambda: F.cross_entropy(wrapped(mine), labels))
    assert not by_rows(opt)
    for a, b in zip(values(model), values(single), strict=True):
        assert_close(a, b, 1e-8)
