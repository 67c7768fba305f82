"""Real loops and unusual models: right, or an error of ours that leads out; never a crash."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.overrides import _get_current_function_mode_stack, _pop_mode

import curvopt
from curvopt.optim.private_tape import COMPILED
from tests import oracles
from tests.faults.situations import (
    CLIP,
    C,
    D,
    Family,
    H,
    N,
    backward,
    batch,
    bounded,
    ce,
    every_optimizer,
    exact,
    exact_or_refused,
    filled,
    made,
    network,
    quiet,
    refused,
    same_gradient,
)
from tests.oracles import assert_close

# Steps that fail, states that do not fit.

PRIVATE = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": N}
ALL = {
    "diag_ggn": curvopt.DiagGGNOptimizer,
    "variance_adaptive": curvopt.VarianceAdaptiveSGD,
    "polar": curvopt.PolarOptimizer,
    "dp_sgd": lambda params, lr=0.1: curvopt.DPSGD(params, lr, **PRIVATE),
    "dp_adam": lambda params, lr=0.1: curvopt.DPAdam(params, lr, **PRIVATE),
}
every = pytest.mark.parametrize("name", ALL)


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def same(before, net):
    return all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("steps", [0, 3])
@every
def test_a_step_that_fails_at_its_second_group_moves_nothing(name, steps):
    net, (x, y) = network(), batch()
    opt = ALL[name]([{"params": net[0].parameters()}, {"params": net[2].parameters()}])

    def closure():
        return ce(net(x), y)

    for _ in range(steps):
        opt.step(closure)
    before, state = values(net), copy.deepcopy(opt.state_dict()["state"])
    good = opt.param_groups[1]["lr"]
    opt.param_groups[1]["lr"] = "fast"
    with pytest.raises(Exception):  # noqa: B017, PT011 (whichever: it is no number)
        opt.step(closure)
    assert same(before, net)
    if name.startswith("dp"):
        assert opt.ledger.steps == steps
    found = opt.state_dict()["state"]
    assert found.keys() == state.keys()
    for k, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found[k][key], value), key
            else:
                assert found[k][key] == value, key
    opt.param_groups[1]["lr"] = good
    opt.step(closure)
    assert not same(before, net)


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SGD, "another of ours"])
@every
def test_state_of_another_optimizer(name, other):
    """Refused when it is loaded, or of no consequence; no KeyError in `step`."""
    net, (x, y) = network(), batch()
    opt = ALL[name](net.parameters())
    if other == "another of ours":
        other = ALL["variance_adaptive" if name == "diag_ggn" else "diag_ggn"]
        stranger = other(net.parameters())
        stranger.step(lambda: ce(net(x), y))
    else:
        stranger = other(net.parameters(), lr=0.1)
        ce(net(x), y).backward()
        stranger.step()
    state = copy.deepcopy(stranger.state_dict())
    opt.zero_grad()
    before = values(net)
    try:
        opt.load_state_dict(state)
        opt.step(lambda: ce(net(x), y))
    except ValueError:  # CurvoptError is one
        assert same(before, net)


@every
def test_steps_go_on_after_load_state_dict(name):
    net, (x, y) = network(), batch()
    opt = ALL[name](net.parameters())
    opt.step(lambda: ce(net(x), y))
    before = values(net)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step(lambda: ce(net(x), y))
    assert not same(before, net)


def alive_after(run):
    """Whether the batch's input is alive while the value that `run` gives is kept."""
    net, refs = network(), []

    def loss():
        x = torch.randn(N, D)
        refs.append(weakref.ref(x))
        return ce(net(x), torch.arange(N) % C)

    kept = run(net, loss)
    gc.collect()
    found = [ref() is not None for ref in refs]
    del kept
    return any(found)


def by_torch(net, loss):
    value = loss()
    value.backward()
    return value


def test_what_is_alive_in_torch():
    assert alive_after(lambda net, loss: loss())
    assert not alive_after(by_torch)


