"""Values made of parameters that may hold a part for every sample: initial states."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def of_samples(value: Tensor) -> Tensor:
    """The value itself: recorded, what happens to it afterwards is the samples' own business."""
    if has_torch_function((value,)):
        return handle_torch_function(of_samples, (value,), value)
    return value
