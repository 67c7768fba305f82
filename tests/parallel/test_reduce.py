"""What is sent in few messages, and what stands for tensors that are compared."""

import pytest
import torch

from curvopt.parallel.reduce import add_up, fingerprint, totals

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 5), (3, 4, 8)])
def test_a_fingerprint_is_of_bits_alone(shape, dtype):
    """Wherever they lie in memory."""
    tensor = torch.randint(-9, 9, shape).to(dtype)
    apart = torch.zeros(tensor.numel() + 3, dtype=dtype)
    places = [apart[k : k + tensor.numel()].view(shape) for k in range(4)]
    for place in places:
        place.copy_(tensor)
        assert fingerprint([place]) == fingerprint([tensor])
    if tensor.ndim > 1:
        assert fingerprint([tensor.mT.contiguous().mT]) == fingerprint([tensor])
    for k in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[k] += 1
        assert fingerprint([other]) != fingerprint([tensor])


def test_none_stands_for_none():
    assert fingerprint([None]) == (None,)
    assert fingerprint([]) == ()


@pytest.mark.parametrize("bucket", [16, 1 << 20])
def test_all_tensors_take_part_once(bucket, monkeypatch):
    """Of several dtypes, empty ones, and views that are not contiguous."""
    monkeypatch.setattr("curvopt.parallel.reduce.BUCKET", bucket)
    tensors = [torch.randn(3, 2).mT, torch.randn(4), torch.zeros(0, 2), torch.arange(3).double()]
    before = [t.clone() for t in tensors]
    for found, start in zip(totals(tensors, lambda flat: flat.mul_(2)), before, strict=True):
        assert torch.equal(found, 2 * start)
        assert found.is_contiguous()
    assert all(map(torch.equal, tensors, before))
    with torch.no_grad():
        again, flats = [t.detach() for t in totals(tensors, lambda flat: flat.mul_(2))], []
        both = totals(again, lambda flat: flats.append(flat.mul_(2)), spare=True)
    assert all(torch.equal(found, 4 * start) for found, start in zip(both, before, strict=True))
    given = {t.untyped_storage().data_ptr() for t in again}
    assert {flat.data_ptr() for flat in flats} <= given  # nothing was copied
    whole = [t.clone(memory_format=torch.contiguous_format) for t in before]
    add_up(whole, lambda flat: flat.mul_(2))
    assert all(torch.equal(found, 2 * start) for found, start in zip(whole, before, strict=True))
