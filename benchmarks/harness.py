"""What the benchmarks share: interleaved timing, peak memory, and the files they leave behind.

One timing means little on a busy machine. So all variants are timed in turn, round after round,
and what is reported is the median over the rounds of *variant / baseline in the same round*:
whatever slows the machine down slows both.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    *("torch", "curvopt", "backpack-for-pytorch", "opacus", "torch-optimizer", "transformers"),
)
SLICE = 0.02  # seconds: a shorter variant is repeated within its turn until it fills one slice
WARMUP = 2
SECOND = "second call"  # mark in a profile

Variant = Callable[[], Any]  # one call is what is timed
Start = Callable[[], Variant]  # builds a variant with all that it needs

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise


def find(name: str) -> Any:
    """`find("package.Name")` is that object, or None where the package or the name is missing."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def arguments(description: str, *, rounds: int, problems: Iterable[str]) -> argparse.ArgumentParser:
    """The options that the timed benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds: a look, not a result")
    parser.add_argument("--problem", action="append", choices=list(problems), help="repeatable")
    parser.add_argument("--rounds", type=int, default=rounds, help="of which the median is shown")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def pin(threads: int, seed: int) -> None:
    """Fix what a result may depend on: the number of threads and the seed."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def machine(seed: int | None = None) -> dict[str, Any]:
    """Where and with what a result was measured."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "seed": seed,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next to this call means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    variants: dict[str, Variant], rounds: int, device: torch.device, slice_seconds: float = SLICE
) -> dict[str, list[float]]:
    """Seconds of one call of each variant in each round; every round has its own order."""
    repeats = {}
    for name, run in variants.items():
        for _ in range(WARMUP):
            seconds = _timed(run, 1, device)
        repeats[name] = max(1, round(slice_seconds / seconds))
    times: dict[str, list[float]] = {name: [] for name in variants}
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a variant is not its cost
    try:
        for number in range(rounds):
            for name in random.Random(number).sample(list(variants), len(variants)):
                gc.collect()
                times[name].append(_timed(variants[name], repeats[name], device))
    finally:
        if collecting:
            gc.enable()
    return times


def _timed(run: Variant, repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_memory(start: Start, device: torch.device, *, later: bool = False) -> int:
    """Bytes at the peak of everything a variant holds: weights, batch, state and work.

    Counted by PyTorch's own allocator from before the variant is built to the end of its second
    call: on a GPU by its peak statistics, on a CPU from every allocation and release that the
    profiler sees. Memory that a math library takes from the system by itself is in neither.

    Args:
        start: Builds the variant.
        device: Where it runs.
        later: The peak of the second call alone, when what is done once has been done.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run = start()
        run()
        if later:
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = start()
        run()
        with record_function(SECOND):
            run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    begin = next(e.start_ns() for e in events if e.name() == SECOND) if later else 0
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            before, held = held, held + event.nbytes()
            if event.start_ns() >= begin:
                peak = max(peak, before, held)
    return peak


def measure(
    starts: dict[str, Start], base: str, rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Time and peak memory of each variant, and both as a ratio to the variant `base`."""
    peaks = {name: peak_memory(start, device) for name, start in starts.items()}
    later = {name: peak_memory(start, device, later=True) for name, start in starts.items()}
    times = interleave({name: start() for name, start in starts.items()}, rounds, device)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "ratio": statistics.median(ratios(times, name, base)),
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks[base],
            "later_peak_ratio": later[name] / later[base],
            "times": times[name],
        }
        for name in starts
    }


def ratios(times: dict[str, list[float]], name: str, base: str) -> list[float]:
    """`name` over `base`, round by round."""
    return [a / b for a, b in zip(times[name], times[base], strict=True)]


def sentence(machine: dict[str, Any]) -> str:
    """Where and with what, for a reader."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    threads = machine["threads"]
    device = machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s' * (threads > 1)}"
    return f"{device}; Python {machine['python']}, {versions}; {machine['date']}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save(folder: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write the raw numbers as JSON and the tables as Markdown, and show the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    print(text)
    print(f"\nwritten: {folder / name}.json and .md")
