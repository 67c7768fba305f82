r"""Damped polar factors, ``u = G (G^T G + eps^2 s_1^2)^(-1/2)``, by the cheapest way.

With singular values s of G, those of u are ``s / sqrt(s^2 + eps^2 s_1^2)``: nearly 1 for all
directions but the smallest. The small matrices are in double precision: a Gram matrix has squared
singular values, and those of directions that matter, ``(eps s_1)^2``, would be lost in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvopt.errors import CurvoptError
from curvopt.looks import may_look, refuse

# What the parts cost on a CPU, as products of matrices in float32 (measured at 64 to 256 rows).
EIGEN, SOLVE, DOUBLE = 45.0, 15.0, 2.0


def by_factors(rows: int, outputs: int, inputs: int) -> bool:
    """Whether a batch's few rows are the cheaper way to the polar factor of a matrix.

    Args:
        rows: n, of both factors.
        outputs: O.
        inputs: I.
    """
    small, large = sorted((outputs, inputs))
    n = rows
    if n > small:
        return False
    products = DOUBLE * 2 * n * n * (outputs + inputs + small) + 2 * n * outputs * inputs
    dense = DOUBLE * (4 * small * small * large + 2 * small**3) + EIGEN * small**3
    return products + (EIGEN + SOLVE) * n**3 < dense


def polar(matrix: Tensor, eps: float) -> Tensor:
    """The damped polar factor of a matrix ``[O, I]``, from its smaller Gram matrix.

    Args:
        matrix: G, finite.
        eps: the damping, in units of the largest singular value.

    Raises:
        torch.linalg.LinAlgError: G has no finite Gram matrix.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return polar(matrix.mT, eps).mT
    if len(matrix) == 1 and matrix.dtype != torch.float64 and matrix.device.type != "mps":
        length = torch.linalg.vector_norm(matrix, dtype=torch.float64)  # no square is too small
        return matrix / (length * (1 + eps * eps) ** 0.5).clamp(min=torch.finfo(matrix.dtype).tiny)
    wide = _scaled(matrix)
    gram = _gram(wide)
    if len(gram) == 1:
        return (wide * _inverse_root(gram[0], eps)).to(matrix.dtype)
    # A layer that is dead: no need to decompose it.
    if len(gram) > 256 and may_look() and not wide.any():
        return torch.zeros_like(matrix)
    if matrix.device.type != "cpu":  # where eigenvalues cost more than many products
        return newton_schulz(wide, gram, eps).to(matrix.dtype)
    values, vectors = _decomposed(gram)
    root = (vectors * _inverse_root(values, eps)) @ vectors.mT
    return (root @ wide).to(matrix.dtype)


