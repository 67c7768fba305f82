"""What an optimizer sees while it trains, drawn from its own numbers.

    python examples/stats.py                      # writes stats.png into --out

`opt.stats()` is a flat dict of floats; every logger takes it as it is: `wandb.log(opt.stats())`,
`self.log_dict(opt.stats())` in Lightning, `writer.add_scalar(name, value, step)` for each in
TensorBoard. Here it is kept every few steps and drawn: how the rate of each tensor finds itself,
what leads it, how long steps are, how the curvature grows and fades, and, from
`VarianceAdaptiveSGD` on the same batches, how noisy the gradient is.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import curvopt
from curvopt.datasets import mnist

Row = dict[str, float]
TENSOR = ("weight", "bias")


def train(
    make: type, name: str, x: Tensor, y: Tensor, epochs: int, batch_size: int, every: int
) -> list[Row]:
    """Train a fresh network; `stats()` of every few steps, with the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    opt = make(model.named_parameters())
    rows = []
    for epoch in range(epochs):
        batches = torch.randperm(len(x)).split(batch_size)
        for step, batch in enumerate(tqdm(batches, f"{name} {epoch + 1}/{epochs}", leave=False)):
            loss = opt.step(lambda b=batch: F.cross_entropy(model(x[b]), y[b]))
            if step % every == 0:
                rows.append({"loss": loss.item(), **opt.stats()})
    return rows


def draw(ggn: list[Row], noise: list[Row], batch_size: int, path: Path) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    titles = {
        "loss": "training loss",
        "rate": "rate of each tensor: it finds itself",
        "signal": "signal: 1 if gradients agree, 0 for noise",
        "step_rms": "length of a step, root mean square",
        "curvature": "mean curvature",
        "noise/scale": "gradient noise scale, in samples",
    }
    for axes, (key, title) in zip(panels.flat, titles.items(), strict=True):
        rows = noise if key.startswith("noise") else ggn
        tensors = [k for k in rows[0] if k.startswith(f"{key}/") and k.endswith("weight")]
        for name in tensors or [key]:
            axes.plot(
                [row["steps"] for row in rows],
                [row.get(name, float("nan")) for row in rows],
                label=name.removeprefix(f"{key}/") if tensors else "DiagGGNOptimizer",
                linewidth=1,
            )
        if key == "loss":
            loss = [row["loss"] for row in noise]
            axes.plot([row["steps"] for row in noise], loss, label="VarianceAdaptiveSGD", lw=1)
        if key == "signal":
            axes.axhline(0, color="black", linewidth=0.6)
        else:
            axes.set_yscale("log")
        if key == "noise/scale":
            axes.lines[0].set_label("VarianceAdaptiveSGD")
            axes.axhline(batch_size, color="grey", linestyle=":", label="the batch size")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[1]:
        axes.set_xlabel("step")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draws what an optimizer sees while it trains on MNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=2, help="over the 60,000 images")
    parser.add_argument("--batch-size", type=int, default=128, help="of a step")
    parser.add_argument("--every", type=int, default=5, help="steps from one look to the next")
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs", help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="one epoch of 512 images, as a check")
    args = parser.parse_args()

    data = mnist(args.data_dir)
    x, y = data.train_images, data.train_labels
    if args.smoke:
        args.epochs, x, y = 1, x[:512], y[:512]
    settings = (x, y, args.epochs, args.batch_size, args.every)
    ggn = train(curvopt.DiagGGNOptimizer, "DiagGGNOptimizer", *settings)
    noise = train(curvopt.VarianceAdaptiveSGD, "VarianceAdaptiveSGD", *settings)
    for rows in (ggn, noise):
        print("  ".join(f"{k} {v:.3g}" for k, v in rows[-1].items() if not k.endswith(TENSOR)))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stats.json").write_text(json.dumps({"DiagGGN": ggn, "VarianceAdaptive": noise}))
    draw(ggn, noise, args.batch_size, args.out / "stats.png")
    print(f"curves: {args.out / 'stats.png'} and stats.json")


if __name__ == "__main__":
    main()
