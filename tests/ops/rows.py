"""What is checked of every row of the ops' tests: a row is a model that uses an op."""

import pytest

from tests import oracles
from tests.cases import LOSSES, build
from tests.oracles import assert_close, by_parameter, derivative
from tests.test_quantities import check, compute


def problem(row, n, loss="bce"):
    return build(row.make, row.shape, LOSSES[loss], n)


def exact(rows, slopes=True):
    """A test of every row: all quantities against the loops, and the slopes of the variance.

    Warnings are errors, so that the slow path is one.
    """

    @pytest.mark.parametrize("n", [4, 3, 1])
    @pytest.mark.parametrize("row", rows)
    def test(row, n):
        check(problem(rows[row], n))
        if slopes and n == 3:
            one = problem(rows[row], n, "mse")
            parts = compute(one, ["variance"], create_graph=True).variance.values()
            found = derivative(sum(part.sum() for part in parts), one.params)
            assert_close(by_parameter(one.params, found), oracles.total_variance_grad(*one))

    return test
