"""The gate of the attacks: logits that depend on the size of the batch; half precision does not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from clustr_jax import attacks
from gate_doors import CLASSES, DOORS, KEY, SHAPE, WITHOUT_RADIUS, B, images, linear, qtrades, said

IN_ONE_BATCH = ("pgd", "fgsm", "noise", "qtrades")
EVERY = DOORS | {"qtrades": qtrades} | {name: WITHOUT_RADIUS[name] for name in ("fmn", "ddn")}


def repeated(count):
    return tuple(np.resize(a, (count, *a.shape[1:])) for a in images())


@pytest.mark.parametrize("count", [2, 7, B, 20])
@pytest.mark.parametrize("door", list(EVERY))
@pytest.mark.one_in(4)
def test_logits_that_depend_on_the_size_of_the_batch(door, count):
    """The attack's own program answers otherwise than another one: it would attack another model."""
    x, y = repeated(count)
    rows = count if door in IN_ONE_BATCH else B  # what is looked at at once

    def branching(x):
        return linear(x) if x.shape[0] == rows else -linear(x)

    assert "in a batch of another size" in said(EVERY[door], KEY, branching, x, y)
    with pytest.warns(attacks.UnsteadyWarning, match="in a batch of another size"):
        found = EVERY[door](jax.random.clone(KEY), attacks.wrap(branching, steady=False), x, y)
    if door == "autoattack":
        assert any("in a batch of another size" in note for note in found.notes)


@pytest.mark.parametrize("count", range(2, 21))
@pytest.mark.one_in(3)
def test_more_images_than_some_number(count):
    """Than nine, half of them, all but one of them, and (of few) more than there are."""
    x, y = repeated(count)
    for threshold in {9, 15, count // 2, count - 1} if count < 16 else {9, count // 2, count - 1}:

        def branching(x, threshold=threshold):
            return linear(x) * (-1.0 if x.shape[0] > threshold else 1.0)

        assert "in a batch of another size" in said(DOORS["pgd"], KEY, branching, x, y), threshold


def test_a_size_that_the_gate_does_not_look_at():
    """The attack's own pass does."""
    x, y = repeated(40)
    for door, more in (("pgd", {}), ("apgd", {"slots": 40})):
        text = said(DOORS[door], KEY, lambda x: linear(x) * (-1.0 if len(x) > 30 else 1.0), x, y, **more)
        assert "another size: 40 instead of 8" in text


def test_one_image_has_no_half():
    x, y = repeated(1)
    DOORS["pgd"](jax.random.clone(KEY), linear, x, y)


def test_a_model_that_drops_an_axis_of_one_image():
    x, y = repeated(2)
    text = said(DOORS["pgd"], KEY, lambda x: jnp.squeeze(linear(x)[None]), x, y)
    assert "takes the 2 images of the batch, not 1" in text


def test_another_call_compiles_nothing(compilations):
    x, y = repeated(20)
    w = np.random.default_rng(3).normal(size=(5, 36, CLASSES)).astype(np.float32)
    counts = []
    with jax.debug_key_reuse(False):
        for i in range(5):
            with compilations() as found:
                for door in ("pgd", "apgd"):
                    weights = jnp.asarray(w[i])
                    DOORS[door](KEY, lambda x, w=weights: x.reshape(len(x), -1) @ w, x, y)
            counts.append(len(found))
    assert counts[1:] == [0] * 4, counts


class Half(nn.Module):
    """Convolutions and dense layers of one type; logits of it, or of float32."""

    dtype: Any
    widened: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = nn.relu(nn.Conv(16, (3, 3), dtype=self.dtype)(x))
            x = nn.LayerNorm(dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1)
        for _ in range(4):
            x = nn.relu(nn.Dense(64, dtype=self.dtype)(x))
        x = nn.Dense(CLASSES, dtype=self.dtype)(x)
        return x.astype(jnp.float32) if self.widened else x


@pytest.mark.more
@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("door", ["pgd", "apgd"])
def test_half_precision_networks_are_taken(door, dtype, widened):
    """Their rows round otherwise in batches of other sizes, which is no dependence on the batch."""
    x = np.random.default_rng(8).uniform(size=(65, *SHAPE)).astype(np.float32)
    net = Half(dtype, widened)
    model = jax.tree_util.Partial(net.apply, net.init(jax.random.key(1), x[:1]))
    y = np.asarray(model(x)).argmax(axis=1)
    more = {"slots": 16} if door == "apgd" else {}
    DOORS[door](jax.random.clone(KEY), model, x, y, **more)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("door", ["pgd", "apgd"])
def test_half_precision_hides_no_dependence(door, dtype):
    """On the other images, or on how many there are."""
    x, y = repeated(20)

    def of_others(x):
        z = linear(x).astype(dtype)
        return (z - z.mean(axis=0)[None]).astype(jnp.float32)

    def of_size(x):
        return (linear(x).astype(dtype) * (1 if len(x) in (B, 20) else -1)).astype(jnp.float32)

    assert "in another batch" in said(DOORS[door], KEY, of_others, x, y)
    assert "in a batch of another size" in said(DOORS[door], KEY, of_size, x, y)
