"""Private optimizers: what a sample can contribute, the noise, the state, and what is refused."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt
from curvopt.privacy import (
    ExponentialSchedule,
    PoissonBatchSampler,
    PrivacyLedger,
    QuantileClipping,
    micro_batches,
)
from tests import cases, oracles
from tests.cases import Case, Problem
from tests.oracles import assert_close
from tests.zoo import hugging_face, plain

INF = math.inf
MODES = ["flat", "per_layer", "automatic"]
modes = pytest.mark.parametrize("clipping", MODES)


def private(params, lr=0.0, cls=curvopt.DPSGD, **options):
    """By default without noise and learning rate, so that ``p.grad`` is the clipped sum."""
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "expected_batch_size": 1}
    return cls(params, lr, **{**settings, **options})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(params):
    return oracles.flat([p.grad for p in params]).double()


def clipped_sum(problem, rows=slice(None), **options):
    """The clipped sum of some samples, as one vector."""
    x, y = (take(part, rows) for part in (problem.x, problem.y))
    opt = private(problem.params, batch_size=len(take(first(problem.x), rows)), **options)
    opt.step(lambda: problem.loss_fn(problem.model(x), y))
    total = flat(problem.params)
    opt.zero_grad()
    return total


def first(batch):
    return batch[0] if isinstance(batch, tuple) else batch


def take(batch, rows):
    return tuple(t[rows] for t in batch) if isinstance(batch, tuple) else batch[rows]


class Reused(nn.Module):
    """One weight as a module, again by a function, and transposed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(x).tanh()
        x = F.linear(x, self.layer.weight).tanh() @ self.layer.weight
        return self.head(x)


def zoo(name, dtype=torch.float32):
    """One problem by name, from the lists of models or from here."""
    if name in cases.MODELS:
        loss = "heads" if name == "heads" else "mse" if name in cases.FLAT else "ce"
        return Case(name, loss).build(dtype=dtype)
    if name == "reused":
        return cases.build(Reused, (4,), cases.LOSSES["ce"], dtype=dtype)
    torch.manual_seed(0)
    make, inputs = plain.MODELS[name]
    model, x = make().to(dtype), inputs()
    x = x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    with torch.no_grad():
        z = model(x)
    return Problem(model, F.mse_loss, x, torch.randn_like(z), list(model.parameters()))


# -- what a sample contributes -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("model", [*cases.MODELS, *plain.MODELS, "reused"])
def test_a_sample_contributes_at_most_the_clipping_norm(model):
    problem = zoo(model)
    for clipping in MODES:
        for norm in (1e-3, 0.1):
            options = {"clipping": clipping, "max_grad_norm": norm}
            whole = clipped_sum(problem, **options)
            without = clipped_sum(problem, slice(1, None), **options)
            alone = clipped_sum(problem, slice(1), **options)
            assert alone.norm() <= norm * (1 + 1e-5)
            assert (whole - without).norm() <= norm * (1 + 1e-5)
            torch.testing.assert_close(
                whole - without, alone, rtol=0, atol=1e-6 * len(first(problem.x))
            )


