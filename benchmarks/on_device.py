"""On an accelerator as on the CPU, in float64: quantities, and steps of all optimizers.

python benchmarks/on_device.py --device cuda    # `results/on_device.json` and `.md`
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import harness
import torch
from problems import Transformer, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import curvopt

AGREES = 1e-8  # a difference, in the norm of the CPU's numbers
STEPS = 6
QUANTITIES: dict[str, Callable[[], Any]] = {
    "BatchGrad": curvopt.BatchGrad,
    "BatchL2Grad": curvopt.BatchL2Grad,
    "Variance": curvopt.Variance,
    "SumGradSquared": curvopt.SumGradSquared,
    "ClippedGradSum": lambda: curvopt.ClippedGradSum(0.1),
    "DiagGGNExact": curvopt.DiagGGNExact,
}
quiet = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "expected_batch_size": 8}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "VarianceAdaptiveSGD": lambda p: curvopt.VarianceAdaptiveSGD(p, 0.01, variance_every=2),
    "DiagGGNOptimizer": lambda p: curvopt.DiagGGNOptimizer(p, curvature_every=2, estimator="exact"),
    "PolarOptimizer": lambda p: curvopt.PolarOptimizer(p, curvature_every=STEPS),
    "DPSGD": lambda p: curvopt.DPSGD(p, lr=0.1, **quiet),
    "DPAdam": lambda p: curvopt.DPAdam(p, **quiet),
}


def convolutional() -> nn.Sequential:
    """A small convolutional network, with group norm."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)),
    )


def draw(*shape: int) -> Tensor:
    return torch.randn(8, *shape, dtype=torch.float64)


# Of each: the model, its inputs, the number of targets.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "MLP": (lambda: mlp(6, 7, 5), lambda: draw(6), 8),
    "convolutions": (convolutional, lambda: draw(2, 8, 8), 8),
    "transformer": (
        lambda: Transformer(vocabulary=5, length=4, width=8, depth=1, heads=2),
        lambda: torch.randint(5, (8, 4)),
        32,
    ),
    "LSTM": (lambda: Last(nn.LSTM(3, 5, batch_first=True)), lambda: draw(4, 3), 8),
}


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


def apart(ours: Tensor, reference: Tensor) -> float:
    """A difference in units of the reference."""
    ours, reference = ours.detach().cpu().flatten(), reference.detach().flatten()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))


def of_quantity(make: Callable[[], Any], model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    quantity = make()
    result = curvopt.compute(lambda: F.cross_entropy(model(x), y), model.parameters(), quantity)
    values = getattr(result, quantity.field)
    return [values[p] for p in model.parameters()]


def of_steps(make: Any, model: nn.Module, x: Tensor, y: Tensor, compiled: bool) -> list[Tensor]:
    opt = make(model.parameters())
    if compiled:
        step = curvopt.compile(opt, lambda x, y: F.cross_entropy(model(x), y), compare=False)
    for _ in range(STEPS):
        if compiled:
            step(x, y)
        else:
            opt.step(lambda: F.cross_entropy(model(x), y))
    return [p.detach() for p in model.parameters()]


def measure(device: torch.device, *, compiled: list[str]) -> dict[str, dict[str, float | str]]:
    """By model and by what was computed, how far the device is from the CPU; or the error."""
    found: dict[str, dict[str, float | str]] = {}
    for title, (build, inputs, targets) in MODELS.items():
        torch.manual_seed(0)
        model, x, y = build().double(), inputs(), torch.randint(5, (targets,))
        jobs: dict[str, Callable[..., list[Tensor]]] = {
            name: lambda *given, make=make: of_quantity(make, *given)
            for name, make in QUANTITIES.items()
        }
        jobs |= {
            name: lambda *given, make=make: of_steps(make, *given, compiled=False)
            for name, make in OPTIMIZERS.items()
        }
        found[title] = {}
        for name, job in jobs.items():
            if name == "PolarOptimizer" and title == "transformer":
                continue  # its tables are measured by random signs, which a device draws otherwise
            reference = job(copy.deepcopy(model), x, y)
            runs = {name: job}
            if title in compiled and name in OPTIMIZERS:
                runs[f"{name}, compiled"] = lambda *given, make=OPTIMIZERS[name]: of_steps(
                    make, *given, compiled=True
                )
            for label, run in runs.items():
                try:
                    ours = run(copy.deepcopy(model).to(device), x.to(device), y.to(device))
                    pairs = zip(ours, reference, strict=True)
                    found[title][label] = max(apart(a, b) for a, b in pairs)
                except Exception as error:  # to be seen with all others
                    found[title][label] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(title, label, found[title][label], flush=True)
    return found


def report(result: dict[str, Any]) -> str:
    """The table, as Markdown."""
    models = result["models"]
    names = list(dict.fromkeys(name for values in models.values() for name in values))

    def cell(value: float | str | None) -> str:
        return "" if value is None else value if isinstance(value, str) else f"{value:.0e}"

    rows = [[name, *(cell(values.get(name)) for values in models.values())] for name in names]
    return "\n\n".join(
        [
            "# On a device, against the CPU",
            harness.sentence(result["machine"]),
            "Differences in float64, in the norm of the CPU's numbers: of quantities, and of the "
            f"parameters after {STEPS} steps.",
            harness.table(["", *models], rows),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Compares, writes `on_device.json` and `on_device.md`, and fails where they differ."""
    parser = harness.arguments(__doc__, rounds=1, problems=MODELS)
    args = parser.parse_args(argv)
    harness.pin(args.threads, args.seed)
    compiled = args.problem or ["MLP"]
    result: dict[str, Any] = {"machine": harness.machine(args.seed)}
    result["models"] = measure(torch.device(args.device), compiled=compiled)
    harness.save(args.out, "on_device", result, report(result))
    values = [value for part in result["models"].values() for value in part.values()]
    bad = [value for value in values if isinstance(value, str) or value > AGREES]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(values)} differ or failed")


if __name__ == "__main__":
    main()
