"""Hooks where the gradient is no sample's own, and passes of the engine that they must not see."""

import warnings
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


def on_tensor(tensor, hook):
    tensor.register_hook(hook)


def before_node(tensor, hook):
    def call(grads):
        after = hook(grads[0])
        return None if after is None else (after, *grads[1:])

    tensor.grad_fn.register_prehook(call)


def after_node(tensor, hook, only=None):
    def call(onward, _):
        chosen = [g is not None and only in (None, k) for k, g in enumerate(onward)]
        after = [hook(g) if one else g for g, one in zip(onward, chosen, strict=True)]
        return None if all(g is None for g in after) else tuple(after)

    tensor.grad_fn.register_hook(call)


PUT = {"tensor": on_tensor, "before-node": before_node, "after-node": after_node}


def rows_hooked(hook, place="tensor"):
    net = network()

    def loss(x, y):
        rows = ce(net(x), y, reduction="none")
        PUT[place](rows, hook(rows.detach()))
        return rows.mean()

    return made(net.parameters(), loss, batch(outlier=30))


def mean_hooked(hook, follow, place="tensor"):
    net = network()

    def loss(x, y):
        value = ce(net(x), y)
        PUT[place](value, hook(value.detach()))
        return follow(value)

    return made(net.parameters(), loss, batch())


def one_of_two_hooked(hook, place="tensor"):
    net = network()

    def loss(x, y):
        out = net(x)
        value = ce(out, y)
        PUT[place](value, hook(value.detach()))
        return value + F.mse_loss(out, torch.zeros_like(out))

    return made(net.parameters(), loss, batch())


def inside_hooked(hook, place="tensor"):
    net = network()

    def loss(x, y):
        logs = net(x).log_softmax(1)
        PUT[place](logs, hook(logs.detach()))
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


for place in ("before-node", "after-node"):
    ABOVE.add(f"rows-double-{place}", rows_hooked, double, place)
    ABOVE.add(f"mean-double-{place}", mean_hooked, double, lambda value: 0.5 * value, place)
    ABOVE.add(f"one-of-two-double-{place}", one_of_two_hooked, double, place)
    WATCHED.add(f"rows-look-{place}", rows_hooked, look, place)
    WATCHED.add(f"mean-hand-on-{place}", mean_hooked, hand_on, lambda value: value, place)
    WATCHED.add(f"inside-hand-on-{place}", inside_hooked, hand_on, place)
ABOVE.add("rows-couple-before-node", rows_hooked, couple, "before-node")
ABOVE.add("mean-in-place-before-node", mean_hooked, double_in_place, lambda v: v, "before-node")
ABOVE.add("inside-double-after-node", inside_hooked, double, "after-node")


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


def without_hooks(function):
    """What a function gives where no hook is put anywhere."""
    kept = dict(PUT)
    PUT.update(dict.fromkeys(PUT, lambda *_: None))
    try:
        return function()
    finally:
        PUT.update(kept)


@ABOVE.each
def test_curvature_is_that_of_the_loss_whatever_is_hooked(situation):
    m = situation.make()
    data = m.passes[0].data
    found = curvopt.compute(lambda: m.loss(*data), m.params, curvopt.DiagGGNExact())
    assert_close(
        found.grad, dict(zip(m.params, backward(m.params, lambda: m.loss(*data)), strict=True))
    )
    plain = without_hooks(
        lambda: curvopt.compute(lambda: m.loss(*data), m.params, curvopt.DiagGGNExact())
    )
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


def shared_hooked(make, hook, place="tensor"):
    weight = nn.Parameter(torch.randn(D, C))
    mask = (torch.arange(D * C).view(D, C) % 3 > 0).double()
    mask = nn.Parameter(mask, requires_grad=False)

    def loss(x, y):
        value = make(weight, mask)
        PUT[place](value, hook)
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
    for place in ("before-node", "after-node"):
        MADE_OF.add(f"{name}-{place}", shared_hooked, make, lambda g: 10 * g, place)


def weights_hooked(hook):
    """A hook on the node of a layer, which sees what goes on to its weight and to its input."""
    net = network()

    def loss(x, y):
        hidden = net[0](x)
        after_node(hidden, hook)
        return ce(net[2](hidden.tanh()), y)

    return made(net.parameters(), loss, batch(outlier=30))


MADE_OF.add("weight-of-a-layer", weights_hooked, lambda g: 10 * g)


@MADE_OF.each
def test_hooks_on_values_made_of_parameters(situation):
    refused(situation, "a hook on a value made of parameter [01]")
    m = situation.make()
    with pytest.raises(curvopt.CurvoptError, match="a hook on a value made of parameter [01]"):
        quiet(private(m).step, lambda: m.loss(*m.passes[0].data))


@MADE_OF.each
@every_estimator
def test_hooks_on_values_made_of_parameters_in_steps(situation, optimizer):
    match = None if "ggn" in optimizer else "a hook on a value made of"
    same_gradient(situation, optimizer, match)


@pytest.mark.parametrize("place", PUT)
@pytest.mark.parametrize("name", MAKES)
def test_a_hook_that_looks_at_a_value_made_of_a_parameter(name, place):
    family = Family()
    family.add(name, shared_hooked, MAKES[name], lambda g: None, place)
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


