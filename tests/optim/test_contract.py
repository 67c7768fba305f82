"""What every optimizer must do as torch.optim's do; a new one joins by a row in `ROWS`."""

import contextlib
import copy
import gc
import inspect
import io
import math
import pickle
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import curvopt
from curvopt.recording.tape import Tape

private = {"noise_multiplier": 0.0, "max_grad_norm": 10.0, "expected_batch_size": 8}
ROWS = {
    # With a rate whose steps bfloat16 can represent.
    "diag_ggn": partial(curvopt.DiagGGNOptimizer, lr=1e-3),
    "diag_ggn-exact": partial(curvopt.DiagGGNOptimizer, lr=1e-3, estimator="exact"),
    "variance_adaptive": curvopt.VarianceAdaptiveSGD,
    "variance_adaptive-every-step": partial(
        curvopt.VarianceAdaptiveSGD, variance_every=1, debiased=True
    ),
    "polar": curvopt.PolarOptimizer,
    "dp_sgd": partial(curvopt.DPSGD, lr=0.1, momentum=0.9, **private),
    "dp_adam": partial(curvopt.DPAdam, lr=0.01, **private),
}
PRIVATE = ("dp_sgd", "dp_adam")

every = pytest.mark.parametrize("row", ROWS)


def options_of(row):
    """Names of the constructor's arguments, with those that ``**`` passes on to the base class."""
    make = ROWS[row]
    cls = make.func if isinstance(make, partial) else make
    names = set()
    for base in cls.__mro__:
        signature = inspect.signature(base.__init__).parameters
        names |= signature.keys()
        if all(p.kind is not p.VAR_KEYWORD for p in signature.values()):
            return names
    return names


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def build(row, dtype=torch.float32, **options):
    model = network(dtype)
    return model, ROWS[row](model.named_parameters(), **options)


def batch(t, dtype=torch.float32):
    """Batch t of eight, which repeat."""
    draw = torch.Generator().manual_seed(t % 8)
    x = torch.randn(8, 4, generator=draw)
    return x.to(dtype), (x[:, :3] + 0.1 * torch.randn(8, 3, generator=draw)).argmax(1)


def loss_of(model, t):
    x, y = batch(t, next(model.parameters()).dtype)
    return F.cross_entropy(model(x), y)


def train(model, opt, steps, start=0, after=lambda: None):
    losses = []
    for t in range(start, start + steps):
        losses.append(opt.step(lambda t=t: loss_of(model, t)).item())
        after()
    return losses


def snapshot(model, opt):
    """All that a failed step must leave as it was."""
    params = [p.detach().clone() for p in model.parameters()]
    given = [(p, p.grad) for p in model.parameters()]
    grads = [g.clone() if g is not None and type(g) is torch.Tensor else None for _, g in given]
    state = copy.deepcopy(opt.state_dict())
    return params, grads, state


