"""Tests that run in several processes at once, and notice when these wait for ever."""

import functools
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # wrappers import it: once here, not in every process
import torch.distributed as dist
import torch.distributed.fsdp  # the same

WORLD = 2


def ranks(world=WORLD, timeout=60.0):
    """Run a test's body in forked processes, a gloo rank each; it passes if all of them do.

    What a process raises, or where it hangs, is in the error. Collectives give up earlier than the
    test: after a third of its time.

    Args:
        world: the number of processes.
        timeout: seconds.
    """

    def decorate(body):
        @functools.wraps(body)
        def test(*args, **kwargs):
            with tempfile.TemporaryDirectory() as folder:
                run(functools.partial(body, *args, **kwargs), world, timeout, Path(folder))

        return test

    return decorate


def run(body, world, timeout, folder):
    sys.stdout.flush(), sys.stderr.flush()
    running = {}
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _child(body, rank, world, timeout, folder)
        running[pid] = rank
    left, hung = dict(running), {}
    end = time.monotonic() + timeout
    while left and time.monotonic() < end:
        for pid in [*left]:
            if os.waitpid(pid, os.WNOHANG)[0]:
                del left[pid]
        time.sleep(0.01)
    for pid, rank in left.items():
        os.kill(pid, signal.SIGABRT)  # faulthandler says where it was
        os.waitpid(pid, 0)
        hung[rank] = (folder / f"{rank}.log").read_text()
    told = {rank: (folder / str(rank)) for rank in running.values()}
    errors = {
        rank: f"hangs after {timeout:g} s\n{hung[rank]}"
        if rank in hung
        else path.read_text()
        if path.exists()
        else f"died\n{(folder / f'{rank}.log').read_text()}"
        for rank, path in told.items()
    }
    failed = {rank: text for rank, text in errors.items() if text}
    if failed:
        raise AssertionError("\n".join(f"rank {r}: {text}" for r, text in failed.items()))


def _child(body, rank, world, timeout, folder):
    """Never returns: what pytest would do next is the parent's to do."""
    import faulthandler

    log = open(folder / f"{rank}.log", "w")  # noqa: SIM115 (open until the process ends)
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    error = ""
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # torch's own
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout / 3)
        )
        torch.manual_seed(0)
        body()
        dist.barrier()
    except BaseException:
        error = traceback.format_exc()
    (folder / f".{rank}").write_text(error)
    (folder / f".{rank}").rename(folder / str(rank))
    os._exit(0)


def everywhere(value):
    """A value of each process."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


_alone = {}


def alone():
    """A group of this process alone, in which a step is that of one process."""
    if os.getpid() not in _alone:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _alone[os.getpid()] = groups[dist.get_rank()]
    return _alone[os.getpid()]


def part(*tensors):
    """The rows of a batch that are this process's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [tensor.chunk(world)[rank] for tensor in tensors]
    return parts[0] if len(parts) == 1 else parts


def same_everywhere(tensors):
    """All processes have the same, bit for bit."""
    first, *others = everywhere([tensor.detach().clone() for tensor in tensors])
    for other in others:
        assert all(map(torch.equal, first, other)), "replicas differ"
