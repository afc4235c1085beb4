"""Where images, labels and keys lie: on the host where JAX would not compute with them beside the model.

A model's parameters may be spread over a mesh, and its images have been put on one device of it. JAX refuses
to mix what was put on different devices, and attacks know nothing of shardings that are part of an array's
type (of meshes with explicit axes).
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clustr_jax.runtime import mesh


def home(leaves: Iterable[Any]) -> frozenset:
    """The devices that the current mesh has, or else those that these arrays were put on (empty: any)."""
    try:
        current = jax.sharding.get_mesh()
    except ValueError:  # inside a jit, which has one place for all
        return frozenset()
    if not current.empty:
        return frozenset(current.devices.flat)
    return frozenset().union(*(a.devices() for a in leaves if _put(a)))


def beside(devices: frozenset, array: Any) -> Any:
    """The array as it is, or its values on the host, where it was put on others than these devices."""
    if not _put(array) or (not _explicit(array) and (not devices or array.devices() == devices)):
        return array
    if not array.is_fully_addressable:  # of several processes, each has a part
        return array
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data: Any = np.asarray(jax.random.key_data(array))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    return np.asarray(array)


def settled(tree: Any, leaves: Iterable[Any]) -> Any:
    """The state of a loop over these arrays, put before the first call where the program will return it.

    JAX compiles a program anew for an argument that was put on a device. So the state is put there from the
    start, or never where the arrays are spread over devices.
    """
    if mesh.devices() > 1:  # the package's own, on which each device has all of it
        return tree
    devices = home(leaves)
    if len(devices) > 1:
        return jax.device_get(tree)
    return jax.device_put(tree, next(iter(devices))) if devices else tree


def _put(array) -> bool:
    """Whether it is a value that was put where it is, and not where there happened to be room."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.committed


def _explicit(array) -> bool:
    return any(kind == jax.sharding.AxisType.Explicit for kind in jax.typeof(array).sharding.mesh.axis_types)
