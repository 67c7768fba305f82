"""The decorator itself: what fails, dies or hangs on one process fails the test."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import everywhere, ranks


@ranks()
def test_processes_know_each_other():
    assert everywhere(dist.get_rank()) == [0, 1]


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (lambda: [][dist.get_rank() - 1], "rank 0: .*IndexError"),
        (lambda: dist.get_rank() and os._exit(3), "rank 1: died"),
        (lambda: time.sleep(60 * dist.get_rank()), "rank 1: hangs"),
        (lambda: dist.get_rank() or dist.all_reduce(torch.ones(1)), "rank 0: "),
    ],
    ids=["raises", "dies", "hangs", "waits"],
)
def test_what_fails_on_one_process_fails_the_test(ending, said):
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        ranks(timeout=3)(ending)()