@pytest.mark.parametrize("name", hugging_face.MODELS)
def test_a_sample_of_a_hugging_face_model_contributes_at_most_the_clipping_norm(name):
    model, batch = hugging_face.MODELS[name].make()
    params = list(model.parameters())

    def total(rows, **options):
        part = {key: value[rows] for key, value in batch.items()}
        opt = private(params, max_grad_norm=0.1, batch_size=len(part["labels"]), **options)
        opt.step(lambda: model(**part).loss)
        found = flat(params)
        opt.zero_grad()
        return found

    for clipping in MODES:
        whole, without, alone = (
            total(rows, clipping=clipping) for rows in (slice(None), slice(1, None), slice(1))
        )
        assert 0 < alone.norm() <= 0.1 * (1 + 1e-5)
        assert (whole - without).norm() <= 0.1 * (1 + 1e-5)
        torch.testing.assert_close(whole - without, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", cases.ANY)
def test_neighbouring_sums_differ_by_one_contribution_whatever_the_loss(loss):
    problem = Case("conv1d-groups", loss).build(n=6)
    if loss == "two-terms":  # a sum times a number beside a mean: what it counts is not declared
        with refused("scaled by 0.3"):
            clipped_sum(problem)
        return
    for n in range(6):
        others = [m for m in range(6) if m != n]
        difference = clipped_sum(problem) - clipped_sum(problem, others)
        assert difference.norm() <= 0.1 * (1 + 1e-9)
        assert_close(difference, clipped_sum(problem, [n]), rtol=1e-7)


@modes
def test_the_sum_is_that_of_a_loop(clipping):
    problem = Case("convnet", "ce").build(n=6)
    rows = oracles.batch_grad(*problem)
    norms = {p: r.flatten(1).norm(dim=1) for p, r in rows.items()}
    total = torch.stack(list(norms.values())).norm(dim=0)
    opt = private(problem.params, clipping=clipping, max_grad_norm=0.5)
    opt.step(problem.loss)
    assert_close(opt.norms, total)
    assert opt.clip_fraction == (total > 0.5).double().mean()
    for p, row in rows.items():
        factors = {
            "flat": (0.5 / (total + 1e-6)).clamp(max=1),
            "per_layer": (0.5 / len(rows) ** 0.5 / (norms[p] + 1e-6)).clamp(max=1),
            "automatic": 0.5 / (total + 0.01),
        }[clipping]
        assert_close(p.grad, torch.tensordot(factors, row, 1))


@modes
def test_autocast_does_not_stretch_a_contribution(clipping):
    problem = zoo("tokens-mlp")
    opt = private(problem.params, clipping=clipping)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            problem.loss_fn(problem.model(problem.x[:1]), problem.y[:1]).backward()

    opt.step(closure)
    assert 0.05 < flat(problem.params).norm() <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("value", [INF, -INF, math.nan])
@modes
def test_a_sample_that_is_not_finite_contributes_nothing(value, clipping):
    problem = zoo("convnet")
    expected = clipped_sum(problem, [0, 2, 3], clipping=clipping)
    problem.x[1, 0, 0] = value
    opt = private(problem.params, clipping=clipping)
    opt.step(problem.loss)
    torch.testing.assert_close(flat(problem.params), expected)
    opt.step(problem.loss)
    assert opt.nonfinite_samples == 2
    assert not opt.norms[1].isfinite()


def test_a_logical_batch_may_come_in_parts_and_in_any_order():
    problem = Case("convnet", "ce").build(n=7)
    whole = clipped_sum(problem)
    opt = private(problem.params)

    def parts(order, *sizes):
        def closure():
            opt.zero_grad()
            for rows in order.split(list(sizes)):
                problem.loss_fn(problem.model(problem.x[rows]), problem.y[rows]).backward()

        return closure

    for number, sizes in enumerate([(7,), (3, 4), (1, 5, 1), (7, 0), (0, 4, 3)], 1):
        opt.step(parts(torch.randperm(7), *sizes))
        assert_close(flat(problem.params), whole)
        assert (opt.ledger.steps, len(opt.norms)) == (number, 7)
    with opt.record():
        parts(torch.arange(7), 2, 5)()
    opt.step()
    assert_close(flat(problem.params), whole)


def test_the_divisor_is_the_expected_batch_size():
    problem = Case("mlp-tanh", "ce").build()
    total = clipped_sum(problem)
    for size in (2, 4.5, 100):
        assert_close(clipped_sum(problem, expected_batch_size=size), total / size)


def test_unused_parameters_count_and_frozen_ones_do_not():
    problem = Case("mlp-tanh", "ce").build()
    unused, frozen = nn.Parameter(torch.zeros(10_000)), nn.Parameter(torch.ones(3), False)
    opt = private(
        [*problem.params, unused, frozen],
        lr=1.0, noise_multiplier=2.0, max_grad_norm=0.5, generator=seeded(),
    )  # fmt: skip
    opt.step(problem.loss)
    assert unused.grad.std().item() == pytest.approx(1.0, rel=0.03)
    assert torch.equal(unused, -unused.grad)
    assert frozen.grad is None
    assert frozen.tolist() == [1, 1, 1]


# -- plain SGD, Adam -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
        {"momentum": 0.5, "foreach": True},
    ],
)
def test_without_clipping_and_noise_it_is_sgd(options):
    problem = Case("convnet", "ce").build(n=6)
    twin = copy.deepcopy(problem.model)
    mine = private(problem.params, 0.5, max_grad_norm=INF, expected_batch_size=6, **options)
    theirs = torch.optim.SGD(twin.parameters(), 0.5, **options)
    for _ in range(4):
        loss = mine.step(problem.loss)
        theirs.zero_grad()
        expected = problem.loss_fn(twin(problem.x), problem.y)
        expected.backward()
        theirs.step()
        assert_close(loss.detach(), expected.detach(), 1e-12)
    for p, q in zip(problem.params, twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-12)
        assert_close(p.grad, q.grad, 1e-12)


