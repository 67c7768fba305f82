"""How each tutorial ends: its numbers next to plain autograd's."""

from torch import Tensor


def agree(what: str, ours: Tensor, truth: Tensor, bound: float = 1e-9) -> None:
    """Prints the largest error, relative to the largest number; raises if it is off."""
    error = (ours - truth).abs().max().item() / max(truth.abs().max().item(), 1e-12)
    print(f"{what}: largest error against autograd {error:.1e}")
    if not error <= bound:
        raise SystemExit(f"{what} is off: {error:.1e} > {bound:.0e}")
