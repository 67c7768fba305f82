"""Never a silent wrong number: what cannot be exact is an error that says what to do."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import curvopt
from tests import oracles
from tests.cases import LOSSES, Case, Function, Problem, build
from tests.oracles import assert_close
from tests.test_quantities import check

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
    check(Case("linear", "ce").build(), fields=["batch_grad"])


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
    with refused(problem, "requires a gradient"):
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

    with refused(problem, "backward"):
        run(problem, closure)


@both_ways
def test_backward_that_cannot_be_seen(problem, run):
    def closure():
        loss = problem.loss()
        torch.autograd.backward(loss)
        return loss

    with refused(problem, r"loss\.backward\(\)"):
        run(problem, closure)


def test_error_in_the_closure_is_passed_on(problem):
    def closure():
        problem.loss()
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        curvopt.compute(closure, problem.params, curvopt.BatchGrad())
    check(problem)


NO_SUMS = {  # over the samples
    "norm": lambda z, y: torch.linalg.vector_norm(z - F.one_hot(y, 3)),
    "root-of-a-sum": lambda z, y: (z - F.one_hot(y, 3)).square().sum().sqrt(),
    "root-of-a-mean": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z)).sqrt(),
    "perplexity": lambda z, y: F.cross_entropy(z, y).exp(),
    "squared": lambda z, y: F.cross_entropy(z, y) ** 2,
    "product": lambda z, y: F.cross_entropy(z, y) * z.square().mean(),
    "largest": lambda z, y: F.cross_entropy(z, y, reduction="none").max(),
}


@pytest.mark.parametrize("loss", NO_SUMS)
def test_loss_that_is_no_sum_over_samples(problem, loss):
    """Its gradient is no sum of the gradients of the samples' own losses."""
    with refused(problem, "sum|mean"):
        curvopt.compute(
            lambda: NO_SUMS[loss](problem.model(problem.x), problem.y),
            problem.params,
            curvopt.BatchGrad(),
        )


REDUCED_FIRST = {  # over the samples, then over the features
    "mean-sum": lambda z, y: z.square().mean(0).sum(),
    "sum-mean": lambda z, y: z.square().sum(0).mean(),
    "sum-tokens": lambda z, y: F.mse_loss(z, torch.zeros_like(z), reduction="none").mean(0).sum(),
}


@pytest.mark.parametrize("model", ["linear-no-bias", "mlp-tanh", "tokens"])
@pytest.mark.parametrize("loss", REDUCED_FIRST)
def test_samples_reduced_before_features(model, loss):
    problem = Case(model, "ce").build()._replace(loss_fn=REDUCED_FIRST[loss])
    try:
        check(problem, fields=["batch_grad"])
    except curvopt.CurvoptError as error:
        asked = "batch_size" in str(error) or "reduction=" in str(error)
        assert asked, error  # noqa: PT017 (either is right)


def test_curvature_of_a_loss_written_by_hand(problem):
    def closure():
        return problem.model(problem.x).square().sum(1).mean()

    with refused(problem, r"\(loss, output\)"):
        curvopt.compute(closure, problem.params, curvopt.DiagGGNExact())


def test_regularizer_in_the_loss(problem):
    """The parameter is used outside any sample."""
    penalty = problem.params[0]
    with refused(problem, "penalty"):
        by_compute(problem, lambda: problem.loss() + 0.1 * penalty.square().sum())


def test_term_with_negative_weight(problem):
    """Its Gauss-Newton matrix has no root."""
    with refused(problem, "negative"):
        curvopt.compute(lambda: -problem.loss(), problem.params, curvopt.DiagGGNExact())


# Samples.


@pytest.mark.filterwarnings("ignore::curvopt.errors.SlowPathWarning")
def test_samples_that_the_loss_does_not_see(problem):
    """The rows of the loss are the samples: a row that is cut off has no loss."""

    def closure():
        return F.cross_entropy(problem.model(problem.x)[:3], problem.y[:3])

    rows = curvopt.compute(closure, problem.params, curvopt.BatchGrad()).batch_grad
    part = Problem(problem.model, problem.loss_fn, problem.x[:3], problem.y[:3], problem.params)
    assert_close(rows, oracles.batch_grad(*part))


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


