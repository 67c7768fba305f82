"""Time and peak memory of each quantity, as a ratio to one plain forward and backward pass.

curvopt, BackPACK and torch.func run interleaved in one process, on the same batch; where their
numbers are comparable, they are compared first.

    python benchmarks/quantities.py [--quick] [--problem mlp] [--rounds 20]
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from problems import CLASSIFIERS, Timed
from torch import Tensor, nn
from torch.nn import functional as F

OURS, BACKPACK, FUNC, PLAIN = "curvopt", "BackPACK", "torch.func", "plain"
TOLERANCE = 1e-3  # of a whole parameter's norm, in float32


@dataclass(frozen=True)
class Quantity:
    """A quantity, how it relates to BackPACK's of the same name, and what it may cost.

    Attributes:
        name: The class, in curvopt and in BackPACK.
        field: The field of curvopt's result.
        power: Under a mean over N samples, ours is N^power times BackPACK's, whose rows carry the
            loss's 1/N. None where the two cannot be compared (random, or another root).
        rows: The quantity from per-sample gradients `[N, *p]`, for torch.func.
        limit: At most this share of the fastest rival's time.
        rivals: Whom the limits on time and memory are about.
        plain: At most this many plain gradients.
    """

    name: str
    field: str
    power: int | None = None
    rows: Callable[[Tensor], Tensor] | None = None
    limit: float | None = None
    rivals: tuple[str, ...] = (BACKPACK,)
    plain: float | None = None


def squared_norms(rows: Tensor) -> Tensor:
    return rows.flatten(1).square().sum(1)


QUANTITIES = (
    Quantity("BatchGrad", "batch_grad", 1, lambda g: g, limit=1.0, rivals=(BACKPACK, FUNC)),
    Quantity("BatchL2Grad", "batch_l2", 2, squared_norms, limit=0.7),
    Quantity("SumGradSquared", "sum_grad_squared", 2, lambda g: g.square().sum(0)),
    Quantity("Variance", "variance", 2, lambda g: g.var(0, correction=0), limit=0.45, plain=1.4),
    Quantity("DiagGGNExact", "diag_ggn_exact", 0, limit=0.75),
    Quantity("DiagGGNMC", "diag_ggn_mc", limit=0.55, plain=1.4),
    Quantity("BatchDiagGGNExact", "diag_ggn_exact_batch", 1),
    Quantity("BatchDiagGGNMC", "diag_ggn_mc_batch"),
    Quantity("SqrtGGNExact", "sqrt_ggn_exact", limit=1.0),
    Quantity("SqrtGGNMC", "sqrt_ggn_mc"),
    Quantity("KFAC", "kfac", limit=1.0),
    Quantity("KFLR", "kflr"),
    Quantity("DiagHessian", "diag_h", 0),
    Quantity("BatchDiagHessian", "diag_h_batch", 1),
)

Runs = dict[str, harness.Variant]


def plain(model: nn.Module, x: Tensor, y: Tensor) -> harness.Variant:
    """The unit of time and memory: zero the gradients, go forward, go backward."""

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return run


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    """Our quantities, on the ordinary model."""
    compute, params = harness.find("curvopt.compute"), list(model.parameters())
    if compute is None:
        return {}

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    def run(quantity: Quantity) -> harness.Variant | None:
        kind = harness.find(f"curvopt.{quantity.name}")
        if kind is None:
            return None
        return lambda: getattr(compute(closure, params, kind()), quantity.field)

    runs = {quantity.name: run(quantity) for quantity in QUANTITIES}
    return {name: run for name, run in runs.items() if run}


def backpacks(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    """BackPACK's extensions of the same names, on the extended model."""
    extend, backpack = harness.find("backpack.extend"), harness.find("backpack.backpack")
    if backpack is None:
        return {}
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    model, loss = extend(model), extend(nn.CrossEntropyLoss())

    def run(kind: Callable[[], Any]) -> dict[nn.Parameter, Any]:
        model.zero_grad()
        extension = kind()
        with backpack(extension):
            loss(model(x), y).backward()
        # Taken off the parameters: left there, it would count as memory of the next call.
        values = {p: vars(p).pop(extension.savefield) for p in model.parameters()}
        return {p: v.detach() if isinstance(v, Tensor) else v for p, v in values.items()}

    kinds = {q.name: harness.find(f"backpack.extensions.{q.name}") for q in QUANTITIES}
    return {name: lambda kind=kind: run(kind) for name, kind in kinds.items() if kind}


