"""What several processes log is what one would have."""

import math
from functools import partial

import pytest
from torch.nn.parallel import DistributedDataParallel

from tests.parallel import cases
from tests.parallel.ranks import alone, part, ranks


@pytest.mark.parametrize("wrap", [DistributedDataParallel])
@pytest.mark.parametrize("optimizer", ["ggn_exact", "variance_adaptive"])
@ranks()
def test_stats(optimizer, wrap):
    make = cases.OPTIMIZERS[optimizer]
    reference, model = cases.mlp().double(), cases.mlp().double()
    one = cases.train(partial(make, process_group=alone()), reference, reference, steps=5)
    several = cases.train(make, model, wrap(model), part, steps=5)
    expected, found = one.stats(), several.stats()
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[k], expected[k], rel_tol=1e-9) for k in found), (found, expected)
