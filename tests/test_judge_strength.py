"""sound-3 is never weaker than AutoAttack's standard: image by image, on a small network of convolutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clustr_jax
from clustr_jax import attacks, data, losses

N, EPS = 64, {"linf": (0.06, 0.12), "l2": (0.4, 0.8)}


@functools.cache
def problem():
    """(model, x, y): digits, 150 steps on FGSM images; the first test images of them."""
    x, y = data.load("digits", "train")
    x, y, rng = x[:512], y[:512], np.random.default_rng(0)
    shapes = ((3, 3, 1, 12), (3, 3, 12, 16), (2 * 2 * 16, 10))
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1]) / 2), jnp.float32) for s in shapes]

    def logits(params, x):
        for kernel in params[:2]:
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return x.reshape(len(x), -1) @ params[2]

    def loss(params, x):
        return jnp.mean(losses.cross_entropy(logits(params, x), y))

    @jax.jit
    def step(params):
        moved = jnp.clip(x + 0.06 * jnp.sign(jax.grad(loss, argnums=1)(params, x)), 0, 1)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params, moved))

    for _ in range(150):
        params = step(params)
    x, y = data.load("digits", "test")
    return functools.partial(logits, params), x[:N], y[:N]


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [(norm, eps) for norm, radii in EPS.items() for eps in radii])
def test_nothing_that_autoattack_breaks_is_left(norm, eps):
    model, x, y = problem()
    standard = attacks.autoattack(jax.random.key(0), model, x, y, eps=eps, norm=norm, progress=False)
    j = clustr_jax.judge(model, x, y, eps=eps, norm=norm, progress=False)
    left = j.broken_by == ""
    assert not (left & ~standard.robust).any()
    assert j.content["protocol"] == "sound-3" and 0 < left.sum() < (j.broken_by != "clean").sum()
