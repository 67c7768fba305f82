"""Steps both ways: one model stepped by `step`, its copy by a compiled step."""

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import curvopt
from curvopt.compiled import CompiledStep

private = {"noise_multiplier": 0.5, "max_grad_norm": 0.3, "expected_batch_size": 4}


def seeded(make, **options):
    """A private optimizer whose noise is the same in every run."""
    return lambda p: make(p, generator=torch.Generator().manual_seed(3), **private, **options)


ROWS = {
    "variance": lambda p: curvopt.VarianceAdaptiveSGD(p, lr=0.05, variance_every=2),
    "variance-debiased": lambda p: curvopt.VarianceAdaptiveSGD(
        p, 0.05, variance_every=1, debiased=True, noise_tests=True, weight_decay=0.1, maximize=True
    ),
    "diag_ggn": lambda p: curvopt.DiagGGNOptimizer(p, lr=1e-2, curvature_every=3),
    "diag_ggn-exact": lambda p: curvopt.DiagGGNOptimizer(
        p, 1e-2, curvature_every=2, estimator="exact", weight_decay=0.1, max_step=0.5, maximize=True
    ),
    "diag_ggn-plain": lambda p: curvopt.DiagGGNOptimizer(
        p, 1e-2, momentum=0.0, samples=2, adaptation=0.0, max_step=float("inf")
    ),
    # With little damping the factor itself amplifies rounding.
    "polar": lambda p: curvopt.PolarOptimizer(p, lr=1e-2, eps=0.3, curvature_every=3),
    "polar-decay": lambda p: curvopt.PolarOptimizer(
        p, 1e-2, 0.8, eps=0.3, curvature_every=2, weight_decay=0.1, margin=0.1, maximize=True
    ),
    "polar-plain": lambda p: curvopt.PolarOptimizer(p, 1e-2, 0.0, eps=0.3, adaptation=0.0),
    "dp_sgd": seeded(curvopt.DPSGD, lr=0.1),
    "dp_sgd-momentum": seeded(
        curvopt.DPSGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, clipping="per_layer"
    ),
    "dp_adam": seeded(curvopt.DPAdam, weight_decay=0.1, clipping="automatic"),
}


def as_it_is(graph, inputs):
    """Run a traced graph op by op: what is traced is tested, and not Inductor."""
    return graph


def network(dtype=torch.float64, sizes=(6, 5, 5, 3)):
    torch.manual_seed(0)
    layers = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batches(count, n=4, dtype=torch.float64, inputs=6, classes=3):
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(n, inputs, generator=draw, dtype=dtype)
        yield x, torch.randint(classes, (n,), generator=draw)


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


class Both:
    """A model that is stepped eagerly, and a copy that is compiled.

    Args:
        model: the model.
        make: makes an optimizer of parameters.
        loss: of a model and a batch.
        compiler: see `CompiledStep`.
    """

    def __init__(self, model, make, loss=cross_entropy, compiler=as_it_is, **options):
        self.models = model, copy.deepcopy(model)
        self.opts = [make(m.parameters()) for m in self.models]
        self.loss = loss
        self.step = CompiledStep(
            self.opts[1],
            lambda *batch: loss(self.models[1], *batch),
            compare=False,
            compiler=compiler,
            **options,
        )

    def take(self, *batch):
        """A step each, from one random state; their losses."""
        state = torch.get_rng_state()
        eager = self.opts[0].step(lambda: self.loss(self.models[0], *batch))
        torch.set_rng_state(state)
        return eager, self.step(*batch)

    def run(self, data):
        for batch in data:
            eager, compiled = self.take(*batch)
            torch.testing.assert_close(compiled, eager.detach(), rtol=1e-6, atol=1e-7)

    def check(self, rtol=1e-12, atol=1e-13, compiled=None):
        """Parameters, gradients, state and what can be said of it are the same.

        Args:
            rtol: of numbers that may differ by rounding.
            atol: likewise.
            compiled: how many steps were compiled.
        """
        close = dict(rtol=rtol, atol=atol)
        for p, q in zip(*(m.parameters() for m in self.models), strict=True):
            torch.testing.assert_close(q, p, **close)
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, **close)
        for b, c in zip(*(m.buffers() for m in self.models), strict=True):
            torch.testing.assert_close(c, b, **close)
        one, two = (opt.state_dict() for opt in self.opts)
        assert one["state"].keys() == two["state"].keys()
        for index, state in one["state"].items():
            assert state.keys() == two["state"][index].keys()
            for key, value in state.items():
                torch.testing.assert_close(
                    torch.as_tensor(two["state"][index][key], dtype=torch.float64),
                    torch.as_tensor(value, dtype=torch.float64),
                    msg=lambda text, key=key: f"{key}: {text}",
                    **close,
                )
        assert self.opts[0].steps == self.opts[1].steps
        before, after = (opt.stats(per_tensor=False) for opt in self.opts)
        assert before.keys() == after.keys()
        for key, value in before.items():
            torch.testing.assert_close(
                torch.tensor(after[key]), torch.tensor(value), rtol=max(rtol, 1e-7), atol=1e-9
            )
        if compiled is not None:
            assert self.step.taken["compiled"] == compiled, (self.step.taken, self.step.reason)
