"""Lipschitz bounds against explicit matrices, whole networks against their own Jacobians, and the plane."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.tree_util import Partial

import reference_certify as reference
from clustr_jax import lipschitz, models
from clustr_jax.models import convolution, unit
from marks import in_ci

# Rounding of float64 against float64: a bound may not be below the truth by more.
DOWN = 1 - 1e-12


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_dense_is_the_largest_singular_value(seed, rows, columns):
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    expected = reference.largest_singular_value(matrix)
    assert lipschitz.dense(matrix) == pytest.approx(expected, rel=1e-12)


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 5]), st.integers(1, 3), st.integers(0, 3),
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 7), st.integers(2, 7),
)  # fmt: skip
def test_conv_is_never_below_the_matrix(seed, k, stride, padding, channels, features, height, width):
    """Any kernel, stride, padding, channels and size, symmetric or not."""
    assume(min(height, width) + 2 * padding >= k)
    kernel = np.random.default_rng(seed).standard_normal((k, k, channels, features))
    true = reference.largest_singular_value(
        reference.convolution_matrix(kernel, height, width, stride, padding)
    )
    assert lipschitz.conv(kernel, (height, width), stride=stride, padding=padding) >= true * DOWN


@pytest.mark.parametrize(("stride", "size"), [(1, 6), (1, 7), (1, 9), (2, 8), (2, 9), (2, 10)])
def test_conv_is_at_most_a_quarter_above_the_matrix(stride, size):
    """3x3, padding 1: stride 1 from 6x6 on, stride 2 (aliased frequencies) from 8x8 on."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(20):
        kernel = rng.standard_normal((3, 3, *rng.integers(1, 4, 2)))
        true = reference.largest_singular_value(reference.convolution_matrix(kernel, size, size, stride, 1))
        ratios.append(lipschitz.conv(kernel, (size, size), stride=stride, padding=1) / true)
    assert min(ratios) >= DOWN and max(ratios) <= 1.25


def test_a_torus_of_the_image_s_own_size_is_no_bound():
    """The control: kernel [-1, 2, -1], 3 pixels, padding 1: 3.0 on 3 frequencies, 3.414 in truth."""
    kernel = np.zeros((3, 3, 1, 1))
    kernel[1, :, 0, 0] = [-1, 2, -1]
    true = reference.largest_singular_value(reference.convolution_matrix(kernel, 3, 3, 1, 1))
    assert true == pytest.approx(2 + np.sqrt(2))
    assert np.abs(np.fft.fft2(kernel[:, :, 0, 0], s=(3, 3))).max() == pytest.approx(3.0)
    assert lipschitz.conv(kernel, (3, 3), padding=1) == pytest.approx(4.0)


def test_the_network_s_own_convolution_is_the_matrix():
    """The reference matrix is what `conv2d` does, stride and padding included."""
    rng = np.random.default_rng(0)
    for k, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 2, 0)):
        kernel, x = rng.standard_normal((k, k, 2, 3)), rng.standard_normal((1, 6, 5, 2))
        matrix = reference.convolution_matrix(kernel, 6, 5, stride, padding)
        found = convolution.conv2d(jnp.float32(x), jnp.float32(kernel), stride, padding)
        np.testing.assert_allclose(np.ravel(found), matrix @ x.ravel(), atol=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 2), (3, 2), (3, 3), (3, 1), (2, 3)])
def test_average_pool_is_never_below_the_matrix(window, stride):
    kernel = np.ones((window, window, 1, 1)) / window**2
    true = reference.largest_singular_value(reference.convolution_matrix(kernel, 9, 9, stride, 0))
    constant, size = lipschitz.LAYERS["average_pool"]((9, 9), window, stride)
    assert true * DOWN <= constant <= 1.0 and size == ((9 - window) // stride + 1,) * 2


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 2), (3, 1), (3, 3)])
def test_max_pool_is_never_below_a_pixel_s_share(window, stride):
    """Raising one pixel from the floor raises every window it is in: sqrt(windows) x the change."""
    constant, _ = lipschitz.LAYERS["max_pool"]((9, 9), window, stride)
    pooled = []
    for i in range(9):
        image = np.zeros((9, 9))
        image[i, i] = 1.0
        starts = range(0, 9 - window + 1, stride)
        pooled.append(sum(image[a : a + window, b : b + window].max() for a in starts for b in starts))
    assert constant == pytest.approx(np.sqrt(max(pooled)))


