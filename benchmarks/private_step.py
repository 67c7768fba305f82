"""One private step against one plain SGD step, and against Opacus, interleaved in one process.

python benchmarks/private_step.py [--quick] [--problem mlp] [--rounds 20]
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from problems import CLASSIFIERS, LANGUAGE_MODELS, LARGE, Timed, cross_entropy
from torch import Tensor, nn

PLAIN, OURS, ROWS, GHOST = "SGD", "curvopt", "Opacus", "Opacus, ghost"
LR, NOISE, CLIP = 0.01, 1.0, 1.0
MEMORY = 1.2  # of an SGD step's peak, at most
RIVAL = 0.65  # of Opacus's better time, at most
STEPS = {"mlp": 1.9}  # SGD steps, at most; on the MLP drawing the noise costs the most
OTHERWISE = 1.3

Maker = Callable[[Timed, nn.Module, Tensor, Tensor], harness.Variant | None]


def sgd(problem: Timed, model: nn.Module, x: Tensor, y: Tensor) -> harness.Variant:
    """The plain step that is the unit of time and memory."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        problem.loss(model, x, y).backward()
        optimizer.step()

    return step


def curvopts(problem: Timed, model: nn.Module, x: Tensor, y: Tensor) -> harness.Variant | None:
    """The model, the loss and the loop as they are."""
    kind = harness.find("curvopt.DPSGD")
    if kind is None:
        return None
    optimizer = kind(
        model.parameters(),
        LR,
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=len(x),
    )
    return lambda: optimizer.step(lambda: problem.loss(model, x, y))


def opacus_rows(problem: Timed, model: nn.Module, x: Tensor, y: Tensor) -> harness.Variant | None:
    """Opacus with per-sample gradients."""
    if harness.find("opacus.GradSampleModule") is None:
        return None
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    private = GradSampleModule(model)
    optimizer = DPOptimizer(torch.optim.SGD(private.parameters(), lr=LR), **_settings(x))

    def step() -> None:
        optimizer.zero_grad()
        problem.loss(private, x, y).backward()
        optimizer.step()

    return step


def opacus_ghost(problem: Timed, model: nn.Module, x: Tensor, y: Tensor) -> harness.Variant | None:
    """Opacus with ghost clipping, which wraps the loss as well."""
    if problem.loss is not cross_entropy or harness.find("opacus.GradSampleModule") is None:
        return None
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    private = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP)
    sgd = torch.optim.SGD(private.parameters(), lr=LR)
    optimizer = DPOptimizerFastGradientClipping(sgd, **_settings(x))
    loss = DPLossFastGradientClipping(private, optimizer, nn.CrossEntropyLoss())
    tokens = {} if len(y) == len(x) else {"shape": (len(x), len(y) // len(x))}

    def step() -> None:
        optimizer.zero_grad()
        loss(private(x), y, **tokens).backward()
        optimizer.step()

    return step


def _settings(x: Tensor) -> dict[str, Any]:
    return {
        "noise_multiplier": NOISE,
        "max_grad_norm": CLIP,
        "expected_batch_size": len(x),
    }


MAKERS: dict[str, Maker] = {
    PLAIN: sgd,
    OURS: curvopts,
    ROWS: opacus_rows,
    GHOST: opacus_ghost,
}


def measure(problem: Timed, rounds: int, device: torch.device) -> dict[str, Any]:
    """Times one problem; a library that cannot run it is recorded with its error."""
    starts, failures = {}, {}
    for name, make in MAKERS.items():

        def start(make: Maker = make) -> harness.Variant | None:
            return make(problem, *problem.build(device))

        try:
            if step := start():
                step()
                starts[name] = start
        except Exception as error:  # whatever a rival fails with is its result
            if name in (PLAIN, OURS):
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {
        "title": f"{problem.title}, N = {problem.size}",
        "failures": failures,
        "variants": harness.measure(starts, PLAIN, rounds, device),
    }


def share(variants: dict[str, Any]) -> float | None:
    """Our time as a share of Opacus's better one, round by round."""
    rivals = [variants[name]["times"] for name in (ROWS, GHOST) if name in variants]
    if OURS not in variants or not rivals:
        return None
    rounds = zip(variants[OURS]["times"], *rivals, strict=True)
    return statistics.median(mine / min(theirs) for mine, *theirs in rounds)


def report(result: dict[str, Any]) -> str:
    """The table of all problems, as Markdown."""
    rows, notes = [], []
    for name, problem in result["problems"].items():
        variants, allowed = problem["variants"], STEPS.get(name, OTHERWISE)
        of_theirs, mine = share(variants), variants.get(OURS)
        missed = [
            *(["steps"] if mine and mine["ratio"] > allowed else []),
            *(["Opacus"] if of_theirs and of_theirs > RIVAL else []),
            *(["memory"] if mine and mine["peak_ratio"] > MEMORY else []),
        ]
        cells = [variants.get(library) for library in (OURS, ROWS, GHOST)]
        rows.append(
            [
                problem["title"],
                f"{1e3 * variants[PLAIN]['seconds']:.1f} ms",
                *(f"{cell['ratio']:.2f}" if cell else "" for cell in cells),
                f"{of_theirs:.2f}" if of_theirs else "",
                *(f"{cell['peak_ratio']:.2f}" if cell else "" for cell in cells),
                f"{mine['later_peak_ratio']:.2f}" if mine else "",
                f"{allowed:g}, {RIVAL:g}, {MEMORY:g}",
                "" if mine is None else "misses " + ", ".join(missed) if missed else "met",
            ]
        )
        notes += [f"{library} on {name}: {e}" for library, e in problem["failures"].items()]
    header = [
        *("problem", "SGD step", OURS, ROWS, GHOST, "curvopt / better Opacus"),
        *(f"memory, {library}" for library in (OURS, ROWS, GHOST)),
        f"after the first step, {OURS}",
        *("target: steps, of Opacus, memory", ""),
    ]
    return "\n\n".join(
        [
            "# Cost of a private step, in plain SGD steps",
            harness.sentence(result["machine"]),
            harness.table(header, rows),
            *notes,
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measures the chosen problems and writes `private_step.json` and `private_step.md`."""
    usual = CLASSIFIERS | LANGUAGE_MODELS
    problems = usual | LARGE
    parser = harness.arguments(__doc__, rounds=15, problems=problems)
    parser.add_argument("--name", default="private_step", help="of the files of the results")
    args = parser.parse_args(argv)
    harness.pin(args.threads, args.seed)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    rounds = 3 if args.quick else args.rounds
    result: dict[str, Any] = {"machine": harness.machine(args.seed), "rounds": rounds}
    result["problems"] = {
        name: measure(problems[name], rounds, torch.device(args.device))
        for name in args.problem or usual
        if not name.startswith("gpt2") or harness.find("transformers.GPT2Config")
    }
    harness.save(args.out, args.name, result, report(result))


if __name__ == "__main__":
    main()
