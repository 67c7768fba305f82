"""Gaussian noise from a generator of its own."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from curvopt.dtypes import at_least_float32
from curvopt.privacy.checks import require


def generator_from_key(key: bytes, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that uses every bit of ``key``.

    ``manual_seed`` keeps 32 bits of a CPU seed, so that four billion trials would find the noise of
    a published model. Here the whole state of the Mersenne twister comes from the key.
    """
    generator = torch.Generator(device)
    if generator.device.type != "cpu":
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        return generator.manual_seed(seed >> 1)
    generator.manual_seed(0)
    state = generator.get_state()  # 24 bytes of counters, 624 words of 32 bits in 64 each, a cache
    words = torch.frombuffer(bytearray(hashlib.shake_256(key).digest(4 * 624)), dtype=torch.int32)
    state[24 : 24 + 8 * 624].view(torch.int64).copy_(words.long() & 0xFFFFFFFF)
    return generator.set_state(state)


def key_from(generator: torch.Generator | None) -> bytes:
    """32 secret bytes: the operating system's, or drawn from ``generator`` to repeat a run."""
    if generator is None:
        return secrets.token_bytes(32)
    draws = torch.randint(256, (32,), generator=generator, device=generator.device)
    return bytes(draws.tolist())


def gaussian_noise(
    like: Tensor | Sequence[int],
    std: float,
    *,
    generator: torch.Generator | None = None,
    secure: bool = False,
) -> Tensor:
    r"""Draw :math:`N(0, \mathrm{std}^2 I)`, in float32 at least.

    Args:
        like: A tensor whose shape, device and dtype the noise gets (half precisions become
            float32, for a rounded noise is not Gaussian), or a shape (float32).
        std: Standard deviation, for DP-SGD :math:`\sigma C`: noise multiplier times clipping norm.
        generator: Where the randomness comes from, on the device of ``like``. Default: a fresh one,
            seeded by the operating system.
        secure: Add four float64 draws and halve the sum, which has the same distribution. A single
            floating-point draw can give away by its last bits what it was added to, and in float32
            it never goes beyond 5.8 standard deviations; recovering the four is exponentially
            harder. Add it *before* rounding to float32. Costs at least four times the drawing,
            hence off by default.

    Returns:
        A new tensor of the shape of ``like``; float64 if ``secure``.

    Raises:
        CurvoptError: ``std`` is negative or not finite.

    Example:
        >>> from curvopt.privacy import gaussian_noise
        >>> gaussian_noise(torch.zeros(2, 3), std=0.5).shape
        torch.Size([2, 3])

    References:
        Holohan and Braghin 2021, Secure random sampling in differential privacy, arXiv 2107.10138.
    """
    require(0 <= std < math.inf, "noise standard deviation", std, "must be finite and at least 0")
    if not isinstance(like, Tensor):
        like = torch.empty(tuple(like), device=generator.device if generator else "cpu")
    if generator is None:
        generator = generator_from_key(key_from(None), like.device)
    noise = torch.empty(like.shape, dtype=noise_dtype(like, secure), device=like.device)
    return _fill(noise, std, generator, secure)


def noise_dtype(like: Tensor, secure: bool) -> torch.dtype:
    """The dtype of the noise for a tensor."""
    return torch.float64 if secure else at_least_float32(like.dtype)


def _fill(noise: Tensor, std: float, generator: torch.Generator, secure: bool) -> Tensor:
    if not secure:
        return noise.normal_(0, std, generator=generator)
    noise.normal_(0, std / 2, generator=generator)
    for _ in range(3):
        noise += torch.empty_like(noise).normal_(0, std / 2, generator=generator)
    return noise


# On a CPU the noise of a step comes from this many streams, each in a thread where threads are to
# be had: fixed, so that the noise does not depend on them. They take turns with pieces that stay in
# the cache.
STREAMS, PIECE = 4, 1 << 16

# Name of the key and the count of draws, where each process draws for a part of the parameters.
PARTS = "parts"


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(STREAMS, "curvopt-noise")


