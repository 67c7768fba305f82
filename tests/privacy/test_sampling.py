"""Poisson batches: their law, resumption, empty batches and micro-batches."""

import collections
import io
import itertools
import pickle

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import curvopt
from curvopt.errors import CurvoptError
from curvopt.privacy import EmptyBatchCollate, PoissonBatchSampler, micro_batches, sampler_kind


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def membership(num_samples, rate, steps):
    """[steps, N]: who was in which batch."""
    sampler = PoissonBatchSampler(num_samples, rate, steps=steps, generator=seeded())
    members = torch.zeros(steps, num_samples, dtype=torch.float64)
    for step, batch in enumerate(sampler):
        members[step, batch] = 1
    return members


def test_inclusions_are_independent_coins():
    samples, rate, steps = 50, 0.3, 8000
    members = membership(samples, rate, steps)
    variance = rate * (1 - rate)
    # 4.5 standard errors each, over 50 means and 1225 pairs
    assert (members.mean(0) - rate).abs().max() < 4.5 * (variance / steps) ** 0.5
    covariance = members.T.cov(correction=0)
    pairs = covariance[~torch.eye(samples, dtype=torch.bool)]
    assert pairs.abs().max() < 4.5 * variance / steps**0.5
    lagged = ((members[1:] - rate) * (members[:-1] - rate)).mean(0)
    assert lagged.abs().max() < 4.5 * variance / steps**0.5


def test_batch_sizes_are_binomial_and_some_are_empty():
    samples, rate, steps = 20, 0.1, 8000
    sizes = membership(samples, rate, steps).sum(1)
    law = torch.distributions.Binomial(samples, torch.tensor(rate, dtype=torch.float64))
    for size in range(6):
        chance = law.log_prob(torch.tensor(float(size))).exp().item()
        error = 4.5 * (chance * (1 - chance) / steps) ** 0.5
        assert abs((sizes == size).double().mean().item() - chance) < error


def test_small_rates_are_not_rounded():
    # In float32 the rate 1e-8 is drawn as 2^-24, six times as often.
    sampler = PoissonBatchSampler(1_000_000, 1e-8, steps=30, generator=seeded())
    assert sum(map(len, sampler)) < 5  # 0.3 expected, 1.8 after rounding
    assert PoissonBatchSampler(5, 1.0, steps=1).batch(0) == [0, 1, 2, 3, 4]


def test_runs_differ_unless_seeded():
    batches = [list(PoissonBatchSampler(100, 0.5, generator=g)) for g in (None, None)]
    assert batches[0] != batches[1]
    repeated = [list(PoissonBatchSampler(100, 0.5, generator=seeded(3))) for _ in range(2)]
    assert repeated[0] == repeated[1]


def test_the_global_seed_neither_matters_nor_moves():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampler = PoissonBatchSampler(100, 0.5)
    first = list(sampler)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(PoissonBatchSampler(100, 0.5)) != first
    assert list(sampler) != first  # the next epoch


def test_expected_batch_size_and_length():
    sampler = PoissonBatchSampler(range(600), expected_batch_size=30)
    assert (sampler.sample_rate, len(sampler), sampler.expected_batch_size) == (0.05, 20, 30)
    assert len(list(sampler)) == 20
    assert sampler.step == 20


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 3, 10, 14])
def test_resumed_batches_are_the_same(stop):
    def fresh(generator=None):
        return PoissonBatchSampler(50, 0.2, steps=10, generator=generator)

    def run(sampler, count):
        batches = []
        while len(batches) < count:
            for batch in sampler:
                batches.append(batch)
                if len(batches) == count:
                    break
        return batches

    whole = run(fresh(seeded()), 25)
    first = fresh(seeded())
    assert run(first, stop) == whole[:stop]
    second = fresh()
    second.load_state_dict(saved(first.state_dict()))
    assert run(second, 25 - stop) == whole[stop:]


def test_resumes_exactly_behind_a_prefetching_loader():
    data = TensorDataset(torch.arange(40))

    def loader(sampler, workers):
        collate = EmptyBatchCollate(data)
        return DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers)

    sampler = PoissonBatchSampler(data, 0.1, steps=12, generator=seeded())
    whole = [x.tolist() for (x,) in loader(sampler, 0)]
    sampler = PoissonBatchSampler(data, 0.1, steps=12, generator=seeded())
    batches = iter(loader(sampler, 1))
    trained = [next(batches)[0].tolist() for _ in range(5)]
    assert sampler.step > 5  # the loader asked for more than was used
    state = saved(sampler.state_dict(step=5))
    del batches
    resumed = PoissonBatchSampler(data, 0.1, steps=12)
    resumed.load_state_dict(state)
    assert trained + [x.tolist() for (x,) in loader(resumed, 0)] == whole


