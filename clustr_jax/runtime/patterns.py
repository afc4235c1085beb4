"""The computations that this project's numbers hang on, each with its answer in NumPy float64.

They are small, and of sizes at which compilers have gone wrong: powers of two, block sizes, and one more or
one less. `canary.py` compiles and compares them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Around powers of two; from 2**15 + 1 rows of three on jaxlib 0.10.2 is wrong on CPU (jax-ml/jax#39103).
SMALL, MIDDLE, LARGE = (1, 7, 8, 9), (31, 32, 33, 127, 129), (1025, 32769)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One computation: `make(rng, n)` its inputs, `compute` by JAX, `exact` by NumPy in float64.

    `exact` returns (values, magnitude): the sum of the absolute values of the terms that were added up, which
    is what rounding is relative to. A magnitude of 0 asks for equality.
    """

    name: str
    sizes: tuple[int, ...]
    make: Callable[..., tuple]
    compute: Callable
    exact: Callable[..., tuple]


def _normal(*shapes: Callable[[int], tuple[int, ...]]):
    """Inputs that are standard normal, of shapes that depend on the size."""
    return lambda rng, n: tuple(rng.normal(size=shape(n)).astype(np.float32) for shape in shapes)


def _points(width: int, k: int = 5):
    """Points [n, width] around k centroids [k, width]."""

    def make(rng, n):
        mu = rng.normal(size=(k, width)).astype(np.float32)
        return mu[np.arange(n) % k] + np.float32(0.3) * rng.normal(size=(n, width)).astype(np.float32), mu

    return make


def _dot(a, b):
    return jnp.matmul(a, b, precision="highest")


def _sum(terms, axis):
    """(sum, its magnitude)."""
    return np.sum(terms, axis=axis), np.sum(np.abs(terms), axis=axis)


def _squares(x, mu):
    return (x[:, None] - mu[None]) ** 2


def _by_product(x, mu):
    """-|x - mu|^2 / 2 + |x|^2 / 2, the linearised score."""
    return _dot(x, mu.T) - jnp.sum(mu**2, axis=1)[None] / 2


def _by_product_exact(x, mu):
    terms = np.concatenate(
        [x[:, None] * mu[None], np.broadcast_to(-(mu**2) / 2, (len(x), *mu.shape))], axis=2
    )
    return _sum(terms, 2)


def _log_scores(x, mu):
    return jax.nn.logsumexp(-jnp.sum(_squares(x, mu), axis=2) / 0.2, axis=1)


def _log_scores_exact(x, mu):
    d = np.sum(_squares(x, mu), axis=2) / 0.2
    low = np.min(d, axis=1)
    return np.log(np.sum(np.exp(low[:, None] - d), axis=1)) - low, 1 + np.max(d, axis=1)


def _quadratic_form(x, m):
    return jax.vmap(lambda row: jnp.sum(jnp.matmul(m, row, precision="highest") ** 2))(x)


def _quadratic_form_exact(x, m):
    return np.sum((x @ m.T) ** 2, axis=1), np.sum((np.abs(x) @ np.abs(m.T)) ** 2, axis=1)


def _near_ties(rng, n):
    """Rows whose largest value stands twice, with neighbours one rounding below."""
    x = rng.uniform(0.5, 0.9, size=(n, 10)).astype(np.float32)
    first, second = rng.integers(0, 5, n), rng.integers(5, 10, n)
    x[np.arange(n), first] = x[np.arange(n), second] = 1.0
    x[np.arange(n), (first + 1) % 5] = np.nextafter(np.float32(1), np.float32(0))
    return (x,)


def _equal(values):
    return values, np.zeros(np.shape(values))


def _segments(rng, n):
    return rng.normal(size=(n, 6)).astype(np.float32), rng.integers(0, 7, n).astype(np.int32)


def _segments_exact(x, labels):
    members = (labels.astype(np.int64)[:, None] == np.arange(7)[None]).astype(float)
    return members.T @ x, members.T @ np.abs(x)


def _masked(rng, n):
    return rng.normal(size=(5, n)).astype(np.float32), rng.random((5, n)) < 0.7


def _masked_mean_exact(x, mask):
    kept = np.where(mask > 0, x, 0.0)
    count = np.maximum(np.sum(mask > 0, axis=1), 1)
    return np.sum(kept, axis=1) / count, np.sum(np.abs(kept), axis=1) / count


def _labelled(rng, n):
    return 3 * rng.normal(size=(n, 10)).astype(np.float32), rng.integers(0, 10, n).astype(np.int32)


def _log_softmax_exact(z):
    z = z - np.max(z, axis=1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))


def _cross_entropy(z, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1)[:, 0]