def test_mean_and_scale():
    assert lipschitz.bound([("mean",)], (4, 4, 7)) == pytest.approx(1 / 4, rel=2e-6)
    assert lipschitz.bound([("scale", 1 / np.array([0.2, 0.5]))], (2,)) == pytest.approx(5.0, rel=2e-6)


def test_the_final_bound_is_rounded_up():
    assert lipschitz.bound([("dense", np.eye(3))], (3,)) > 1.0


# Whole networks.

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = dict(num_classes=3, width=4, input_shape=(8, 8, 3), mean=MEAN, std=STD)
SETTINGS = {
    "resnet8": IMAGES,
    "resnet18": IMAGES | {"width": 2},
    "cnn": IMAGES,
    "mlp": dict(num_classes=3, width=6, input_shape=(2,), mean=(0.0,), std=(0.5,)),
    "lip_sll": IMAGES | {"std": (1.0,)},
    "lip_aol": IMAGES | {"std": (1.0,)},
    "lip_cpl": IMAGES | {"std": (1.0,)},
    "lip_orthogonal": IMAGES | {"std": (1.0,)},
}


@functools.cache
def setup(name, seed=0, scale=1.0):
    """A small network with random running statistics and biases, its embedding function, and inputs."""
    settings = SETTINGS[name]
    net = models.build(name, **settings)
    variables = jax.jit(net.init)(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        scale * a + 0.1 * jnp.abs(jax.random.normal(k, a.shape)) for a, k in zip(leaves, keys, strict=True)
    ]
    variables = jax.tree.unflatten(structure, leaves)
    x = jax.random.uniform(jax.random.key(seed + 2), (12, *settings["input_shape"]))
    return net, variables, Partial(jax.jit(lambda v, x: net.eval(v, x).embeddings), variables), x


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", in_ci(["cnn", "mlp", "lip_sll", "lip_aol", "lip_cpl", "lip_orthogonal"], "cnn", "mlp", "lip_sll")
)
def test_the_bound_is_above_explicit_jacobians(name):
    """The sandwich: largest singular value of explicit Jacobians <= bound, and jacobian_norm finds it."""
    net, variables, f, x = setup(name)
    upper = lipschitz.bound(net.describe(variables), net.input_shape)
    jacobians = jax.jit(jax.vmap(jax.jacrev(lambda one: f(one[None])[0])))(x)
    matrices = np.asarray(jacobians, np.float64).reshape(*jacobians.shape[:2], -1)
    true = np.array([reference.largest_singular_value(m) for m in matrices])
    lower = lipschitz.jacobian_norm(f, x, steps=50)
    assert np.isfinite(upper) and true.max() <= upper
    assert (lower <= true * (1 + 1e-6)).all() and (lower >= 0.9 * true).all()


@pytest.mark.more
@pytest.mark.parametrize("name", in_ci(["resnet8", "resnet18"], "resnet8"))
def test_the_bound_of_a_resnet_is_above_its_lower_bound(name):
    """Explicit Jacobians would take minutes to compile."""
    net, variables, f, x = setup(name)
    upper = lipschitz.bound(net.describe(variables), net.input_shape)
    assert 0 < lipschitz.jacobian_norm(f, x).max() <= upper < np.inf


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_no_two_inputs_are_moved_apart_by_more_than_the_bound(name):
    net, variables, f, x = setup(name)
    upper = lipschitz.bound(net.describe(variables), net.input_shape)
    z = np.asarray(f(x), np.float64)
    for distance in (1e-2, 1.0):
        y = x + distance * jax.random.normal(jax.random.key(9), x.shape)
        moved = np.linalg.norm(np.asarray(f(y), np.float64) - z, axis=1)
        assert (moved <= upper * np.linalg.norm(np.asarray(y - x).reshape(len(x), -1), axis=1) + 1e-5).all()


