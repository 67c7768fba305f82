"""What DistributedDataParallel adds to a step of every optimizer, beside what it adds to Adam's.

python benchmarks/parallel.py --quick     # a minute
python benchmarks/parallel.py             # `results/parallel.json` and `.md`

Two gloo processes, 64 samples each, the MLP 784-1000-500-100-10. A step by itself and one under the
wrapper take turns, in all optimizers. What is measured every tenth step shows at the first of ten:
of each of the ten the median over the rounds is taken, then their mean. Seconds of the thread that
steps, which waiting for the other process is not among; and of the clock, on a machine of its own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import mlp
from torch.nn.parallel import DistributedDataParallel

import curvopt

WORLD, CYCLE, SIZE = 2, 10, 64
ADAM = "Adam"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    ADAM: lambda params, group: torch.optim.Adam(params),
    "DiagGGNOptimizer": lambda params, group: curvopt.DiagGGNOptimizer(params, process_group=group),
    "VarianceAdaptiveSGD": lambda params, group: curvopt.VarianceAdaptiveSGD(
        params, process_group=group
    ),
    "PolarOptimizer": lambda params, group: curvopt.PolarOptimizer(params, process_group=group),
}
CLOCKS = {"thread": time.thread_time, "wall": time.perf_counter}


def start(name: str, wrapped: bool, group: Any) -> Callable[[], None]:
    """Build a model, wrapped or not, and an optimizer; a call takes a step."""
    torch.manual_seed(0)
    model = mlp(784, 1000, 500, 100, 10)
    called = DistributedDataParallel(model) if wrapped else model
    opt = OPTIMIZERS[name](model.parameters(), None if wrapped else group)
    x, y = torch.randn(SIZE, 784), torch.randint(10, (SIZE,))

    def step() -> None:
        F.cross_entropy(called(x), y).backward()
        opt.step()
        opt.zero_grad()

    return step


def take_turns(rank: int, store: str, rounds: int, seed: int, result: Any) -> None:
    """What one process does; the first one keeps the seconds of every step."""
    harness.pin(1, seed)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=300),
    )
    groups = [dist.new_group([other]) for other in range(WORLD)]
    keys = [(name, wrapped) for name in OPTIMIZERS for wrapped in (False, True)]
    steps = {key: start(*key, groups[rank]) for key in keys}
    seconds: dict[Any, Any] = {key: {clock: [] for clock in CLOCKS} for key in keys}
    for number in range(CYCLE * (rounds + 1)):
        for key, step in steps.items():
            dist.barrier()
            begin = [clock() for clock in CLOCKS.values()]
            step()
            if number >= CYCLE:  # the first ten measure more often, and warm up
                for (name, clock), before in zip(CLOCKS.items(), begin, strict=True):
                    seconds[key][name].append(clock() - before)
    if not rank:
        result.update(seconds)
    dist.destroy_process_group()


def usual(seconds: list[float]) -> float:
    """Seconds of a step: the mean over the ten of a cycle of each one's median."""
    return statistics.mean(statistics.median(seconds[k::CYCLE]) for k in range(CYCLE))


def measure(rounds: int, seed: int) -> dict[str, Any]:
    """Seconds of a step of every optimizer by itself, and what the wrapper adds."""
    with tempfile.TemporaryDirectory() as folder, torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.spawn(
            take_turns, (os.path.join(folder, "store"), rounds, seed, found), WORLD
        )
        seconds = dict(found)
    costs: dict[str, Any] = {}
    for name in OPTIMIZERS:
        for clock in CLOCKS:
            alone, both = (seconds[name, wrapped][clock] for wrapped in (False, True))
            costs.setdefault(name, {})[clock] = {
                "alone": usual(alone),
                "added": usual(both) - usual(alone),
                "added_first": statistics.median(both[::CYCLE]) - statistics.median(alone[::CYCLE]),
            }
    for name, clocks in costs.items():
        for clock, cost in clocks.items():
            cost["beside"] = (cost["added"] - costs[ADAM][clock]["added"]) / cost["alone"]
            costs[name][clock] = cost
    return costs


def report(result: dict[str, Any]) -> str:
    """The table, as Markdown."""
    rows = []
    for name, clocks in result["optimizers"].items():
        row = [name]
        for cost in clocks.values():
            row += [f"{1e3 * cost[k]:.2f}" for k in ("alone", "added", "added_first")]
            row.append(f"{100 * cost['beside']:+.0f} %")
        rows.append(row)
    columns = ("a step", "added", "added, first of ten", "beside Adam")
    return "\n\n".join(
        [
            "# What DistributedDataParallel adds to a step",
            harness.sentence(result["machine"]),
            "Two gloo processes, 64 samples each, MLP 784-1000-500-100-10. Milliseconds; what is "
            "added beside Adam's in per cent of the step by itself. Medians of "
            f"{result['rounds']} rounds.",
            harness.table(
                ["optimizer", *(f"{column} ({clock})" for clock in CLOCKS for column in columns)],
                rows,
            ),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measures all optimizers and writes `parallel.json` and `parallel.md`."""
    args = harness.arguments(__doc__, rounds=15, problems=[]).parse_args(argv)
    harness.pin(1, args.seed)
    rounds = 3 if args.quick else args.rounds
    result = {"machine": harness.machine(args.seed), "rounds": rounds}
    result["optimizers"] = measure(rounds, args.seed)
    harness.save(Path(args.out), "parallel", result, report(result))


if __name__ == "__main__":
    main()