def same(a, b):
    """Equal bit by bit, through any nesting."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        # A run has a name of its own, also if it goes on from another's state; so has its copy
        # for torch.distributed.checkpoint.
        kept = a.keys() - {"line", "curvopt", "curvopt_noise"}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in kept)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


# Learning.


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_learns(row, dtype):
    model, opt = build(row, dtype)
    losses = train(model, opt, 60)
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    for state in opt.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.ndim and row not in PRIVATE:
                assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)


@every
def test_gradient_is_left_in_grad(row):
    model, opt = build(row, torch.float64)
    expected = torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    train(model, opt, 1)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-6)


@every
def test_autocast(row):
    model, opt = build(row)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, 0)

    losses = [opt.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# Settings and groups.


@every
def test_no_step_without_learning_rate(row):
    model, opt = build(row, lr=0.0)
    before = parameters(model)
    train(model, opt, 3)
    assert same(parameters(model), before)


@every
def test_tensor_learning_rate(row):
    runs = []
    for lr in (0.05, torch.tensor(0.05), torch.tensor([0.05])):
        model, opt = build(row, torch.float64, lr=lr)
        torch.manual_seed(1)
        train(model, opt, 5)
        runs.append(parameters(model))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-6, atol=1e-7)  # 0.05 in float32


@every
def test_settings_are_read_from_the_groups_at_each_step(row):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    opt = ROWS[row](groups)
    before = parameters(model)
    train(model, opt, 3)
    middle = parameters(model)
    assert not same(middle[:2], before[:2])
    assert same(middle[2:], before[2:])
    opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 0.0, 0.1
    train(model, opt, 3)
    assert same(parameters(model)[:2], middle[:2])
    assert not same(parameters(model)[2:], middle[2:])


@every
def test_add_param_group(row):
    model = network()
    opt = ROWS[row](model[2].parameters())
    train(model, opt, 2)
    first = parameters(model)[:2]
    model.zero_grad()
    opt.add_param_group({"params": model[0].parameters(), "lr": 0.02})
    train(model, opt, 3)
    assert not same(parameters(model)[:2], first)
    assert opt.param_groups[1]["lr"] == 0.02


@every
def test_maximize_goes_the_other_way(row):
    moves = []
    for maximize in (False, True):
        model, opt = build(row, torch.float64, maximize=maximize)
        torch.manual_seed(1)
        before = parameters(model)
        train(model, opt, 1)
        moves.append([p - q for p, q in zip(parameters(model), before, strict=True)])
    torch.testing.assert_close(moves[1], [-move for move in moves[0]], rtol=1e-9, atol=1e-12)


@every
def test_weight_decay_shrinks(row):
    norms = []
    for weight_decay in (0.0, 0.5):
        model, opt = build(row, weight_decay=weight_decay)
        torch.manual_seed(1)
        train(model, opt, 10)
        norms.append(sum(p.norm() for p in model.parameters()))
    assert norms[1] < norms[0]


@pytest.mark.parametrize("row", [row for row in ROWS if "foreach" in options_of(row)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreach_changes_nothing(row, dtype):
    runs = []
    for foreach in (None, True, False):
        model, opt = build(row, dtype, foreach=foreach)
        torch.manual_seed(1)
        train(model, opt, 5)
        runs.append(parameters(model))
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1e-3}
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], **close)


SCHEDULERS = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 2),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0),
}


@every
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(row, name):
    model, opt = build(row)
    scheduler = SCHEDULERS[name](opt)
    seen = []

    def after():
        scheduler.step(*[1.0] if name == "plateau" else [])
        seen.append(opt.param_groups[0]["lr"])

    train(model, opt, 6, after=after)
    assert len(set(seen)) > 1
    copy.deepcopy(opt)  # a scheduler's wrapper of `step` does not get in the way
    pickle.dumps(opt)


@every
def test_hooks(row):
    model, opt = build(row)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    train(model, opt, 2)
    assert seen == ["before", "after"] * 2


@every
def test_repr(row):
    _, opt = build(row, lr=0.0625)
    assert type(opt).__name__ in repr(opt)
    assert "lr: 0.0625" in repr(opt)


@every
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(row, set_to_none):
    model, opt = build(row)
    train(model, opt, 1)
    opt.zero_grad(set_to_none)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert (next(model.parameters()).grad is None) is set_to_none


# torch's own definitions of its tests.


@pytest.fixture
def definitions():
    return pytest.importorskip("torch.testing._internal.common_optimizers")


@every
def test_settings_that_torch_tests(row, definitions):
    cases = [case.kwargs for case in definitions.optim_inputs_func_sgd(torch.device("cpu"))]
    cases = [settings for settings in cases if settings.keys() <= options_of(row)]
    assert len(cases) > 2
    for settings in cases:
        model, opt = build(row, **settings)
        before = [loss_of(model, 0).item(), parameters(model)]
        train(model, opt, 2)
        assert not same(parameters(model), before[1]) or settings.get("lr") == 0


@every
def test_errors_that_torch_tests(row, definitions):
    for case in definitions.optim_error_inputs_func_sgd("cpu", torch.float32):
        arguments = case.optimizer_error_input
        if arguments.kwargs.keys() <= options_of(row):
            # torch warns that a parameter given twice will be an error: here it is.
            error = ValueError if case.error_type is UserWarning else case.error_type
            with pytest.raises(error, match=r"Invalid|iterable|group|twice|names"):
                ROWS[row](arguments.params, **arguments.kwargs)


# Checkpoints.


def saved(*objects):
    """Through a file, as checkpoints go."""
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def generators(row):
    """A run that draws from torch's generator, and one with its own, where it can."""
    yield {}
    if "generator" in options_of(row):
        yield {"generator": torch.Generator().manual_seed(3)}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_is_the_uninterrupted_one(row, dtype):
    """Killed at a random step, bit by bit."""
    for kill in random.Random(row).sample(range(1, 25), 3):
        for options in generators(row):
            model, opt = build(row, dtype, **options)
            torch.manual_seed(1)
            train(model, opt, kill)
            checkpoint, drawn = saved(model, opt), torch.get_rng_state()
            train(model, opt, 30 - kill, start=kill)

            torch.manual_seed(2)
            options = {key: torch.Generator() for key in options}
            other, resumed = build(row, dtype, **options)
            other.load_state_dict(checkpoint[0])
            resumed.load_state_dict(checkpoint[1])
            torch.set_rng_state(drawn)
            train(other, resumed, 30 - kill, start=kill)
            assert same(parameters(other), parameters(model))
            assert same(resumed.state_dict(), opt.state_dict())


