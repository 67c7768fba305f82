"""Parameters used in unusual ways: exact, and without the slow path unless it says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import curvopt
from tests import oracles
from tests.cases import Function, Problem, Residual
from tests.oracles import assert_close
from tests.test_quantities import check


class Forward(nn.Module):
    """A forward pass, and the modules that it may use."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def problem(model, shape=(4,), n=5, classes=3):
    """Mean squared error, or cross entropy where the output has the classes."""
    model = model.double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        z = model(x)
    if z.shape == (n, classes):
        return Problem(model, F.cross_entropy, x, torch.randint(classes, (n,)), params)
    return Problem(model, F.mse_loss, x, torch.randn_like(z), params)


# Several uses of one parameter.


def tied_linear():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def tied_transposed(self, x):
    return F.linear(self.layer(x).tanh(), self.layer.weight.t())


def tied_embedding(self, x):
    ids = (x.abs() * 5).long() % 6
    return F.linear(self.table(ids).tanh().sum(1), self.table.weight)


def reused(self, x):
    for _ in range(3):
        x = self.layer(x).tanh()
    return self.head(x)


def reused_on_tokens_and_vectors(self, x):
    return self.layer(x.unflatten(1, (2, 2))).tanh().sum(1) @ self.layer.weight


def everywhere(self, x):
    """A matrix as weight, as bias, as scale, and read element by element."""
    w = self.layer.weight
    x = F.linear(x, w, w[0]) * w.diagonal()
    return x.tanh() @ w + w.sum(0) + w[1, 2]


SEVERAL = {
    "tied": tied_linear(),
    "tied-transposed": Forward(tied_transposed, layer=nn.Linear(4, 5)),
    "tied-embedding": Forward(tied_embedding, table=nn.Embedding(6, 3)),
    "reused": Forward(reused, layer=nn.Linear(4, 4), head=nn.Linear(4, 3)),
    "reused-convolution": nn.Sequential(
        nn.Unflatten(1, (1, 4)), *[nn.Conv1d(1, 1, 3, padding=1), nn.Tanh()] * 2, nn.Flatten()
    ),
    "reused-tokens": Forward(reused_on_tokens_and_vectors, layer=nn.Linear(2, 4, bias=False)),
    "reused-norm": nn.Sequential(nn.Linear(4, 4), *[nn.LayerNorm(4), nn.Tanh()] * 2),
    "skip": nn.Sequential(Residual(Residual(nn.Linear(4, 4)), nn.Tanh()), nn.Linear(4, 3)),
    "everywhere": Forward(everywhere, layer=nn.Linear(4, 4, bias=False)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_uses(name):
    check(problem(SEVERAL[name]))


ZEROS = {
    "zeros": lambda x: torch.zeros(x.shape, dtype=x.dtype),
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda x: x.new_zeros(x.shape),
    "full": lambda x: torch.full_like(x, 0.5),
}


@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("start", ZEROS)
@pytest.mark.parametrize("maps", [False, True], ids=["vectors", "maps"])
def test_hidden_states_that_begin_with_zeros(start, n, maps):
    """Their first layer sees no data, but its outputs are the samples': as many as it has."""

    def forward(self, x):
        hidden = ZEROS[start](x)
        for _ in range(3):
            hidden = torch.tanh(self.hidden(hidden) + self.data(x))
        return self.head(hidden).flatten(1)

    layer = (lambda: nn.Conv1d(4, 4, 3, padding=1)) if maps else (lambda: nn.Linear(4, 4))
    model = Forward(forward, hidden=layer(), data=layer(), head=layer())
    check(problem(model, (4, 4) if maps else (4,), n=n))


# Derived parameters.


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).t()


class Positive(nn.Module):
    def forward(self, w):
        return F.softplus(w)


def parametrized(*made, name="weight"):
    layer = nn.Linear(4, 4)
    for parametrization in made:
        parametrize.register_parametrization(layer, name, parametrization)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def old_weight_norm():
    return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh())