@every
def test_the_value_of_a_step_does_not_hold_the_batch(name):
    for steps in (1, 4):
        opt = None

        def run(net, loss, steps=steps):
            nonlocal opt
            opt = ALL[name](net.parameters())
            return [opt.step(loss) for _ in range(steps)]

        assert not alive_after(run)


# Several optimizers, parameters of others.


@pytest.mark.parametrize("order", [1, -1])
def test_two_optimizers_on_one_loss(order):
    net, (x, y) = network(), batch()
    first = curvopt.VarianceAdaptiveSGD(net[0].parameters(), lr=0.0, variance_every=1)
    second = curvopt.DiagGGNOptimizer(net[2].parameters(), lr=0.0, curvature_every=1)
    expected = backward([*net.parameters()], lambda: ce(net(x), y))
    outer, inner = (first, second)[::order]
    for _ in range(2):
        first.zero_grad()
        second.zero_grad()
        with outer.record(), inner.record():
            ce(net(x), y).backward()
        first.step()
        second.step()
        for p, grad in zip(net.parameters(), expected, strict=True):
            assert torch.equal(p.grad, grad)


def test_an_optimizer_of_torch_for_the_other_parameters():
    net, (x, y) = network(), batch()
    first = curvopt.VarianceAdaptiveSGD(net[0].parameters(), lr=0.0)
    second = torch.optim.SGD(net[2].parameters(), lr=0.0)
    expected = backward([*net.parameters()], lambda: ce(net(x), y))
    for _ in range(3):
        first.zero_grad()
        second.zero_grad()
        with first.record():
            ce(net(x), y).backward()
        first.step()
        second.step()
        for p, grad in zip(net.parameters(), expected, strict=True):
            assert torch.equal(p.grad, grad)


class LowRank(nn.Module):
    """A weight that requires a gradient and is no parameter of the optimizer, and a correction."""

    def __init__(self, by_layer):
        super().__init__()
        self.base, self.by_layer = nn.Linear(D, 5), by_layer
        self.a, self.b = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(5, 2))
        self.head = nn.Linear(5, C)

    def forward(self, x):
        if self.by_layer:
            return self.head((self.base(x) + x @ self.a.t() @ self.b.t()).tanh())
        weight = self.base.weight + self.b @ self.a
        return self.head(F.linear(x, weight, self.base.bias).tanh())


def low_rank(by_layer):
    net = LowRank(by_layer)
    return made([net.a, net.b], lambda x, y: ce(net(x), y), batch())


ADAPTERS = Family()
ADAPTERS.add("beside-the-layer", low_rank, True)
ADAPTERS.add("added-to-the-weight", low_rank, False)


@ADAPTERS.each
def test_low_rank_adapters_on_weights_that_are_not_frozen(situation):
    exact(situation)


@ADAPTERS.each
def test_low_rank_adapters_in_private_steps(situation):
    bounded(situation, accepted=True)


@ADAPTERS.each
@every_optimizer
def test_low_rank_adapters_in_steps(situation, optimizer):
    same_gradient(situation, optimizer)


