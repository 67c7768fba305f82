"""Jacobians and Hessian diagonals of a network in its inputs, as batch and outputs grow.

python benchmarks/jacobians.py [--quick] [--problem jacobian] [--rounds 20]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import matplotlib
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, FUNC, FUNCTIONAL, PLAIN = "curvopt", "torch.func", "torch.autograd.functional", "plain"
COLOURS = {OURS: "#d62728", FUNC: "#1f6fd6", FUNCTIONAL: "#888888"}
INPUTS, WIDTH = 8, 64
SIZES = {"N": (4, 16, 64, 256), "outputs": (1, 4, 16, 64)}  # each grows while the other stays
FIXED = {"N": 16, "outputs": 4}
BLOCKS = 1 << 24  # numbers in the N x N blocks: the most that torch.autograd.functional is given

Function = Callable[[Tensor], Tensor]
Derivative = Callable[[Function, Tensor], Tensor]


def network(outputs: int) -> nn.Sequential:
    """A smooth network, as for a physics-informed fit."""
    return nn.Sequential(
        *(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()),
        nn.Linear(WIDTH, outputs),
    )


def one(f: Function) -> Function:
    """`f` for a single sample."""
    return lambda x: f(x[None])[0]


def functional_jacobian(f: Function, x: Tensor) -> Tensor:
    """All N x N blocks, of which the diagonal ones are wanted."""
    blocks = torch.autograd.functional.jacobian(f, x, vectorize=True)
    return torch.einsum("nond->nod", blocks)


def functional_diagonal(f: Function, x: Tensor) -> Tensor:
    """The Jacobian of the gradient of each output, summed over the samples."""

    def gradient(x: Tensor, output: int) -> Tensor:
        return torch.autograd.grad(f(x)[:, output].sum(), x, create_graph=True)[0]

    columns = [
        torch.autograd.functional.jacobian(lambda x, o=o: gradient(x, o), x, vectorize=True)
        for o in range(f(x).shape[1])
    ]
    return torch.stack([torch.einsum("ndnd->nd", blocks) for blocks in columns], dim=1)


def func_jacobian(f: Function, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(one(f)))(x)


def func_diagonal(f: Function, x: Tensor) -> Tensor:
    """The diagonal of each sample's whole Hessian."""
    return torch.func.vmap(torch.func.hessian(one(f)))(x).diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True)
class Problem:
    """A derivative, and who computes it."""

    title: str
    ours: str
    rivals: dict[str, Derivative]

    def derivatives(self) -> dict[str, Derivative]:
        mine = harness.find(self.ours)
        return {**({OURS: mine} if mine else {}), **self.rivals}


PROBLEMS = {
    "jacobian": Problem(
        "Jacobian in the inputs",
        "curvopt.batch_jacobian",
        {FUNC: func_jacobian, FUNCTIONAL: functional_jacobian},
    ),
    "hessian_diag": Problem(
        "Hessian diagonal in the inputs",
        "curvopt.batch_hessian_diag",
        {FUNC: func_diagonal, FUNCTIONAL: functional_diagonal},
    ),
}


def measure(
    problem: Problem, size: dict[str, int], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Compares and times one problem at one size."""

    def build() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = network(size["outputs"]).to(device)
        return model, torch.randn(size["N"], INPUTS).to(device).requires_grad_()

    def plain() -> harness.Variant:
        model, x = build()
        return lambda: torch.autograd.grad(model(x).sum(), x)

    def start(derivative: Derivative) -> harness.Start:
        def begin() -> harness.Variant:
            model, x = build()
            return lambda: derivative(model, x)

        return begin

    blocks = size["N"] ** 2 * size["outputs"] * INPUTS
    starts = {
        library: start(derivative)
        for library, derivative in problem.derivatives().items()
        if library != FUNCTIONAL or blocks <= BLOCKS
    }
    values = [begin()() for begin in starts.values()]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-3, atol=1e-5)
    return harness.measure({PLAIN: plain, **starts}, PLAIN, rounds, device)


def report(result: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    parts = [
        "# Derivatives in the inputs, in plain gradients",
        harness.sentence(result["machine"]),
        f"A network {INPUTS}-{WIDTH}-{WIDTH}-outputs with tanh; one plain gradient is that of the "
        "summed outputs.",
    ]
    libraries = list(COLOURS)
    for name, runs in result["problems"].items():
        rows = []
        for run in runs:
            cells = [run["variants"].get(library) for library in libraries]
            rows.append(
                [
                    f"N = {run['N']}, {run['outputs']} outputs",
                    *(f"{cell['ratio']:.1f}" if cell else "" for cell in cells),
                    *(f"{cell['peak_bytes'] / 1e6:.2f}" if cell else "" for cell in cells),
                ]
            )
        header = ["size", *libraries, *(f"MB, {library}" for library in libraries)]
        parts += [f"## {PROBLEMS[name].title}", harness.table(header, rows)]
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """Time against N and against the number of outputs."""
    problems = result["problems"]
    figure, axes = plt.subplots(
        len(problems), 2, figsize=(7.5, 2.7 * len(problems) + 0.4), sharey="row", squeeze=False
    )
    for row, (name, runs) in enumerate(problems.items()):
        for ax, axis in zip(axes[row], SIZES, strict=True):
            line = [run for run in runs if run["grows"] == axis]
            for library, colour in COLOURS.items():
                points = [
                    (run[axis], 1e3 * run["variants"][library]["seconds"])
                    for run in line
                    if library in run["variants"]
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    ax.plot(x, y, "o-", color=colour, label=library, markersize=4)
            ax.set(xscale="log", yscale="log", xlabel=axis, xticks=SIZES[axis])
            ax.set_xticklabels(SIZES[axis])
            ax.minorticks_off()
            ax.grid(color="#e6e6e6", linewidth=0.7)
            ax.spines[["top", "right"]].set_visible(False)
            other = next(name for name in FIXED if name != axis)
            ax.set_title(f"{PROBLEMS[name].title}, {other} = {FIXED[other]}", fontsize=9)
        axes[row, 0].set_ylabel("ms")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Measures the chosen derivatives; writes `jacobians.json`, `.md` and `.png`."""
    args = harness.arguments(__doc__, rounds=15, problems=PROBLEMS).parse_args(argv)
    harness.pin(args.threads, args.seed)
    rounds = 3 if args.quick else args.rounds
    result: dict[str, Any] = {"machine": harness.machine(args.seed), "rounds": rounds}
    result["problems"] = {
        name: [
            {"grows": axis, **size, "variants": measure(PROBLEMS[name], size, rounds, device)}
            for axis, values in SIZES.items()
            for size in ({**FIXED, axis: value} for value in values)
            for device in (torch.device(args.device),)
        ]
        for name in args.problem or PROBLEMS
    }
    harness.save(args.out, "jacobians", result, report(result))
    draw(result, args.out / "jacobians.png")


if __name__ == "__main__":
    main()
