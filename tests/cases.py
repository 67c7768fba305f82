"""Problems to test on: a new model or a new loss is one row.

Rows are lazy and seeded: `case.build()` makes the same small `Problem` each time, in float64 unless
told otherwise. Outputs are `[N, C, ...]` (or `[N]`), and every loss makes its target from the shape
of the output, so that any model goes with any loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Problem(NamedTuple):
    """The arguments of every oracle, in their order."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    x: Tensor
    y: Any
    params: list[nn.Parameter]

    def loss(self) -> Tensor:
        return self.loss_fn(self.model(self.x), self.y)


class Model(NamedTuple):
    """How to make a model, and the shape of one sample of its input."""

    shape: tuple[int, ...]
    make: Callable[[], nn.Module]


class Loss(NamedTuple):
    """The loss, and how to make a target for an output."""

    fn: Callable[[Any, Any], Tensor]
    target: Callable[[Any], Any]


class Case(NamedTuple):
    """One row: `MODELS[model]` with `LOSSES[loss]`."""

    model: str
    loss: str

    @property
    def id(self) -> str:
        return f"{self.model}/{self.loss}"

    def build(self, n: int = 4, dtype: torch.dtype = torch.float64) -> Problem:
        model, loss = MODELS[self.model], LOSSES[self.loss]
        return build(model.make, model.shape, loss, n, dtype)


def build(make, shape, loss: Loss, n: int = 4, dtype=torch.float64, seed: int = 0) -> Problem:
    """A problem with `n` samples; drawn in float64, so that another `dtype` only rounds it."""
    torch.manual_seed(seed)
    model = make().double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    with torch.no_grad():
        y = loss.target(model(x))
    x, y = (cast(t, dtype) for t in (x, y))
    model = model.to(dtype)
    return Problem(model, loss.fn, x, y, [p for p in model.parameters() if p.requires_grad])


def cast(t, dtype):
    if isinstance(t, tuple):
        return tuple(cast(e, dtype) for e in t)
    return t.to(dtype) if t.is_floating_point() else t


# Models.


class Function(nn.Module):
    """Functional code: `forward(x, **parameters)`, with parameters of the given shapes."""

    def __init__(self, forward, **shapes):
        super().__init__()
        self.function = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 2))

    def forward(self, x):
        return self.function(x, **self._parameters)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Heads(nn.Module):
    """A shared trunk and several outputs."""

    def __init__(self, trunk, *heads):
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, x):
        x = self.trunk(x)
        return tuple(head(x) for head in self.heads)


def mlp(activation=nn.ReLU, bias=True, frozen="", **options):
    """4 -> 5 -> 6 -> 3; `frozen` lists names of parameters, as `0.weight 2.bias`."""
    model = nn.Sequential(
        nn.Linear(4, 5, bias),
        activation(**options),
        nn.Linear(5, 6, bias),
        activation(**options),
        nn.Linear(6, 3, bias),
    )
    for name in frozen.split():
        model.get_parameter(name).requires_grad_(False)
    return model


def conv(dim, *args, **options):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    return lambda: nn.Sequential(layer(*args, **options), nn.Tanh())


def function(forward, **shapes):
    return lambda: Function(forward, **shapes)