# Anomaly detection, compiled models.


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("quantity", [curvopt.DiagGGNExact, curvopt.BatchDiagGGNExact])
@pytest.mark.parametrize("loss_fn", [ce, F.mse_loss, F.binary_cross_entropy_with_logits])
def test_anomaly_detection(loss_fn, quantity):
    net, x = network(), torch.randn(N, D)
    y = torch.arange(N) % C if loss_fn is ce else torch.rand(N, C)
    params = list(net.parameters())
    with torch.autograd.detect_anomaly():
        result = curvopt.compute(lambda: loss_fn(net(x), y), params, quantity())
    if quantity is curvopt.DiagGGNExact:
        expected = oracles.diag_ggn(net, loss_fn, x, y, params)
        assert_close(result.diag_ggn_exact, expected)
    else:
        expected = oracles.batch_diag_ggn(net, loss_fn, x, y, params)
        assert_close(result.diag_ggn_exact_batch, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@every
def test_anomaly_detection_in_steps(name):
    net, (x, y) = network(), batch()
    opt = ALL[name](net.parameters())
    with torch.autograd.detect_anomaly():
        for _ in range(3):
            opt.step(lambda: ce(net(x), y))


def hooks_of_modules():
    module = torch.nn.modules.module
    return {
        name: len(value)
        for name, value in vars(module).items()
        if name.startswith("_global_") and "hooks" in name and hasattr(value, "__len__")
    }


@pytest.fixture
def untouched_process():
    """Fails where global hooks or modes are left, and takes the hooks away for the tests after."""
    torch._dynamo.reset()
    hooks, modes = hooks_of_modules(), len(_get_current_function_mode_stack())
    yield
    found = hooks_of_modules(), len(_get_current_function_mode_stack())
    for name in hooks:
        if not hooks[name]:
            getattr(torch.nn.modules.module, name).clear()
    while len(_get_current_function_mode_stack()) > modes:
        _pop_mode()
    torch._dynamo.reset()
    assert found == (hooks, modes)


@pytest.mark.filterwarnings("ignore:every private step is recorded:UserWarning")
@every
def test_a_step_that_fails_on_a_compiled_model_leaves_nothing(name, untouched_process):
    net, (x, y) = network(), batch()
    compiled, opt = torch.compile(net, backend="eager"), ALL[name](net.parameters())
    before = hooks_of_modules()

    def closure():
        compiled(x)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        opt.step(closure)
    with pytest.raises((RuntimeError, curvopt.CurvoptError)):
        opt.step(lambda: ce(compiled(x[:, :3]), y))
    assert hooks_of_modules() == before
    nn.BatchNorm1d(D)(x)  # as before
    opt.step(lambda: ce(compiled(x), y))
    assert all(count <= before[name] for name, count in hooks_of_modules().items())


@pytest.mark.parametrize("name", ["dp_sgd", "dp_adam"])
def test_private_steps_of_a_compiled_model_say_that_its_speed_is_lost(name, untouched_process):
    net, (x, y) = network(), batch()
    compiled, opt = torch.compile(net, backend="eager"), ALL[name](net.parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            opt.step(lambda: ce(compiled(x), y))
    assert [str(w.message) for w in said if "torch.compile" in str(w.message)] == [COMPILED]


@every
def test_a_step_inside_of_a_compiled_function_leaves_nothing(name, untouched_process):
    """It is taken, or an error; in either case nothing of it is left in the process."""
    net, (x, y) = network(), batch()
    opt, before = ALL[name](net.parameters()), hooks_of_modules()

    @torch.compile(backend="eager")
    def train(x, y):
        return opt.step(lambda: ce(net(x), y))

    try:
        quiet(train, x, y)
    except (RuntimeError, curvopt.CurvoptError):
        assert hooks_of_modules() == before
    nn.BatchNorm1d(D)(x)
    opt.step(lambda: ce(net(x), y))


# Models at which the engine crashed.

MODELS = Family()  # exact
CHOICE = Family()  # exact, or refused with words
WORDS = {}


def choice(words):
    def decorate(build):
        CHOICE(build)
        WORDS[CHOICE[-1].id] = words
        return build

    return decorate


def modelled(net, forward, data=None, params=None):
    data = data or batch()
    params = params or net.parameters()
    return made(params, lambda x, y: ce(forward(net, x), y), data)


@MODELS
def mask_from_a_bias():
    return modelled(network(), lambda m, x: m[2](m[0](x).tanh() * (m[0].bias > 0)))


@MODELS
def mask_from_a_weight():
    def forward(m, x):
        return m[2](F.linear(x, m[0].weight * (m[0].weight.abs() > 0.1), m[0].bias).tanh())

    return modelled(network(), forward)


@MODELS
def condition_from_a_bias():
    def forward(m, x):
        h = m[0](x)
        return m[2](torch.where(m[0].bias > 0, h, 0.1 * h))

    return modelled(network(), forward)


@MODELS
def order_of_a_parameter():
    def forward(m, x):
        return m[2](m[0](x).tanh()[:, m[0].bias.argsort()])

    return modelled(network(), forward)


@MODELS
def largest_of_a_parameter():
    return modelled(network(), lambda m, x: m(x) * m[0].bias.max())


@MODELS
def norm_of_a_parameter():
    return modelled(network(), lambda m, x: m(x) / m[0].weight.norm())


@MODELS
def number_from_a_parameter():
    return modelled(network(), lambda m, x: m(x) * m[0].bias[0].item())


@MODELS
def zeros_like_a_parameter():
    def forward(m, x):
        h = F.linear(x, m[0].weight, torch.zeros_like(m[0].bias))
        return m[2]((h + m[0].bias).tanh())

    return modelled(network(), forward)


@MODELS
def ones_like_a_parameter():
    return modelled(network(), lambda m, x: m[2](m[0](x) + x @ torch.ones_like(m[0].weight).t()))


@MODELS
def empty_like_a_parameter():
    def forward(m, x):
        h = F.linear(x, m[0].weight, torch.empty_like(m[0].bias).fill_(0.5))
        return m[2]((h + m[0].bias).tanh())

    return modelled(network(), forward)


@MODELS
def new_zeros_of_a_parameter():
    def forward(m, x):
        h = m[0](x).tanh()
        start = m[0].weight.new_zeros(len(x), H)
        return m[2](start + h)

    return modelled(network(), forward)


@MODELS
def full_like_a_parameter():
    def forward(m, x):
        return m(x) + torch.full_like(m[2].bias, 0.3)

    return modelled(network(), forward)


@MODELS
def type_of_a_parameter():
    def forward(m, x):
        return m(x.to(m[0].weight)) * (m[0].weight.shape[0] / m[0].weight.numel())

    return modelled(network(), forward)


@choice(r"(?i:batch|sample)|reduction=")
def unbatched_rows():
    net, (x, y) = network(), batch()

    def loss(x, y):
        return torch.stack([ce(net(row), label) for row, label in zip(x, y, strict=True)]).mean()

    return made(net.parameters(), loss, (x, y))


@choice(r"(?i:batch|sample)")
def unbatched():
    """Cross entropy of `[C]` and a label without axes: one sample, or a question."""
    net, (x, y) = network(), batch()
    return made(
        net.parameters(), lambda: ce(net(x[0]), y[0]), (), own=lambda n: ce(net(x[0]), y[0]), n=1
    )


@choice(r"(?i:batch|sample)")
def unbatched_data():
    net, (x, y) = network(), batch()
    x, y = x[0].clone(), y[0].clone()
    return made(net.parameters(), lambda: ce(net(x), y), (), own=lambda n: ce(net(x), y), n=1)


@choice("(?i:complex)")
def magnitudes_of_a_transform():
    w = nn.Parameter(torch.randn(C, D))

    def loss(x, y):
        h = F.linear(x, w)
        return ce(torch.fft.rfft(h, n=4).abs() @ torch.ones(3, C) + h, y)

    return made([w], loss, batch())


@choice("(?i:complex)")
def complex_weights_of_two_real_ones():
    a, b, v = (nn.Parameter(torch.randn(s)) for s in [(5, D), (5, D), (C, 5)])

    def loss(x, y):
        h = torch.complex(x, x) @ torch.complex(a, b).t()
        return ce(F.linear(h.abs().tanh(), v), y)

    return made([a, b, v], loss, batch())


@choice("(?i:complex)")
def complex_weights_by_view():
    w, v = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(C, D))

    def loss(x, y):
        h = torch.fft.irfft(torch.fft.rfft(x)[:, :4] * torch.view_as_complex(w), n=D)
        return ce(F.linear(h.tanh(), v), y)

    return made([w, v], loss, batch())


@choice("(?i:complex)")
def fourier_operator():
    """Channels are mixed by complex weights in front of the inverse transform."""
    lift, head = nn.Linear(1, 3), nn.Linear(3, 1)
    w = nn.Parameter(torch.randn(3, 3, 3, 2) / 3)

    def loss(x, t):
        h = lift(x[..., None]).mT
        modes = torch.fft.rfft(h)[..., :3]
        modes = torch.einsum("nik,iok->nok", modes, torch.view_as_complex(w))
        h = h + torch.fft.irfft(modes, n=h.shape[-1])
        return F.mse_loss(head(h.tanh().mT)[..., 0], t)

    params = [w, *lift.parameters(), *head.parameters()]
    return made(params, loss, (torch.randn(N, 8), torch.randn(N, 8)))


@choice("(?i:sparse)")
def sparse_input():
    w, v = nn.Parameter(torch.randn(D, 5)), nn.Parameter(torch.randn(5, C))
    return made([w, v], lambda x, y: ce(torch.sparse.mm(x.to_sparse(), w) @ v, y), batch())


@choice("(?i:sparse|shared|separa)")
def sparse_adjacency():
    w = nn.Parameter(torch.randn(C, D))

    def loss(x, y):
        return ce(torch.eye(len(x)).to_sparse() @ (x @ w.t()), y)

    return made([w], loss, batch())


@choice("(?i:sparse)")
def sparse_rows():
    w, v = nn.Parameter(torch.randn(D, 5)), nn.Parameter(torch.randn(5, C))
    return made([w, v], lambda x, y: ce((x.to_sparse_csr() @ w) @ v, y), batch())


@choice("(?i:sparse)")
def sparse_gradient_of_an_embedding():
    table, head = nn.Embedding(11, 5, sparse=True), nn.Linear(5, C)
    params = [*table.parameters(), *head.parameters()]

    def own(n, ids, y):
        h = F.embedding(ids[n : n + 1], table.weight)  # the oracle's is dense
        return ce(head(h.mean(1)), y[n : n + 1])

    data = torch.randint(11, (N, 4)), torch.arange(N) % C
    return made(params, lambda ids, y: ce(head(table(ids).mean(1)), y), data, own=own)


@choice("(?i:nested|jagged)")
def nested_input():
    w = nn.Parameter(torch.randn(C, D))

    def loss(x, y):
        rows = torch.nested.nested_tensor(
            [row[None].expand(2, -1) for row in x], layout=torch.jagged
        )
        return ce(F.linear(rows, w).to_padded_tensor(0.0).mean(1), y)

    return made([w], loss, batch())


@choice("(?i:nested|jagged)")
def nested_input_of_several_lengths():
    w = nn.Parameter(torch.randn(C, D))

    def loss(x, y, counts):
        rows = torch.nested.as_nested_tensor(
            [row[None].expand(k, -1) for row, k in zip(x, counts, strict=True)],
            layout=torch.jagged,
        )
        return ce(F.linear(rows, w).to_padded_tensor(0.0).sum(1), y)

    x, y = batch()
    counts = [1, 2, 3, 1, 2, 3, 1, 2]
    return made(
        [w],
        lambda x, y: loss(x, y, counts),
        (x, y),
        own=lambda n, x, y: loss(x[n : n + 1], y[n : n + 1], counts[n : n + 1]),
        without=lambda n, x, y: (x, y),
    )


@choice("vmap|torch.func")
def model_under_vmap():
    net = network()
    return made(net.parameters(), lambda x, y: ce(vmap(net)(x), y), batch())


@choice("vmap|torch.func")
def ensemble_under_vmap():
    w = nn.Parameter(torch.randn(4, C, D))

    def loss(x, y):
        return ce(vmap(lambda w: F.linear(x, w))(w).mean(0), y)

    return made([w], loss, batch())


@choice("(?i:subclass)")
def tensor_subclass():
    class Tagged(torch.Tensor):
        pass

    w = nn.Parameter(torch.randn(C, D))
    return made(
        [w], lambda x, y: ce(F.linear(x.as_subclass(Tagged), w).as_subclass(torch.Tensor), y),
        batch(),
    )  # fmt: skip


quiet_torch = pytest.mark.filterwarnings(
    "ignore:.*[Ss]parse.*:UserWarning", "ignore:.*nested.*:UserWarning"
)


@MODELS.each
def test_models(situation):
    exact(situation)


@MODELS.each
def test_models_in_private_steps(situation):
    bounded(situation, accepted=True)


@MODELS.each
@every_optimizer
def test_models_in_steps(situation, optimizer):
    same_gradient(situation, optimizer)


@quiet_torch
@CHOICE.each
def test_models_that_may_be_refused(situation):
    exact_or_refused(situation, WORDS[situation.id])


@quiet_torch
@CHOICE.each
def test_models_that_may_be_refused_in_steps(situation):
    same_gradient(situation, "variance_adaptive", WORDS[situation.id])


@quiet_torch
@CHOICE.each
def test_models_that_may_be_refused_in_private_steps(situation):
    m = situation.make()
    opt = curvopt.DPSGD(m.params, 0.0, **{**PRIVATE, "expected_batch_size": 1})
    (data,) = [step.data for step in m.passes]
    try:
        quiet(opt.step, lambda: m.loss(*data))
    except curvopt.CurvoptError:
        return
    rows = filled(m.params, [p.grad for p in m.params])
    norm = torch.cat([r.abs().flatten() for r in rows]).norm()
    assert norm <= CLIP * m.length(data) * (1 + 1e-5)


@quiet_torch
@CHOICE.each
def test_curvature_of_models_that_may_be_refused(situation):
    """A number or an error of ours."""
    m = situation.make()
    (data,) = [step.data for step in m.passes]
    try:
        quiet(curvopt.compute, lambda: m.loss(*data), m.params, curvopt.DiagGGNExact())
    except curvopt.CurvoptError:
        return


def test_complex_parameters_are_refused_by_name():
    w = nn.Parameter(torch.randn(C, D, dtype=torch.complex128))
    x, y = batch()
    with pytest.raises(ValueError, match="complex"):
        curvopt.compute(lambda: ce(((x + 0j) @ w.t()).abs(), y), [w], curvopt.BatchGrad())
    for make in ALL.values():
        with pytest.raises(ValueError, match="complex"):
            make([w]).step(lambda: ce(((x + 0j) @ w.t()).abs(), y))


# Batch norm that uses the batch whatever its mode.


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm_without_running_statistics_in_eval_mode(kind, affine):
    """It is in eval mode: to go there is no way out."""

    def build():
        norm = kind(H, affine=affine, track_running_stats=False)
        net = nn.Sequential(nn.Linear(D, H), norm, nn.Linear(H, C)).eval()
        return made(net.parameters(), lambda x, y: ce(net(x), y), batch(), coupled=True)

    family = Family()
    family.add("norm", build)
    refused(family[0], "(?i:running|track_running_stats)")
    bounded(family[0], match="(?i:running|track_running_stats)")


def test_batch_norm_in_eval_mode_is_exact():
    def build():
        net = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Linear(H, C)).eval()
        return made(net.parameters(), lambda x, y: ce(net(x), y), batch())

    family = Family()
    family.add("norm", build)
    exact(family[0])
    bounded(family[0], accepted=True)


