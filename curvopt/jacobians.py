"""Jacobians of a whole batch in its parameters, and sample by sample in its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from curvopt.api import Params, record
from curvopt.axes.layout import Layout
from curvopt.engine.backward import pull_back
from curvopt.engine.computation import Computation
from curvopt.engine.separate import check_slopes, watched
from curvopt.errors import CurvoptError
from curvopt.quantities import GGNGram, Quantity, SqrtGGNExact
from curvopt.structures.numerics import sum_tensors

CHUNK_BYTES = 1 << 26  # cotangents and results of one chunk of columns


def param_jacobian(
    function: Callable[[], Tensor],
    params: Params,
    *,
    max_columns: int | None = None,
    create_graph: bool = False,
) -> Mapping[Tensor, Tensor]:
    """Jacobian of every sample's outputs in every parameter, in one batched backward pass.

    ``J[p][n, c] = d fs[n, c] / dp``, in the order of the outputs, whichever sample of the data an
    element belongs to. The columns sent back are the unit vectors of one sample's output, for all
    samples at once: as many as a sample has outputs. They are the exact root of the
    loss ``(1/2) sum |fs - const|^2``; hence ``SqrtGGNExact`` under a summed ``mse_loss`` gives
    sqrt(2) times the same rows, together with any other quantity of that loss.

    Args:
        function: runs the model, returns its outputs ``[N, *out]``.
        params: parameters, or (name, parameter) pairs.
        max_columns: outputs that are sent back together; bounded by memory by default.
        create_graph: keep the Jacobian differentiable.

    Returns:
        A mapping from parameters to ``[N, *out, *p.shape]``.

    Raises:
        CurvoptError: the outputs are no tensor, or mix samples.

    Example:
        >>> jacobian = curvopt.param_jacobian(lambda: model(x), model.parameters())
        >>> jacobian[model[0].weight].shape  # [N, *out, *weight.shape]
        torch.Size([8, 3, 5, 4])
    """
    roots, outputs = _columns_of_outputs(
        function, params, SqrtGGNExact(), max_columns, create_graph
    )
    return {p: outputs.merge(rows.transpose(0, 1), 0) for p, rows in roots.items()}


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
        >>> curvopt.empirical_ntk(lambda: model(x), model.parameters()).shape
        torch.Size([8, 3, 8, 3])

    References:
        Jacot et al., Neural tangent kernel: convergence and generalization in neural networks
        (NeurIPS 2018).
    """
    grams, outputs = _columns_of_outputs(function, params, GGNGram(), max_columns, create_graph)
    kernel = sum_tensors(list(grams.values()))  # [V, N, V, N]
    return outputs.merge(outputs.merge(kernel.permute(1, 0, 3, 2), 2), 0)


def _columns_of_outputs(
    function: Callable[[], Tensor],
    params: Params,
    quantity: Quantity,
    max_columns: int | None,
    create_graph: bool,
) -> tuple[Mapping[Tensor, Tensor], _Outputs]:
    """A quantity of a loss whose root is the identity, and where its columns are outputs."""
    tape = record(params, create_graph=create_graph)
    with torch.enable_grad(), tape:
        fs = _checked(function(), None)
        loss = 0.5 * F.mse_loss(fs, fs.detach(), reduction="sum")
    tape.batch_size = len(fs)
    computation = Computation(tape, loss, max_columns=max_columns)
    try:
        computation.prepare()
    except CurvoptError as error:  # the samples may lie elsewhere: any that are apart will do
        tape.batch_size = None
        computation = Computation(tape, loss, max_columns=max_columns)
        try:
            computation.prepare()
        except CurvoptError:
            raise CurvoptError(
                f"{error} (The outputs {list(fs.shape)} were taken for {len(fs)} samples: if they "
                "have the samples on another axis, return them with the samples on the first one.)"
            ) from error
    values = computation.run([quantity])[quantity.field]
    return values, _Outputs(fs.shape, computation.term_layouts[0])