def test_without_clipping_and_noise_dp_adam_is_adamw():
    problem = Case("convnet", "ce").build(n=6)
    twin = copy.deepcopy(problem.model)
    options = {"weight_decay": 0.1, "betas": (0.8, 0.95)}
    mine = private(
        problem.params, 0.1, curvopt.DPAdam,
        max_grad_norm=INF, expected_batch_size=6, eps=1e-30, **options,
    )  # fmt: skip
    theirs = torch.optim.AdamW(twin.parameters(), 0.1, eps=0, **options)
    for _ in range(4):
        mine.step(problem.loss)
        theirs.zero_grad()
        problem.loss_fn(twin(problem.x), problem.y).backward()
        theirs.step()
    for p, q in zip(problem.params, twin.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), 1e-9)


def test_dp_adam_takes_the_noise_off_the_second_moment():
    problem, unused = Case("mlp-tanh", "ce").build(), nn.Parameter(torch.zeros(20_000))
    opt = private(
        [*problem.params, unused], cls=curvopt.DPAdam, noise_multiplier=1.0,
        expected_batch_size=4, generator=seeded(),
    )  # fmt: skip
    for _ in range(20):
        opt.step(problem.loss)
    moment = opt.state[unused]["exp_avg_sq"] / (1 - 0.999**20)
    variance = (0.1 / 4) ** 2
    assert abs(moment.mean()) < 5 * variance * (2 / 20 / 20_000) ** 0.5
    assert unused.grad.var().item() == pytest.approx(variance, rel=0.05)


# -- noise -----------------------------------------------------------------------------------------


def noise_of(steps=1, shape=(300, 400), dtype=torch.float32, **options):
    """The noise of some steps on a parameter that the loss does not need."""
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(shape, dtype=dtype))
    opt = private([used, unused], **{"noise_multiplier": 3.0, "generator": seeded(), **options})
    x = torch.ones(4, 2)
    drawn = []
    for _ in range(steps):
        opt.step(lambda: (x * used).sum(1).mean())
        drawn.append(unused.grad.clone())
    return torch.stack(drawn), opt


@pytest.mark.parametrize("secure", [False, True])
@modes
def test_noise_has_the_scale_that_is_accounted(clipping, secure):
    noise, _ = noise_of(
        2, clipping=clipping, secure_noise=secure, max_grad_norm=0.5, expected_batch_size=5
    )
    std, count = 3.0 * 0.5 / 5, noise[0].numel()
    for one in noise:
        assert abs(one.mean()) < 4.5 * std / count**0.5
        assert one.std().item() / std == pytest.approx(1, abs=4.5 / (2 * count) ** 0.5)
    assert abs((noise[0] * noise[1]).mean()) < 4.5 * std**2 / count**0.5


def test_noise_is_drawn_once_for_a_logical_batch():
    problem = Case("mlp-tanh", "ce").build(n=6)
    unused = nn.Parameter(torch.zeros(100_000))
    opt = private([*problem.params, unused], noise_multiplier=1.0, max_grad_norm=1.0)

    def closure():
        for x, y in micro_batches((problem.x, problem.y), 1):
            problem.loss_fn(problem.model(x), y).backward()

    opt.step(closure)
    assert unused.grad.std().item() == pytest.approx(1.0, rel=0.02)
    assert opt.ledger.steps == 1


def test_noise_is_added_before_rounding():
    exact, _ = noise_of()
    for dtype in (torch.float16, torch.bfloat16):
        rounded, _ = noise_of(dtype=dtype)
        assert torch.equal(rounded, exact.to(dtype))


def test_noise_has_a_generator_of_its_own():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = noise_of(3, generator=None)
    torch.manual_seed(1)
    second, _ = noise_of(3, generator=None)
    assert torch.equal(torch.get_rng_state(), before)
    draws = torch.cat([first, second]).flatten(1)
    assert len(draws.unique(dim=0)) == 6
    repeated = [noise_of(3)[0] for _ in range(2)]
    assert torch.equal(*repeated)