def newton_schulz(wide: Tensor, gram: Tensor, eps: float) -> Tensor:
    r"""The same by products of matrices alone, as accelerators like it.

    .. math:: Y \leftarrow Y T, \quad Z \leftarrow T Z, \quad T = (3 I - Z Y) / 2

    Z goes from I to the inverse root of Y, which starts as the damped Gram matrix, scaled to
    eigenvalues in (0, 1] (Higham 2008, "Functions of Matrices", section 6.7). As many steps as
    its smallest possible eigenvalue takes to get to 1.

    Args:
        wide: G.
        gram: ``G G^T``.
        eps: the damping.
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    top, shift = _largest(gram), eps * eps
    scale = ((1 + shift) * top).clamp(min=_tiny(gram))
    y, z = (gram + shift * top * identity) / scale, identity
    smallest, last = max(shift / (1 + shift), 1e-15), False
    while not last:
        last = smallest > 1 - 1e-8  # whose distance to 1 this step squares
        t = 1.5 * identity - 0.5 * (z @ y)
        y, z = y @ t, t @ z
        smallest *= (1.5 - 0.5 * smallest) ** 2
    return (z @ wide) * scale.rsqrt()


def polar_of_rows(left: Tensor, right: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    r"""Factors of the damped polar factor of ``L^T R``, by n x n work.

    With :math:`K_L = L L^T`, :math:`K_R = R R^T = C C^T` and :math:`C^T K_L C = W f W^T`,

    .. math:: u = L^T M R, \qquad M = C W (f + \epsilon^2 \max f)^{-1/2} W^T C^{-1}

    for :math:`G G^T = L^T K_R L` and any function h has
    :math:`h(L^T K_R L) L^T = L^T h(K_R K_L)`. C is that of K_R plus some units of rounding.

    Args:
        left: L, ``[n, O]``.
        right: R, ``[n, I]``.
        eps: the damping.

    Returns:
        A, ``[n, O]``, and B, ``[n, I]``, whose product ``A^T B`` is u; None where K_R is so near to
        singular that it has no Cholesky factor.
    """
    if left.shape[1] < right.shape[1]:
        found = polar_of_rows(right, left, eps)
        return found and (found[1], found[0])
    a, b = _scaled(left), _scaled(right)
    k, gram = _gram(a), _gram(b)
    diagonal = gram.view(-1)[:: len(gram) + 1]
    shift = 10 * torch.finfo(gram.dtype).eps * diagonal.sum() + _tiny(gram)
    # Rounding leaves eigenvalues down to minus some units of the largest one.
    diagonal.add_(shift)
    c, info = torch.linalg.cholesky_ex(gram)
    if not may_look():
        refuse(info != 0, lambda: CurvoptError("the rows have no Cholesky factor"))
    elif info.item():
        return None
    values, w = _decomposed(c.mT @ k @ c)
    back = torch.linalg.solve_triangular(c, w.mT.contiguous(), upper=False, left=False)
    root = torch.where(values[-1] > _tiny(values), _inverse_root(values, eps), 0)
    m = (c @ (w * root)) @ back
    # The inverse root is of the scaled factors, and so is what it is multiplied by.
    return (a if a.dtype == left.dtype else left), (m @ b).to(right.dtype)


def _decomposed(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors.

    Raises:
        torch.linalg.LinAlgError: there are none; where nobody may look, it is refused later.
    """
    if may_look():
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    # It would raise inside of a graph, for a matrix that is not finite.
    finite = gram.isfinite().all()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, gram, identity))
    # Of the values as well: a graph then writes nothing before it has them.
    bad = ~(finite & values.isfinite().all())
    refuse(bad, lambda: CurvoptError("a Gram matrix is not finite"))
    return values, vectors


def _inverse_root(values: Tensor, eps: float) -> Tensor:
    """Of the eigenvalues of a Gram matrix, the largest last, damped; of zeros, a number."""
    values = values.clamp(min=_tiny(values))  # rounding leaves negative ones
    return torch.add(values, values[-1], alpha=eps * eps).rsqrt_()


def _gram(rows: Tensor) -> Tensor:
    """Products of all pairs of rows: of large blocks, each pair's once."""
    half = len(rows) // 2
    if half < 64 or rows.device.type != "cpu":
        return rows @ rows.mT
    upper, lower = rows[:half], rows[half:]
    across = upper @ lower.mT
    top = torch.cat([upper @ upper.mT, across], 1)
    return torch.cat([top, torch.cat([across.mT, lower @ lower.mT], 1)])


def _scaled(matrix: Tensor) -> Tensor:
    """In double precision where there is one, and with squares that are normal numbers."""
    if matrix.dtype != torch.float64 and matrix.device.type != "mps":
        return matrix.double()
    return matrix / matrix.abs().amax().clamp(min=_tiny(matrix))


def _largest(gram: Tensor) -> Tensor:
    """The largest eigenvalue, from the norm of a high power: far apart from others or not."""
    steps = 40 if gram.dtype == torch.float64 else 24
    norm = torch.linalg.matrix_norm(gram).clamp(min=_tiny(gram))
    power, logarithm = gram / norm, norm.log()
    for k in range(1, steps):
        power = power @ power
        norm = torch.linalg.matrix_norm(power).clamp(min=_tiny(gram))
        power, logarithm = power / norm, logarithm + norm.log() * math.ldexp(1.0, -k)
    return logarithm.exp()


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