@every
@pytest.mark.parametrize("through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(row, through):
    for options in generators(row):
        model, opt = build(row, **options)
        train(model, opt, 13)
        other, twin = through((model, opt))
        drawn = torch.get_rng_state()
        train(model, opt, 13)
        torch.set_rng_state(drawn)
        train(other, twin, 13)
        assert same(parameters(other), parameters(model))
        assert same(twin.state_dict(), opt.state_dict())


@every
def test_loaded_state_is_a_copy(row):
    model, opt = build(row)
    train(model, opt, 3)
    state = opt.state_dict()
    kept = copy.deepcopy(state)
    other, resumed = build(row)
    resumed.load_state_dict(state)
    train(other, resumed, 3)
    assert same(state, kept)


@every
def test_state_of_other_groups_is_refused(row):
    _, opt = build(row)
    other = ROWS[row]([{"params": [p]} for p in network().parameters()])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(opt.state_dict())


# Parameters that take no part.


@every
def test_frozen_and_unfrozen(row):
    model, opt = build(row)
    model[0].requires_grad_(False)
    before = parameters(model)
    train(model, opt, 3)
    assert same(parameters(model)[:2], before[:2])
    model[0].requires_grad_(True)
    train(model, opt, 3)
    middle = parameters(model)
    assert not same(middle[:2], before[:2])
    model[2].requires_grad_(False)
    opt.zero_grad()
    train(model, opt, 3)
    assert same(parameters(model)[2:], middle[2:])


@pytest.mark.parametrize("row", [row for row in ROWS if row not in PRIVATE])
def test_unused_parameter_stays(row):
    """Private optimizers move it: whether a sample used it is private."""
    model = network()
    unused = nn.Parameter(torch.ones(3))
    opt = ROWS[row]([*model.parameters(), unused], weight_decay=0.1)
    train(model, opt, 3)
    assert unused.grad is None
    assert unused.eq(1).all()


# Errors: each is clear, and leaves everything as it was.


def returns_nothing(model, opt):
    loss_of(model, 0)


def returns_a_number(model, opt):
    return loss_of(model, 0).item()


def returns_rows(model, opt):
    x, y = batch(0)
    return F.cross_entropy(model(x), y, reduction="none")


def is_not_finite(model, opt):
    opt.zero_grad()
    (loss_of(model, 0) * math.inf).backward()


def goes_back_twice(model, opt):
    opt.zero_grad()
    loss = loss_of(model, 0)
    loss.backward()
    loss.backward()


def goes_back_twice_after_zeros(model, opt):
    opt.zero_grad(set_to_none=False)
    loss = loss_of(model, 0)
    loss.backward()
    loss.backward()


def has_no_gradients(model, opt):
    with torch.no_grad():
        return loss_of(model, 0)


def raises_after_backward(model, opt):
    opt.zero_grad()
    loss_of(model, 0).backward()
    raise RuntimeError("out of data")


def raises_with_gradients_added(model, opt):
    loss_of(model, 0).backward()
    raise RuntimeError("out of data")


FAILURES = {
    returns_nothing: "return loss",
    returns_a_number: "tensor",
    returns_rows: "scalar",
    is_not_finite: "finite",
    goes_back_twice: "second|twice|backward",
    goes_back_twice_after_zeros: "second|twice|backward",
    has_no_gradients: "gradient",
    raises_after_backward: "out of data",
    raises_with_gradients_added: "out of data",
}


@every
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_failed_step_changes_nothing(row, failure, steps):
    if row in PRIVATE and failure is is_not_finite:
        pytest.skip("a sample whose loss is not finite is left out")
    model, opt = build(row)
    train(model, opt, steps)
    before = snapshot(model, opt)
    with pytest.raises((ValueError, RuntimeError), match=FAILURES[failure]):
        opt.step(lambda: failure(model, opt))
    after = snapshot(model, opt)
    if not opt.restores_gradients:  # private ones let go of the last step's noisy gradient
        before = (before[0], [None] * len(before[1]), *before[2:])
    for name, a, b in zip(("parameters", "grad", "state"), before, after, strict=True):
        assert same(a, b), name
    train(model, opt, 2)


@pytest.mark.parametrize("row", PRIVATE)
def test_private_step_without_a_record(row):
    model, opt = build(row)
    train(model, opt, 1)
    opt.zero_grad()
    loss_of(model, 0).backward()
    before = snapshot(model, opt)
    with pytest.raises(curvopt.CurvoptError, match=r"nothing was recorded|did not make"):
        opt.step()
    assert same(snapshot(model, opt), before)


@every
@pytest.mark.parametrize("steps", [0, 1])
def test_unrecorded_gradient(row, steps):
    model, opt = build(row)
    train(model, opt, steps)
    opt.zero_grad()
    if opt.goes_backward and not opt._wanted():
        pytest.skip("the step needs the gradient alone")
    torch.autograd.backward(loss_of(model, 1))
    before = snapshot(model, opt)
    with pytest.raises(curvopt.CurvoptError, match=r"0\.weight .*zero_grad"):
        opt.step(lambda: loss_of(model, 0).backward())
    assert same(snapshot(model, opt), before)
    opt.zero_grad()
    train(model, opt, 1)


UNSCALED = tuple(row for row in ROWS if not row.startswith("dp_"))


@pytest.mark.parametrize("row", [row for row in ROWS if row not in UNSCALED])
def test_grad_scaler_is_refused(row):
    model, opt = build(row)
    scaler = torch.amp.GradScaler("cpu")
    for unscale in (False, True):
        opt.zero_grad()
        with opt.record():
            scaler.scale(loss_of(model, 0)).backward()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(curvopt.CurvoptError, match="bfloat16"):
            (scaler.unscale_ if unscale and row in PRIVATE else scaler.step)(opt)
        assert same([p.detach() for p in model.parameters()], before)
        scaler = torch.amp.GradScaler("cpu")
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    opt.zero_grad()
    disabled.step(opt, lambda: loss_of(model, 0))


@pytest.mark.parametrize("ordinary", [True, False])
@pytest.mark.parametrize("row", UNSCALED)
def test_grad_scaler(row, ordinary):
    """A power of two: the steps are those without it, bit for bit."""

    def run(scale):
        model, opt = build(row)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scale)
        for k in range(4):
            x, y = batch(k)
            torch.manual_seed(k)
            opt.zero_grad()
            with contextlib.nullcontext() if ordinary else opt.record():
                scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(opt)
            scaler.update()
        return snapshot(model, opt)

    assert same(run(True)[0], run(False)[0])


