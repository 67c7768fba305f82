"""Fine-tunes a language model on private texts: a Hugging Face model and its own loss, unmodified.

    python examples/private_finetuning.py                     # all weights
    python examples/private_finetuning.py --lora              # low-rank adapters (needs peft)

A small GPT-2 with random weights first learns public texts, then, with differential privacy,
private ones. The texts are synthetic: each counts up by a step of its own, public ones by 1 to 4,
private ones by 5 to 8, and a tenth of the tokens is wrong.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

import curvopt
from curvopt.errors import CurvoptError
from curvopt.privacy import PoissonBatchSampler, calibrate_noise, micro_batches

WORDS, LENGTH = 48, 24


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    words = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**words, **sizes, **dropout))


def with_adapters(model: nn.Module) -> nn.Module:
    """Freezes the model and adds low-rank matrices of rank 8 to its attention and MLP."""
    from peft import LoraConfig, get_peft_model

    layers = ["c_attn", "c_proj", "c_fc"]
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=layers, fan_in_fan_out=True)
    )


def texts(count: int, first_step: int, generator: torch.Generator) -> Tensor:
    """Returns `[count, LENGTH]` tokens."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    steps = draw(first_step, first_step + 4, count, 1)
    tokens = (draw(0, WORDS, count, 1) + steps * torch.arange(LENGTH)) % WORDS
    wrong = torch.rand(count, LENGTH, generator=generator) < 0.1
    return torch.where(wrong, draw(0, WORDS, count, LENGTH), tokens)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor) -> float:
    """Returns the share of tokens, from the fourth on, that the model guesses from those before."""
    guesses = model(input_ids=tokens).logits[:, 2:-1].argmax(2)
    return (guesses == tokens[:, 3:]).double().mean().item()


def pretrain(model: nn.Module, data: Tensor, steps: int) -> None:
    """Trains on public texts, as anybody would."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in tqdm(range(steps), "public", unit="step"):
        optimizer.zero_grad()
        loss_of(model, data[torch.randint(len(data), (64,))]).backward()
        optimizer.step()
    optimizer.zero_grad()


def finetune(
    model: nn.Module, data: Tensor, test: Tensor, args: argparse.Namespace
) -> curvopt.DPAdam:
    """Trains on private texts; the privacy unit is one text."""
    sampler = PoissonBatchSampler(len(data), expected_batch_size=args.batch_size)
    budget = {"sample_rate": sampler.sample_rate, "steps": args.epochs * len(sampler)}
    noise = calibrate_noise(args.epsilon, args.delta, **budget, tolerance=1e-3)
    optimizer = curvopt.DPAdam(
        model.named_parameters(),
        args.lr,
        noise_multiplier=noise,
        max_grad_norm=args.max_grad_norm,
        expected_batch_size=args.batch_size,
        sampler=sampler,
    )
    with tqdm(total=budget["steps"], desc="private", unit="step") as bar:
        for _ in range(args.epochs):
            for batch in sampler:

                def closure(tokens: Tensor = data[batch]) -> None:
                    for part in micro_batches(tokens, args.physical_batch_size):
                        loss_of(model, part).backward()

                if batch:
                    optimizer.step(closure)
                else:
                    optimizer.empty_step()  # the model is not run
                bar.update()
            epsilon = optimizer.privacy_spent(args.delta)
            bar.set_postfix(epsilon=f"{epsilon:.2f}", accuracy=f"{accuracy(model, test):.2%}")
    return optimizer


def main() -> None:
    """Trains twice, and prints accuracies and report."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a small GPT-2 with differential privacy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--lora", action="store_true", help="train adapters alone")
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget")
    parser.add_argument("--delta", type=float, default=1e-5, help="of the guarantee")
    parser.add_argument("--texts", type=int, default=20_000, help="private ones")
    parser.add_argument("--public-steps", type=int, default=400, help="on public texts, before")
    parser.add_argument("--epochs", type=int, default=5, help="over the private texts, on average")
    parser.add_argument("--batch-size", type=int, default=256, help="mean of a logical batch")
    parser.add_argument("--physical-batch-size", type=int, default=512, help="what fits in memory")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--max-grad-norm", type=float, default=0.1, help="clipping norm C")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts, not of noise")
    parser.add_argument("--smoke", action="store_true", help="a few steps on few texts, as a check")
    args = parser.parse_args()
    if args.smoke:
        args.texts, args.public_steps, args.epochs, args.batch_size = 256, 3, 1, 64

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = language_model()
    pretrain(model, texts(20_000, 1, generator), args.public_steps)
    test = texts(500, 5, generator)
    before = accuracy(model, test)
    if args.lora:
        model = with_adapters(model)
    start = time.perf_counter()
    try:
        optimizer = finetune(model, texts(args.texts, 5, generator), test, args)
    except CurvoptError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(optimizer.privacy_report(args.delta, unit="one text"))
    print(
        f"next token: {before:.1%} guessed before, {accuracy(model, test):.1%} after; {trained:,} "
        f"parameters in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
