"""A backend for laplace-torch: error bars for networks that its other backends cannot take.

    python examples/laplace_backend.py            # writes laplace_backend.png into --out

laplace-torch fits a Gaussian around a trained network's weights, from the generalized Gauss-Newton
matrix that a *backend* computes. `CurvoptGGN` is one, in some fifty lines. On a plain network it
gives the numbers of the BackPACK backend; on one with normalized residual blocks, functional code
and a shared layer, where BackPACK has no answer, it goes on, and agrees with plain autograd.

Needs laplace-torch: `pip install laplace-torch`. (Where its torchvision does not fit your torch:
`pip install --no-deps laplace-torch==0.3 asdfghjkl==0.1a4 backpack-for-pytorch
curvlinops-for-pytorch linear_operator einconv einops unfoldNd opt-einsum torchmetrics`.)
"""

import argparse
import warnings
from pathlib import Path

import torch
from compare import agree
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import curvopt

try:
    from laplace import Laplace
    from laplace.curvature import BackPackGGN, GGNInterface
    from laplace.utils import Kron
except ImportError as error:
    raise SystemExit(f"{error}: this example needs laplace-torch, see its first lines") from None


NOISE = 0.15  # standard deviation of the observations


class CurvoptGGN(GGNInterface):
    """Generalized Gauss-Newton matrices from curvopt; Monte-Carlo ones for ``stochastic=True``."""

    def _compute(self, x: Tensor, y: Tensor, *quantities: curvopt.Quantity) -> curvopt.Result:
        def closure() -> Tensor:
            f = self.model(x)
            if self.likelihood == "classification":
                return self.lossfunc(f.flatten(0, -2), y.flatten())
            return self.lossfunc(f, y)

        return curvopt.compute(closure, self.params, *quantities)

    def _flat(self, parts: list[Tensor]) -> Tensor:
        flat = torch.cat(parts, -1)
        return flat if self.subnetwork_indices is None else flat[..., self.subnetwork_indices]

    def jacobians(self, x: Tensor, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        outputs: list[Tensor] = []

        def function() -> Tensor:
            outputs[:] = [self.model(x)]
            return outputs[0]

        jacobian = curvopt.param_jacobian(function, self.params, create_graph=enable_backprop)
        whole = self._flat([jacobian[p].flatten(2) for p in self.params])
        return whole, outputs[0] if enable_backprop else outputs[0].detach()

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = self._compute(x, y, curvopt.BatchGrad())
        return self._flat([result.batch_grad[p].flatten(1) for p in self.params]), result.loss

    def diag(self, x: Tensor, y: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        result = self._compute(
            x, y, curvopt.DiagGGNMC() if self.stochastic else curvopt.DiagGGNExact()
        )
        values = result.diag_ggn_mc if self.stochastic else result.diag_ggn_exact
        diagonal = self._flat([values[p].flatten() for p in self.params])
        return self.factor * result.loss, self.factor * diagonal

    def kron(self, x: Tensor, y: Tensor, N: int, **_: object) -> tuple[Tensor, Kron]:
        result = self._compute(x, y, curvopt.KFAC() if self.stochastic else curvopt.KFLR())
        values = result.kfac if self.stochastic else result.kflr
        factors = [list(values[p]) for p in self.params]
        for pair in factors:
            if len(pair) == 2:
                pair[1] = pair[1] * (len(y) / N)  # so that the batches' factors add up
        return self.factor * result.loss, self.factor * Kron(factors)


class Residual(nn.Module):
    """A network that nobody wrote for BackPACK: one layer used three times, norms, plain code."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(1, width), nn.Linear(width, width)
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(2 * x))
        for _ in range(3):
            h = h + 0.5 * torch.tanh(self.again(self.norm(h)))
        return self.last(h)


def plain_diagonal(model: nn.Module, x: Tensor) -> Tensor:
    """The GGN's diagonal for half the squared error, one backward pass per output and sample."""
    rows = [
        torch.autograd.grad(f, list(model.parameters()), retain_graph=True)
        for f in model(x).flatten()
    ]
    return sum(torch.cat([g.flatten() for g in row]) ** 2 for row in rows)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """To the mode that Laplace's approximation is made around, with its prior."""
    opt = curvopt.DiagGGNOptimizer(model.parameters())
    for _ in tqdm(range(steps), "steps", leave=False):
        opt.step(
            lambda: (
                F.mse_loss(model(x), y)
                + NOISE**2 / len(x) * sum(p.square().sum() for p in model.parameters())
            )
        )


def fit(model: nn.Module, loader: DataLoader, backend: type, structure: str) -> Laplace:
    la = Laplace(model, "regression", "all", structure, sigma_noise=NOISE, prior_precision=1.0,
                 backend=backend)  # fmt: skip
    la.fit(loader, progress_bar=False)
    return la


def main() -> None:
    parser = argparse.ArgumentParser(description="A curvopt backend for laplace-torch.")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument("--out", type=Path, default="runs", help="folder of the picture")
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a check")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x = torch.cat([torch.rand(60, 1) * 1.3 - 1.6, torch.rand(60, 1) * 1.1 + 0.6])
    y = torch.sin(3 * x) + NOISE * torch.randn_like(x)
    loader = DataLoader(TensorDataset(x, y), batch_size=40)
    plain = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    nets = {"plain network": plain, "residual network": Residual()}
    grid = torch.linspace(-2.5, 2.5, 200)[:, None]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (title, model), axes in zip(nets.items(), panels, strict=True):
        train(model, x, y, 5 if args.smoke else args.steps)
        agree(
            f"{title}, diagonal of the GGN",
            fit(model, loader, CurvoptGGN, "diag").H,
            plain_diagonal(model, x),
        )
        la = fit(model, loader, CurvoptGGN, "kron")
        mean, variance = la(grid)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = fit(model, loader, BackPackGGN, "kron")
            agree(f"{title}, error bars of both backends", variance, theirs(grid)[1], 1e-6)
            said = "BackPACK backend: the same"
        except Exception as error:
            print(f"{title}: BackPACK gives up: {type(error).__name__}: {str(error)[:90]}")
            said = "BackPACK backend: no answer"
        deviation = variance.flatten().sqrt()
        line, m = grid.flatten(), mean.flatten().detach()
        for k in (1, 2):
            axes.fill_between(
                line, m - k * deviation, m + k * deviation, color="C0", alpha=0.2, lw=0
            )
        axes.plot(line, m, color="C0", label="mean, one and two standard deviations")
        axes.plot(x.flatten(), y.flatten(), "k.", markersize=3, label="data")
        axes.set(title=f"{title}\n{said}", xlabel="x", ylim=(-3, 3))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("y")
    panels[0].legend(frameon=False, loc="upper center", fontsize=8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "laplace_backend.png", dpi=150)
    print(f"curves: {args.out / 'laplace_backend.png'}")


if __name__ == "__main__":
    main()
