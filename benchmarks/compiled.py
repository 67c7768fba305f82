"""Steps compiled to one graph, against steps as they are and compiled SGD: time, and agreement.

python benchmarks/compiled.py --quick --problem tiny     # some minutes: every graph is compiled
python benchmarks/compiled.py                            # `results/compiled.json` and `.md`
python benchmarks/compiled.py --first-step mlp           # seconds of the first steps, as they are

All are compared in the time of a plain gradient, forward and backward, in the same round. Before
anything is timed, ten steps of both kinds start from the same weights and must end in the same.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import torch
from problems import LANGUAGE_MODELS, Timed, Transformer, images, mlp, named
from torch import Tensor, nn
from torch.nn import functional as F

import curvopt

BASE = "gradient"
AGREES = 1e-6  # the parameters' difference after ten steps, in their norm
STEPS = 10
NEVER = 10**6


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(28, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def small_2c2d() -> nn.Sequential:
    """Two convolutions of 8 and 16 channels, two dense layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def of_tokens(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y.flatten())


def few(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 16), torch.randint(3, (n,))


PROBLEMS: dict[str, Timed] = named(
    Timed("tiny", lambda: mlp(16, 8, 8, 3), few, 4, title="MLP 16-8-8-3, N = 4"),
    Timed("mlp", lambda: mlp(784, 512, 256, 10), images(784), 128, title="MLP 784-512-256-10"),
    Timed("2c2d", small_2c2d, images(1, 28, 28), 32, title="2c2d of 8 and 16 channels"),
    Timed(
        "transformer",
        lambda: Transformer(vocabulary=64, length=16, width=64, depth=2, heads=4),
        lambda n: (torch.randint(64, (n, 16)), torch.randint(64, (n, 16))),
        32,
        of_tokens,
        title="transformer, 2 blocks of width 64, T = 16",
    ),
    Timed("lstm", Recurrent, images(28, 28), 32, title="LSTM of width 64, T = 28"),
    replace(LANGUAGE_MODELS["gpt2"], size=4),
)

private = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 64}
Make = Callable[[Any], Any]


def polar(params: Any, lr: float = 5e-3) -> curvopt.PolarOptimizer:
    """With random signs, of tables, that are the same in each run."""
    held = list(params)
    generator = torch.Generator(held[0].device).manual_seed(0)
    return curvopt.PolarOptimizer(held, lr, generator=generator)


# What measures, measures in every step; what does not, hardly ever.
OPTIMIZERS: dict[str, Make] = {
    "VarianceAdaptiveSGD, measuring": lambda p: curvopt.VarianceAdaptiveSGD(p, variance_every=1),
    "VarianceAdaptiveSGD": lambda p: curvopt.VarianceAdaptiveSGD(p, variance_every=NEVER),
    "DiagGGNOptimizer, measuring": lambda p: curvopt.DiagGGNOptimizer(p, curvature_every=1),
    "DiagGGNOptimizer": lambda p: curvopt.DiagGGNOptimizer(p, curvature_every=NEVER),
    # Of one batch it would soon have a loss of zero, which has other steps.
    "PolarOptimizer": lambda p: polar(p, 1e-8),
    "DPSGD": lambda p: curvopt.DPSGD(p, lr=0.1, **private),
    "DPAdam": lambda p: curvopt.DPAdam(p, **private),
}
# For the comparison: exact or with the same signs, without noise.
EXACT: dict[str, Make] = {
    "VarianceAdaptiveSGD": lambda p: curvopt.VarianceAdaptiveSGD(p, 0.01, variance_every=2),
    "DiagGGNOptimizer": lambda p: curvopt.DiagGGNOptimizer(p, curvature_every=5, estimator="exact"),
    "PolarOptimizer": polar,
    "DPSGD": lambda p: curvopt.DPSGD(p, lr=0.1, **{**private, "noise_multiplier": 0.0}),
}


class Stepped:
    """A model and an optimizer that steps on one batch.

    Args:
        problem: the problem.
        make: makes the optimizer.
        device: where it runs.
        compiled: by `curvopt.compile`.
        dtype: of weights and inputs.
    """

    def __init__(
        self,
        problem: Timed,
        make: Make,
        device: torch.device,
        compiled: bool,
        dtype: torch.dtype = torch.float32,
    ):
        self.problem = problem
        self.model, x, self.y = problem.build(device)
        self.model.to(dtype)
        self.x = x.to(dtype) if x.is_floating_point() else x
        self.opt = make(self.model.parameters())
        self.step = None
        if compiled:
            self.step = curvopt.compile(self.opt, self.loss, compare=False)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.loss(self.model, x, y)

    def __call__(self) -> Tensor:
        if self.step is None:
            return self.opt.step(lambda: self.loss(self.x, self.y))
        return self.step(self.x, self.y)

    def begin(self) -> float:
        """Take steps until the next is a usual one; seconds of the first compiled steps."""
        started = time.perf_counter()
        for _ in range(12):
            self()
        return time.perf_counter() - started


def compiled_sgd(problem: Timed, device: torch.device) -> harness.Variant:
    """SGD with momentum as one writes it under `torch.compile`."""
    model, x, y = problem.build(device)
    opt = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    fast, move = torch.compile(copy.copy(model)), torch.compile(opt.step)

    def run() -> None:
        opt.zero_grad()
        problem.loss(fast, x, y).backward()
        move()

    return run


def plain(problem: Timed, device: torch.device) -> dict[str, harness.Variant]:
    """A gradient, and SGD with momentum."""
    model, x, y = problem.build(device)
    params = [*model.parameters()]
    other, u, v = problem.build(device)
    opt = torch.optim.SGD(other.parameters(), 0.01, momentum=0.9)

    def gradient() -> None:
        torch.autograd.grad(problem.loss(model, x, y), params)

    def step() -> None:
        opt.zero_grad()
        problem.loss(other, u, v).backward()
        opt.step()

    return {BASE: gradient, "SGD": step}


