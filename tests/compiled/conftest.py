"""What was captured holds models and optimizers, until Dynamo forgets it."""

import gc

import pytest
import torch

from tests.armed import rest_all


@pytest.fixture(autouse=True)
def forgotten():
    rest_all()
    yield
    torch._dynamo.reset()
    gc.collect()
