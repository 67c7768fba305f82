"""Never a silent wrong number: what cannot be exact is an error that says what to do."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import curvopt
from tests.cases import LOSSES, Case, Function, Problem, build
from tests.test_quantities import check

FIRST_ORDER = [curvopt.BatchGrad(), curvopt.ClippedGradSum(1.0)]
BOTH_ORDERS = [curvopt.BatchGrad(), curvopt.DiagGGNExact()]


@pytest.fixture
def problem() -> Problem:
    return Case("mlp-tanh", "ce").build()


@contextlib.contextmanager
def refused(problem, match):
    """The error comes, the parameters are untouched, and the next call works."""
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(curvopt.CurvoptError, match=match):
        yield
    for p, old in zip(problem.params, before, strict=True):
        assert torch.equal(p, old)
    check(Case("mlp-tanh", "ce").build())


def by_compute(problem, closure):
    curvopt.compute(closure, problem.model.named_parameters(), *BOTH_ORDERS)


def by_step(problem, closure):
    curvopt.DiagGGNOptimizer(problem.model.named_parameters()).step(closure)


both_ways = pytest.mark.parametrize("run", [by_compute, by_step])


def refuses(model, match, shape=(4,), loss="ce", n=4, run=by_compute):
    """A model made of `model` is refused, asked for quantities of either order."""
    problem = build(lambda: model, shape, LOSSES[loss], n)
    with refused(problem, match):
        run(problem, problem.loss)


# Parameters.


@pytest.mark.parametrize("params", [[], iter(())])
def test_no_parameters(problem, params):
    with refused(problem, "no parameters"):
        curvopt.compute(problem.loss, params, curvopt.BatchGrad())


def test_only_frozen_parameters(problem):
    frozen = [p.detach() for p in problem.params]
    with refused(problem, "requires? grad|frozen"):
        curvopt.compute(problem.loss, frozen, curvopt.BatchGrad())


def test_parameter_twice(problem):
    with refused(problem, "twice|more than once"):
        curvopt.compute(problem.loss, [*problem.params, problem.params[0]], curvopt.BatchGrad())


def test_not_a_parameter(problem):
    with refused(problem, "str"):
        curvopt.compute(problem.loss, ["weight"], curvopt.BatchGrad())


def test_parameter_that_is_no_leaf(problem):
    with refused(problem, "leaf"):
        curvopt.compute(problem.loss, [problem.params[0] * 2], curvopt.BatchGrad())


def test_parameter_that_the_loss_does_not_use(problem):
    other = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    result = curvopt.compute(problem.loss, [*problem.params, other], *BOTH_ORDERS)
    for rows in (result.grad, result.batch_grad, result.diag_ggn_exact):
        assert not rows[other].any()


# Closures and losses.


@both_ways
@pytest.mark.parametrize("value", [None, 1.0])
def test_closure_without_a_loss(problem, run, value):
    with refused(problem, "closure.*return"):
        run(problem, lambda: value)


@both_ways
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(problem, run, factor):
    with refused(problem, "finite"):
        run(problem, lambda: problem.loss() * factor)


@both_ways
def test_loss_that_is_not_a_number(problem, run):
    with refused(problem, "scalar|shape"):
        run(problem, lambda: F.cross_entropy(problem.model(problem.x), problem.y, reduction="none"))


@both_ways
def test_loss_without_a_graph(problem, run):
    with refused(problem, "graph|require|no_grad|detach"):
        run(problem, lambda: problem.loss().detach())


@both_ways
def test_second_backward(problem, run):
    def closure():
        loss = problem.loss()
        loss.backward(retain_graph=True)
        loss.backward()
        return loss

    with refused(problem, "second|twice"):
        run(problem, closure)


def test_error_in_the_closure_is_passed_on(problem):
    def closure():
        problem.loss()
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        curvopt.compute(closure, problem.params, curvopt.BatchGrad())
    check(problem)


@pytest.mark.parametrize("norm", [torch.linalg.vector_norm, lambda r: r.square().sum().sqrt()])
def test_loss_without_a_reduction_over_samples(problem, norm):
    """The root of a sum is no sum over samples."""
    target = torch.zeros(3, dtype=torch.float64)
    with refused(problem, "reduction"):
        curvopt.compute(
            lambda: norm(problem.model(problem.x) - target), problem.params, *FIRST_ORDER
        )


def test_curvature_of_a_loss_written_by_hand(problem):
    def closure():
        return problem.model(problem.x).square().sum(1).mean()

    with refused(problem, r"\(loss, output\)"):
        curvopt.compute(closure, problem.params, curvopt.DiagGGNExact())


def test_regularizer_in_the_loss(problem):
    """The parameter is used outside any sample."""
    penalty = problem.params[0]
    with refused(problem, "0.weight"):
        by_compute(problem, lambda: problem.loss() + 0.1 * penalty.square().sum())


def test_term_with_negative_weight(problem):
    """Its Gauss-Newton matrix has no root."""
    with refused(problem, "negative"):
        curvopt.compute(lambda: -problem.loss(), problem.params, curvopt.DiagGGNExact())


# Samples.


@both_ways
def test_sizes_that_do_not_match(problem, run):
    def closure():
        return F.cross_entropy(problem.model(problem.x)[:3], problem.y[:3])

    with refused(problem, "batch_size|samples"):
        run(problem, closure)


@both_ways
def test_target_that_broadcasts(problem, run):
    """`[N, C]` against `[N, 1]`, one of the commonest slips."""
    target = torch.zeros(4, 1, dtype=torch.float64)
    with (
        pytest.warns(UserWarning, match="target size"),
        refused(problem, "target"),
    ):
        run(problem, lambda: F.mse_loss(problem.model(problem.x), target))


MIXING = {
    "centered": lambda x: x - x.mean(0),
    "softmax-over-samples": lambda x: x.softmax(0),
    "flipped": lambda x: x.flip(0),
    "rolled": lambda x: x + x.roll(1, 0),
    "similarity": lambda x: (x @ x.T).softmax(1) @ x,
    "cumulative": lambda x: x.cumsum(0),
}


class Mixed(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.below, self.mix, self.above = nn.Linear(4, 5), mix, nn.Linear(5, 3)

    def forward(self, x):
        return self.above(self.mix(self.below(x).tanh()))


@pytest.mark.parametrize("loss", ["ce", "mse-sum"])
@pytest.mark.parametrize("mix", MIXING)
def test_samples_that_the_model_mixes(mix, loss):
    refuses(Mixed(MIXING[mix]), "sample", loss=loss)


@both_ways
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 3), (2, 2, 2, 2)])
def test_batch_norm_in_training_mode(run, shape):
    norm = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(shape) - 1]
    model = nn.Sequential(norm(shape[0]), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(4, *shape))
    refuses(model, "(?is)batch.?norm.*(eval|GroupNorm)", shape, run=run)


def test_samples_on_an_ambiguous_axis():
    """Time first, with as many steps as samples."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).cumsum(0)[-1]

    refuses(TimeFirst(), "sample|batch_size", shape=(4, 4))


