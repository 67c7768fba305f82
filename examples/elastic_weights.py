"""Elastic weight consolidation with the true Fisher information, sample by sample.

    python examples/elastic_weights.py            # writes elastic_weights.png into --out

A network that learned task A learns task B, and forgets A. Elastic weight consolidation
(Kirkpatrick et al. 2017, arXiv 1612.00796) holds the weights that A needs: it adds
`strength / 2 * sum F (p - p_A)^2`, where F is the diagonal of the Fisher information, the mean over
samples of squared gradients. Most public code squares the gradient of a *batch* instead, in which
the samples' gradients cancel, the more the larger it is: what a strength means then depends on the
size of a batch, though at its best each does as well. The Fisher of a softmax is its generalized
Gauss-Newton matrix: exact, in one pass.

Task A is MNIST, task B is MNIST with its pixels in another order.
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

BATCH = 100
Weights = list[Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


def true_fisher(model: nn.Module, x: Tensor) -> Weights:
    """The mean over samples of the squared gradient, its label drawn from the model, exactly."""
    params, parts = list(model.parameters()), []
    for batch in x.split(500):
        labels = torch.zeros(len(batch), dtype=torch.long)  # no curvature depends on them
        result = curvopt.compute(
            lambda b=batch, y=labels: F.cross_entropy(model(b), y, reduction="sum"),
            params,
            curvopt.DiagGGNExact(),
        )
        parts.append([result.diag_ggn_exact[p] for p in params])
    return [sum(part) / len(x) for part in zip(*parts, strict=True)]


def squared_batch_gradients(model: nn.Module, x: Tensor, y: Tensor, size: int) -> Weights:
    """What is often taken for it: the mean over batches of the squared gradient of a batch."""
    params, squares = list(model.parameters()), []
    for batch, labels in zip(x.split(size), y.split(size), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(batch), labels), params)
        squares.append([g**2 for g in grads])
    return [sum(part) / len(squares) for part in zip(*squares, strict=True)]


def fisher_by_loops(model: nn.Module, x: Tensor) -> Weights:
    """The same as `true_fisher` in plain autograd: every sample, every label by its probability."""
    params = list(model.parameters())
    total = [torch.zeros_like(p) for p in params]
    for sample in x:
        log_p = F.log_softmax(model(sample[None])[0], 0)
        for one in log_p:
            grads = torch.autograd.grad(one, params, retain_graph=True)
            for t, g in zip(total, grads, strict=True):
                t += one.detach().exp() * g**2 / len(x)
    return total


def train(
    model: nn.Module, x: Tensor, y: Tensor, epochs: int, fisher: Weights, strength: float
) -> None:
    params = list(model.parameters())
    anchor = [p.detach().clone() for p in params]
    opt = torch.optim.Adam(params)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            opt.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            for p, a, f in zip(params, anchor, fisher, strict=True):
                loss = loss + strength / 2 * (f * (p - a) ** 2).sum()
            loss.backward()
            opt.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Elastic weight consolidation with the true Fisher information.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=5, help="on each task")
    parser.add_argument("--images", type=int, default=6000, help="training images of each task")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and pixel order")
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs", help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="one strength, few images, as a check")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = mnist(args.data_dir)
    few = slice(200 if args.smoke else args.images)
    x, y = data.train_images[few].flatten(1), data.train_labels[few]
    test_x, test_y = data.test_images[few].flatten(1), data.test_labels[few]
    order = torch.randperm(784)

    model = network()
    nothing = [torch.zeros_like(p) for p in model.parameters()]
    train(model, x, y, args.epochs, nothing, 0.0)
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    print(f"task A learned: {accuracy(model, test_x, test_y):.1f} % of its test images")

    def evaluate(strength: float, fisher: Weights) -> tuple[float, float]:
        """Accuracies on A and B after learning B."""
        model.load_state_dict(learned)
        torch.manual_seed(args.seed + 1)
        train(model, x[:, order], y, args.epochs, fisher, strength)
        return accuracy(model, test_x, test_y), accuracy(model, test_x[:, order], test_y)

    wide = network().double()
    wide.load_state_dict(learned)
    sample = x[:8].double()
    for ours, truth in zip(true_fisher(wide, sample), fisher_by_loops(wide, sample), strict=True):
        agree(f"Fisher information {list(ours.shape)}", ours, truth)

    fishers = {"true Fisher information": true_fisher(model, x)}
    for size in (10, 100, 1000):
        fishers[f"squared gradients of batches of {size}"] = squared_batch_gradients(
            model, x, y, size
        )
    strengths = [10.0**k for k in ((3,) if args.smoke else range(7))]
    none = evaluate(0.0, next(iter(fishers.values())))
    print(f"without a penalty: {none[0]:.1f} % of A are left, and {none[1]:.1f} % of B learned")
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    runs = tqdm(total=len(fishers) * len(strengths), desc="strengths", leave=False)
    for name, fisher in fishers.items():
        points = []
        for strength in strengths:
            points.append(evaluate(strength, fisher))
            runs.update()
        means = [sum(point) / 2 for point in points]
        best = max(range(len(means)), key=means.__getitem__)
        a, b = points[best]
        tqdm.write(f"{name}: best at strength {strengths[best]:g}, {a:.1f} % of A, {b:.1f} % of B")
        axes.plot(strengths, means, "o-", label=name, linewidth=2.5 if name[0] == "t" else 1.2)
    runs.close()
    axes.axhline(sum(none) / 2, color="grey", linestyle=":", label="no penalty")
    axes.set(
        xscale="log",
        xlabel="strength of the penalty",
        ylabel="mean accuracy on both tasks, %",
        title="What a strength means depends on the batch size",
    )
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "elastic_weights.png", dpi=150)
    print(f"curves: {args.out / 'elastic_weights.png'}")


if __name__ == "__main__":
    main()
