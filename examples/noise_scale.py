"""The gradient noise scale while training: how large a batch is worth its samples.

    python examples/noise_scale.py                # writes noise_scale.png into --out

The noise scale, the variance of the samples' gradients over the squared gradient, says at what
batch size noise and signal are even (McCandlish et al. 2018, arXiv 1812.06162): much smaller
batches are mostly noise, much larger ones waste samples. The usual estimate compares gradients of
batches of two sizes and is noisy; `VarianceAdaptiveSGD` measures the variance within each batch
anyway. The truth beside it, now and then, comes from the gradients of thousands of samples at once.
"""

import argparse
from pathlib import Path

import torch
from compare import agree
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import curvopt
from curvopt.datasets import mnist


def noise_scale(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of many samples: the mean of |g_n|^2 is |G|^2 and the variance's trace together."""
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    result = curvopt.compute(closure, model.parameters(), curvopt.BatchL2Grad(), curvopt.Gradient())
    lengths = sum(result.batch_l2.values()).mean()
    length, n = sum(g.square().sum() for g in result.grad.values()), len(x)
    trace = n / (n - 1) * (lengths - length)
    return (trace / (length - trace / n)).item()


def noise_scale_by_loops(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The same, from batches of one."""
    params, rows = list(model.parameters()), []
    for image, label in zip(x.split(1), y.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(image), label), params)
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows)
    trace = rows.var(0).sum()
    return (trace / (rows.mean(0).square().sum() - trace / len(x))).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The gradient noise scale while training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=3, help="over the 60,000 images")
    parser.add_argument("--batch-size", type=int, default=128, help="of a step")
    parser.add_argument("--many", type=int, default=4096, help="samples that tell the truth")
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs", help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a check")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = mnist(args.data_dir)
    x, y = data.train_images, data.train_labels
    if args.smoke:
        x, y, args.epochs, args.many = x[:512], y[:512], 1, 64
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    opt = curvopt.VarianceAdaptiveSGD(model.named_parameters(), lr=0.05, noise_decay=0.95)

    wide = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    few = x[:32].double(), y[:32]
    ours, truth = noise_scale(wide, *few), noise_scale_by_loops(wide, *few)
    agree("noise scale of 32 samples", torch.tensor(ours), torch.tensor(truth))

    batches = [b for _ in range(args.epochs) for b in torch.randperm(len(x)).split(args.batch_size)]
    every = max(1, len(batches) // 20)
    steps, measured, at, true = [], [], [], []
    for step, batch in enumerate(tqdm(batches, "steps", leave=False)):
        opt.step(lambda b=batch: F.cross_entropy(model(x[b]), y[b]))
        if step % 10 == 0:
            steps.append(step)
            measured.append(opt.stats(per_tensor=False)["noise/scale"])
        if step % every == 0:
            at.append(step)
            true.append(noise_scale(model, x[: args.many], y[: args.many]))
    print(f"noise scale at the beginning {true[0]:.0f}, at the end {true[-1]:.0f} samples")

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, measured, label=f"measured within batches of {args.batch_size}, averaged")
    axes.plot(at, true, "ko", markersize=5, label=f"from {args.many:,} samples at once")
    axes.axhline(args.batch_size, color="grey", linestyle=":", label="the batch size")
    axes.set(xlabel="step", ylabel="noise scale, samples", yscale="log", title="MNIST, an MLP")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "noise_scale.png", dpi=150)
    print(f"curves: {args.out / 'noise_scale.png'}")


if __name__ == "__main__":
    main()
