"""A module that the package has no rule for: without one, with one, and verified.

    python examples/custom_module.py

Every op that uses a parameter needs a rule, which says what the parameter gets from a cotangent.
Without a rule the numbers are exact all the same, by one backward pass per sample, with a warning.
One rule serves every quantity, of first and second order: the backward pass *through* the module
is autograd's own.
"""

import argparse
import warnings

import torch
from compare import agree
from torch import Tensor, nn
from torch.nn import functional as F

import curvopt


class Scale(torch.autograd.Function):
    """x times w, in a way that nothing can look into."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class ScaleLayer(nn.Module):
    """Multiplies every feature by a number of its own."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(x, self.weight)


def scale_rule(module, inputs, output, cotangent):
    """Rows [V, N, *weight.shape] of V cotangent columns [V, N, features], inputs [N, features]."""
    return {"weight": cotangent * inputs[0]}


QUANTITIES = (
    curvopt.BatchGrad(),
    curvopt.Variance(),
    curvopt.DiagGGNExact(),
    curvopt.BatchDiagGGNExact(),
)


def main() -> None:
    """Computes with and without a rule, and compares."""
    parser = argparse.ArgumentParser(description="A custom module.")
    parser.add_argument("--smoke", action="store_true", help="the same, as a check")
    parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), ScaleLayer(6), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    named = list(model.named_parameters())

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        slow = curvopt.compute(closure, named, *QUANTITIES)
    print("without a rule:", *{str(w.message) for w in caught}, sep="\n  ")

    curvopt.register_rule(ScaleLayer)(scale_rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning any more
        fast = curvopt.compute(closure, named, *QUANTITIES)

    # Against plain autograd: one sample at a time, and J^T H J from dense matrices.
    w = model[2].weight
    rows = torch.stack(
        [
            torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), w)[0]
            for n in range(len(x))
        ]
    )
    z = model(x)
    J = torch.stack([torch.autograd.grad(f, w, retain_graph=True)[0] for f in z.flatten()])
    H = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), z.detach())
    ggn = (J * (H.reshape(len(J), len(J)) @ J)).sum(0)
    for name, result in (("without a rule", slow), ("with the rule", fast)):
        agree(f"{name}: batch_grad", result.batch_grad[w], rows)
        agree(f"{name}: variance", result.variance[w], rows.var(0, correction=0))
        agree(f"{name}: diag_ggn_exact", result.diag_ggn_exact[w], ggn)

    # The same check for any model: this finds a rule that is wrong.
    print(curvopt.verify(model, F.cross_entropy, x, y, *QUANTITIES, raises=True))


if __name__ == "__main__":
    main()
