"""Trains a network on MNIST with differential privacy.

    python examples/private_mnist.py                          # epsilon 3, delta 1e-5
    python examples/private_mnist.py --epsilon 1 --epochs 10

Writes `private_mnist.png` (accuracy against epsilon), `private_mnist.json` (the same as numbers)
and `private_mnist.txt` (the report) into `--out`.

The network has tanh where others have ReLU: its activations, and so the gradients, stay small, and
clipping loses less of them (Papernot et al. 2021, arXiv 2007.14191).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import curvopt
from curvopt.datasets import Digits, mnist
from curvopt.errors import CurvoptError
from curvopt.privacy import PoissonBatchSampler, calibrate_noise, micro_batches


def network() -> nn.Module:
    """26 010 parameters: few, as each of them gets noise."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, stride=1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, stride=1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images that the model classifies correctly."""
    hits = [
        (model(x).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return sum(hits).item() / len(labels)


def train(
    data: Digits, args: argparse.Namespace
) -> tuple[curvopt.DPSGD, list[dict[str, float]], float]:
    """Trains until the budget is spent; returns the optimizer, epsilon and accuracy, seconds."""
    torch.manual_seed(args.seed)
    model = network().to(args.device)
    images, labels = data.train_images.to(args.device), data.train_labels.to(args.device)
    test = data.test_images.to(args.device), data.test_labels.to(args.device)

    sampler = PoissonBatchSampler(len(labels), expected_batch_size=args.batch_size)
    noise = calibrate_noise(
        args.epsilon, args.delta, sampler.sample_rate, args.epochs * len(sampler), tolerance=1e-3
    )
    optimizer = curvopt.DPSGD(
        model.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        noise_multiplier=noise,
        max_grad_norm=args.max_grad_norm,
        expected_batch_size=args.batch_size,
        sampler=sampler,
    )

    def step(batch: list[int]) -> None:
        def closure() -> None:
            for x, y in micro_batches((images[batch], labels[batch]), args.physical_batch_size):
                F.cross_entropy(model(x), y).backward()

        optimizer.step(closure)

    curve, seconds = [], 0.0
    with tqdm(total=args.epochs * len(sampler), unit="step") as bar:
        for _ in range(args.epochs):
            start = time.perf_counter()
            for batch in sampler:  # an empty one is a step as well
                step(batch)
                bar.update()
            seconds += time.perf_counter() - start
            point = {
                "epsilon": optimizer.privacy_spent(args.delta),
                "accuracy": accuracy(model, *test),
            }
            bar.set_postfix(epsilon=f"{point['epsilon']:.2f}", accuracy=f"{point['accuracy']:.2%}")
            curve.append(point)
    return optimizer, curve, seconds


def draw(curve: list[dict[str, float]], title: str, path: Path) -> None:
    """Draws the test accuracy against the epsilon that was spent for it."""
    figure = Figure(figsize=(4.5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [point["epsilon"] for point in curve], [100 * point["accuracy"] for point in curve], "o-"
    )
    axes.set(xlabel="epsilon spent", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains, and writes curve and report."""
    parser = argparse.ArgumentParser(
        description="Trains a network on MNIST with differential privacy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget")
    parser.add_argument("--delta", type=float, default=1e-5, help="of the guarantee")
    parser.add_argument("--epochs", type=int, default=20, help="over the images, on average")
    parser.add_argument("--batch-size", type=int, default=512, help="mean of a logical batch")
    parser.add_argument("--physical-batch-size", type=int, default=1024, help="what fits in memory")
    parser.add_argument("--lr", type=float, default=0.5, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9, help="as in SGD")
    parser.add_argument("--max-grad-norm", type=float, default=0.1, help="clipping norm C")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; noise has none")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs", help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="two epochs of 512 images, as a check")
    args = parser.parse_args()

    try:
        data = mnist(args.data_dir)
        if args.smoke:
            few, args.epochs, args.batch_size = slice(512), 2, min(args.batch_size, 64)
            data = Digits(
                data.train_images[few],
                data.train_labels[few],
                data.test_images[few],
                data.test_labels[few],
                data.source,
            )
        optimizer, curve, seconds = train(data, args)
    except CurvoptError as error:
        parser.error(str(error))

    report = optimizer.privacy_report(args.delta, unit="one image")
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = {"settings": vars(args), "data": data.source, "seconds": seconds, "curve": curve}
    (args.out / "private_mnist.json").write_text(json.dumps(numbers, default=str))
    (args.out / "private_mnist.txt").write_text(f"{report}\n")
    draw(curve, f"{data.source}, delta = {args.delta:g}", args.out / "private_mnist.png")
    print(report)
    print(f"curve: {args.out / 'private_mnist.png'} and private_mnist.json")
    print(
        f"test accuracy {curve[-1]['accuracy']:.2%} at epsilon {report.epsilon:.2f}, "
        f"{seconds:.0f} s of training"
    )


if __name__ == "__main__":
    main()
