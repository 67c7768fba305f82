"""transformers.Trainer with a curvopt optimizer: hand it over, no subclass and no callback.

    python examples/with_trainer.py
    python examples/with_trainer.py --accumulate 2 --label-smoothing 0.1

A small GPT-2 with random weights learns to count. It trains for half of the epochs, and resumes
from the Trainer's checkpoint. Trainer smooths labels with a loss written by hand, of which no
curvature is known; `compute_loss_func` gives it torch's own.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import curvopt

OPTIMIZERS = {
    "diag_ggn": curvopt.DiagGGNOptimizer,
    "polar": curvopt.PolarOptimizer,
    "variance": curvopt.VarianceAdaptiveSGD,
}
WORDS, LENGTH = 24, 12


def language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    words = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**words, **sizes, **dropout))


def sentences(count: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(WORDS, (count, 1), generator=draw)
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(LENGTH)) % WORDS]


class Smoothed:
    """Cross entropy of the next token with smoothed labels, as Trainer's `compute_loss_func`."""

    def __init__(self, smoothing: float):
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="diag_ggn", help="which one")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="of the targets")
    parser.add_argument("--epochs", type=int, default=6, help="over the data")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args()
    rows = sentences(32 if args.smoke else 512)
    epochs = 4 if args.smoke else args.epochs

    def trainer(folder: str, epochs: int) -> Trainer:
        model = language_model()
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=8 // args.accumulate,
            gradient_accumulation_steps=args.accumulate,
            save_strategy="epoch",
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        opt = OPTIMIZERS[args.optimizer](model.named_parameters())
        smoothed = Smoothed(args.label_smoothing) if args.label_smoothing else None
        return Trainer(
            model=model,
            args=settings,
            train_dataset=rows,
            optimizers=(opt, None),
            compute_loss_func=smoothed,
        )

    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder, epochs // 2)
        first.train()
        second = trainer(folder, epochs)
        second.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in second.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {second.state.global_step} steps")


if __name__ == "__main__":
    main()
