"""Loops as they are written for torch.optim: no closure, no `record()`."""

import copy
import gc
import sys
import threading
import warnings
import weakref
from contextlib import ExitStack, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _len_torch_function_stack,
    _pop_mode,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import curvopt
from curvopt.recording.stacks import UNCOMPILED, Uncompiled
from tests.armed import rest_all

N, D, C = 6, 4, 3
OPTIMIZERS = {
    "diag_ggn": lambda params, **k: curvopt.DiagGGNOptimizer(params, curvature_every=2, **k),
    "polar": lambda params, **k: curvopt.PolarOptimizer(params, curvature_every=2, **k),
    "variance": lambda params, **k: curvopt.VarianceAdaptiveSGD(params, variance_every=2, **k),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C)).double()


def batch(seed=0, n=N):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=draw, dtype=torch.float64), torch.arange(n) % C


def ce(output, y):
    return F.cross_entropy(output, y)


def module_hooks():
    module = torch.nn.modules.module
    return len(module._global_forward_pre_hooks) + len(module._global_forward_hooks)


def modes():
    return _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()


def params_of(net):
    return [p.detach().clone() for p in net.parameters()]


def assert_same(net, expected):
    for p, q in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p, q)


@pytest.fixture(autouse=True)
def clean():
    """Nothing of a loop is left when it is over and its optimizer gone."""
    rest_all()
    nn.Linear(1, 1)(torch.zeros(1, 1))  # hooks of optimizers that are gone go at the next module
    hooks = module_hooks()
    yield
    nn.Linear(1, 1)(torch.zeros(1, 1))
    if module_hooks() > hooks or modes() != ([], []):
        gc.collect()
        nn.Linear(1, 1)(torch.zeros(1, 1))
    left = modes()
    while _len_torch_function_stack():  # for the tests after
        _pop_mode()
    assert left == ([], [])
    assert module_hooks() <= hooks
    assert not is_in_torch_dispatch_mode()


def by_closure(make, loss, steps=4, net=None, **options):
    """Parameters after steps with closures: what every loop here is to arrive at."""
    net = net or network()
    opt = make(net.parameters(), **options)
    for k in range(steps):
        torch.manual_seed(k)
        opt.step(lambda k=k: loss(net, *batch(k)))
    return params_of(net)


def plain(make, body, steps=4, net=None, **options):
    """Parameters after steps whose forward and backward pass, and zero_grad, are `body`."""
    net = net or network()
    opt = make(net.parameters(), **options)
    for k in range(steps):
        torch.manual_seed(k)
        body(net, opt, *batch(k))
        opt.step()
        assert modes() == ([], [])
    return net


def mean_ce(net, x, y):
    return ce(net(x), y)


# Where zero_grad stands, what the loss is.


def zero_first(net, opt, x, y):
    opt.zero_grad()
    ce(net(x), y).backward()


def zero_between(net, opt, x, y):
    loss = ce(net(x), y)
    opt.zero_grad()
    loss.backward()


def zero_in_place(net, opt, x, y):
    opt.zero_grad(set_to_none=False)
    loss = ce(net(x), y)
    loss.backward()


def zero_by_model(net, opt, x, y):
    net.zero_grad()
    output = net(x)
    loss = ce(output, y)
    loss.backward()


@pytest.mark.parametrize("body", [zero_first, zero_between, zero_in_place, zero_by_model])
@every
def test_zero_grad_stands_anywhere(make, body):
    assert_same(plain(make, body), by_closure(make, mean_ce))


