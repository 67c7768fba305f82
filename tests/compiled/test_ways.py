"""What else a function depends on than the shapes of a batch, and what is kept of it."""

import copy
import dataclasses
import gc
import pickle
import warnings
import weakref
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import curvopt
from curvopt.compiled import CompiledStep
from curvopt.compiled.capture import inductor

from .common import ROWS, Both, as_it_is, batches, cross_entropy, network, private

OFTEN = "captured 5 times for batches of one shape"


class Counting(nn.Module):
    """A module that counts its calls, as many do."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = network(), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * (1 - 0.9**self.calls)


def compiled(graphs):
    """Notes the graphs that it is asked to compile."""
    return lambda graph, inputs: (graphs.append(graph), graph)[1]


def test_a_counter_in_python():
    """It makes a new graph of each step, which none is compiled for; Dynamo gives up after 8."""
    graphs = []
    both = Both(Counting(), ROWS["variance"], compiler=compiled(graphs))
    with pytest.warns(UserWarning, match=OFTEN):
        both.run(batches(14))
    assert len(graphs) == 1
    assert [model.calls for model in both.models] == [14, 14]
    both.check()


def test_a_weight_that_is_annealed():
    """In Python it makes new graphs, as an argument too; in a tensor it does not."""
    weight = torch.zeros((), dtype=torch.float64)
    both = Both(network(), ROWS["variance"], lambda m, x, y: cross_entropy(m, x, y) * weight)
    for t, batch in enumerate(batches(12)):
        weight.fill_(1 + t)
        both.run([batch])
    both.check(compiled=11)
    both = Both(network(), ROWS["variance"], lambda m, x, y, w: cross_entropy(m, x, y) * w)
    with pytest.warns(UserWarning, match=OFTEN):
        both.run((*batch, 1.0 + t) for t, batch in enumerate(batches(12)))
    both.check()


def test_a_number_that_changes_now_and_then():
    weight = [1.0]
    both = Both(network(), ROWS["variance"], lambda m, x, y: cross_entropy(m, x, y) * weight[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t, batch in enumerate(batches(12)):
            weight[0] = 1.0 + t // 3
            both.run([batch])
    both.check(compiled=2 * 4)


def test_more_shapes_than_dynamo_takes():
    both = Both(network(), ROWS["variance"], max_graphs=12)
    for n in range(2, 12):
        both.run(batches(2, n=n))
    both.check(compiled=10)


def test_more_ways_than_dynamo_takes():
    flags = [False] * 4
    both = Both(
        network(),
        ROWS["variance"],
        lambda m, x, y: cross_entropy(m, x, y) * sum((f + 1) * 3**k for k, f in enumerate(flags)),
        max_graphs=12,
    )

    def run():
        for way in range(10):
            flags[:] = [bool(way >> k & 1) for k in range(4)]
            both.run(batches(2))

    with pytest.warns(UserWarning, match="captured in 8 ways"):
        run()
    both.check()


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor

    def __getitem__(self, key):
        return getattr(self, key)


@pytest.mark.parametrize("kind", [lambda x, y: UserDict(x=x, y=y), Batch])
def test_shapes_of_batches_of_other_kinds(kind):
    """As the tokenizers of transformers give them."""
    both = Both(network(), ROWS["variance"], lambda m, b: cross_entropy(m, b["x"], b["y"]))
    data = [(kind(x, y),) for n in range(2, 7) for x, y in batches(2, n=n)]
    with pytest.warns(UserWarning, match="more than 4 shapes"):
        both.run(data)
    both.check(compiled=4)


def test_checks_that_fail_in_each_step():
    """The last bias has gradients of rounding alone, so that a sample's norm is in doubt."""
    quiet = private | {"noise_multiplier": 0.0}

    def loss(model, x, y):
        return F.triplet_margin_loss(model(x), model(0.9 * x), model(x.flip(1)))

    graphs = []
    both = Both(
        network(), lambda p: curvopt.DPSGD(p, 0.1, **quiet), loss, compiler=compiled(graphs)
    )
    with pytest.warns(UserWarning, match="compiled steps fail their checks one after the other"):
        both.run(batches(8))
    assert len(graphs) == 1
    both.check(compiled=0)
    both.run(batches(3, n=5))
    both.check(compiled=0)


# -- hooks that come later ------------------------------------------------------------------------


def twice(module, inputs, output):
    return output * 2


