"""Derivatives of a network's outputs in its inputs, sample by sample, and a loss made of them.

    python examples/physics_informed.py           # writes physics.png into --out

`torch.autograd.functional.jacobian(u, x)` of N points gives N x N blocks, of which all but the
diagonal are zero. `batch_jacobian`, `batch_hessian` and `batch_hessian_diag` compute the diagonal
blocks alone, and with `create_graph=True` a loss trains through them.

The equation: u'' = -pi^2 sin(pi x) on [-1, 1] with u(-1) = u(1) = 0, solved by u = sin(pi x).
"""

import argparse
import math
from pathlib import Path

import torch
from compare import agree
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import curvopt


def residual(u: nn.Module, x: Tensor) -> Tensor:
    """How far u is from the equation, at every point."""
    second = curvopt.batch_hessian_diag(u, x, create_graph=True).view_as(x)
    return second + math.pi**2 * torch.sin(math.pi * x)


def fit(u: nn.Module, steps: int) -> list[float]:
    """Trains on the equation's residual and the boundary values; no solution is shown."""
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).unsqueeze(1)
    ends = x[[0, -1]]
    optimizer = torch.optim.LBFGS(u.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = residual(u, x).square().mean() + 100 * u(ends).square().mean()
        loss.backward()
        return loss

    for _ in tqdm(range(steps), "steps", leave=False):
        losses.append(optimizer.step(closure).item())
    return losses


def draw(u: nn.Module, losses: list[float], path: Path) -> None:
    x = torch.linspace(-1, 1, 200, dtype=torch.float64).unsqueeze(1)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, torch.sin(math.pi * x), color="0.6", linewidth=4, label="solution")
    left.plot(x, u(x).detach(), "--", color="C3", label="network")
    left.set(xlabel="x", ylabel="u(x)", title="the solution found")
    left.legend(frameon=False)
    right.semilogy(losses)
    right.set(xlabel="steps of L-BFGS", ylabel="loss: residual and boundary", title="training")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def check() -> None:
    """Three derivatives of a network of several inputs and outputs, and their own gradients."""
    torch.manual_seed(1)
    f = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def single(derivative, x: Tensor) -> Tensor:
        return torch.stack([derivative(lambda a: f(a[None])[0], a) for a in x])

    def jacobian(g, a):
        return torch.autograd.functional.jacobian(g, a, create_graph=True)

    def hessian(g, a):
        return jacobian(lambda b: jacobian(g, b), a)

    H = single(hessian, x)
    truths = (
        (curvopt.batch_jacobian, single(jacobian, x)),
        (curvopt.batch_hessian, H),
        (curvopt.batch_hessian_diag, H.diagonal(dim1=-2, dim2=-1)),
    )
    params = list(f.parameters())
    for function, truth in truths:
        ours = function(f, x, create_graph=True)
        agree(f"{function.__name__} {list(ours.shape)}", ours.detach(), truth.detach())
        slopes = [
            torch.autograd.grad(
                value.square().sum(), params, retain_graph=True, materialize_grads=True
            )
            for value in (ours, truth)
        ]
        for a, b in zip(*slopes, strict=True):
            agree(f"  gradient of a loss of it {list(b.shape)}", a, b)


def main() -> None:
    """Fits the equation, draws the fit, compares the derivatives."""
    parser = argparse.ArgumentParser(description="Batch-respecting derivatives in the inputs.")
    parser.add_argument("--out", type=Path, default="runs", help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="fewer steps, as a check")
    args = parser.parse_args()

    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    u = u.double()
    losses = fit(u, 2 if args.smoke else 30)
    x = torch.linspace(-1, 1, 200, dtype=torch.float64).unsqueeze(1)
    error = (u(x) - torch.sin(math.pi * x)).abs().max().item()
    print(f"loss {losses[0]:.2e} -> {losses[-1]:.2e}; largest error of the solution {error:.1e}")

    args.out.mkdir(parents=True, exist_ok=True)
    draw(u, losses, args.out / "physics.png")
    print(f"picture: {args.out / 'physics.png'}")
    check()


if __name__ == "__main__":
    main()
