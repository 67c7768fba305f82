"""One logical batch over several processes: the same sum as in one, noise once."""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, TensorDataset

import curvopt
from curvopt.privacy import PoissonBatchSampler, QuantileClipping
from tests.oracles import assert_close

WORLD = 2
SIZES = [(5, 3), (0, 8), (4, 0), (0, 0)]  # of the processes' batches, step by step
SIGMA, CLIP, EXPECTED = 2.0, 0.5, 6


def setup(seed=0, width=16, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": EXPECTED}
    return model, curvopt.DPSGD(model.parameters(), 0.1, **{**settings, **options})


def quantile():
    return QuantileClipping(CLIP, expected_batch_size=EXPECTED, count_noise_multiplier=3.0)


def train(model, opt, rank=None):
    """Steps on the part of a rank, or on all of the samples."""
    generator = torch.Generator().manual_seed(1)
    for sizes in SIZES:
        x = torch.randn(sum(sizes), 4, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (sum(sizes),), generator=generator)
        if rank is not None:
            x, y = x.split(sizes)[rank], y.split(sizes)[rank]
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return {
        "params": [p.detach().clone() for p in model.parameters()],
        "norms": opt.norms,
        "steps": opt.ledger.steps,
        "clip": getattr(opt.max_grad_norm, "max_grad_norm", opt.max_grad_norm),
    }


def noise(rank):
    """What a step without samples leaves in ``p.grad``."""
    generator = torch.Generator().manual_seed(10 + rank)
    model, opt = setup(width=4000, noise_multiplier=SIGMA, generator=generator)
    x, y = torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    opt.step(lambda: F.cross_entropy(model(x), y))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def refused(start):
    """The message of an error."""
    try:
        start()
    except (curvopt.CurvoptError, RuntimeError) as error:
        return str(error)


def fails_on_one(rank):
    """A step that only the second process cannot take, and one that both can."""
    model, opt = setup()
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)

    def closure():
        if rank == 1:
            raise RuntimeError("out of data")
        return F.cross_entropy(model(x), y)

    message = refused(lambda: opt.step(closure))
    opt.zero_grad()
    opt.step(lambda: F.cross_entropy(model(x), y))
    return message, opt.ledger.steps


def convolution(rank=None, noise=0.0):
    """An empty batch on one process, and parameters whose memory is in another order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)).double()
    if rank is not None:
        model = model.to(memory_format=torch.channels_last)
    settings = {"noise_multiplier": noise, "max_grad_norm": CLIP, "expected_batch_size": EXPECTED}
    opt = curvopt.DPSGD(model.parameters(), 0.1, **settings)
    for owner in (0, 1):
        count = 2 if rank in (None, owner) else 0
        x = torch.randn(2, 2, 3, 3, dtype=torch.float64)[:count]
        y = torch.zeros(count, dtype=torch.int64)
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return [p.detach().clone() for p in model.parameters()]


def refusals(rank):
    """What processes must agree on."""
    sampler = PoissonBatchSampler(100, expected_batch_size=EXPECTED)
    loader = DataLoader(TensorDataset(torch.zeros(8, 4)), batch_size=2, shuffle=True)
    return {
        "start": refused(lambda: train(*setup(seed=rank), rank)),
        "norm": refused(lambda: train(*setup(max_grad_norm=1.0 + rank), rank)),
        "sampler": refused(lambda: setup(sampler=sampler)),
        "loader": refused(lambda: setup(sampler=loader)),
    }


def work(rank, folder):
    torch.set_num_threads(1)
    early = setup()
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    generator = torch.Generator().manual_seed(10 + rank)  # every process has one of its own
    results = {
        "exact": train(*setup(), rank),
        "noisy": train(*setup(noise_multiplier=SIGMA, generator=generator), rank),
        "quantile": train(
            *setup(noise_multiplier=1.0, max_grad_norm=quantile(), generator=generator), rank
        ),
        "noise": noise(rank),
        "refused": refusals(rank),
        "failure": fails_on_one(rank),
        "channels_last": convolution(rank),
        "channels_last, noisy": convolution(rank, noise=1.0),
        "early": refused(lambda: train(*early, rank)),
        "state": setup(noise_multiplier=1.0)[1].state_dict(),
    }
    torch.save(results, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and do not survive Python's teardown


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each process."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), WORLD)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(WORLD)]


def test_it_is_one_logical_batch(ranks):
    alone = train(*setup())
    for result in ranks:
        for mine, p in zip(result["exact"]["params"], alone["params"], strict=True):
            assert_close(mine, p, 1e-12)
        assert_close(result["exact"]["norms"], alone["norms"], 1e-12)
        assert result["exact"]["steps"] == alone["steps"] == len(SIZES)


@pytest.mark.parametrize("kind", ["exact", "noisy", "quantile"])
def test_the_processes_agree_bit_for_bit(ranks, kind):
    first, second = (result[kind] for result in ranks)
    assert all(map(torch.equal, first["params"], second["params"]))
    assert first["clip"] == second["clip"]


def test_noise_is_added_once(ranks):
    first, second = (result["noise"] for result in ranks)
    assert torch.equal(first, second)
    expected = SIGMA * CLIP / EXPECTED
    error = 5 / math.sqrt(2 * len(first))  # standard errors of a standard deviation
    assert abs(float(first.std()) / expected - 1) < error


def test_memory_format_and_empty_batches(ranks):
    for result in ranks:
        for mine, alone in zip(result["channels_last"], convolution(), strict=True):
            assert_close(mine, alone, 1e-12)
    first, second = (result["channels_last, noisy"] for result in ranks)
    assert all(map(torch.equal, first, second))


def test_a_step_that_fails_on_one_process_fails_on_all(ranks):
    messages, steps = zip(*(result["failure"] for result in ranks), strict=True)
    assert "failed on process 1" in messages[0]
    assert messages[1] == "out of data"
    assert steps == (1, 1)


def test_processes_that_differ_are_refused(ranks):
    for rank, result in enumerate(ranks):
        messages = result["refused"]
        assert "differ in the parameters" in messages["start"]
        assert "differ in max_grad_norm: [1.0, 2.0]" in messages["norm"]
        assert f"this is process {rank} of 2" in messages["sampler"]
        assert "after this optimizer was built" in result["early"]
        assert "nothing shows that this loader keeps to its own samples" in messages["loader"]


def test_the_state_to_load_is_that_of_the_first_process(ranks):
    _, opt = setup(noise_multiplier=1.0)
    opt.load_state_dict(ranks[0]["state"])
    with pytest.raises(curvopt.CurvoptError, match="the one that the first process saved"):
        opt.load_state_dict(ranks[1]["state"])
