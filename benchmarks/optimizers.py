"""Trains every problem with every optimizer; each finished run becomes one line of JSON.

    python benchmarks/optimizers.py --quick     # minutes on two cores
    python benchmarks/optimizers.py             # hours; run again, it goes on where it stopped
    python benchmarks/report.py                 # tables and pictures from the lines

Two tracks. *defaults*: one configuration for all problems. *tuned*: the same number of learning
rates for every optimizer, drawn log-uniformly from its range, are tried with a seed kept for that;
the best one then runs with fresh seeds. The clock counts training steps, curvature included, and
stops for evaluations. The optimizers take turns, a stretch of steps each, on the same batches and
from the same weights.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import harness
import torch
from problems import TRAINING, Data, Split, Training, loss_function, loss_of, named
from torch import Tensor, nn
from tqdm import tqdm

Step = Callable[[Tensor, Tensor], Tensor]  # one training step on a batch; returns its loss
Record = dict[str, Any]

TUNING_SEED = 0
BAR = "{desc} {percentage:3.0f} %|{bar}| {elapsed}, left {remaining}"
KEY = ("problem", "method", "track", "seed", "lr", "steps")  # what tells one run from another


# ------------------------------------------------------------------------------------- optimizers


@dataclass(frozen=True)
class Method:
    """An optimizer of the benchmark.

    Attributes:
        name: As in the tables.
        start: From a model and a learning rate, the training step.
        lr: The learning rate of the defaults track.
        low: The lowest learning rate of the tuned track.
        high: The highest.
        needs: The class without which the row is left out, as `package.Name`.
        skip: Problems that it is too slow for, by orders of magnitude.
    """

    name: str
    start: Callable[[nn.Module, float], Step]
    lr: float
    low: float
    high: float
    needs: str = "torch.optim.SGD"
    skip: tuple[str, ...] = ()


def loop(name: str, *, create_graph: bool = False, **options: Any) -> Any:
    """The loop that everybody writes: zero_grad, forward, backward, step."""

    def start(model: nn.Module, lr: float) -> Step:
        optimizer = harness.find(name)(model.parameters(), lr=lr, **options)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward(create_graph=create_graph)
            optimizer.step()
            return loss.detach()

        return with_state(step, optimizer)

    return start


def with_state(step: Step, *optimizers: torch.optim.Optimizer) -> Step:
    """A step that tells whose state it keeps."""
    vars(step)["optimizers"] = optimizers
    return step


def closure(name: str, **options: Any) -> Any:
    """The loop of an optimizer that calls the model itself."""

    def start(model: nn.Module, lr: float) -> Step:
        optimizer = harness.find(name)(model.parameters(), lr=lr, **options)

        def step(x: Tensor, y: Tensor) -> Tensor:
            return optimizer.step(lambda: loss_of(model, x, y)).detach()

        return with_state(step, optimizer)

    return start


def muon(model: nn.Module, lr: float) -> Step:
    """Muon on the matrices of hidden layers, AdamW on all else, as Muon's author advises."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables][:-1]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=lr)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))

    def step(x: Tensor, y: Tensor) -> Tensor:
        model.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return with_state(step, *optimizers)


def backpack_diag_ggn(extension: str, damping: float) -> Any:
    """BackPACK's published optimizer: `p <- p - lr * grad / (diagonal + damping)`."""

    def start(model: nn.Module, lr: float) -> Step:
        from backpack import backpack, extend

        kind = harness.find(f"backpack.extensions.{extension}")
        model, loss_function = extend(model), extend(nn.CrossEntropyLoss())

        def step(x: Tensor, y: Tensor) -> Tensor:
            model.zero_grad()
            loss = loss_function(model(x), y)
            with backpack(kind()):
                loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= lr * p.grad / (getattr(p, kind().savefield) + damping)
            return loss.detach()

        return step

    return start


def own_lr(name: str, otherwise: float) -> float:
    """The learning rate that a class proposes."""
    kind = harness.find(name)
    lr = inspect.signature(kind).parameters["lr"].default if kind else inspect.Parameter.empty
    return otherwise if lr is inspect.Parameter.empty else lr


# Problems of today's rivals alone: the older ones' ops lack a second derivative, a rule, or speed.
NEW = ("resnet", "autoencoder", "transformer", "gru")

