"""The Jacobian of a whole batch in the parameters, three ways.

    python examples/batched_jacobians.py          # writes jacobian.png into --out

A network maps N samples to outputs `fs` of shape [N, C]. Its Jacobian in a parameter p has shape
[N, C, *p.shape]. Plain autograd needs N * C backward passes for it; samples do not interact, so C
columns, sent back for all samples at once, are enough.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compare import agree
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import curvopt

Jacobian = dict[Tensor, Tensor]


def one_batched_pass(model: nn.Module, x: Tensor) -> Jacobian:
    """First way: the function made for it."""
    return dict(curvopt.param_jacobian(lambda: model(x), model.parameters()))


def root_of_a_loss(model: nn.Module, x: Tensor) -> Jacobian:
    """Second way: under a summed square loss, H = 2 I, and the GGN's root is sqrt(2) J.

    Any other quantity of that loss shares the forward pass.
    """

    def closure() -> Tensor:
        fs = model(x)
        return F.mse_loss(fs, torch.zeros_like(fs), reduction="sum")

    roots = curvopt.compute(closure, model.parameters(), curvopt.SqrtGGNExact()).sqrt_ggn_exact
    return {p: root.transpose(0, 1) / 2**0.5 for p, root in roots.items()}


def output_by_output(model: nn.Module, x: Tensor) -> Jacobian:
    """Third way: the sum over samples of output c has per-sample gradients that are its rows."""
    rows = []
    for c in range(model(x).shape[1]):

        def closure(c: int = c) -> Tensor:
            return model(x)[:, c].sum()

        result = curvopt.compute(closure, model.parameters(), curvopt.BatchGrad())
        rows.append(result.batch_grad)
    return {p: torch.stack([row[p] for row in rows], 1) for p in model.parameters()}


def plain_autograd(model: nn.Module, x: Tensor) -> Jacobian:
    """One backward pass per sample and output."""
    fs, params = model(x), list(model.parameters())
    rows = [torch.autograd.grad(f, params, retain_graph=True) for f in fs.flatten()]
    stacks = zip(params, zip(*rows, strict=True), strict=True)
    return {p: torch.stack(part).view(*fs.shape, *p.shape) for p, part in stacks}


def draw(jacobian: Jacobian, names: list[str], path: Path) -> None:
    """Draws the Jacobian, a panel per parameter: a row per output of a sample.

    The colours reach to the largest derivative; most are far smaller, so the scale is logarithmic
    beyond a hundredth of it.
    """
    parts = [j.flatten(2).flatten(0, 1) for j in jacobian.values()]
    bound = max(part.abs().max().item() for part in parts)
    norm = SymLogNorm(bound / 100, vmin=-bound, vmax=bound)
    figure = Figure(figsize=(9, 4), layout="constrained")
    widths = [part.shape[1] ** 0.5 for part in parts]
    panels = figure.subplots(1, len(parts), sharey=True, width_ratios=widths)
    for axes, part, name in zip(panels, parts, names, strict=True):
        image = axes.imshow(part, aspect="auto", cmap="RdBu", norm=norm, interpolation="nearest")
        axes.set(xticks=[], xlabel=f"{part.shape[1]}")
        axes.set_title(name, fontsize=9)
    outputs = next(iter(jacobian.values())).shape[1]
    ticks = range(0, len(parts[0]), 2 * outputs)
    panels[0].set_yticks(ticks, [f"sample {t // outputs}" for t in ticks])
    figure.colorbar(image, ax=panels, label="derivative of an output")
    figure.suptitle(f"A row for each of the {outputs} outputs of a sample", fontsize=11)
    figure.supxlabel("elements of the parameter", fontsize=10)
    figure.savefig(path, dpi=150)


WAYS: dict[str, Callable[[nn.Module, Tensor], Jacobian]] = {
    "one batched pass": one_batched_pass,
    "root of a loss": root_of_a_loss,
    "output by output": output_by_output,
}


def main() -> None:
    """Computes the Jacobian in all ways, times them, draws it, compares."""
    parser = argparse.ArgumentParser(description="Batched Jacobians in the parameters.")
    parser.add_argument("--out", type=Path, default="runs", help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="a smaller batch, as a check")
    args = parser.parse_args()

    torch.manual_seed(0)
    samples = 4 if args.smoke else 16
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 5)
    ).double()
    x = torch.rand(samples, 1, 8, 8, dtype=torch.float64)

    start = time.perf_counter()
    truth = plain_autograd(model, x)
    print(f"plain autograd: {1e3 * (time.perf_counter() - start):.1f} ms")
    for name, way in WAYS.items():
        way(model, x)
        start = time.perf_counter()
        jacobian = way(model, x)
        print(f"{name}: {1e3 * (time.perf_counter() - start):.1f} ms")
        for (parameter, p), rows in zip(model.named_parameters(), truth.values(), strict=True):
            agree(f"  {parameter} {list(jacobian[p].shape)}", jacobian[p], rows)

    layers = {name: type(layer).__name__ for name, layer in model.named_children()}
    names = [f"{name} ({layers[name[0]]})" for name, _ in model.named_parameters()]
    args.out.mkdir(parents=True, exist_ok=True)
    draw(truth, names, args.out / "jacobian.png")
    print(f"picture: {args.out / 'jacobian.png'}")


if __name__ == "__main__":
    main()
