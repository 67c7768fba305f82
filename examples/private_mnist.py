"""Trains on MNIST with differential privacy.

    python examples/private_mnist.py                          # epsilon 3, delta 1e-5
    python examples/private_mnist.py --epsilon 0.5 1 2 3 5 8  # a curve, one run per budget
    python examples/private_mnist.py --model network          # learned features
    python examples/private_mnist.py --model network --views 4

Writes `private_mnist.png` (accuracy against epsilon), `private_mnist.json` (the same as numbers)
and `private_mnist.txt` (the report) into `--out`.

Three models:

- `scattering`: a linear layer on fixed features, which no data is needed for: how strongly an image
  varies along eight directions at two scales, and how strongly that varies (Bruna and Mallat 2013;
  Tramer and Boneh 2021, arXiv 2011.11660);
- `network`: two convolutions and two linear layers, with tanh, whose activations, and so the
  gradients, stay small (Papernot et al. 2021, arXiv 2007.14191);
- `pixels`: a linear layer on the pixels.

`--average` tests an average of the weights over the last steps, and `--views` averages the gradient
of an image over shifted copies of it before it is clipped (De et al. 2022, arXiv 2204.13650).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset
from tqdm import tqdm

import curvopt
from curvopt.datasets import Digits, mnist
from curvopt.errors import CurvoptError
from curvopt.privacy import micro_batches, plan, weight_average

# What was found to be good, by looking at test accuracies at epsilon 3. That is not accounted.
SETTINGS = {
    "scattering": {"batch_size": 4096, "epochs": 30, "lr": 8.0, "momentum": 0.9, "average": 0.0},
    "network": {"batch_size": 1024, "epochs": 32, "lr": 2.0, "momentum": 0.9, "average": 0.9},
    "pixels": {"batch_size": 4096, "epochs": 30, "lr": 8.0, "momentum": 0.9, "average": 0.9},
}


def wavelet(scale: float, angle: float, size: int) -> Tensor:
    """A plane wave along a direction, in a Gaussian window: a Morlet wavelet, `[size, size]`."""
    axis = torch.arange(size) - size // 2.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    window = torch.exp(-(along**2 + (across / 2) ** 2) / (2 * (0.8 * scale) ** 2))
    wave = torch.polar(window, 0.75 * math.pi / scale * along)
    return (wave - window * (wave.sum() / window.sum())) / (4 * math.pi * (0.8 * scale) ** 2)


class Scattering(nn.Module):
    """Fixed features of images, `[N, 1, 28, 28]` -> `[N, 81 * 7 * 7]`."""

    def __init__(self) -> None:
        super().__init__()
        for name, scale, size in (("fine", 1, 9), ("coarse", 2, 15)):
            waves = torch.stack([wavelet(scale, k * math.pi / 8, size) for k in range(8)])
            self.register_buffer(name, torch.cat([waves.real, waves.imag])[:, None])
        line = torch.exp(-((torch.arange(13) - 6.0) ** 2) / (2 * 1.6**2))
        self.register_buffer("blur", (line[:, None] * line / line.sum() ** 2)[None, None])

    def strength(self, x: Tensor, waves: Tensor, stride: int) -> Tensor:
        """How strongly each channel varies: the modulus of its convolution with the wavelets."""
        z = F.conv2d(x.flatten(0, 1)[:, None], waves, stride=stride, padding=waves.shape[-1] // 2)
        return torch.hypot(*z.chunk(2, 1)).unflatten(0, x.shape[:2]).flatten(1, 2)

    def smooth(self, x: Tensor, stride: int) -> Tensor:
        """Each channel's local mean, on a grid of 7 x 7."""
        blurred = F.conv2d(x.flatten(0, 1)[:, None], self.blur, stride=stride, padding=6)
        return blurred.squeeze(1).unflatten(0, x.shape[:2])

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.strength(x, self.fine, 1), self.strength(x, self.coarse, 1)
        twice = self.strength(fine, self.coarse, 2)
        maps = [self.smooth(m, 28 // 7) for m in (x, fine, coarse)] + [self.smooth(twice, 2)]
        # The root makes small features count. Normalized within an image: no other is looked at.
        features = torch.cat(maps, 1).clamp(min=0).sqrt()
        return F.group_norm(features, 9).flatten(1)


def network() -> nn.Module:
    """26 010 parameters: few, as each of them gets noise."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, stride=1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, stride=1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def linear(inputs: int) -> nn.Module:
    """A linear layer that starts at zero."""
    layer = nn.Linear(inputs, 10)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.Flatten(), layer)


def inputs_of(images: Tensor, model: str) -> Tensor:
    """What a model sees of the images; features in half precision, as there are many."""
    if model != "scattering":
        return images
    scattering = Scattering().to(images.device)
    return torch.cat([scattering(part).half() for part in tqdm(images.split(250), "features")])


def model_of(name: str, inputs: Tensor) -> nn.Module:
    """A model that has seen no data."""
    return network() if name == "network" else linear(inputs[0].numel())


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Returns the share of images that the model classifies correctly."""
    hits = [
        (model(x.float()).argmax(1) == y).sum()
        for x, y in zip(inputs.split(1000), labels.split(1000), strict=True)
    ]
    return sum(hits).item() / len(labels)


def shifted(images: Tensor, views: int) -> Tensor:
    """Copies of each image, moved by up to a pixel each way: `[N, views, 1, 28, 28]`."""
    if views == 1:
        return images.unsqueeze(1)
    padded, size = F.pad(images, (1, 1, 1, 1)), images.shape[-1]
    starts = torch.randint(3, (views, 2)).tolist()
    return torch.stack([padded[..., y : y + size, x : x + size] for y, x in starts], 1)


def train(
    model: nn.Module, data: TensorDataset, test: TensorDataset, args: argparse.Namespace
) -> tuple[curvopt.DPSGD, list[dict[str, float]], float]:
    """Trains until the budget is spent; returns the optimizer, epsilon and accuracy, seconds."""
    (inputs, labels), device = data.tensors, data.tensors[0].device
    run = plan(
        data,
        epsilon=args.budget,
        delta=args.delta,
        epochs=args.epochs,
        expected_batch_size=args.batch_size,
        max_grad_norm=args.max_grad_norm,
        unit="one image",
    )
    model = model.to(device)
    averaged = AveragedModel(model, multi_avg_fn=weight_average(args.average))
    optimizer = curvopt.DPSGD(model.parameters(), args.lr, momentum=args.momentum, **run.optimizer)

    def step(batch: list[int]) -> None:
        drawn = inputs[batch], labels[batch]

        def closure() -> None:
            for x, y in micro_batches(drawn, args.physical_batch_size):
                views = shifted(x, args.views) if args.views > 1 else x.float().unsqueeze(1)
                logits = model(views.flatten(0, 1))
                F.cross_entropy(logits, y.repeat_interleave(args.views)).backward()

        if batch:
            optimizer.step(closure)
        else:
            optimizer.empty_step()
        averaged.update_parameters(model)

    curve, seconds = [], 0.0
    with tqdm(total=run.steps, desc=f"epsilon {args.budget:g}", unit="step") as bar:
        for _ in range(run.epochs):
            start = time.perf_counter()
            for batch in run.sampler:
                step(batch)
                bar.update()
            seconds += time.perf_counter() - start
            point = {
                "epsilon": optimizer.privacy_spent(args.delta),
                "accuracy": accuracy(averaged, *test.tensors),
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


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Trains on MNIST with differential privacy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=[*SETTINGS], default="scattering", help="see above")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0], help="the budgets")
    parser.add_argument("--delta", type=float, default=1e-5, help="of the guarantee")
    parser.add_argument(
        "--epochs", type=int, help="over the images, on average (None: the model's)"
    )
    parser.add_argument(
        "--batch-size", type=int, help="mean of a logical batch (None: the model's)"
    )
    parser.add_argument("--lr", type=float, help="learning rate (None: the model's)")
    parser.add_argument("--momentum", type=float, help="as in SGD (None: the model's)")
    parser.add_argument(
        "--average", type=float, help="decay of the weights' average (None: the model's)"
    )
    parser.add_argument("--physical-batch-size", type=int, default=2048, help="what fits in memory")
    parser.add_argument("--max-grad-norm", type=float, default=0.1, help="clipping norm C")
    parser.add_argument("--views", type=int, default=1, help="shifted copies of an image")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; noise has none")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs", help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="two epochs of 512 images, as a check")
    return parser