METHODS: dict[str, Method] = named(
    # The learning rates are the libraries' own defaults, but for SGD, whose 1e-3 nobody would use.
    Method("SGD", loop("torch.optim.SGD"), 0.1, 1e-3, 1.0),
    Method("SGD, momentum", loop("torch.optim.SGD", momentum=0.9), 0.05, 1e-4, 1.0),
    Method("Adam", loop("torch.optim.Adam"), 1e-3, 1e-5, 1e-1),
    Method("AdamW", loop("torch.optim.AdamW"), 1e-3, 1e-5, 1e-1),
    Method("Muon + AdamW", muon, 1e-3, 1e-5, 1e-1, needs="torch.optim.Muon"),
    Method(
        "AdaHessian",
        loop("torch_optimizer.Adahessian", create_graph=True),
        *(0.15, 1e-3, 1.0),
        needs="torch_optimizer.Adahessian",
        skip=NEW,
    ),
    Method(
        "Shampoo",  # one singular value decomposition per axis and 50 steps
        loop("torch_optimizer.Shampoo", update_freq=50),
        *(0.1, 1e-6, 1e-1),
        needs="torch_optimizer.Shampoo",
        skip=("2c2d", *NEW),
    ),
    Method(
        "SOAP",  # decompositions every 10 steps: its own default
        loop("pytorch_optimizer.SOAP"),
        *(3e-3, 1e-5, 1e-1),
        needs="pytorch_optimizer.SOAP",
        skip=("2c2d",),
    ),
    Method(
        "Distributed Shampoo",  # decompositions every 20 steps in place of 1000: runs are short
        loop(
            "pytorch_optimizer.ScalableShampoo",
            start_preconditioning_step=5,
            preconditioning_compute_steps=20,
        ),
        *(1e-3, 1e-5, 1.0),
        needs="pytorch_optimizer.ScalableShampoo",
        skip=("2c2d",),
    ),
    Method(
        "BackPACK DiagGGN",
        backpack_diag_ggn("DiagGGNExact", damping=1e-3),
        *(1e-3, 1e-5, 1e-1),
        needs="backpack.extend",
        skip=("2c2d", *NEW),
    ),
    Method(
        "BackPACK DiagGGN-MC",
        backpack_diag_ggn("DiagGGNMC", damping=1e-3),
        *(1e-3, 1e-5, 1e-1),
        needs="backpack.extend",
        skip=NEW,
    ),
    Method(
        "curvopt DiagGGN",
        closure("curvopt.DiagGGNOptimizer"),
        *(own_lr("curvopt.DiagGGNOptimizer", 1e-3), 1e-5, 1e-1),
        needs="curvopt.DiagGGNOptimizer",
    ),
    Method(
        "curvopt Polar",
        closure("curvopt.PolarOptimizer"),
        *(own_lr("curvopt.PolarOptimizer", 3e-3), 1e-5, 1e-1),
        needs="curvopt.PolarOptimizer",
    ),
    Method(
        "curvopt VarianceAdaptiveSGD",
        closure("curvopt.VarianceAdaptiveSGD"),
        *(own_lr("curvopt.VarianceAdaptiveSGD", 0.05), 1e-4, 1.0),
        needs="curvopt.VarianceAdaptiveSGD",
    ),
)


# ------------------------------------------------------------------------------------------- runs