HOOKS = {
    "forward": lambda model: model[0].register_forward_hook(twice),
    "pre": lambda model: model[2].register_forward_pre_hook(lambda _, given: (given[0] * 2,)),
    "outside": lambda model: model.register_forward_hook(twice),
    "backward": lambda model: model[2].register_full_backward_hook(lambda *a: (a[1][0] * 2,)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_module_comes_later(kind):
    """By default Dynamo does not notice."""
    both = Both(network(), ROWS["variance"])
    both.run(batches(3))
    hooks = [HOOKS[kind](model) for model in both.models]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "steps are taken eagerly: Module-level backwards hooks")
        both.run(batches(3))
    for hook in hooks:
        hook.remove()
    if kind != "backward":  # for which steps of the shape have become eager
        both.run(batches(3))
        both.check(compiled=2 + 2 + 3)
    both.check()


def test_a_hook_on_all_modules():
    both = Both(network(), ROWS["variance"])
    both.run(batches(3))
    hook = register_module_forward_hook(
        lambda module, _, output: output * 2 if isinstance(module, nn.Tanh) else None
    )
    try:
        with pytest.warns(UserWarning, match="hooks run in all modules"):
            both.run(batches(2))
    finally:
        hook.remove()
    both.run(batches(2))
    both.check(compiled=2 + 2)


# -- settings -------------------------------------------------------------------------------------


def test_betas_as_a_list():
    """As a file of settings has them."""

    def make(params):
        return curvopt.DPAdam(params, betas=[0.9, 0.99], **private | {"noise_multiplier": 0.0})

    both = Both(network(), make)
    both.run(batches(5))
    for opt in both.opts:
        opt.param_groups[0]["betas"] = [0.5, 0.9]
    both.run(batches(3))
    both.check(compiled=4 + 2)


def test_what_else_is_in_a_group():
    """Names, or a scale of each group's rate that somebody changes in each step."""

    def make(params):
        return curvopt.VarianceAdaptiveSGD([{"params": params, "names": ["a"], "scale": 1}], 0.05)

    both = Both(network(), make)
    for t, batch in enumerate(batches(6)):
        for opt in both.opts:
            opt.param_groups[0]["scale"] = t
        both.run([batch])
    both.check(compiled=5)


def test_adaptation_begins_in_a_graph_that_is_there_already():
    """The numbers are in the state then, where a checkpoint and an eager step find them."""
    both, still = (
        Both(network(), lambda p, k=k: curvopt.PolarOptimizer(p, 1e-2, eps=0.3, adaptation=k))
        for k in (0.1, 0.0)
    )
    both.run(batches(3))
    still.run(batches(3))
    for adaptation in (0.0, 0.1):
        for opt in both.opts:
            opt.param_groups[0]["adaptation"] = adaptation
            if not adaptation:
                opt.load_state_dict(copy.deepcopy(still.opts[0].state_dict()))
        both.run(batches(3))
    assert all(state["log_rate"] for state in both.opts[1].state.values())
    both.check(rtol=1e-10)


def test_a_generator_is_replaced():
    def make(params):
        generator = torch.Generator().manual_seed(3)
        return curvopt.DiagGGNOptimizer(params, curvature_every=1, generator=generator)

    both = Both(network(), make)
    both.run(batches(3))
    for opt in both.opts:
        opt.generator = torch.Generator().manual_seed(9)
    both.run(batches(3))
    both.check(compiled=5)


@pytest.mark.parametrize("row", ["dp_sgd-momentum", "dp_adam", "polar", "diag_ggn-exact"])
def test_parameters_take_turns(row):
    """As many of them each time, of other shapes: so is the noise that is drawn for them."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
    both = Both(
        nn.Sequential(*layers).double(),
        ROWS[row],
        lambda m, x, y: F.binary_cross_entropy_with_logits(m(x)[:, 0], (y > 0).to(x.dtype)),
    )
    for turn in range(6):
        for model in both.models:
            last = model[2]
            for p in model.parameters():
                free = p is model[0].bias or p is (last.bias if turn % 2 else last.weight)
                p.requires_grad_(free).grad = None
        both.run(batches(3))
    both.check(rtol=1e-9)
    assert both.step.taken["compiled"] >= 7


def test_noise_of_another_type():
    """The generators give other numbers for it."""
    both = Both(network(torch.float32), ROWS["dp_sgd"])
    both.run(batches(3, dtype=torch.float32))
    for model in both.models:
        model.double()
    both.run(batches(4))
    both.check(rtol=1e-6, atol=1e-8)


# -- errors, outputs, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("row", ["variance", "dp_sgd"])
def test_a_wrong_target(row):
    """The error is that of the function, not of generated code, and of this batch alone."""
    make = {
        "variance": lambda p: curvopt.VarianceAdaptiveSGD(p, 0.05, variance_every=1),
        "dp_sgd": lambda p: curvopt.DPSGD(p, 0.1, **private | {"noise_multiplier": 0.0}),
    }
    both = Both(network(sizes=(6, 3)), make[row], compiler=inductor)
    for t, (x, y) in enumerate(batches(5)):
        before = [p.clone() for p in both.models[1].parameters()]
        if t not in (0, 4):  # none is compiled yet, or one is
            with pytest.raises(IndexError, match="Target 7 is out of bounds"):
                both.step(x, torch.full_like(y, 7))
            assert all(map(torch.equal, both.models[1].parameters(), before))
        both.run([(x, y)])
    both.check(compiled=4)


def test_gradients_of_rounding_alone():
    """A bias before a normalization: its step is that of rounding, which nobody compares."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
    both = Both(nn.Sequential(*layers).double(), ROWS["polar"], compiler=inductor)
    both.run(batches(4))
    assert both.step.taken["compiled"] == 3
    for a, b in zip(*(list(m.parameters())[2:] for m in both.models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wrong", [lambda x: x * 1.01, lambda x: x * torch.nan])
def test_a_compiler_that_errs(wrong):
    def compiler(graph, inputs):
        return lambda *given: [r if k < 2 else wrong(r) for k, r in enumerate(graph(*given))]

    both = Both(network(), ROWS["diag_ggn-exact"], compiler=compiler)
    with pytest.warns(UserWarning, match="computes other numbers than the graph it is of"):
        both.run(batches(3))
    both.check(compiled=0)


@pytest.mark.parametrize("row", ["diag_ggn-exact", "polar"])
def test_a_gradient_that_is_no_number(row):
    """Of a finite loss: the root of zero has no slope."""

    def loss(model, x, y):
        h = model(x)
        return F.cross_entropy(h + 0 * (h * x[:, :1]).abs().sqrt(), y)

    both = Both(network(), ROWS[row], loss)
    for t, (x, y) in enumerate(batches(7)):
        if t in (3, 4):
            before = [p.clone() for p in both.models[1].parameters()]
            zeros = x.clone()
            zeros[0, 0] = 0
            with pytest.raises(curvopt.CurvoptError, match="gradient of parameter 0 .* not finite"):
                both.step(zeros, y)
            assert all(map(torch.equal, both.models[1].parameters(), before))
        both.run([(x, y)])
    both.check(rtol=1e-9, atol=1e-11, compiled=6)


@pytest.mark.parametrize("row", ["variance", "diag_ggn-exact", "polar", "dp_sgd"])
def test_a_teacher_that_is_not_frozen(row):
    """Its output is detached, so that it gets no gradient."""

    def loss(model, x, y):
        probabilities = model[1](x).detach().softmax(1)
        return F.cross_entropy(model[0](x), probabilities)

    model = nn.ModuleList([network(), network(sizes=(6, 4, 3))])
    both = Both(model, lambda p: ROWS[row]([*p][:6]), loss)
    both.run(batches(5))
    both.check(compiled=4)


def test_a_step_is_not_copied():
    both = Both(network(), ROWS["variance"])
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied: copy these, and call"):
            copied(both.step)


def test_outputs_have_no_graph():
    """Eager steps give them as compiled ones do."""

    def loss(model, x, y):
        logits = model(x)
        return F.cross_entropy(logits, y), {"logits": logits, "more": [logits * 2]}

    both = Both(network(), ROWS["variance"], loss)
    for batch in batches(3):
        value, outputs = both.step(*batch)
        assert not value.requires_grad
        assert not outputs["logits"].requires_grad
        assert not outputs["more"][0].requires_grad
    assert both.step.taken == {"compiled": 2, "eager": 1}


@pytest.mark.parametrize("row", ["variance", "polar", "dp_sgd-momentum"])
def test_nothing_is_kept_of_a_step_that_is_gone(row):
    """Dynamo keeps what it captured, but models and optimizers do not stay with it."""

    def used():
        model = network()
        opt = ROWS[row](model.parameters())
        step = CompiledStep(
            opt, lambda *b: cross_entropy(model, *b), compare=False, compiler=as_it_is
        )
        for batch in batches(3):
            step(*batch)
        assert step.taken["compiled"] == 2
        return [weakref.ref(value) for value in (step, opt, model, model[0].weight)]

    held = used()
    gc.collect()
    assert [ref() for ref in held] == [None] * 4