def test_noise_does_not_depend_on_threads():
    one, _ = noise_of()
    torch.set_num_threads(2)
    try:
        two, _ = noise_of()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_a_copy_draws_other_noise():
    _, opt = noise_of(generator=None)
    twin = copy.deepcopy(opt)
    like = torch.zeros(8)
    assert not torch.equal(opt._noise(like, 1.0), twin._noise(like, 1.0))


# -- the loop -----------------------------------------------------------------------------------


def test_a_gradient_without_noise_is_never_seen():
    problem = Case("mlp-tanh", "ce").build()
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))  # of another optimizer
    opt = private(problem.params, noise_multiplier=1.0)
    seen = []

    def closure():
        opt.zero_grad()
        loss = problem.loss_fn(problem.model(problem.x) * other, problem.y)
        loss.backward()
        seen.extend(p.grad for p in [*problem.params, other])
        return loss

    loss = opt.step(closure)
    *withheld, last = seen
    for grad in withheld:
        with pytest.raises(curvopt.CurvoptError, match="look at p.grad itself"):
            grad.norm()
    assert last is None
    assert other.grad is None
    assert_close(loss.detach(), problem.loss().detach())


def test_gradients_do_not_add_up_over_steps():
    problem = Case("mlp-tanh", "ce").build()
    total = clipped_sum(problem)
    opt = private(problem.params)
    opt.zero_grad()
    for _ in range(2):

        def closure():
            loss = problem.loss()
            loss.backward()
            return loss

        opt.step(closure)
        assert_close(flat(problem.params), total)


def test_an_empty_batch_is_a_step():
    problem = Case("convnet", "ce").build()
    opt = private(problem.params, 1.0, noise_multiplier=1.0, generator=seeded())
    before = [p.detach().clone() for p in problem.params]
    for x, y in micro_batches((problem.x[:0], problem.y[:0]), 4):
        loss = opt.step(lambda x=x, y=y: problem.loss_fn(problem.model(x), y))
    assert loss.isnan()
    assert (opt.ledger.steps, len(opt.norms), opt.clip_fraction) == (1, 0, 0.0)
    for p, start in zip(problem.params, before, strict=True):
        assert p.grad.abs().min() > 0
        assert_close(p.detach(), start - p.grad)


def test_schedules_are_logged_as_they_were_used():
    _, opt = noise_of(
        4,
        noise_multiplier=ExponentialSchedule(2.0, 0.5, every=2),
        max_grad_norm=lambda step: 1.0 + step,
    )
    phases = [
        (p.noise_multiplier, p.steps, p.min_grad_norm, p.max_grad_norm) for p in opt.ledger.phases
    ]
    assert phases == [(2.0, 2, 1.0, 2.0), (1.0, 2, 3.0, 4.0)]


def test_quantile_clipping_moves_and_is_paid_for():
    clip = QuantileClipping(1.0, expected_batch_size=4, count_noise_multiplier=1.0)
    noise, opt = noise_of(20, noise_multiplier=1.0, max_grad_norm=clip, expected_batch_size=4)
    (phase,) = opt.ledger.phases
    assert (phase.noise_multiplier, phase.steps) == (1.0, 20)
    assert phase.min_grad_norm < phase.max_grad_norm
    sigma = clip.gradient_noise_multiplier(1.0)
    assert sigma > 1.1
    assert noise[0].std().item() == pytest.approx(sigma / 4, rel=0.02)


# -- accounting ------------------------------------------------------------------------------------


def test_the_samplers_statement_reaches_the_ledger():
    data = TensorDataset(torch.zeros(40, 2))
    poisson = PoissonBatchSampler(data, expected_batch_size=4)

    def sampling(**options):
        opt = private([nn.Parameter(torch.zeros(2))], expected_batch_size=4, **options)
        return opt.sampler, opt.sample_rate, opt.ledger.num_samples

    assert sampling() == ("none", 1.0, None)
    assert sampling(sampler=poisson) == ("poisson", 0.1, 40)
    assert sampling(sampler=DataLoader(data, batch_sampler=poisson)) == ("poisson", 0.1, 40)
    assert sampling(sampler=DataLoader(data, 8, shuffle=True)) == ("shuffle", 0.2, 40)
    assert sampling(sampler="poisson", sample_rate=0.3) == ("poisson", 0.3, None)
    assert sampling(sampler="poisson", num_samples=80) == ("poisson", 0.05, 80)
    replaced = torch.utils.data.RandomSampler(data, replacement=True)
    with refused("RandomSampler: with replacement=True it draws a sample several times"):
        sampling(sampler=DataLoader(data, 8, sampler=replaced))
    with refused(r"Invalid sample rate: 0.01 \(that of the sampler is 0.1"):
        sampling(sampler=poisson, sample_rate=0.01)


