"""Every structure, every reduction: the fast way gives the numbers of the formed rows."""

import pytest
import torch
import torch.nn.functional as F

from curvopt.axes.layout import Layout
from curvopt.structures import (
    Conv,
    Dense,
    Disjoint,
    Folded,
    Formed,
    Lookup,
    Mended,
    Outer,
    Own,
    Permuted,
    Pulled,
    Scale,
    Shift,
    Structure,
    Total,
    base,
    total,
)
from tests.oracles import assert_close

N = 3


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# Makers of a structure and of its rows [V, N, *shape], by the definition.


def dense(v=2, shape=(2, 3)):
    values = normal(v, N, *shape)
    return Dense(values), values


def outer(v, groups, tokens, outputs, inputs, shape=None, transposed=False):
    left, right = normal(v, N, groups, tokens, outputs), normal(N, groups, tokens, inputs)
    rows = torch.einsum("vngto,ngti->vngoi", left, right)
    rows = (rows.mT if transposed else rows).flatten(2, 3)
    shape = torch.Size(shape or rows.shape[2:])
    return Outer(left, right, shape, transposed=transposed), rows.reshape(v, N, *shape)


def broadcast(cotangent, aligned, shape):
    lead = cotangent.shape[:2]
    return cotangent.sum_to_size(*lead, *aligned).reshape(*lead, *shape)


def shift(v, rest, aligned, shape):
    cotangent = normal(v, N, *rest)
    return Shift(cotangent, torch.Size(shape), aligned), broadcast(cotangent, aligned, shape)


def scale(v, rest, aligned, shape, factor):
    cotangent, factor = normal(v, N, *rest), normal(*factor)
    rows = broadcast(cotangent * factor, aligned, shape)
    return Scale(cotangent, factor, torch.Size(shape), aligned), rows


def lookup(v, shape, *indices):
    """A table of this shape, and the indices of every sample's lookups."""
    indices = torch.tensor(indices)
    values = normal(v, *indices.shape, torch.Size(shape[1:]).numel())
    one_hot = F.one_hot(indices, shape[0]).double()
    rows = torch.einsum("vnmd,nmr->vnrd", values, one_hot).reshape(v, N, *shape)
    return Lookup(values, indices, torch.Size(shape)), rows


def folded(v):
    left, right = normal(1, N * v, 1, 4, 3), normal(N * v, 1, 4, 2)
    rows = torch.einsum("nto,nti->noi", left[0, :, 0], right[:, 0])
    inner = Outer(left, right, rows.shape[1:])
    return Folded(inner, v), rows.unflatten(0, (N, v)).transpose(0, 1)


def own(kind, k):
    """Each sample's part of the rows is its cotangent."""
    cotangent, layout = normal(2, N, k, 4), Layout(kind, N, k)
    rows = torch.stack([cotangent * (torch.arange(N) == n).view(N, 1, 1) for n in range(N)], 1)
    rows = torch.stack([layout.merge(row, 1) for row in rows.unbind(1)], 1)
    return Own(cotangent, layout, rows.shape[2:]), rows


def pulled(derive, isometry=False):
    parameter = normal(3, 4)
    value = derive(parameter)
    inner, rows = dense(shape=value.shape)
    rows = [
        torch.autograd.grad(value, parameter, r, create_graph=True)[0] for r in rows.flatten(0, 1)
    ]
    structure = Pulled(inner, value, parameter, isometry=isometry, create_graph=True)
    return structure, torch.stack(rows).unflatten(0, (2, N))


def halves(kind):
    """Two uses of separate halves of one parameter."""
    parameter = normal(4, 3)
    parts = [dense(), dense()]
    structures = [
        Pulled(inner, part, parameter, isometry=True, create_graph=True)
        for (inner, _), part in zip(parts, parameter.split(2), strict=True)
    ]
    return kind(structures), torch.cat([rows for _, rows in parts], 2)


