"""Hugging Face Accelerate with a curvopt optimizer: the loop is the usual one.

python examples/with_accelerate.py
python examples/with_accelerate.py --accumulate 2 --clip 1.0
python examples/with_accelerate.py --accumulate 2 --by-hand     # without accelerator.accumulate
accelerate launch --cpu --num_processes 2 examples/with_accelerate.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt

OPTIMIZERS = {
    "diag_ggn": curvopt.DiagGGNOptimizer,
    "polar": curvopt.PolarOptimizer,
    "variance": curvopt.VarianceAdaptiveSGD,
}


def data(count: int) -> TensorDataset:
    """Which of four directions a point lies closest to."""
    draw = torch.Generator().manual_seed(0)
    x, directions = (torch.randn(n, 16, generator=draw) for n in (count, 4))
    return TensorDataset(x, (x @ directions.t()).argmax(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="diag_ggn", help="which one")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--by-hand", action="store_true", help="accumulate by counting batches")
    parser.add_argument("--clip", type=float, help="largest norm of the gradient")
    parser.add_argument("--epochs", type=int, default=6, help="over the data")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args()
    count, epochs = (128, 3) if args.smoke else (4096, args.epochs)
    torch.manual_seed(0)
    steps = 1 if args.by_hand else args.accumulate
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    opt = OPTIMIZERS[args.optimizer](model.named_parameters())
    batches = DataLoader(data(count), batch_size=32 // args.accumulate)
    model, opt, batches = accelerator.prepare(model, opt, batches)
    losses = []
    for _ in range(epochs):
        for index, (x, y) in enumerate(batches):
            if args.by_hand:
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss / args.accumulate)
                if (index + 1) % args.accumulate == 0:
                    if args.clip:
                        accelerator.clip_grad_norm_(model.parameters(), args.clip)
                    opt.step()
                    opt.zero_grad()
            else:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    if args.clip and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), args.clip)
                    opt.step()
                    opt.zero_grad()
            losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
