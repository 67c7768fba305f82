"""Kronecker-factored approximations of the GGN's diagonal blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from curvopt.errors import CurvoptError
from curvopt.quantities.base import Context, Cotangent, Quantity
from curvopt.quantities.ggn import _Sketch, indices
from curvopt.structures import Conv, Factors, Outer, Shift, Structure


class KFLR(Quantity):
    """Kronecker factors of the GGN's block of each parameter, from the exact loss Hessian.

    For ``y = W x`` with N samples the block of W is approximated by ``kron(B, A)``,

        A = (1/N) sum_n x_n x_n^T           [I, I]
        B = sum_n sum_k g_nk g_nk^T         [O, O]

    with the rows ``g_nk`` of the GGN's root at the output y. B carries the scale of the loss as
    written; A is a mean. For N = 1 it is exact. With T tokens, or positions of a convolution on
    patches, A sums and B averages over them ("expand": tokens count as samples that share the
    loss), or the inputs are averaged and the g summed over tokens first ("reduce", exact for a
    mean over tokens that ends a linear model).

    The factors of a parameter are a tuple (`curvopt.structures.Factors`) whose Kronecker product
    in its order stands for the block of ``p.flatten()``: ``(B, A)`` for a linear layer or a
    convolution, ``(A, B)`` where the parameter is stored as ``[I, O]``; for G groups each is
    ``[G, ., .]``. A bias and any other small parameter have one factor, their exact block.
    ``factors.dense()`` multiplies them out.

    Args:
        bias: ``"apart"`` (default; every parameter has its own factors, as any optimizer expects),
            or ``"together"``: A is ``[I + 1, I + 1]`` with a constant last input, for the block of
            ``[W, b]``, and the bias has no factors of its own: ``()``.
        tokens: ``"expand"`` (default: it fits most layers) or ``"reduce"``.
        subsample: indices of the samples to take, as if the loss were computed from these alone;
            all by default.

    Raises:
        CurvoptError: a large parameter is used in a way that has no Kronecker factors.

    Example:
        >>> closure = lambda: torch.nn.functional.cross_entropy(model(x), y)
        >>> result = curvopt.compute(closure, model.parameters(), curvopt.KFLR())
        >>> B, A = result.kflr[model[0].weight]
        >>> B.shape, A.shape
        (torch.Size([5, 5]), torch.Size([4, 4]))

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
        curvature (ICML 2015); Botev et al., Practical Gauss-Newton optimisation for deep learning
        (ICML 2017); Grosse and Martens, A Kronecker-factored approximate Fisher matrix for
        convolution layers (ICML 2016); Eschenhagen et al., Kronecker-factored approximate
        curvature for modern neural network architectures (NeurIPS 2023).
    """

    field = "kflr"

    def __init__(
        self,
        *,
        bias: str = "apart",
        tokens: str = "expand",
        subsample: Sequence[int] | Tensor | None = None,
    ):
        if bias not in ("apart", "together"):
            raise ValueError(f"Invalid bias: {bias!r} (use 'apart' or 'together')")
        if tokens not in ("expand", "reduce"):
            raise ValueError(f"Invalid tokens: {tokens!r} (use 'expand' or 'reduce')")
        self.bias, self.tokens = bias, tokens
        self.cotangent = Cotangent("root", subsample=indices(subsample))

    def reduce_all(
        self, structures: dict[Tensor, Structure], context: Context
    ) -> dict[Tensor, Factors]:
        with_bias = self._pairs(structures) if self.bias == "together" else {}
        biases = set(with_bias.values())
        result = {}
        for p, structure in structures.items():
            if p in biases:
                result[p] = Factors(())
                continue
            reduce = self.tokens == "reduce"
            try:
                factors = structure.kronecker(
                    reduce=reduce, bias=p in with_bias, inputs=context.first
                )
            except CurvoptError as error:
                raise CurvoptError(f"{context.name(p)}: {error}") from None
            result[p] = factors if context.factor == 1 else factors.scaled(context.factor**2)
        return result

    @staticmethod
    def _pairs(structures: dict[Tensor, Structure]) -> dict[Tensor, Tensor]:
        """Bias by weight, where both have one use and it is the same."""
        biases = {
            s.use: p for p, s in structures.items() if isinstance(s, Shift) and s.use is not None
        }
        return {
            p: biases[s.use]
            for p, s in structures.items()
            if isinstance(s, (Outer, Conv)) and s.use in biases and _fits(s, biases[s.use])
        }

    def combine(self, before: Factors, part: Factors) -> Factors:
        return before.added(part) if before else before


def _fits(weight: Outer | Conv, bias: Tensor) -> bool:
    """One bias per output, and a matrix whose inputs come last."""
    plain = isinstance(weight, Conv) or not weight.transposed
    return weight.groups == 1 and plain and bias.shape == weight.shape[:1]


class KFAC(_Sketch, KFLR):
    """As `KFLR`, from one backward column per sample: an unbiased estimate of B.

    Args:
        samples: number of random columns per sample.
        estimator: ``"rademacher"`` (default: combinations of the exact root's columns, of less
            variance), or ``"labels"`` drawn from the model as in the paper.
        generator: source of randomness, on the output's device; torch's global one by default.
        bias: as in `KFLR`.
        tokens: as in `KFLR`.
        subsample: as in `KFLR`.
    """

    field = "kfac"

    def __init__(
        self,
        samples: int = 1,
        estimator: str = "rademacher",
        generator: Generator | None = None,
        *,
        bias: str = "apart",
        tokens: str = "expand",
        subsample: Sequence[int] | Tensor | None = None,
    ):
        KFLR.__init__(self, bias=bias, tokens=tokens)
        _Sketch.__init__(self, samples, estimator, generator, subsample=subsample)
