"""The audit: wrong rules and lost paths are seen, rounding is none, and nothing is left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.engine import plan
from curvopt.engine.audit import EVERY, PRIVATE_EVERY, audit
from curvopt.ops.registry import MODULE_RULES
from curvopt.structures import Dense, Shift
from tests.cases import CASES
from tests.zoo import plain
from tests.zoo.test_zoo import problem

WRONG = "do not add up"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return (x @ self.weight).tanh()


@pytest.fixture
def rule():
    """A rule of `Layer` that is right until its factor is changed."""
    factor, before = [1.0], dict(MODULE_RULES)

    @curvopt.register_rule(Layer)
    def rows(module, inputs, output, cotangent):
        slope = factor[0] * cotangent * (1 - output**2)
        return {"weight": torch.einsum("ni,vno->vnio", inputs[0], slope)}

    yield factor
    MODULE_RULES.clear()
    MODULE_RULES.update(before)


@pytest.fixture(autouse=True)
def _plans():
    plan._PLANS.clear()
    plan._AUDITS.clear()


def layers(n=5):
    model = nn.Sequential(Layer(), nn.Linear(3, 2))
    x, y = torch.randn(n, 4), torch.randint(2, (n,))
    return model, lambda: F.cross_entropy(model(x), y)


def private(params):
    return curvopt.DPSGD(
        params, 0.1, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=5
    )


def test_compute_sees_a_rule_that_was_right_for_other_shapes(rule):
    model, loss = layers()
    curvopt.compute(loss, model.named_parameters(), curvopt.Variance())
    rule[0] = 1.1
    model, loss = layers(6)
    for _ in range(2):  # a pass that failed is audited again
        with pytest.raises(curvopt.CurvoptError, match=rf"0\.weight \[4, 3\] {WRONG}.*verify"):
            curvopt.compute(loss, model.named_parameters(), curvopt.Variance())


def test_variance_adaptive_sees_it_within_some_steps(rule):
    model, loss = layers()
    opt = curvopt.VarianceAdaptiveSGD(model.named_parameters(), lr=0.1, variance_every=1)
    opt.step(loss)
    rule[0] = 2.0
    for _ in range(EVERY - 1):
        opt.step(loss)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(curvopt.CurvoptError, match=WRONG):
        opt.step(loss)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_private_step_sees_it_in_the_parameters_turn(rule):
    model, loss = layers()
    opt = private(model.named_parameters())
    opt.step(loss)
    rule[0] = 1.05
    turns = PRIVATE_EVERY * len(list(model.parameters()))
    with pytest.raises(curvopt.CurvoptError, match=WRONG):
        [opt.step(loss) for _ in range(turns)]


def test_private_steps_whose_sizes_always_change_audit_all_parameters_in_turn(monkeypatch):
    model, x, y = layers()[0], torch.randn(20, 4), torch.randint(2, (20,))
    seen, opt = [], private(model.named_parameters())

    def note(structures, gradients, name, **_):
        seen.append([name(p).split()[0] for p in gradients])

    monkeypatch.setattr("curvopt.engine.audit.audit", note)
    for n in range(3, 10):
        opt.step(lambda n=n: F.cross_entropy(model(x[:n]), y[:n]))
    names = [name for name, _ in model.named_parameters()]
    assert seen[0] == names
    assert [name for (name,) in seen[1:]] == [names[k % 3] for k in range(1, 7)]
    wider = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    private(wider.named_parameters()).step(lambda: F.cross_entropy(wider(x), y))
    assert len(seen[-1]) == 6  # another model


@pytest.mark.parametrize("make", [private, lambda p: curvopt.VarianceAdaptiveSGD(p, lr=0.1)])
def test_a_lost_path_is_seen(make, monkeypatch):
    """As if one of two uses had been forgotten."""
    model = nn.Linear(4, 4)
    x, y = torch.randn(5, 4), torch.randint(4, (5,))
    monkeypatch.setattr("curvopt.engine.computation.paths_of", lambda *_: ({}, False))
    real = curvopt.engine.computation.uses_of
    monkeypatch.setattr(
        "curvopt.engine.computation.uses_of", lambda *a: dict([*real(*a).items()][1:])
    )
    with pytest.raises(curvopt.CurvoptError, match="path that was not recorded"):
        make(model.parameters()).step(lambda: F.cross_entropy(model(model(x).tanh()), y))


def steps(case):
    """The audit of every kind, on a new plan and on known ones."""
    with curvopt.record(case.params) as tape:
        loss = case.loss()
    tape.compute(loss, curvopt.Gradient(), curvopt.SumGradSquared())
    opt = curvopt.VarianceAdaptiveSGD(case.params, lr=0.0)
    opt.step(case.loss)
    opt.zero_grad()
    try:
        opt = private(case.params)
        for _ in range(3):
            opt.step(case.loss)
    except curvopt.CurvoptError as error:  # not all losses are for private steps
        assert WRONG not in str(error)  # noqa: PT017 (the others are right)
    opt.zero_grad()


@pytest.mark.filterwarnings("ignore::curvopt.SlowPathWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_no_false_alarm(case, dtype):
    steps(case.build(dtype=dtype))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", plain.MODELS)
def test_no_false_alarm_of_models(name, dtype):
    make, inputs = plain.MODELS[name]
    x = inputs()
    x = x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    steps(problem(make().to(dtype), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_cancel_are_no_alarm(dtype):
    """A key's bias has no gradient, but for the rounding of its tokens."""
    query, key, value = (nn.Linear(8, 8).to(dtype) for _ in range(3))
    x, y = torch.randn(16, 50, 8, dtype=dtype), torch.randn(16, 50, 8, dtype=dtype)
    params = [*query.parameters(), *key.parameters(), *value.parameters()]

    def loss():
        scores = query(x) @ key(x).mT
        return F.mse_loss(scores.softmax(-1) @ value(x), y)

    opt = curvopt.VarianceAdaptiveSGD(params, lr=0.0)
    opt.step(loss)
    opt.zero_grad()
    private(params).step(loss)


