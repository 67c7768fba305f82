"""Jacobians of a whole batch in its parameters, and sample by sample in its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from curvopt.api import Params, record
from curvopt.engine.backward import pull_back
from curvopt.engine.compute import Result
from curvopt.errors import CurvoptError
from curvopt.quantities import GGNGram, Quantity, SqrtGGNExact

CHUNK_BYTES = 1 << 26  # cotangents and results of one chunk of columns


def param_jacobian(
    function: Callable[[], Tensor],
    params: Params,
    *,
    max_columns: int | None = None,
    create_graph: bool = False,
) -> Mapping[Tensor, Tensor]:
    """Jacobian of every sample's outputs in every parameter, in one batched backward pass.

    ``J[p][n, c] = d fs[n, c] / dp``. The columns sent back are the unit vectors of one sample's
    output, for all samples at once: as many as a sample has outputs. They are the exact root of
    the loss ``(1/2) sum |fs - const|^2``; hence ``SqrtGGNExact`` under a summed ``mse_loss`` gives
    sqrt(2) times the same rows, together with any other quantity of that loss.

    Args:
        function: runs the model, returns its outputs ``[N, *out]``.
        params: parameters, or (name, parameter) pairs.
        max_columns: outputs that are sent back together; bounded by memory by default.
        create_graph: keep the Jacobian differentiable.

    Returns:
        A mapping from parameters to ``[N, *out, *p.shape]``.

    Raises:
        CurvoptError: the outputs are no tensor with samples on its first axis, or mix samples.

    Example:
        >>> jacobian = curvopt.param_jacobian(lambda: model(x), model.parameters())
        >>> jacobian[model.weight].shape  # [N, *out, *model.weight.shape]
    """
    result, shape = _columns_of_outputs(function, params, SqrtGGNExact(), max_columns, create_graph)
    return {
        p: rows.transpose(0, 1).reshape(*shape, *p.shape)
        for p, rows in result.sqrt_ggn_exact.items()
    }


def empirical_ntk(
    function: Callable[[], Tensor],
    params: Params,
    *,
    max_columns: int | None = None,
    create_graph: bool = False,
) -> Tensor:
    """Empirical neural tangent kernel, ``K[n, c, m, d] = <d fs[n, c], d fs[m, d]>``.

    The inner products of the rows of `param_jacobian` over all parameters, from the structures:
    for a linear layer ``(x_n . x_m) (g_nc . g_md)``, so that the Jacobian is formed only where
    that is cheaper.

    Args:
        function: runs the model, returns its outputs ``[N, *out]``.
        params: parameters, or (name, parameter) pairs.
        max_columns: outputs that are sent back together; bounded by memory by default.
        create_graph: keep the kernel differentiable.

    Returns:
        ``[N, *out, N, *out]``, a positive semi-definite matrix.

    Raises:
        CurvoptError: as for `param_jacobian`.

    Example:
        >>> kernel = curvopt.empirical_ntk(lambda: model(x), model.parameters())

    References:
        Jacot et al., Neural tangent kernel: convergence and generalization in neural networks
        (NeurIPS 2018).
    """
    result, shape = _columns_of_outputs(function, params, GGNGram(), max_columns, create_graph)
    kernel: Tensor = sum(result.ggn_gram.values())  # [K, N, K, N]
    return kernel.permute(1, 0, 3, 2).reshape(*shape, *shape)


def _columns_of_outputs(
    function: Callable[[], Tensor],
    params: Params,
    quantity: Quantity,
    max_columns: int | None,
    create_graph: bool,
) -> tuple[Result, torch.Size]:
    """A quantity of a loss whose root is the identity, and the shape of the outputs."""
    tape = record(params, create_graph=create_graph)
    with torch.enable_grad(), tape:
        fs = _checked(function(), None)
        loss = 0.5 * F.mse_loss(fs, fs.detach(), reduction="sum")
    tape.batch_size = len(fs)
    return tape.compute(loss, quantity, max_columns=max_columns), fs.shape


def batch_jacobian(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    create_graph: bool = False,
    max_columns: int | None = None,
    check: bool = True,
) -> Tensor:
    """Jacobian of each sample's output in its own input, ``J[n] = d f(x)[n] / dx[n]``.

    The N x N blocks between different samples, which are zero, are never computed: the cost is one
    backward column per output of a single sample, whatever N is.

    Args:
        f: maps ``[N, *in]`` to ``[N, *out]``, every sample by itself.
        x: ``[N, *in]``.
        create_graph: keep the result differentiable, in x and in whatever else f uses.
        max_columns: columns that are sent back together; bounded by memory by default.
        check: prove that samples do not mix, by one more column; without it, outputs that mix
            samples give the sum over them.

    Returns:
        ``[N, *out, *in]``.

    Raises:
        CurvoptError: the output has another number of samples, does not depend on x, or mixes
            samples.

    Example:
        >>> curvopt.batch_jacobian(model, x).shape  # [N, *out, *in]
    """
    y, x = _forward(f, x, check)
    return _jacobian(y, x, create_graph, max_columns)


def batch_hessian(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    create_graph: bool = False,
    max_columns: int | None = None,
    check: bool = True,
) -> Tensor:
    """Hessian of each output of each sample in its own input: ``[N, *out, *in, *in]``.

    The Jacobian of the Jacobian, one column per output and input of a single sample. Arguments and
    errors are those of `batch_jacobian`.

    Example:
        >>> curvopt.batch_hessian(model, x).shape  # [N, *out, *in, *in]
    """
    y, x = _forward(f, x, check)
    jacobian = _jacobian(y, x, True, max_columns)
    return _jacobian(jacobian, x, create_graph, max_columns)


def batch_hessian_diag(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    create_graph: bool = False,
    max_columns: int | None = None,
    check: bool = True,
) -> Tensor:
    """Diagonal of `batch_hessian`, ``d^2 f(x)[n, c] / dx[n, i]^2``: ``[N, *out, *in]``.

    Its sum over the inputs is the Laplacian of a physics-informed loss. With few outputs it is a
    reverse pass over a reverse pass, one column per output and input; with more, two derivatives
    along each input, whose cost does not grow with the outputs. Arguments and errors are those of
    `batch_jacobian`.

    Example:
        >>> laplacian = curvopt.batch_hessian_diag(u, x, create_graph=True).sum(-1)
    """
    y, x = _forward(f, x, check)
    outputs, inputs = y[:1].numel(), x[:1].numel()
    if outputs > 4:
        columns = []
        for index in range(inputs):
            unit = torch.zeros_like(x).flatten(1)
            unit[:, index] = 1
            unit = unit.view_as(x)
            second = _along(_along(y, x, unit, True), x, unit, create_graph)
            columns.append(second)
        return torch.stack(columns, -1).view(*y.shape, *x.shape[1:])
    jacobian = _jacobian(y, x, True, max_columns).reshape(len(x), outputs, inputs)
    rows = [
        _jacobian(jacobian[:, :, i], x, create_graph, max_columns).flatten(2)[:, :, i]
        for i in range(inputs)
    ]
    return torch.stack(rows, -1).reshape(*y.shape, *x.shape[1:])


def _forward(f: Callable[[Tensor], Tensor], x: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    """Outputs and the input that they hang on, checked."""
    if not x.ndim or not x.is_floating_point():
        raise CurvoptError(
            f"x must be a floating point tensor [N, *in], got {list(x.shape)} {x.dtype}"
        )
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = _checked(f(x), len(x))
    if check and len(x) > 1:
        _check_separate(y, x)
    return y, x


def _checked(y: Tensor, samples: int | None) -> Tensor:
    if not isinstance(y, Tensor) or not y.ndim or samples not in (None, len(y)):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        n = "N" if samples is None else samples
        raise CurvoptError(f"the function must return one tensor [{n}, *out], got {got}")
    return y


def _check_separate(y: Tensor, x: Tensor) -> None:
    """Outputs of a random half of the samples must not depend on the inputs of the other half."""
    if not y.requires_grad:
        return
    generator = torch.Generator().manual_seed(0)
    half = torch.randperm(len(x), generator=generator) < len(x) // 2
    noise = torch.rand(y.shape, generator=generator).add_(0.5)
    noise = (noise * half.view(-1, *[1] * (y.ndim - 1))).to(y)
    (grad,) = torch.autograd.grad(y, x, noise, retain_graph=True, materialize_grads=True)
    if (grad[(~half).to(grad.device)] != 0).any():
        raise CurvoptError(
            f"the outputs {list(y.shape)} mix samples: those of one sample depend on the inputs "
            "of others, so there is no Jacobian sample by sample. Use a function that treats "
            "samples one by one (no statistics over the batch), or torch.func.jacrev for all blocks"
        )


def _jacobian(y: Tensor, x: Tensor, create_graph: bool, max_columns: int | None) -> Tensor:
    """``[N, *out, *in]`` from one backward column per output of a sample."""
    n, out = len(y), y.shape[1:]
    count = math.prod(out)
    if not y.requires_grad or not y.numel():  # a constant, as the Jacobian of a linear function
        return x.new_zeros(*y.shape, *x.shape[1:])
    size = max(1, CHUNK_BYTES // max(1, y.element_size() * (y.numel() + x.numel())))
    size = min(size, max_columns or size, count)
    chunks = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        unit = torch.zeros(stop - start, count, dtype=y.dtype, device=y.device)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
        unit = unit.view(-1, 1, *out).expand(-1, n, *out)
        (rows,) = pull_back([y], [unit], [x], batched=True, create_graph=create_graph)
        zeros = x.new_zeros(()).expand(stop - start, *x.shape)
        chunks.append(zeros if rows is None else rows)
    rows = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    return rows.transpose(0, 1).reshape(*y.shape, *x.shape[1:])


def _along(y: Tensor, x: Tensor, direction: Tensor, create_graph: bool) -> Tensor:
    """Derivative of y along a direction of x, by two reverse passes."""
    if not y.requires_grad:
        return torch.zeros_like(y)
    dummy = torch.zeros_like(y, requires_grad=True)
    (slope,) = torch.autograd.grad(y, x, dummy, create_graph=True, allow_unused=True)
    if slope is None or not slope.requires_grad:
        return torch.zeros_like(y)
    (tangent,) = torch.autograd.grad(
        slope,
        dummy,
        direction,
        create_graph=create_graph,
        retain_graph=True,
        materialize_grads=True,
    )
    return torch.zeros_like(y) if tangent is None else tangent