@pytest.mark.more
@pytest.mark.parametrize("name", ["lip_sll", "lip_aol"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_unit_networks_have_constant_1_whatever_their_weights(name, scale):
    """Weights far from the initial ones too."""
    net, variables, _, _ = setup(name, scale=scale)
    assert lipschitz.bound(net.describe(variables), net.input_shape) <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", in_ci(["lip_sll", "lip_aol", "lip_cpl"], "lip_aol"))
def test_a_fresh_unit_network_does_not_have_it_by_being_flat(name):
    """The sandwich of the constant is narrow: between 0.5 and 1 for AOL and SLL.

    CPL's estimate of its norms has not begun to converge: the bound says so.
    """
    net = models.build(name, **SETTINGS["lip_sll"])
    variables = jax.jit(net.init)(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
    lower = lipschitz.jacobian_norm(
        Partial(lambda v, x: net.eval(v, x).embeddings, variables), x, steps=50
    ).max()
    upper = lipschitz.bound(net.describe(variables), net.input_shape)
    assert 0.5 < lower <= upper
    assert upper <= 1 + 1e-5 or name == "lip_cpl"


@pytest.mark.more
def test_cpl_converges_to_constant_1_within_a_few_training_steps():
    """Its bound is honest before (far above 1) and after (within 1 % for 100 passes in train mode)."""
    net = models.build("lip_cpl", **SETTINGS["lip_sll"])
    variables = jax.jit(net.init)(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
    before = lipschitz.bound(net.describe(variables), net.input_shape)
    step = jax.jit(lambda v: net.train(v, x)[1])
    for _ in range(100):
        variables = {**variables, "batch_stats": step(variables)}
    after = lipschitz.bound(net.describe(variables), net.input_shape)
    assert before > 2 and after < 1.01


@pytest.mark.more
def test_dividing_by_the_std_costs_its_inverse():
    """The same network with std 0.2: five times the constant."""
    net, variables, _, _ = setup("lip_sll")
    scaled = models.build("lip_sll", **SETTINGS["lip_sll"] | {"std": (0.2,)})
    one, five = (lipschitz.bound(n.describe(variables), n.input_shape) for n in (net, scaled))
    assert five == pytest.approx(5 * one)


def test_batch_norm_is_folded_before_the_bound():
    """Doubling a batch norm's scale doubles its convolution's constant: the stem's, and with it the bound."""
    net, variables, _, _ = setup("cnn")
    before = lipschitz.bound(net.describe(variables), net.input_shape)
    params = jax.tree.map(lambda a: a, variables["params"])
    params["BatchNorm_0"]["scale"] = 2 * params["BatchNorm_0"]["scale"]
    after = lipschitz.bound(net.describe({**variables, "params": params}), net.input_shape)
    assert after == pytest.approx(2 * before)


def test_a_residual_block_is_the_sum_of_its_sides():
    identity, double = ("dense", np.eye(2)), ("dense", 2 * np.eye(2))
    assert lipschitz.bound([("sum", [], [double])], (2,)) == pytest.approx(3.0, rel=2e-6)
    assert lipschitz.bound([("sum", [identity], [double, double])], (2,)) == pytest.approx(5.0, rel=2e-6)


# The layers with constant 1.


@given(st.integers(0, 10**6), st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 4))
def test_aol_scales_any_kernel_to_norm_1(seed, k, channels, features):
    """The explicit matrix on 5x5 pixels; 1e-6 for float32. And an orthogonal kernel keeps its norm."""
    kernel = np.float32(np.random.default_rng(seed).standard_normal((k, k, channels, features)))
    scaled = np.float64(unit.aol(jnp.asarray(kernel)))
    matrix = reference.convolution_matrix(scaled, 5, 5, 1, k // 2)
    assert 0.1 < reference.largest_singular_value(matrix) <= 1 + 1e-6


def test_aol_leaves_an_orthogonal_kernel_alone():
    kernel = unit.orthogonal_centre(jax.random.key(0), (3, 3, 4, 6))
    np.testing.assert_allclose(unit.aol(kernel), kernel, atol=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_sll_has_an_exact_jacobian_of_norm_at_most_1(seed, channels, features):
    """I - 2 W^T T^-1 S W for every pattern S of the ReLUs that was tried, on 4x4 pixels."""
    rng = np.random.default_rng(seed)
    kernel, log_q = np.float32(rng.standard_normal((3, 3, channels, features))), rng.standard_normal(features)
    scale = np.float64(unit.sll_scale(jnp.asarray(kernel), jnp.float32(log_q)))
    w = reference.convolution_matrix(np.float64(kernel), 4, 4, 1, 1)
    for _ in range(5):
        on = rng.integers(0, 2, w.shape[0])
        jacobian = np.eye(w.shape[1]) - 2 * w.T @ np.diag(np.tile(scale, 16) * on) @ w
        assert reference.largest_singular_value(jacobian) <= 1 + 1e-6


def test_an_sll_layer_with_a_wrong_t_is_charged_for_it():
    """The control: T halved gives |W| > T and a bound above 1, and a Jacobian that really exceeds 1."""
    kernel = np.float64(np.random.default_rng(0).standard_normal((1, 1, 3, 3)))
    w = kernel[0, 0].T
    scale = 2.5 / np.linalg.norm(w, 2) ** 2 * np.ones(3)  # T^-1 beyond |W W^T|^-1
    true = reference.largest_singular_value(np.eye(3) - 2 * w.T @ np.diag(scale) @ w)
    assert true > 1
    assert lipschitz.bound([("sll", kernel, scale, 0)], (1, 1, 3)) >= true


@given(st.integers(0, 10**6), st.integers(1, 7))
def test_maxmin_and_space_to_depth_keep_norms(seed, channels):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 4, 6, channels)), jnp.float32)
    for y in (unit.maxmin(x), unit.space_to_depth(x), unit.pad_channels(x, 9)):
        np.testing.assert_allclose(np.sort(np.ravel(y[y != 0])), np.sort(np.ravel(x)), atol=0)
    assert unit.space_to_depth(x).shape == (2, 2, 3, 4 * channels)
    np.testing.assert_array_equal(unit.space_to_depth(x)[0, 0, 0, :channels], x[0, 0, 0])


@pytest.mark.more
def test_batch_activation_variance_does_not_grow_through_unit_layers():
    """Prach et al. 2024: a quick check that would catch a layer that expands."""
    for name in ("lip_sll", "lip_aol"):
        _, _, f, x = setup(name)
        before = np.var(np.asarray(x).reshape(len(x), -1), axis=0).sum()
        assert np.var(np.asarray(f(x)), axis=0).sum() <= before * (1 + 1e-5)


@pytest.mark.parametrize("name", ["lip_sll", "lip_aol", "lip_orthogonal"])
def test_images_that_cannot_be_halved_three_times_are_refused(name):
    with pytest.raises(ValueError, match="multiples of 8"):
        models.build(name, **IMAGES | {"input_shape": (12, 8, 3)})


# The plane.


def random_mlp(seed, hidden=6):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, hidden)), rng.standard_normal(hidden), rng.standard_normal((hidden, 3))


