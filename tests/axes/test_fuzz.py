"""The quick version of the fuzzer, with a seed of its own; `fuzz.py` is the long one."""

import warnings

from curvopt.axes.rules import RULES
from tests.axes.fuzz import run


def test_random_programs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts, faults = run(range(20_000, 20_150))
    faults = [fault for fault in faults if fault[1] != "conservative"]
    assert not faults
    assert counts["replays"] > 400
    assert counts["accepted"] > 70
    assert counts["refused"] > 20


def test_the_fuzzer_sees_a_broken_rule(monkeypatch):
    """A softmax that keeps its owners is a hole within some dozen programs."""

    def keeps(call):
        return [call.state(call.x)] * len(call.outputs)

    for name in ("_softmax", "_log_softmax", "mean", "sum", "sort", "cumsum"):
        monkeypatch.setitem(RULES, name, keeps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts, _ = run(range(20_000, 20_040))
    assert counts["HOLES"] + counts["CRASHES"] > 0
