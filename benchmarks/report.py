"""Tables (Markdown) and pictures (PNG) from the raw lines that `optimizers.py` left.

python benchmarks/report.py                                    # of results/optimizers.jsonl
python benchmarks/report.py --runs benchmarks/results/quick.jsonl --out /tmp/quick
python benchmarks/report.py --into README.md                   # and its marked tables
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import harness
import matplotlib
import numpy as np
from optimizers import METHODS, Record, best_lr, by_loss, errors, load
from problems import TRAINING

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

TRACKS = {"defaults": "defaults, no tuning", "tuned": "tuned learning rate"}
REFERENCES = ("SGD, momentum", "AdamW")  # both of which reach the target
SLACK = 1.25  # of their error, so that the target is not the edge of what they can do
LOSS_SLACK = 1.1
ACCURACY = "validation_accuracy"
TAU = 4.0
DROP = 20.0  # points of accuracy that the picture of the sensitivity shows
WIDE = 4  # panels side by side
UNIT = "SGD, momentum"  # of the cost of a step

# Ours in strong colours, families alike: SGD in greys, Adam in greens, BackPACK in purples.
COLOURS = {
    "SGD": "#b0b0b0",
    "SGD, momentum": "#444444",
    "Adam": "#2e9e5b",
    "AdamW": "#8fce9f",
    "Muon + AdamW": "#0e6e7e",
    "AdaHessian": "#c9a227",
    "Shampoo": "#9c6b30",
    "BackPACK DiagGGN": "#7b4fa3",
    "BackPACK DiagGGN-MC": "#c3a2dd",
    "SOAP": "#e377c2",
    "Distributed Shampoo": "#d9a066",
    "curvopt DiagGGN": "#d62728",
    "curvopt Polar": "#ff7f0e",
    "curvopt VarianceAdaptiveSGD": "#1f6fd6",
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


# ---------------------------------------------------------------------------------------- numbers


class Runs:
    """The finished runs, and what is read off them."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.problems = [p for p in TRAINING if self.select(problem=p)]
        self.methods = [m for m in METHODS if self.select(method=m)]
        self.tracks = [t for t in TRACKS if self.select(track=t)]
        self.targets = {problem: self._target(problem) for problem in self.problems}

    def select(self, **wanted: Any) -> list[Record]:
        return [r for r in self.records if all(r[name] == value for name, value in wanted.items())]

    def _target(self, problem: str) -> float:
        """The validation accuracy to reach, or the loss.

        Its error is SLACK times the one that three of four runs of both reference optimizers
        reach, tuned ones where there are any. The references may not get off a plateau of a loss
        at all: there it is LOSS_SLACK times the loss that three of four runs of the best reach.
        """
        track = "tuned" if self.select(problem=problem, track="tuned") else "defaults"
        reference = [m for m in REFERENCES if m in self.methods] or self.methods
        if by_loss(problem):
            reference = self.methods
        found = [
            [min(errors(r), default=math.inf) for r in runs]
            for m in reference
            if (runs := self.select(problem=problem, method=m, track=track))
        ]
        reached = [quantile(values, 0.75) for values in found]
        if by_loss(problem):
            return LOSS_SLACK * min(reached, default=math.nan)
        return 1 - SLACK * max(reached, default=math.nan)

    def reach(self, record: Record, unit: str) -> float:
        """Seconds or steps ("at") until the target; infinite for a miss."""
        target = self.targets[record["problem"]]
        sign, field = (-1, "validation_loss") if by_loss(record["problem"]) else (1, ACCURACY)
        pairs = zip(record[unit], record[field], strict=True)
        return next((x for x, value in pairs if sign * value >= sign * target), math.inf)

    def to_target(self, unit: str, **wanted: Any) -> list[float]:
        return [self.reach(r, unit) for r in self.select(**wanted)]

    def tried(self, problem: str) -> int:
        """How many learning rates every method was given to tune."""
        trials = self.select(problem=problem, track="trial")
        return max(Counter(r["method"] for r in trials).values(), default=0)

    def cost(self, problem: str, method: str) -> float:
        """Seconds per step as a ratio to UNIT's in the same turn, median over seeds and tracks."""
        ratios = []
        for run in self.select(problem=problem, method=method):
            same = {"problem": problem, "track": run["track"], "seed": run["seed"]}
            if run["at"] and run["track"] != "trial":
                rivals = [r for r in self.select(**same, method=UNIT) if r["at"]]
                ratios += [per_step(run) / per_step(rival) for rival in rivals]
        return quantile(ratios, 0.5) if ratios else math.nan

    def behind(self, problem: str, method: str) -> float:
        """Median time to target with defaults, over the shortest of the others, tuned or not."""

        def median(name: str, track: str) -> float:
            times = self.to_target("seconds", problem=problem, method=name, track=track)
            return quantile(times, 0.5) if times else math.nan

        others = [median(m, track) for m in self.methods if m != method for track in self.tracks]
        best = min((time for time in others if not math.isnan(time)), default=math.inf)
        own = median(method, "defaults")
        return own / best if best < math.inf else math.nan

    def ratios(self, track: str, method: str) -> list[float]:
        """Time to target over that of the fastest optimizer, for every problem and seed."""
        result = []
        for run in self.select(track=track, method=method):
            rivals = self.select(track=track, problem=run["problem"], seed=run["seed"])
            best = min(self.reach(r, "seconds") for r in rivals)
            result.append(self.reach(run, "seconds") / best if best < math.inf else math.inf)
        return result


