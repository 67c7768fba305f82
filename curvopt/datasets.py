"""MNIST, with torch alone: local IDX files, a checked download, or scikit-learn's small digits."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import struct
import sys
import urllib.request
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from curvopt.errors import CurvoptError

_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
# SHA-256 of the uncompressed files, since mirrors may pack the same file differently.
_CHECKSUMS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_TIMEOUT = 5.0  # seconds without a byte before a mirror counts as unreachable
_REPLACE = "replace it by an intact copy, or delete it so that it can be downloaded again"


@dataclass(frozen=True)
class Digits:
    """Handwritten digits for training and testing.

    Attributes:
        train_images: float32 in [0, 1], `[N, 1, 28, 28]`.
        train_labels: int64 in 0..9, `[N]`.
        test_images: float32 in [0, 1], `[M, 1, 28, 28]`.
        test_labels: int64 in 0..9, `[M]`.
        source: Which digits they are: "MNIST" or "scikit-learn digits".
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str


def mnist(data_dir: str | os.PathLike[str] | None = None, *, download: bool = True) -> Digits:
    """Returns MNIST (60,000 training and 10,000 test images), or a small stand-in: it always runs.

    A folder that was named must hold the four IDX files, gzipped or plain. Where none was named,
    they are taken from the cache folder, downloaded into it if they are missing, and replaced by
    scikit-learn's 1,797 digits (8 x 8, enlarged to 28 x 28) if they cannot be had; one line on
    stderr then says so.

    Args:
        data_dir: Folder of the IDX files. Default: `$CURVOPT_DATA`; if that is unset, the cache
            folder `$XDG_CACHE_HOME/curvopt` or `~/.cache/curvopt`.
        download: Whether files missing from the cache folder may be downloaded. Default: True.

    Returns:
        Images and labels, on the CPU.

    Raises:
        CurvoptError: A file is missing from a named folder, or truncated, or corrupt; or neither
            MNIST nor scikit-learn is at hand.

    Example:
        >>> from curvopt.datasets import mnist
        >>> data = mnist()
        >>> data.train_images.shape[1:], len(data.train_images) == len(data.train_labels)
        (torch.Size([1, 28, 28]), True)
    """
    named = data_dir or os.environ.get("CURVOPT_DATA")
    if named:
        folder = Path(named)
        if missing := _missing(folder):
            raise CurvoptError(
                f"{folder} lacks the MNIST files {', '.join(missing)} (gzipped or plain): "
                "put them there, or name no folder to have them downloaded"
            )
        return _read_folder(folder)

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "curvopt"
    if missing := _missing(folder):
        if not download:
            return _embedded(f"{folder} does not hold it")
        try:
            _download(missing, folder)
        except OSError as error:
            return _embedded(str(error))
    return _read_folder(folder)


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Reads one IDX file of unsigned bytes.

    The format: two zero bytes, the type (8 for unsigned bytes), the rank, each size as a big-endian
    32-bit integer, then the elements in row-major order.

    Args:
        path: The file; unpacked first where its name ends in `.gz`.

    Returns:
        The elements as uint8, in the file's shape.

    Raises:
        CurvoptError: The file cannot be read, is no such IDX file, or is truncated or corrupt.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise CurvoptError(f"{path} cannot be read ({error}): {_REPLACE}") from error
    if data[:3] != b"\0\0\x08" or len(data) < 4:
        raise CurvoptError(
            f"{path} is no IDX file of unsigned bytes, which starts with 00 00 08, not with "
            f"{data[:3].hex(' ') or 'nothing'}: {_REPLACE}"
        )
    rank = data[3]
    header = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", data[4:header]) if len(data) >= header else ()
    size = header + math.prod(shape)
    if len(data) != size:
        raise CurvoptError(
            f"{path} is truncated or corrupt: {len(data)} bytes where its header announces "
            f"{size}: {_REPLACE}"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[header:].reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    """Returns the file of that name in the folder, plain or gzipped."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _missing(folder: Path) -> list[str]:
    """Returns the names of the MNIST files that the folder lacks."""
    return [name for name in _CHECKSUMS if _find(folder, name) is None]


def _read_folder(folder: Path) -> Digits:
    """Reads the four files of a folder that has them all."""
    train_images, train_labels = _read_split(folder, "train")
    test_images, test_labels = _read_split(folder, "t10k")
    return Digits(train_images, train_labels, test_images, test_labels, "MNIST")


def _read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Reads images `[N, 1, 28, 28]` and labels `[N]` and checks them against each other."""
    names = [name for name in _CHECKSUMS if name.startswith(split)]
    images_path, labels_path = (_find(folder, name) or folder / name for name in names)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28):
        raise CurvoptError(
            f"{images_path} holds shape {tuple(images.shape)}, not [N, 28, 28]: {_REPLACE}"
        )
    if labels.shape != images.shape[:1] or (labels > 9).any():
        raise CurvoptError(
            f"{labels_path} holds shape {tuple(labels.shape)}, not one label in 0..9 for each of "
            f"the {len(images)} images of {images_path}: {_REPLACE}"
        )
    return images.unsqueeze(1).float() / 255, labels.long()


def _download(names: Iterable[str], folder: Path) -> None:
    """Downloads files into a folder: each appears there whole and checked, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        packed = _fetch(name)
        partial = folder / f"{name}.{os.getpid()}.part"
        try:
            partial.write_bytes(packed)
            os.replace(partial, folder / f"{name}.gz")
        finally:
            partial.unlink(missing_ok=True)


def _fetch(name: str) -> bytes:
    """Returns the gzipped file from the first mirror that serves it intact, or raises OSError."""
    failures = []
    for mirror in _MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}/{name}.gz", timeout=_TIMEOUT) as response:
                packed: bytes = response.read()
            if hashlib.sha256(gzip.decompress(packed)).hexdigest() == _CHECKSUMS[name]:
                return packed
            failures.append(f"{mirror}: wrong SHA-256 checksum of {name}")
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {error}")
    raise OSError("; ".join(failures))


def _embedded(reason: str) -> Digits:
    """Returns scikit-learn's digits, the last fifth as the test set, and says why on stderr."""
    way_out = "to use MNIST, name the folder of its files (data_dir or $CURVOPT_DATA)"
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CurvoptError(
            f"MNIST is not at hand ({reason}), nor is scikit-learn, whose digits can stand in: "
            f"run `pip install scikit-learn`, or {way_out}"
        ) from error
    print(
        f"curvopt: MNIST is not at hand ({reason}); using scikit-learn's 1,797 digits; {way_out}",
        file=sys.stderr,
    )
    small, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    small = small.float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(small, size=(28, 28), mode="bilinear").clamp(0, 1)
    cut = len(images) * 4 // 5
    return Digits(
        images[:cut], labels[:cut].long(), images[cut:], labels[cut:].long(), "scikit-learn digits"
    )
