"""A network of a zoo, as it comes: equimo's are equinox modules that take one image, channels first."""

import jax
import numpy as np
import pytest

import clustr_jax
from clustr_jax import attacks
from judged import small

equimo = pytest.importorskip("equimo")
N, EPS = 8, 2 / 255


@pytest.fixture(scope="module")
def model():
    """ConvNeXt with one block a stage, untrained: nothing is downloaded."""
    from equimo.vision.models import ConvNeXt

    net = ConvNeXt(3, depths=[1, 1, 1, 1], dims=[8, 16, 16, 16], num_classes=10, key=jax.random.key(0))
    return attacks.wrap(jax.vmap(lambda image: net(image, inference=True)), layout="NCHW")


@pytest.mark.slow
def test_it_is_judged_and_verified(model, tmp_path):
    """From inside as well: gradients are compared with float64."""
    x = np.random.default_rng(0).uniform(size=(N, 32, 32, 3)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        y = np.asarray(model(x)).argmax(axis=1)
        few = small(EPS, apgd_steps=4)
        j = clustr_jax.judge(model, x, y, eps=EPS, slots=N, settings=few, folder=tmp_path, progress=False)
        assert clustr_jax.verify(tmp_path, model).ok
    assert j.clean == 1.0 and j.robust < 1.0 and j.content["image"] == [32, 32, 3]
    assert {c["number"]: c["status"] for c in j.checks}[2] == "PASS"