def agreement(problem: Timed, device: torch.device) -> dict[str, float]:
    """By optimizer, how far parameters are apart after ten steps, in their norm.

    In double precision: in float32 rounding may move the place of a pool's maximum.
    """
    found = {}
    for name, make in EXACT.items():
        ends = []
        for compiled in (False, True):
            stepped = Stepped(problem, make, device, compiled, torch.float64)
            for _ in range(STEPS):
                stepped()
            ends.append(torch.cat([p.detach().flatten() for p in stepped.model.parameters()]))
        found[name] = float((ends[0] - ends[1]).norm() / ends[0].norm())
        if found[name] > AGREES:
            raise SystemExit(f"{name} on {problem.name}: compiled steps are off by {found[name]}")
    return found


def measure(
    problem: Timed, names: list[str], rounds: int, device: torch.device, *, check: bool
) -> dict[str, Any]:
    """Times of all steps on a problem, and seconds of compiling them."""
    variants = plain(problem, device)
    if problem.name != "lstm":  # of which torch.compile makes several graphs
        variants["SGD, torch.compile"] = compiled_sgd(problem, device)
        for _ in range(3):
            variants["SGD, torch.compile"]()
    seconds, reasons = {}, {}
    for name in names:
        eager = Stepped(problem, OPTIMIZERS[name], device, compiled=False)
        one = Stepped(problem, OPTIMIZERS[name], device, compiled=True)
        eager.begin()
        seconds[name] = one.begin()
        variants[name], variants[f"{name}, compiled"] = eager, one
        reasons[name] = one.step.reason if one.step is not None else ""
        print(f"{problem.name}: {name}, {seconds[name]:.1f} s {reasons[name]}", flush=True)
    agrees = agreement(problem, device) if check else {}
    times = harness.interleave(variants, rounds, device)
    return {
        "title": problem.title,
        "seconds": {name: statistics.median(times[name]) for name in variants},
        "ratios": {name: statistics.median(harness.ratios(times, name, BASE)) for name in variants},
        "compiling": seconds,
        "eager": {name: why for name, why in reasons.items() if why},
        "agreement": agrees,
        "times": times,
    }


def report(result: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    problems = result["problems"].values()
    names = [BASE, "SGD", "SGD, torch.compile", *result["optimizers"]]

    def cell(ratios: dict[str, float], name: str) -> str:
        if name not in ratios:
            return ""
        other = f"{name}, compiled"
        shown = f"{ratios[name]:.2f}"
        return f"{shown}, {ratios[other]:.2f}" if other in ratios else shown

    rows = [[name, *(cell(p["ratios"], name) for p in problems)] for name in names]
    begin = [f"{1e3 * p['seconds'][BASE]:.2f} ms" for p in problems]
    compiling = [
        [name, *(f"{p['compiling'][name]:.0f}" for p in problems)] for name in result["optimizers"]
    ]
    apart = [
        [name, *(f"{p['agreement'][name]:.0e}" if name in p["agreement"] else "" for p in problems)]
        for name in EXACT
    ]
    agreement = [
        "How far the parameters are apart after ten steps of both kinds, over their norm "
        "(double precision, exact curvature or the same random signs, no noise).",
        harness.table(["", *(p["title"] for p in problems)], apart),
    ]
    titles = [p["title"] for p in problems]
    notes = [f"{k} on {p['title']}: {why}" for p in problems for k, why in p["eager"].items()]
    return "\n\n".join(
        [
            "# Compiled steps",
            harness.sentence(result["machine"]),
            "Steps as they are and compiled to one graph, in the time of a plain gradient (forward "
            f"and backward). Medians of {result['rounds']} rounds.",
            harness.table(["", *titles], [["a gradient takes", *begin], *rows]),
            "Seconds of the first twelve steps, the compiling among them, with what the disk's "
            "cache had.",
            harness.table(["", *titles], compiling),
            *(agreement if any(p["agreement"] for p in problems) else ()),
            *notes,
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measures the chosen problems and writes `compiled.json` and `compiled.md`."""
    parser = harness.arguments(__doc__, rounds=41, problems=PROBLEMS)
    parser.add_argument("--optimizer", action="append", choices=list(OPTIMIZERS), help="repeatable")
    parser.add_argument("--unchecked", action="store_true", help="do not compare ten steps first")
    parser.add_argument("--first-step", choices=list(PROBLEMS), help="time this alone")
    args = parser.parse_args(argv)
    harness.pin(args.threads, args.seed)
    device = torch.device(args.device)
    if args.first_step:
        name = (args.optimizer or [*OPTIMIZERS])[0]
        started = time.perf_counter()
        stepped = Stepped(PROBLEMS[args.first_step], OPTIMIZERS[name], device, compiled=True)
        for number in range(4):
            stepped()
            wall, cpu = time.perf_counter() - started, time.process_time()
            print(f"step {number}: {wall:.2f} s since the start, {cpu:.2f} s of the CPU in all")
        return
    rounds = 3 if args.quick else args.rounds
    names = args.optimizer or [*OPTIMIZERS]
    result: dict[str, Any] = {"machine": harness.machine(args.seed), "rounds": rounds}
    result |= {"optimizers": names, "problems": {}}
    for name in args.problem or PROBLEMS:  # saved as they come: each takes minutes
        measured = measure(PROBLEMS[name], names, rounds, device, check=not args.unchecked)
        result["problems"][name] = measured
        harness.save(args.out, "compiled", result, report(result))


if __name__ == "__main__":
    main()
