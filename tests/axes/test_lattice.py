"""Laws of owners, and of what a replay does with views, writes, claims and marks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvopt.axes import MIXED, NONE, Replay, Trace
from curvopt.axes.lattice import (
    along,
    filled,
    join,
    merge,
    only,
    regroup,
    squash,
    strip,
)

OWNERS = [NONE, 0, 1, MIXED]


def owner(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_join_is_the_least_upper_bound():
    for a, b, c in itertools.product(OWNERS, repeat=3):
        a, b, c = owner(a), owner(b), owner(c)
        assert join(a, b) == join(b, a)
        assert join(a, join(b, c)) == join(join(a, b), c)
        assert join(a, a) == a
        assert join(a, owner(NONE)) == a
        assert join(a, owner(MIXED)) == MIXED
    assert join(owner(0), owner(1)) == MIXED


def test_merge_is_join_over_elements():
    for values in itertools.product(OWNERS, repeat=3):
        joined = owner(NONE)
        for value in values:
            joined = join(joined, owner(value))
        assert merge(owner(*values), [0]) == joined


def test_merge_of_nothing():
    assert merge(torch.empty(2, 0, dtype=torch.int32), [1]).tolist() == [[NONE], [NONE]]


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(shapes, st.data())
def test_regroup_is_view(old, data):
    """Compressed or not, the owners after a view are those of the viewed tensor."""
    numel = torch.Size(old).numel()
    parts = [d for d in range(1, numel + 1) if numel % d == 0]
    first = data.draw(st.sampled_from(parts))
    new = data.draw(st.permutations([first, numel // first, 1]))
    dims = [data.draw(st.booleans()) for _ in old]
    compressed = torch.randint(-1, 3, [n if d else 1 for n, d in zip(old, dims, strict=True)]).to(
        torch.int32
    )
    whole = compressed.expand(old).reshape(new)
    assert torch.equal(regroup(compressed, old, new).expand(new), whole)


@given(shapes)
def test_compression_changes_nothing(shape):
    owners = torch.randint(-1, 2, shape).to(torch.int32)
    assert torch.equal(squash(owners).expand(shape), owners)
    expanded = only(owners[:1], [2, *shape[1:]], [0])
    assert torch.equal(strip(expanded).expand_as(expanded), expanded)


def test_filled_takes_the_owner_of_the_slice():
    owners = owner(NONE, 0, NONE, 1).reshape(2, 2)
    assert filled(owners).tolist() == [[0, 0], [1, 1]]
    # No axis tells whose the elements without owner are.
    shifted = owner(0, NONE, NONE, NONE).reshape(2, 2)
    assert torch.equal(filled(shifted), shifted)


def replayed(function, x, dim=0, **options):
    """The owners of what the function returns, with samples on a dim of x."""
    with Trace() as trace:
        y = function(x)
    end, ref = len(trace.ops), trace.ref(y)
    seeds = {trace.ref(x).storage: along(x.shape, dim)}
    state = Replay(trace, seeds, marks=[(end, ref)], **options).run().marked[end, ref]
    return None if state is None else state.owners.expand(y.shape)


def test_writes_are_seen_through_other_views():
    def shifted(x):
        y = x.clone()
        row = y[0]
        y[0].copy_(x[1])
        return row * 1

    assert (replayed(shifted, torch.randn(4, 3)) == 1).all()


def test_what_was_known_is_not_changed_by_later_writes():
    x = torch.randn(4, 3)
    with Trace() as trace:
        y = x.clone()
        y[0].copy_(x[1])
        rest = trace.ref(y[2:])
        at = len(trace.ops)
        y[2:].copy_(x[:2])
    replay = Replay(trace, {trace.ref(x).storage: along(x.shape, 0)}, marks=[(at, rest)]).run()
    assert replay.marked[at, rest].owners.flatten().tolist() == [2, 3]


def test_overlapping_writes():
    def summed(x):
        y = torch.zeros(3)
        window = y.as_strided((2, 2), (1, 1))
        window[0].copy_(x[0, :2])
        window[1].add_(x[1, :2])
        return y

    assert replayed(summed, torch.randn(4, 3)).tolist() == [0, MIXED, 1]


def test_zero_clears_owners():
    def cleared(x):
        y = x.clone()
        y[:2].zero_()
        return y

    assert replayed(cleared, torch.randn(4, 1)).flatten().tolist() == [NONE, NONE, 2, 3]


def test_a_loop_of_rows():
    def looped(x):
        y = torch.empty(4, 3)
        for i in range(4):
            y[i] = x[i].exp()
        return y

    assert replayed(looped, torch.randn(4, 3))[:, 0].tolist() == [0, 1, 2, 3]


def test_bits_of_another_size_are_mixed():
    def reinterpreted(x):
        y = x.clone()
        y.view(torch.int16)[0].zero_()
        return y

    assert (replayed(reinterpreted, torch.randn(4, 3)) == MIXED).all()


def test_a_resized_storage_is_mixed_until_written():
    def resized(x):
        y = x.clone()
        y.resize_(8, 3)[7].copy_(x[0])
        return y

    assert replayed(resized, torch.randn(4, 3))[:, 0].tolist() == [MIXED] * 7 + [0]


def test_marks_see_a_tensor_before_each_op():
    x, w = torch.randn(4, 3), torch.randn(3, 3)
    with Trace() as trace:
        y = torch.zeros(4, 3)
        y.add_(x)
        y.mul_(w.sum())
    ref = trace.ref(y)
    marks = [(k, ref) for k in range(len(trace.ops) + 1)]
    seeds = {trace.ref(x).storage: along(x.shape, 0)}
    marked = Replay(trace, seeds, marks=marks).run().marked
    states = [marked[mark] for mark in marks]
    names = [op.name for op in trace.ops]
    assert names == ["zeros", "add", "sum", "mul"]
    assert [state is None for state in states] == [True, True, False, False, False]


def test_claims_on_an_expanded_view():
    """Copies of one token, each with the sample that it is put beside."""
    x, token = torch.randn(4, 2, 3), torch.randn(1, 1, 3)
    with Trace() as trace:
        copies = token.expand(4, -1, -1)
        k = len(trace.ops)
        y = torch.cat([copies, x], 1) * 2
    end, ref = len(trace.ops), trace.ref(y)
    seeds = {trace.ref(x).storage: along(x.shape, 0)}
    claim = {(k, trace.ref(copies)): along((4, 1, 3), 0)}
    plain = Replay(trace, seeds, marks=[(end, ref)]).run().marked[end, ref].owners
    assert plain[0, :, 0].tolist() == [NONE, 0, 0]
    for options in ({"claims": claim}, {"fill": True}):
        state = Replay(trace, seeds, marks=[(end, ref)], **options).run().marked[end, ref]
        assert state.owners.expand(y.shape)[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_claim_that_mixes():
    x = torch.randn(4, 3)
    with Trace() as trace:
        y = x * 2
        z = y + 1
    mark = (len(trace.ops), trace.ref(z))
    claim = {(1, trace.ref(y)): along((4, 3), 0).flip(0)}
    seeds = {trace.ref(x).storage: along(x.shape, 0)}
    state = Replay(trace, seeds, claims=claim, marks=[mark]).run().marked[mark]
    assert (state.owners == MIXED).all()


def test_the_meeting_is_named():
    x = torch.randn(4, 3)
    with Trace() as trace:
        h = x * 2
        h - h.mean(0)
    replay = Replay(trace, {trace.ref(x).storage: along(x.shape, 0)}).run()
    assert (replay.met.op, replay.met.name, replay.met.shapes) == (1, "mean", ((4, 3),))
    assert str(replay.met) == "mean of [4, 3]"


def test_a_rule_that_fails_mixes_and_does_not_raise(monkeypatch):
    from curvopt.axes.rules import RULES

    def broken(call):
        raise IndexError("a rule that does not fit")

    monkeypatch.setitem(RULES, "flip", broken)
    assert (replayed(lambda x: x.flip(1), torch.randn(4, 3)) == MIXED).all()
    monkeypatch.setattr(Replay, "strict", True)
    with pytest.raises(IndexError, match="does not fit"):
        replayed(lambda x: x.flip(1), torch.randn(4, 3))
