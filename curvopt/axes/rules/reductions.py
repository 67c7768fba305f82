"""Ops that combine elements along dims, or normalize along them."""

from __future__ import annotations

from curvopt.axes.lattice import State, align, drop, join_all, merge, merge_all
from curvopt.axes.ops import Ref
from curvopt.axes.rules.base import (
    Call,
    Refuse,
    Result,
    broadcast,
    dims_of,
    ones,
    rule,
    shared_ragged,
)

# Their dim is the last one where it is not given.
_LAST = frozenset("topk kthvalue sort mode glu".split())


@rule(
    "mean sum nansum amax amin var std var_mean std_mean prod any all logsumexp norm "
    "linalg_vector_norm argmax argmin max min median nanmedian mode count_nonzero aminmax "
    "kthvalue topk sort cumsum cumprod logcumsumexp _logcumsumexp cummax cummin _softmax "
    "_log_softmax _safe_softmax _softmax_backward_data "
    "_log_softmax_backward_data glu",
    ragged=True,
)
def reduce(call: Call) -> Result:
    """Every element depends on all along the dims, which are kept, dropped or filled."""
    x = call.x
    if x.ndim == 0:
        return [broadcast(call, call.inputs, 0)] * len(call.outputs)
    dim = call.arg("dim") if call.has("dim") else None
    if call.op.name in _LAST and dim is None:
        dim = -1
    dims = dims_of(dim, x.ndim)
    if any(ref.ndim != x.ndim for ref in call.inputs):
        raise Refuse
    ragged = shared_ragged(call, call.inputs)
    if ragged is not None and x.ndim + ragged[0] in dims:
        raise Refuse  # what a mask leaves out belongs to samples that no element is owned by
    owners = join_all(*(call.merged(ref, dims) for ref in call.inputs))
    if owners is None:
        return None
    kept = owners, ragged
    if ragged is not None:
        ragged = ragged[0] + sum(d > x.ndim + ragged[0] for d in dims), ragged[1]
    dropped = drop(owners, dims), ragged
    return [State(*(kept if ref.ndim == x.ndim else dropped)) for ref in call.outputs]


@rule("renorm")
def renorm(call: Call) -> Result:
    """Each slice along the dim is divided by its own norm."""
    dim = call.arg("dim") % call.x.ndim
    return ones(call.merged(call.x, [d for d in range(call.x.ndim) if d != dim]))


@rule("multinomial")
def multinomial(call: Call) -> Result:
    """Drawn from the probabilities of a row."""
    return ones(call.merged(call.x, [-1]))


@rule(
    "linalg_cholesky_ex linalg_inv_ex _linalg_det _linalg_slogdet linalg_qr _linalg_svd "
    "_linalg_eigh linalg_lu linalg_lu_factor_ex linalg_matrix_exp cholesky cholesky_inverse"
)
def matrices(call: Call) -> Result:
    """A function of each matrix in a batch of matrices."""
    owners = call.merged(call.x, [-1, -2])
    if owners is None:
        return None
    batch = call.x.ndim - 2
    if any(ref.ndim not in (batch, batch + 1, batch + 2) for ref in call.outputs):
        raise Refuse
    kept = list(owners.shape[:batch])
    return [State(owners.reshape(kept + [1] * (ref.ndim - batch))) for ref in call.outputs]


@rule("linalg_solve_triangular cholesky_solve")
def solve(call: Call) -> Result:
    """One matrix by the other, batch by batch; the right side's columns are apart."""
    ndim = call.outputs[0].ndim
    matrix, right = call.inputs[:2]
    if call.op.name == "cholesky_solve":
        matrix, right = right, matrix
    left = call.arg("left") if call.has("left") else True
    both = [call.merged(matrix, [-1, -2]), call.merged(right, [-2 if left else -1])]
    return ones(
        join_all(*(o.reshape((1,) * (ndim - o.ndim) + o.shape) for o in both if o is not None))
    )


@rule("_linalg_solve_ex")
def solve_general(call: Call) -> Result:
    """One matrix by the other, or by a vector, batch by batch."""
    a, b = call.op.args[:2]
    vector = b.ndim == 1 or b.shape == a.shape[:-1]
    matrix = call.merged(a, [-1, -2])
    right = call.merged(b, [-1 if vector or not call.arg("left") else -2])
    if right is not None and vector:
        right = right.unsqueeze(-1)
    both = [None if o is None else align(o, call.outputs[0].ndim + vector) for o in (matrix, right)]
    owners = join_all(*both)
    result = ones(owners if owners is None or not vector else owners.squeeze(-1))
    rest = [None if matrix is None else matrix.flatten(a.ndim - 2) for _ in call.outputs[1:]]
    return [
        result,
        *(
            None if o is None else State(o.reshape([*o.shape[:-1], *[1] * (r.ndim - a.ndim + 2)]))
            for o, r in zip(rest, call.outputs[1:], strict=True)
        ),
    ]


@rule("linalg_cross")
def cross(call: Call) -> Result:
    """Every element depends on both vectors."""
    ndim, dim = call.outputs[0].ndim, call.arg("dim")
    dim = dim - ndim if dim >= 0 else dim
    both = [call.merged(ref, [dim]) for ref in call.inputs[:2]]
    return ones(join_all(*(None if o is None else align(o, ndim) for o in both)))


@rule("bucketize searchsorted isin")
def looked_up(call: Call) -> Result:
    """Element by element, in a row of others: that of its place, or one for all."""
    first, second = call.op.args[:2]
    row, x = (first, second) if call.op.name == "searchsorted" else (second, first)
    others = call.op.kwargs and any(isinstance(value, Ref) for _, value in call.op.kwargs)
    if not (isinstance(row, Ref) and isinstance(x, Ref)) or others:
        raise Refuse
    rows = call.owners(row)
    if rows is not None:
        whole = call.op.name == "isin" or row.ndim == 1
        rows = merge_all(rows, x.ndim) if whole else merge(rows, [row.ndim - 1])
    return ones(join_all(call.owners(x), rows))


@rule("_fft_r2c _fft_c2r _fft_c2c")
def fourier(call: Call) -> Result:
    """Every frequency depends on all along the dims."""
    return ones(call.merged(call.x, call.arg("dim")))


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> Result:
    """Slices along the dim are scaled to the given norms."""
    v, g = call.inputs
    dim = call.arg("dim") % v.ndim
    others = [d for d in range(v.ndim) if d != dim]
    owners = join_all(call.merged(v, others), call.owners(g))
    if owners is None:
        return None
    return [
        State(owners),
        State(owners if call.outputs[1].ndim == v.ndim else merge(owners, others)),
    ]
