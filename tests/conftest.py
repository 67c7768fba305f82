"""One thread, one seed per test, and Hypothesis without surprises."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the suite runs with `pytest -n`: one process per core

common = {"derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=100, **common)
settings.register_profile("thorough", max_examples=3000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure(config):
    """What torch says about a kernel of even length with `padding="same"` is no news here."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same':UserWarning")


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
