import builtins
import gzip
import hashlib
import io
import struct
import urllib.error
import urllib.request

import pytest
import torch

from curvopt import datasets
from curvopt.errors import CurvoptError

SIZES = {"train": 6, "t10k": 4}


def idx(values):
    """The bytes of an IDX file of unsigned bytes."""
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + bytes(values.flatten().tolist())


def tiny_mnist():
    """The contents of MNIST's four files, with a few random images: `{name: bytes}`."""
    draw = torch.Generator().manual_seed(0)
    files = {}
    for split, n in SIZES.items():
        images = torch.randint(256, (n, 28, 28), generator=draw)
        files[f"{split}-images-idx3-ubyte"] = idx(images)
        files[f"{split}-labels-idx1-ubyte"] = idx(torch.randint(10, (n,), generator=draw))
    return files


def write_mnist(folder, packed=True):
    """Writes tiny MNIST files and returns their folder."""
    for name, data in tiny_mnist().items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder of the test's own, and no network."""

    def no_network(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.delenv("CURVOPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path / "cache" / "curvopt"


@pytest.fixture
def mirror(monkeypatch):
    """A mirror that serves what the returned dictionary holds; the checksums are those of now."""
    files = {name: gzip.compress(data) for name, data in tiny_mnist().items()}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in tiny_mnist().items()}
    monkeypatch.setattr(datasets, "_CHECKSUMS", sums)

    def serve(url, timeout):
        assert timeout <= 10
        return io.BytesIO(files[url.rsplit("/", 1)[1].removesuffix(".gz")])

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    return files


@pytest.mark.parametrize("name", ["x", "x.gz"])
@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3, 4), (3, 0, 2)])
def test_idx_round_trip(tmp_path, name, shape):
    values = torch.randint(256, shape)
    data = idx(values)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    read = datasets.read_idx(tmp_path / name)
    assert read.dtype == torch.uint8
    torch.testing.assert_close(read.long(), values)


GOOD = idx(torch.arange(12).view(3, 4))
CORRUPT = bytearray(gzip.compress(GOOD))
CORRUPT[15] ^= 255


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", b"", "no IDX file .* nothing"),
        ("other", b"<html></html>", "no IDX file .* 3c 68 74"),
        ("floats", b"\0\0\x0d" + GOOD[3:], "no IDX file .* 00 00 0d"),
        ("header-cut", GOOD[:9], "truncated or corrupt"),
        ("cut", GOOD[:-1], "truncated or corrupt: 23 bytes .* 24"),
        ("longer", GOOD + b"\0", "truncated or corrupt: 25 bytes .* 24"),
        ("cut.gz", gzip.compress(GOOD)[:-9], "cannot be read"),
        ("corrupt.gz", bytes(CORRUPT), "cannot be read"),
        ("plain.gz", GOOD, "cannot be read"),
        ("missing", None, "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_are_named_with_a_way_out(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CurvoptError, match=f"{name} .*{message}.*replace it"):
        datasets.read_idx(tmp_path / name)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_named_folder(tmp_path, monkeypatch, packed, how):
    write_mnist(tmp_path, packed)
    if how == "environment":
        monkeypatch.setenv("CURVOPT_DATA", str(tmp_path))
    data = datasets.mnist(tmp_path if how == "argument" else None)
    assert data.train_images.shape == (6, 1, 28, 28)
    assert data.test_images.shape == (4, 1, 28, 28)
    assert data.train_images.dtype == torch.float32
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.source == "MNIST"
    pixels = tiny_mnist()["t10k-images-idx3-ubyte"][16:]
    assert (data.test_images * 255).round().flatten().tolist() == list(pixels)
    assert data.test_labels.tolist() == list(tiny_mnist()["t10k-labels-idx1-ubyte"][8:])


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_named_folder_that_lacks_files_is_an_error(tmp_path, monkeypatch, mirror, how):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    monkeypatch.setenv("CURVOPT_DATA", str(tmp_path if how == "environment" else "elsewhere"))
    with pytest.raises(CurvoptError, match=r"lacks the MNIST files t10k-labels-idx1-ubyte \("):
        datasets.mnist(tmp_path if how == "argument" else None)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("train-images-idx3-ubyte", torch.zeros(6, 27, 28), r"\(6, 27, 28\), not \[N, 28, 28\]"),
        ("train-images-idx3-ubyte", torch.zeros(6), r"\(6,\), not \[N, 28, 28\]"),
        ("train-labels-idx1-ubyte", torch.zeros(5), r"\(5,\), not one label .* the 6 images"),
        ("t10k-labels-idx1-ubyte", torch.full((4,), 10), r"in 0\.\.9"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, name, values, message):
    write_mnist(tmp_path, packed=False)
    (tmp_path / name).write_bytes(idx(values.int()))
    with pytest.raises(CurvoptError, match=f"{name} .*{message}"):
        datasets.mnist(tmp_path)


def test_download_fills_the_cache_once(cache, mirror):
    first = datasets.mnist()
    assert sorted(p.name for p in cache.iterdir()) == sorted(f"{name}.gz" for name in mirror)
    mirror.clear()  # whatever is fetched from now on fails
    assert torch.equal(datasets.mnist(download=False).train_images, first.train_images)
    assert torch.equal(datasets.mnist().train_images, first.train_images)


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        (gzip.compress(GOOD), "wrong SHA-256 checksum"),
        (gzip.compress(GOOD)[:-9], "end-of-stream"),
        (b"<html>please log in</html>", "Not a gzipped file"),
    ],
    ids=["other-file", "cut", "no-gzip"],
)
def test_bad_download_leaves_no_file(cache, mirror, capsys, served, reason):
    mirror["t10k-images-idx3-ubyte"] = served
    assert datasets.mnist().source == "scikit-learn digits"
    assert reason in capsys.readouterr().err
    left = sorted(p.name for p in cache.iterdir())
    assert left == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]  # those before it


def test_interrupted_write_leaves_no_file(cache, mirror, monkeypatch):
    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(datasets.os, "replace", full)
    assert datasets.mnist().source == "scikit-learn digits"
    assert list(cache.iterdir()) == []


def test_second_mirror(cache, mirror, monkeypatch):
    serve = urllib.request.urlopen

    def first_mirror_is_down(url, timeout):
        if url.startswith(datasets._MIRRORS[0]):
            raise TimeoutError("timed out")
        return serve(url, timeout)

    monkeypatch.setattr(urllib.request, "urlopen", first_mirror_is_down)
    assert len(datasets.mnist().train_labels) == SIZES["train"]


def test_damaged_cache_is_named(cache, mirror):
    datasets.mnist()
    path = cache / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CurvoptError, match=f"{path.name} .*delete it"):
        datasets.mnist()


@pytest.mark.parametrize("download", [True, False])
def test_digits_stand_in(capsys, download):
    data = datasets.mnist(download=download)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "no network" in lines[0] if download else "does not hold it" in lines[0]
    assert "CURVOPT_DATA" in lines[0]
    for images, labels in [
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ]:
        assert images.shape == (len(labels), 1, 28, 28)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert labels.unique().tolist() == list(range(10))
    assert len(data.train_labels) + len(data.test_labels) == 1797


def test_neither_mnist_nor_scikit_learn(monkeypatch):
    real = builtins.__import__

    def without_sklearn(name, *args):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(CurvoptError, match="no network.*pip install scikit-learn"):
        datasets.mnist()
