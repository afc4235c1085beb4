"""Kernel gradients of 3 x 3 convolutions with a quarter of the products: Winograd's F(4 x 4, 3 x 3).

Tiles of 6 x 6 pixels, that overlap by two, give 4 x 4 outputs each by 36 products per pair of channels in
place of 144 (Winograd 1980; Lavin & Gray 2016, arXiv 1509.09308). With the matrices below, which interpolate
at 0, 1, -1, 2, -2 and infinity, y = A' ((G g G') . (B' d B)) A. The gradient with respect to g is the
transposed map: G' ((B' d B) . (A dy A')) G, summed over the tiles. Rounding errors are some ten times those
of the plain sum, for the matrices have large entries: only training uses this.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

SIZE, TILE, POINTS = 3, 4, 6
# B', of pixels
_PIXELS = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
# G, of kernels
_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# A, of outputs
_OUTPUTS = ((1, 0, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (1, 2, 4, 8), (1, -2, 4, -8), (0, 0, 0, 1))
# Channels between which it is faster at every measured shape (benchmarks/convolutions.py): with fewer the
# transforms cost too much, with more the sums of all points do not fit into the cache.
_LEAST, _MOST = 32, 256


def pays(kernel: tuple[int, ...], stride: int, padding: int) -> bool:
    """Whether a convolution with a kernel of this shape is to have its gradient by this form."""
    usable = kernel[:2] == (SIZE, SIZE) and stride == 1 and padding < SIZE
    return usable and min(kernel[2:]) >= _LEAST and max(kernel[2:]) <= _MOST


def products(
    x: Float[Array, "N H W C"], dy: Float[Array, "N H2 W2 O"], padding: int
) -> Float[Array, "36 C O"]:
    """The sum over tiles at each point: of x, zero-padded, and dy = d loss / d outputs."""
    sides = dy.shape[1:3]
    return lax.dot_general(_pixels(x, padding, sides), _gradients(dy), (((1,), (1,)), ((0,), (0,))))


def kernel(total: Float[Array, "36 C O"]) -> Float[Array, "3 3 C O"]:
    """d loss / d kernel, of the sum of `products`."""
    taps = jnp.asarray(np.kron(_TAPS, _TAPS).T, total.dtype)
    found = jnp.matmul(taps, total.reshape(POINTS**2, -1)).reshape(SIZE, SIZE, *total.shape[1:])
    return found.swapaxes(0, 1)  # points have their column first


def _combined(matrix, terms):
    """matrix . terms, its rows as a new first axis: one pass of a compiled program.

    It is finished before it is used: the compiler would else make it anew for each of the results.
    """
    rows = []
    for row in matrix:
        parts = [a if c == 1 else c * a for c, a in zip(row, terms, strict=True) if c]
        rows.append(sum(parts[1:], parts[0]))
    return lax.optimization_barrier(jnp.stack(rows))


def _pixels(x, padding, size):
    """B' d B of all tiles: [36, tiles, C]."""
    n, *sides, channels = x.shape
    tiles = [-(-side // TILE) for side in size]
    # one tile more at the end: the overlap of the last
    ends = [TILE * (t + 1) - side - padding for t, side in zip(tiles, sides, strict=True)]
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *((padding, end) for end in ends), (0, 0))))
    x = x.reshape(n, tiles[0] + 1, TILE, tiles[1] + 1, TILE, channels)
    places = [divmod(i, TILE) for i in range(POINTS)]
    # rows first, of all columns: those that tiles share are made once
    rows = _combined(_PIXELS, [x[:, t : t + tiles[0], i] for t, i in places])
    found = _combined(_PIXELS, [rows[:, :, :, t : t + tiles[1], j] for t, j in places])
    return found.reshape(POINTS**2, -1, channels)


def _gradients(dy):
    """A dy A' of all tiles: [36, tiles, O]."""
    n, *sides, features = dy.shape
    tiles = [-(-side // TILE) for side in sides]
    missing = [(0, TILE * t - side) for t, side in zip(tiles, sides, strict=True)]
    dy = lax.optimization_barrier(jnp.pad(dy, ((0, 0), *missing, (0, 0))))
    dy = dy.reshape(n, tiles[0], TILE, tiles[1], TILE, features)
    rows = _combined(_OUTPUTS, [dy[:, :, i] for i in range(TILE)])
    found = _combined(_OUTPUTS, [rows[:, :, :, :, j] for j in range(TILE)])
    return found.reshape(POINTS**2, -1, features)