def convolution(v, channels, sizes, shape, stride=1, padding=0, dilation=1, groups=1, k=1):
    """`k` inputs per sample; the definition is autograd's, one cotangent and input at a time."""
    dim = len(sizes)
    call = (F.conv1d, F.conv2d, F.conv3d)[dim - 1]
    input, weight = normal(N, k, channels, *sizes), normal(*shape)
    options = [[option] * dim for option in (stride, padding, dilation)]
    outputs = [call(i[None], weight, None, *options, groups) for i in input.flatten(0, 1)]
    cotangent = normal(v, N, k, *outputs[0].shape[1:])
    rows = [
        torch.autograd.grad(output, weight, c[None], create_graph=True)[0]
        for column in cotangent
        for output, c in zip(outputs, column.flatten(0, 1), strict=True)
    ]
    structure = Conv(cotangent, input, weight.shape, *options, groups)
    return structure, torch.stack(rows).unflatten(0, (v, N, k)).sum(2)


def permuted(order, shape):
    inner, rows = outer(2, 1, 4, 3, 2, shape=(3, 2, 1))
    rows = rows.permute(0, 1, *(2 + axis for axis in order)).reshape(2, N, *shape)
    return Permuted(inner, order, torch.Size(shape)), rows


def permuted_matrix():
    inner, rows = outer(2, 1, 4, 3, 2)
    return Permuted(inner, [1, 0], torch.Size([2, 3])), rows.mT


def mended(made, doubt):
    structure, rows = made
    return Mended(structure, torch.tensor(doubt)), rows


def formed(made):
    structure, rows = made
    return Formed(structure), rows


def several(kind, *parts):
    structures, rows = zip(*parts, strict=True)
    return kind(list(structures)), sum(rows)


STRUCTURES = {
    "dense": dense,
    "dense-scalar": lambda: dense(shape=()),
    "outer": lambda: outer(1, 1, 1, 4, 3),
    "outer-columns": lambda: outer(2, 1, 1, 4, 3),
    "outer-transposed": lambda: outer(2, 1, 1, 4, 3, transposed=True),
    "outer-groups": lambda: outer(2, 2, 1, 2, 3),
    "outer-tokens-few": lambda: outer(1, 1, 2, 8, 9),
    "outer-tokens-few-columns": lambda: outer(2, 1, 2, 9, 8, transposed=True),
    "outer-tokens-many": lambda: outer(1, 1, 7, 2, 3),
    "outer-tokens-many-columns": lambda: outer(2, 1, 7, 3, 2),
    "outer-tokens-transposed": lambda: outer(1, 1, 7, 3, 2, transposed=True),
    "outer-convolution": lambda: outer(2, 2, 5, 2, 6, shape=(4, 2, 3)),
    "conv": lambda: convolution(1, 2, (5,), (3, 2, 3)),
    "conv-long": lambda: convolution(1, 2, (42,), (3, 2, 3), k=2),
    "conv-long-columns": lambda: convolution(2, 4, (42,), (6, 2, 3), groups=2, dilation=2),
    "conv-few-positions": lambda: convolution(2, 4, (4,), (5, 4, 3)),
    "conv-columns": lambda: convolution(3, 2, (5, 4), (3, 2, 2, 3), padding=1, k=2),
    "conv-large": lambda: convolution(1, 2, (8, 7), (4, 1, 2, 2), groups=2, k=2),
    "conv-large-stride": lambda: convolution(2, 2, (14, 15), (3, 2, 3, 3), stride=2, padding=1),
    "conv-volume": lambda: convolution(1, 1, (2, 3, 2), (2, 1, 2, 2, 2), padding=1),
    "conv-volume-large": lambda: convolution(2, 2, (4, 4, 5), (2, 1, 1, 2, 2), groups=2),
    "conv-pixels": lambda: convolution(2, 3, (5, 5), (24, 3, 3, 3)),
    "conv-pixels-padding": lambda: convolution(1, 4, (4, 4), (48, 4, 3, 3), padding=1),
    "conv-pixels-stride": lambda: convolution(1, 3, (27,), (30, 3, 9), stride=2),
    "conv-pixels-dilation": lambda: convolution(1, 9, (13,), (24, 9, 3), dilation=2),
    "conv-image": lambda: convolution(1, 1, (10, 9), (2, 1, 2, 2), padding=1),
    "formed": lambda: formed(outer(1, 1, 5, 3, 2)),
    "formed-columns": lambda: formed(outer(2, 1, 1, 3, 2)),
    "permuted": lambda: permuted([1, 0, 2], (2, 3)),
    "permuted-matrix": permuted_matrix,
    "permuted-axes": lambda: permuted([2, 1, 0], (1, 2, 3)),
    "shift": lambda: shift(1, (1, 4), (1, 4), (4,)),
    "shift-tokens": lambda: shift(2, (5, 4), (1, 4), (4,)),
    "shift-channels": lambda: shift(2, (1, 4, 2, 3), (1, 4, 1, 1), (4,)),
    "shift-scalar": lambda: shift(2, (5, 4), (1, 1), ()),
    "scale": lambda: scale(1, (1, 4), (1, 4), (4,), (N, 1, 4)),
    "scale-tokens": lambda: scale(2, (5, 4), (1, 4), (4,), (N, 5, 4)),
    "scale-broadcast-factor": lambda: scale(2, (5, 2, 3), (1, 2, 1), (2,), (N, 1, 1, 3)),
    "lookup": lambda: lookup(1, (5, 2), [3], [0], [3]),
    "lookup-again": lambda: lookup(2, (4, 2), [1, 1, 2], [0, 0, 1], [3, 3, 3]),
    "lookup-axes": lambda: lookup(2, (4, 2, 3), [1, 3], [1, 0], [2, 2]),
    "lookup-numbers": lambda: lookup(1, (4,), [1, 3], [0, 0], [2, 1]),
    "folded": lambda: folded(1),
    "folded-columns": lambda: folded(3),
    "own": lambda: own("batch", 2),
    "own-time": lambda: own("time", 2),
    "pulled-transposed": lambda: pulled(lambda w: w.t(), isometry=True),
    "pulled-slice": lambda: pulled(lambda w: w[1:, ::2], isometry=True),
    "pulled-normalized": lambda: pulled(lambda w: F.normalize(w, dim=1)),
    "pulled-repeated": lambda: pulled(lambda w: w.repeat(2, 1)),
    "total": lambda: several(Total, dense(shape=(4, 3)), outer(2, 1, 5, 4, 3)),
    "total-shift": lambda: several(Total, shift(2, (5, 4), (1, 4), (4,)), dense(shape=(4,))),
    "total-outers": lambda: several(total, outer(2, 1, 1, 4, 3), outer(2, 1, 5, 4, 3)),
    "total-lookups": lambda: several(
        total, lookup(2, (4, 3), [1], [0], [1]), lookup(2, (4, 3), [1, 2], [1, 3], [3, 3])
    ),
    "tied": lambda: several(total, lookup(2, (4, 3), [1, 2], [0, 0], [1, 3]), outer(2, 1, 5, 4, 3)),
    "tied-transposed": lambda: several(
        total, outer(1, 1, 2, 3, 4, transposed=True), lookup(1, (4, 3), [1], [0], [3])
    ),
    "total-layouts": lambda: several(
        total, outer(1, 1, 1, 4, 3), outer(1, 1, 5, 3, 4, transposed=True)
    ),
    "disjoint": lambda: halves(Disjoint),
    "mended": lambda: mended(outer(1, 1, 2, 8, 9), [[False, True, False]]),
    "mended-columns": lambda: mended(
        lookup(2, (4, 2), [1, 1, 2], [0, 0, 1], [3, 3, 3]), [[True, False, False], [False] * 3]
    ),
    "total-separate": lambda: halves(total),
}