MODELS = {
    "linear": Model((4,), lambda: nn.Linear(4, 3)),
    "linear-no-bias": Model((4,), lambda: nn.Linear(4, 3, bias=False)),
    "linear-one-output": Model((4,), lambda: nn.Linear(4, 1)),
    "linear-squeezed": Model((4,), lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))),
    "mlp-relu": Model((4,), mlp),
    "mlp-relu-inplace": Model((4,), lambda: mlp(inplace=True)),
    "mlp-tanh": Model((4,), lambda: mlp(nn.Tanh)),
    "mlp-sigmoid": Model((4,), lambda: mlp(nn.Sigmoid)),
    "mlp-no-bias": Model((4,), lambda: mlp(nn.Tanh, bias=False)),
    "mlp-frozen-first": Model((4,), lambda: mlp(frozen="0.weight 0.bias")),
    "mlp-frozen-last": Model((4,), lambda: mlp(frozen="4.weight 4.bias")),
    "mlp-frozen-weights": Model((4,), lambda: mlp(frozen="0.weight 2.weight 4.weight")),
    "mlp-frozen-biases": Model((4,), lambda: mlp(frozen="0.bias 2.bias 4.bias")),
    "residual": Model(
        (4,), lambda: nn.Sequential(Residual(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3))
    ),
    "heads": Model(
        (4,),
        lambda: Heads(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3), nn.Linear(5, 2)),
    ),
    # Token axes: many tokens against few features, and the other way round.
    "tokens": Model((7, 2), lambda: nn.Linear(2, 3)),
    "tokens-wide": Model((2, 9), lambda: nn.Linear(9, 8)),
    "tokens-two-axes": Model((2, 3, 4), lambda: nn.Linear(4, 3)),
    "tokens-mlp": Model((3, 4), mlp),
    "tokens-pooled": Model((5, 4), lambda: nn.Sequential(mlp(), nn.Flatten(), nn.Linear(15, 3))),
    # Convolutions.
    "conv1d": Model((2, 6), conv(1, 2, 3, 3)),
    "conv1d-stride": Model((2, 8), conv(1, 2, 3, 3, stride=2)),  # the last column is never read
    "conv1d-dilation": Model((2, 8), conv(1, 2, 3, 3, dilation=2, padding=1)),
    "conv1d-groups": Model((4, 5), conv(1, 4, 6, 3, groups=2)),
    "conv1d-same": Model((2, 5), conv(1, 2, 3, 3, padding="same")),
    "conv1d-same-even": Model(
        (2, 5), conv(1, 2, 3, 4, padding="same")
    ),  # one more column on the right
    "conv1d-same-circular": Model(
        (2, 5), conv(1, 2, 3, 4, padding="same", padding_mode="circular")
    ),
    "conv1d-valid": Model((2, 5), conv(1, 2, 3, 3, padding="valid")),
    "conv1d-circular": Model((2, 5), conv(1, 2, 3, 3, padding=2, padding_mode="circular")),
    "conv1d-reflect": Model((2, 5), conv(1, 2, 3, 3, padding=2, padding_mode="reflect")),
    "conv1d-replicate": Model((2, 5), conv(1, 2, 3, 3, padding=2, padding_mode="replicate")),
    "conv2d": Model((2, 4, 5), conv(2, 2, 3, (2, 3))),
    "conv2d-pointwise": Model((3, 3, 2), conv(2, 3, 4, 1, bias=False)),
    "conv2d-stride": Model((2, 6, 5), conv(2, 2, 3, 3, stride=(2, 1), padding=(1, 0))),
    "conv2d-dilation": Model((2, 6, 5), conv(2, 2, 3, 2, dilation=(3, 2))),
    "conv2d-groups": Model((4, 4, 4), conv(2, 4, 6, 3, groups=2, stride=2, padding=1)),
    "conv2d-depthwise": Model((3, 4, 4), conv(2, 3, 6, 3, groups=3)),
    "conv2d-same-even": Model((2, 3, 4), conv(2, 2, 3, (2, 4), padding="same", dilation=(2, 1))),
    "conv2d-circular": Model((2, 3, 4), conv(2, 2, 3, 3, padding=(1, 2), padding_mode="circular")),
    "conv2d-reflect": Model((2, 3, 4), conv(2, 2, 3, 3, padding=(1, 2), padding_mode="reflect")),
    "conv2d-replicate": Model(
        (2, 3, 4), conv(2, 2, 3, 3, padding=1, padding_mode="replicate", stride=2)
    ),
    "conv3d": Model((1, 3, 3, 3), conv(3, 1, 2, 2)),
    "conv3d-groups": Model((2, 3, 4, 3), conv(3, 2, 2, 2, groups=2, stride=(1, 2, 1), padding=1)),
    "conv3d-circular": Model((1, 2, 3, 2), conv(3, 1, 2, 2, padding=1, padding_mode="circular")),
    "conv3d-replicate": Model((1, 2, 3, 2), conv(3, 1, 2, 2, padding=1, padding_mode="replicate")),
    "convnet": Model(
        (1, 6, 6),
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 2, 2),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
    ),
    # Functional code.
    "addmm": Model((4,), function(lambda x, w, b: torch.addmm(b, x, w), w=(4, 3), b=3)),
    "addmm-scaled": Model(
        (4,), function(lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), w=(4, 3), b=3)
    ),
    "addmm-method": Model((4,), function(lambda x, w, b: b.addmm(x, w), w=(4, 3), b=(1, 3))),
    "matmul-operator": Model((4,), function(lambda x, w: x @ w, w=(4, 3))),
    "matmul-plus-bias": Model((4,), function(lambda x, w, b: x @ w + b, w=(4, 3), b=3)),
    "matmul-method": Model((4,), function(lambda x, w: x.matmul(w), w=(4, 3))),
    "matmul-tokens": Model((2, 4), function(lambda x, w: torch.matmul(x, w), w=(4, 3))),
    "matmul-left": Model((4, 2), function(lambda x, w: w @ x, w=(3, 4))),
    "matmul-left-columns": Model((4,), function(lambda x, w: torch.matmul(w, x.t()).t(), w=(3, 4))),
    "matmul-vector": Model((4,), function(lambda x, w: torch.matmul(x, w), w=4)),
    "mm": Model((4,), function(lambda x, w: x.mm(w), w=(4, 3))),
    "F.linear": Model((4,), function(lambda x, w, b: F.linear(x, w, b).tanh(), w=(3, 4), b=3)),
    "F.conv2d": Model(
        (4, 3, 3), function(lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 2), w=(6, 2, 2, 2), b=6)
    ),
    "F.conv1d-keywords": Model(
        (2, 5), function(lambda x, w: F.conv1d(input=x, weight=w, padding="same"), w=(3, 2, 2))
    ),
}


# Losses.