def jacobian_at(weights, x):
    first, bias, second = weights
    return second.T @ np.diag(x @ first + bias > 0) @ first.T


def test_every_region_of_the_plane_is_found():
    """All patterns on a fine grid are found, and in general position as many regions as there are.

    h lines cut the plane into 1 + h + h (h - 1) / 2 regions.
    """
    first, bias, _ = random_mlp(0)
    found = {tuple(p) for p in lipschitz.regions(first, bias)}
    assert len(found) == 1 + 6 + 15
    grid = np.stack(np.meshgrid(np.linspace(-30, 30, 1001), np.linspace(-30, 30, 1001)), -1).reshape(-1, 2)
    seen = {tuple(p) for p in np.unique(grid @ first + bias > 0, axis=0)}
    assert seen <= found


def test_parallel_lines_and_dead_units_are_no_trouble():
    first, bias = np.array([[1.0, 1.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), np.array([0.0, 1.0, 4.0, 1.0])
    found = {tuple(p) for p in lipschitz.regions(first, bias)}
    assert found == {
        (False, False, True, True),
        (False, True, True, True),
        (True, True, True, True),
        (True, True, False, True),
    }


@given(st.integers(0, 10**6))
def test_the_constant_on_the_plane_is_the_largest_jacobian(seed):
    """At least the Jacobian of every sampled point, and attained at a point of some region.

    A region is left out of the comparison where it is too small to be hit.
    """
    weights = random_mlp(seed, hidden=4)
    points = (
        np.random.default_rng(seed).standard_normal((4000, 2)) * np.repeat([0.5, 2, 10, 100], 1000)[:, None]
    )
    sampled = max(reference.largest_singular_value(jacobian_at(weights, x)) for x in points[::4])
    assert lipschitz.planar(*weights) >= sampled * DOWN


@pytest.mark.parametrize("scale", [1.0, 3.0, -2.0])
def test_units_on_one_line_turn_on_together(scale, rng):
    """Or one instead of the other: regions of units that share a line, among others that do not."""
    first, bias, second = (
        np.array([[1.0, scale], [0.5, 0.5 * scale]]),
        np.array([-1.0, -scale]),
        np.ones((2, 1)),
    )
    both = {(0, 0), (1, 1)} if scale > 0 else {(0, 1), (1, 0)}
    found = {tuple(p) for p in lipschitz.regions(first, bias).astype(int)}
    assert found >= both and len(found) <= 3  # the origin's own, if it is on the line
    slope = 1 + scale if scale > 0 else max(1, -scale)
    assert lipschitz.planar(first, bias, second) == pytest.approx(slope * np.hypot(1, 0.5))
    w, b = rng.normal(size=(2, 5)), rng.normal(size=5)
    w, b = np.concatenate([w, scale * w[:, :1]], axis=1), np.append(b, scale * b[0])
    x = rng.normal(size=(20_000, 2)) * 3
    sampled = {tuple(p) for p in x @ w + b > 0}
    assert sampled <= {tuple(p) for p in lipschitz.regions(w, b)}


@given(st.integers(0, 10**6), st.floats(0.01, 3.0))
def test_the_constant_on_a_ball_lies_between_its_samples_and_the_plane(seed, radius):
    """Regions on a dense polar grid of the ball are all found; more are possible where they are tiny."""
    weights = random_mlp(seed)
    centre = np.random.default_rng(seed + 1).standard_normal(2)
    local = lipschitz.planar(*weights, centre, radius)
    found = {tuple(p) for p in lipschitz.regions(*weights[:2], centre, radius)}
    angle, length = np.meshgrid(np.linspace(0, 2 * np.pi, 200), np.linspace(0, 0.9999, 60) * radius)
    points = centre + np.stack([length * np.cos(angle), length * np.sin(angle)], -1).reshape(-1, 2)
    seen = {tuple(p) for p in np.unique(points @ weights[0] + weights[1] > 0, axis=0)}
    assert seen <= found
    assert local <= lipschitz.planar(*weights) * (1 + 1e-12)
    # no region outside the ball is counted: each one's centre piece is within it
    assert len(found) <= len({tuple(p) for p in lipschitz.regions(*weights[:2])})


def test_a_ball_inside_one_region_has_that_region_s_constant():
    weights = random_mlp(3)
    x = np.array([0.3, -0.2])
    lines = np.abs(x @ weights[0] + weights[1]) / np.linalg.norm(weights[0], axis=0)
    local = lipschitz.planar(*weights, x, 0.99 * lines.min())
    assert local == pytest.approx(reference.largest_singular_value(jacobian_at(weights, x)))
    assert len(lipschitz.regions(*weights[:2], x, 1.01 * lines.min())) == 2