REDUCTIONS = {  # by their definition, from rows [V, N, *shape]
    "form": (lambda s: s.form(), lambda rows: rows),
    "rows": (lambda s: s.rows(1, 3), lambda rows: rows[:, 1:3]),
    "sum": (lambda s: s.sum(), lambda rows: rows.sum((0, 1))),
    "weighted-sum": (
        lambda s: s.sum(WEIGHTS),
        lambda rows: torch.einsum("n,vn...->...", WEIGHTS, rows),
    ),
    "sum-of-squares": (lambda s: s.sum_of_squares(), lambda rows: rows.square().sum((0, 1))),
    "moments": (
        lambda s: torch.stack(s.moments()),
        lambda rows: torch.stack(
            [rows.sum((0, 1)), (rows - rows.mean((0, 1))).square().sum((0, 1))]
        ),
    ),
    "scatter": (
        lambda s: s.scatter(s.sum()),
        lambda rows: (rows - rows.mean((0, 1))).square().sum((0, 1)),
    ),
    "batch-sum-of-squares": (
        lambda s: s.batch_sum_of_squares(),
        lambda rows: rows.square().sum(0),
    ),
    "squared-norms": (
        lambda s: s.squared_norms(),
        lambda rows: rows.reshape(*rows.shape[:2], -1).square().sum(-1),
    ),
    "dots": (
        lambda s: s.dots(torch.ones(s.shape, dtype=torch.float64).cumsum(0)),
        lambda rows: (
            (rows * torch.ones(rows.shape[2:], dtype=torch.float64).cumsum(0))
            .reshape(*rows.shape[:2], -1)
            .sum(-1)
        ),
    ),
    "rank-one": (
        lambda s: s.rank_one(*factors(s.shape)),
        lambda rows: torch.einsum("vnij,i,j->", matrices(rows), *factors(rows.shape[2:])),
    ),
}


