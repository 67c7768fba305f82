"""The gradient of the gradient's variance: training for gradients on which the samples agree.

    python examples/variance_gradient.py          # linear model, MLP and CNN on MNIST

With `create_graph=True` every quantity is differentiable. The variance of the per-sample gradients,
summed over all elements, is a number like any loss: its gradient needs no more than `backward()`.
"""

import argparse
import time

import torch
from compare import agree
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import curvopt
from curvopt.datasets import mnist

MODELS = {
    "linear model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10)),
    "small CNN": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(200, 10),
    ),
}


def total_variance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The trace of the covariance of the per-sample gradients, attached to the parameters."""
    result = curvopt.compute(
        lambda: F.cross_entropy(model(x), y),
        model.parameters(),
        curvopt.Variance(),
        create_graph=True,
    )
    return sum(v.sum() for v in result.variance.values())


def plain_autograd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same from a loop over samples."""
    params = list(model.parameters())
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, params, create_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).var(0, correction=0).sum()


def main() -> None:
    """Compares the gradients, then follows one of them."""
    parser = argparse.ArgumentParser(description="Gradients of the gradient variance.")
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--batch-size", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--steps", type=int, default=20, help="with the penalty (default: 20)")
    parser.add_argument("--smoke", action="store_true", help="a small batch, as a check")
    args = parser.parse_args()
    if args.smoke:
        args.batch_size, args.steps = 4, 2

    data = mnist(args.data_dir)
    x = data.train_images[: args.batch_size].double()
    y = data.train_labels[: args.batch_size]
    print(f"{len(x)} images of {data.source}")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().double()
        params = list(model.parameters())
        total_variance(model, x[:2], y[:2])  # torch loads what it needs
        gradients, seconds = [], []
        for function in (total_variance, plain_autograd):
            start = time.perf_counter()
            value = function(model, x, y)
            slopes = torch.autograd.grad(value, params, materialize_grads=True)
            gradients.append(torch.cat([slope.flatten() for slope in slopes]))
            seconds.append(time.perf_counter() - start)
        print(f"{name}: {seconds[0]:.3f} s, a loop over samples {seconds[1]:.3f} s")
        agree("  gradient of the total variance", *gradients)

    # A penalty on the variance, with any optimizer: here on the small CNN.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in tqdm(range(args.steps), "steps", leave=False):
        optimizer.zero_grad()
        variance = total_variance(model, x, y)
        loss = F.cross_entropy(model(x), y)
        (loss + 0.01 * variance).backward()
        optimizer.step()
        if step in (0, args.steps - 1):
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f}, variance {variance.item():.3f}")


if __name__ == "__main__":
    main()