@pytest.mark.parametrize("batch_size", [0, -1, 3, 5, 2.0])
def test_wrong_batch_size(problem, batch_size):
    with refused(problem, "batch_size"):
        curvopt.compute(problem.loss, problem.params, *BOTH_ORDERS, batch_size=batch_size)


def test_unknown_reduction(problem):
    with refused(problem, "reduction.*max"):
        curvopt.compute(problem.loss, problem.params, *BOTH_ORDERS, reduction="max")


# Uses of parameters.


def test_input_changed_in_place(problem):
    """The layer's input is needed for the gradient of its weight."""

    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            x = x.clone()
            z = self.layer(x)
            x.mul_(2)
            return z

    refuses(Careless(), "in.place")


def test_output_changed_in_place(problem):
    """The logits are needed for the curvature of the loss."""

    def closure():
        z = problem.model(problem.x)
        loss = F.cross_entropy(z, problem.y)
        with torch.no_grad():
            z.mul_(2)
        return loss

    with refused(problem, "in.place"):
        by_compute(problem, closure)


def test_use_that_no_rule_covers():
    """The message names the parameter and the op."""
    model = Function(lambda x, w: torch.cdist(x, w), w=(3, 4))
    refuses(model, r"(?s)cdist.*\bw\b|\bw\b.*cdist")


# Whatever a model does with its parameters: exact, or refused.


def chunks(x, w):
    """The batch in two halves."""
    return torch.cat([half @ w for half in x.tensor_split(2)])


def loop(x, w):
    """One call per sample."""
    return torch.stack([row @ w for row in x])


def written(x, w, b):
    """In place, into a slice of a buffer."""
    z = x.new_zeros(len(x), 4)
    z[:, 1:] = x @ w
    return z.add_(b)


def scaled_in_place(x, w, b):
    h = x @ w
    h *= b
    return h


def without_grad(x, w):
    with torch.no_grad():
        h = x @ w
    return h + (x @ w).tanh()


def checkpointed(x, w):
    return torch.utils.checkpoint.checkpoint(lambda t: (t @ w).tanh(), x, use_reentrant=False)