def quantile(values: Sequence[float], q: float) -> float:
    """One of the values, so that an infinite one (a miss) stays what it is."""
    return float(np.quantile(values, q, method="inverted_cdf"))


def per_step(record: Record) -> float:
    return record["seconds"][-1] / record["at"][-1]


# ----------------------------------------------------------------------------------------- tables


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return ""
    return "miss" if math.isinf(value) else f"{value:.{digits}g}"


def spread(values: Sequence[float], show: Callable[[float], str] = number) -> str:
    """Median and quartiles."""
    if not values:
        return ""
    low, middle, high = (show(quantile(values, q)) for q in (0.25, 0.5, 0.75))
    return middle if low == high else f"{middle} ({low} to {high})"


def tables(runs: Runs) -> dict[str, str]:
    """Every table by its name."""

    def by_method(cell: Callable[[str, str], str], first: str = "optimizer") -> str:
        titles = [TRAINING[problem].title for problem in runs.problems]
        rows = [[m, *(cell(m, problem) for problem in runs.problems)] for m in runs.methods]
        return harness.table([first, *titles], rows)

    def percent(value: float) -> str:
        return f"{100 * value:.2f}"

    def accuracy(method: str, problem: str, track: str) -> str:
        records = runs.select(problem=problem, method=method, track=track)
        if by_loss(problem):
            return spread([math.inf if r["diverged"] else r["test_loss"] for r in records])
        return spread([r["test_accuracy"] or 0.0 for r in records], percent)

    def tuned(method: str, problem: str) -> str:
        trials = runs.select(problem=problem, method=method, track="trial")
        if not trials:
            return ""
        best, rates = best_lr(trials, problem, method), [r["lr"] for r in trials]
        return f"{best:.2g}" + (" (edge)" if best in (min(rates), max(rates)) else "")

    result = {}
    for track in runs.tracks:
        for unit, title in (("seconds", "time"), ("at", "steps")):
            result[f"{title}-{track}"] = by_method(
                lambda m, p, unit=unit, track=track: spread(
                    runs.to_target(unit, problem=p, method=m, track=track)
                )
            )
        result[f"accuracy-{track}"] = by_method(lambda m, p, track=track: accuracy(m, p, track))
    result["cost"] = by_method(lambda m, p: number(runs.cost(p, m)))
    if len(runs.tracks) == len(TRACKS):
        result["behind"] = by_method(lambda m, p: number(runs.behind(p, m)))
    if runs.select(track="trial"):
        result["lr"] = by_method(tuned)
    return result


def goal(runs: Runs, problem: str, digits: int) -> str:
    """The target, as people say it."""
    target = runs.targets[problem]
    return number(target) if by_loss(problem) else f"{100 * target:.{digits}f} %"