def test_batch_norm_in_training_mode_is_refused_by_name():
    def build():
        net = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Linear(H, C))
        return made(net.parameters(), lambda x, y: ce(net(x), y), batch(), coupled=True)

    family = Family()
    family.add("norm", build)
    refused(family[0], "(?i:batch.?norm)")
    bounded(family[0], match="(?i:batch.?norm)")


@pytest.mark.parametrize("steps", [0, 1, 2])
@every_optimizer
def test_a_backward_pass_that_is_not_seen(optimizer, steps):
    """By torch.autograd.backward, in a step that measures and in one that does not."""
    net, (x, y) = network(), batch()
    every = {"diag_ggn": "curvature_every", "polar": "curvature_every"}
    opt = ALL[optimizer](net.parameters(), **{every.get(optimizer, "variance_every"): 2})
    for _ in range(steps):
        opt.step(lambda: ce(net(x), y))
    before = values(net)

    def closure():
        loss = ce(net(x), y)
        torch.autograd.backward(loss)
        return loss

    with pytest.raises(curvopt.CurvoptError, match=r"call loss\.backward\(\) instead"):
        opt.step(closure)
    assert same(before, net)
    opt.step(lambda: ce(net(x), y))
    assert not same(before, net)


def test_results_written_into_an_empty_tensor():
    def build(reduce):
        net = network()

        def loss(x, y):
            out = torch.empty(0)
            reduce(x, out)
            return ce(net(x - out), y)

        return made(net.parameters(), loss, batch())

    family = Family()
    family.add("features", build, lambda x, out: torch.mean(x, 1, keepdim=True, out=out))
    family.add("samples", build, lambda x, out: torch.mean(x, 0, out=out))
    exact(family[0])
    refused(family[1])


