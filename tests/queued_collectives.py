"""Many small programs with collectives in XLA's queue at once, on as many devices as run.py makes.

On jaxlib 0.10.2 it hung within seconds with one thread for each device (NPROC=2 on two cores), on 0.12.0.1
one thread for all is enough; see test_mesh.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clustr_jax.runtime import processes

processes.use_cores()
MESH = Mesh(jax.devices(), ("d",))
SHARED, WHOLE = (NamedSharding(MESH, PartitionSpec(*axes)) for axes in (("d",), ()))


@jax.jit
def features(x, w):
    """A convolution, averaged over the image."""
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).mean((1, 2))


gradient = jax.jit(jax.grad(lambda x, w: features(x, w).sum()), out_shardings=SHARED)
gathered = jax.jit(lambda y: y * 1.0, out_shardings=WHOLE)


def main(rounds=200):
    """Prints the number of devices when all are done."""
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.random((64, 16, 16, 16), np.float32), SHARED)
    w = jax.device_put(rng.random((3, 3, 16, 16), np.float32), WHOLE)
    for _ in range(rounds):
        found = []
        for _ in range(4):
            y, g = features(x, w), gradient(x, w)
            found += [gathered(y), y @ y.T, jnp.sort(y.ravel()), y[jnp.argmax(y, 1)[:5]], jnp.abs(g).max()]
            found += [features(x[::2], w)]
        jax.block_until_ready(found)
    print(len(jax.devices()))


if __name__ == "__main__":
    main()
