"""PyTorch Lightning with a curvopt optimizer: nothing changes but `configure_optimizers`.

    python examples/with_lightning.py                 # automatic optimization
    python examples/with_lightning.py --manual        # the loop in training_step
    python examples/with_lightning.py --precision bf16-mixed --accumulate 2 --clip 1.0

It trains for half of the epochs, saves a checkpoint, and resumes from it in a new trainer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt

OPTIMIZERS = {
    "diag_ggn": curvopt.DiagGGNOptimizer,
    "polar": curvopt.PolarOptimizer,
    "variance": curvopt.VarianceAdaptiveSGD,
}


class Classifier(pl.LightningModule):
    def __init__(self, optimizer: str, manual: bool = False):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
        self.optimizer, self.automatic_optimization = optimizer, not manual
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.named_parameters())


def data(count: int) -> TensorDataset:
    """Which of four directions a point lies closest to."""
    draw = torch.Generator().manual_seed(0)
    x, directions = (torch.randn(n, 16, generator=draw) for n in (count, 4))
    return TensorDataset(x, (x @ directions.t()).argmax(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="diag_ggn", help="which one")
    parser.add_argument("--manual", action="store_true", help="manual optimization")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--clip", type=float, help="largest norm of the gradient")
    parser.add_argument("--precision", default="32-true", help="as Lightning names it")
    parser.add_argument("--epochs", type=int, default=6, help="over the data")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args()
    count, epochs = (128, 4) if args.smoke else (4096, args.epochs)
    pl.seed_everything(0, verbose=False)
    train = DataLoader(data(count), batch_size=32)

    def trainer(epochs: int) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            precision=args.precision,
            accumulate_grad_batches=args.accumulate,
            gradient_clip_val=args.clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    task = Classifier(args.optimizer, args.manual)
    first = trainer(epochs // 2)
    first.fit(task, train, train)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"
        first.save_checkpoint(path)
        resumed = Classifier(args.optimizer, args.manual)
        second = trainer(epochs)
        second.fit(resumed, train, train, ckpt_path=path)
    losses = task.losses + resumed.losses
    accuracy = float(second.callback_metrics["accuracy"])
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