class GaussianNoise:
    """The noise of one run: a generator per device, saved with the run and never reseeded.

    Nothing else draws from these generators, so neither the order of the data nor the global seed
    can repeat a noise vector. A restored state goes on where the saved one stopped. Restore it
    together with the data sampler: going on twice from one checkpoint with *different* batches
    would add the same noise to both, and their difference would then have none.

    Args:
        generator: Makes a run repeatable: used as it is on its own device, and to seed the
            generators of other devices.
            Default: the operating system's randomness. ``manual_seed`` has 32 bits on the CPU,
            which can be searched through: for a model to be published, keep the default.
        secure: See :func:`gaussian_noise`.

    Example:
        >>> from curvopt.privacy import GaussianNoise
        >>> noise = GaussianNoise(torch.Generator().manual_seed(0))
        >>> saved = noise.state_dict()
        >>> first = noise(torch.zeros(4), std=1.0)
        >>> noise.load_state_dict(saved)
        >>> bool((noise(torch.zeros(4), std=1.0) == first).all())
        True
    """

    def __init__(self, generator: torch.Generator | None = None, *, secure: bool = False) -> None:
        self.secure = secure
        self._source = generator
        self._key: bytes | None = None  # of what processes draw, each for its own part
        self._draws = 0
        self._shared = self._derives = False
        self._generators = {} if generator is None else {str(generator.device): generator}

    def __call__(self, like: Tensor, std: float) -> Tensor:
        """Draw noise of the shape and device of ``like``; see :func:`gaussian_noise`."""
        return gaussian_noise(like, std, generator=self._stream(like.device), secure=self.secure)

    def add_to(self, totals: Sequence[Tensor], std: float, size: float) -> None:
        r"""Turn sums into :math:`(\mathrm{sum} + N(0, \mathrm{std}^2)) / \mathrm{size}`, in place.

        The sum is rounded to its dtype after the noise was added.

        Args:
            totals: Contiguous tensors, float32 at least.
            std: Standard deviation of the noise.
            size: What to divide by.

        Raises:
            CurvoptError: ``std`` is negative or not finite.
        """
        require(0 <= std < math.inf, "noise standard deviation", std, "must be finite and >= 0")
        pieces: dict[tuple[torch.device, int], list[Tensor]] = {}
        turn = 0
        for total in totals:
            on_cpu = total.device.type == "cpu"
            for piece in total.view(-1).split(PIECE if on_cpu else max(1, total.numel())):
                pieces.setdefault((total.device, turn % STREAMS if on_cpu else 0), []).append(piece)
                turn += 1
        streams = [self._stream(device, index) for device, index in pieces]

        def work(mine: list[Tensor], stream: torch.Generator) -> None:
            scratch = None  # one for all pieces: it stays in the cache
            for piece in mine:
                dtype = noise_dtype(piece, self.secure)
                if scratch is None or len(scratch) < len(piece) or scratch.dtype != dtype:
                    scratch = piece.new_empty(len(piece), dtype=dtype)
                noise = _fill(scratch[: len(piece)], std / size, stream, self.secure)
                torch.add(noise, piece, alpha=1 / size, out=piece)

        if torch.get_num_threads() > 1 and sum(map(torch.Tensor.numel, totals)) > PIECE:
            list(_threads().map(work, pieces.values(), streams))
        else:
            list(map(work, pieces.values(), streams))

    def share(self, agree: Callable[[Any], Any]) -> None:
        """Have a key that all processes share, from which each draws for its part of a tensor.

        Args:
            agree: gives the first process's value to all.
        """
        if not self._shared:
            mine = key_from(self._source) if self._key is None else self._key, self._draws
            (self._key, self._draws), self._shared = agree(mine), True

    def part(self, number: int) -> GaussianNoise:
        """The next noise of one of the processes that `share` a key, each by its number.

        The streams of two numbers, and of two calls, have nothing in common. As they follow from
        the key and the count of calls, they are saved with these.
        """
        assert self._key is not None
        name = b"%b/%d/%d" % (self._key, self._draws, number)
        self._draws += 1
        made = GaussianNoise(secure=self.secure)
        made._key = hashlib.sha256(name).digest()
        made._derives = True
        return made

    def _stream(self, device: torch.device, index: int = 0) -> torch.Generator:
        name = f"{device}/{index}" if index else str(device)
        if name not in self._generators:
            if self._derives and self._key is not None:
                key = hashlib.sha256(self._key + name.encode()).digest()
            else:
                key = key_from(self._source)
            self._generators[name] = generator_from_key(key, device)
        return self._generators[name]

    def __deepcopy__(self, memo: Any) -> GaussianNoise:
        """Noise of its own, unless a generator was given: two runs must not share any."""
        return GaussianNoise(copy.deepcopy(self._source, memo), secure=self.secure)

    def shared(self) -> dict[str, Any] | None:
        """The part of the state that all processes have; None where each draws for the whole."""
        if self._key is None:
            return None
        numbers = [*self._key, *self._draws.to_bytes(8, "little")]
        return {PARTS: torch.tensor(numbers, dtype=torch.uint8, device="cpu")}

    def state_dict(self) -> dict[str, Any]:
        """The state of each generator by device and stream: it is as secret as the data."""
        state = {name: generator.get_state() for name, generator in self._generators.items()}
        return state | (self.shared() or {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for name, saved in state.items():
            if name == PARTS:
                numbers = bytes(saved.tolist())
                self._key, self._draws = numbers[:32], int.from_bytes(numbers[32:], "little")
                self._shared = False
                continue
            generator = self._generators.setdefault(name, torch.Generator(name.split("/")[0]))
            generator.set_state(saved.cpu())
