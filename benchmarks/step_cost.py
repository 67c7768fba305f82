"""Cost of five steps of every optimizer, in steps of SGD with momentum: time, memory, state.

python benchmarks/step_cost.py --quick     # minutes
python benchmarks/step_cost.py             # `results/step_cost.json` and `.md`

Five steps on five batches, the same for all: the first of them are where curvature is measured most
often, so that a call after the warm-up, which is what is timed, has what a usual step has.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import harness
import torch
from optimizers import METHODS, Method
from problems import TRAINING, Training
from torch import Tensor

BASE = "SGD, momentum"
STEPS = 5


def start(problem: Training, method: Method, device: torch.device) -> harness.Variant:
    """Build a model and an optimizer; a call takes the five steps and gives numbers of state."""
    data = problem.data()["train"]
    torch.manual_seed(0)  # the same weights every time
    model = problem.model().to(device)
    step = method.start(model, method.lr)
    numbers = torch.arange(STEPS * problem.size) % len(data.x)
    batches = [(data.x[k].to(device), data.y[k].to(device)) for k in numbers.split(problem.size)]
    parameters = sum(p.numel() for p in model.parameters())

    def run() -> float:
        for x, y in batches:
            step(x, y)
        optimizers = vars(step).get("optimizers", ())
        return sum(held(optimizer.state) for optimizer in optimizers) / parameters

    return run


def held(state: Any) -> int:
    """Numbers in all tensors of a state, however it is nested."""
    if isinstance(state, Tensor):
        return state.numel()
    if isinstance(state, dict):
        return sum(map(held, state.values()))
    return sum(map(held, state)) if isinstance(state, (list, tuple)) else 0


def measure(
    problem: Training, chosen: Sequence[str], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Costs of the optimizers on a problem; one that cannot run is recorded with its error."""
    starts, failures, state = {}, {}, {}
    for name, method in METHODS.items():
        missing = problem.name in method.skip or harness.find(method.needs) is None
        if missing or name not in chosen:
            continue

        def make(method: Method = method) -> harness.Variant:
            return start(problem, method, device)

        try:
            state[name] = make()()
            starts[name] = make
        except Exception as error:  # whatever a rival fails with is its result
            if name.startswith("curvopt"):
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    costs = harness.measure(starts, BASE, rounds, device)
    for name, cost in costs.items():
        cost["state"] = state[name]
    return {"title": problem.title, "failures": failures, "optimizers": costs}


def report(result: dict[str, Any]) -> str:
    """The table of all problems, as Markdown."""
    problems = result["problems"].values()
    names = [name for name in METHODS if any(name in p["optimizers"] for p in problems)]

    def cell(cost: dict[str, Any] | None) -> str:
        if cost is None:
            return ""
        return f"{cost['ratio']:.2f}, {cost['peak_ratio']:.2f}, {cost['state']:.2f}"

    rows = [[name, *(cell(p["optimizers"].get(name)) for p in problems)] for name in names]
    steps = [f"{1e3 * p['optimizers'][BASE]['seconds'] / STEPS:.2f} ms" for p in problems]
    notes = [f"{k} on {p['title']}: {v}" for p in problems for k, v in p["failures"].items()]
    return "\n\n".join(
        [
            "# Cost of a step",
            harness.sentence(result["machine"]),
            "Time and peak memory in those of SGD with momentum, and numbers of state per "
            f"parameter. Medians of {result['rounds']} rounds.",
            harness.table(
                ["optimizer", *(p["title"] for p in problems)],
                [[f"a step of {BASE}", *steps], *rows],
            ),
            *notes,
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measures the chosen problems and writes `step_cost.json` and `step_cost.md`."""
    parser = harness.arguments(__doc__, rounds=15, problems=TRAINING)
    parser.add_argument("--method", action="append", choices=list(METHODS), help="repeatable")
    args = parser.parse_args(argv)
    chosen = [BASE, *(args.method or METHODS)]
    harness.pin(args.threads, args.seed)
    warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    rounds = 3 if args.quick else args.rounds
    result: dict[str, Any] = {"machine": harness.machine(args.seed), "rounds": rounds}
    result["problems"] = {
        name: measure(TRAINING[name], chosen, rounds, torch.device(args.device))
        for name in args.problem or TRAINING
    }
    harness.save(args.out, "step_cost", result, report(result))


if __name__ == "__main__":
    main()