class _Outputs(NamedTuple):
    """Outputs of samples: their shape, and the samples' places."""

    shape: torch.Size
    layout: Layout | None

    def merge(self, rows: Tensor, lead: int) -> Tensor:
        """Values by sample and column, ``[*lead axes, N, V, ...]``, by output."""
        layout = self.layout
        assert layout is not None  # else no column would have been sent back
        before, after = rows.shape[:lead], rows.shape[lead + 2 :]
        split = rows.reshape(*before, layout.n, layout.k, *self.shape[layout.axes :], *after)
        merged = layout.merge(split, lead, self.shape[: layout.axes])
        return merged.reshape(*before, *self.shape, *after)


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
    backward column per output of a single sample (or two per input, if these are far fewer),
    whatever N is.

    Args:
        f: maps ``[N, *in]`` to ``[N, *out]``, every sample by itself.
        x: ``[N, *in]``.
        create_graph: keep the result differentiable, in x and in whatever else f uses.
        max_columns: columns that are sent back together; bounded by memory by default.
        check: prove that samples do not mix; without it, outputs that mix samples give the sum over
            them. The ops of f are watched, and what they do to samples is worked out once for equal
            calls: that takes no column. Where they do not prove it (samples that meet where no
            gradient goes, ops that are not known, a custom autograd.Function, hooks), two columns
            per binary digit of N tell any two samples apart both ways, at this very x: 20 for
            N = 1000, and as many again for Hessians and with `create_graph`.

    Returns:
        ``[N, *out, *in]``.

    Raises:
        CurvoptError: the output has another number of samples, does not depend on x, or mixes
            samples.

    Example:
        >>> curvopt.batch_jacobian(model, x).shape  # [N, *out, *in]
        torch.Size([8, 3, 4])
    """
    y, x = _forward(f, x, check, create_graph)
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

    The Jacobian of the Jacobian, one column per input of a single sample. Arguments and errors are
    those of `batch_jacobian`.

    Example:
        >>> curvopt.batch_hessian(model, x).shape  # [N, *out, *in, *in]
        torch.Size([8, 3, 4, 4])
    """
    y, x = _forward(f, x, check, True)
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

    Its sum over the inputs is the Laplacian of a physics-informed loss. One column per input of a
    single sample, through the Jacobian's graph or along that input. Arguments and errors are those
    of `batch_jacobian`.

    Example:
        >>> laplacian = curvopt.batch_hessian_diag(model, x, create_graph=True).sum(-1)
        >>> laplacian.shape
        torch.Size([8, 3])
    """
    y, x = _forward(f, x, check, True)
    outputs, inputs = y[:1].numel(), x[:1].numel()
    size = x.numel() * max(1, outputs)
    parts: list[Tensor] = []
    if not y.numel():
        return x.new_zeros(*y.shape, *x.shape[1:])
    if outputs > 4:  # two derivatives along each input, whose cost does not grow with the outputs
        for _, unit in _units(x, size, 1):
            (slope,) = _tangents(y, x, unit, True)
            parts += _tangents(slope, x, unit, create_graph)
        return torch.stack(parts, -1).view(*y.shape, *x.shape[1:])
    jacobian = _jacobian(y, x, True, max_columns).reshape(len(x), outputs, inputs)
    for start, unit in _units(x, size, max_columns):
        if outputs == 1:  # symmetric: a column of the Hessian is a row
            columns = _rows(jacobian.view_as(x), x, unit, create_graph).flatten(2).unsqueeze(2)
        else:
            columns = _tangents(jacobian, x, unit, create_graph)
        parts += [column[..., start + i] for i, column in enumerate(columns)]
    return torch.stack(parts, -1).view(*y.shape, *x.shape[1:])


def _forward(
    f: Callable[[Tensor], Tensor], x: Tensor, check: bool, further: bool
) -> tuple[Tensor, Tensor]:
    """Outputs and the input that they hang on, checked."""
    if not x.ndim or not x.is_floating_point():
        raise CurvoptError(
            f"x must be a floating point tensor [N, *in], got {list(x.shape)} {x.dtype}"
        )
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        check = check and len(x) > 1
        y, proved = watched(f, x) if check else (f(x), False)
        y = _checked(y, len(x))
        if check and not proved:
            check_slopes(y, x, further=further)
    return y, x


def _checked(y: Tensor, samples: int | None) -> Tensor:
    if not isinstance(y, Tensor) or not y.ndim or samples not in (None, len(y)):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        n = "N" if samples is None else samples
        raise CurvoptError(f"the function must return one tensor [{n}, *out], got {got}")
    return y


def _jacobian(y: Tensor, x: Tensor, create_graph: bool, max_columns: int | None) -> Tensor:
    """``[N, *out, *in]``: a column per output of a sample, or per input if these are far fewer."""
    if not y.requires_grad or not y.numel():  # a constant, as the Jacobian of a linear function
        return x.new_zeros(*y.shape, *x.shape[1:])
    size, forward = x.numel() + y.numel(), y[:1].numel() > 2 * x[:1].numel()
    move = _tangents if forward else _rows
    units = _units(x if forward else y, size, max_columns)
    parts = [move(y, x, unit, create_graph) for _, unit in units]
    columns = torch.cat(parts) if len(parts) > 1 else parts[0]
    columns = columns.movedim(0, -1) if forward else columns.transpose(0, 1)
    return columns.reshape(*y.shape, *x.shape[1:])


def _units(like: Tensor, size: int, max_columns: int | None) -> Iterator[tuple[int, Tensor]]:
    """Unit vectors of one sample, for all samples, in chunks ``[V, *like.shape]`` from a start."""
    count = like[:1].numel()
    fitting = max(1, CHUNK_BYTES // max(1, like.element_size() * size))
    step = min(fitting, max_columns or fitting)
    for start in range(0, count, step):
        stop = min(start + step, count)
        unit = torch.zeros(stop - start, count, dtype=like.dtype, device=like.device)
        unit[torch.arange(stop - start, device="cpu"), torch.arange(start, stop, device="cpu")] = 1
        yield start, unit.view(-1, 1, *like.shape[1:]).expand(-1, *like.shape)


def _rows(y: Tensor | None, x: Tensor, cotangents: Tensor, create_graph: bool) -> Tensor:
    """Cotangents ``[V, *y.shape]`` carried back to x: ``[V, *x.shape]``."""
    rows = None
    if y is not None and y.requires_grad:
        (rows,) = pull_back([y], [cotangents], [x], batched=True, create_graph=create_graph)
    return x.new_zeros(len(cotangents), *x.shape) if rows is None else rows


def _tangents(y: Tensor, x: Tensor, directions: Tensor, create_graph: bool) -> Tensor:
    """Derivatives of y along directions ``[V, *x.shape]``, by two reverse passes."""
    dummy = torch.zeros_like(y, requires_grad=True)
    slope = None
    if y.requires_grad:
        (slope,) = torch.autograd.grad(y, x, dummy, create_graph=True, allow_unused=True)
    return _rows(slope, dummy, directions, create_graph)