def activation_hooked(net, hook, place="tensor"):
    def loss(x, y):
        hidden = net[0](x)
        active = hidden.tanh()
        if hook is not None:
            PUT[place](active if place == "after-node" else hidden, hook)
        return ce(net[2](active), y)

    return loss


@pytest.mark.parametrize("place", PUT)
def test_hooks_on_activations(place):
    """The rows of the loop, in which the hook is called too."""
    family = Family()

    def build():
        net = network()
        return made(net.parameters(), activation_hooked(net, lambda g: 3 * g, place), batch())

    family.add("tripled", build)
    exact(family[0])
    bounded(family[0], accepted=True)


@pytest.mark.parametrize("place", PUT)
def test_hooks_on_activations_that_mix(place):
    net, (x, y) = network(), batch()
    loss = activation_hooked(net, lambda g: g - g.mean(0), place)
    with pytest.raises(curvopt.CurvoptError, match="not separate in the backward pass"):
        curvopt.compute(lambda: loss(x, y), net.parameters(), curvopt.BatchGrad())


def test_a_hook_on_the_node_of_a_layer_that_changes_what_its_input_gets():
    """The layer's own weight has nothing of it, and those in front of it have all."""
    family = Family()

    def build():
        net = network()

        def loss(x, y):
            out = net(x)
            after_node(out, lambda g: 3 * g, only=1)  # bias, input, weight
            return ce(out, y)

        return made(net.parameters(), loss, batch())

    family.add("input-alone", build)
    exact(family[0])


def clamp(g):
    return g.clamp(-0.005, 0.005)


@pytest.mark.parametrize("place", PUT)
@pytest.mark.parametrize("quantity", CURVATURES)
def test_curvature_does_not_go_through_hooks(quantity, place):
    net, (x, y), seen = network(), batch(), []

    def curvature(hook):
        loss = activation_hooked(net, hook, place)
        one = quantity()
        return getattr(curvopt.compute(lambda: loss(x, y), net.parameters(), one), one.field)

    plain, clamped = curvature(None), curvature(clamp)
    observed = curvature(lambda g: seen.append(g.clone()))
    for p in net.parameters():
        assert_close(clamped[p], plain[p], 1e-12)
        assert_close(observed[p], plain[p], 1e-12)
    (gradient,) = grads_of_hidden(net, x, y)
    assert place == "after-node" or all(torch.equal(g, gradient) for g in seen)
    assert seen


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


def halved(grads):
    return tuple(None if g is None else g / 2 for g in grads)


def module_hooked(net, kind):
    if kind == "before":
        return net[2].register_full_backward_pre_hook(lambda module, after: halved(after))
    if kind == "after":
        return net[2].register_full_backward_hook(lambda module, given, after: halved(given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net[1].register_backward_hook(lambda module, given, after: halved(given))


KINDS = pytest.mark.parametrize("kind", ["before", "after", "former"])


@KINDS
@pytest.mark.parametrize("quantity", CURVATURES)
def test_curvature_does_not_go_through_hooks_of_modules(kind, quantity):
    net, (x, y), one = network(), batch(), quantity()
    plain = curvopt.compute(lambda: ce(net(x), y), net.parameters(), quantity())
    module_hooked(net, kind)
    found = curvopt.compute(lambda: ce(net(x), y), net.parameters(), quantity())
    for p in net.parameters():
        assert_close(getattr(found, one.field)[p], getattr(plain, one.field)[p], 1e-12)
    grads = backward([*net.parameters()], lambda: ce(net(x), y))
    assert_close(found.grad, dict(zip(net.parameters(), grads, strict=True)), 1e-12)
    assert not torch.allclose(found.grad[net[0].weight], plain.grad[net[0].weight])


@KINDS
def test_rows_go_through_hooks_of_modules(kind):
    family = Family()

    def build():
        net = network()
        module_hooked(net, kind)
        return made(net.parameters(), lambda x, y: ce(net(x), y), batch())

    family.add(kind, build)
    exact(family[0])
    bounded(family[0], accepted=True)
    for optimizer in OPTIMIZERS:
        same_gradient(family[0], optimizer)


@KINDS
def test_products_that_are_made_later_and_hooks_of_modules(kind):
    net, (x, y) = network(), batch()
    module_hooked(net, kind)
    with pytest.raises(curvopt.CurvoptError, match="remove the hook"):
        curvopt.compute(lambda: ce(net(x), y), net.parameters(), curvopt.BlockHessian())


def test_a_hook_of_a_module_that_makes_a_weight():
    """It is called for every sample's own part, by the slow path."""

    class Scaled(nn.Module):
        def forward(self, w):
            return w * 2

    family = Family()

    def build():
        net = nn.Linear(D, C)
        torch.nn.utils.parametrize.register_parametrization(net, "weight", Scaled())
        scaled = net.parametrizations.weight[0]
        scaled.register_full_backward_hook(lambda module, given, after: halved(given))
        return made(net.parameters(), lambda x, y: ce(net(x), y), batch())

    family.add("parametrized", build)
    exact(family[0])


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
