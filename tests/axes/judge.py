"""Perturbation is the judge of a replay: every element, every index of every dim of every input."""

import torch

from curvopt.axes import MIXED, Replay, Trace
from curvopt.axes.lattice import along

TOLERANCE = 1e-12


def outputs_of(function, inputs):
    """What the function gives, as a list of tensors."""
    torch.manual_seed(0)
    made = function(*inputs)
    return [made] if isinstance(made, torch.Tensor) else list(made)


def perturbed(x, d, j):
    """x with its slice j on dim d changed, in several ways."""
    for scale in (1e-3, 1.0, 4.0):
        z = x.clone()
        part = z.select(d, j)
        if x.dtype == torch.bool:
            part.copy_(torch.rand(part.shape) < 0.5)
        elif x.dtype.is_floating_point or x.dtype.is_complex:
            part.add_(torch.randn(part.shape, dtype=x.dtype) * scale)
        else:
            part.copy_(torch.randint(int(x.max()) + 1, part.shape))
        yield z


def dependence(function, inputs, n, d):
    """By index on dim d of input n and element of the outputs: whether it changed with that."""
    base = outputs_of(function, inputs)
    found = [torch.zeros(inputs[n].shape[d], *b.shape, dtype=torch.bool) for b in base]
    for j in range(inputs[n].shape[d]):
        for z in perturbed(inputs[n], d, j):
            try:
                now = outputs_of(function, [*inputs[:n], z, *inputs[n + 1 :]])
            except (RuntimeError, IndexError, ValueError):
                continue
            for f, a, b in zip(found, now, base, strict=True):
                f[j] |= ~close(a, b) if a.shape == b.shape else torch.ones_like(f[j])
    return found


def close(a, b):
    if a.dtype.is_floating_point or a.dtype.is_complex:
        tolerance = 1e-6 if a.dtype == torch.float32 else TOLERANCE
        return ((a - b).abs() <= tolerance) | (a == b) | (a.isnan() & b.isnan())
    return a == b


def recorded(function, inputs):
    """The trace of a call, and its outputs."""
    torch.manual_seed(0)
    with Trace() as trace:
        made = function(*inputs)
    return trace, [made] if isinstance(made, torch.Tensor) else list(made)


def owners_with(trace, inputs, n, d, outputs):
    """The owners of the outputs, with samples on dim d of input n."""
    marks = [(len(trace.ops), trace.ref(output)) for output in outputs]
    seeds = {trace.ref(inputs[n]).storage: along(inputs[n].shape, d)}
    replay = Replay(trace, seeds, marks=marks).run()
    states = [replay.marked[mark] for mark in marks]
    owners = [
        (torch.tensor(-1) if s is None else s.owners).expand(o.shape)
        for s, o in zip(states, outputs, strict=True)
    ]
    return owners, [s is not None and s.ragged is not None for s in states]


def judge(function, inputs):
    """Raise if an element depends on what its owner denies; the ops that ran."""
    trace, outputs = recorded(function, inputs)
    for n, x in enumerate(inputs):
        if trace.ref(x).storage not in trace.outside or not x.ndim:
            continue
        for d in range(x.ndim):
            owners, ragged = owners_with(trace, inputs, n, d, outputs)
            found = dependence(function, inputs, n, d)
            for o, depends, loose in zip(owners, found, ragged, strict=True):
                if loose:  # positions on a ragged axis mean nothing by themselves
                    continue
                j = torch.arange(len(depends)).reshape(-1, *[1] * o.ndim)
                hole = depends & (o != j) & (o != MIXED)
                assert not hole.any(), f"input {n}, dim {d}: {hole.nonzero()[:3].tolist()}"
    return {op.name for op in trace.ops}