UNUSUAL = {
    "reused": ((4,), lambda x, w: (x @ w).tanh() @ w, {"w": (4, 4)}),
    "reused-transposed": ((4,), lambda x, w: (x @ w).tanh() @ w.t(), {"w": (4, 4)}),
    "tied-over-tokens": ((3, 4), lambda x, w: (x @ w).tanh().sum(1) @ w, {"w": (4, 4)}),
    "squared": ((4,), lambda x, w: x @ (w * w), {"w": (4, 3)}),
    "normalized": ((4,), lambda x, w: F.linear(x, F.normalize(w)), {"w": (3, 4)}),
    "sliced": ((4,), lambda x, w: x[:, :2] @ w[:2] + (x[:, 1:] @ w[1:]).tanh(), {"w": (4, 3)}),
    "stacked": ((4,), lambda x, v, w: x @ torch.cat([v, w], 1), {"v": (4, 1), "w": (4, 2)}),
    "input-scaled": ((4,), lambda x, v, w: (x * v) @ w, {"v": 4, "w": (4, 3)}),
    "input-shifted": ((4,), lambda x, v, w: (x + v) @ w, {"v": 4, "w": (4, 3)}),
    "scaled": ((4,), lambda x, v, w: (x @ w) * v, {"v": 3, "w": (4, 3)}),
    "scaled-in-place": ((4,), scaled_in_place, {"w": (4, 3), "b": 3}),
    "scalar": ((4,), lambda x, v, w: (x @ w) * v, {"v": (), "w": (4, 3)}),
    "divided": ((4,), lambda x, v, w: (x @ w) / (1 + v * v), {"v": (1, 3), "w": (4, 3)}),
    "gated": ((4,), lambda x, v, w: (x @ w) * (x @ v).sigmoid(), {"v": (4, 3), "w": (4, 3)}),
    "hypernetwork": ((4,), lambda x, v, w: (x @ (w @ v)).tanh() @ v, {"v": (3, 3), "w": (4, 3)}),
    "token-appended": (
        (2, 4),
        lambda x, t, w: torch.cat([t.expand(len(x), 1, 4), x], 1) @ w,
        {"t": (1, 1, 4), "w": (4, 3)},
    ),
    "positions": ((2, 4), lambda x, t, w: (x + t) @ w, {"t": (2, 4), "w": (4, 3)}),
    "positions-like-samples": ((4, 4), lambda x, t, w: (x + t) @ w, {"t": (4, 4), "w": (4, 3)}),
    "features-flattened": ((6,), lambda x, w: (x.view(-1, 2) @ w).view(-1, 9), {"w": (2, 3)}),
    "time-first": ((5, 4), lambda x, w: (x.transpose(0, 1) @ w).tanh().sum(0), {"w": (4, 3)}),
    "time-first-square": (
        (4, 4), lambda x, w: (x.transpose(0, 1) @ w).tanh().sum(0), {"w": (4, 3)},
    ),
    "samples-last": ((4,), lambda x, w: (w @ x.T).tanh().T, {"w": (3, 4)}),
    "outer-product": ((4,), lambda x, w: torch.einsum("ni,nj,ijo->no", x, x, w), {"w": (4, 4, 3)}),
    "batched-matrices": ((2, 4), lambda x, w: torch.einsum("nti,tio->nto", x, w), {"w": (2, 4, 3)}),
    "bilinear": ((4,), lambda x, w: F.bilinear(x, x, w), {"w": (3, 4, 4)}),
    "prototypes": ((4,), lambda x, w: -torch.cdist(x, w), {"w": (3, 4)}),
    "distances": ((4,), lambda x, w: (x[:, None] - w).square().sum(2), {"w": (3, 4)}),
    "layer-norm": ((4,), lambda x, v, w: F.layer_norm(x @ w, (3,), v), {"v": 3, "w": (4, 3)}),
    "prelu": ((4,), lambda x, v, w: F.prelu(x @ w, v), {"v": 3, "w": (4, 3)}),
    "where": ((4,), lambda x, v, w: torch.where(x[:, :3] > 0, x @ w, v), {"v": 3, "w": (4, 3)}),
    "detached-twin": ((4,), lambda x, w: (x @ w).tanh() @ w.detach(), {"w": (4, 4)}),
    "data-twin": ((4,), lambda x, w: (x @ w).tanh() @ w.data, {"w": (4, 4)}),
    "halves": ((4,), chunks, {"w": (4, 3)}),
    "sample-loop": ((4,), loop, {"w": (4, 3)}),
    "written": ((4,), written, {"w": (4, 3), "b": 4}),
    "partly-without-grad": ((4,), without_grad, {"w": (4, 3)}),
    "checkpointed": ((4,), checkpointed, {"w": (4, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", UNUSUAL)
def test_exact_or_refused(name, n):
    shape, forward, shapes = UNUSUAL[name]
    problem = build(lambda: Function(forward, **shapes), shape, LOSSES["mse"], n)
    with contextlib.suppress(curvopt.CurvoptError):
        check(problem)


# Arguments of the quantities.


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_invalid_max_norm(max_norm):
    with pytest.raises(curvopt.CurvoptError, match="max_norm"):
        curvopt.ClippedGradSum(max_norm)


@pytest.mark.parametrize("quantity", [curvopt.DiagGGNMC, curvopt.BatchDiagGGNMC])
@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 1.5}, {"estimator": "exact"}])
def test_invalid_sketch(quantity, options):
    with pytest.raises(curvopt.CurvoptError, match=next(iter(options))):
        quantity(**options)


def test_not_a_quantity(problem):
    with refused(problem, "BatchGrad"):
        curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad)


def test_one_field_twice(problem):
    """Two clipping norms would share a field of the result."""
    with refused(problem, "clipped_grad_sum"):
        curvopt.compute(
            problem.loss, problem.params, curvopt.ClippedGradSum(1), curvopt.ClippedGradSum(2)
        )
