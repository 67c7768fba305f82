"""Fine-tunes a Hugging Face model on private texts, with LoRA and `transformers.Trainer`.

    python examples/private_trainer.py                        # epsilon 3, delta 1e-5
    python examples/private_trainer.py --epsilon 1 --epochs 2

A small GPT-2 with random weights first learns public texts; then low-rank adapters of its attention
and MLP learn private ones. To use your own model and data, replace `public_model` and `Texts`: all
else stays. The texts are synthetic: each counts up by a step of its own, public ones by 1 to 4,
private ones by 5 to 8, and a tenth of the tokens is wrong.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset

import curvopt
from curvopt.errors import CurvoptError
from curvopt.privacy import PrivateTrainerMixin, plan

WORDS, LENGTH = 48, 24


class PrivateTrainer(PrivateTrainerMixin, transformers.Trainer):
    """Records each batch, and takes the step of an empty one without the model."""


class Texts(Dataset):
    """Synthetic texts: a sample, and so the privacy unit, is one of them."""

    def __init__(self, count: int, first_step: int, generator: torch.Generator):
        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        steps = draw(first_step, first_step + 4, count, 1)
        tokens = (draw(0, WORDS, count, 1) + steps * torch.arange(LENGTH)) % WORDS
        wrong = torch.rand(count, LENGTH, generator=generator) < 0.1
        self.tokens = torch.where(wrong, draw(0, WORDS, count, LENGTH), tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def public_model(data: Texts, steps: int) -> nn.Module:
    """A model as one finds it: here a small GPT-2, trained on public texts as anybody would."""
    sizes = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    words = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**words, **sizes, **dropout))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        tokens = data.tokens[torch.randint(len(data), (64,))]
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor) -> float:
    """Returns the share of tokens, from the fourth on, that the model guesses from those before."""
    guesses = model.eval()(input_ids=tokens).logits[:, 2:-1].argmax(2)
    return (guesses == tokens[:, 3:]).double().mean().item()


def finetune(model: nn.Module, data: Texts, args: argparse.Namespace) -> curvopt.DPAdam:
    """Trains the adapters on private texts."""
    # From the budget: sampler, noise and all that the optimizer must be told.
    run = plan(
        data,
        epsilon=args.epsilon,
        delta=args.delta,
        epochs=args.epochs,
        expected_batch_size=args.batch_size,
        max_grad_norm=args.max_grad_norm,
        micro_batches=args.accumulate,
        unit="one text",
    )
    print(run)
    optimizer = curvopt.DPAdam(model.named_parameters(), args.lr, **run.optimizer)
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.epochs,
            gradient_accumulation_steps=args.accumulate,  # parts of one logical batch
            max_grad_norm=0.0,  # every text's gradient is clipped already
            lr_scheduler_type="constant",
            logging_strategy="epoch",  # the loss that is logged is not private
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        PrivateTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            optimizers=(optimizer, None),
            sampler=run.sampler,
        ).train()
    return optimizer


def main() -> None:
    """Trains twice, and prints accuracies and report."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a small GPT-2 with LoRA, Trainer and differential privacy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget")
    parser.add_argument("--delta", type=float, default=1e-5, help="of the guarantee")
    parser.add_argument("--texts", type=int, default=20_000, help="private ones")
    parser.add_argument("--public-steps", type=int, default=400, help="on public texts, before")
    parser.add_argument("--epochs", type=int, default=5, help="over the private texts, on average")
    parser.add_argument("--batch-size", type=int, default=256, help="mean of a logical batch")
    parser.add_argument("--accumulate", type=int, default=2, help="parts of a logical batch")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--max-grad-norm", type=float, default=0.1, help="clipping norm C")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts, not of noise")
    parser.add_argument("--smoke", action="store_true", help="a few steps on few texts, as a check")
    args = parser.parse_args()
    if args.smoke:
        args.texts, args.public_steps, args.epochs, args.batch_size = 256, 3, 1, 64

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = public_model(Texts(20_000, 1, generator), args.public_steps)
    test = Texts(500, 5, generator).tokens
    before = accuracy(model, test)
    layers = ["c_attn", "c_proj", "c_fc"]
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=layers, fan_in_fan_out=True)
    model = get_peft_model(model, adapters)
    try:
        optimizer = finetune(model, Texts(args.texts, 5, generator), args)
    except CurvoptError as error:
        parser.error(str(error))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(optimizer.privacy_report(args.delta, unit="one text"))
    print(
        f"next token: {before:.1%} guessed before, {accuracy(model, test):.1%} after, by "
        f"{trained:,} trained parameters"
    )


if __name__ == "__main__":
    main()
