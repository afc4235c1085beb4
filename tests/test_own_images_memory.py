"""Own images: the memory they take is known before a pixel is decoded."""

import numpy as np
import pytest

from clustr_jax import data
from clustr_jax.data import folder, folder_images
from clustr_jax.runtime import memory
from clustr_jax.stages import configuration
from own_images import SIZE, arrays, make, refused


@pytest.mark.parametrize("kind", ["folder", "npz", "compressed npz"])
def test_memory_is_known_before_a_pixel_is_decoded(kind, tmp_path, rng, monkeypatch):
    root = make(tmp_path / "own", rng)
    if kind != "folder":
        root = tmp_path / "own.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(root, **arrays(rng))
    needed = {"folder": 2 * 18, "npz": 2 * 17, "compressed npz": 2 * 17}[kind] * np.prod(SIZE)
    needed += 0 if kind == "folder" else 2 * 8 * 17  # labels
    monkeypatch.setattr(memory, "available", lambda: needed)
    folder.read(root)
    monkeypatch.setattr(memory, "available", lambda: needed - 1)

    def decode(*_):
        raise AssertionError("decoded before the memory was known")

    monkeypatch.setattr(folder_images, "_decoded", decode)
    monkeypatch.setattr(np.lib.format, "read_array", decode)
    message = refused(root)
    assert "need memory" in message and "are free; take fewer images" in message


def test_memory_that_is_not_there_after_all(tmp_path, rng, monkeypatch):
    make(tmp_path, rng)
    monkeypatch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError("Unable to allocate")))
    assert "do not fit into memory (Unable" in refused(tmp_path)


def test_the_available_memory_is_a_plausible_number(monkeypatch, tmp_path):
    found = memory.available()
    assert found is None or 2**20 < found < 2**50
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    assert memory._left(tmp_path) == [1_000_000]
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert memory._left(tmp_path) == [1_500_000]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left(tmp_path) == []
    monkeypatch.setattr(memory, "_machine", lambda: None)
    monkeypatch.setattr(memory, "_groups", lambda: None)
    monkeypatch.setattr(memory, "_limit", lambda: None)
    memory.check(10**30, "where nothing is known", "nothing is refused")


@pytest.mark.parametrize("side", [8, 300, 1500])
def test_statistics_take_a_bounded_number_of_bytes(side):
    """Of images that are larger than a chunk as well; the peak is that of a chunk, not of the set."""
    import tracemalloc

    rng = np.random.default_rng(0)
    images = rng.integers(
        0, 200, (9_000 if side == 8 else 13_500_000 // (3 * side**2), side, side, 3), np.uint8
    )
    split = data.Split(images, np.zeros(len(images), np.int32), 2, 255.0, (0.0, 1.0), "")
    tracemalloc.start()
    mean, std = configuration.statistics(split)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * configuration._CHUNK_BYTES
    for c in range(3):
        levels = np.bincount(images[..., c].ravel(), minlength=256) / images[..., c].size
        expected = (levels * np.arange(256)).sum()
        deviation = np.sqrt((levels * (np.arange(256) - expected) ** 2).sum())
        np.testing.assert_allclose((mean[c], std[c]), (expected / 255, deviation / 255), atol=2e-6)