def factors(shape):
    """A direction of rank one: a number for each row of the parameter, and one for each column."""
    rows, columns = (*shape[:1], 1)[0], shape[1:].numel()
    a, b = (torch.arange(1.0, n + 1, dtype=torch.float64) for n in (rows, columns))
    return a.cos(), (2 * b).sin()


def matrices(rows):
    lead = rows.shape[:2]
    return rows.reshape(*lead, (*rows.shape[2:3], 1)[0], -1)


WEIGHTS = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)


@pytest.fixture(params=[base.BLOCK, 1], ids=["one-block", "many-blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(base, "BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_reduction_equals_the_formed_rows(structure, reduction):
    value, rows = STRUCTURES[structure]()
    fast, definition = REDUCTIONS[reduction]
    assert_close(fast(value), definition(rows), 1e-12)


@pytest.mark.parametrize("reduction", ["rows", "sum", "weighted-sum", "squared-norms"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_mended_rows_are_the_rows(structure, reduction):
    value, rows = STRUCTURES[structure]()
    fast, definition = REDUCTIONS[reduction]
    for doubt in ([True] * 3, [False, True, False], [False] * 3):
        assert_close(fast(Mended(value, torch.tensor([doubt]))), definition(rows), 1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_random_rows_are_not_in_doubt(structure):
    """The terms of a row are at most so long as `reach` says, and do not cancel."""
    value, rows = STRUCTURES[structure]()
    squares, doubt = value.gauge()
    assert_close(squares, REDUCTIONS["squared-norms"][1](rows), 1e-12)
    assert doubt is None or not doubt.any()
    reach = value.reach()
    assert reach is None or (reach.square() > 0.999 * squares).all()


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if "pixels" in name])
def test_norms_from_pixels_unfold_nothing(structure, monkeypatch):
    value, rows = STRUCTURES[structure]()
    monkeypatch.setattr(Conv, "_unfolded", lambda *_: pytest.fail("patches were formed"))
    assert_close(value.gauge()[0], REDUCTIONS["squared-norms"][1](rows), 1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_settled_structure_has_the_same_norms_and_sums(structure):
    value, rows = STRUCTURES[structure]()
    settled = value.settled()
    for name in ("squared-norms", "weighted-sum"):
        fast, definition = REDUCTIONS[name]
        assert_close(fast(settled), definition(rows), 1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_says_its_sizes(structure):
    value, rows = STRUCTURES[structure]()
    assert (value.columns, value.samples, *value.shape) == rows.shape


@pytest.mark.parametrize("structure", STRUCTURES)
def test_reductions_are_differentiable(structure):
    value, rows = STRUCTURES[structure]()
    leaves = list(leaves_of(rows.clone()))
    for fast, definition in REDUCTIONS.values():
        slopes, truth = (
            torch.autograd.grad(
                result.square().sum(), leaves, retain_graph=True, materialize_grads=True
            )
            for result in (fast(value), definition(rows))
        )
        for slope, expected in zip(slopes, truth, strict=True):
            assert_close(slope, expected, 1e-12)


def leaves_of(tensor):
    """Leaves of the graph of a tensor."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [parent for parent, _ in node.next_functions]


def test_uses_that_overlap_are_not_disjoint():
    parameter = normal(4, 3)
    parts = [
        Pulled(dense(shape=(3, 3))[0], p, parameter, isometry=True)
        for p in (parameter[:3], parameter[1:])
    ]
    assert type(total(parts)) is Total


def test_every_structure_has_a_row():
    def subclasses(kind):
        return {kind.__name__}.union(*map(subclasses, kind.__subclasses__()))

    # By name: a guarded structure's class is a subclass that goes by the name of its own.
    tested = {type(make()[0]).__name__ for make in STRUCTURES.values()}
    assert subclasses(Structure) - {"Structure"} == tested
