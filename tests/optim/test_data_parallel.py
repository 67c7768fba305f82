"""One logical batch over several processes: the same sum as in one, noise once."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn

import curvopt
from curvopt.privacy import QuantileClipping
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


def different_weights(rank):
    model, opt = setup(seed=rank)
    try:
        train(model, opt, rank)
    except curvopt.CurvoptError as error:
        return str(error)


def work(rank, folder):
    torch.set_num_threads(1)
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
        "refused": different_weights(rank),
    }
    torch.save(results, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


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


def test_processes_that_start_from_different_weights_are_refused(ranks):
    assert all("start from different parameters" in result["refused"] for result in ranks)