@pytest.mark.parametrize("row", UNSCALED)
def test_grad_scaler_that_finds_an_overflow(row):
    """The step is left out, and what was measured goes with it."""
    model, opt = build(row)
    scaler = torch.amp.GradScaler("cpu")
    train(model, opt, 1)
    before = snapshot(model, opt)
    opt.zero_grad()
    (scaler.scale(loss_of(model, 0)) * float("inf")).backward()
    scaler.step(opt)
    scaler.update()
    after = snapshot(model, opt)
    assert same(before[0], after[0])
    assert same(before[2], after[2])
    assert scaler.get_scale() == 2.0**15
    opt.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(opt)
    assert not same(before[0], snapshot(model, opt)[0])


@pytest.mark.parametrize("row", UNSCALED)
def test_grad_scaler_after_unscale(row):
    """The scale is not known any more; a step that needs the gradient alone needs no scale."""
    model, opt = build(row)
    for _ in range(3):
        scaler = torch.amp.GradScaler("cpu")
        opt.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        scaler.unscale_(opt)
        before = snapshot(model, opt)
        if opt._measures():
            with pytest.raises(curvopt.CurvoptError, match="bfloat16.*unscale_"):
                scaler.step(opt)
            assert same(snapshot(model, opt), before)
            opt.zero_grad()
            opt.step(lambda: loss_of(model, 0))
        else:
            scaler.step(opt)
            assert not same(snapshot(model, opt)[0], before[0])