def page(runs: Runs) -> str:
    """The tables with what they mean."""
    losses = any(map(by_loss, runs.problems))
    headings = {
        "time": "Seconds to the target",
        "steps": "Steps to the target",
        "accuracy": "Test accuracy at the end, %" + ", or test loss" * losses,
        "behind": "Seconds to the target with defaults, in the fastest other's, tuned or not",
        "cost": "Time of a step, in those of SGD with momentum",
        "lr": "Learning rates that tuning chose",
    }
    seeds = len({r["seed"] for r in runs.records if r["track"] != "trial"})
    targets = ", ".join(f"{TRAINING[p].title} {goal(runs, p, 2)}" for p in runs.problems)
    parts = [
        "# The optimizer benchmark",
        harness.sentence(runs.records[0]["machine"]),
        f"Median and quartiles of {seeds} seeds; a run that misses the target counts as infinite. "
        f"Targets (validation accuracy; {SLACK:g} times the error that three of four runs of both "
        f"{' and '.join(REFERENCES)} reach"
        + f"; where a loss counts, {LOSS_SLACK:g} times that of the best optimizer" * losses
        + f"): {targets}.",
    ]
    if runs.select(track="trial"):
        tried = ", ".join(f"{TRAINING[p].title} {runs.tried(p)}" for p in runs.problems)
        parts.append(f"Learning rates tried for each optimizer of the tuned track: {tried}.")
    for name, table in tables(runs).items():
        kind, _, track = name.partition("-")
        parts += [f"## {headings[kind]}" + (f": {TRACKS[track]}" if track else ""), table]
    return "\n\n".join(parts) + "\n"


def embed(text: str, tables: dict[str, str]) -> str:
    """The text with each `<!-- table NAME -->` ... `<!-- end -->` filled in anew."""
    return re.sub(
        r"(<!-- table (\S+) -->\n).*?(?=<!-- end -->)",
        lambda match: f"{match[1]}{tables[match[2]]}\n",
        text,
        flags=re.DOTALL,
    )


# --------------------------------------------------------------------------------------- pictures


def look(method: str) -> dict[str, Any]:
    """Colour and weight of a method's line."""
    ours = method.startswith("curvopt")
    return {
        "color": COLOURS.get(method, "#999999"),
        "linewidth": 2.2 if ours else 1.3,
        "zorder": 3 if ours else 2,
    }


