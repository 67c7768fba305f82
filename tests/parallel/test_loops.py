"""Loops as people write them, on two processes: the steps that one takes with the whole batch."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from curvopt import CurvoptError
from tests.oracles import assert_close
from tests.parallel import cases
from tests.parallel.cases import N
from tests.parallel.ranks import alone, part, ranks, same_everywhere
from tests.parallel.test_fully_shard import shard

MEASURING = ["ggn_exact", "variance_adaptive", "polar"]
WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fully_shard": shard,
    "compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "unwrapped": lambda model: model,
}


def synced(net, last):
    """Gradients are reduced at the last of several backward passes."""
    if isinstance(net, DistributedDataParallel):
        return nullcontext() if last else net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    return nullcontext()


def in_parts(x, y):
    """Micro-batches; those of one process are, together, those of two."""
    order = torch.arange(N)
    if len(x) == N:
        order = torch.cat([order.view(2, 2, -1)[:, k].flatten() for k in range(2)])
        x, y = x[order], y[order]
    return [*zip(x.chunk(2), y.chunk(2), strict=True)]


def accumulate(k, opt, net, x, y):
    for last, (a, b) in enumerate(in_parts(x, y)):
        with synced(net, last):
            (F.cross_entropy(net(a), b) / 2).backward()
    opt.step()


def both_forward_passes_first(k, opt, net, x, y):
    sum(F.cross_entropy(net(a), b) / 2 for a, b in in_parts(x, y)).backward()
    opt.step()


def evaluate(k, opt, net, x, y):
    loss = F.cross_entropy(net(x), y)
    net.eval()
    with torch.no_grad():
        net(x)
    net.train()
    loss.backward()
    opt.step()
    with torch.inference_mode():
        net(x)


def forward_without_backward(k, opt, net, x, y):
    net(x)
    F.cross_entropy(net(x), y).backward()
    net(x)
    opt.step()


def several_losses(k, opt, net, x, y):
    output = net(x)
    loss = F.cross_entropy(output, y) + 0.1 * F.mse_loss(output, torch.zeros_like(output))
    (loss + 0.3 * F.cross_entropy(net(2 * x), y)).backward()
    opt.step()


def several_backward_passes(k, opt, net, x, y):
    F.cross_entropy(net(x), y).backward()
    (0.3 * F.cross_entropy(net(2 * x), y)).backward()
    opt.step()


def clip(k, opt, net, x, y):
    F.cross_entropy(net(x), y).backward()
    nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], 0.1)
    opt.step()


def skip(k, opt, net, x, y):
    """A step is left out on all."""
    F.cross_entropy(net(x), y).backward()
    if k % 3 != 1:
        opt.step()


def fail(k, opt, net, x, y):
    if k in (3, 4):
        with pytest.raises(CurvoptError, match="not finite"):
            opt.step(lambda: F.cross_entropy(net(x) / 0, y))
        opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()


def load(k, opt, net, x, y):
    if k == 4:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    F.cross_entropy(net(x), y).backward()
    opt.step()


def compute_again(k, opt, net, x, y):
    F.cross_entropy(checkpoint(net, x, use_reentrant=False), y).backward()
    opt.step()


LOOPS = [
    accumulate, both_forward_passes_first, evaluate, forward_without_backward, several_losses,
    several_backward_passes, clip, skip, fail, load, compute_again,
]  # fmt: skip
# Each loop under each wrapper, with one optimizer after the other.
ROWS = [
    (loop, wrapper, MEASURING[(i + j) % 3])
    for i, loop in enumerate(LOOPS)
    for j, wrapper in enumerate(WRAPPERS)
    if wrapper != "compiled" or loop in (accumulate, evaluate, fail)
    if (wrapper, loop) != ("unwrapped", clip)  # it acts on what each process has
]


@pytest.mark.parametrize(
    ("loop", "wrapper", "name"), ROWS, ids=[f"{a.__name__}-{b}-{c}" for a, b, c in ROWS]
)
@ranks()
def test_a_loop(loop, wrapper, name):
    if name == "polar":
        cases.share_signs()
    make = cases.OPTIMIZERS[name]
    reference, model = cases.mlp().double(), cases.mlp().double()
    wrapped = WRAPPERS[wrapper](model)
    group = dist.group.WORLD if wrapper == "unwrapped" else None
    one = make(reference.parameters(), process_group=alone())
    many = make(model.parameters(), process_group=group)
    for k, (x, y) in enumerate(cases.batches(8)):
        for opt, net, batch in ((one, reference, (x, y)), (many, wrapped, part(x, y))):
            loop(k, opt, net, *batch)
            opt.zero_grad()
    assert many.steps == one.steps > 4
    found, start = cases.weights(model), cases.weights(cases.mlp().double())
    same_everywhere(found)
    assert any(float((p - q).abs().max()) > 1e-3 for p, q in zip(found, start, strict=True))
    for p, expected in zip(found, reference.parameters(), strict=True):
        assert_close(p, expected, 1e-12)