DERIVED = {
    "weight-norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
    "weight-norm-convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), parametrizations.weight_norm(nn.Conv1d(1, 2, 3)), nn.Flatten()
    ),
    "spectral-norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "symmetric": lambda: parametrized(Symmetric()),
    "symmetric-positive": lambda: parametrized(Symmetric(), Positive()),
    "parametrized-bias": lambda: parametrized(Positive(), name="bias"),
    "transposed": lambda: Function(lambda x, w: F.linear(x, w.t()), w=(4, 3)),
    "masked": lambda: Function(lambda x, w: F.linear(x, w * MASK), w=(3, 4)),
    "masked-by-its-sign": lambda: Function(lambda x, w: x @ (w * (w > 0)), w=(4, 3)),
    "low-rank": lambda: Function(lambda x, a, b: x @ (a @ b), a=(4, 2), b=(2, 3)),
    "stacked": lambda: Function(lambda x, a, b: F.linear(x, torch.stack([a, b])), a=4, b=4),
    "concatenated": lambda: Function(lambda x, a, b: x @ torch.cat([a, b], 1), a=(4, 2), b=(4, 1)),
    "normalized": lambda: Function(lambda x, w: F.normalize(x) @ F.normalize(w, dim=0), w=(4, 3)),
    "softmax-of-weights": lambda: Function(lambda x, w: x @ w.softmax(0), w=(4, 3)),
    "exponential-scale": lambda: Function(lambda x, w, s: (x @ w) * s.exp(), w=(4, 3), s=()),
    "sliced": lambda: Function(lambda x, w: x @ w[:, :3] + x @ w[:, 3:], w=(4, 6)),
    "one-table-for-all": lambda: Function(
        lambda x, w, t: x @ w + t[torch.arange(3)].sum(1), w=(4, 3), t=(5, 2)
    ),
    "embedding-of-positions": lambda: Function(
        lambda x, w, t: x @ w + F.embedding(torch.arange(3), t).sum(1), w=(4, 3), t=(3, 2)
    ),
    "relative-positions": lambda: Function(
        lambda x, t: x.unflatten(1, (2, 2)) @ t[torch.tensor([[0, 1], [1, 0]])].squeeze(-1),
        t=(2, 1),
    ),
}
MASK = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]]).double()