# Batches of new shapes.


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (lambda params: curvopt.DPSGD(params, 0.1, **PRIVATE), 2),  # the loss's, the model's
        (lambda params: curvopt.DiagGGNOptimizer(params, curvature_every=1), 2),
        (lambda params: curvopt.VarianceAdaptiveSGD(params, variance_every=1), 1),
        (curvopt.PolarOptimizer, 1),
    ],
    ids="dp_sgd diag_ggn variance_adaptive polar".split(),
)
@pytest.mark.filterwarnings("ignore:a batch has:UserWarning")
def test_a_batch_of_a_new_shape_takes_no_more_backward_passes(make, passes, monkeypatch):
    net, counted = network(), []
    opt = make(net.parameters())
    engine = torch.autograd.graph._engine_run_backward

    def counting(*args, **kwargs):
        counted.append(1)
        return engine(*args, **kwargs)

    for module in (torch.autograd, torch.autograd.graph):
        monkeypatch.setattr(module, "_engine_run_backward", counting)
    for n in (8, 8, 7, 6, 5, 8):
        x, y = torch.randn(n, D), torch.randint(C, (n,))
        counted.clear()
        opt.step(lambda x=x, y=y: ce(net(x.to(net[0].weight)), y))
        assert len(counted) == passes, n


# N = 0.


def test_no_samples():
    net, (x, y) = network(), batch()
    for closure in (
        lambda: ce(net(x[:0]), y[:0], reduction="sum"),
        lambda: ce(net(x[:0]), y[:0], reduction="none").sum(),
    ):
        result = curvopt.compute(closure, net.parameters(), curvopt.BatchGrad())
        for p in net.parameters():
            assert result.batch_grad[p].shape == (0, *p.shape)
            assert not result.grad[p].any()


def test_the_step_of_an_empty_private_batch_does_not_run_the_model():
    net = network()
    opt = curvopt.DPSGD(net.parameters(), 0.1, **{**PRIVATE, "noise_multiplier": 1.0})
    before = values(net)
    opt.empty_step()
    assert opt.ledger.steps == 1
    assert not same(before, net)  # by the noise alone


@every_optimizer
def test_gradients_of_an_ordinary_model(optimizer):
    """What every other comparison of gradients stands on."""

    def build():
        net = network()
        return made(net.parameters(), lambda x, y: ce(net(x), y), batch())

    family = Family()
    family.add("ordinary", build)
    same_gradient(family[0], optimizer)
    exact(family[0])
    bounded(family[0], accepted=True)