def test_ranks_share_a_logical_batch_without_overlap():
    ranks = [
        PoissonBatchSampler(103, 0.4, generator=seeded(), rank=r, num_replicas=3) for r in range(3)
    ]
    parts = [sampler.batch(7) for sampler in ranks]
    assert sorted(itertools.chain(*parts)) == PoissonBatchSampler(
        103, 0.4, generator=seeded()
    ).batch(7)
    assert all(i % 3 == r for r, part in enumerate(parts) for i in part)


def test_empty_batches_have_the_right_shape():
    data = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4), torch.zeros(4))
    sampler = PoissonBatchSampler(data, 1e-9, steps=3)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=EmptyBatchCollate(data))
    batches = list(loader)
    assert len(batches) == 3
    for images, labels, rest in batches:
        assert (images.shape, images.dtype) == ((0, 3, 8, 8), torch.float32)
        assert (labels.shape, labels.dtype) == ((0,), torch.int64)
        assert rest.shape == (0,)
    images = torch.zeros(0, 3, 8, 8)
    assert torch.nn.Conv2d(3, 2, 3)(images).shape == (0, 2, 6, 6)


Pair = collections.namedtuple("Pair", "x y")


def test_micro_batches_cut_whatever_a_loader_gives():
    data = [
        {"ids": torch.tensor([i, i]), "text": str(i), "pair": Pair(i, [i, -i])} for i in range(5)
    ]
    collate = EmptyBatchCollate(data)
    parts = list(micro_batches(collate(data), 2))
    assert [len(part["ids"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["ids"] for part in parts]), collate(data)["ids"])
    assert [part["text"] for part in parts] == [["0", "1"], ["2", "3"], ["4"]]
    assert parts[1]["pair"].x.tolist() == [2, 3]
    assert parts[1]["pair"].y[1].tolist() == [-2, -3]
    (empty,) = micro_batches(collate([]), 2)
    assert (empty["ids"].shape, empty["text"], empty["pair"].x.shape) == ((0, 2), [], (0,))


def test_micro_batches_keep_the_type_of_a_mapping():
    class Encoding(collections.UserDict):
        pass

    batch = Encoding(input_ids=torch.arange(3), count=torch.tensor(3))
    first, second = micro_batches(batch, 2)
    assert type(first) is Encoding
    assert (first["input_ids"].tolist(), second["input_ids"].tolist()) == ([0, 1], [2])
    assert batch["input_ids"].tolist() == [0, 1, 2]
    assert second["count"] == 3


def test_kinds_of_samplers():
    data = TensorDataset(torch.zeros(10))

    def kind(**options):
        return sampler_kind(DataLoader(data, **options))

    assert kind(batch_sampler=PoissonBatchSampler(data, 0.1)) == "poisson"
    assert kind(batch_size=2, shuffle=True) == "shuffle"
    assert kind(batch_size=2) == "shuffle"
    assert kind(batch_size=2, sampler=SubsetRandomSampler([1, 4, 7])) == "shuffle"
    assert kind(batch_sampler=PoissonBatchSampler(data, 0.1).in_parts(3)) == "poisson"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class Homemade(Sampler):
    def __len__(self):
        return 10

    def __iter__(self):
        return iter([0] * 10)


