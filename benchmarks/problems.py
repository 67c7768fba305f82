"""The benchmarks' problems, one row each: to add one, add a row."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]

CHARACTERS, LENGTH = 96, 64  # of the language models


# ---------------------------------------------------------------------------------------- models


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them; `mlp(a, b)` is a linear model."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def net_2c2d(hidden: int) -> nn.Sequential:
    """DeepOBS's two convolutions and two dense layers (there hidden = 1024), on MNIST's shape."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, hidden), nn.ReLU(), nn.Linear(hidden, 10)),
    )


def net_3c3d() -> nn.Sequential:
    """DeepOBS's three convolutions and three dense layers, on CIFAR's shape."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Flatten(), nn.Linear(128 * 3 * 3, 512), nn.ReLU()),
        *(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A small language model; its logits come as one row per token, `[N * T, vocabulary]`."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        # Opacus needs the positions of every sample, laid out in memory.
        positions = torch.arange(x.shape[1], device=x.device).expand_as(x).contiguous()
        hidden = self.blocks(self.tokens(x) + self.positions(positions))
        return self.head(self.norm(hidden)).flatten(0, 1)


class CharTransformer(Transformer):
    """The small language model on characters, with its loss: nats per character."""

    def __init__(self) -> None:
        super().__init__(CHARACTERS, LENGTH, width=64, depth=2, heads=4)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.flatten())


class CharGRU(nn.Module):
    """A recurrent language model on characters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(CHARACTERS, 64)
        self.recurrent, self.head = nn.GRU(64, 128, batch_first=True), nn.Linear(128, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.tokens(x))[0]).flatten(0, 1)

    loss = CharTransformer.loss


class Autoencoder(nn.Sequential):
    """The deep autoencoder of Hinton and Salakhutdinov's kind; its loss is in nats per image."""

    def __init__(self) -> None:
        sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers.append(nn.Linear(inputs, outputs))
            if outputs != 30:  # the code is linear
                layers.append(nn.Tanh())
        super().__init__(*layers[:-1])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        rows = F.binary_cross_entropy_with_logits(output, target.flatten(1), reduction="none")
        return rows.sum(1).mean()


class Residual(nn.Module):
    """Two convolutions with group norm, around which a path of their input's leads."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(4, outputs), nn.GroupNorm(4, outputs)
        self.path = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.convolution1(x)))
        return F.relu(self.norm2(self.convolution2(hidden)) + self.path(x))


def resnet() -> nn.Sequential:
    """Three residual blocks of 16, 32 and 64 channels, on MNIST's shape."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU()),
        *(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def loss_function(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's own loss, or cross entropy."""
    return getattr(model, "loss", F.cross_entropy)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a batch."""
    return loss_function(model)(model(x), y)


def gpt2() -> nn.Module:
    """GPT-2 as it comes, tied embeddings and all, with 3.7 million random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 2000, "n_positions": 64, "n_embd": 256, "n_layer": 4, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout))


# ----------------------------------------------------------------------- problems that are timed


def images(*shape: int) -> Callable[[int], Batch]:
    """A maker of batches of random images with ten classes."""
    return lambda n: (torch.rand(n, *shape), torch.randint(10, (n,)))


def text(vocabulary: int, length: int) -> Callable[[int], Batch]:
    """A maker of batches of random token sequences; the targets come as one row per token."""
    draw = torch.randint
    return lambda n: (draw(vocabulary, (n, length)), draw(vocabulary, (n * length,)))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class Timed:
    """A model, the batch it is timed on, and its loss."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    size: int
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy
    title: str = ""

    def build(self, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)  # the same weights and the same batch every time
        x, y = self.batch(self.size)
        return self.model().to(device), x.to(device), y.to(device)


def named(*rows: Any) -> dict[str, Any]:
    return {row.name: row for row in rows}


CLASSIFIERS: dict[str, Timed] = named(
    Timed("mlp", lambda: mlp(784, 512, 256, 10), images(784), 128, title="MLP 784-512-256-10"),
    Timed("2c2d", lambda: net_2c2d(128), images(1, 28, 28), 64, title="2c2d, dense layer of 128"),
    Timed("3c3d", net_3c3d, images(3, 32, 32), 32, title="3c3d"),
)

LANGUAGE_MODELS: dict[str, Timed] = named(
    Timed(
        "transformer",
        lambda: Transformer(vocabulary=1000, length=64, width=128, depth=2, heads=4),
        text(1000, 64),
        16,
        title="transformer, 2 blocks of width 128, T = 64",
    ),
    Timed(
        "gpt2",
        gpt2,
        text(2000, 64),
        16,
        loss=lambda model, x, _: model(x, labels=x).loss,
        title="GPT-2 as it comes, 4 blocks of width 256, T = 64",
    ),
)


def gpt2_124m() -> nn.Module:
    """GPT-2 in its own size, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