def funcs(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    """Per-sample gradients by `vmap(grad)`, and what follows from them."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, x[None]), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run(reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [reduce(rows) for rows in gradients(params, x, y).values()]

    return {q.name: lambda reduce=q.rows: run(reduce) for q in QUANTITIES if q.rows}


LIBRARIES = {OURS: ours, BACKPACK: backpacks, FUNC: funcs}


def difference(quantity: Quantity, mine: harness.Variant, theirs: harness.Variant, n: int) -> float:
    """The largest relative difference over the parameters, once scaled alike."""
    scale = n**quantity.power
    pairs = [(a, b * scale) for a, b in zip(mine().values(), theirs().values(), strict=True)]
    floor = 1e-4 * max(a.norm() for a, _ in pairs)  # of a parameter whose numbers are all noise
    return max(float((a - b).norm() / (a.norm() + floor)) for a, b in pairs)


def measure(
    problem: Timed, rounds: int, device: torch.device, only: list[str] | None = None
) -> dict[str, Any]:
    """Checks and times one problem, all quantities or only those named."""
    libraries = {name: make(*problem.build(device)) for name, make in LIBRARIES.items()}
    known = libraries[OURS] or libraries[BACKPACK]
    names = [q.name for q in QUANTITIES if q.name in known and (not only or q.name in only)]
    differences = {}
    for quantity in QUANTITIES:
        pair = [libraries[library].get(quantity.name) for library in (OURS, BACKPACK)]
        if quantity.power is not None and quantity.name in names and all(pair):
            gap = differences[quantity.name] = difference(quantity, *pair, problem.size)
            if gap > TOLERANCE:
                raise SystemExit(
                    f"{problem.name}: {quantity.name} differs from BackPACK's by {gap}"
                )

    def start(library: str, name: str) -> harness.Start:
        return lambda: LIBRARIES[library](*problem.build(device))[name]

    starts: dict[str, harness.Start] = {PLAIN: lambda: plain(*problem.build(device))}
    for name in names:
        for library in (library for library, runs in libraries.items() if name in runs):
            starts[f"{library} {name}"] = start(library, name)
    return {
        "title": f"{problem.title}, N = {problem.size}",
        "differences": differences,
        "variants": harness.measure(starts, PLAIN, rounds, device),
    }


def shares(quantity: Quantity, variants: dict[str, Any]) -> tuple[float, float] | None:
    """Our time (median over the rounds) and memory as a share of the best rival's."""
    mine = variants.get(f"{OURS} {quantity.name}")
    rivals = [variants.get(f"{rival} {quantity.name}") for rival in quantity.rivals]
    if mine is None or not any(rivals):
        return None
    pairs = [
        (
            statistics.median(a / b for a, b in zip(mine["times"], rival["times"], strict=True)),
            mine["peak_bytes"] / rival["peak_bytes"],
        )
        for rival in rivals
        if rival
    ]
    return max(time for time, _ in pairs), max(memory for _, memory in pairs)


def verdict(quantity: Quantity, variants: dict[str, Any]) -> str:
    """The targets that are missed, or that none is."""
    share, mine = shares(quantity, variants), variants.get(f"{OURS} {quantity.name}")
    if share is None or mine is None:
        return ""
    missed = [
        *(["time"] if quantity.limit and share[0] > quantity.limit else []),
        *(["plain"] if quantity.plain and mine["ratio"] > quantity.plain else []),
        *(["memory"] if share[1] > 1 else []),
    ]
    return "misses " + ", ".join(missed) if missed else "met"


def report(result: dict[str, Any]) -> str:
    """The tables of all problems, as Markdown."""
    parts = ["# Cost of each quantity, in plain gradients", harness.sentence(result["machine"])]
    for problem in result["problems"].values():
        variants = problem["variants"]
        rows = []
        for quantity in QUANTITIES:
            cells = [variants.get(f"{library} {quantity.name}") for library in LIBRARIES]
            if not any(cells):
                continue
            share = shares(quantity, variants)
            limits = [
                *([f"{quantity.limit:g} of theirs"] if quantity.limit else []),
                *([f"{quantity.plain:g} plain"] if quantity.plain else []),
            ]
            rows.append(
                [
                    f"`{quantity.name}`",
                    *(f"{cell['ratio']:.2f}" if cell else "" for cell in cells),
                    f"{share[0]:.2f}" if share else "",
                    *(f"{cell['peak_bytes'] / 1e6:.1f}" if cell else "" for cell in cells),
                    ", ".join(limits),
                    verdict(quantity, variants),
                ]
            )
        header = ["quantity", *LIBRARIES, "of theirs", *(f"MB, {x}" for x in LIBRARIES)]
        plain = variants[PLAIN]
        parts += [
            f"## {problem['title']}",
            f"One plain gradient: {1e3 * plain['seconds']:.1f} ms, "
            f"{plain['peak_bytes'] / 1e6:.1f} MB.",
            harness.table([*header, "target: at most", ""], rows),
        ]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Measures the chosen problems and writes `quantities.json` and `quantities.md`."""
    parser = harness.arguments(__doc__, rounds=15, problems=CLASSIFIERS)
    parser.add_argument(
        "--quantity", action="append", choices=[q.name for q in QUANTITIES], help="may be repeated"
    )
    args = parser.parse_args(argv)
    harness.pin(args.threads, args.seed)
    rounds = 3 if args.quick else args.rounds
    result: dict[str, Any] = {"machine": harness.machine(args.seed), "rounds": rounds}
    result["problems"] = {
        name: measure(CLASSIFIERS[name], rounds, torch.device(args.device), args.quantity)
        for name in args.problem or CLASSIFIERS
    }
    harness.save(args.out, "quantities", result, report(result))


if __name__ == "__main__":
    main()
