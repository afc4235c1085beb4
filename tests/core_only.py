"""Run by `make test-wheel` in an environment that has the wheel and what it requires, and nothing else.

AutoAttack on a plain function, whose answer is known, and k-means, clusters and a certificate on points.
"""

import importlib.util
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import clustr_jax
from clustr_jax import attacks, certify, clusters
from clustr_jax.runtime import canary
from clustr_jax.runtime.extras import EXTRAS


def logits(x):
    """Class 0 for images brighter than a half, class 1 for darker ones."""
    z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    return jnp.concatenate([z, -z], axis=1)


def main() -> None:
    here = pathlib.Path(clustr_jax.__file__)
    assert "site-packages" in here.parts, f"the wheel is to be tested, not {here}"
    there = [name for names in EXTRAS.values() for name in names if importlib.util.find_spec(name)]
    assert not there, f"more is installed than the wheel requires: {there}"
    canary.check()
    x = np.stack([np.full((8, 8, 1), value, np.float32) for value in (0.9, 0.55, 0.45, 0.1)])
    y = np.array([0, 0, 1, 1])
    result = attacks.autoattack(jax.random.key(0), logits, x, y, eps=0.1, slots=4)
    assert result.robust.tolist() == [True, False, False, True], result.robust
    with tempfile.TemporaryDirectory() as folder:
        judged = clustr_jax.judge(logits, x, y, eps=0.1, slots=4, folder=folder)
        assert judged.robust == 0.5 and clustr_jax.verify(folder, logits).ok, judged
    head = clusters.fit(jax.random.key(0), x.reshape(4, -1), y, num_classes=2, k=1)
    radii = certify.radius(head, x.reshape(4, -1), y, lipschitz=1.0)
    assert (radii > 0).all(), radii
    try:
        clustr_jax.load("runs/none")
    except ImportError as error:
        assert "pip install 'clustr-jax[" in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError("a work directory was read without the packages that read it")
    print(f"core only: jax {jax.__version__}, robust {result.robust.mean():.0%}, as it should be")


if __name__ == "__main__":
    main()
