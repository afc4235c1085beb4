"""Upper bounds of Lipschitz constants in l2, layer by layer, and a lower bound to hold against them.

    bound = lipschitz.bound(net.describe(variables), net.input_shape)     # |f(x) - f(x')| <= bound |x - x'|
    lower = lipschitz.jacobian_norm(f, x).max()                           # no constant can be smaller

A network is described by a list of layers, each a tuple of its kind and plain arrays (`LAYERS` has the
kinds). ReLU, MaxMin and reshapes have constant 1 and are not mentioned. Everything is computed in
float64 NumPy from explicit or per-frequency singular values, never by power iteration (which converges
from below), and rounded up at the end. Derivations: docs/certificates.md.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from clustr_jax.runtime.retracing import traced_anew

# Far above the float64 error of a singular value, far below anything that matters.
_UP = 1 + 1e-6


def bound(layers: list[tuple], input_shape: tuple[int, ...]) -> float:
    """Upper bound of the l2 Lipschitz constant of composed layers, from float64 singular values.

    Args:
        layers: tuples of a kind and its arrays; LAYERS has the kinds.
        input_shape: [H, W, C] or [E].

    Returns:
        the bound, rounded up.

    >>> layers = [("dense", np.diag([3.0, 1.0])), ("dense", np.diag([0.5, 2.0]))]
    >>> print(round(lipschitz.bound(layers, (2,)), 3))  # 3 x 2; the product of the matrices has norm 2
    6.0
    """
    return _product(layers, tuple(input_shape[:2]) if len(input_shape) == 3 else ())[0] * _UP


def _product(layers, size):
    """(product of the layers' constants, size [H, W] that comes out; () once there are no pixels)."""
    total = 1.0
    for kind, *arguments in layers:
        constant, size = LAYERS[kind](size, *arguments)
        total *= constant
    return total, size


# Each kind of layer: (size [H, W], its arrays) -> (constant, size that comes out).


def _scale(size, factor):
    """("scale", factors per channel): what dividing by the std does to pixels."""
    return float(np.max(np.abs(factor))), size


def _dense(size, matrix):
    """("dense", matrix [E, F]), pixels flattened before it."""
    return dense(matrix), ()


def _pointwise(size, matrix):
    """("pointwise", matrix [C, O]): the same at each pixel, whose channels may have been moved around."""
    return dense(matrix), size


def _conv(size, kernel, stride, padding):
    """("conv", kernel [k, k, C, O], stride, zero padding)."""
    k = kernel.shape[0]
    return conv(kernel, size, stride=stride, padding=padding), tuple(
        (n + 2 * padding - k) // stride + 1 for n in size
    )


def _sll(size, kernel, scale, padding):
    """("sll", kernel of W, diagonal of T^-1, padding of W): x - 2 W^T T^-1 relu(W x + b).

    With W W^T <= c T the squared norm of the Jacobian is at most 1 + 4 c max(c - 1, 0): 1 for exact
    T, and what is left of the float32 rounding of T otherwise.
    """
    scaled = np.asarray(kernel, np.float64) * np.sqrt(np.asarray(scale, np.float64))
    c = conv(scaled, size or (1, 1), padding=padding) ** 2
    return math.sqrt(1 + 4 * c * max(c - 1, 0.0)), size


def _sum(size, shortcut, branch):
    """("sum", layers, layers): a residual block; an empty list is the identity."""
    one, after = _product(shortcut, size)
    other, also = _product(branch, size)
    assert after == also, "the two sides of a sum end in different sizes"
    return one + other, after


def _mean(size):
    """("mean",): over all pixels of each channel; n entries of 1/n have norm 1/sqrt(n)."""
    return 1 / math.sqrt(math.prod(size)), ()


def _average_pool(size, window, stride):
    """("average_pool", window, stride), square, no padding."""
    return math.ceil(window / stride) / window, _pooled(size, window, stride)


def _max_pool(size, window, stride):
    """("max_pool", window, stride), square, no padding: sqrt of the most windows that share a pixel."""
    return float(math.ceil(window / stride)), _pooled(size, window, stride)


def _pooled(size, window, stride):
    return tuple((n - window) // stride + 1 for n in size)


def _space_to_depth(size):
    """("space_to_depth",): 2 x 2 pixels to one, an isometry."""
    return 1.0, tuple(n // 2 for n in size)


def _flatten(size):
    """("flatten",): to one pixel."""
    return 1.0, (1, 1)


LAYERS: dict[str, Callable] = {
    "scale": _scale, "dense": _dense, "pointwise": _pointwise, "conv": _conv, "sll": _sll, "sum": _sum,
    "mean": _mean, "average_pool": _average_pool, "max_pool": _max_pool, "space_to_depth": _space_to_depth,
    "flatten": _flatten,
}  # fmt: skip


def dense(matrix: Float[np.ndarray, "E F"]) -> float:
    """Largest singular value.

    >>> print(lipschitz.dense(np.diag([3.0, -4.0])))
    4.0
    """
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def conv(
    kernel: Float[np.ndarray, "k k C O"], size: tuple[int, ...], *, stride: int = 1, padding: int
) -> float:
    """Upper bound of the norm of a zero-padded convolution of [H, W] images.

    On a torus of at least size + padding (and of a multiple of the stride) the zero-padded convolution is a
    part of the circular one: its input is embedded in zeros, some outputs are dropped. The circular one
    decomposes over frequencies. With stride 1 its norm is the largest of the O x C matrices K(w). With stride
    s it is the largest of the matrices [K(w + 2 pi m / s)]_m / s, whose s^2 frequencies fall together in the
    output.

    Args:
        kernel: [k, k, C, O].
        size: (H, W) of the input.
        stride: of the convolution.
        padding: zeros on each side.

    Returns:
        the bound.

    >>> blur = np.full((3, 3, 1, 1), 1 / 9)  # [k, k, C, O]: the mean of 3 x 3 pixels never lengthens
    >>> print(round(lipschitz.conv(blur, (8, 8), padding=1), 6))
    1.0
    """
    kernel = np.asarray(kernel, np.float64)
    k = kernel.shape[0]
    torus = [-(-max(n + padding, k) // stride) * stride for n in size]
    spectrum = np.fft.fft2(kernel, s=torus, axes=(0, 1))
    rows, columns = (n // stride for n in torus)
    channels, features = kernel.shape[2:]
    # frequency = alias * (torus / stride) + w: all aliases of w side by side
    spectrum = spectrum.reshape(stride, rows, stride, columns, channels, features)
    spectrum = spectrum.transpose(1, 3, 0, 2, 4, 5).reshape(rows, columns, -1, features)
    # a real kernel has the same norm at w and -w: half of the columns are enough
    return _largest(spectrum[:, : columns // 2 + 1].reshape(-1, *spectrum.shape[2:])) / stride


def _largest(matrices: np.ndarray) -> float:
    """The largest singular value of a stack of complex matrices, from the smaller Gram matrices."""
    tall = matrices.shape[1] > matrices.shape[2]
    gram = (m.conj().T @ m if tall else m @ m.conj().T for m in matrices)
    return math.sqrt(max(float(np.linalg.eigvalsh(g)[-1]) for g in gram))


def jacobian_norm(
    f: Callable, x: Float[Array | np.ndarray, "B ..."], *, steps: int = 20, seed: int = 0
) -> Float[np.ndarray, "B"]:
    """Lower bounds of the Lipschitz constant of f: |J u| / |u| at each x, u from power iterations.

    Any u gives a lower bound; more steps only raise it.

    Args:
        f: maps [B, ...] to [B, E], each example on its own. Of a jax.tree_util.Partial the arrays are traced;
            any other function is compiled at each call, for what it holds may have changed.
        x: [B, ...].
        steps: power iterations.
        seed: of the first u.

    Returns:
        [B] float32, 1e-5 of the value taken off for its rounding.

    >>> matrix = jnp.diag(jnp.array([3.0, 1.0]))
    >>> print(lipschitz.jacobian_norm(lambda x: x @ matrix, jnp.ones((2, 2))))
    [3. 3.]
    """
    seen = contextlib.nullcontext() if isinstance(f, Partial) else traced_anew()
    f = f if isinstance(f, Partial) else Partial(lambda x, f=f: f(x))
    with seen:  # what JAX has kept of a scan or a jit inside may be old
        found = _jacobian_norm(f, jnp.asarray(x, jnp.float32), jax.random.key(seed), steps)
    return np.asarray(found, np.float32) * np.float32(1 - 1e-5)


@functools.partial(jax.jit, static_argnames="steps")
def _jacobian_norm(f, x, key, steps):
    def length(v):
        flat = v.reshape(v.shape[0], -1)
        # scaled, so that the squares of a steep network's derivatives do not overflow
        top = jnp.maximum(jnp.max(jnp.abs(flat), axis=1), 1e-30)
        return top * jnp.sqrt(jnp.sum(jnp.square(flat / top[:, None]), axis=1))

    def unit(v):
        return v / jnp.maximum(length(v), 1e-30).reshape(-1, *(1,) * (v.ndim - 1))

    z, backward = jax.vjp(f, x)
    # J u as the adjoint of w -> J^T w: the network's convolution has no forward derivative
    _, forward = jax.vjp(lambda w: backward(w)[0], jnp.zeros_like(z))

    def step(_, u):
        return unit(backward(unit(forward(u)[0]))[0])

    u = jax.lax.fori_loop(0, steps, step, unit(jax.random.normal(key, x.shape, x.dtype)))
    return length(forward(u)[0]) / length(u)


# The toy network x -> W2 relu(W1 x + b1) + b2 on the plane: exactly.


def planar(
    first: Float[np.ndarray, "2 H"],
    bias: Float[np.ndarray, "H"],
    second: Float[np.ndarray, "H E"],
    centre: Float[np.ndarray, "2"] | None = None,
    radius: float = math.inf,
) -> float:
    """The Lipschitz constant of a ReLU network with one hidden layer on the plane, or on a ball of it.

    The largest norm of W2 diag(s) W1 over the linear regions s that exist, or that meet the ball: exact (up
    to float64 in telling apart lines that meet in one point).

    Args:
        first: W1 [2, H].
        bias: [H], of the hidden layer.
        second: W2 [H, E].
        centre: of the ball [2]; None for the origin.
        radius: of the ball; infinite for the plane.

    Returns:
        the constant.

    >>> first, second = np.array([[1.0, -1.0], [0.0, 0.0]]), np.ones((2, 1))  # relu(x) + relu(-x) = |x|
    >>> print(lipschitz.planar(first, np.zeros(2), second))
    1.0
    >>> layers = [("dense", first), ("dense", second)]
    >>> print(round(lipschitz.bound(layers, (2,)), 3))  # the product of the norms is twice that
    2.0
    """
    patterns = regions(first, bias, centre, radius).astype(np.float64)
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    jacobians = np.einsum("ah,ph,he->pae", first, patterns, second)
    return float(np.linalg.norm(jacobians, 2, axis=(1, 2)).max())


def regions(
    first: Float[Array | np.ndarray, "2 H"],
    bias: Float[Array | np.ndarray, "H"],
    centre: Float[Array | np.ndarray, "2"] | None = None,
    radius: float = math.inf,
) -> Bool[np.ndarray, "P H"]:
    """Which hidden units are on in each region of the plane that meets the ball (duplicates removed).

    Every region but the one around the centre has a piece of a line w_i x + b_i = 0 inside the ball as part
    of its border. The other lines cut each line into pieces, and the middle of a piece tells the two regions
    beside it.

    >>> on = lipschitz.regions(np.eye(2), np.zeros(2))  # relu(x_0) and relu(x_1): the four quadrants
    >>> print(on.astype(int).tolist())
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    >>> print(len(lipschitz.regions(np.eye(2), np.zeros(2), centre=np.array([3.0, 1.0]), radius=2.0)))
    2
    """
    w, b = np.asarray(first, np.float64).T, np.asarray(bias, np.float64)
    centre = np.zeros(2) if centre is None else np.asarray(centre, np.float64)
    found = [(w @ centre + b > 0)[None]]
    for i in range(len(w)):
        length = np.linalg.norm(w[i])
        distance = (w[i] @ centre + b[i]) / length if length else math.inf
        if abs(distance) >= radius or not length:
            continue
        foot = centre - distance * w[i] / length
        along = np.array([-w[i][1], w[i][0]]) / length
        half = math.sqrt(radius**2 - distance**2) if math.isfinite(radius) else math.inf
        speed, value = w @ along, w @ foot + b
        with np.errstate(divide="ignore", invalid="ignore"):
            cuts = -value / speed
        cuts = np.sort(cuts[np.isfinite(cuts) & (np.abs(cuts) < half) & (np.arange(len(w)) != i)])
        if math.isfinite(half):
            ends = np.array([-half, *cuts, half])
        elif len(cuts):
            ends = np.array([cuts[0] - 2, *cuts, cuts[-1] + 2])
        else:
            ends = np.array([-1.0, 1.0])
        middle = (ends[1:] + ends[:-1]) / 2
        on = value[None, :] + middle[:, None] * speed[None, :] > 0
        # units on the same line turn on together, or one instead of the other
        scale = np.linalg.norm(w, axis=1)
        largest = scale * np.linalg.norm(foot) + np.abs(b)
        same = (scale > 0) & (np.abs(speed) <= 1e-12 * scale) & (np.abs(value) <= 1e-12 * largest)
        same[i] = True
        for side in (False, True):
            on[:, same] = (w[same] @ w[i] > 0) == side
            found.append(on.copy())
    return np.unique(np.concatenate(found), axis=0)