def test_what_was_spent():
    _, opt = noise_of(3, sampler="poisson", num_samples=400, expected_batch_size=4)
    ledger = PrivacyLedger()
    ledger.log(3.0, 0.01, 3)
    assert opt.privacy_spent(1e-5) == ledger.epsilon(1e-5)
    assert opt.privacy_spent(1e-5, "rdp") == ledger.epsilon(1e-5, "rdp")
    report = str(opt.privacy_report(1e-5, unit="one row"))
    assert "one row of 400" in report
    assert "3 steps, sigma = 3, q = 0.01, C = 0.1, poisson" in report
    assert private([nn.Parameter(torch.zeros(2))]).privacy_spent(1e-5) == 0
    _, opt = noise_of(noise_multiplier=0.0)
    assert opt.privacy_spent(1e-5) == INF


def lower_bound(std_factor, trials=800, delta=0.01):
    """A lower bound of epsilon, 95 % sure, from telling two neighbouring batches apart."""
    weight = nn.Parameter(torch.zeros(1))
    opt = private([weight], noise_multiplier=1.0, generator=seeded(3))
    add_to = opt._noise.add_to
    opt._noise.add_to = lambda totals, std, size: add_to(totals, std * std_factor, size)
    x = torch.tensor([[1.0], [-3.0], [2.0]])

    def released(x):
        seen = []
        for _ in range(trials):
            opt.step(lambda: (x * weight).sum(1).mean())
            seen.append(weight.grad.item())
        return torch.tensor(seen) / 0.1

    with_it, without = released(x), released(x[:2])
    bounds = []
    for threshold in torch.linspace(0.5, 2.5, 9):
        hits, false = int((with_it > threshold).sum()), int((without > threshold).sum())
        sure_hit = beta.ppf(0.025, hits, trials - hits + 1)
        sure_false = beta.ppf(0.975, false + 1, trials - false)
        bounds.append(math.log(max(sure_hit - delta, 1e-9) / sure_false))
    return max(bounds)


def test_neighbours_can_be_told_apart_no_better_than_is_claimed():
    ledger = PrivacyLedger()
    ledger.log(1.0, 1.0, sampler="none")
    claimed = ledger.epsilon(0.01)
    assert 0.3 * claimed < lower_bound(1.0) < claimed
    assert lower_bound(0.5) > claimed


# -- state -----------------------------------------------------------------------------------------


def run(opt, model, sampler, data, steps):
    batches = iter(sampler)
    for _ in range(steps):
        rows = next(batches)
        x, y = data[0][rows], data[1][rows]
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("cls", [curvopt.DPSGD, curvopt.DPAdam])
@pytest.mark.parametrize("adaptive", [False, True])
def test_kill_and_resume(cls, adaptive):
    torch.manual_seed(0)
    data = torch.randn(200, 4), torch.randint(3, (200,))

    def start(seed):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        sampler = PoissonBatchSampler(200, expected_batch_size=8, steps=50, generator=seeded(seed))
        norm = QuantileClipping(0.5, expected_batch_size=8) if adaptive else 0.5
        more = {} if cls is curvopt.DPAdam else {"momentum": 0.9}
        opt = cls(
            model.parameters(), 0.1, noise_multiplier=ExponentialSchedule(0.7, 0.9, every=3),
            max_grad_norm=norm, expected_batch_size=8, sampler=sampler, generator=seeded(seed),
            **more,
        )  # fmt: skip
        return model, opt, sampler

    model, opt, sampler = start(1)
    run(opt, model, sampler, data, 9)
    expected, epsilon = (
        [p.detach().clone() for p in model.parameters()],
        opt.privacy_spent(1e-3, "rdp"),
    )

    model, opt, sampler = start(1)
    run(opt, model, sampler, data, 4)
    file = io.BytesIO()
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "data": sampler.state_dict()}
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, opt, sampler = start(2)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    sampler.load_state_dict(saved["data"])
    run(opt, model, sampler, data, 5)
    for p, q in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p, q)
    assert opt.privacy_spent(1e-3, "rdp") == epsilon
    assert opt.ledger.steps == 9