@pytest.mark.parametrize("name", DERIVED)
def test_derived(name):
    check(problem(DERIVED[name]()))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_old_weight_norm():
    check(problem(nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derived_of_another_type(dtype):
    """A weight that is cast to a type of less precision: as exact as that."""
    case = problem(
        Function(lambda x, w, b: (x.to(dtype) @ w.to(dtype)).double() + b, w=(4, 3), b=3)
    )
    check(case, rtol=0.05 if dtype is torch.bfloat16 else 1e-5)


def test_spectral_norm_in_training_mode():
    """Its power iteration changes a buffer at every forward pass, so two passes differ."""
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    case = problem(layer)
    before = [buffer.clone() for buffer in layer.buffers()]

    def again(x):
        for buffer, value in zip(layer.buffers(), before, strict=True):
            buffer.copy_(value)
        return layer(x)

    check(case._replace(model=again))


# Layouts.


def sequence_first(self, x):
    x = self.first(x.unflatten(1, (2, 2)).transpose(0, 1))
    return self.second(x.tanh()).sum(0)


def flattened_tokens(self, x):
    x = self.first(x.reshape(-1, 2))
    return self.second(x.tanh()).reshape(-1, 2, 3).sum(1)


@pytest.mark.parametrize("forward", [sequence_first, flattened_tokens])
@pytest.mark.parametrize("n", [2, 5])
def test_samples_elsewhere(forward, n):
    check(problem(Forward(forward, first=nn.Linear(2, 4), second=nn.Linear(4, 3)), n=n))


# Modes of running.


def in_place(self, x):
    x = self.first(x)
    x.mul_(2).add_(1)
    x[:, 0] = 0
    return self.second(x.relu_())


def with_checkpoint(self, x):
    x = checkpoint(self.first, x, use_reentrant=False)
    return self.second(checkpoint(torch.tanh, x, use_reentrant=False))


def with_buffer(self, x):
    return self.second(self.first(x) * self.first.buffer + self.first.buffer)


def layers():
    first = nn.Linear(4, 5)
    first.register_buffer("buffer", torch.randn(5))
    return {"first": first, "second": nn.Linear(5, 3)}


@pytest.mark.parametrize("forward", [in_place, with_checkpoint, with_buffer])
def test_running(forward):
    check(problem(Forward(forward, **layers())))


def test_functional_code_without_modules():
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    check(Problem(lambda x: (x @ w + b).tanh(), F.cross_entropy, x, y, [w, b]))


def test_functional_call():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    call = torch.func.functional_call
    check(Problem(lambda x: call(model, params, x), F.cross_entropy, x, y, list(params.values())))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where):
    """In bfloat16 by autocast: as exact as bfloat16 is."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    case = problem(model)
    exact = {f: getattr(oracles, f)(*case) for f in ("batch_grad", "sum_grad_squared", "diag_ggn")}
    model, x = model.float(), case.x.float()

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
            loss = F.cross_entropy(z, case.y)
        return loss if where == "inside" else F.cross_entropy(z.float(), case.y)

    result = curvopt.compute(
        closure, case.params,
        curvopt.BatchGrad(), curvopt.SumGradSquared(), curvopt.DiagGGNExact(),
    )  # fmt: skip
    for field, truth in zip(
        (result.batch_grad, result.sum_grad_squared, result.diag_ggn_exact),
        exact.values(),
        strict=True,
    ):
        for p, value in field.items():
            assert value.dtype == torch.float32
            assert_close(value, truth[p].float(), 0.05)


@pytest.mark.parametrize("before", ["a measured pass", "a plain pass", "no gradient"])
def test_a_second_pass_in_one_block_of_autocast(before):
    """Autocast keeps its copies of the weights, made before recording, until the block ends."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double().float()
    x, y, params = torch.randn(5, 4), torch.randint(3, (5,)), list(model.parameters())

    def measured():
        quantities = curvopt.BatchGrad(), curvopt.DiagGGNExact()
        return curvopt.compute(lambda: F.cross_entropy(model(x), y), params, *quantities)

    with torch.autocast("cpu", torch.bfloat16):
        expected = measured()
    with torch.autocast("cpu", torch.bfloat16):
        if before == "a measured pass":
            measured()
        with torch.set_grad_enabled(before != "no gradient"):
            loss = F.cross_entropy(model(x), y)
        if before == "a plain pass":
            loss.backward()
            model.zero_grad()
        result = measured()
        for p in params:
            assert torch.equal(result.batch_grad[p], expected.batch_grad[p])
            assert torch.equal(result.diag_ggn_exact[p], expected.diag_ggn_exact[p])
        private = curvopt.DPSGD(
            params, 0.1, noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=5
        )
        for _ in range(2):
            private.step(lambda: F.cross_entropy(model(x), y))
            assert len(private.norms) == 5


def test_dropout_in_training_mode():
    """The masks are those of the forward pass."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3)).double()
    case = problem(model)

    def losses():
        torch.manual_seed(5)
        return F.cross_entropy(model(case.x), case.y, reduction="none")

    result = curvopt.compute(lambda: losses().mean(), case.params, curvopt.BatchGrad())
    for n, loss in enumerate(losses()):
        slopes = oracles.derivative(loss, case.params)
        for p, slope in zip(case.params, slopes, strict=True):
            assert_close(result.batch_grad[p][n], slope)


def test_compiled_model():
    """While recording it runs as it was written; the eager backend traces as every backend does."""
    case = problem(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    check(case._replace(model=torch.compile(case.model, backend="eager")))


# What no rule covers: exact, with one warning.


class Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w) ** 2

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = 2 * grad * (x @ w)
        return grad @ w.t(), x.t() @ grad


UNCOVERED = {
    "autograd-function": (lambda x, w: Power.apply(x, w), r".*"),
    "distance": (lambda x, w: torch.cdist(x, w.t()), r"cdist"),
    "outer": (lambda x, w: torch.kron(x, w)[::4, :3], r"kron"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_slow_path(name):
    forward, op = UNCOVERED[name]
    case = problem(Function(lambda x, w, b: forward(x @ b, w).tanh(), w=(4, 3), b=(4, 4)))
    match = rf"no rule covers {op}.* with .*register_rule"
    with pytest.warns(curvopt.SlowPathWarning, match=match) as caught:
        check(case, fields=["batch_grad", "clipped_grad_sum"])
    assert len([w for w in caught if w.category is curvopt.SlowPathWarning]) == 1
    with pytest.warns(curvopt.SlowPathWarning):
        check(case)


def test_slow_path_for_one_use_of_several():
    """The other uses stay fast, and the cross terms are right."""
    case = problem(Function(lambda x, w: torch.cdist(x @ w, w), w=(4, 4)))
    with pytest.warns(curvopt.SlowPathWarning):
        check(case)
