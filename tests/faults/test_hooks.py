"""Hooks where the gradient is no sample's own, and passes of the engine that they must not see."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from tests.faults.situations import (
    DOORS,
    OPTIMIZERS,
    STEPS,
    C,
    D,
    Family,
    H,
    backward,
    batch,
    bounded,
    ce,
    every_estimator,
    exact,
    made,
    network,
    private,
    quiet,
    refused,
    same_gradient,
)
from tests.oracles import assert_close

# Above the model's output.

ABOVE = Family()
WATCHED = Family()  # by a hook that changes nothing


def rows_hooked(hook):
    net = network()

    def loss(x, y):
        rows = ce(net(x), y, reduction="none")
        rows.register_hook(hook(rows.detach()))
        return rows.mean()

    return made(net.parameters(), loss, batch(outlier=30))


def mean_hooked(hook, follow):
    net = network()

    def loss(x, y):
        value = ce(net(x), y)
        value.register_hook(hook(value.detach()))
        return follow(value)

    return made(net.parameters(), loss, batch())


def one_of_two_hooked(hook):
    net = network()

    def loss(x, y):
        out = net(x)
        value = ce(out, y)
        value.register_hook(hook(value.detach()))
        return value + F.mse_loss(out, torch.zeros_like(out))

    return made(net.parameters(), loss, batch())


def inside_hooked(hook):
    net = network()

    def loss(x, y):
        logs = net(x).log_softmax(1)
        logs.register_hook(hook(logs.detach()))
        return F.nll_loss(logs, y)

    return made(net.parameters(), loss, batch())


def double(_):
    return lambda g: 2 * g


def double_in_place(_):
    def hook(g):
        g.mul_(2)

    return hook


def couple(value):
    return lambda g: g * value / value.mean()


def look(_):
    return lambda g: None


def hand_on(_):
    return lambda g: g


for name, hook in {"double": double, "in-place": double_in_place, "couple": couple}.items():
    ABOVE.add(f"rows-{name}", rows_hooked, hook)
    ABOVE.add(f"mean-{name}", mean_hooked, hook, lambda value: value)
    ABOVE.add(f"mean-scaled-{name}", mean_hooked, hook, lambda value: 0.5 * value)
    ABOVE.add(f"one-of-two-{name}", one_of_two_hooked, hook)
for name, hook in {"look": look, "hand-on": hand_on}.items():
    WATCHED.add(f"rows-{name}", rows_hooked, hook)
    WATCHED.add(f"mean-{name}", mean_hooked, hook, lambda value: value)
    WATCHED.add(f"mean-scaled-{name}", mean_hooked, hook, lambda value: 0.5 * value)
    WATCHED.add(f"one-of-two-{name}", one_of_two_hooked, hook)
    WATCHED.add(f"inside-{name}", inside_hooked, hook)


@ABOVE.each
def test_hooks_above_the_output(situation):
    refused(situation, "a hook between the loss and the input of")


@ABOVE.each
def test_hooks_above_the_output_in_private_steps(situation):
    m = situation.make()
    with pytest.raises(curvopt.CurvoptError, match="a hook between the loss and the input of"):
        quiet(private(m).step, lambda: m.loss(*m.passes[0].data))


@ABOVE.each
@every_estimator
def test_hooks_above_the_output_in_steps(situation, optimizer):
    match = None if "ggn" in optimizer else "a hook between the loss and the input of"
    same_gradient(situation, optimizer, match)


@ABOVE.each
def test_curvature_is_that_of_the_loss_whatever_is_hooked(situation):
    m = situation.make()
    data = m.passes[0].data
    found = curvopt.compute(lambda: m.loss(*data), m.params, curvopt.DiagGGNExact())
    assert_close(
        found.grad, dict(zip(m.params, backward(m.params, lambda: m.loss(*data)), strict=True))
    )
    register, torch.Tensor.register_hook = torch.Tensor.register_hook, lambda *_: None
    try:
        plain = curvopt.compute(lambda: m.loss(*data), m.params, curvopt.DiagGGNExact())
    finally:
        torch.Tensor.register_hook = register
    for p in m.params:
        assert_close(found.diag_ggn_exact[p], plain.diag_ggn_exact[p], 1e-12)


def test_a_hook_inside_of_a_loss_that_couples():
    m = inside_hooked(lambda _: lambda g: g - g.mean(0))
    with pytest.raises(curvopt.CurvoptError, match="hook"):
        curvopt.compute(lambda: m.loss(*m.passes[0].data), m.params, curvopt.BatchGrad())


@WATCHED.each
def test_hooks_that_look_on(situation):
    exact(situation)
    bounded(situation, accepted=True)


# On what parameters were made into.

MADE_OF = Family()


def shared_hooked(make, hook):
    weight = nn.Parameter(torch.randn(D, C))
    mask = (torch.arange(D * C).view(D, C) % 3 > 0).double()
    mask = nn.Parameter(mask, requires_grad=False)

    def loss(x, y):
        value = make(weight, mask)
        value.register_hook(hook)
        return ce(x @ value.reshape(C, D).t() if value.shape[0] == C else x @ value, y)

    return made([weight], loss, batch(outlier=30))


MAKES = {
    "view": lambda w, mask: w.t(),
    "copy": lambda w, mask: w * 1.0,
    "masked": lambda w, mask: w * mask,
    "slice": lambda w, mask: w[:, :],
}
for name, make in MAKES.items():
    MADE_OF.add(f"{name}-scale", shared_hooked, make, lambda g: 10 * g)
    MADE_OF.add(f"{name}-clamp", shared_hooked, make, lambda g: g.clamp(-0.01, 0.01))


@MADE_OF.each
def test_hooks_on_values_made_of_parameters(situation):
    refused(situation, "a hook on a value made of parameter 0")
    m = situation.make()
    with pytest.raises(curvopt.CurvoptError, match="a hook on a value made of parameter 0"):
        quiet(private(m).step, lambda: m.loss(*m.passes[0].data))


@MADE_OF.each
@every_estimator
def test_hooks_on_values_made_of_parameters_in_steps(situation, optimizer):
    match = None if "ggn" in optimizer else "a hook on a value made of"
    same_gradient(situation, optimizer, match)


@pytest.mark.parametrize("name", MAKES)
def test_a_hook_that_looks_at_a_value_made_of_a_parameter(name):
    family = Family()
    family.add(name, shared_hooked, MAKES[name], lambda g: None)
    exact(family[0])


def test_one_sample_and_a_hook_on_a_value_made_of_a_parameter():
    m = shared_hooked(MAKES["view"], lambda g: 10 * g)
    x, y = batch(1)
    with pytest.raises(curvopt.CurvoptError, match="a hook on a value made of"):
        curvopt.compute(lambda: m.loss(x, y), m.params, curvopt.BatchL2Grad())


# Between layers: curvature is the loss's, and a hook sees gradients alone.

CURVATURES = [
    curvopt.DiagGGNExact,
    curvopt.SqrtGGNExact,
    curvopt.DiagHessian,
    lambda: curvopt.DiagGGNMC(4, generator=torch.Generator().manual_seed(0)),
    lambda: curvopt.DiagHessianMC(4, generator=torch.Generator().manual_seed(0)),
]


def activation_hooked(net, hook):
    def loss(x, y):
        hidden = net[0](x)
        if hook is not None:
            hidden.register_hook(hook)
        return ce(net[2](hidden.tanh()), y)

    return loss


def clamp(g):
    return g.clamp(-0.005, 0.005)


@pytest.mark.parametrize("quantity", CURVATURES)
def test_curvature_does_not_go_through_hooks(quantity):
    net, (x, y), seen = network(), batch(), []

    def curvature(hook):
        loss = activation_hooked(net, hook)
        one = quantity()
        return getattr(curvopt.compute(lambda: loss(x, y), net.parameters(), one), one.field)

    plain, clamped = curvature(None), curvature(clamp)
    observed = curvature(lambda g: seen.append(g.clone()))
    for p in net.parameters():
        assert_close(clamped[p], plain[p], 1e-12)
        assert_close(observed[p], plain[p], 1e-12)
    (gradient,) = grads_of_hidden(net, x, y)
    assert all(torch.equal(g, gradient) for g in seen)


def grads_of_hidden(net, x, y):
    hidden = net[0](x)
    return torch.autograd.grad(ce(net[2](hidden.tanh()), y), hidden)


def test_products_that_are_made_later():
    """Those that take a backward pass each would go through hooks."""
    net, (x, y) = network(), batch()
    loss = activation_hooked(net, clamp)
    with pytest.raises(curvopt.CurvoptError, match="remove the hook"):
        curvopt.compute(lambda: loss(x, y), net.parameters(), curvopt.BlockHessian())
    found = curvopt.compute(lambda: loss(x, y), net.parameters(), curvopt.BlockGGN())
    plain = curvopt.compute(lambda: ce(net(x), y), net.parameters(), curvopt.BlockGGN())
    for p in net.parameters():
        assert_close(found.block_ggn[p](p), plain.block_ggn[p](p), 1e-12)
    m = shared_hooked(MAKES["copy"], clamp)
    with pytest.raises(curvopt.CurvoptError, match="remove the hook"):
        curvopt.compute(lambda: m.loss(x, y), m.params, curvopt.BlockGGN())


@pytest.mark.parametrize("estimator", ["diag_ggn", "diag_ggn-exact"])
@pytest.mark.parametrize("door", DOORS)
def test_curvature_steps_with_a_clamp(door, estimator):
    def curvatures(hook):
        torch.manual_seed(0)
        net, (x, y) = network(), batch()
        loss = activation_hooked(net, hook)
        opt = OPTIMIZERS[estimator](net.parameters(), lr=0.0)
        for _ in range(2):
            torch.manual_seed(1)
            door(opt, lambda: loss(x, y))
        return {k: opt.state[p]["curvature"] for k, p in net.named_parameters()}

    assert_close(curvatures(clamp), curvatures(None), 1e-12)


@pytest.mark.parametrize("before", [True, False])
def test_curvature_does_not_go_through_hooks_of_modules(before):
    net, (x, y) = network(), batch()
    if before:
        net[2].register_full_backward_pre_hook(lambda module, after: tuple(g / 2 for g in after))
    else:
        net[2].register_full_backward_hook(lambda m, given, _: tuple(g / 2 for g in given))
    with pytest.raises(curvopt.CurvoptError, match="a hook changes gradients on their way"):
        curvopt.compute(lambda: ce(net(x), y), net.parameters(), curvopt.DiagGGNExact())


def test_hooks_of_modules_that_look_on_and_curvature():
    net, (x, y) = network(), batch()
    plain = curvopt.compute(lambda: ce(net(x), y), net.parameters(), curvopt.DiagGGNExact())
    net[2].register_full_backward_pre_hook(lambda module, after: None)
    net[2].register_full_backward_hook(lambda module, given, after: None)
    found = curvopt.compute(lambda: ce(net(x), y), net.parameters(), curvopt.DiagGGNExact())
    for p in net.parameters():
        assert_close(found.diag_ggn_exact[p], plain.diag_ggn_exact[p], 1e-12)


# What the engine's own passes leave behind: nothing.


@pytest.mark.parametrize("door", DOORS)
@every_estimator
def test_an_activation_that_keeps_its_gradient(optimizer, door):
    net, (x, y), kept = network(), batch(), []

    def loss():
        kept.append(net[0](x))
        kept[-1].retain_grad()
        return ce(net[2](kept[-1].tanh()), y)

    opt = OPTIMIZERS[optimizer](net.parameters(), lr=0.0)
    (expected,) = grads_of_hidden(net, x, y)
    for _ in range(STEPS):
        door(opt, loss)
        assert torch.equal(kept[-1].grad, expected)


@pytest.mark.parametrize("backward", [True, False])
def test_quantities_leave_no_gradient_on_activations(backward):
    net, (x, y), kept = network(), batch(), []

    def closure():
        kept.append(net[0](x))
        kept[-1].retain_grad()
        loss = ce(net[2](kept[-1].tanh()), y)
        if backward:
            loss.backward()
        return loss

    quantities = [curvopt.BatchGrad(), curvopt.DiagGGNExact(), curvopt.DiagHessian()]
    result = curvopt.compute(closure, net.parameters(), *quantities)
    (expected,) = grads_of_hidden(net, x, y)
    assert len(result.grad) == 4
    if backward:
        assert torch.equal(kept[-1].grad, expected)
    else:
        assert kept[-1].grad is None


def test_private_steps_leave_no_gradient_on_activations():
    """It would be one without noise."""
    net, (x, y), kept = network(), batch(), []

    def loss():
        kept.append(net[0](x))
        kept[-1].retain_grad()
        return ce(net[2](kept[-1].tanh()), y)

    private(made(net.parameters(), None)).step(loss)
    assert kept[-1].grad is None


@pytest.mark.parametrize("door", DOORS)
@every_estimator
def test_hooks_that_draw_random_numbers(optimizer, door):
    net, (x, y) = network(), batch()
    loss = activation_hooked(net, lambda g: g + 0.1 * torch.randn_like(g))
    opt = OPTIMIZERS[optimizer](net.parameters(), lr=0.0)
    for k in range(STEPS):
        torch.manual_seed(k)
        expected = backward([*net.parameters()], lambda: loss(x, y))
        following = torch.rand(1)
        torch.manual_seed(k)
        door(opt, lambda: loss(x, y))
        assert torch.equal(torch.rand(1), following)
        for p, grad in zip(net.parameters(), expected, strict=True):
            assert torch.equal(p.grad, grad)


def test_a_hook_that_takes_itself_off_is_there_for_torchs_own_pass():
    net, (x, y), seen = network(), batch(), []

    def loss():
        hidden = net[0](x)

        def once(g):
            handle.remove()
            seen.append(g.clone())
            return 2 * g

        handle = hidden.register_hook(once)
        return ce(net[2](hidden.tanh()), y)

    expected = backward([*net.parameters()], loss)
    opt = curvopt.DiagGGNOptimizer(net.parameters(), lr=0.0)
    for _ in range(2):
        opt.zero_grad()
        loss().backward()
        opt.step()
        for p, grad in zip(net.parameters(), expected, strict=True):
            assert torch.equal(p.grad, grad)


def test_hooks_hold_no_graph():
    """Neither what hooks refer to, nor the tensors, outlive an ordinary step."""
    net, (x, y), kept = network(), batch(), []
    opt = curvopt.DiagGGNOptimizer(net.parameters())

    def step():
        hidden, seen = net[0](x), torch.ones(H)
        hidden.retain_grad()
        hidden.register_hook(lambda g: g * seen)
        kept.extend([weakref.ref(hidden), weakref.ref(seen)])
        ce(net[2](hidden.tanh()), y).backward()
        opt.step()
        opt.zero_grad()

    for _ in range(3):
        step()
    assert [one() for one in kept] == [None] * 6
