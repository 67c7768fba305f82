"""Tensors of all processes joined, few messages at a time; and fingerprints to compare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Bytes that go in one message, as in DistributedDataParallel.
BUCKET = 25 << 20

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def add_up(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """Run a collective on contiguous tensors, in place; small ones share a message.

    Args:
        tensors: of any dtypes and devices, in the same order on all processes.
        collective: works in place on one flat tensor.
    """
    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            collective(bucket[0].view(-1))
            continue
        flat = torch.cat([tensor.view(-1) for tensor in bucket])
        collective(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [p.view_as(t) for p, t in zip(parts, bucket, strict=True)])


def totals(
    tensors: Sequence[Tensor], collective: Callable[[Tensor], Any], *, spare: bool = False
) -> list[Tensor]:
    """The same on copies, which are returned; those that share a message share their memory.

    Args:
        tensors: as in `add_up`, contiguous or not.
        collective: as there.
        spare: the tensors may be overwritten, which saves a copy of what was returned before.
    """
    found: dict[int, Tensor] = {}
    for bucket in _buckets(tensors):
        flat = _shared(bucket) if spare else None
        if flat is None:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        collective(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        found |= {id(t): p.view(t.shape) for p, t in zip(parts, bucket, strict=True)}
    return [found[id(t)] if t.numel() else t.clone() for t in tensors]


def _shared(bucket: list[Tensor]) -> Tensor | None:
    """The flat tensor of which these are the parts, one after the other; None if there is none."""
    first, end = bucket[0], 0
    storage = first.untyped_storage()
    for tensor in bucket:
        same = tensor.untyped_storage().data_ptr() == storage.data_ptr()
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == end):
            return None
        end += tensor.numel()
    whole = storage.nbytes() == end * first.element_size()
    return first.as_strided((end,), (1,), 0) if whole else None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel():
            kinds[tensor.dtype, tensor.device].append(tensor)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _words(tensor: Tensor) -> Tensor:
    """The sum of words of eight bytes, the fastest to add, and of what is left over."""
    flat = tensor.contiguous().view(-1)
    size = flat.element_size()
    if size > 8:  # complex numbers
        return _words(torch.view_as_real(flat))
    if flat.data_ptr() % 8 or flat.storage_offset() * size % 8:
        flat = flat.clone()
    length = len(flat) - len(flat) % (8 // size)
    rest = flat[length:].view(_WHOLE[size]).sum(dtype=torch.int64)
    return flat[:length].view(torch.int64).sum() + rest


def fingerprint(tensors: Iterable[Tensor | None]) -> tuple[int | None, ...]:
    """Numbers that are equal for equal bits, on every device; None for None.

    Each is the sum of a tensor's words as integers, which no order of adding can change.
    """
    given = list(tensors)
    words = [_words(t.detach()) for t in given if t is not None]
    # Fetched from their device at once.
    numbers = iter(torch.stack([w.to(words[0].device) for w in words]).tolist() if words else [])
    return tuple(None if t is None else next(numbers) for t in given)