@every
def test_invalid_parameters(row):
    model = network()
    make = ROWS[row]
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(ValueError, match=r"2\.bias is given twice"):
        make([*model.named_parameters(), ("2.bias", model[2].bias)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": model[0].parameters()}, {"params": model.parameters()}])
    with pytest.raises(ValueError, match="phase is complex"):
        make([("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
    with pytest.raises(TypeError, match="iterable"):
        make(model[0].weight)
    with pytest.raises(TypeError, match="ordered"):
        make([{"params": set(model.parameters())}])
    with pytest.raises(ValueError, match="non-leaf"):
        make([model[0].weight * 2])


@every
def test_sparse_gradients(row):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    opt = ROWS[row](model.named_parameters())
    x, y = torch.randint(7, (4, 2)), torch.randint(2, (4,))
    before = snapshot(model, opt)
    with pytest.raises(curvopt.CurvoptError, match="sparse"):
        opt.step(lambda: F.cross_entropy(model(x), y))
    assert same(snapshot(model, opt), before)


INVALID = {"lr": (-1.0, math.nan), "weight_decay": (-1.0,), "momentum": (-0.5,), "damping": (-1.0,)}


@every
def test_invalid_settings(row):
    known = options_of(row)
    for name, values in INVALID.items():
        for value in values if name in known else ():
            with pytest.raises(ValueError, match=rf"Invalid .*{value}"):
                build(row, **{name: value})
    _, opt = build(row)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        opt.add_param_group({"params": [("other", nn.Parameter(torch.ones(2)))], "lr": -1.0})
    with pytest.raises(ValueError, match=r"one element|1-element"):
        build(row, lr=torch.ones(2))
    assert len(opt.param_groups) == 1


@every
def test_recorded_pass_that_fails(row):
    model, opt = build(row)
    train(model, opt, 1)
    opt.zero_grad()
    before = snapshot(model, opt)
    rows = F.cross_entropy(model(batch(0)[0]), batch(0)[1], reduction="none")
    with opt.record(), pytest.raises((curvopt.CurvoptError, RuntimeError), match="scalar"):
        rows.backward()
    assert same(snapshot(model, opt), before)
    opt.zero_grad()
    with opt.record():
        loss_of(model, 0).backward()
    opt.step()


@pytest.mark.parametrize("row", [row for row in ROWS if row not in PRIVATE])
def test_several_records_add_up(row):
    """Also between updates of the curvature or variance, and not when the model was zeroed."""
    runs = []
    for dropped in (False, True):
        model, opt = build(row, torch.float64)
        torch.manual_seed(1)
        for t in range(12):
            if dropped:
                drawn = torch.get_rng_state()
                with opt.record():
                    loss_of(model, t + 1).backward()
                model.zero_grad()
                torch.set_rng_state(drawn)
            opt.zero_grad()
            for part in (t, t + 1):
                with opt.record():
                    (loss_of(model, part) / 2).backward()
            grads = torch.autograd.grad(
                (loss_of(model, t) + loss_of(model, t + 1)) / 2, list(model.parameters())
            )
            torch.testing.assert_close([p.grad for p in model.parameters()], list(grads))
            opt.step()
        runs.append(parameters(model))
    assert same(runs[0], runs[1])


@every
def test_a_step_leaves_no_cycles_behind(row):
    """Whatever a step recorded is freed with it, not when Python next looks for cycles."""
    model, opt = build(row)
    train(model, opt, 1)
    gc.collect()
    gc.disable()
    try:
        train(model, opt, 1)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [thing for thing in gc.garbage if isinstance(thing, (torch.Tensor, Tape))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left
