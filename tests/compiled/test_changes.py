"""What changes after a step was compiled is noticed; what cannot be compiled is stepped eagerly."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import curvopt
from curvopt.compiled import CompiledStep

from .common import ROWS, Both, as_it_is, batches, cross_entropy, network, private


@pytest.fixture
def both():
    """After two compiled steps."""
    made = Both(network(), ROWS["variance"])
    made.run(batches(3))
    assert made.step.taken == {"compiled": 2, "eager": 1}
    return made


def test_batch_sizes(both):
    """A new one is compiled when it comes for the second time; the old ones stay."""
    both.run([*batches(2, n=3), *batches(2), *batches(2, n=3)])
    both.check(compiled=2 + 1 + 2 + 2)


def test_training_and_evaluation():
    both = Both(network().append(nn.Dropout(0.5)), ROWS["variance"])
    both.run(batches(3))
    for model in both.models:
        model.eval()
    both.run(batches(3))
    for model in both.models:
        model.train()
    both.run(batches(2))
    both.check(compiled=6)  # the first step of a mode is eager, as that of a shape


def test_a_parameter_is_frozen(both):
    for model in both.models:
        model[0].weight.requires_grad_(False)
    before = both.models[1][0].weight.clone()
    both.run(batches(3))
    assert torch.equal(both.models[1][0].weight, before)
    both.check()
    for model in both.models:
        model[0].weight.requires_grad_(True)
    both.run(batches(3))
    both.check()


def test_a_parameter_is_replaced(both):
    """Dynamo does not notice. An optimizer steps what it was given."""
    for model in both.models:
        model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    with pytest.warns(UserWarning, match="was replaced by another tensor"):
        both.run(batches(1))
    both.run(batches(2))
    both.check(compiled=2)
    assert torch.equal(both.models[1][0].weight, torch.ones(5, 6).double())


def test_a_branch_on_values():
    def loss(model, x, y):
        h = model(x)
        if h.sum() > 0:
            h = h * 2
        return F.cross_entropy(h, y)

    both = Both(network(), ROWS["variance"], loss)
    both.run(batches(1))
    with pytest.warns(UserWarning, match=r"eagerly: Data-dependent branching"):
        both.run(batches(3))
    both.check(compiled=0)


def test_a_printed_value(capsys):
    def loss(model, x, y):
        value = cross_entropy(model, x, y)
        print(value.item())
        return value

    both = Both(network(), ROWS["variance"], loss)
    both.run(batches(1))
    with pytest.warns(UserWarning, match="eagerly"):
        both.run(batches(2))
    both.check(compiled=0)
    assert len(capsys.readouterr().out.split()) == 6


def test_mixed_samples_are_refused():
    model = network().insert(1, nn.BatchNorm1d(5).double())
    opt = ROWS["variance"](model.parameters())
    step = CompiledStep(opt, lambda x, y: cross_entropy(model, x, y), compiler=as_it_is)
    (batch,) = batches(1)
    for _ in range(3):
        with pytest.raises(curvopt.CurvoptError, match="batch_norm .* is in training mode"):
            step(*batch)
    model.eval()
    step(*batch)


@pytest.mark.parametrize("row", ["variance-debiased", "dp_sgd"])
def test_samples_that_begin_to_mix(row):
    """By a flag in Python: the graph is proven anew, and refused."""

    class Flags:
        mix = False

    def loss(model, x, y):
        h = model(x)
        return F.cross_entropy(h - h.mean(0) if Flags.mix else h, y)

    both = Both(network(), ROWS[row], loss)
    both.run(batches(3))
    Flags.mix = True
    model, opt = both.models[1], both.opts[1]
    before = everything(opt, model)
    for batch in batches(3):
        with pytest.raises(curvopt.CurvoptError, match="samples are not separate"):
            both.step(*batch)
    if row == "dp_sgd":  # which lets go of its gradients
        before = before[0], [None] * len(before[1]), before[2]
    same(everything(opt, model), before)
    Flags.mix = False
    both.run(batches(2))
    both.check(compiled=4)


def test_mixing_is_nobodys_business_where_nothing_is_measured():
    class Flags:
        mix = False

    def loss(model, x, y):
        h = model(x)
        return F.cross_entropy(h - h.mean(0) if Flags.mix else h, y)

    both = Both(network(), lambda p: curvopt.VarianceAdaptiveSGD(p, variance_every=100), loss)
    both.run(batches(3))
    Flags.mix = True
    both.run(batches(3))
    both.check(compiled=4)


@pytest.mark.parametrize("row", ["variance", "diag_ggn-exact", "polar", "dp_sgd"])
def test_ignored_targets_appear(row):
    both = Both(network(), ROWS[row])
    for t, (x, y) in enumerate(batches(6)):
        y[: t % 3] = -100
        both.run([(x, y)])
    both.check(rtol=1e-10, compiled=5)


@pytest.mark.parametrize("row", ["variance", "diag_ggn", "polar", "dp_adam"])
def test_schedules(row):
    """The learning rate is no part of a graph, as a number or a tensor."""
    made = []

    def make(params):
        opt = ROWS[row](params)
        made.append(lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20, cycle_momentum=False))
        return opt

    both = Both(network(), make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(7):
            both.run([batch])
            for schedule in made:
                schedule.step()
    both.check(compiled=6)
    assert len(both.step._graph.programs) <= 2


def test_settings_are_changed(both):
    """They are part of a graph, so that there is a new one, once they stay."""
    for opt in both.opts:
        opt.param_groups[0]["momentum"] = 0.5
    both.run(batches(2))
    for opt in both.opts:
        opt.param_groups[0]["weight_decay"] = 0.1
        opt.variance_every = 3
    both.run(batches(4))
    both.check(compiled=6)
    for opt in both.opts:  # back again
        opt.param_groups[0]["weight_decay"] = 0.0
    both.run(batches(2))
    both.check(compiled=8)


def test_settings_that_change_with_every_step():
    """No graph is made for each: as for shapes, they have to come twice."""
    made = []

    def make(params):
        opt = ROWS["variance"](params)
        made.append(lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20))
        return opt

    both = Both(network(), make)

    def run(data):
        for batch in data:
            both.run([batch])
            for schedule in made:
                schedule.step()

    with pytest.warns(UserWarning, match="settings of the optimizer change from step to step"):
        run(batches(9))
    both.check(compiled=1)
    for opt in both.opts:
        opt.param_groups[0]["momentum"] = 0.9
    both.run(batches(3))
    both.check(compiled=3)


def test_a_tensor_outside_is_rebound():
    scale = [torch.tensor(1.0).double()]
    both = Both(network(), ROWS["variance"], lambda m, x, y: F.cross_entropy(m(x * scale[0]), y))
    both.run(batches(3))
    scale[0] = torch.tensor(0.3).double()
    both.run(batches(3))
    both.check(compiled=5)


def test_buffers_that_change_are_written():
    """Spectral norm goes on in each pass; a failed step leaves it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))).double()
    both = Both(model, ROWS["variance"])
    both.run(batches(5))
    both.check(rtol=1e-9)