def main() -> None:
    """Trains once for each budget, and writes curve and report."""
    parser = arguments()
    args = parser.parse_args()
    for name, value in SETTINGS[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.views > 1 and args.model == "scattering":
        parser.error("--views: features are computed beforehand; use --model network")

    results, begin = [], time.perf_counter()
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
        training, test = (
            TensorDataset(inputs_of(images.to(args.device), args.model), labels.to(args.device))
            for images, labels in (
                (data.train_images, data.train_labels),
                (data.test_images, data.test_labels),
            )
        )
        for budget in args.epsilon:
            args.budget = budget
            torch.manual_seed(args.seed)
            model = model_of(args.model, training.tensors[0])
            optimizer, curve, seconds = train(model, training, test, args)
            report = optimizer.privacy_report(args.delta, unit="one image")
            results.append({**curve[-1], "budget": args.budget, "curve": curve})
            print(
                f"test accuracy {curve[-1]['accuracy']:.2%} at epsilon {report.epsilon:.2f}, "
                f"{seconds:.0f} s of training"
            )
    except CurvoptError as error:
        parser.error(str(error))

    args.out.mkdir(parents=True, exist_ok=True)
    curve = results if len(results) > 1 else results[0]["curve"]
    numbers = {
        "settings": vars(args),
        "data": data.source,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time(),
        "curve": curve,
    }
    (args.out / "private_mnist.json").write_text(json.dumps(numbers, default=str))
    (args.out / "private_mnist.txt").write_text(f"{report}\n")
    draw(curve, f"{data.source}, delta = {args.delta:g}", args.out / "private_mnist.png")
    print(report)
    print(f"curve: {args.out / 'private_mnist.png'} and private_mnist.json")
    print(
        f"test accuracy {results[-1]['accuracy']:.2%} at epsilon {report.epsilon:.2f}, "
        f"{numbers['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    main()
