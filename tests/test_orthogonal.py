"""The orthogonal network: its matrices, its convolution's symbol, and the whole against slow NumPy.

The symbol is that of what the layer does to impulses, not of what it says of itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustr_jax import lipschitz, models
from clustr_jax.models import orthogonal, unit

# Far above the rounding of float64 in matrices of this size, far below float32's.
EXACT = 1e-12


@pytest.fixture
def double():
    """float64 throughout."""
    with jax.enable_x64(True):
        yield


def slow_cayley(free):
    """(I - A) (I + A)^-1 above -2 V (I + A)^-1, by solving instead of inverting."""
    m = free.shape[1]
    u, v = free[:m], free[m:]
    a = u - u.T + v.T @ v
    eye = np.eye(m)
    return np.concatenate(
        [np.linalg.solve((eye + a).T, (eye - a).T).T, -2 * np.linalg.solve((eye + a).T, v.T).T]
    )


def slow_shift(x):
    """Pixel by pixel: an eighth of the channels each comes from above, below, left or right."""
    height, width, channels = x.shape
    part, moved = max(channels // 8, 1), np.empty_like(x)
    for h, w, c in np.ndindex(x.shape):
        group = c // part
        dh, dw = [(1, 0), (-1, 0), (0, 1), (0, -1)][group] if group < 4 else (0, 0)
        moved[h, w, c] = x[(h - dh) % height, (w - dw) % width, c]
    return moved


def slow_halved(x):
    """2 x 2 pixels to one: rows first."""
    height, width, channels = x.shape
    found = np.empty((height // 2, width // 2, 4 * channels))
    for h, w in np.ndindex(found.shape[:2]):
        found[h, w] = np.concatenate([x[2 * h + i, 2 * w + j] for i in (0, 1) for j in (0, 1)])
    return found


def slow_network(net, params, image):
    """The embedding of one image, in float64."""
    x, number = image - np.array(net.module.mean), 0
    for number, (kind, features, _) in enumerate(net.module.plan(net.input_shape)):
        if kind == "space_to_depth":
            x = slow_halved(x)
        elif kind == "flatten":
            x = x.reshape(1, 1, -1)
        elif kind == "pad":
            x = np.concatenate([x, np.zeros((*x.shape[:2], features - x.shape[2]))], axis=2)
        else:
            layer = {name: np.float64(value) for name, value in params[f"layer_{number}"].items()}
            x = slow_shift(x) if kind == "orthogonal" else x
            x = x @ slow_cayley(layer["free"]) + layer["bias"]
            if kind == "orthogonal":
                x[..., : features // 2] = np.abs(x[..., : features // 2])
    return x.ravel()


def images_network(width=4, side=8):
    net = models.build(
        "lip_orthogonal",
        num_classes=3,
        width=width,
        input_shape=(side, side, 3),
        mean=(0.4, 0.5, 0.6),
        std=(1.0,),
    )
    return net, jax.jit(net.init)(jax.random.key(0))


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 9), st.sampled_from([0.0, 0.1, 1.0, 30.0]))
def test_cayley_is_the_formula_and_orthonormal(seed, m, more, scale):
    free = scale * np.random.default_rng(seed).standard_normal((m + more, m))
    expected = slow_cayley(free)
    np.testing.assert_allclose(expected.T @ expected, np.eye(m), atol=1e-9)
    with jax.enable_x64(True):
        found = np.asarray(unit.cayley(jnp.asarray(free)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(found.T @ found, np.eye(m), atol=1e-9)


def singular_values(channels, features, side, shift=True, seed=0):
    """Of a fresh layer's symbol at every frequency, from its answers to impulses in two opposite corners.

    [2, side, side, min(C, O)]: for a convolution on the torus both are the same.
    """
    layer = orthogonal.Orthogonal(features, shift=shift)
    impulses = np.zeros((2, channels, side, side, channels))
    impulses[0, np.arange(channels), 0, 0, np.arange(channels)] = 1
    impulses[1, np.arange(channels), -1, -1, np.arange(channels)] = 1
    impulses = jnp.asarray(impulses.reshape(-1, side, side, channels))
    variables = layer.init(jax.random.key(seed), impulses)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), variables["params"])
    answers = np.asarray(layer.apply({"params": params}, impulses)).reshape(2, channels, side, side, features)
    assert answers.dtype == np.float64
    symbol = np.fft.fft2(answers, axes=(2, 3)).transpose(0, 2, 3, 4, 1)
    return np.linalg.svd(symbol, compute_uv=False)


@pytest.mark.parametrize(("channels", "features"), [(8, 8), (16, 16), (5, 5), (3, 3), (16, 6)])
@pytest.mark.parametrize("side", [1, 2, 4, 5])
@pytest.mark.one_in(4)
def test_the_symbol_is_unitary_at_every_frequency(double, channels, features, side):
    """All singular values are 1: the circular convolution keeps norms, or those of its range."""
    np.testing.assert_allclose(singular_values(channels, features, side), 1.0, atol=EXACT)


def _zeros_moved_in(x):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return padded[:, :-2, 1:-1]


BROKEN = {
    "a free matrix": ("cayley", lambda free: free),
    "half of Cayley": (
        "cayley",
        lambda free: 2 * jnp.linalg.inv(jnp.eye(len(free)) + free) - jnp.eye(len(free)),
    ),
    "zeros moved in": ("shifted", _zeros_moved_in),
    "an average": ("shifted", lambda x: (x + jnp.roll(x, 1, axis=1)) / 2),
    "a sum": ("shifted", lambda x: x + jnp.roll(x, 1, axis=1)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_layer_is_found_out(double, monkeypatch, fault):
    """The control of the test above."""
    name, broken = BROKEN[fault]
    monkeypatch.setattr(unit if name == "cayley" else orthogonal, name, broken)
    assert np.abs(singular_values(8, 8, 4) - 1).max() > 1e-3


def test_it_is_a_convolution(double, rng):
    """Of a moved image, the moved answer: the symbol says all of it."""
    x = jnp.asarray(rng.standard_normal((2, 4, 6, 8)))
    layer = orthogonal.Orthogonal(8)
    variables = layer.init(jax.random.key(0), x)
    for move in ((1, 0), (0, 1), (3, 2)):
        found = layer.apply(variables, jnp.roll(x, move, axis=(1, 2)))
        np.testing.assert_allclose(found, jnp.roll(layer.apply(variables, x), move, axis=(1, 2)), atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_fold_is_maxmin_turned_by_45_degrees_and_moves_nothing_apart(seed, channels):
    rng = np.random.default_rng(seed)
    x, y = np.float32(rng.standard_normal((2, 5, channels)))
    folded = np.asarray(orthogonal.fold(jnp.asarray(x)))
    np.testing.assert_allclose(np.linalg.norm(folded, axis=1), np.linalg.norm(x, axis=1), rtol=1e-6)
    apart = np.linalg.norm(folded - orthogonal.fold(jnp.asarray(y)), axis=1)
    assert (apart <= np.linalg.norm(x - y, axis=1) * (1 + 1e-6)).all()
    a, b = x[:, :1], x[:, -1:]
    turned = np.concatenate([a - b, a + b], axis=1) / np.sqrt(2)
    turned = np.asarray(orthogonal.fold(jnp.asarray(turned)))
    d, s = turned[:, 0], turned[:, 1]
    np.testing.assert_allclose(np.maximum(a, b)[:, 0], (s + d) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(np.minimum(a, b)[:, 0], (s - d) / np.sqrt(2), atol=1e-6)


@pytest.mark.parametrize(("width", "side"), [(4, 8), (8, 16), (20, 8)])
@pytest.mark.one_in(3)
def test_the_network_is_the_slow_one(rng, width, side):
    net, variables = images_network(width, side)
    params = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), variables["params"]
    )
    x = rng.uniform(size=(2, side, side, 3))
    outputs = net.eval({"params": params, "batch_stats": {}}, jnp.float32(x))
    for image, found in zip(x, np.asarray(outputs.embeddings), strict=True):
        np.testing.assert_allclose(found, slow_network(net, params, image), atol=1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.one_in(3)
def test_its_bound_is_1_whatever_its_weights_and_a_jacobian_comes_near(scale):
    net, variables = images_network()
    scaled = {"params": jax.tree.map(lambda a: scale * a, variables["params"]), "batch_stats": {}}
    upper = lipschitz.bound(net.describe(scaled), net.input_shape)
    assert 1 < upper <= 1 + 1e-4  # float32, of matrices far from well conditioned too
    x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
    lower = lipschitz.jacobian_norm(lambda x: net.eval(scaled, x).embeddings, x, steps=50).max()
    assert 0.9 < lower <= upper


def test_a_matrix_that_stretches_is_charged_for_it(monkeypatch):
    net, variables = images_network()
    layers = net.describe(variables)
    place = next(i for i, (kind, *_) in enumerate(layers) if kind == "pointwise")
    layers[place] = ("pointwise", 2 * layers[place][1])
    assert lipschitz.bound(layers, net.input_shape) == pytest.approx(2, rel=1e-4)


def test_gradients_keep_their_norm_to_the_last_reduction():
    """What the layers are for: of a random direction behind the folds nothing is lost on the way back."""
    layer = orthogonal.Orthogonal(16)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 16))
    variables = layer.init(jax.random.key(1), x)
    outputs, backward = jax.vjp(lambda x: orthogonal.fold(layer.apply(variables, x)), x)
    direction = jax.random.normal(jax.random.key(2), outputs.shape)
    np.testing.assert_allclose(
        np.linalg.norm(np.reshape(backward(direction)[0], (3, -1)), axis=1),
        np.linalg.norm(np.reshape(direction, (3, -1)), axis=1),
        rtol=1e-5,
    )
