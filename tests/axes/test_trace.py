"""What a trace records, what its key tells apart, and that it keeps no memory."""

import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F

from curvopt.axes import Ref, Replay, Trace, infer
from curvopt.errors import CurvoptError
from tests.axes.programs import scripted


def key(function):
    torch.manual_seed(0)
    with Trace() as trace:
        function()
    return trace.key


X, Y, W = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)


@scripted
def doubled(x):
    return torch.tanh(x) * 2


@scripted
def tripled(x):
    return torch.tanh(x) * 3


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mean):
        return x - x.mean(0) if mean else x * 2

    @staticmethod
    def backward(ctx, g):
        return g, None


def no_grad(function):
    with torch.no_grad():
        return function()


DIFFERENT = {
    "wiring": (lambda: (X + Y) * X, lambda: (X + Y) * Y),
    "which of two": (lambda: [X * 2, X * 2][0] + Y, lambda: (X * 2) + (Y * 2) * 0),
    "number": (lambda: X * 0.5, lambda: X * 0.25),
    "slice": (lambda: X[1:3] * 2, lambda: X[0:2] * 2),
    "shift": (lambda: torch.cat([X[1:], X[:1]]), lambda: torch.cat([X[2:], X[:2]])),
    "shape": (lambda: X * 2, lambda: X[:3] * 2),
    "stride": (lambda: X * 2, lambda: X.t() * 2),
    "dtype": (lambda: X * 2, lambda: X.double() * 2),
    "requires_grad": (lambda: X * 2, lambda: X.clone().requires_grad_() * 2),
    "grad of an input": (lambda: W @ X, lambda: W.detach() @ X),
    "grad mode": (lambda: W * 2, lambda: no_grad(lambda: W * 2)),
    "in place": (lambda: X.clone().mul(2), lambda: X.clone().mul_(2)),
    "scripted": (lambda: doubled(X), lambda: tripled(X)),
    "custom function": (lambda: Doubled.apply(W, True), lambda: Doubled.apply(W, False)),
    "dim": (lambda: X.sum(0), lambda: X.sum(1)),
    "list": (lambda: X.sum((0, 1)), lambda: X.sum((1,))),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_key_tells_apart(name):
    one, other = DIFFERENT[name]
    assert key(one) == key(one)
    assert hash(key(one)) == hash(key(one))
    assert key(one) != key(other)


def test_key_is_of_code_not_of_values():
    assert key(lambda: X * 2) == key(lambda: Y * 2)


def test_key_is_that_of_any_batch_of_a_data_set():
    """Where it was cut out is no part of the key; how two views lie to each other is."""
    data = torch.randn(12, 4)
    parts = [data[start : start + 4] for start in (0, 3, 4, 8)]
    keys = {key(lambda x=x: (x.view(2, 8) * 2, x[1:].t() + 1)) for x in parts}
    assert len(keys) == 1

    def moved(x, y):
        return key(lambda: x[:3] * 2 + y[1:])

    apart = {moved(parts[0], other) for other in (parts[0], parts[1], parts[2], torch.randn(4, 4))}
    assert len(apart) == 4
    assert moved(parts[1], parts[0]) not in apart  # which begins before the first one
    assert moved(parts[0], parts[2]) == moved(parts[2], parts[3])


def test_refs_of_a_batch_of_a_data_set():
    data = torch.randn(12, 4)
    part, longer, empty = data[4:6], data[2:6], data[:0]
    with Trace() as trace:
        y = part * 2
        longer + 1
        data.double()
    at, before, whole = (ref for op in trace.ops for ref in op.inputs)
    assert [at.offset, before.offset, whole.offset] == [0, -8, -16]
    assert [trace.begin(ref) for ref in (at, before, whole)] == [16, 8, 0]
    assert [trace.end(ref) for ref in (at, before, whole)] == [24, 24, 48]
    assert trace.begin(trace.ref(y)) == 0
    assert trace.end(trace.ref(empty)) == 0


def test_index_values_are_no_part_of_the_key_but_kept():
    def indexed(i):
        with Trace() as trace:
            X[i] * 2
        return trace

    one, other = indexed(torch.tensor([0, 1])), indexed(torch.tensor([2, 1]))
    assert one.key == other.key
    assert one.value_dependent
    [(_, kept)] = other.values.items()
    assert kept[0] is None
    assert kept[1].tolist() == [2, 1]


def test_values_of_what_was_made_of_nothing_are_fixed():
    with Trace() as trace:
        i = torch.arange(4)
        X[i] * torch.rand(4, 4)
        X[torch.tensor([0, 1])]
    made = trace.ref(i).storage
    assert made in trace.fixed
    assert not set(trace.outside) & trace.fixed
    drawn = next(op for op in trace.ops if op.name == "rand").outputs[0]
    assert drawn.storage not in trace.fixed


def test_refs():
    with Trace() as trace:
        y = X[1:] * 2
        y.add_(1)
        z = y.t()
    assert trace.outside[trace.ref(X).storage].shape == (4, 4)
    assert trace.ref(X[1:]) == Ref(0, 4, (3, 4), (4, 1), torch.float32, False)
    assert trace.ref(y).storage == trace.ref(z).storage
    assert trace.ref(z).ndim == 2
    assert trace.ref(z).numel == 12
    assert trace.ops[trace.producer_of(y)].name == "add"
    assert trace.ops[trace.producer_of(z)].name == "t"
    assert trace.producer_of(X) is None
    assert trace.ops[trace.producer_of(y)].written == [trace.ref(y)]


def test_producer_of_what_a_view_changed_is_unknown():
    with Trace() as trace:
        y = X * 2
        y[0].add_(1)
    assert trace.producer_of(y) is None


def test_ref_of_a_new_tensor_is_from_outside():
    trace = Trace()
    ref = trace.ref(Y)
    assert trace.outside == {ref.storage: ref}


def test_reads():
    with Trace() as trace:
        X.sum().item()
        bool((X > 100).any())
        torch.equal(X, Y)
    assert [read.value for read in trace.reads] == [pytest.approx(float(X.sum())), False, False]
    assert trace.ops[trace.reads[0].op].name == "_local_scalar_dense"


def test_arguments_by_name():
    with Trace() as trace:
        X.sum(1, keepdim=True)
        torch.zeros(2, dtype=torch.float64)
    op = trace.ops[0]
    assert (op.argument("dim"), op.argument("keepdim"), op.argument("dtype")) == ((1,), True, None)
    assert trace.ops[1].argument("dtype") == torch.float64


def test_no_storage_is_kept():
    with Trace() as trace:
        y = (X * 2).exp()
        z = y + 1
        gone = weakref.ref(y)
        freed = torch.UntypedStorage._weak_ref(y.untyped_storage())
        del y
        gc.collect()
        assert gone() is None
        assert torch.UntypedStorage._expired(freed)
        torch.UntypedStorage._free_weak_ref(freed)
        # An address that is free again is another storage.
        many = [torch.randn(4, 4) * 2 for _ in range(200)]
        numbers = {trace.ref(m).storage for m in many}
    assert len(numbers) == 200
    assert trace.ref(z).storage not in numbers


def test_addresses_are_let_go_with_the_trace():
    trace = Trace()
    with trace:
        X * 2
    assert trace._weak
    weak = trace._weak
    del trace
    gc.collect()
    assert not weak


def test_inference_mode_is_taken_apart():
    with Trace() as trace, torch.inference_mode():
        F.linear(X, Y).softmax(-1)
    assert not {"linear", "softmax"} & {op.name for op in trace.ops}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested|Sparse CSR:UserWarning")
@pytest.mark.parametrize("make", ["sparse", "nested", "compressed"])
def test_what_is_not_strided_makes_a_pass_unsupported(make):
    x = {
        "sparse": lambda: X.to_sparse(),
        "compressed": lambda: X.to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([X, X[:2]]),
    }[make]
    with Trace() as trace:
        x() * 2
    assert re.search("tensor takes part in the pass.*strided", trace.unsupported)
    with pytest.raises(CurvoptError, match="takes part in the pass"):
        infer(trace, X.sum(), silent=set())


def test_sparse_from_outside_makes_a_pass_unsupported():
    x = X.to_sparse()
    with Trace() as trace:
        torch.sparse.mm(x, Y)
    assert "sparse" in trace.unsupported


def test_tensors_of_a_transform_make_a_pass_unsupported():
    def f(x):
        with Trace() as trace:
            y = x * 2
        trace.ref(y)
        assert "function transform" in trace.unsupported
        return y

    assert torch.equal(torch.vmap(f)(X), 2 * X)


def test_a_transform_inside_the_pass_is_seen():
    w = torch.randn(4, requires_grad=True)
    y = torch.randn(4)
    with Trace() as trace:
        loss = (torch.vmap(lambda row: (row * w).sum())(X) - y).square().mean()
    assert infer(trace, loss, silent={trace.ref(w).storage}).n == 4


class Wrapping(torch.Tensor):
    """A tensor that wraps another."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [a.inner if isinstance(a, Wrapping) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_wrapping_tensors_are_not_trusted():
    with Trace() as trace:
        loss = (Wrapping(X) * 2).mean()
    with pytest.raises(CurvoptError, match="Wrapping, a tensor that wraps others"):
        infer(trace, loss, silent=set())


class Plain(torch.Tensor):
    """A subclass that adds nothing that a trace must know."""


def test_plain_subclasses_are_tensors():
    with Trace() as trace:
        X.as_subclass(Plain) * 2
    assert trace.unsupported is None
    assert trace.ops[-1].name == "mul"


def test_replay_needs_no_tensor():
    with Trace() as trace:
        y = X * 2
        target = trace.ref(y)
        del y
    seeds = {trace.ref(X).storage: torch.arange(4, dtype=torch.int32)[:, None]}
    end = len(trace.ops)
    state = Replay(trace, seeds, marks=[(end, target)]).run().marked[end, target]
    assert state.owners.flatten().tolist() == [0, 1, 2, 3]