def test_pickling_keeps_the_noise_and_the_ledger():
    _, opt = noise_of(2)
    twin = pickle.loads(pickle.dumps(opt))
    assert twin.ledger.steps == 2
    like = torch.zeros(100)
    assert torch.equal(opt._noise(like, 1.0), twin._noise(like, 1.0))


def test_groups_have_their_own_learning_rate():
    problem = Case("mlp-tanh", "ce").build()
    *rest, last = problem.params
    before = [p.detach().clone() for p in problem.params]
    opt = private([{"params": rest}, {"params": [last], "lr": 2.0}], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    opt.step(problem.loss)
    scheduler.step()
    for p, start, lr in zip(problem.params, before, [0.5] * len(rest) + [2.0], strict=True):
        assert_close(p.detach(), start - lr * p.grad)
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.2]


# -- what is refused -------------------------------------------------------------------------------


class Counting(nn.Linear):
    """Keeps an average of its inputs, beside the graph."""

    def __init__(self, replace):
        super().__init__(4, 3)
        self.register_buffer("average", torch.zeros(4))
        self.replace = replace

    def forward(self, x):
        average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        if self.replace:
            self.average = average
        else:
            self.average.copy_(average)
        return super().forward(x)


class Mixing(nn.Linear):
    def forward(self, x):
        x = super().forward(x)
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.BatchNorm1d(4), "BatchNorm1d|batch_norm"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), "batch_norm"),
        (lambda: Counting(False), r"Counting updated its buffer average \[4\]"),
        (lambda: Counting(True), r"Counting updated its buffer average \[4\]"),
        (lambda: Mixing(4, 3), "samples are not separate"),
    ],
)
def test_what_mixes_or_remembers_samples_is_refused(layer, message):
    model = nn.Sequential(nn.Linear(4, 4), layer(), nn.Flatten())
    before = [p.detach().clone() for p in model.parameters()]
    opt = private(model.parameters(), 1.0, noise_multiplier=1.0)
    x = torch.randn(5, 4)
    with pytest.raises(curvopt.CurvoptError, match=message):
        opt.step(lambda: F.mse_loss(z := model(x), torch.zeros_like(z)))
    assert opt.ledger.steps == 0
    assert all(map(torch.equal, before, model.parameters()))


def test_buffers_that_see_parameters_alone_may_change():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    x = torch.randn(5, 4)
    opt = private(model.parameters(), noise_multiplier=1.0)
    opt.step(lambda: model(x).square().sum(1).mean())
    assert opt.ledger.steps == 1


def test_batch_norm_in_eval_mode_is_fine():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(5, 4)
    opt = private(model.parameters())
    opt.step(lambda: model(x).square().sum(1).mean())
    assert flat(model.parameters()).norm() > 0


def refused(match="was not recorded"):
    return pytest.raises(curvopt.CurvoptError, match=match)


def test_foreign_gradients_are_refused():
    problem = Case("mlp-tanh", "ce").build()
    opt = private(problem.params, 1.0)
    problem.loss().backward()
    for closure in (problem.loss, lambda: problem.loss().backward()):
        with refused():
            opt.step(closure)
    with refused():
        opt.record()
    opt.zero_grad()
    opt.step(problem.loss)
    problem.params[0].grad += 1  # it was ours, but is not now
    with refused():
        opt.step(problem.loss)
    opt.zero_grad(set_to_none=False)
    opt.step(problem.loss)

    def both():
        loss = problem.loss()
        problem.params[0].grad = torch.ones_like(problem.params[0])
        loss.backward()

    with refused():
        opt.step(both)
    assert opt.ledger.steps == 2


def test_a_recorded_pass_is_not_left_over():
    problem = Case("mlp-tanh", "ce").build()
    opt = private(problem.params)
    with opt.record():
        problem.loss().backward()
    with refused("not followed by step"):
        opt.record()
    opt.zero_grad()
    with refused("nothing was recorded"):
        opt.step()
    assert opt.ledger.steps == 0


