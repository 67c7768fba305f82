"""Optimizers, models and batches for several processes, and the run of one process beside them."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import curvopt
import curvopt.losses.cross_entropy
from tests.parallel.ranks import alone, part, same_everywhere

N, STEPS = 8, 12

PRIVATE = dict(noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=N)

OPTIMIZERS = {
    "ggn_exact": partial(curvopt.DiagGGNOptimizer, lr=0.05, estimator="exact", curvature_every=3),
    "ggn_sketch": partial(curvopt.DiagGGNOptimizer, lr=0.05, curvature_every=3),
    "variance_adaptive": partial(curvopt.VarianceAdaptiveSGD, lr=0.05, variance_every=3),
    "polar": partial(curvopt.PolarOptimizer, lr=0.01),
    "dp_sgd": partial(curvopt.DPSGD, lr=0.1, momentum=0.9, **PRIVATE),
    "dp_adam": partial(curvopt.DPAdam, lr=0.01, **PRIVATE),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


class Transformer(nn.Module):
    """Two layers of attention on five tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        layer = partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([layer() for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embedding(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


def batches(steps=STEPS, tokens=False, n=N):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        if tokens:
            x = torch.randint(20, (n, 5), generator=generator)
        else:
            x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
        yield x, torch.randint(3, (n,), generator=generator)


def one_step(opt, model, x, y, habit):
    """A step, in a block, by a closure, or of an ordinary loop."""
    if habit == 1:
        return opt.step(lambda: F.cross_entropy(model(x), y))
    opt.zero_grad()
    with nullcontext() if habit == 2 and opt.goes_backward else opt.record():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    opt.step()
    return loss.detach()


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def weights(model):
    return [full(p).clone() for p in model.parameters()]


def share_signs():
    """Draw the whole batch's signs on every process; each takes those of its own samples."""
    signs = curvopt.losses.cross_entropy.random_signs

    def cut(like, shape, generator):
        columns, n, *rest = shape
        generator = torch.Generator().manual_seed(len(rest))
        whole = signs(like, (columns, N, *rest), generator)
        return whole if n == N else whole.chunk(N // n, 1)[dist.get_rank()]

    curvopt.losses.cross_entropy.random_signs = cut


def train(make, model, wrapped, rows=lambda *batch: batch, tokens=False, steps=STEPS):
    """Train; the model that is called may be another than the one that has the parameters."""
    opt = make(model.parameters())
    for k, (x, y) in enumerate(batches(steps, tokens)):
        one_step(opt, wrapped, *rows(x, y), habit=(k + k // 3) % 3)
    return opt


def compare(name, wrap, build=mlp, *, tokens=False, group=None, tolerance=1e-12, steps=STEPS):
    """Several processes, each with its part of the batch, take the steps of one with all of it."""
    if name in ("ggn_sketch", "polar"):
        share_signs()
    make = OPTIMIZERS[name]
    reference, model = build().double(), build().double()
    train(partial(make, process_group=alone()), reference, reference, tokens=tokens, steps=steps)
    wrapped = wrap(model)
    opt = train(partial(make, process_group=group), model, wrapped, part, tokens, steps)
    found, expected, start = weights(model), weights(reference), weights(build().double())
    same_everywhere(found)
    moved = max(float((a - b).abs().max()) for a, b in zip(expected, start, strict=True))
    apart = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    assert moved > 0.01
    assert apart < tolerance, f"{apart:.1e} from one process (which moved {moved:.2f})"
    return opt, model
