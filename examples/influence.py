"""Which training images make the network say that? Scores from per-sample gradients, as in TRAK.

    python examples/influence.py                  # writes influence.png into --out

TRAK (Park et al. 2023, arXiv 2303.14186) takes a network for linear around its weights: the
influence of training image n on the margin of test image t is
`phi_t (Phi^T Phi)^-1 phi_n (1 - p_n)`, where phi is a random projection of the gradient of an
image's own margin. All that it needs are gradients per sample. The scores are judged by what they
promise: networks trained on random halves of the data should differ in their margins as the sums of
the scores say (the linear datamodeling score).
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


def train(x: Tensor, y: Tensor, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            opt.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
    return model


def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The log odds of the right label, log p / (1 - p)."""
    log_p = F.log_softmax(model(x), 1).gather(1, y[:, None])[:, 0]
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


def features(model: nn.Module, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Random projections `[N, size]` of the gradients of the margins, 250 at a time."""
    rows = []
    for part, labels in zip(x.split(250), y.split(250), strict=True):
        result = curvopt.compute(
            lambda a=part, b=labels: margins(model, a, b).mean(),
            model.parameters(),
            curvopt.BatchGrad(),
        )
        draw, projected = torch.Generator().manual_seed(0), 0.0
        for row in result.batch_grad.values():
            flat = row.flatten(1)
            signs = torch.randn(flat.shape[1], size, generator=draw, dtype=flat.dtype)
            projected = projected + flat @ signs / size**0.5
        rows.append(projected)
    return torch.cat(rows)


def scores(model: nn.Module, train_set: tuple, test_set: tuple, size: int) -> Tensor:
    """Influence `[T, N]` of the training images on the test images' margins."""
    phi, test = features(model, *train_set, size), features(model, *test_set, size)
    x, y = train_set
    with torch.no_grad():
        wrong = 1 - model(x).softmax(1).gather(1, y[:, None])[:, 0]
    gram = phi.T @ phi + 1e-3 * phi.square().sum() / size * torch.eye(size)
    return test @ torch.linalg.solve(gram, phi.T) * wrong


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).double()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Influence of training images, from per-sample gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=1000, help="training images")
    parser.add_argument("--tests", type=int, default=50, help="test images that are explained")
    parser.add_argument("--models", type=int, default=5, help="networks whose scores are averaged")
    parser.add_argument("--halves", type=int, default=60, help="networks on halves, to judge them")
    parser.add_argument("--size", type=int, default=512, help="of the random projection")
    parser.add_argument("--epochs", type=int, default=15, help="of each network")
    parser.add_argument("--data-dir", help="folder of MNIST's IDX files (None: found or fetched)")
    parser.add_argument("--out", type=Path, default="runs", help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="few images and networks, as a check")
    args = parser.parse_args()

    data = mnist(args.data_dir)
    if args.smoke:
        args.images, args.tests, args.models, args.halves, args.size = 100, 8, 1, 3, 32
    x, y = data.train_images[: args.images].flatten(1), data.train_labels[: args.images]
    test = data.test_images[: args.tests].flatten(1), data.test_labels[: args.tests]

    model = train(x, y, 0, 1).double()
    few = x[:8].double(), y[:8]
    result = curvopt.compute(
        lambda: margins(model, *few).mean(), model.parameters(), curvopt.BatchGrad()
    )
    for n in range(len(few[0])):
        own = margins(model, few[0][n : n + 1], few[1][n : n + 1])[0]
        truth = torch.autograd.grad(own, list(model.parameters()))
        ours = torch.cat([row[n].flatten() for row in result.batch_grad.values()])
        agree(f"gradient of margin {n}", ours, torch.cat([g.flatten() for g in truth]))

    influence = sum(
        scores(train(x, y, seed, args.epochs), (x, y), test, args.size)
        for seed in tqdm(range(args.models), "scores", leave=False)
    )
    halves, outcomes = [], []
    for seed in tqdm(range(args.halves), "networks on halves", leave=False):
        half = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < 0.5
        net = train(x[half], y[half], 1000 + seed, args.epochs)
        halves.append(half)
        outcomes.append(margins(net, *test).detach())
    predicted = influence @ torch.stack(halves).T.to(influence.dtype)  # [T, halves]
    a, b = ranks(predicted), ranks(torch.stack(outcomes, 1))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    correlation = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)
    error = correlation.std().item() / len(correlation) ** 0.5
    print(
        f"linear datamodeling score (rank correlation, 0 for chance): {correlation.mean():.2f} "
        f"+- {error:.2f}"
    )

    count, shown = 5, range(min(4, len(test[0])))
    figure = Figure(figsize=(9, 3.6))
    grid = figure.subplots(len(shown), 2 * count + 3, squeeze=False)
    for row, t in zip(grid, shown, strict=True):
        order = influence[t].argsort(descending=True)
        images = [test[0][t], None, *x[order[:count]], None, *x[order[-count:].flip(0)]]
        labels = [test[1][t], None, *y[order[:count]], None, *y[order[-count:].flip(0)]]
        for axes, image, label in zip(row, images, labels, strict=True):
            axes.axis("off")
            if image is not None:
                axes.imshow(image.view(28, 28), cmap="gray_r")
                axes.set_title(int(label), fontsize=7, pad=1)
    figure.text(0.155, 0.94, "test image", ha="center")
    figure.text(0.37, 0.94, "training images that speak for its label", ha="center")
    figure.text(0.75, 0.94, "and against it", ha="center")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "influence.png", dpi=150)
    print(f"curves: {args.out / 'influence.png'}")


if __name__ == "__main__":
    main()