def _cross_entropy_exact(z, y):
    return -_log_softmax_exact(z)[np.arange(len(z)), y.astype(int)], 1 + np.max(np.abs(z), axis=1)


def _cross_entropy_gradient_exact(z, y):
    return np.exp(_log_softmax_exact(z)) - np.eye(10)[y.astype(int)], np.ones(z.shape)


def _images(rng, n):
    """n images of 9 x 9 x 5 and a kernel of 3 x 3 from 5 to 7 channels."""
    return rng.normal(size=(n, 9, 9, 5)).astype(np.float32), rng.normal(size=(3, 3, 5, 7)).astype(np.float32)


def _convolve(stride):
    def compute(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )

    return compute


def _windows(x, stride):
    """[B, H', W', C, 3, 3]: what the kernel sees at each place."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]


def _convolve_exact(stride):
    def exact(x, w):
        def product(x, w):
            return np.einsum("bhwcij,ijco->bhwo", _windows(x, stride), w)

        return product(x, w), product(np.abs(x), np.abs(w))

    return exact


def _upstream(shape):
    """A fixed gradient of the output: no two neighbours alike."""
    return np.cos(np.arange(np.prod(shape), dtype=np.float64) ** 1.1).reshape(shape)


def _convolve_gradient(stride, argument):
    convolve = _convolve(stride)

    def compute(x, w):
        shape = jax.eval_shape(convolve, x, w).shape
        upstream = jnp.asarray(_upstream(shape), jnp.float32)
        return jax.grad(lambda x, w: jnp.sum(convolve(x, w) * upstream), argument)(x, w)

    return compute


def _input_gradient_exact(stride):
    def exact(x, w):
        upstream = _upstream((*_windows(x, stride).shape[:3], w.shape[3]))

        def spread(upstream, w):
            found = np.zeros((len(x), x.shape[1] + 2, x.shape[2] + 2, x.shape[3]))
            height, width = upstream.shape[1:3]
            for i in range(3):
                for j in range(3):
                    rows, columns = (
                        slice(i, i + stride * height, stride),
                        slice(j, j + stride * width, stride),
                    )
                    found[:, rows, columns] += upstream @ w[i, j].T
            return found[:, 1:-1, 1:-1]

        return spread(upstream, w), spread(np.abs(upstream), np.abs(w))

    return exact


def _kernel_gradient_exact(stride):
    def exact(x, w):
        windows = _windows(x, stride)
        upstream = _upstream((*windows.shape[:3], w.shape[3]))

        def product(windows, upstream):
            return np.einsum("bhwcij,bhwo->ijco", windows, upstream)

        return product(windows, upstream), product(np.abs(windows), np.abs(upstream))

    return exact


def _moments(x):
    mean = jnp.mean(x, axis=(0, 1))
    return jnp.stack([mean, jnp.mean((x - mean[None, None]) ** 2, axis=(0, 1))])


def _moments_exact(x):
    magnitude = 1 + np.mean(x**2, axis=(0, 1))
    return np.stack([x.mean((0, 1)), x.var((0, 1))]), np.stack([magnitude, magnitude])


def _projected(x, delta):
    eps = jnp.float32(8 / 255)
    return jnp.clip(x + jnp.clip(delta, -eps, eps), 0.0, 1.0)


def _projected_exact(x, delta):
    eps = float(np.float32(8 / 255))
    return np.clip(x + np.clip(delta, -eps, eps), 0.0, 1.0), np.ones(x.shape)


def _running_sum(x):
    return lax.scan(lambda total, row: (total + row, total + row), jnp.zeros(x.shape[1:]), x)[1]


def _norms(x):
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2)))


def _dense_gradient(x, w):
    return jax.grad(lambda w: jnp.sum(jnp.tanh(_dot(x, w))))(w)


def _dense_gradient_exact(x, w):
    slope = 1 - np.tanh(x @ w) ** 2
    return x.T @ slope, np.abs(x.T) @ np.maximum(slope, 1e-2) + 1


_TALL = (*SMALL, *MIDDLE, *LARGE)
_SHORT = (*SMALL, *MIDDLE)
_FEW = (1, 8, 9)

PATTERNS = (
    Pattern("squared distances by difference", _TALL, _points(3),
            lambda x, mu: jnp.sum(_squares(x, mu), axis=2), lambda x, mu: _sum(_squares(x, mu), 2)),
    Pattern("squared distances by difference, wide", _SHORT, _points(65),
            lambda x, mu: jnp.sum(_squares(x, mu), axis=2), lambda x, mu: _sum(_squares(x, mu), 2)),
    Pattern("squared distances by product", _TALL, _points(3), _by_product, _by_product_exact),
    Pattern("squared distances by product, wide", _SHORT, _points(65), _by_product, _by_product_exact),
    Pattern("nearest centroid", _TALL, _points(3, k=2),
            lambda x, mu: jnp.min(jnp.sum(_squares(x, mu), axis=2), axis=1),
            lambda x, mu: (np.min(np.sum(_squares(x, mu), axis=2), axis=1), np.ones(len(x)))),
    Pattern("squares of a vmapped matrix-vector product", _TALL, _normal(lambda n: (n, 3), lambda n: (3, 3)),
            _quadratic_form, _quadratic_form_exact),
    Pattern("squares of a vmapped matrix-vector product, wide", _SHORT,
            _normal(lambda n: (n, 17), lambda n: (9, 17)), _quadratic_form, _quadratic_form_exact),
    Pattern("row sums of squares", _TALL, _normal(lambda n: (n, 3)),
            lambda x: jnp.sum(x**2, axis=1), lambda x: _sum(x**2, 1)),
    Pattern("column sums", _TALL, _normal(lambda n: (n, 5)),
            lambda x: jnp.sum(x, axis=0), lambda x: _sum(x, 0)),
    Pattern("log-sum-exp scores", _TALL, _points(3), _log_scores, _log_scores_exact),
    Pattern("log-sum-exp scores, wide", _SHORT, _points(33), _log_scores, _log_scores_exact),
    Pattern("argmax with near ties", _TALL, _near_ties, lambda x: jnp.argmax(x, axis=1),
            lambda x: _equal(np.argmax(x, axis=1))),
    Pattern("top-k", _SHORT, _normal(lambda n: (n, 23)), lambda x: lax.top_k(x, 9)[0],
            lambda x: _equal(-np.sort(-x, axis=1)[:, :9])),
    Pattern("top-k places", _SHORT, _near_ties, lambda x: lax.top_k(x, 3)[1],
            lambda x: _equal(np.argsort(-x, axis=1, kind="stable")[:, :3])),
    Pattern("sort", _TALL, _normal(lambda n: (n,)), jnp.sort, lambda x: _equal(np.sort(x))),
    Pattern("segment sums", _TALL, _segments,
            lambda x, i: jax.ops.segment_sum(x, i, num_segments=7), _segments_exact),
    Pattern("sums by one-hot product", _TALL, _segments, lambda x, i: _dot(jax.nn.one_hot(i, 7).T, x),
            _segments_exact),
    Pattern("masked means", _TALL, _masked,
            lambda x, mask: jnp.sum(jnp.where(mask, x, 0.0), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1),
            _masked_mean_exact),
    Pattern("cross entropy", _TALL, _labelled, _cross_entropy, _cross_entropy_exact),
    Pattern("gradient of cross entropy", _TALL, _labelled,
            jax.grad(lambda z, y: jnp.sum(_cross_entropy(z, y))), _cross_entropy_gradient_exact),
    Pattern("matrix product", _SHORT, _normal(lambda n: (n, 65), lambda n: (65, n)), _dot,
            lambda a, b: (a @ b, np.abs(a) @ np.abs(b))),
    Pattern("gradient through a matrix product", _SHORT, _normal(lambda n: (33, n), lambda n: (n, 7)),
            _dense_gradient, _dense_gradient_exact),
    Pattern("l2 norms", _SHORT, _normal(lambda n: (n, 9, 3)), _norms,
            lambda x: (np.sqrt(np.sum(x**2, axis=(1, 2))), 1 + np.sqrt(np.sum(x**2, axis=(1, 2))))),
    Pattern("projection to ball and box", _TALL,
            lambda rng, n: (rng.random((n, 3), np.float32), rng.normal(size=(n, 3)).astype(np.float32)),
            _projected, _projected_exact),
    Pattern("bytes to pixels", _TALL, lambda rng, n: (rng.integers(0, 256, (n, 3)).astype(np.uint8),),
            lambda x: x.astype(jnp.float32) / 255.0, lambda x: (x / 255.0, np.ones(x.shape))),
    Pattern("sums carried through a loop", _SHORT, _normal(lambda n: (n, 5)), _running_sum,
            lambda x: (np.cumsum(x, axis=0), 1 + np.cumsum(np.abs(x), axis=0))),
    Pattern("batch statistics", _SHORT, _normal(lambda n: (n, 5, 7)), _moments, _moments_exact),
    *(Pattern(f"{name}, stride {stride}", _FEW, _images, compute(stride), exact(stride))
      for stride in (1, 2)
      for name, compute, exact in (
          ("convolution", _convolve, _convolve_exact),
          ("input gradient of a convolution", lambda s: _convolve_gradient(s, 0), _input_gradient_exact),
          ("kernel gradient of a convolution", lambda s: _convolve_gradient(s, 1), _kernel_gradient_exact),
      )),
)  # fmt: skip