class Run:
    """One training run, advanced in stretches, so that others can take their turns in between."""

    def __init__(
        self,
        problem: Training,
        method: Method,
        data: Data,
        key: Record,
        evaluations: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.problem, self.data, self.key, self.clock = problem, data, key, clock
        self.steps: int = key["steps"]
        self.stretch = max(1, self.steps // evaluations)
        self.diverged = False
        self.curves: dict[str, list[float]] = {
            name: [] for name in ("at", "seconds", "loss", "validation_loss", "validation_accuracy")
        }
        device = data["train"].x.device
        with torch.random.fork_rng():
            # Two steps on a copy: first calls set up kernels, which is not the optimizer's cost.
            torch.manual_seed(key["seed"])
            warm = method.start(problem.model().to(device), key["lr"])
            for indices in _batches(data["train"], problem.size, key["seed"], 2):
                warm(data["train"].x[indices], data["train"].y[indices])
            torch.manual_seed(key["seed"])
            self.model = problem.model().to(device)
            self.step = method.start(self.model, key["lr"])
            self.random_state = random_state()
        self.order = _batches(data["train"], problem.size, key["seed"], self.steps)

    @property
    def done(self) -> bool:
        return self.diverged or self.at == self.steps

    @property
    def at(self) -> int:
        return int(self.curves["at"][-1]) if self.curves["at"] else 0

    def advance(self) -> None:
        """Trains one stretch against the clock, then evaluates."""
        train, device = self.data["train"], self.data["train"].x.device
        count = min(self.stretch, self.steps - self.at)
        batches = [(train.x[i], train.y[i]) for i in (next(self.order) for _ in range(count))]
        losses: list[Tensor] = []
        with torch.random.fork_rng():
            set_random_state(self.random_state)
            harness.synchronize(device)
            start = self.clock()
            try:
                for x, y in batches:
                    losses.append(self.step(x, y))
            except (ValueError, RuntimeError):
                # Some optimizers refuse what is no longer finite; anything else is an error.
                if loss_of(self.model, x, y).isfinite():
                    raise
                self.diverged = True
                return
            harness.synchronize(device)
            seconds = self.clock() - start
            self.random_state = random_state()
        loss = float(torch.stack(losses).double().mean())
        validation_loss, accuracy = evaluate(self.model, self.data["validation"])
        if not (math.isfinite(loss) and math.isfinite(validation_loss)):
            self.diverged = True
            return
        before = self.curves["seconds"][-1] if self.curves["seconds"] else 0.0
        values = (self.at + count, before + seconds, loss, validation_loss, accuracy)
        for curve, value in zip(self.curves.values(), values, strict=True):
            curve.append(value)

    def record(self) -> Record:
        """What is kept of a finished run."""
        loss, accuracy = (None, None) if self.diverged else evaluate(self.model, self.data["test"])
        tested = {"test_loss": loss, "test_accuracy": accuracy}
        return {**self.key, "diverged": self.diverged, **tested, **self.curves}


def random_state() -> list[Tensor]:
    """The state of the global generators, of the CPU and of every GPU."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1:])


def _batches(data: Split, size: int, seed: int, count: int) -> Iterator[Tensor]:
    """The indices of `count` batches: a new order every epoch, the last short batch dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(len(data.y), generator=generator).split(size):
            if len(indices) < size:
                break
            if count == 0:
                return
            count -= 1
            yield indices


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float]:
    """Mean loss and accuracy; the accuracy is 0 where targets are no classes."""
    loss = correct = 0.0
    for x, y in zip(data.x.split(1000), data.y.split(1000), strict=True):
        output = model(x)
        loss += float(loss_function(model)(output, y)) * len(x)
        if not y.is_floating_point():
            correct += int((output.argmax(1) == y.flatten()).sum())
    return loss / len(data.x), correct / data.y.numel()


# --------------------------------------------------------------------------------------- campaign


def learning_rates(method: Method, trials: int) -> list[float]:
    """Log-uniform draws, one in each of as many equal parts of the range, in mixed order.

    Every method gets the same places in its own range.
    """
    draw = random.Random(TUNING_SEED)
    places = [(i + draw.random()) / trials for i in draw.sample(range(trials), trials)]
    return [method.low * (method.high / method.low) ** place for place in places]


def score(record: Record) -> float:
    """What tuning maximizes: the mean of the validation accuracy over the run, 0 if it diverged.

    Where the loss counts, its mean is made small. The mean rewards being fast as well as ending
    well, and needs no target.
    """
    if record["diverged"]:
        return 0.0
    found = errors(record)
    mean = sum(found) / len(found)
    return 1 / (1 + mean) if by_loss(record["problem"]) else 1 - mean


def by_loss(problem: str) -> bool:
    """Whether the loss is what counts."""
    return problem in TRAINING and TRAINING[problem].by_loss


def errors(record: Record) -> list[float]:
    """What is to become small: the loss, or the share of wrong answers, at each evaluation."""
    if by_loss(record["problem"]):
        return record["validation_loss"]
    return [1 - accuracy for accuracy in record["validation_accuracy"]]


def best_lr(records: Iterable[Record], problem: str, method: str) -> float:
    """The learning rate of the best trial."""
    trials = [r for r in records if (r["problem"], r["method"]) == (problem, method)]
    return max((r for r in trials if r["track"] == "trial"), key=score)["lr"]


def load(path: Path) -> list[Record]:
    """The finished runs; a last line that an interruption cut short is dropped from the file."""
    if not path.exists():
        return []
    whole, newline, cut = path.read_text().rpartition("\n")
    if cut:
        path.write_text(whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


def identity(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEY)


class Campaign:
    """All runs that are wanted, and those that are already in the file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.records = load(args.out)
        self.device = torch.device(args.device)
        self.problems = [
            problem
            for name, problem in TRAINING.items()
            if (name in args.problem if args.problem else not args.quick or problem.quick)
        ]
        self.methods = [
            method
            for name, method in METHODS.items()
            if harness.find(method.needs) and (not args.method or name in args.method)
        ]

    def steps(self, problem: Training) -> int:
        return self.args.steps or (self.args.quick and problem.quick) or problem.steps

    def of(self, problem: Training) -> list[Method]:
        return [method for method in self.methods if problem.name not in method.skip]

    def groups(self) -> Iterator[tuple[Training, list[tuple[Method, Record]]]]:
        """Runs that take turns: first the trials, then both tracks, seed by seed."""
        trials, seeds = self.args.trials, range(1, self.args.seeds + 1)
        for problem in self.problems:
            for trial in range(trials):
                draws = {m: learning_rates(m, trials)[trial] for m in self.of(problem)}
                yield problem, self.runs(problem, "trial", TUNING_SEED, draws)
        for seed, problem in product(seeds, self.problems):
            runs = self.runs(problem, "defaults", seed, {m: m.lr for m in self.of(problem)})
            if trials:
                tried = [r for r in self.records if r["steps"] == self.steps(problem)]
                best = {m: best_lr(tried, problem.name, m.name) for m in self.of(problem)}
                runs += self.runs(problem, "tuned", seed, best)
            yield problem, runs

    def runs(
        self, problem: Training, track: str, seed: int, lrs: dict[Method, float]
    ) -> list[tuple[Method, Record]]:
        """A run of each method at its learning rate."""
        steps = self.steps(problem)
        return [
            (m, dict(zip(KEY, (problem.name, m.name, track, seed, lr, steps), strict=True)))
            for m, lr in lrs.items()
        ]

    def pace(self, problem: Training) -> int:
        """Microseconds of an SGD step: a progress bar that counts them has a fair time left."""
        data = problem.data()["train"].to(self.device)
        x, y = data.x[: problem.size], data.y[: problem.size]
        step = METHODS["SGD"].start(problem.model().to(self.device), 0.1)
        times = harness.interleave({"step": lambda: step(x, y)}, 3, self.device)["step"]
        return 1 + int(1e6 * min(times))

    def go(self) -> None:
        """Runs what is missing, group by group."""
        finished = {identity(record) for record in self.records}
        machine = harness.machine()
        if self.args.busy:
            machine["clock"] = "the time of the thread: others used the machine"
        pace = {problem: self.pace(problem) for problem in self.problems}
        tracks = self.args.trials + self.args.seeds * (2 if self.args.trials else 1)
        total = sum(pace[p] * self.steps(p) * len(self.of(p)) * tracks for p in self.problems)
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        with self.args.out.open("a") as file, tqdm(total=total, bar_format=BAR) as bar:
            for problem, runs in self.groups():
                missing = [(m, key) for m, key in runs if identity(key) not in finished]
                done = pace[problem] * self.steps(problem) * (len(runs) - len(missing))
                bar.update(done)
                bar.initial += done  # it says nothing about the speed
                if not missing:
                    continue
                track, seed = missing[0][1]["track"], missing[0][1]["seed"]
                bar.set_description(f"{problem.name}, {track}, seed {seed}")
                data = {name: part.to(self.device) for name, part in problem.data().items()}
                evaluations = self.args.evaluations
                clock = time.thread_time if self.args.busy else time.perf_counter
                running = [Run(problem, m, data, key, evaluations, clock) for m, key in missing]
                while running:
                    for run in running:
                        before = run.at
                        run.advance()
                        bar.update(pace[problem] * ((run.steps if run.done else run.at) - before))
                        if run.done:
                            self.records.append({**run.record(), "machine": machine})
                            file.write(json.dumps(self.records[-1]) + "\n")
                            file.flush()
                    running = [run for run in running if not run.done]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="3 seeds, 3 trials, short runs, small problems")
    add("--problem", action="append", choices=list(TRAINING), help="may be repeated")
    add("--method", action="append", choices=list(METHODS), help="may be repeated")
    add("--seeds", type=int, help="fresh seeds of each track: 10, quick 3")
    add("--trials", type=int, help="learning rates tried for the tuned track: 12, quick 3; 0: none")
    add("--steps", type=int, help="instead of each problem's own number")
    add("--evaluations", type=int, default=20, help="points of each curve")
    add("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    add("--device", default="cpu", help="cpu, or cuda")
    add(
        "--busy",
        action="store_true",
        help="count the time of this thread alone, on a machine that others use (one thread, CPU)",
    )
    add("--out", type=Path, help="default: results/optimizers.jsonl, quick: results/quick.jsonl")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the campaign that the command line asks for."""
    args = arguments().parse_args(argv)
    args.seeds = args.seeds or (3 if args.quick else 10)
    args.trials = args.trials if args.trials is not None else (3 if args.quick else 12)
    args.out = args.out or harness.RESULTS / ("quick.jsonl" if args.quick else "optimizers.jsonl")
    harness.pin(args.threads, TUNING_SEED)
    for message in ("Full backward hook is firing", r"Using backward\(\) with create_graph"):
        warnings.filterwarnings("ignore", message=message)
    Campaign(args).go()


if __name__ == "__main__":
    main()