def classes(z):
    """One class per sample and extra axis; a loss that ignores class 0 ignores whole samples."""
    return torch.randint(z.shape[1], z.shape[:1] + z.shape[2:])


def probabilities(z):
    return torch.rand_like(z).softmax(1)


def binary(z):
    return torch.rand_like(z).round()


def class_weight(z):
    return torch.linspace(0.5, 2, z.shape[1], dtype=z.dtype)


def channels(z):
    """A weight per channel, broadcast over the extra axes."""
    return class_weight(z).view(-1, *[1] * (z.dim() - 2)) if z.dim() > 1 else z.new_tensor(1.5)


def ce(weighted=False, **options):
    """Cross entropy; class weights must know how many classes there are."""
    return lambda z, y: F.cross_entropy(z, y, class_weight(z) if weighted else None, **options)


def nll(z, y):
    return F.nll_loss(z.log_softmax(dim=1), y, class_weight(z), ignore_index=0)


def bce(z, y):
    weight = channels(z)
    return F.binary_cross_entropy_with_logits(z, y, weight, pos_weight=weight + 1)


everything = {"weighted": True, "ignore_index": 0, "label_smoothing": 0.2}

LOSSES = {
    "ce": Loss(F.cross_entropy, classes),
    "ce-sum": Loss(ce(reduction="sum"), classes),
    "ce-module": Loss(nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), classes),
    "ce-weight": Loss(ce(weighted=True), classes),
    "ce-weight-sum": Loss(ce(weighted=True, reduction="sum"), classes),
    "ce-ignore": Loss(ce(ignore_index=0), classes),
    "ce-ignore-sum": Loss(ce(ignore_index=0, reduction="sum"), classes),
    "ce-smooth": Loss(ce(label_smoothing=0.2), classes),
    "ce-everything": Loss(ce(**everything), classes),
    "ce-everything-sum": Loss(ce(**everything, reduction="sum"), classes),
    "ce-probabilities": Loss(F.cross_entropy, probabilities),
    "ce-probabilities-weight": Loss(ce(weighted=True, label_smoothing=0.1), probabilities),
    "ce-rows-mean": Loss(lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), classes),
    "ce-rows-weighted": Loss(
        lambda z, y: (F.cross_entropy(z, y[0], reduction="none") * y[1]).mean(),
        lambda z: (classes(z), torch.rand(classes(z).shape)),
    ),
    "nll": Loss(lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), classes),
    "nll-everything": Loss(nll, classes),
    "nll-sum": Loss(lambda z, y: nn.NLLLoss(reduction="sum")(nn.LogSoftmax(1)(z), y), classes),
    "mse": Loss(F.mse_loss, torch.randn_like),
    "mse-sum": Loss(lambda z, y: F.mse_loss(z, y, reduction="sum"), torch.randn_like),
    "mse-module": Loss(nn.MSELoss(), torch.randn_like),
    "mse-rows-sum": Loss(lambda z, y: F.mse_loss(z, y, reduction="none").sum(), torch.randn_like),
    "mse-rows-mean": Loss(
        lambda z, y: F.mse_loss(z, y, reduction="none").sum(1).mean(), torch.randn_like
    ),
    "bce": Loss(F.binary_cross_entropy_with_logits, binary),
    "bce-sum": Loss(nn.BCEWithLogitsLoss(reduction="sum"), torch.rand_like),
    "bce-weights": Loss(bce, binary),
    "bce-sample-weights": Loss(
        lambda z, y: F.binary_cross_entropy_with_logits(z, y[0], weight=y[1]),
        lambda z: (binary(z), torch.rand_like(z)),
    ),
    "scaled": Loss(lambda z, y: 0.5 * F.cross_entropy(z, y), classes),
    "scaled-rest": Loss(lambda z, y: 3 - F.mse_loss(z, y) * -2.0 / 5, torch.randn_like),
    "two-terms": Loss(
        lambda z, y: F.cross_entropy(z, y[0]) + 0.3 * F.mse_loss(z, y[1], reduction="sum"),
        lambda z: (classes(z), torch.randn_like(z)),
    ),
    "tokens": Loss(
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), lambda z: classes(z.mT)
    ),
    "heads": Loss(
        lambda z, y: F.cross_entropy(z[0], y[0]) + 2 * F.mse_loss(z[1], y[1]),
        lambda z: (classes(z[0]), torch.randn_like(z[1])),
    ),
}

ANY = [loss for loss in LOSSES if loss not in ("tokens", "heads")]  # go with any model
FLAT = ("linear-squeezed", "matmul-vector")  # outputs [N]: no classes

TWO = ("ce", "mse-sum")

CASES = [  # every model with two losses, every loss with two models
    *(Case(m, loss) for m in MODELS if m not in (*FLAT, "heads") for loss in TWO),
    *(Case(m, loss) for m in FLAT for loss in ("mse", "bce", "bce-weights")),
    *(Case(m, loss) for loss in ANY if loss not in TWO for m in ("mlp-tanh", "conv1d-groups")),
    Case("tokens-mlp", "tokens"),
    Case("heads", "heads"),
]
