"""Architectures written in torch alone, each as ordinary code would have it."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import Function


class Encoder(nn.Module):
    """A transformer encoder over tokens, with a class token and learned positions."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.start = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 6, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = torch.cat([self.start.expand(len(x), -1, -1), self.embedding(x)], 1)
        return self.head(self.encoder(tokens + self.positions[:, : tokens.shape[1]])[:, 0])


class Translator(nn.Module):
    """Encoder and decoder, sequence first, causal."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.transformer = nn.Transformer(4, 2, 1, 1, 6, 0.0, **options)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        source, target = (self.embedding(t).transpose(0, 1) for t in x)
        mask = nn.Transformer.generate_square_subsequent_mask(len(target), dtype=target.dtype)
        return self.head(self.transformer(source, target, tgt_mask=mask)).transpose(0, 1)


class Recurrent(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer = kind(4, 4, batch_first=True)

    def forward(self, x):
        return F.linear(self.layer(self.embedding(x))[0], self.embedding.weight)


class UNet(nn.Module):
    """Down and up again, with skip connections."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = self.block(1, 2), self.block(2, 4)
        self.bottom = self.block(4, 4)
        self.up2, self.up1 = (nn.ConvTranspose2d(4, 2, 2, 2), nn.ConvTranspose2d(2, 2, 2, 2))
        self.join2, self.join1 = self.block(6, 2), self.block(4, 2)
        self.head = nn.Conv2d(2, 3, 1)

    @staticmethod
    def block(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(2, outputs),
            nn.LeakyReLU(inplace=True),
        )

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.up2(self.bottom(F.max_pool2d(two, 2)))
        x = self.up1(self.join2(torch.cat([x, two], 1)))
        return self.head(self.join1(torch.cat([x, one], 1)))


class Mixer(nn.Module):
    """An MLP-Mixer of one block."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.tokens = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4))
        self.channels = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = x + self.tokens(self.norms[0](x).mT).mT
        x = x + self.channels(self.norms[1](x))
        return self.head(self.norms[2](x).mean(1))


def function(x, table, scale, query, key, value, w1, b1, w2):
    """A transformer block without any module."""
    x = table[x]
    h = F.layer_norm(x, x.shape[-1:]) * scale
    x = x + F.scaled_dot_product_attention(h @ query, h @ key, h @ value)
    x = x + torch.einsum("nth,hd->ntd", F.silu(torch.matmul(x, w1).add_(b1)), w2)
    return x.mean(1)


def pixels(size=4):
    return torch.randn(3, 1, size, size, dtype=torch.float64)


def words():
    return torch.randint(7, (3, 4))


MODELS = {  # a maker of the model, and one of its inputs
    "encoder": (Encoder, words),
    "encoder-norm-first": (lambda: Encoder(norm_first=True, activation="gelu"), words),
    "translator": (Translator, lambda: (words(), words()[:, :3])),
    "translator-no-bias": (lambda: Translator(bias=False), lambda: (words(), words())),
    "lstm": (lambda: Recurrent(nn.LSTM), words),
    "gru": (lambda: Recurrent(nn.GRU), words),
    "rnn": (lambda: Recurrent(nn.RNN), words),
    "u-net": (UNet, pixels),
    "mixer": (Mixer, pixels),
    "function": (
        lambda: Function(
            function, table=(7, 4), scale=4, query=(4, 3), key=(4, 3), value=(4, 4),
            w1=(4, 5), b1=5, w2=(5, 4),
        ),
        words,
    ),
}  # fmt: skip
