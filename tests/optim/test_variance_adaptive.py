"""VarianceAdaptiveSGD against its formulas, written as plain loops over samples."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests import oracles
from tests.cases import Case
from tests.oracles import assert_close


def rows_of(problem):
    """``[N, *p]`` per parameter, by a loop over batches of one."""
    parts = []
    for n in range(len(problem.x)):
        loss = problem.loss_fn(problem.model(problem.x[n : n + 1]), problem.y[n : n + 1])
        parts.append(torch.autograd.grad(loss, problem.params))
    return [torch.stack(rows) for rows in zip(*parts, strict=True)]


def reference(problem, steps, *, lr, momentum, debiased=False, every=1, decay=0.0):
    """The docstring's formulas, the running mean of the first measurements included."""
    n = len(problem.x)
    b = [torch.zeros_like(p) for p in problem.params]
    s = [torch.zeros_like(p) for p in problem.params]
    r = 0.0
    for t in range(steps):
        gradients = [rows.mean(0) for rows in rows_of(problem)]
        if t % every == 0:
            share = max(1 / (t // every + 1), 1 - momentum**every)
            s = [
                (1 - share) * old + share * rows.var(0)
                for old, rows in zip(s, rows_of(problem), strict=True)
            ]
        b = [momentum * old + g for old, g in zip(b, gradients, strict=True)]
        r = momentum**2 * r + 1 / n
        with torch.no_grad():
            for p, m, v in zip(problem.params, b, s, strict=True):
                gamma = (1 - r * v / m**2).clamp(min=0) if debiased else m**2 / (m**2 + r * v)
                p -= lr * (gamma.nan_to_num() * m + decay * p)


@pytest.mark.parametrize("case", [Case("mlp-tanh", "ce"), Case("convnet", "mse")])
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("every", [1, 3])
def test_steps_follow_the_formulas(case, debiased, momentum, every):
    ours, theirs = case.build(n=5), case.build(n=5)
    settings = {"lr": 0.2, "momentum": momentum, "debiased": debiased}
    opt = curvopt.VarianceAdaptiveSGD(
        ours.params, variance_every=every, weight_decay=0.1, **settings
    )
    for _ in range(7):
        opt.step(ours.loss)
    reference(theirs, 7, every=every, decay=0.1, **settings)
    assert_close(oracles.flat(ours.params), oracles.flat(theirs.params), 1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_noise_it_is_sgd(momentum, maximize):
    """All samples alike: gamma = 1, and the step is torch's to the last digits."""

    def run(make):
        problem = Case("mlp-tanh", "ce").build(n=1)
        x, y = problem.x.expand(6, -1), problem.y.expand(6)
        opt = make(problem.params, lr=0.1, momentum=momentum, maximize=maximize)

        def closure():
            opt.zero_grad()
            loss = problem.loss_fn(problem.model(x), y)
            loss.backward()
            return loss

        for _ in range(10):
            opt.step(closure)
        return oracles.flat(problem.params)

    assert_close(run(curvopt.VarianceAdaptiveSGD), run(torch.optim.SGD), 1e-12)


@pytest.mark.parametrize("scale", [1.0, 2.0, 30.0])
def test_factor_does_not_depend_on_the_scale_of_the_loss(scale):
    runs = []
    for factor in (1.0, scale):
        problem = Case("mlp-tanh", "ce").build(n=5)
        opt = curvopt.VarianceAdaptiveSGD(problem.params, lr=0.1 / factor)
        for _ in range(5):
            opt.step(lambda problem=problem, factor=factor: factor * problem.loss())
        runs.append(oracles.flat(problem.params))
    assert_close(runs[1], runs[0], 1e-12)


@pytest.mark.parametrize("loss", ["ce-sum", "ce"])
def test_sum_is_a_mean_with_another_rate(loss):
    problem = Case("mlp-tanh", loss).build(n=5)
    opt = curvopt.VarianceAdaptiveSGD(problem.params, lr=0.1 / (5 if loss == "ce-sum" else 1))
    for _ in range(5):
        opt.step(problem.loss)
    expected = Case("mlp-tanh", "ce").build(n=5)
    reference(expected, 5, lr=0.1, momentum=0.9, every=10)
    assert_close(oracles.flat(problem.params), oracles.flat(expected.params), 1e-9)


# Several backward passes.


def in_closure(problem, opt, sizes):
    def closure():
        opt.zero_grad()
        parts = zip(problem.x.split(sizes), problem.y.split(sizes), strict=True)
        for x, y in parts:
            (problem.loss_fn(problem.model(x), y) * (len(x) / len(problem.x))).backward()

    opt.step(closure)


def in_records(problem, opt, sizes):
    opt.zero_grad()
    for x, y in zip(problem.x.split(sizes), problem.y.split(sizes), strict=True):
        with opt.record():
            (problem.loss_fn(problem.model(x), y) * (len(x) / len(problem.x))).backward()
    opt.step()


@pytest.mark.parametrize("step", [in_closure, in_records])
@pytest.mark.parametrize("sizes", [[3, 3], [4, 1, 1], [1] * 6])
def test_micro_batches_are_the_whole_batch(step, sizes):
    whole, parts = Case("convnet", "ce").build(n=6), Case("convnet", "ce").build(n=6)
    opts = [curvopt.VarianceAdaptiveSGD(p.params, variance_every=2) for p in (whole, parts)]
    for _ in range(5):
        opts[0].step(whole.loss)
        step(parts, opts[1], sizes)
    assert_close(oracles.flat(parts.params), oracles.flat(whole.params), 1e-11)
    assert opts[1].noise.trace == pytest.approx(opts[0].noise.trace, rel=1e-9)


def test_clipping_by_norm_changes_the_length_alone():
    """A gradient clipped to half its norm, with its variance, moves half as far."""
    moves = []
    for factor in (1.0, 0.5):
        problem = Case("mlp-tanh", "ce").build(n=5)
        opt = curvopt.VarianceAdaptiveSGD(problem.params)
        before = oracles.flat(problem.params)
        opt.zero_grad()
        with opt.record():
            problem.loss().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in problem.params])
        torch.nn.utils.clip_grad_norm_(problem.params, factor * norm.item())
        opt.step()
        moves.append(oracles.flat(problem.params) - before)
    assert_close(moves[1], 0.5 * moves[0], 1e-5)


# One sample.


def test_single_samples_fall_back_to_their_history():
    """The guess of S from successive gradients is unbiased where mean and variance are constant."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    opt = curvopt.VarianceAdaptiveSGD([p], lr=0.0, momentum=0.8)
    guesses = []
    for _ in range(30):
        noise = 2 + 3 * torch.randn(1, *p.shape, dtype=p.dtype)
        opt.step(lambda noise=noise: (p * noise).sum(1).mean())
        guesses.append(opt.state[p]["variance"].mean().item())
    assert sum(guesses[10:]) / 20 == pytest.approx(9, rel=0.02)


def test_single_samples_train():
    problem = Case("mlp-tanh", "ce").build(n=16)
    opt = curvopt.VarianceAdaptiveSGD(problem.params, lr=0.02)
    before = problem.loss().item()
    for t in range(160):
        x, y = problem.x[t % 16 : t % 16 + 1], problem.y[t % 16 : t % 16 + 1]
        opt.step(lambda x=x, y=y: problem.loss_fn(problem.model(x), y))
    assert problem.loss() < before
    with pytest.raises(curvopt.CurvoptError, match="two samples"):
        _ = opt.noise


# Noise.


def expected_noise(rows, lr, loss):
    """The attributes of `Noise` from rows ``[N, P]``, as the papers write them."""
    n = len(rows)
    g = rows.mean(0)
    trace = ((rows - g) ** 2).sum() / (n - 1)
    along = rows @ g
    across = rows - along.unsqueeze(1) / g.dot(g) * g
    signal = g.dot(g) - trace / n
    return {
        "batch_size": n,
        "trace": trace,
        "signal": signal,
        "scale": trace / signal if signal > 0 else math.inf,
        "norm_test": trace / n / g.dot(g),
        "inner_product_test": along.var() / n / g.dot(g) ** 2,
        "orthogonality_test": (across**2).sum() / (n - 1) / n / g.dot(g),
        "cabs": lr * trace / loss,
    }


@pytest.mark.parametrize("case", [Case("mlp-tanh", "ce"), Case("convnet", "mse")])
@pytest.mark.parametrize("n", [2, 40])
def test_noise(case, n):
    problem = case.build(n=n)
    opt = curvopt.VarianceAdaptiveSGD(problem.model.parameters(), lr=0.3, noise_tests=True)
    rows = torch.cat([rows.flatten(1) for rows in rows_of(problem)], 1)
    expected = expected_noise(rows, 0.3, problem.loss().detach())
    opt.step(problem.loss)
    for name, value in expected.items():
        assert getattr(opt.noise, name) == pytest.approx(float(value), rel=1e-9), name


def test_noise_averages_numerators_and_denominators_apart():
    problem = Case("mlp-tanh", "ce").build(n=6)
    opt = curvopt.VarianceAdaptiveSGD(problem.params, lr=0.0, variance_every=1, noise_decay=0.5)
    single = []
    for part in (problem.x[:3], problem.x[3:]):
        y = problem.y[: len(part)]
        fresh = curvopt.VarianceAdaptiveSGD(problem.params, lr=0.0)
        for o in (fresh, opt):
            o.step(lambda part=part, y=y: problem.loss_fn(problem.model(part), y))
        single.append(fresh.noise)
    first, second = single
    trace, signal = first.trace + 2 * second.trace, first.signal + 2 * second.signal
    assert opt.noise.trace == pytest.approx(trace / 3, rel=1e-9)
    assert opt.noise.scale == pytest.approx(trace / signal if signal > 0 else math.inf, rel=1e-9)


def test_noise_after_a_batch_without_a_gradient():
    """As where no sample has a weight: it must not stay in the averages for ever."""
    problem = Case("mlp-tanh", "ce").build(n=6)
    options = dict(lr=0.0, variance_every=1, noise_tests=True)
    opt, fresh = (curvopt.VarianceAdaptiveSGD(problem.params, **options) for _ in range(2))
    opt.step(lambda: 0.0 * problem.loss())
    for o in (opt, fresh):
        o.step(problem.loss)
    for name in ("norm_test", "inner_product_test", "orthogonality_test"):
        assert getattr(opt.noise, name) == pytest.approx(getattr(fresh.noise, name)), name


def test_noise_scale_is_unbiased():
    """Gradients of known mean and variance: scale = tr S / |G|^2."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    mean = torch.randn(50, dtype=torch.float64) / 4
    opt = curvopt.VarianceAdaptiveSGD([p], lr=0.0, variance_every=1, noise_decay=0.999)
    for _ in range(1000):
        rows = mean + torch.randn(8, 50, dtype=p.dtype)
        opt.step(lambda rows=rows: (p * rows).sum(1).mean())
    assert opt.noise.scale == pytest.approx(50 / mean.dot(mean).item(), rel=0.1)


def test_noise_tests_need_one_pass():
    problem = Case("mlp-tanh", "ce").build(n=6)
    opt = curvopt.VarianceAdaptiveSGD(problem.params, noise_tests=True)
    in_closure(problem, opt, [3, 3])
    assert opt.noise.inner_product_test is None
    assert opt.noise.norm_test > 0


@pytest.mark.parametrize("options", [{"variance_every": 0}, {"noise_decay": 1.0}])
def test_invalid_settings(options):
    with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
        curvopt.VarianceAdaptiveSGD(nn.Linear(2, 2).parameters(), **options)


def test_noise_does_not_slow_down_what_all_samples_agree_on():
    """One coordinate with signal, one with noise alone: the first moves as in SGD."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0]] * 8, dtype=torch.float64)
    opt = curvopt.VarianceAdaptiveSGD([p], lr=0.1, momentum=0.0)
    opt.step(lambda: (p * rows).sum(1).mean())
    assert p.tolist() == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize("debiased", [False, True])
def test_blocks_and_lists_change_nothing(monkeypatch, debiased):
    """Parameters are moved in blocks on the CPU, and all together elsewhere."""
    runs = []
    for block, foreach in ((1 << 16, None), (4, None), (4, True)):
        monkeypatch.setattr(curvopt.optim.variance_plan, "BLOCK", block)
        problem = Case("convnet", "ce").build(n=5)
        problem.model.to(memory_format=torch.channels_last)
        opt = curvopt.VarianceAdaptiveSGD(
            problem.params, weight_decay=0.1, debiased=debiased, foreach=foreach
        )
        for _ in range(12):
            opt.step(problem.loss)
        runs.append(oracles.flat(problem.params))
    assert_close(runs[1], runs[0], 1e-12)
    assert_close(runs[2], runs[0], 1e-12)


def measured(train):
    """Gradient and scatter of the layer's weight, as a step with `train(layer, opt)` saw them."""
    torch.manual_seed(0)
    layer, seen = nn.Linear(5, 4), []
    opt = curvopt.VarianceAdaptiveSGD(layer.parameters(), lr=0.0)
    opt._update = lambda: seen.append(opt.collected[0])
    train(layer, opt, torch.randn(7, 5), torch.randint(4, (7,)))
    return seen[0].sums[layer.weight], seen[0].scatter[layer.weight]


def test_the_sum_is_the_gradient_that_torch_left_even_if_it_is_clipped_afterwards():
    def train(layer, opt, x, y):
        with opt.record():
            F.cross_entropy(layer(x), y).backward()
        left.append(layer.weight.grad.clone())
        layer.weight.grad.mul_(0.1)
        opt.step()

    left = []
    total, _ = measured(train)
    assert torch.equal(total, left[0])


def doubled(p):
    p.grad.mul_(2)


@pytest.mark.parametrize("kind", ["hooked", "post-accumulate"])
def test_the_sum_is_that_of_the_rows_where_the_gradient_is_not(kind):
    def plain(layer, opt, x, y):
        opt.step(lambda: F.cross_entropy(layer(x), y))

    def otherwise(layer, opt, x, y):
        if kind == "hooked":
            layer.weight.register_hook(lambda grad: 2 * grad)
        else:
            layer.weight.register_post_accumulate_grad_hook(doubled)
        plain(layer, opt, x, y)

    assert_close(torch.stack(measured(otherwise)), torch.stack(measured(plain)))


def test_sums_of_passes_that_accumulate():
    def twice(layer, opt, x, y):
        for _ in range(2):
            with opt.record():
                F.cross_entropy(layer(x), y).backward()
        sums.append(layer.weight.grad.clone())
        opt.step()

    sums = []
    assert_close(measured(twice)[0], sums[0])


def test_scatter_under_autocast_is_no_difference_of_rounded_numbers():
    def train(layer, opt, x, y):
        with opt.record():
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(1 + x / 100)  # rows that hardly differ
            (out.float() + 1).square().mean().backward()
        opt.step()

    def rows(layer, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(1 + x / 100)
        return torch.autograd.grad((out.float() + 1).square().mean(), out)[0]

    _, scatter = measured(train)
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4), torch.randn(7, 5)
    left, right = rows(layer, x).float(), (1 + x / 100).bfloat16().float()
    each = left[:, :, None] * right[:, None]
    assert_close(scatter, (each - each.mean(0)).square().sum(0), rtol=1e-3)


def clip_layers_apart(net):
    nn.utils.clip_grad_norm_(net[0].parameters(), 0.05)
    nn.utils.clip_grad_norm_(net[2].parameters(), 0.005)


def clip_all(net):
    nn.utils.clip_grad_norm_(net.parameters(), 0.05)


def triple(net):
    for p in net.parameters():
        p.grad.mul_(-3)


def clip_values(net):
    nn.utils.clip_grad_value_(net.parameters(), 0.01)


@pytest.mark.parametrize("edit", [clip_layers_apart, clip_all, triple, clip_values])
def test_gradients_changed_before_the_step(edit):
    """What scales a tensor's gradient scales its variance; what bends it does not."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    found = []
    for change in (lambda net: None, edit):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        opt = curvopt.VarianceAdaptiveSGD(net.parameters(), variance_every=1)
        F.cross_entropy(net(x.double()), y).backward()
        before = [p.grad.norm() for p in net.parameters()]
        change(net)
        factors = [(p.grad.norm() / b) ** 2 for p, b in zip(net.parameters(), before, strict=True)]
        opt.step()
        found.append([opt.state[p]["variance"] for p in net.parameters()])
    for plain, changed, factor in zip(*found, factors, strict=True):
        scale = 1.0 if edit is clip_values else factor
        torch.testing.assert_close(changed, plain * scale)