# -- steps that fail ------------------------------------------------------------------------------


def everything(opt, model):
    numbers = [p.detach().clone() for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return numbers, grads, copy.deepcopy(opt.state_dict())


def same(after, before):
    (numbers, grads, state), (others, more, old) = after, before
    torch.testing.assert_close([numbers, grads], [others, more], rtol=0, atol=0)
    for index, values in old["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(state["state"][index][key]), torch.as_tensor(value))
    assert state["engine"].keys() == old["engine"].keys()
    assert state["engine"]["steps"] == old["engine"]["steps"]
    assert state.get("privacy", {}).get("ledger") == old.get("privacy", {}).get("ledger")


@pytest.mark.parametrize("row", ["variance", "diag_ggn", "polar"])
def test_a_loss_that_is_not_finite_changes_nothing(row):
    both = Both(network(), ROWS[row])
    both.run(batches(6))
    model, opt = both.models[1], both.opts[1]
    before = everything(opt, model)
    (x, y), *_ = batches(1)
    for _ in range(3):  # whatever is due
        with pytest.raises(curvopt.CurvoptError, match="not finite; nothing was changed"):
            both.step(x * torch.nan, y)
        same(everything(opt, model), before)
        both.run(batches(1))
        before = everything(opt, model)
    both.check(rtol=1e-10)


@pytest.mark.parametrize("row", ["dp_sgd", "dp_adam"])
def test_a_sample_that_is_not_finite_is_left_out(row):
    """As `step` does; the noise differs, for that of the failed graph is not used again."""
    quiet = dict(noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=4)
    make = {"dp_sgd": curvopt.DPSGD, "dp_adam": curvopt.DPAdam}[row]
    both = Both(network(), lambda p: make(p, lr=0.1, **quiet))
    for t, (x, y) in enumerate(batches(5)):
        if t in (2, 3):
            x[t % 2] = torch.inf
        eager, compiled = both.take(x, y)
        torch.testing.assert_close(compiled, eager, equal_nan=True)
    assert [opt.nonfinite_samples for opt in both.opts] == [2, 2]
    assert [opt.ledger.steps for opt in both.opts] == [5, 5]
    both.check(compiled=2)


def test_noise_and_ledger():
    """The noise comes from the optimizer's own generators, each step is in the ledger once."""
    both = Both(network(), ROWS["dp_sgd"])
    both.run(batches(5))
    one, two = both.opts
    assert one.ledger.state_dict()["phases"] == two.ledger.state_dict()["phases"]
    assert two.ledger.steps == 5
    torch.testing.assert_close(two.norms, one.norms)
    states = [opt._noise.state_dict() for opt in both.opts]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_noise_and_norm_on_a_schedule():
    def make(params):
        options = {**private, "noise_multiplier": lambda t: 1 / (1 + t)}
        options["max_grad_norm"] = lambda t: 0.1 * (1 + t)
        return curvopt.DPSGD(params, 0.1, generator=torch.Generator().manual_seed(0), **options)

    both = Both(network(), make)
    both.run(batches(6))
    both.check(compiled=5)
    assert len(both.step._graph.programs) == 1


# -- policy ---------------------------------------------------------------------------------------


def test_too_many_shapes():
    both = Both(network(), ROWS["variance"], max_graphs=2)
    sizes = [2, 3, 4, 4, 3, 2]
    with pytest.warns(UserWarning, match="more than 2 shapes"):
        both.run(next(iter(batches(1, n=n))) for n in sizes)
    both.check(compiled=2)


def test_a_number_that_changes():
    """It is a constant of a graph, or as a tensor an argument of one graph for all."""

    def annealed(model, x, y, temperature):
        return torch.nn.functional.cross_entropy(model(x) / temperature, y)

    rows = [(x, y, 1 / (1 + k)) for k, (x, y) in enumerate(batches(6))]
    both = Both(network(), ROWS["variance"], annealed, max_graphs=3)
    with pytest.warns(UserWarning, match="captured 4 times .* give numbers that change"):
        both.run(rows)
    both.check(compiled=1)

    both = Both(network(), ROWS["variance"], annealed, max_graphs=3)
    both.run((x, y, torch.tensor(t, dtype=x.dtype)) for x, y, t in rows)
    both.check(compiled=5)
    assert [len(capture.graphs) for capture in both.step._captures.values()] == [1]


def test_optimizers_that_have_no_graph():
    make = type("Own", (curvopt.DPAdam,), {})
    with pytest.warns(UserWarning, match="Own has no step for a graph"):
        both = Both(network(), lambda p: make(p, **{**private, "noise_multiplier": 0.0}))
    both.run(batches(3))
    both.check(compiled=0)


def test_a_hook_on_a_parameter(both):
    for model in both.models:
        model[0].weight.register_hook(lambda grad: grad * 2)
    with pytest.warns(UserWarning, match="a parameter has a gradient hook"):
        both.run(batches(2))
    both.check(compiled=2)


def test_hooks_on_the_step(both):
    seen = []
    both.opts[1].register_step_post_hook(lambda *_: seen.append("post"))
    both.run(batches(2))
    assert seen == ["post", "post"]
    assert both.step.taken["compiled"] == 4
    both.opts[1].register_step_pre_hook(lambda *_: seen.append("pre"))
    with pytest.warns(UserWarning, match="hooks run before each step"):
        both.run(batches(1))
    assert seen[2:] == ["pre", "post"]


@pytest.mark.parametrize("row", ["variance", "dp_sgd"])
def test_a_gradient_from_elsewhere(row):
    """It is dropped, as `step` drops it; private optimizers refuse it."""
    both = Both(network(), ROWS[row])
    both.run(batches(3))
    for model in both.models:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    if row == "dp_sgd":
        for batch in batches(1):
            with pytest.raises(curvopt.CurvoptError, match="a gradient that was not recorded"):
                both.step(*batch)
        for opt in both.opts:
            opt.zero_grad()
    both.run(batches(1))
    both.check(compiled=3)


def test_a_custom_function():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    both = Both(network(), ROWS["variance"], lambda m, x, y: F.cross_entropy(Twice.apply(m(x)), y))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both.run(batches(3))
    both.check()
    assert both.step.taken["compiled"] == 2 or any("eagerly" in str(w.message) for w in caught)


def test_experts_are_stepped_eagerly():
    """Whose samples an expert sees depends on values."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 3)]).double()

    def loss(model, x, y):
        choice = model[0](x).argmax(1)
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for k in range(2):
            out[choice == k] = model[1 + k](x[choice == k])
        return F.cross_entropy(out, y)

    both = Both(model, ROWS["variance"], loss)
    both.run(batches(2))
    with pytest.warns(UserWarning, match=r"depends on values \(experts, ragged rows\)"):
        both.run(batches(3))
    both.check()


@pytest.mark.parametrize("row", ["variance", "diag_ggn-exact", "polar", "dp_adam"])
@pytest.mark.parametrize("before", [True, False])
def test_checkpoints_go_on_either_way(row, before):
    """From compiled to eager, and back."""
    both = Both(network(), ROWS[row])
    data = list(batches(9))
    both.run(data[:4])
    saved = copy.deepcopy(both.opts[1].state_dict())
    weights = copy.deepcopy(both.models[1].state_dict())
    model = network()
    model.load_state_dict(weights)
    opt = ROWS[row](model.parameters())
    opt.load_state_dict(saved)
    step = CompiledStep(
        opt, lambda *batch: cross_entropy(model, *batch), compare=False, compiler=as_it_is
    )
    for batch in data[4:]:
        if before:
            step(*batch)
        else:
            opt.step(lambda batch=batch: cross_entropy(model, *batch))
    both.run(data[4:])
    for p, q in zip(both.models[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-11, atol=1e-13)
    # The same state into the optimizer that is compiled.
    both.opts[0].load_state_dict(saved)
    both.opts[1].load_state_dict(saved)
    both.run(data[4:])
    both.check()


@pytest.mark.parametrize("row", ["diag_ggn-exact", "polar", "dp_adam"])
def test_a_state_of_another_type_is_loaded(row):
    """As of a run in float32: a graph is for the types that its state had."""
    both = Both(network(), ROWS[row])
    both.run(batches(3))
    state = copy.deepcopy(both.opts[0].state_dict())
    for values in state["state"].values():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                values[key] = value.float()
    for opt in both.opts:
        opt.load_state_dict(copy.deepcopy(state))
    both.run(batches(4))
    both.check(rtol=1e-4, atol=1e-5, compiled=6)


@pytest.mark.parametrize("row", ["variance", "diag_ggn-exact", "polar-decay", "dp_adam"])
def test_eager_steps_between(row):
    """Whoever steps by hand goes on from where the graph was."""
    both = Both(network(), ROWS[row])
    for t, batch in enumerate(batches(8)):
        if t % 3:
            both.run([batch])
        else:
            for model, opt in zip(both.models, both.opts, strict=True):
                opt.step(lambda m=model, b=batch: cross_entropy(m, *b))
    both.check()


def test_two_steps_of_one_optimizer():
    """A second function, with a graph of its own."""
    model, other = network(), network()
    opts = [ROWS["diag_ggn"](m.parameters()) for m in (model, other)]

    def scaled(m, x, y):
        return 0.3 * cross_entropy(m, x, y)

    options = dict(compare=False, compiler=as_it_is)
    steps = [
        CompiledStep(opts[1], lambda *b, f=f: f(other, *b), **options)
        for f in (cross_entropy, scaled)
    ]
    torch.manual_seed(0)
    for t, batch in enumerate(batches(10)):
        state = torch.get_rng_state()
        opts[0].step(lambda t=t, b=batch: (cross_entropy, scaled)[t % 2](model, *b))
        torch.set_rng_state(state)
        steps[t % 2](*batch)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-11, atol=1e-13)


def test_the_faster_way_is_taken():
    """A compiler that makes slow graphs is found out, and said so."""
    import time

    def slow(graph, inputs):
        def run(*given):
            time.sleep(0.03)
            return graph(*given)

        return run

    model = network()
    opt = curvopt.VarianceAdaptiveSGD(model.parameters(), variance_every=1)
    step = CompiledStep(opt, lambda *b: cross_entropy(model, *b), compiler=slow)
    steps = [lambda b=batch: step(*b) for batch in batches(14)]
    with pytest.warns(UserWarning, match="would be slower"):
        [take() for take in steps]
    taken = step.taken["compiled"]
    steps[0]()
    assert step.taken["compiled"] == taken


def test_arguments_are_checked():
    model = network()
    with pytest.raises(TypeError, match="SGD is no optimizer of curvopt"):
        curvopt.compile(torch.optim.SGD(model.parameters(), 0.1), cross_entropy)
    with pytest.raises(ValueError, match="Invalid max_graphs: 0"):
        curvopt.compile(ROWS["variance"](model.parameters()), cross_entropy, max_graphs=0)


def test_another_optimizer_records_a_pass(both):
    """Between its forward and its backward pass nothing can be captured."""
    other = network()
    opt = curvopt.DiagGGNOptimizer(other.parameters())
    ((x, y),) = batches(1)
    loss = F.cross_entropy(other(x), y)
    with pytest.warns(UserWarning, match="another optimizer records"):
        both.run(batches(1))
    both.check(compiled=2)
    loss.backward()
    opt.step()
    both.run(batches(1))
    both.check(compiled=3)


def test_dynamo_is_switched_off(both):
    """It then runs the function as it was written, which is no step."""
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(UserWarning, match="as it was written"),
    ):
        both.run(batches(2))
    both.check(compiled=2)
    both.run(batches(1))
    both.check(compiled=3)
