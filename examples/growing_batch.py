"""Trains on MNIST with batches that grow as the gradient's noise asks for it.

    python examples/growing_batch.py                 # the noise scale decides
    python examples/growing_batch.py --rule norm     # the norm test; or inner, cabs
    python examples/growing_batch.py --rule none     # batches stay as they are, to compare

Early on, small batches point the way well enough; later, when the gradient vanishes and its noise
does not, larger ones pay. `opt.noise` tells when, from the variance that the optimizer measures
anyway.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import curvopt
from curvopt.datasets import mnist
from curvopt.optim import Noise

MOMENTUM = 0.9
# The batch size that each rule asks for.
RULES: dict[str, Callable[[Noise], float]] = {
    "scale": lambda noise: noise.scale,  # noise and signal even
    "norm": lambda noise: noise.batch_size * noise.norm_test / 0.5**2,
    "inner": lambda noise: noise.batch_size * (noise.inner_product_test or 0.0) / 0.9**2,
    "cabs": lambda noise: noise.cabs / (1 - MOMENTUM),  # momentum multiplies the rate
    "none": lambda noise: noise.batch_size,
}


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    hits = [
        (model(x).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return sum(hits).item() / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Trains on MNIST with growing batches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rule", choices=RULES, default="scale", help="which number decides")
    parser.add_argument("--epochs", type=int, default=4, help="over the images")
    parser.add_argument("--batch-size", type=int, default=32, help="of the first step")
    parser.add_argument("--largest", type=int, default=1024, help="the largest batch size")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--smoke", action="store_true", help="one epoch of 512 images, as a check")
    args = parser.parse_args()

    data = mnist(args.data_dir)
    images, labels = data.train_images, data.train_labels
    test_images, test_labels = data.test_images, data.test_labels
    if args.smoke:
        args.epochs = 1
        images, labels, test_images, test_labels = (
            part[:512] for part in (images, labels, test_images, test_labels)
        )

    torch.manual_seed(args.seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = curvopt.VarianceAdaptiveSGD(
        model.parameters(),
        lr=args.lr,
        momentum=MOMENTUM,
        noise_tests=args.rule == "inner",
        noise_decay=0.98,
    )
    size, steps, start = args.batch_size, 0, time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        order, at, losses = torch.randperm(len(labels)), 0, []
        progress = tqdm(total=len(labels), desc=f"epoch {epoch}", unit="images", leave=False)
        while at < len(labels):
            batch = order[at : at + size]
            at, steps = at + size, steps + 1
            progress.update(len(batch))
            x, y = images[batch], labels[batch]
            losses.append(optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y)).detach())
            # The averages behind `noise` need some measurements; then, doubling at most.
            if steps % 100 == 0 and RULES[args.rule](optimizer.noise) > size:
                size = min(2 * size, args.largest)
        progress.close()
        scale = optimizer.noise.scale
        print(
            f"epoch {epoch}/{args.epochs}: batches of {size}, noise scale "
            f"{'unknown' if math.isinf(scale) else round(scale)}, {steps} steps so far, "
            f"training loss {torch.stack(losses).mean():.4f}, "
            f"test accuracy {evaluate(model, test_images, test_labels):.2%}, "
            f"{time.perf_counter() - start:.1f} s"
        )


if __name__ == "__main__":
    main()
