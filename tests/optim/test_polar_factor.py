"""Damped polar factors against a singular value decomposition, by every way to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvopt.optim.polar_factor import _scaled, by_factors, newton_schulz, polar, polar_of_rows

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
sizes = st.integers(1, 12)
dtypes = st.sampled_from([torch.float64, torch.float32])
EPS = 1e-3


def oracle(matrix, eps=EPS):
    """u = sum_k s_k / sqrt(s_k^2 + eps^2 s_1^2) a_k b_k^T; 0 of 0."""
    a, s, b = torch.linalg.svd(matrix.double(), full_matrices=False)
    damped = (s.square() + eps**2 * s[0].square()).sqrt()
    return (a * torch.where(s[0] > 0, s / damped, 0)) @ b


def close(found, matrix, dtype, eps=EPS):
    assert found.dtype == dtype
    assert found.shape == matrix.shape
    expected = oracle(matrix, eps)
    apart = torch.linalg.matrix_norm(found.double() - expected)
    assert apart <= TOLERANCE[dtype] * torch.linalg.matrix_norm(expected)


def by_newton_schulz(matrix, eps):
    wide = _scaled(matrix)
    if wide.shape[0] > wide.shape[1]:
        return by_newton_schulz(matrix.mT, eps).mT
    return newton_schulz(wide, wide @ wide.mT, eps).to(matrix.dtype)


def by_rows(left, right, eps):
    found = polar_of_rows(left, right, eps)
    assert found is not None
    return found[0].mT @ found[1]


@st.composite
def factors(draw):
    """Rows whose product is of full or low rank, of any scale and spectrum, or zero."""
    n, o, i = draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    left, right = (
        torch.randn(n, size, generator=generator, dtype=torch.float64) for size in (o, i)
    )
    rank = draw(st.integers(1, n))
    for k in range(rank, n):  # further rows repeat the first ones
        right[k] = right[k % rank]
    spread = draw(st.sampled_from([0.0, 1.0, 4.0]))
    left *= 10 ** (-spread * torch.rand(n, 1, generator=generator, dtype=torch.float64))
    scale = draw(st.sampled_from([1.0, 1e-6, 1e6, 0.0]))
    dtype = draw(dtypes)
    return (left * scale).to(dtype), right.to(dtype)


@settings(max_examples=150, deadline=None)
@given(factors())
def test_rows_and_their_product(pair):
    left, right = pair
    matrix = left.double().mT @ right.double()  # as float32 holds the rows, not their product
    close(by_rows(left, right, EPS), matrix, left.dtype)
    matrix = left.mT @ right
    close(polar(matrix, EPS), matrix, matrix.dtype)
    close(by_newton_schulz(matrix, EPS), matrix, matrix.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 90, 80), (40, 90, 60), (90, 40, 60), (70, 7, 90)])
@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_shapes(shape, dtype, eps):
    """One sample, few of them, and more samples than features."""
    n, o, i = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, size, generator=generator).to(dtype) for size in (o, i))
    matrix = left.double().mT @ right.double()
    close(by_rows(left, right, eps), matrix, dtype, eps)
    matrix = left.mT @ right
    close(polar(matrix, eps), matrix, dtype, eps)
    close(by_newton_schulz(matrix, eps), matrix, dtype, eps)


@pytest.mark.parametrize("scale", [1e-300, 1e-140, 1e140, 1e300])
def test_extreme_scales(scale):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    expected = polar(matrix, EPS)
    torch.testing.assert_close(polar(matrix * scale, EPS), expected, rtol=1e-9, atol=1e-9)
    left, right = (matrix * scale).mT, torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(by_rows(left, right, EPS), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zeros(dtype):
    zeros, ones = torch.zeros(3, 5, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    assert not polar(torch.zeros(300, 280, dtype=dtype), EPS).any()
    for found in (
        polar(zeros, EPS),
        by_newton_schulz(zeros, EPS),
        by_rows(zeros, ones, EPS),
        by_rows(ones, zeros, EPS),
        by_rows(zeros, zeros, EPS),
    ):
        assert not found.any()


def test_no_number_has_no_factor():
    with pytest.raises(torch.linalg.LinAlgError):
        polar(torch.full((3, 4), torch.nan), EPS)
    assert polar_of_rows(torch.ones(2, 3), torch.full((2, 3), torch.nan), EPS) is None


def test_rows_are_taken_where_they_are_few():
    assert by_factors(128, 1000, 784)
    assert by_factors(8, 100, 100)
    assert not by_factors(128, 100, 500)
    assert not by_factors(2048, 256, 64)
    assert not by_factors(6, 5, 4)
