"""Situations of real code that went wrong once, and the helpers that judge the package in them.

A situation makes parameters, a loss of a batch, and the batches that the loss meets in turn: what
was learnt of an earlier pass must not decide about a later one. The oracle is a loop over batches
of one, `loss.backward()` each; it knows nothing of the package. A pass is `coupled` where no such
loop gives the rows: samples reach each other's loss.
"""

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvopt
from tests.oracles import assert_close

N, D, H, C = 8, 6, 4, 3
CLIP = 0.1

#: What every refusal of coupled samples must speak of.
COUPLED = (
    r"(?i:separa|mix|coupl|batch.?norm|training mode|shared|(several|other) samples"
    r"|of the batch|no (sum|mean)|not a (sum|mean)|how samples go)"
)


@dataclass
class Pass:
    """One batch: what the loss is called with. `before` runs first, outside of any closure."""

    data: tuple[Any, ...]
    coupled: bool = False
    before: Callable[[], Any] = lambda: None


@dataclass
class Made:
    """What a situation consists of.

    Attributes:
        params: the tracked parameters.
        loss: of a batch, `loss(*data)`.
        passes: the batches, in turn, with the same parameters.
        own: `own(n, *data)`, the loss of sample n alone; by default that of the batch of one.
        size: `size(*data)`, the number of samples; by default the length of the first tensor.
        without: `without(n, *data)`, the batch without sample n.
        options: arguments of `compute` and of the optimizers.
        rtol: of the comparison with the oracle.
    """

    params: list[Tensor]
    loss: Callable[..., Any]
    passes: list[Pass]
    own: Callable[..., Tensor] | None = None
    size: Callable[..., int] | None = None
    without: Callable[..., tuple[Any, ...]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rtol: float = 1e-8

    def length(self, data):
        return self.size(*data) if self.size else len(data[0])

    def alone(self, n, data):
        if self.own:
            return self.own(n, *data)
        return self.loss(*one(data, n, self.length(data)))

    def rest(self, n, data):
        if self.without:
            return self.without(n, *data)
        length = self.length(data)
        keep = [k for k in range(length) if k != n]
        return tuple(d[keep] if belongs(d, length) else d for d in data)


def made(params, loss, *passes, coupled=False, n=None, **settings):
    """A situation with one pass per tuple of data, or `Pass`; `coupled` is said of the last one."""
    passes = [p if isinstance(p, Pass) else Pass(p) for p in passes]
    if coupled:
        passes[-1].coupled = True
    size = None if n is None else lambda *data: n
    return Made(list(params), loss, passes, size=settings.pop("size", size), **settings)


def belongs(value, length):
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == length


def one(data, n, length):
    """Sample n as a batch of one; what is no tensor with a row per sample stays."""
    return tuple(d[n : n + 1] if belongs(d, length) else d for d in data)


# Families.


@dataclass
class Situation:
    """A name, and how to make it: lazily, and the same each time."""

    id: str
    build: Callable[[], Made]

    def make(self) -> Made:
        torch.manual_seed(0)
        return self.build()


class Family(list):
    """Situations that are judged alike; made by decorating what builds them."""

    def __call__(self, build):
        self.append(Situation(build.__name__.strip("_").replace("_", "-"), build))
        return build

    def add(self, id, build, *args, **settings):
        self.append(Situation(id, partial(build, *args, **settings)))

    @property
    def each(self):
        return pytest.mark.parametrize("situation", self, ids=[row.id for row in self])


# Models and data.


def network(sizes=(D, H, C), activation=nn.Tanh):
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def batch(n=N, d=D, classes=C, outlier=1.0):
    x, y = torch.randn(n, d), torch.randint(classes, (n,))
    x[0] *= outlier
    return x, y


ce = F.cross_entropy


# The oracle.


def backward(params, loss):
    """What `loss().backward()` leaves in `p.grad`, None where nothing; `p.grad` itself is kept."""
    kept = [p.grad for p in params]
    for p in params:
        p.grad = None
    quiet(lambda: loss().backward())
    grads = [p.grad for p in params]
    for p, grad in zip(params, kept, strict=True):
        p.grad = grad
    return grads


def filled(params, grads):
    """Dense, with zeros where there is none."""
    return [
        torch.zeros_like(p) if g is None else g.detach().to_dense()
        for p, g in zip(params, grads, strict=True)
    ]


def identical(a, b):
    """Both None, or the same layout and the same numbers, bit for bit."""
    if a is None or b is None:
        return a is b
    return a.layout == b.layout and torch.equal(a.to_dense(), b.to_dense())


def rows_of(m, data):
    """`{p: [N, *p]}`: the gradient of each sample's own loss."""
    rows = [
        filled(m.params, backward(m.params, partial(m.alone, n, data)))
        for n in range(m.length(data))
    ]
    return {
        p: torch.stack([row[k] for row in rows]) if rows else p.new_zeros(0, *p.shape)
        for k, p in enumerate(m.params)
    }


def clipped(rows, bound):
    """The sum of the rows, each sample's whole gradient scaled to the norm `bound` at most."""
    norms = torch.cat([r.reshape(len(r), -1) for r in rows.values()], 1).norm(dim=1)
    factors = torch.where(norms > bound, bound / norms, torch.ones_like(norms))
    return {p: torch.einsum("n,n...->...", factors, r) for p, r in rows.items()}


# The helpers.


def quiet(function, *args, **settings):
    """What is slow may say so; the number is judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **settings)


def quantities():
    return [
        curvopt.BatchGrad(),
        curvopt.BatchL2Grad(),
        curvopt.SumGradSquared(),
        curvopt.Variance(),
        curvopt.ClippedGradSum(CLIP),
    ]


def computed(m, data, **options):
    options = {**m.options, **options}
    return quiet(curvopt.compute, lambda: m.loss(*data), m.params, *quantities(), **options)


def recorded(m, data, batch_size=None, **options):
    """The same by the other door."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with curvopt.record(m.params, batch_size=batch_size) as tape:
            loss = m.loss(*data)
        return tape.compute(loss, *quantities(), **options)


def judge(m, data, result):
    """The result is that of the loop."""
    rows, rtol = rows_of(m, data), m.rtol
    grads = filled(m.params, backward(m.params, partial(m.loss, *data)))
    flat = {p: r.reshape(len(r), -1) for p, r in rows.items()}
    for p, grad in zip(m.params, grads, strict=True):
        assert result.batch_grad[p].shape == rows[p].shape, "the number of samples"
        assert_close(result.grad[p], grad, rtol)
        assert_close(result.batch_grad[p], rows[p], rtol)
        assert_close(result.batch_l2[p], flat[p].square().sum(1), rtol)
        assert_close(result.sum_grad_squared[p], rows[p].square().sum(0), rtol)
        assert_close(result.variance[p], rows[p].var(0, correction=0), rtol)
    for p, expected in clipped(rows, CLIP).items():
        assert_close(result.clipped_grad_sum[p], expected, 10 * rtol)


def says(error, match):
    assert re.search(match, str(error)), f"not {match!r}: {error}"


def untouched(m):
    """Parameters and gradients now, to compare with later."""
    return copy.deepcopy([(p.detach(), p.grad) for p in m.params])


def assert_untouched(m, before):
    for p, (value, grad) in zip(m.params, before, strict=True):
        assert torch.equal(p, value), "a refusal moved a parameter"
        assert identical(p.grad, grad), "a refusal changed p.grad"


def judged_pass(m, data, match, **options):
    """Exact, or refused with a message that matches and nothing changed."""
    before = untouched(m)
    try:
        result = computed(m, data, **options)
    except curvopt.CurvoptError as error:
        if match is not None:
            says(error, match)
        assert_untouched(m, before)
    else:
        judge(m, data, result)


def exact(situation, **options):
    """Every pass gives the rows of the loop."""
    m = situation.make()
    for step in m.passes:
        step.before()
        judge(m, step.data, computed(m, step.data, **options))
    judge(m, m.passes[-1].data, recorded(m, m.passes[-1].data, **{**m.options, **options}))


def exact_or_refused(situation, match=None, **options):
    """Separable passes give the rows of the loop or an error; a coupled one gives an error."""
    m = situation.make()
    for step in m.passes:
        step.before()
        if step.coupled:
            must_refuse(m, step.data, match or COUPLED, **options)
        else:
            judged_pass(m, step.data, match, **options)


def must_refuse(m, data, match, **options):
    before = untouched(m)
    with pytest.raises(curvopt.CurvoptError, match=match):
        computed(m, data, **options)
    assert_untouched(m, before)


def refused(situation, match=COUPLED, **options):
    """Coupled passes are refused, all of them where none is marked; the others exact or refused."""
    m = situation.make()
    marked = any(step.coupled for step in m.passes)
    for step in m.passes:
        step.before()
        if step.coupled or not marked:
            must_refuse(m, step.data, match, **options)
        else:
            judged_pass(m, step.data, None, **options)


def private(m, **options):
    settings = {"lr": 0.0, "noise_multiplier": 0.0, "max_grad_norm": CLIP, **m.options, **options}
    return curvopt.DPSGD(m.params, expected_batch_size=1, **settings)


def private_sum(opt, m, data):
    """The clipped sum of one logical batch, or the refusal."""
    try:
        quiet(opt.step, lambda: m.loss(*data))
    except curvopt.CurvoptError as error:
        return error
    assert len(opt.norms) == m.length(data), "the number of samples"
    return torch.cat([p.grad.detach().flatten().double() for p in m.params])


def bounded(situation, accepted=False, match=None, readings=None, **options):
    """The clipped sum with and without one sample differs by the clipping norm at most.

    For every batch of the sequence, on one optimizer. A coupled pass must be refused; another one
    may be unless it is to be `accepted`. What is taken is the sum of the loop's clipped rows, or of
    another of the `readings` (of the situation made) of what a sample's own loss is.
    """
    m = situation.make()
    opt, bound = private(m, **options), options.get("max_grad_norm", CLIP)
    for step in m.passes:
        step.before()
        whole = private_sum(opt, m, step.data)
        if isinstance(whole, curvopt.CurvoptError):
            assert step.coupled or not accepted, str(whole)
            if match is not None or step.coupled:
                says(whole, match or COUPLED)
            continue
        assert not step.coupled, "a pass whose samples are coupled was taken"
        sums = []
        for own in readings(m) if readings else [m.own]:
            m.own = own
            rows = clipped(rows_of(m, step.data), bound)
            sums.append(torch.cat([rows[p].flatten() for p in m.params]).double())
        closest = min(sums, key=lambda expected: (whole - expected).norm())
        # The factor is C / (norm + 1e-6), which takes 1e-6 of a sample's contribution at most.
        error = (whole - closest).norm()
        assert error <= 1.1e-6 * m.length(step.data) + m.rtol * closest.norm(), error
        for n in range(m.length(step.data)):
            rest = m.rest(n, step.data)
            if "batch_size" in options:  # another number of samples is said to another optimizer
                opt.zero_grad()
                opt = private(m, **{**options, "batch_size": m.length(rest)})
            less = private_sum(opt, m, rest)
            if isinstance(less, curvopt.CurvoptError):
                assert not accepted, str(less)
                continue
            change = torch.linalg.vector_norm(whole - less).item()
            assert change <= bound * (1 + 1e-5), f"one sample moves it by {change / bound:.2f} C"


# Non-private optimizers: `p.grad` is torch's own.

OPTIMIZERS = {  # with measured and plain steps among the first five
    "diag_ggn": partial(curvopt.DiagGGNOptimizer, curvature_every=2),
    "diag_ggn-exact": partial(curvopt.DiagGGNOptimizer, curvature_every=2, estimator="exact"),
    "variance_adaptive": partial(curvopt.VarianceAdaptiveSGD, variance_every=2),
    "polar": curvopt.PolarOptimizer,
}
STEPS = 5
every_optimizer = pytest.mark.parametrize("optimizer", ["diag_ggn", "variance_adaptive", "polar"])
every_estimator = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def by_closure(opt, loss):
    opt.step(loss)


def by_closure_with_backward(opt, loss):
    def closure():
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    opt.step(closure)


def by_record(opt, loss):
    opt.zero_grad()
    with opt.record():
        loss().backward()
    opt.step()


DOORS = (by_closure, by_closure_with_backward, by_record)


def same_gradient(situation, optimizer, match=None, warm=0):
    """`p.grad` after every step is what `loss.backward()` leaves there, bit for bit.

    With `match`, an error that matches is right as well. Scripted code is another program after
    `warm` passes than before them, in torch itself.
    """
    for door in DOORS:
        m = situation.make()
        for _ in range(warm):
            for step in m.passes:
                backward(m.params, partial(m.loss, *step.data))
        opt = OPTIMIZERS[optimizer](m.params, lr=0.0, **m.options)
        for k in range(STEPS):
            step = m.passes[k % len(m.passes)]
            step.before()
            torch.manual_seed(k)
            expected = backward(m.params, partial(m.loss, *step.data))
            torch.manual_seed(k)
            try:
                quiet(door, opt, partial(m.loss, *step.data))
            except curvopt.CurvoptError as error:
                if match is None:
                    raise
                says(error, match)
                opt.zero_grad()
                continue
            for p, grad in zip(m.params, expected, strict=True):
                if (
                    "recurrence" in situation.id and grad is not None
                ):  # a composition of the same sums in another order
                    assert_close(p.grad, grad, 1e-13)
                    continue
                assert identical(p.grad, grad), (door.__name__, k)