@pytest.mark.parametrize("loss", [lambda z: z.sqrt(), lambda z: z.square(), lambda z: z * z])
def test_a_loss_that_is_no_sum_over_samples_is_refused(loss):
    problem = Case("mlp-tanh", "mse").build()
    opt = private(problem.params)
    with refused("no weighted sum"):
        opt.step(lambda: loss(problem.loss()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"momentum": -1.0}, "Invalid momentum"),
        ({"weight_decay": -1.0}, "Invalid weight_decay"),
        ({"nesterov": True}, "Invalid nesterov: True"),
        ({"noise_multiplier": -1.0}, "Invalid noise multiplier: -1.0"),
        ({"noise_multiplier": math.nan}, "Invalid noise multiplier: nan"),
        ({"max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0"),
        ({"max_grad_norm": INF, "clipping": "automatic"}, "automatic clipping needs a finite one"),
        ({"expected_batch_size": 0}, "Invalid expected batch size: 0"),
        ({"clipping": "hard"}, r"Invalid clipping: hard"),
        ({"sampler": "lucky"}, "Invalid sampler: lucky"),
        ({"sampler": "poisson"}, "needs sample_rate or num_samples"),
        ({"sampler": "poisson", "sample_rate": 1.5}, "Invalid sample rate: 1.5"),
        ({"sample_rate": 0.1}, "sample_rate=0.1 means nothing for sampler='none'"),
        ({"cls": curvopt.DPAdam, "betas": (0.9, 1.0)}, "Invalid betas"),
        ({"cls": curvopt.DPAdam, "eps": 0.0}, "Invalid eps: 0.0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        private([nn.Parameter(torch.zeros(2))], **options)


def test_bad_values_of_a_schedule_are_refused():
    for options in ({"noise_multiplier": lambda t: -1.0}, {"max_grad_norm": lambda t: 0.0}):
        with refused("Invalid"):
            noise_of(**options)
    with refused("Invalid noise standard deviation: inf"):
        noise_of(max_grad_norm=INF)


@pytest.mark.parametrize("habit", ["closure", "record"])
def test_sums_are_not_used_twice(habit, monkeypatch):
    """A step that fails after its noise was drawn is over: its sums hold that noise."""
    problem = Case("mlp-tanh", "ce").build()
    before = [p.detach().clone() for p in problem.params]
    opt = private(problem.params, lr=0.1, noise_multiplier=1.0)
    with monkeypatch.context() as patch:

        def fails(self, group, params, grads):
            raise RuntimeError("out of memory")

        patch.setattr(curvopt.DPSGD, "_move", fails)
        if habit == "record":
            with opt.record():
                problem.loss().backward()
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.step(problem.loss if habit == "closure" else None)
    assert all(map(torch.equal, before, problem.params))
    assert all(p.grad is None for p in problem.params)
    with pytest.raises(curvopt.CurvoptError, match="nothing was recorded"):
        opt.step()
    opt.step(problem.loss)
    assert opt.ledger.steps == 1  # nobody has seen anything of the one that failed


def test_a_state_without_a_ledger_is_refused():
    _, opt = noise_of()
    state = torch.optim.SGD([torch.zeros(2), torch.zeros(300, 400)]).state_dict()
    with refused("no privacy ledger"):
        opt.load_state_dict(state)


# -- what is doubtful is said --------------------------------------------------------------------


def test_batches_of_one_size_are_not_poisson():
    used, x = nn.Parameter(torch.zeros(2)), torch.ones(8, 2)
    options = {"sampler": "poisson", "num_samples": 80, "expected_batch_size": 8}
    opt = private([used], **options)
    for _ in range(9):
        opt.step(lambda: (x * used).sum(1).mean())
    with pytest.warns(UserWarning, match="10 batches in a row had 8 samples: this is not Poisson"):
        opt.step(lambda: (x * used).sum(1).mean())


def test_more_samples_than_can_be_expected():
    used, x = nn.Parameter(torch.zeros(2)), torch.ones(200, 2)
    opt = private([used], expected_batch_size=8)
    with pytest.warns(UserWarning, match="200 samples where 8 are expected"):
        opt.step(lambda: (x * used).sum(1).mean())


def test_shuffled_batches_are_said_to_be_unamplified():
    with pytest.warns(UserWarning, match="without amplification"):
        _, opt = noise_of(sampler="shuffle", num_samples=400, expected_batch_size=4)
    assert opt.privacy_spent(1e-3) > 0.5


def test_delta_must_be_below_one_over_n():
    _, opt = noise_of(sampler="poisson", num_samples=400, expected_batch_size=4)
    with pytest.warns(UserWarning, match="not below 1/N"):
        opt.privacy_spent(0.01)