TEN = TensorDataset(torch.zeros(10))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (TEN, {"sampler": RandomSampler(TEN, replacement=True)}, "RandomSampler: .*several times"),
        (TEN, {"sampler": RandomSampler(TEN, num_samples=20)}, "RandomSampler: it draws 20 of 10"),
        (TEN, {"sampler": WeightedRandomSampler([1.0] * 10, 10)}, "WeightedRandomSampler: it may"),
        (
            TEN,
            {"sampler": WeightedRandomSampler([1.0] * 10, 10, replacement=False)},
            "WeightedRandomSampler: .*more often",
        ),
        (TEN, {"sampler": SubsetRandomSampler([1, 1])}, "SubsetRandomSampler: it holds an index"),
        (
            TEN,
            {"sampler": DistributedSampler(TEN, num_replicas=3, rank=0)},
            "DistributedSampler: it repeats samples to fill up, or drops some",
        ),
        (TEN, {"sampler": Homemade()}, "Homemade: nothing is known of what it draws"),
        (TEN, {"batch_sampler": [[0, 0], [1]]}, "list: nothing is known of what it draws"),
        (TEN, {"batch_size": None}, "SequentialSampler: the loader makes no batches"),
        (Stream(), {"batch_size": 2}, "Stream: an iterable data set draws its samples itself"),
        (Subset(TEN, [0, 1, 0]), {"batch_size": 2, "shuffle": True}, "Subset: it holds an index"),
        (ConcatDataset([TEN, TEN]), {"batch_size": 2}, "ConcatDataset: it holds a data set twice"),
        (
            Subset(TEN, [3, 3]),
            {"batch_sampler": PoissonBatchSampler(2, 0.5)},
            "Subset: it holds an index twice",
        ),
    ],
)
def test_loaders_that_may_draw_a_sample_twice_are_refused_by_name(data, options, message):
    """Up to 16 copies of a sample in a batch passed as no sampling: epsilon 6.3 for 469."""
    loader = DataLoader(data, **options)
    with pytest.raises(CurvoptError, match=f"Invalid sampling: {message}"):
        sampler_kind(loader)
    with pytest.raises(CurvoptError, match="Draw batches with curvopt.privacy.PoissonBatchSampler"):
        curvopt.DPSGD(
            [torch.nn.Parameter(torch.zeros(2))], 0.1, noise_multiplier=1.0, max_grad_norm=1.0,
            expected_batch_size=2, sampler=loader,
        )  # fmt: skip


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_parts_make_up_the_logical_batches(parts):
    whole = list(PoissonBatchSampler(60, 0.1, generator=seeded()))
    sampler = PoissonBatchSampler(60, 0.1, generator=seeded()).in_parts(parts)
    assert len(sampler) == parts * len(whole)
    found = list(sampler)
    joined = [list(itertools.chain(*found[k : k + parts])) for k in range(0, len(found), parts)]
    assert joined == whole
    sizes = [len(part) for part in found[:parts]]
    assert max(sizes) - min(sizes) <= 1
    assert (sampler.sample_rate, sampler.num_samples, sampler.step) == (0.1, 60, 10)
    twin = pickle.loads(pickle.dumps(sampler))
    assert list(twin) == list(sampler)


def test_a_state_that_is_put_back_does_not_draw_the_same_batches_again():
    """Two steps on one draw are not what is accounted."""
    sampler = PoissonBatchSampler(50, 0.2, steps=10, generator=seeded())
    state = sampler.state_dict(step=4)
    first = list(sampler)
    for _ in range(3):
        sampler.load_state_dict(state)
        again = list(sampler)
        assert len(again) == 6
        assert not any(batch in first for batch in again)
        first += again


def test_wrappers_that_share_out_batches_are_told():
    """They ask for the size of a batch, and would hand each process some of the batches."""
    with pytest.raises(CurvoptError, match=r"no fixed size.*keep its loader out of accelerator"):
        _ = PoissonBatchSampler(10, 0.1).batch_size


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: PoissonBatchSampler(0, 0.1), "Invalid number of samples: 0"),
        (lambda: PoissonBatchSampler(10, 0.0), "Invalid sample rate: 0.0"),
        (lambda: PoissonBatchSampler(10, expected_batch_size=11), "Invalid sample rate: 1.1"),
        (lambda: PoissonBatchSampler(10), "give either sample_rate or expected_batch_size"),
        (lambda: PoissonBatchSampler(10, 0.1, expected_batch_size=1), "give either sample_rate or"),
        (lambda: PoissonBatchSampler(10, 0.1, steps=0), "Invalid number of steps: 0"),
        (lambda: PoissonBatchSampler(10, 0.1, rank=2, num_replicas=2), "Invalid rank: 2"),
        (lambda: list(micro_batches(torch.zeros(3), 0)), "Invalid physical batch size: 0"),
        (lambda: list(micro_batches(["a"], 1)), "Invalid batch: list"),
    ],
)
def test_bad_values_are_refused(wrong, message):
    with pytest.raises(CurvoptError, match=message):
        wrong()


def test_a_state_of_another_sampling_is_refused():
    sampler = PoissonBatchSampler(10, 0.1)
    with pytest.raises(CurvoptError, match=r"Invalid sample_rate in the state: 0.2 \(is 0.1\)"):
        sampler.load_state_dict(PoissonBatchSampler(10, 0.2, steps=10).state_dict())