LOSSES = {
    "module": lambda net, x, y: nn.CrossEntropyLoss()(net(x), y),
    "softmax-then-nll": lambda net, x, y: F.nll_loss(F.log_softmax(net(x), 1), y),
    "weighted-sum": lambda net, x, y: 0.5 * ce(net(x), y) + 2 * ce(2 * net(x), y),
    "scaled-in-place": lambda net, x, y: ce(net(x), y).div_(4),
    "regression": lambda net, x, y: F.mse_loss(net(x)[:, 0], y.to(x)),
    "mask-made-outside": lambda net, x, y: (
        F.cross_entropy(net(x), y, reduction="none") * (y > 0)
    ).mean(),
    "penalty": lambda net, x, y: ce(net(x), y) + 0.1 * net[0].weight.square().sum(),
    "label-smoothing": lambda net, x, y: F.cross_entropy(net(x), y, label_smoothing=0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@every
def test_losses_computed_outside_of_the_model(make, loss):
    def body(net, opt, x, y):
        opt.zero_grad()
        loss(net, x, y).backward()

    if loss is LOSSES["mask-made-outside"] and make is OPTIMIZERS["diag_ggn"]:
        pytest.skip("no curvature is known of a loss written by hand")
    assert_same(plain(make, body), by_closure(make, loss))


class LogProbabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return F.log_softmax(self.net(x), dim=1)


@every
def test_log_softmax_inside_and_nll_outside(make):
    def body(net, opt, x, y):
        opt.zero_grad()
        F.nll_loss(net(x), y).backward()

    expected = by_closure(make, lambda net, x, y: F.nll_loss(net(x), y), net=LogProbabilities())
    assert_same(plain(make, body, net=LogProbabilities()), expected)


class WithLoss(nn.Module):
    """As Hugging Face's: the loss is one of its outputs."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, y):
        logits = self.net(x)
        return {"loss": ce(logits, y), "logits": logits}


@pytest.mark.parametrize("own", [True, False], ids=["its-own", "another"])
@every
def test_models_that_return_a_loss(make, own):
    def loss(net, x, y):
        output = net(x, y)
        return output["loss"] if own else ce(2 * output["logits"], y)

    def body(net, opt, x, y):
        opt.zero_grad()
        loss(net, x, y).backward()

    expected = by_closure(make, loss, net=WithLoss())
    assert_same(plain(make, body, net=WithLoss()), expected)


# Evaluation, and forward passes that nothing follows.


def evaluate_no_grad(net, x):
    with torch.no_grad():
        return net.eval()(x)


def evaluate_inference(net, x):
    with torch.inference_mode():
        return net.eval()(x)


def evaluate_with_gradients(net, x):
    return net.eval()(x).argmax(1)


def forward_alone(net, x):
    output = net(x)
    return output.shape


def forward_and_loss(net, x):
    return float(ce(net(x), torch.zeros(len(x), dtype=torch.long)).detach())


def gradient_of_the_input(net, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).sum(), x)


IDLE = [
    evaluate_no_grad,
    evaluate_inference,
    evaluate_with_gradients,
    forward_alone,
    forward_and_loss,
    gradient_of_the_input,
]


@pytest.mark.parametrize("idle", IDLE)
@every
def test_what_no_backward_pass_follows_leaves_nothing(make, idle):
    net = network()
    opt = make(net.parameters())
    gc.disable()
    try:
        for k in range(4):
            for _ in range(2):
                other = batch(10, n=9)[0]
                seen = weakref.ref(other)
                state = torch.get_rng_state()
                idle(net, other)
                torch.set_rng_state(state)
                del other
                assert seen() is None
                assert modes() == ([], [])
            torch.manual_seed(k)
            x, y = batch(k)
            opt.zero_grad()
            ce(net.train()(x), y).backward()
            opt.step()
    finally:
        gc.enable()
    assert_same(net, by_closure(make, mean_ce))


@pytest.mark.parametrize("idle", IDLE)
@every
def test_evaluation_between_forward_and_backward(make, idle):
    def body(net, opt, x, y):
        opt.zero_grad()
        loss = ce(net(x), y)
        state = torch.get_rng_state()
        idle(net, batch(10, n=9)[0])
        torch.set_rng_state(state)
        loss.backward()

    assert_same(plain(make, body), by_closure(make, mean_ce))


@every
def test_memory_of_a_recurrent_network_that_is_not_trained(make):
    net = nn.LSTM(D, 5, num_layers=2, batch_first=True)
    opt = make(net.parameters())
    x = torch.randn(N, 3, D)
    gc.disable()
    try:
        output = net(x)[0]
        seen = weakref.ref(x)
        assert modes() != ([], [])
        del x, output
        assert seen() is None
        assert modes() == ([], [])
    finally:
        gc.enable()
    F.mse_loss(net(torch.randn(N, 3, D))[0], torch.zeros(N, 3, 5)).backward()
    opt.step()


@every
def test_after_the_backward_pass_nothing_is_held(make):
    net = network()
    opt = make(net.parameters())
    gc.disable()
    try:
        x, y = batch()
        seen = weakref.ref(x)
        loss = ce(net(x), y)
        loss.backward()
        del x
        assert seen() is None
        opt.step()
        assert loss.grad_fn is not None  # as in torch
    finally:
        gc.enable()


@every
def test_steps_that_do_not_measure_run_plain(make):
    gc.collect()  # optimizers of other tests
    net = network()
    seen, measures = [], []
    opt = make(net.parameters())
    net.register_forward_hook(lambda *_: seen.append((modes() != ([], []), module_hooks() > 0)))
    for k in range(6):
        x, y = batch(k)
        measures.append(opt._measures())
        opt.zero_grad()
        ce(net(x), y).backward()
        opt.step()
    assert measures[0]
    assert measures.count(False) > 1
    assert seen == [(m, m) for m in measures]


# Several forward passes, several losses.


@every
def test_siamese(make):
    def loss(net, x, y):
        return F.mse_loss(net(x) - net(2 * x), x[:, :C])

    def body(net, opt, x, y):
        opt.zero_grad()
        one = net(x)
        other = net(2 * x)
        F.mse_loss(one - other, x[:, :C]).backward()

    assert_same(plain(make, body), by_closure(make, loss))


@every
def test_losses_of_two_batches_added(make):
    def body(net, opt, x, y):
        opt.zero_grad()
        first = ce(net(x[:2]), y[:2])
        second = ce(net(x[2:]), y[2:])
        (first / 3 + second * (2 / 3)).backward()

    def loss(net, x, y):
        return ce(net(x[:2]), y[:2]) / 3 + ce(net(x[2:]), y[2:]) * (2 / 3)

    assert_same(plain(make, body), by_closure(make, loss))


@every
def test_accumulation(make):
    def parts(net, x, y):
        for chunk in range(3):
            rows = slice(2 * chunk, 2 * chunk + 2)
            loss = ce(net(x[rows]), y[rows]) / 3
            loss.backward()

    def body(net, opt, x, y):
        opt.zero_grad()
        parts(net, x, y)

    def loss(net, x, y):
        net.zero_grad()
        parts(net, x, y)

    assert_same(plain(make, body), by_closure(make, loss))


@every
def test_both_forward_passes_before_both_backward_passes(make):
    def passes(net, x, y):
        net.zero_grad()
        losses = [ce(net(x[:3]), y[:3]) / 2, ce(net(x[3:]), y[3:]) / 2]
        for loss in losses:
            loss.backward()
        return losses[0]

    def body(net, opt, x, y):
        passes(net, x, y)

    assert_same(plain(make, body), by_closure(make, passes))


@every
def test_two_backward_passes_over_one_forward_pass(make):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    output = net(x)
    ce(output, y).backward(retain_graph=True)
    ce(2 * output, y).backward()
    with pytest.raises(curvopt.CurvoptError, match="add the losses"):
        opt.step()
    assert_same(net, before)
    opt.zero_grad()
    (ce(net(x), y)).backward()
    opt.step()


@pytest.mark.parametrize(
    "unseen",
    [
        lambda loss: loss.backward(),
        lambda loss: torch.autograd.backward(loss),
        lambda loss: torch.autograd.backward([loss, loss]),
    ],
)
@every
def test_a_second_backward_pass_that_nobody_sees(make, unseen):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    loss = ce(net(x), y)
    loss.backward(retain_graph=True)
    unseen(loss)
    with pytest.raises(curvopt.CurvoptError, match="backward once|was not recorded"):
        opt.step()
    assert_same(net, before)


@every
def test_a_backward_pass_that_nobody_sees(make):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    torch.autograd.backward([ce(net(x), y)])
    with pytest.raises(curvopt.CurvoptError, match=r"step\(closure\).*opt\.record\(\)"):
        opt.step()
    assert_same(net, before)


@pytest.mark.parametrize("arguments", [{"create_graph": True}, {"gradient": torch.tensor(0.5)}])
@every
def test_arguments_of_backward(make, arguments):
    """A clear error at the step; `backward` itself does as it is told."""
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the cycle that create_graph makes
        ce(net(x), y).backward(**arguments)
    assert net[0].weight.grad is not None
    with pytest.raises(curvopt.CurvoptError, match="takes no arguments"):
        opt.step()
    assert_same(net, before)
    net.zero_grad()


@every
def test_adversarial_training(make):
    """The gradient at the input comes by a pass of its own, backward(inputs=[x]) for one."""

    def perturbed(net, x, y):
        x = x.clone().requires_grad_()
        ce(net(x), y).backward(inputs=[x])
        return (x + 0.1 * x.grad.sign()).detach()

    def body(net, opt, x, y):
        x = perturbed(net, x, y)
        opt.zero_grad()
        ce(net(x), y).backward()

    net = network()
    opt = make(net.parameters())
    for k in range(4):
        x, y = batch(k)
        x = perturbed(net, x, y)
        opt.zero_grad()
        torch.manual_seed(k)
        opt.step(lambda x=x, y=y: ce(net(x), y))
    assert_same(plain(make, body), params_of(net))


@every
def test_generator_and_critic(make):
    """The generator's pass goes through the critic, and is kept over the critic's step."""

    def build():
        torch.manual_seed(0)
        nets = nn.Sequential(nn.Linear(2, D), nn.Tanh()), nn.Sequential(nn.Linear(D, 1))
        return [net.double() for net in nets]

    def target(value):
        return torch.full((N, 1), float(value), dtype=torch.float64)

    bce = F.binary_cross_entropy_with_logits

    def train(recorded):
        generator, critic = build()
        opts = make(generator.parameters()), make(critic.parameters())
        for k in range(4):
            x = batch(k)[0]
            z = batch(100 + k)[0][:, :2]
            torch.manual_seed(k)
            if recorded:
                with torch.no_grad():
                    fake = generator(z)
                opts[1].zero_grad()
                with opts[1].record():
                    bce(critic(x), target(1)).backward()
                    bce(critic(fake), target(0)).backward()
                opts[1].step()
                opts[0].zero_grad()
                with opts[0].record():
                    bce(critic(generator(z)), target(1)).backward()
                opts[0].step()
            else:
                fake = generator(z)
                critic.zero_grad()
                bce(critic(x), target(1)).backward()
                bce(critic(fake.detach()), target(0)).backward()
                opts[1].step()
                generator.zero_grad()
                bce(critic(fake), target(1)).backward()
                opts[0].step()
        return params_of(generator) + params_of(critic)

    found, expected = train(False), train(True)
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


class Steps(nn.Module):
    """Two networks and their optimizers, whose whole step is one call, as wrappers make it."""

    def __init__(self, makers):
        super().__init__()
        torch.manual_seed(0)
        self.nets = nn.ModuleList([nn.Linear(D, D).double(), nn.Linear(D, C).double()])
        self.opts = [make(net.parameters()) for make, net in zip(makers, self.nets, strict=True)]

    def forward(self, x, y):
        first, second = self.nets
        ce(second(first(x).detach()), y).backward()
        self.opts[1].step()
        self.opts[1].zero_grad()
        ce(second(first(x)), C - 1 - y).backward()
        self.opts[0].step()
        self.opts[0].zero_grad()
        second.zero_grad()


@pytest.mark.parametrize("other", [None, torch.optim.Adam])
@every
def test_a_whole_step_inside_of_a_module(make, other):
    """As by the same lines outside of it: what one optimizer does is no pass of the other's."""
    ends = []
    for inside in (True, False):
        steps = Steps([make, other or make])
        for k in range(5):
            torch.manual_seed(k)
            (steps if inside else steps.forward)(*batch(k))
            assert modes() == ([], [])
        ends.append(params_of(steps))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# What happens meanwhile.


@every
def test_data_is_loaded_between_forward_and_backward(make):
    data = TensorDataset(*batch(3, n=8))

    def body(net, opt, x, y):
        opt.zero_grad()
        loss = ce(net(x), y)
        state = torch.get_rng_state()
        for xs, _ in DataLoader(data, batch_size=4, shuffle=True):
            (xs - xs.mean(0)).norm()
        torch.set_rng_state(state)
        loss.backward()

    assert_same(plain(make, body), by_closure(make, mean_ce))


class Modes(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Default:
    def __enter__(self):
        torch.set_default_device("cpu")

    def __exit__(self, *error):
        torch.set_default_device(None)


AROUND = {
    "default": Default,
    "device": lambda: torch.device("cpu"),
    "function-mode": Modes,
    "dispatch-mode": Ops,
    "autocast-off": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("where", ["forward", "loss", "backward", "forward-and-loss"])
@every
def test_modes_of_the_users(make, around, where):
    """Entered and left around a part of the pass."""

    def body(net, opt, x, y):
        opt.zero_grad()
        before = modes()
        with around() if where == "forward-and-loss" else nullcontext():
            with around() if where == "forward" else nullcontext():
                output = net(x)
            with around() if where == "loss" else nullcontext():
                loss = ce(output, y)
        with around() if where == "backward" else nullcontext():
            loss.backward()
        del output, loss
        opt.step()
        assert modes() == before

    net = network()
    opt = make(net.parameters())
    for k in range(4):
        torch.manual_seed(k)
        body(net, opt, *batch(k))
    assert_same(net, by_closure(make, mean_ce))


@every
def test_a_mode_that_is_left_after_the_backward_pass(make):
    net = network()
    opt = make(net.parameters())
    x, y = batch()
    output = net(x)
    mode, ops = Modes(), Ops()
    mode.__enter__()
    ops.__enter__()
    ce(output, y).backward()
    opt.step()
    assert modes() == ([mode], [ops])
    ops.__exit__(None, None, None)
    mode.__exit__(None, None, None)
    assert modes() == ([], [])


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.fails = network(), True

    def forward(self, x):
        h = self.net(x)
        if self.fails:
            raise RuntimeError("out of memory")
        return h


@every
def test_an_exception_in_the_middle(make):
    net = Fails()
    opt = make(net.parameters())
    x, y = batch()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            net(x)
        assert modes() == ([], [])
    net.fails = False
    with pytest.raises(ValueError, match="Expected input batch_size"):
        ce(net(x), y[:3])
    torch.manual_seed(0)
    ce(net(x), y).backward()
    opt.step()
    assert_same(net, by_closure(make, mean_ce, steps=1))


@pytest.mark.parametrize("order", ["ordinary-first", "recorded-first"])
@every
def test_records_and_closures_between_ordinary_steps(make, order):
    def recorded(net, opt, x, y):
        opt.zero_grad()
        with opt.record():
            ce(net(x), y).backward()

    turn = iter(range(4))

    def body(net, opt, x, y):
        first = next(turn) % 2 == (order == "ordinary-first")
        (recorded if first else zero_first)(net, opt, x, y)

    assert_same(plain(make, body), by_closure(make, mean_ce))


@every
def test_a_record_of_another_optimizer_around_the_pass(make):
    def run(ordinary):
        net = network()
        first, second = make(net[0].parameters()), make(net[2].parameters())
        for k in range(4):
            x, y = batch(k)
            torch.manual_seed(k)
            first.zero_grad()
            second.zero_grad()
            with nullcontext() if ordinary else first.record(), second.record():
                ce(net(x), y).backward()
            first.step()
            second.step()
        return net

    expected = params_of(run(False))
    for p, q in zip(run(True).parameters(), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@every
def test_two_optimizers_side_by_side(make):
    def run(ordinary):
        net = network()
        first = curvopt.VarianceAdaptiveSGD(net[0].parameters(), variance_every=1)
        second = make(net[2].parameters())
        for k in range(4):
            x, y = batch(k)
            first.zero_grad()
            second.zero_grad()
            torch.manual_seed(k)
            records = [] if ordinary else [first, second]
            with ExitStack() as stack:
                for opt in records:
                    stack.enter_context(opt.record())
                ce(net(x), y).backward()
            first.step()
            second.step()
        return net

    assert_same(run(True), params_of(run(False)))


@every
def test_another_model_that_shares_parameters(make):
    class Shares(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.body, self.head = net[0], nn.Linear(5, 2).double()

        def forward(self, x):
            return self.head(self.body(x).relu())

    def run(ordinary):
        net = network()
        other = Shares(net)
        opt = make([*net.parameters(), *other.head.parameters()])
        for k in range(6):
            x, y = batch(k)
            torch.manual_seed(k)
            opt.zero_grad()
            with nullcontext() if ordinary else opt.record():
                loss = ce(net(x), y) if k % 2 else ce(other(x), y % 2)
                loss.backward()
            opt.step()
        return other, net

    for found, expected in zip(run(True), run(False), strict=True):
        assert_same(found, params_of(expected))


@every
def test_checkpointing(make):
    def loss(net, x, y):
        h = checkpoint(net[0], x, use_reentrant=False)
        return ce(net[2](net[1](h)), y)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net[2](self.net[1](checkpoint(self.net[0], x, use_reentrant=False)))

    def body(net, opt, x, y):
        opt.zero_grad()
        ce(net(x), y).backward()

    def pieces(net, opt, x, y):
        opt.zero_grad()
        loss(net, x, y).backward()

    expected = by_closure(make, loss)
    assert_same(plain(make, body, net=Checkpointed()), expected)
    assert_same(plain(make, pieces), expected)


@every
def test_reentrant_checkpointing_is_refused_at_the_step(make):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    x.requires_grad_()
    h = checkpoint(net[:2], x, use_reentrant=True)
    ce(net[2](h), y).backward()
    with pytest.raises(curvopt.CurvoptError, match="use_reentrant=False"):
        opt.step()
    assert_same(net, before)


@every
def test_functional_calls(make):
    """With the parameters themselves; copies of them are not the optimizer's."""

    def body(net, opt, x, y):
        opt.zero_grad()
        ce(torch.func.functional_call(net, dict(net.named_parameters()), (x,)), y).backward()

    assert_same(plain(make, body), by_closure(make, mean_ce))
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    values = {name: 1 * p for name, p in net.named_parameters()}
    ce(torch.func.functional_call(net, values, (x,)), y).backward()
    with pytest.raises(curvopt.CurvoptError, match=r"step\(closure\)"):
        opt.step()
    assert_same(net, before)


@every
def test_functions_without_a_module(make):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    ce(F.linear(F.linear(x, net[0].weight).tanh(), net[2].weight), y).backward()
    with pytest.raises(curvopt.CurvoptError, match=r"torch\.nn\.Module.*is called"):
        opt.step()
    assert_same(net, before)


@every
def test_a_part_of_the_loss_from_before_the_forward_pass(make):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    penalty = net[0].weight.square().sum()
    (ce(net(x), y) + penalty).backward()
    with pytest.raises(curvopt.CurvoptError, match="before recording began"):
        opt.step()
    assert_same(net, before)


@every
def test_a_forward_pass_in_another_thread(make):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    outputs = []
    worker = threading.Thread(target=lambda: outputs.append(net(x)))
    worker.start()
    worker.join()
    ce(outputs.pop(), y).backward()
    with pytest.raises(curvopt.CurvoptError, match="same thread"):
        opt.step()
    assert_same(net, before)
    opt.zero_grad()
    first = net(x)
    worker = threading.Thread(target=lambda: outputs.append(net(x)))
    worker.start()
    worker.join()
    ce(first + outputs.pop(), y).backward()
    with pytest.raises(curvopt.CurvoptError, match="same thread"):
        opt.step()
    assert_same(net, before)


@every
def test_all_in_another_thread(make):
    net = network()

    def run():
        opt = make(net.parameters())
        for k in range(4):
            torch.manual_seed(k)
            zero_first(net, opt, *batch(k))
            opt.step()

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    assert_same(net, by_closure(make, mean_ce))


@pytest.mark.parametrize("name", ["diag_ggn", "variance"])  # polar steps need no samples here
def test_what_cannot_be_measured_fails_at_the_step(name):
    """`backward` has left torch's gradients; zero_grad drops the failure with them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, C)).double()
    twin, (x, y) = copy.deepcopy(net), batch()
    opt, before = OPTIMIZERS[name](net.parameters()), params_of(net)
    ce(net(x), y).backward()
    ce(twin(x), y).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for _ in range(2):
        with pytest.raises(curvopt.CurvoptError, match="eval"):
            opt.step()
    assert_same(net, before)
    opt.zero_grad()
    net.eval()
    ce(net(x), y).backward()
    opt.step()


@every
def test_a_loss_that_is_not_finite(make):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    ce(net(x) / 0, y).backward()
    with pytest.raises(curvopt.CurvoptError, match="finite"):
        opt.step()
    assert_same(net, before)


@every
def test_torchs_own_errors_come_from_backward(make):
    net, (x, y) = network(), batch()
    opt = make(net.parameters())
    loss = ce(net(x), y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    opt.step()


@every
def test_a_loss_of_another_model(make):
    """Between the forward and the backward pass another model is trained."""

    def body(net, opt, x, y):
        opt.zero_grad()
        loss = ce(net(x), y)
        other = nn.Linear(D, C).double()
        torch.manual_seed(0)
        sgd = torch.optim.SGD(other.parameters(), lr=0.1)
        before = params_of(other)
        ce(other(x), y).backward()
        sgd.step()
        assert not torch.equal(before[0], other.weight)
        torch.manual_seed(7)
        loss.backward()

    net = network()
    opt = make(net.parameters())
    for k in range(4):
        x, y = batch(k)
        torch.manual_seed(7)
        opt.step(lambda x=x, y=y: ce(net(x), y))
    assert_same(plain(make, body), params_of(net))


@every
def test_the_step_of_a_loaded_state_measures_when_it_is_due(make):
    net = network()
    opt = make(net.parameters())
    for k in range(3):
        zero_first(net, opt, *batch(k))
        opt.step()
    twin = network()
    resumed = make(twin.parameters())
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for k in range(3, 6):
        for model, one in ((net, opt), (twin, resumed)):
            torch.manual_seed(k)
            zero_first(model, one, *batch(k))
            one.step()
    assert_same(twin, params_of(net))


@every
def test_copies_of_model_and_optimizer(make):
    net, (x, y) = network(), batch()
    opt = make(net.parameters())
    output = net(x)
    twin, other = copy.deepcopy((net, opt))
    torch.manual_seed(0)
    ce(output, y).backward()
    opt.step()
    torch.manual_seed(0)
    ce(twin(x), y).backward()
    other.step()
    assert_same(twin, params_of(net))


@every
def test_an_optimizer_that_is_dropped_in_the_middle(make):
    net, (x, y) = network(), batch()
    opt = make(net.parameters())
    loss = ce(net(x), y)
    del opt
    gc.collect()
    loss.backward()
    assert net[0].weight.grad is not None
    del loss


@every
def test_parameters_added_later(make):
    net = network()
    opt = make(net[2].parameters())
    for k in range(2):
        zero_first(net, opt, *batch(k))
        net.zero_grad()
        zero_first(net, opt, *batch(k))
        opt.step()
    opt.add_param_group({"params": net[0].parameters()})
    before = params_of(net)
    for k in range(3):
        zero_first(net, opt, *batch(k))
        opt.step()
    assert not torch.equal(before[0], net[0].weight)


def test_private_optimizers_keep_their_block():
    net, (x, y) = network(), batch()
    opt = curvopt.DPSGD(
        net.parameters(), 0.1, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=N
    )
    loss = ce(net(x), y)
    assert modes() == ([], [])
    loss.backward()
    with pytest.raises(curvopt.CurvoptError, match="record"):
        opt.step()


# Compiled models.


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@every
def test_compiled_models_stay_compiled_where_nothing_is_measured(make, counter):
    """One graph for all plain steps, none for measured ones, and no breaks."""
    net = network()
    opt, model = make(net.parameters()), torch.compile(net, backend=counter, fullgraph=True)
    for k in range(8):
        x, y = batch(k)
        torch.manual_seed(k)
        loss = ce(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        assert modes() == ([], [])
    assert counter.frame_count == 1
    for p, q in zip(net.parameters(), by_closure(make, mean_ce, steps=8), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["module", "function", "loss"])
@every
def test_code_compiled_around_the_module_is_refused_at_the_step(make, how, counter):
    net, (x, y) = network(), batch()
    opt, before = make(net.parameters()), params_of(net)
    call = net
    if how == "module":
        net.compile(backend=counter, fullgraph=True)
    elif how == "function":
        call = torch.compile(lambda x: net(x), backend=counter, fullgraph=True)
    if how == "loss":
        loss = torch.compile(lambda x, y: ce(net(x), y), backend=counter, fullgraph=True)
    else:

        def loss(x, y):
            return ce(call(x), y)

    loss(x, y).backward()
    with pytest.raises(curvopt.CurvoptError, match=r"torch\.compile\(model\) is fine"):
        opt.step()
    assert_same(net, before)
    opt.zero_grad()
    torch.manual_seed(0)
    opt.step(lambda: loss(x, y))
    assert_same(net, by_closure(make, mean_ce, steps=1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own
@every
def test_a_compiled_loss(make, counter):
    compiled = torch.compile(ce, backend=counter)

    def body(net, opt, x, y):
        opt.zero_grad()
        compiled(net(x), y).backward()

    assert_same(plain(make, body), by_closure(make, mean_ce))


@every
def test_a_compiled_model_that_fails(make, counter):
    net, (x, y) = network(), batch()
    opt, model = make(net.parameters()), torch.compile(net, backend=counter)
    hooks = module_hooks()
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    ce(model(x), y)
    assert modes() == ([], [])
    assert module_hooks() == hooks
    nn.BatchNorm1d(D)(x.float())
    torch.manual_seed(0)
    ce(model(x), y).backward()
    opt.step()
    assert_same(net, by_closure(make, mean_ce, steps=1))


# Adapters, frozen parts, parameters of others.


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(D, 5), nn.Linear(5, C)
        self.a, self.b = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.head((self.base(x) + x @ self.a.t() @ self.b.t()).tanh())


@pytest.mark.parametrize("given", ["adapter", "adapter-and-head", "all"])
@pytest.mark.parametrize("frozen", ["", "base", "bias", "head"])
@every
def test_low_rank_adapters_and_frozen_parts(make, given, frozen):
    def build():
        torch.manual_seed(0)
        net = LowRank().double()
        for name, p in net.named_parameters():
            p.requires_grad_(not (frozen and frozen in name))
        params = {
            "adapter": [net.a, net.b],
            "adapter-and-head": [net.a, net.b, *net.head.parameters()],
            "all": list(net.parameters()),
        }[given]
        return net, make(params)

    (net, opt), (twin, other) = build(), build()
    for k in range(4):
        x, y = batch(k)
        torch.manual_seed(k)
        opt.zero_grad()
        ce(net(x), y).backward()
        opt.step()
        torch.manual_seed(k)
        other.step(lambda x=x, y=y: ce(twin(x), y))
    assert_same(net, params_of(twin))


@pytest.mark.parametrize("base", [True, False], ids=["trainable", "frozen"])
@every
def test_peft(make, base):
    peft = pytest.importorskip("peft")

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))
        net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
        adapters = [p for p in net.parameters() if p.requires_grad]
        if base:
            net.requires_grad_()
        return net, make(adapters)

    (net, opt), (twin, other) = build(), build()
    for k in range(3):
        x, y = batch(k)
        x = x.float()
        torch.manual_seed(k)
        opt.zero_grad()
        ce(net(x), y).backward()
        opt.step()
        torch.manual_seed(k)
        other.step(lambda x=x, y=y: ce(twin(x), y))
    assert_same(net, params_of(twin))


def test_another_model_is_asked_once_a_pass(monkeypatch):
    """Not at each of its modules, whether it has parameters of the optimizer."""
    asked = []
    parameters = nn.Module.parameters
    monkeypatch.setattr(
        nn.Module, "parameters", lambda self, *a: asked.append(self) or parameters(self, *a)
    )
    net, other = network(), network(1)
    opt = curvopt.DiagGGNOptimizer(parameters(net))
    for _ in range(2):
        other(batch()[0])
    assert asked
    assert all(module is other for module in asked)
    del opt


@every
def test_a_model_of_ours_inside_of_a_foreign_module(make):
    """The outer module has none of its parameters, and calls it all the same."""

    class Outer(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.nets, self.head = [net], nn.Tanh()

        def forward(self, x):
            return self.head(self.nets[0](x))

    def body(net, opt, x, y):
        opt.zero_grad()
        ce(Outer(net)(x), y).backward()

    assert_same(plain(make, body), by_closure(make, lambda net, x, y: ce(torch.tanh(net(x)), y)))


def test_a_parameter_whose_type_changes_is_watched_still():
    """A pass that nobody sees is noticed on the new type too, whose graph has another node."""
    net = network()
    opt = curvopt.VarianceAdaptiveSGD(net.parameters(), variance_every=1)
    for kind in (torch.float64, torch.float32):
        net.to(kind)
        opt.state.clear()
        x, y = batch()
        x = x.to(kind)
        for _ in range(2):
            zero_first(net, opt, x, y)
            opt.step()
        zero_first(net, opt, x, y)
        torch.autograd.backward(ce(net(x), y))
        with pytest.raises(curvopt.CurvoptError, match="a backward pass that was not recorded"):
            opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("pick", [lambda y, b: y[b], lambda y, b: y[int(b[0]) : int(b[-1]) + 1]])
@every
def test_a_last_batch_of_one(make, pick):
    """Its target is picked when recording has begun: the data are one sample all the same."""
    x, y = batch(n=9)
    nets = []
    for inside in (True, False):
        net = network()
        opt = make(net.parameters())
        for k, b in enumerate(torch.arange(9).split(4)):
            torch.manual_seed(k)
            opt.zero_grad()
            target = y[b]
            ce(net(x[b]), pick(y, b) if inside else target).backward()
            opt.step()
        nets.append(net)
    assert_same(nets[0], params_of(nets[1]))


def test_a_recording_that_ends_inside_of_another():
    """Compiled code is compiled again when both are over, whichever ends first."""
    from torch._dynamo import eval_frame

    first, second = network(), network(1)
    one = curvopt.DiagGGNOptimizer(first.parameters())
    two = curvopt.DiagGGNOptimizer(second.parameters())
    x, y = batch()
    loss = ce(first(x), y)  # no backward pass follows
    with two.record():
        one._watch.rest()
        ce(second(x), y).backward()
    two.step()
    second(x)
    two._watch.rest()
    assert eval_frame._stance.stance == "default"
    del loss


def test_recordings_of_several_threads_at_once():
    """Compiled code is compiled again when the last one is over."""
    from torch._dynamo import eval_frame

    uncompiled, before = Uncompiled(), eval_frame._stance

    def record():
        for _ in range(5000):
            uncompiled.begin()
            uncompiled.end()

    threads = [threading.Thread(target=record) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (uncompiled.count, uncompiled._left) == (0, [])
    assert eval_frame._stance is before


def test_one_of_two_optimizers_steps_again_and_again():
    """Nothing is kept of the recordings that are over."""
    from torch._dynamo import eval_frame

    net, (x, y), before = network(), batch(), eval_frame._stance
    _, opt = curvopt.DiagGGNOptimizer(net.parameters()), OPTIMIZERS["polar"](net.parameters())
    left = len(UNCOMPILED._left)
    for _ in range(3):
        opt.step(lambda: ce(net(x), y))
    assert len(UNCOMPILED._left) == left
    assert eval_frame._stance is before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["diag_ggn", "polar"])
def test_a_gradient_that_is_no_number(name, kind, bad):
    """In a step that measures nothing, too, of which nobody sees the loss."""
    nets = [network().to(kind) for _ in range(2)]
    opts = [
        OPTIMIZERS[name](net.named_parameters(), generator=torch.Generator().manual_seed(0))
        for net in nets
    ]
    x, y = batch()
    x = x.to(kind)

    def step(net, opt, at, value):
        opt.zero_grad()
        ce(net(x + at), y).backward()
        if value is not None:
            next(net.parameters()).grad[0, 0] = value
        opt.step()

    for t in range(5):
        for net, opt in zip(nets, opts, strict=True):
            step(net, opt, t, None)
    with pytest.raises(curvopt.CurvoptError, match=r"gradient of 0\.weight \[.*\] is not finite"):
        step(nets[0], opts[0], 5, bad)
    for t in range(5, 8):
        for net, opt in zip(nets, opts, strict=True):
            step(net, opt, t, None)
    assert_same(nets[0], params_of(nets[1]))


def test_a_gradient_with_a_square_that_is_too_large():
    """It is finite all the same: a bounded step."""
    net = network().float()
    opt = curvopt.DiagGGNOptimizer(net.parameters(), lr=0.1, adaptation=0.0)
    x, y = batch()
    for t in range(4):
        opt.zero_grad()
        ce(net(x.float()), y).backward()
        if t == 3:
            net[0].weight.grad.fill_(1e30)
        before = net[0].weight.clone()
        opt.step()
    moved = (net[0].weight - before).detach().square().mean().sqrt()
    assert moved.item() == pytest.approx(0.1, rel=1e-3)
