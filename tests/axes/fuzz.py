"""Random programs, judged by perturbation: does an element depend on what its owner denies?

    python tests/axes/fuzz.py --count 100000 --seed 0 --processes 2

Per program, its data are perturbed at each index of each dim in four ways. Two judgements: every
element of the last tensor against a replay with samples on that dim (a hole is an element that
changed and was owned by another sample or by none), and the rows of the loss against `infer`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2])]

# Behind the path, so that the file runs as a script too.
from curvopt.axes import MIXED, Replay, Trace, infer  # noqa: E402
from curvopt.axes.lattice import along  # noqa: E402
from curvopt.errors import CurvoptError  # noqa: E402
from tests.axes.programs import SIZE, execute, program  # noqa: E402

TOLERANCE = 1e-12
REFUSALS = (RuntimeError, IndexError, ValueError)


def perturbed(x, d, j):
    """x with its slice j on dim d moved a little, more, a lot, and drawn anew."""
    for scale in (1e-3, 0.7, 3.0, 0.0):
        z = x.clone()
        noise = torch.randn(SIZE, SIZE)
        if scale:
            z.select(d, j).add_(noise * scale)
        else:
            z.select(d, j).copy_(noise * 2)
        yield z


def changed(now, before):
    if now.shape != before.shape:
        return torch.ones_like(before, dtype=torch.bool)
    return ~((now - before).abs() <= TOLERANCE) & ~(now.isnan() & before.isnan())


def dependence(steps, data, which, weight, y, order):
    """By dim of the data, index on it, and element: did the last tensor, and the rows, change?"""
    base, refused = execute(steps, data, weight, y, order)
    base = base.detach()
    rows = F.cross_entropy(base, y, reduction="none")
    of_last = torch.zeros(3, SIZE, *base.shape, dtype=torch.bool)
    of_rows = torch.zeros(3, SIZE, SIZE, dtype=torch.bool)
    for d in range(3):
        for j in range(SIZE):
            for z in perturbed(data[which], d, j):
                try:
                    moved = [*data[:which], z, *data[which + 1 :]]
                    last, other = execute(steps, moved, weight, y, order)
                    if other != refused:
                        continue  # Python took another branch
                    of_last[d, j] |= changed(last.detach(), base)
                    now = F.cross_entropy(last.detach(), y, reduction="none")
                    of_rows[d, j] |= changed(now, rows)
                except REFUSALS:
                    continue
    return of_last, of_rows


def holes(trace, x, last, of_last, counts):
    """Dims of x for which an element of the last tensor changed that was not owned accordingly."""
    mine, target = trace.ref(x), trace.ref(last)
    if trace.outside[mine.storage].place != mine.place:
        return
    for d in range(3):
        end = len(trace.ops)
        replay = Replay(trace, {mine.storage: along(x.shape, d)}, marks=[(end, target)]).run()
        state = replay.marked[end, target]
        owners = (torch.tensor(-1) if state is None else state.owners).expand(last.shape)
        counts["replays"] += 1
        counts["elements owned"] += int(((owners >= 0) & (owners != MIXED)).sum())
        counts["elements mixed"] += int((owners == MIXED).sum())
        counts["elements constant"] += int((owners == -1).sum())
        allowed = torch.stack([(owners == j) | (owners == MIXED) for j in range(SIZE)])
        if (of_last[d] & ~allowed).any():
            yield d


def fits(samples, seeds, of_rows):
    """Whether rows changed with the data of their own sample only."""
    if seeds is None:
        return not of_rows.any()
    dim = next((d for d in range(3) if seeds.shape[d] > 1), 0)
    owners = seeds.expand(SIZE, SIZE, SIZE).movedim(dim, 0)[:, 0, 0]
    return all(
        int(samples.owners[r]) == int(owners[j])
        for j in range(SIZE)
        for r in range(SIZE)
        if of_rows[dim, j, r]
    )


def check(seed):
    """Counts and faults of one program; every third one has two tensors of data."""
    counts, faults = Counter(programs=1), []
    steps = program(random.Random(seed))
    torch.manual_seed(seed)
    data, weight = [torch.randn(SIZE, SIZE, SIZE)], torch.randn(SIZE, SIZE, requires_grad=True)
    y, order = torch.randint(SIZE, (SIZE,)), torch.tensor([1, 3, 0, 2])
    if seed % 3 == 0:
        data.append(torch.randn(SIZE, SIZE, SIZE))
    names = [s[0] for s in steps]
    try:
        with Trace() as trace:
            last, _ = execute(steps, data, weight, y, order)
            loss = F.cross_entropy(last, y, reduction="none").mean()
    except REFUSALS:
        return Counter(programs=1, did_not_run=1), []
    try:
        samples = infer(trace, loss, silent={trace.ref(weight).storage, trace.ref(order).storage})
    except CurvoptError:
        samples = None
    separable, right = [], True
    for which, x in enumerate(data):
        of_last, of_rows = dependence(steps, data, which, weight, y, order)
        separable.append([d for d in range(3) if apart(of_rows[d])])
        storage = trace.ref(x).storage
        for d in holes(trace, x, last, of_last, counts):
            counts["HOLES"] += 1
            faults.append((seed, "HOLE", (which, d), names))
        if samples is not None:
            right &= fits(samples, samples.seeds.get(storage), of_rows)
    if samples is None:
        lost = all(separable)
        counts["refused" + (", although a dim is separable" if lost else "")] += 1
        if lost:
            faults.append((seed, "conservative", separable, names))
        return counts, faults
    counts["accepted" if right else "UNSOUND"] += 1
    if right and samples.n != SIZE:
        counts[f"accepted with {samples.n} samples"] += 1
    if not right:
        faults.append((seed, "UNSOUND", samples.n, names))
    return counts, faults


def apart(depends):
    """Whether every row depends on one index at most, and every index on one row."""
    return bool(depends.any() and not (depends.sum(0) > 1).any() and not (depends.sum(1) > 1).any())


def run(seeds):
    """Counts and faults of several programs."""
    torch.set_num_threads(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    Replay.strict = True
    counts, faults = Counter(), []
    try:
        for seed in seeds:
            try:
                more, found = check(seed)
            except Exception as error:  # which program it was is what one needs to know
                more, found = Counter(CRASHES=1), [(seed, "CRASH", repr(error)[:200])]
            counts += more
            faults += found
    finally:
        torch.set_default_dtype(before)
        Replay.strict = False
    return counts, faults


def main():
    """Run the programs and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--conservative", action="store_true", help="print these refusals too")
    options = parser.parse_args()
    chunk = 250
    starts = range(options.seed, options.seed + options.count, chunk)
    chunks = [range(s, min(s + chunk, options.seed + options.count)) for s in starts]
    counts, shown, blamed, start = Counter(), Counter(), Counter(), time.time()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, (more, faults) in enumerate(pool.imap_unordered(run, chunks), 1):
            counts += more
            for fault in faults:
                if fault[1] == "conservative":
                    blamed.update(set(fault[3]))
                if fault[1] != "conservative" or options.conservative:
                    shown[fault[1]] += 1
                    if shown[fault[1]] <= 20:
                        print(*fault, flush=True)
            if done % 20 == 0 or done == len(chunks):
                print(f"{time.time() - start:.0f} s: {dict(counts)}", flush=True)
    print("steps in conservative refusals:", dict(blamed.most_common(12)))
    return int(counts["HOLES"] + counts["UNSOUND"] + counts["CRASHES"] > 0)


if __name__ == "__main__":
    sys.exit(main())
