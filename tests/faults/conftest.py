"""Double precision throughout: what is judged is the method, not the rounding."""

import pytest
import torch


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
