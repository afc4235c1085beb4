"""One mesh over all devices, and the sums and rows of code that runs on each of them.

Training, k-means and evaluation are written for the part that one device has: some rows of the batch, some
classes, some slots. Inside `spread` the functions below speak to the other devices. Without a mesh, on one
device, they do nothing: the code is the same.

    with mesh.over(jax.devices()):
        ...
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

AXIS = "devices"
# On each device the same; on each device its rows.
SAME, ROWS = PartitionSpec(), PartitionSpec(AXIS)


@contextlib.contextmanager
def over(devices: Sequence[Any]):
    """Use these devices in this block; one of them needs no mesh."""
    if len(devices) == 1:
        yield
        return
    with jax.set_mesh(Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))):
        yield


def devices() -> int:
    """How many devices the current mesh has (1 without one)."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)


def place(tree: Any):
    """Put arrays on every device, once, so that no call has to."""
    if devices() == 1:
        return tree
    return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), SAME))


def scatter(rows: np.ndarray) -> Array:
    """Put on each device its share of the rows [N, ...] alone; zeros fill the last share up."""
    if devices() == 1:
        return jnp.asarray(rows)
    share = -(-len(rows) // devices())

    def part(index):
        start = index[0].start or 0
        own = rows[start : start + share]
        return np.pad(own, [(0, share - len(own))] + [(0, 0)] * (rows.ndim - 1))

    place = NamedSharding(jax.sharding.get_mesh(), ROWS)
    return jax.make_array_from_callback((share * devices(), *rows.shape[1:]), place, part)


def taken(rows: Array, ids: Int[Array, "B"]) -> Array:
    """`rows[ids]` of what `scatter` has placed; inside `spread` each device has its share, and its own ids.

    Every device looks for what all of them want among its rows, and has zeros for the others. The sum of all
    answers is the rows, bit for bit, and each device receives only the sum for its own ids.
    """
    if devices() == 1:
        return rows[ids]
    if axis():
        return lax.psum_scatter(_held(rows, gather(ids)), AXIS, tiled=True)
    return spread(lambda rows, ids: total(_held(rows, ids)), (ROWS, SAME), SAME)(rows, ids)


def _held(share, ids):
    """The rows of these ids that this device has, and zeros for the others'."""
    place = ids - lax.axis_index(AXIS) * share.shape[0]
    here = (place >= 0) & (place < share.shape[0])
    found = share[jnp.where(here, place, 0)]
    return jnp.where(here.reshape(-1, *[1] * (share.ndim - 1)), found, jnp.zeros_like(found))


def spread(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`f` on every device at once, each with its part of the inputs whose spec is ROWS; `f` without a mesh.

    Derivatives in `f` are each device's own: of a loss that all devices compute alike (through `total`), the
    gradient is `average` of theirs.
    """
    if devices() == 1 or axis():
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def by_rows(f: Callable, shared: Any, *arrays: Array | np.ndarray):
    """`f(shared, *arrays)`, where each row of the result depends on its row of the arrays only.

    On a mesh each device does its share of the rows, and has all of the result.
    """
    if devices() == 1 or axis():
        return f(shared, *arrays)
    size = arrays[0].shape[0]
    filled = jnp.arange(-(-size // devices()) * devices()) % size

    def part(shared, *rows):
        return jax.tree.map(gather, f(shared, *rows))

    result = spread(part, (SAME, *(ROWS for _ in arrays)), SAME)(shared, *(a[filled] for a in arrays))
    return jax.tree.map(lambda a: a[:size], result)


def axis() -> str | None:
    """The mesh axis inside `spread`, for layers that take its name."""
    return AXIS if AXIS in jax.sharding.get_abstract_mesh().manual_axes else None


def _count() -> int:
    return devices() if axis() else 1


def total(x: Array):
    """The sum over devices."""
    return lax.psum(x, AXIS) if axis() else x


def average(tree: Any):
    """The mean over devices."""
    return lax.pmean(tree, AXIS) if axis() else tree


def gather(rows: Array) -> Array:
    """All devices' rows, in order, on each of them."""
    return lax.all_gather(rows, AXIS, tiled=True) if axis() else rows


def own(x: Array) -> Array:
    """This device's rows of an array that all devices have."""
    if not axis():
        return x
    size = x.shape[0] // _count()
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size)


def numbers(size: int) -> Int[Array, "B"]:
    """The places in the whole batch of this device's `size` rows."""
    first = lax.axis_index(AXIS) * size if axis() else 0
    return first + jnp.arange(size)


def whole(size: int) -> int:
    """The size of the whole batch of which this device has `size` rows."""
    return size * _count()


def sent(compiled: jax.stages.Compiled) -> int:
    """Numbers that one device receives in the collectives of a compiled program, each counted once.

    A train step is the body of one loop, so of `train.run_steps` it is what one step sends.
    """
    return sum(size for _, _, size in _collectives(compiled))


def received(compiled: jax.stages.Compiled) -> int:
    """The same in bytes; of a reduce-scatter what all devices have for this one. Within `over`."""
    found = 0
    for name, kind, size in _collectives(compiled):
        width = max(8, int(re.sub(r"\D", "", kind) or 8)) // 8
        found += width * size * (devices() if name == "reduce-scatter" else 1)
    return found


def _collectives(compiled):
    """(its name, type and number of elements) of each result of a collective."""
    for line in (compiled.as_text() or "").splitlines():
        match = re.search(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-\w+)\(", line)
        if match:
            for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1]):
                yield match[2], kind, int(np.prod([int(n) for n in shape.split(",") if n]))