def grid(panels: int, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure of so many panels, `WIDE` of them side by side; axes are ``[rows, panels]``.

    Args:
        panels: One for each problem, or track.
        height: Of an axis, in inches.
        rows: Axes of a panel, one below the other.
    """
    columns = min(panels, WIDE)
    lines = -(-panels // columns)
    figure, axes = plt.subplots(
        *(rows * lines, columns),
        figsize=(3.3 * columns + 0.4, height * rows * lines + 0.7),
        squeeze=False,
    )
    axes = axes.reshape(lines, rows, columns).transpose(1, 0, 2).reshape(rows, -1)
    for unused in axes[:, panels:].flat:
        unused.set_visible(False)
    return figure, axes[:, :panels]


def logarithmic(axis: Any) -> None:
    """Plain numbers at 1, 2, 5, or at powers of ten alone where the axis is long."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    """One legend below all panels."""
    found: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.tight_layout()
    if found:
        columns = min(len(found), 6 if axes.shape[1] > 2 else 3)
        lines = -(-len(found) // columns)
        figure.subplots_adjust(
            bottom=figure.subplotpars.bottom + 0.24 * lines / figure.get_figheight()
        )
        figure.legend(found.values(), found.keys(), loc="lower center", ncol=columns)
    figure.savefig(path)
    plt.close(figure)


def curves(runs: Runs, track: str, path: Path) -> None:
    """Training loss against time and against steps: median of the seeds, band of the quartiles."""
    figure, axes = grid(len(runs.problems), 2.5, rows=2)
    for column, problem in enumerate(runs.problems):
        for row, (unit, label) in enumerate((("seconds", "seconds"), ("at", "steps"))):
            ax = axes[row, column]
            for method in runs.methods:
                records = runs.select(problem=problem, method=method, track=track)
                whole = [r for r in records if not r["diverged"]]
                if 2 * len(whole) <= len(records):  # the median run diverged
                    continue
                losses = np.array([r["loss"] for r in whole])
                x = np.median([r[unit] for r in whole], axis=0)
                low, middle, high = np.quantile(losses, (0.25, 0.5, 0.75), axis=0)
                ax.plot(x, middle, label=method, **look(method))
                ax.fill_between(x, low, high, color=look(method)["color"], alpha=0.15, linewidth=0)
            ax.set(xlabel=label, yscale="log", xscale="log" if unit == "seconds" else "linear")
            if not by_loss(problem):
                ax.set_ylim(top=min(ax.get_ylim()[1], 4))  # above that of the first weights: failed
            logarithmic(ax.yaxis)
            if unit == "seconds":
                logarithmic(ax.xaxis)
            if row == 0:
                ax.set_title(TRAINING[problem].title)
            if column % WIDE == 0:
                ax.set_ylabel("training loss")
    finish(figure, axes, f"Training loss: {TRACKS[track]}", path)


def times(runs: Runs, track: str, path: Path) -> None:
    """Time to target: median, quartiles, and how many seeds missed."""
    figure, axes = grid(len(runs.problems), 0.26 * len(runs.methods) + 0.4)
    for column, (ax, problem) in enumerate(zip(axes.flat, runs.problems, strict=True)):
        reached = {
            m: runs.to_target("seconds", problem=problem, method=m, track=track)
            for m in runs.methods
        }
        finite = [x for values in reached.values() for x in values if x < math.inf] or [1.0]
        edge = 2.2 * max(finite)
        for y, (method, values) in enumerate(reversed(reached.items())):
            if not values:
                continue
            quartiles = [min(quantile(values, q), edge) for q in (0.25, 0.5, 0.75)]
            colour, missed = look(method)["color"], sum(map(math.isinf, values))
            ax.plot(quartiles[::2], [y, y], color=colour, linewidth=3, solid_capstyle="round")
            if quartiles[1] < edge:
                ax.plot(quartiles[1], y, "o", color=colour, markersize=7, markeredgecolor="white")
            if missed:
                ax.text(edge, y, f" {missed}/{len(values)} missed", va="center", fontsize=7)
        names = list(reversed(reached))
        ax.set(
            xscale="log", xlabel="seconds", yticks=range(len(names)), ylim=(-0.6, len(names) - 0.4)
        )
        ax.set_yticklabels(names if column % WIDE == 0 else [])
        ax.set_xlim(min(finite) / 1.5, edge)
        logarithmic(ax.xaxis)
        ax.set_title(f"{TRAINING[problem].title}: {goal(runs, problem, 1)}")
    finish(figure, axes, f"Time to the target: {TRACKS[track]}", path)


def profiles(runs: Runs, path: Path) -> None:
    """Share of problems and seeds that are solved within tau times the fastest optimizer's time."""
    figure, axes = grid(len(runs.tracks), 3.2)
    taus = np.linspace(1, TAU, 400)
    for ax, track in zip(axes.flat, runs.tracks, strict=True):
        for method in runs.methods:
            ratios = np.array(runs.ratios(track, method))
            if len(ratios):
                share = (ratios <= taus[:, None]).mean(1)
                ax.step(taus, share, where="post", label=method, **look(method))
        ax.set(title=TRACKS[track], xlabel="tau: times the fastest", xlim=(1, TAU), ylim=(0, 1.02))
    axes[0, 0].set_ylabel("share of problems and seeds solved")
    finish(figure, axes, "Performance profile: time to the target", path)


def quality(record: Record) -> float:
    """What a trial ended with: accuracy in percent, or the loss with its sign turned."""
    if by_loss(record["problem"]):
        return -math.inf if record["diverged"] else -errors(record)[-1]
    return 0.0 if record["diverged"] else 100 * record["validation_accuracy"][-1]


def sensitivity(runs: Runs, path: Path) -> None:
    """Validation accuracy of every trial against its learning rate, best one at 1."""
    figure, axes = grid(len(runs.problems), 2.8)
    for ax, problem in zip(axes.flat, runs.problems, strict=True):
        shown: list[tuple[float, float]] = []
        for method in runs.methods:
            trials = runs.select(problem=problem, method=method, track="trial")
            if not trials:
                continue
            best = best_lr(trials, problem, method)
            points = [(r["lr"] / best, quality(r)) for r in sorted(trials, key=lambda r: r["lr"])]
            shown += points
            ax.plot(*zip(*points, strict=True), "o-", markersize=3, label=method, **look(method))
        ax.axvline(1, color="#bbbbbb", linewidth=1, zorder=1)
        # The upper part tells optimizers apart; what fails leaves the picture at its lower edge.
        top = max((y for _, y in shown), default=100.0)
        drop = 0.5 * abs(top) if by_loss(problem) else DROP
        inside = [x for x, y in shown if y > top - drop] or [1.0]
        ax.set(xscale="log", xlabel="lr / best lr", ylim=(top - drop, top + 0.05 * drop))
        ax.set_xlim(min(inside) / 1.5, max(inside) * 1.5)
        logarithmic(ax.xaxis)
        ax.set_title(TRAINING[problem].title)
    axes[0, 0].set_ylabel("final validation accuracy, %, or -loss")
    finish(figure, axes, "Sensitivity to the learning rate", path)


def costs(runs: Runs, path: Path) -> None:
    """Time of a step, in those of SGD with momentum."""
    figure, axes = grid(len(runs.problems), 0.26 * len(runs.methods) + 0.4)
    names = list(reversed(runs.methods))
    for column, (ax, problem) in enumerate(zip(axes.flat, runs.problems, strict=True)):
        values = [runs.cost(problem, method) for method in names]
        ax.barh(names, np.nan_to_num(values), color=[look(m)["color"] for m in names], height=0.7)
        for y, value in enumerate(values):
            ax.text(np.nan_to_num(value), y, f" {number(value, 2)}", va="center", fontsize=7)
        ax.set_yticks(range(len(names)), names if column % WIDE == 0 else [])
        ax.set(title=TRAINING[problem].title, xlabel="steps of SGD with momentum")
        ax.margins(x=0.12)
        ax.grid(visible=False, axis="y")
    finish(figure, axes, "Cost of a step", path)


def draw(runs: Runs, folder: Path) -> list[Path]:
    """All pictures."""
    jobs: dict[str, Callable[[Path], None]] = {}
    for track in runs.tracks:
        jobs[f"curves-{track}"] = lambda path, track=track: curves(runs, track, path)
        jobs[f"time-{track}"] = lambda path, track=track: times(runs, track, path)
    if runs.tracks:
        jobs["profile"] = lambda path: profiles(runs, path)
        jobs["cost"] = lambda path: costs(runs, path)
    if runs.select(track="trial"):
        jobs["sensitivity"] = lambda path: sensitivity(runs, path)
    paths = [folder / f"{name}.png" for name in jobs]
    with plt.rc_context(STYLE):
        for path, job in zip(paths, jobs.values(), strict=True):
            job(path)
    return paths


def main(argv: list[str] | None = None) -> None:
    """Writes `optimizers.md` and the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=harness.RESULTS / "optimizers.jsonl", help="raw lines"
    )
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder to write to")
    parser.add_argument("--into", type=Path, help="a Markdown file whose marked tables to refill")
    args = parser.parse_args(argv)
    records = load(args.runs)
    if not records:
        raise SystemExit(
            f"no finished run in {args.runs}: python benchmarks/optimizers.py makes some"
        )
    runs = Runs(records)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "optimizers.md").write_text(page(runs))
    for path in [args.out / "optimizers.md", *draw(runs, args.out)]:
        print(f"written: {path}")
    if args.into:
        args.into.write_text(embed(args.into.read_text(), tables(runs)))


if __name__ == "__main__":
    main()
