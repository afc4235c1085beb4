"""3 x 3 convolutions of stride 1 with a quarter of the products: Winograd's F(4 x 4, 3 x 3).

Tiles of 6 x 6 pixels, that overlap by two, give 4 x 4 outputs each by 36 products per pair of channels in
place of 144 (Winograd 1980; Lavin & Gray 2016, arXiv 1509.09308). With the matrices below, which interpolate
at 0, 1, -1, 2, -2 and infinity, y = A' ((G g G') . (B' d B)) A; the gradient with respect to g is the
transposed map. Rounding errors are some ten times those of the plain sum, for the matrices have large
entries: only training uses this.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from clustr_jax.models import blocks

SIZE, TILE, _POINTS = 3, 4, 6
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
# A', of outputs
_OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def forward(
    x: Float[Array, "N H W C"], kernel: Float[Array, "3 3 C O"], padding: int
) -> Float[Array, "N H2 W2 O"]:
    """The zero-padded convolution of stride 1."""
    size = tuple(n + 2 * padding - SIZE + 1 for n in x.shape[1:3])
    factors = jnp.stack(_both(_TAPS, [[kernel[i, j] for j in range(SIZE)] for i in range(SIZE)]))

    def part(x):
        products = lax.dot_general(_pixels(x, padding, size), factors, (((2,), (1,)), ((0,), (0,))))
        return _outputs(products, x.shape[0], size)

    return blocks.each(part, x)


def kernel_gradient(
    x: Float[Array, "N H W C"], dy: Float[Array, "N H2 W2 O"], padding: int
) -> Float[Array, "3 3 C O"]:
    """d loss / d kernel of `forward`, given dy = d loss / d outputs."""

    def part(x, dy):
        pixels = _pixels(x, padding, dy.shape[1:3])
        return lax.dot_general(pixels, _gradients(dy), (((1,), (1,)), ((0,), (0,))))

    total = blocks.total(part, x, dy)
    square = [[total[_POINTS * i + j] for j in range(_POINTS)] for i in range(_POINTS)]
    return jnp.stack(_both(_transposed(_TAPS), square)).reshape(SIZE, SIZE, x.shape[-1], dy.shape[-1])


def _transposed(matrix):
    return tuple(zip(*matrix, strict=True))


def _combined(matrix, terms):
    """matrix . terms: each sum of arrays is one pass of a compiled program."""
    rows = []
    for row in matrix:
        parts = [a if c == 1 else c * a for c, a in zip(row, terms, strict=True) if c]
        rows.append(sum(parts[1:], parts[0]))
    return rows


def _both(matrix, square):
    """matrix . square . matrix', row by row.

    Half of it is finished first: the compiler would else make that anew for each of the results.
    """
    half = lax.optimization_barrier([_combined(matrix, column) for column in zip(*square, strict=True)])
    return [entry for row in zip(*half, strict=True) for entry in _combined(matrix, row)]


def _pixels(x, padding, size):
    """B' d B of all tiles: [36, tiles, C]."""
    n, *sides, channels = x.shape
    tiles = [-(-side // TILE) for side in size]
    # one tile more at the end: the overlap of the last
    ends = [TILE * (t + 1) - side - padding for t, side in zip(tiles, sides, strict=True)]
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *((padding, end) for end in ends), (0, 0))))
    x = x.reshape(n, tiles[0] + 1, TILE, tiles[1] + 1, TILE, channels)
    down, right = ([divmod(i, TILE) for i in range(_POINTS)] for _ in range(2))
    # rows first, of all columns: those that tiles share are made once
    rows = lax.optimization_barrier(_combined(_PIXELS, [x[:, t : t + tiles[0], i] for t, i in down]))
    found = [
        a for row in rows for a in _combined(_PIXELS, [row[:, :, t : t + tiles[1], j] for t, j in right])
    ]
    return jnp.stack([a.reshape(-1, channels) for a in found])


def _gradients(dy):
    """A dy A' of all tiles: [36, tiles, O]."""
    n, *sides, features = dy.shape
    tiles = [-(-side // TILE) for side in sides]
    missing = [(0, TILE * t - side) for t, side in zip(tiles, sides, strict=True)]
    dy = lax.optimization_barrier(jnp.pad(dy, ((0, 0), *missing, (0, 0))))
    dy = dy.reshape(n, tiles[0], TILE, tiles[1], TILE, features)
    rows = lax.optimization_barrier(_combined(_transposed(_OUTPUTS), [dy[:, :, i] for i in range(TILE)]))
    found = [
        a for row in rows for a in _combined(_transposed(_OUTPUTS), [row[:, :, :, j] for j in range(TILE)])
    ]
    return jnp.stack([a.reshape(-1, features) for a in found])


def _outputs(products, n, size):
    """A' m A of all tiles, as images."""
    tiles = [-(-side // TILE) for side in size]
    square = [
        [products[_POINTS * i + j].reshape(n, *tiles, -1) for j in range(_POINTS)] for i in range(_POINTS)
    ]
    pixels = _both(_OUTPUTS, square)
    rows = [jnp.stack(pixels[TILE * i : TILE * (i + 1)], axis=3) for i in range(TILE)]
    y = jnp.stack([row.reshape(n, tiles[0], TILE * tiles[1], -1) for row in rows], axis=2)
    return y.reshape(n, TILE * tiles[0], TILE * tiles[1], -1)[:, : size[0], : size[1]]
