"""Trains a network on MNIST and draws its curves.

    python examples/mnist.py                                  # an MLP with DiagGGNOptimizer
    python examples/mnist.py --model 2c2d --optimizer diag_ggn adam sgd

Writes `mnist.png` (loss and accuracy) and `mnist.json` (the same as numbers) into `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import curvopt
from curvopt.datasets import Digits, mnist
from curvopt.errors import CurvoptError

# name: parameters, options -> optimizer; `options` holds `lr` where `--lr` was given.
OPTIMIZERS = {
    "diag_ggn": lambda params, **options: curvopt.DiagGGNOptimizer(params, **options),
    "variance_adaptive": lambda params, **options: curvopt.VarianceAdaptiveSGD(params, **options),
    "adam": lambda params, **options: torch.optim.Adam(params, **options),
    "sgd": lambda params, lr=0.05: torch.optim.SGD(params, lr, momentum=0.9),
}
# What the pictures call them.
NAMES = {
    "diag_ggn": "DiagGGNOptimizer",
    "variance_adaptive": "VarianceAdaptiveSGD",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD, momentum",
}
TITLES = {
    "logistic": "logistic regression",
    "mlp": "784-512-256-10 network",
    "2c2d": "2C2D network",
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
UNITS = {"wall": "seconds of training", "cpu": "CPU seconds of training"}
MODELS = {
    "logistic": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    "mlp": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ),
    "2c2d": lambda: nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ),
}


@dataclass
class Curves:
    """What one training run showed: the loss of each step, the rest of each epoch."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # on the test set, 0 to 1
    seconds: list[float] = field(default_factory=list)  # training alone, without evaluation


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Makes one step on one batch and returns its loss."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images that the model classifies correctly."""
    hits = [
        (model(x).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return sum(hits).item() / len(labels)


def train(name: str, data: Digits, args: argparse.Namespace) -> Curves:
    """Trains a fresh model with one optimizer; the same seed gives the same curves."""
    torch.manual_seed(args.seed)
    shuffle = torch.Generator().manual_seed(args.seed)
    model = MODELS[args.model]().to(args.device)
    options = {} if args.lr is None else {"lr": args.lr}
    optimizer = OPTIMIZERS[name](model.parameters(), **options)
    images, labels = data.train_images.to(args.device), data.train_labels.to(args.device)
    test_images, test_labels = data.test_images.to(args.device), data.test_labels.to(args.device)

    curves = Curves()
    for epoch in range(1, args.epochs + 1):
        start = CLOCKS[args.clock]()
        batches = torch.randperm(len(labels), generator=shuffle).to(args.device)
        losses = [
            train_step(model, optimizer, images[batch], labels[batch]).detach()
            for batch in tqdm(
                batches.split(args.batch_size), f"{name} epoch {epoch}/{args.epochs}", leave=False
            )
        ]
        curves.loss += torch.stack(losses).tolist()  # waits for the device, so before the clock
        curves.seconds.append(CLOCKS[args.clock]() - start)
        curves.accuracy.append(accuracy(model, test_images, test_labels))
        print(
            f"{name} epoch {epoch}/{args.epochs}: "
            f"training loss {sum(curves.loss[-len(losses) :]) / len(losses):.4f}, "
            f"test accuracy {curves.accuracy[-1]:.2%}, {curves.seconds[-1]:.1f} s"
        )
    return curves


def draw(runs: dict[str, Curves], title: str, seconds: str, path: Path) -> None:
    """Draws loss (a mean over the last twentieth of an epoch) and accuracy, by epochs and time."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, curves in runs.items():
        epochs, label = len(curves.accuracy), NAMES.get(name, name)
        window = max(1, len(curves.loss) // epochs // 20)
        smooth = torch.tensor(curves.loss).unfold(0, window, 1).mean(1)
        steps = torch.arange(window, len(curves.loss) + 1) / len(curves.loss) * epochs
        clock = torch.tensor([0.0, *curves.seconds]).cumsum(0)
        whole = steps.long().clamp(max=epochs - 1)  # epochs that are over
        times = clock[whole] + (steps - whole) * (clock[whole + 1] - clock[whole])
        accuracies = [100 * a for a in curves.accuracy]
        panels[0].plot(steps, smooth, label=label, linewidth=1)
        panels[1].plot(times, smooth, label=label, linewidth=1)
        panels[2].plot(clock[1:], accuracies, "o-", label=label)
    panels[0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    panels[1].set(xlabel=seconds, ylabel="training loss", yscale="log")
    panels[2].set(xlabel=seconds, ylabel="test accuracy, %")
    panels[2].legend(frameon=False, fontsize=9)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains with every optimizer asked for, and writes the curves."""
    parser = argparse.ArgumentParser(
        description="Trains a network on MNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--optimizer", nargs="+", choices=OPTIMIZERS, default=["diag_ggn"], help="one or several"
    )
    parser.add_argument("--model", choices=MODELS, default="mlp", help="what to train")
    parser.add_argument("--epochs", type=int, default=4, help="over the images")
    parser.add_argument("--batch-size", type=int, default=128, help="of a step")
    parser.add_argument("--lr", type=float, help="learning rate (None: the optimizer's own)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: what other programs do costs nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs", help="folder for the curves")
    parser.add_argument("--smoke", action="store_true", help="one epoch of 512 images, as a check")
    args = parser.parse_args()

    if min(args.epochs, args.batch_size) < 1:
        parser.error("--epochs and --batch-size must be at least 1")
    try:
        data = mnist(args.data_dir)
    except CurvoptError as error:
        parser.error(str(error))
    if args.smoke:
        args.epochs, few = 1, slice(512)
        data = Digits(
            data.train_images[few],
            data.train_labels[few],
            data.test_images[few],
            data.test_labels[few],
            data.source,
        )
    print(f"{args.model} on {data.source}: {len(data.train_labels):,} training images")

    runs = {name: train(name, data, args) for name in args.optimizer}

    args.out.mkdir(parents=True, exist_ok=True)
    curves = {name: asdict(run) for name, run in runs.items()}
    numbers = {"settings": vars(args), "data": data.source, "runs": curves}
    (args.out / "mnist.json").write_text(json.dumps(numbers, default=str))
    title = f"{data.source}, {TITLES[args.model]}, batches of {args.batch_size}"
    draw(runs, title, UNITS[args.clock], args.out / "mnist.png")
    print(f"curves: {args.out / 'mnist.png'} and mnist.json")
    for name, run in runs.items():
        seconds = sum(run.seconds) / len(run.seconds)
        print(f"{name}: test accuracy {run.accuracy[-1]:.2%}, {seconds:.2f} s per epoch")


if __name__ == "__main__":
    main()
