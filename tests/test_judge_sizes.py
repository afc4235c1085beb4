"""Images of 224 x 224 and 1,000 classes; and how much memory a judgement takes, said before it starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import clustr_jax
from clustr_jax.evaluation import footprint
from clustr_jax.runtime import memory
from judged import EPS, SHAPE, N, curved, images, judged, small

SIDE, CLASSES, COUNT, RADIUS = 224, 1000, 4, 1 / 255


@functools.cache
def kernels():
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
        for shape in ((3, 3, 3, 8), (7 * 7 * 8, CLASSES))
    )


def wide(x):
    """[B, 224, 224, 3] -> [B, 1000]: means of 32 x 32 patches, a convolution and a linear layer."""
    first, second = kernels()
    z = 40 * (x.reshape(len(x), 7, 32, 7, 32, 3).mean(axis=(2, 4)) - 0.5)
    z = jax.lax.conv_general_dilated(z, first, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return 8 * jnp.tanh(z).reshape(len(x), -1) @ second


@pytest.mark.slow
def test_large_images_of_a_thousand_classes(tmp_path):
    """Slots are those of the images, targets the nearest few, and what is said is verified."""
    x = np.random.default_rng(1).uniform(size=(COUNT, SIDE, SIDE, 3)).astype(np.float32)
    y = np.asarray(wide(x)).argmax(axis=1)
    told = []
    few = small(RADIUS, apgd_steps=4, queries=4)
    j = clustr_jax.judge(wide, x, y, eps=RADIUS, settings=few, folder=tmp_path, progress=told.append)
    assert j.content["slots"] == COUNT and j.content["classes"] == CLASSES
    assert told[0].startswith("memory: about 0.") and "224x224x3, 1000 classes, 4 side by side" in told[0]
    assert {name: attack["targets"] for name, attack in j.attacks.items()} == {
        "pma": 0, "apgd-malt": 6, "apgd-ce": 0, "fab-t": 2, "square": 0, "fmn": 0
    }  # fmt: skip
    assert j.clean == 1.0 and j.robust < 1.0 and j.content["image"] == [SIDE, SIDE, 3]
    assert clustr_jax.verify(tmp_path, wide).ok


def test_what_a_backward_pass_keeps():
    """Of tanh its output; of the pixels nothing: 16 hidden values, and copies of the image in the slots."""
    x, _ = images()
    found = footprint.of(Partial(curved), x, 4, 8)
    pixels = int(np.prod(SHAPE))
    kept = found.per_slot - footprint._PER_SLOT * 4 * pixels
    assert 4 * 16 <= kept <= 4 * (4 * 16 + 2 * pixels)
    assert found.needed == 8 * found.per_slot + footprint._COPIES * N * 4 * pixels
    assert found.limit == memory.total() and memory.total() >= memory.available()


@pytest.mark.more
def test_slots_that_would_not_fit_are_fewer(monkeypatch):
    x, _ = images()
    whole = footprint.of(Partial(curved), x, 4, 32)
    monkeypatch.setattr(memory, "total", lambda: int((whole.images + 9.5 * whole.per_slot) / 0.7))
    told = []
    j = clustr_jax.judge(curved, *images(), eps=EPS, slots=32, settings=small(), progress=told.append)
    assert j.content["slots"] == 9 and "9 side by side (not 32: they would not fit)" in told[0]
    assert "32 images side by side would not have fitted into the memory" in j.content["notes"]
    monkeypatch.setattr(memory, "total", lambda: 1)
    assert footprint.of(Partial(curved), x, 4, 32).slots == 1
    monkeypatch.setattr(memory, "total", lambda: None)
    assert footprint.of(Partial(curved), x, 4, 32).slots == 32
    assert " of " not in str(footprint.of(Partial(curved), x, 4, 32)).partition(":")[2].partition(":")[0]


@pytest.mark.more
def test_of_what_fits_all_are_side_by_side():
    assert judged().content["slots"] == 32 and not judged().content["notes"]