# For an accelerator, and by name alone.
LARGE: dict[str, Timed] = named(
    Timed(
        "gpt2-124m",
        gpt2_124m,
        text(50257, 128),
        8,
        loss=lambda model, x, _: model(x, labels=x).loss,
        title="GPT-2 of 124 million weights, T = 128",
    ),
)


# --------------------------------------------------------------------- problems that are trained


@dataclass(frozen=True)
class Split:
    """One part of a data set: inputs and labels."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(self.x.to(device), self.y.to(device))


Data = dict[str, Split]  # "train", "validation", "test"


@cache
def mnist() -> Data:
    """55 000 images to train on, 5 000 to validate on, and MNIST's own 10 000 to test on."""
    from curvopt.datasets import mnist as read

    data = read()
    if len(data.train_images) != 60_000:
        raise SystemExit(f"these results are for MNIST, not for {data.source}")
    x, y = _shuffled(data.train_images, data.train_labels)  # later ones are easier
    return _split(x, y, 5_000) | {"test": Split(data.test_images, data.test_labels)}


@cache
def digits() -> Data:
    """Scikit-learn's 8 x 8 digits: 1 197 to train on, 300 to validate on, 300 to test on."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x, y = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)
    x, y = _shuffled(x, y)
    return _split(x[:-300], y[:-300], 300) | {"test": Split(x[-300:], y[-300:])}


@cache
def images_themselves() -> Data:
    """MNIST's images, each of which is its own target."""
    return {name: Split(part.x, part.x) for name, part in mnist().items()}


@cache
def library() -> Data:
    """Python's own standard library: the first four million characters, in pieces of 64."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    raw = "".join(file.read_text("utf8", "ignore") for file in files)[:4_000_000]
    # 95 printable characters, and the end of a line; what is none of them is a question mark.
    codes = [0 if c == "\n" else ord(c) - 31 if 32 <= ord(c) < 127 else 32 for c in raw]
    pieces = len(codes) // LENGTH - 1
    x = torch.tensor(codes[: pieces * LENGTH]).view(pieces, LENGTH)
    y = torch.tensor(codes[1 : pieces * LENGTH + 1]).view(pieces, LENGTH)
    held = 500  # the last files, which no other piece is of
    rest = _split(x[:-held], y[:-held], held)
    return rest | {"test": Split(x[-held:], y[-held:])}


def _shuffled(x: Tensor, y: Tensor) -> Batch:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def _split(x: Tensor, y: Tensor, validation: int) -> Data:
    return {
        "train": Split(x[:-validation], y[:-validation]),
        "validation": Split(x[-validation:], y[-validation:]),
    }


@dataclass(frozen=True)
class Training:
    """A model, its data, and its number of steps; none in a quick run leaves it out of one.

    Attributes:
        by_loss: What counts is the loss, not the share of right answers.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    steps: int
    quick: int
    size: int = 128
    title: str = ""
    by_loss: bool = False


TRAINING: dict[str, Training] = named(
    Training("digits", lambda: mlp(64, 64, 32, 10), digits, 360, 360, title="MLP, digits"),
    Training("logistic", lambda: mlp(784, 10), mnist, 420, 420, title="logistic regression, MNIST"),
    Training("mlp", lambda: mlp(784, 1000, 500, 100, 10), mnist, 430, 160, title="MLP, MNIST"),
    Training("2c2d", lambda: net_2c2d(1024), mnist, 160, 0, title="2C2D, MNIST"),
    Training("resnet", resnet, mnist, 240, 0, title="ResNet, MNIST"),
    Training(
        *("autoencoder", Autoencoder, images_themselves, 200, 160),
        title="autoencoder, MNIST",
        by_loss=True,
    ),
    Training(
        *("transformer", CharTransformer, library, 320, 160, 32),
        title="transformer, characters",
        by_loss=True,
    ),
    Training("gru", CharGRU, library, 320, 120, 32, title="GRU, characters", by_loss=True),
)
