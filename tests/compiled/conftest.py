"""What was captured holds models and optimizers, until Dynamo forgets it."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def forgotten():
    yield
    torch._dynamo.reset()
    gc.collect()