class Along(nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return x.roll(1, self.axis)


class Mixed(nn.Module):
    def __init__(self, mix, above):
        super().__init__()
        self.below, self.mix, self.above = nn.Linear(4, 5), mix, above

    def forward(self, x):
        return self.above(self.mix(self.below(x)))


@pytest.mark.parametrize("loss", ["ce", "mse-sum"])
@pytest.mark.parametrize("n", [2, 4, 5])
@pytest.mark.parametrize("mix", MIXING)
def test_samples_that_the_model_mixes(mix, loss, n):
    """Between two layers; then at the output, where the features remain separate."""
    refuses(Mixed(MIXING[mix], nn.Linear(5, 3)), "sample", loss=loss, n=n)
    refuses(Mixed(MIXING[mix], nn.Identity()), "sample", loss=loss, n=n)


def test_mixing_is_found_after_a_model_that_does_not_mix():
    """The same parameters and the same ops, along another axis."""
    layer = nn.Linear(4, 4)
    check(build(lambda: nn.Sequential(layer, Along(1)), (4,), LOSSES["mse"]))
    refuses(nn.Sequential(layer, Along(0)), "sample", loss="mse")


@both_ways
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_batch_norm_in_training_mode(run, dim, affine, first):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1](2, affine=affine)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](2, 2, 1)
    model = nn.Sequential(*([norm, layer] if first else [layer, norm]))
    refuses(model, "(?is)batch.?norm.*(eval|GroupNorm)", (2, *[2] * dim), run=run)


@pytest.mark.parametrize("batch_size", [0, -1, 3, 5, 2.0])
def test_wrong_batch_size(problem, batch_size):
    with refused(problem, "batch_size"):
        curvopt.compute(problem.loss, problem.params, *BOTH_ORDERS, batch_size=batch_size)


def test_unknown_reduction(problem):
    with pytest.raises(ValueError, match="Invalid reduction.*max"):
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


@pytest.mark.parametrize("below", [nn.Identity(), nn.Linear(4, 4)])
def test_use_that_no_rule_covers(below):
    """Exact, and slow: the warning names the op and the parameter."""
    model = nn.Sequential(below, Function(lambda x, w: torch.cdist(x, w), w=(3, 4)))
    problem = build(lambda: model, (4,), LOSSES["ce"])
    with pytest.warns(curvopt.SlowPathWarning, match="cdist"):
        check(problem)


# Whatever a model does with its parameters: exact, however slow.


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
    "written": ((4,), written, {"w": (4, 3), "b": 4}),
    "partly-without-grad": ((4,), without_grad, {"w": (4, 3)}),
    "checkpointed": ((4,), checkpointed, {"w": (4, 3)}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::curvopt.SlowPathWarning")
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_use_is_exact(name, n):
    shape, forward, shapes = UNUSUAL[name]
    check(build(lambda: Function(forward, **shapes), shape, LOSSES["mse"], n))


SPLITS = {  # the batch goes through the layer in several calls
    "halves": lambda x, w: torch.cat([half @ w for half in x.tensor_split(2)]),
    "one-by-one": lambda x, w: torch.stack([row @ w for row in x]),
    "rows-of-one": lambda x, w: torch.cat([row @ w for row in x.split(1)]),
}


@pytest.mark.filterwarnings("ignore::curvopt.SlowPathWarning")
@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("name", SPLITS)
def test_split_batch_is_exact_or_refused(name, loss):
    problem = build(lambda: Function(SPLITS[name], w=(4, 3)), (4,), LOSSES[loss], 4)
    try:
        check(problem)
    except curvopt.CurvoptError as error:
        assert "batch_size" in str(error)  # noqa: PT017 (either is right)


# Arguments of the quantities.


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_invalid_max_norm(max_norm):
    with pytest.raises(ValueError, match="Invalid max_norm"):
        curvopt.ClippedGradSum(max_norm)


@pytest.mark.parametrize("quantity", [curvopt.DiagGGNMC, curvopt.BatchDiagGGNMC])
@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 1.5}, {"estimator": "exact"}])
def test_invalid_sketch(quantity, options):
    with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
        quantity(**options)


def test_not_a_quantity(problem):
    with pytest.raises(TypeError, match="BatchGrad"):
        curvopt.compute(problem.loss, problem.params, curvopt.BatchGrad)


def test_one_field_twice(problem):
    """Two clipping norms would share a field of the result."""
    with refused(problem, "clipped_grad_sum"):
        curvopt.compute(
            problem.loss, problem.params, curvopt.ClippedGradSum(1), curvopt.ClippedGradSum(2)
        )