def test_what_is_no_number_is_no_alarm():
    p = torch.zeros(2)
    rows = {p: Dense(torch.full((1, 3, 2), torch.nan))}
    none = (0.0, 1, 0.0)
    audit(rows, {p: torch.ones(2)}, str, number=0, precision=1e-7, shuffled=lambda *_: none)


def test_a_gradient_that_is_all_rounding_is_no_alarm():
    """Rows that do not vary, normalized: the rule has zeros, autograd what rounding left."""
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    for k in range(3):
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        for n, p in enumerate(model.parameters()):
            nn.init.constant_(p, 0.1 * (n + k))
        opt = private(model.parameters())
        for n in range(1, 9):  # a parameter each
            opt.step(lambda n=n: F.cross_entropy(model(x[:n] + k), y[:n]))  # noqa: B023 (runs at once)


def test_terms_that_cancel_bound_the_difference():
    p, tokens = torch.zeros(2), torch.randn(1, 3, 10, 2)
    rows = {p: Shift(1e6 * (tokens - tokens.flip(2)), p.shape, (1, 2))}
    for size, alarm in ((1e6, False), (1e-6, True)):

        def terms(p, a, b, generator, size=size):
            return size, 60, 0.0

        given = {p: torch.full((2,), 0.5)}
        arguments = dict(number=1, precision=1e-7, shuffled=terms)
        if alarm:
            with pytest.raises(curvopt.CurvoptError, match=WRONG):
                audit(rows, given, lambda _: "p [2]", **arguments)
        else:
            audit(rows, given, lambda _: "p [2]", **arguments)


def test_it_draws_nothing_and_leaves_nothing(rule):
    model, loss = layers()
    state = torch.get_rng_state()
    curvopt.compute(loss, model.parameters(), curvopt.Variance())
    assert all(p.grad is None for p in model.parameters())
    curvopt.VarianceAdaptiveSGD(model.parameters(), lr=0.1).step(loss)
    assert torch.equal(state, torch.get_rng_state())


def test_a_private_pass_leaves_no_gradient():
    model, loss = layers()
    given = []
    opt = private(model.parameters())
    handles = [p.register_post_accumulate_grad_hook(given.append) for p in model.parameters()]
    [handle.remove() for handle in handles[1:]]
    with pytest.raises(curvopt.CurvoptError, match="gradient hook"):
        opt.step(loss)
    handles[0].remove()
    with opt.record():
        loss().backward()
    for p in model.parameters():
        with pytest.raises(curvopt.CurvoptError):
            _ = p.grad + 0
    assert not given
