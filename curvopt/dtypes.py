"""Types of numbers."""

from __future__ import annotations

from functools import cache

import torch


@cache
def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type that sums, squares and states are kept in: half precision would lose them."""
    return torch.promote_types(dtype, torch.float32)
