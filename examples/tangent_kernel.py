"""The neural tangent kernel of a small network, and what it says about training.

    python examples/tangent_kernel.py             # writes kernel.png into --out

The kernel `K[n, c, m, d] = <d f_nc, d f_md>` tells how a gradient step on sample m moves the output
of sample n. Under a square loss and a small learning rate the residual shrinks along its
eigenvectors, each at the rate of its eigenvalue. The kernel comes from the factors of each layer's
per-sample Jacobian; the Jacobian itself is formed only where that is cheaper.
"""

import argparse
import time
from pathlib import Path

import torch
from compare import agree
from matplotlib.figure import Figure
from torch import Tensor, nn

import curvopt


def plain_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel from one backward pass per output."""
    fs, params = model(x), list(model.parameters())
    rows = [torch.autograd.grad(f, params, retain_graph=True) for f in fs.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return (J @ J.T).view(*fs.shape, *fs.shape)


def gradient_descent(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
    """Residuals of the summed square loss `|f - y|^2 / 2`, step by step."""
    residuals = []
    for _ in range(steps + 1):
        residual = model(x) - y
        residuals.append(residual.detach().flatten())
        grads = torch.autograd.grad(residual.square().sum() / 2, list(model.parameters()))
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads, strict=True):
                p -= lr * grad
    return torch.stack(residuals)


def main() -> None:
    """Computes the kernel, predicts training with it, draws both, compares."""
    parser = argparse.ArgumentParser(description="The neural tangent kernel of a small network.")
    parser.add_argument("--out", type=Path, default="runs", help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="a narrower network, as a check")
    args = parser.parse_args()

    torch.manual_seed(0)
    width, steps = (64, 20) if args.smoke else (2048, 200)
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()
    x = torch.linspace(-2, 2, 20, dtype=torch.float64).unsqueeze(1)
    y = torch.sin(2 * x)

    curvopt.empirical_ntk(lambda: model(x[:2]), model.parameters())  # torch loads what it needs
    start = time.perf_counter()
    kernel = curvopt.empirical_ntk(lambda: model(x), model.parameters())
    middle = time.perf_counter()
    truth = plain_autograd(model, x)
    print(f"kernel {middle - start:.4f} s, plain autograd {time.perf_counter() - middle:.4f} s")
    agree(f"kernel {list(kernel.shape)}", kernel, truth)

    matrix = kernel.reshape(len(x), len(x))
    values, vectors = torch.linalg.eigh(matrix)
    lr = (0.1 / values[-1]).item()
    residuals = gradient_descent(model, x, y, lr, steps)
    decay = (1 - lr * values) ** torch.arange(steps + 1).unsqueeze(1)
    predicted = (decay * (residuals[0] @ vectors)) @ vectors.T
    norms = [r.norm(dim=1) for r in (residuals, predicted)]
    print(f"residual after {steps} steps: {norms[0][-1]:.4f}, the kernel says {norms[1][-1]:.4f}")

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(matrix, extent=(-2, 2, 2, -2))
    left.set(xlabel="x", ylabel="x'", title="tangent kernel")
    figure.colorbar(image, label="K(x, x')")
    right.plot(norms[0], label="gradient descent")
    right.plot(norms[1], "--", label="predicted by the kernel")
    right.set(
        xlabel="step", ylabel="norm of the residual", title="training, and what the kernel says"
    )
    right.legend(frameon=False)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "kernel.png", dpi=150)
    print(f"picture: {args.out / 'kernel.png'}")


if __name__ == "__main__":
    main()
