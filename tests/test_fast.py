"""The fast network and its recipe, each part against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from clustr_jax import data, lipschitz, losses, models
from clustr_jax.models import fast
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import Recipe
from clustr_jax.training import train, trainers
from linear_problems import problem
from small_training import get_config

NET = dict(num_classes=3, width=4, input_shape=(16, 16, 3), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def test_whitened_patches_have_unit_covariance(rng):
    """value / (value + 5e-4) along each principal direction: 1 but for those that hardly vary."""
    mixing = rng.normal(size=(12, 12))
    patches = rng.normal(size=(5000, 12)) @ mixing
    columns = fast.whitening(patches)
    assert columns.shape == (12, 24)
    np.testing.assert_array_equal(columns[:, 12:], -columns[:, :12])
    white = patches @ columns[:, :12]
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    expected = np.diag(values / (values + 5e-4))
    np.testing.assert_allclose(white.T @ white / len(white), expected, atol=1e-9)
    flat = np.concatenate([patches[:, :11], patches[:, :1]], axis=1)  # one direction that never varies
    assert np.isfinite(fast.whitening(flat)).all()


@pytest.mark.more
def test_the_network_takes_its_first_kernel_from_the_images(rng):
    """Patches as a convolution cuts them: its outputs have unit variance, and pairs cancel."""
    net = models.build("fast", **NET)
    images = rng.random((40, 16, 16, 3)).astype(np.float32)
    fresh = net.init(jax.random.key(0))
    variables = net.fitted(fresh, images)
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)
    np.testing.assert_array_equal(
        variables["params"]["conv_0_0"]["kernel"], fresh["params"]["conv_0_0"]["kernel"]
    )
    kernel = np.asarray(variables["batch_stats"]["first"]["kernel"])
    x = (images - np.float32(NET["mean"])) / np.float32(NET["std"])
    out = np.asarray(
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    np.testing.assert_allclose(np.mean(np.square(out[..., :12]), axis=(0, 1, 2)), 1.0, atol=1e-2)
    np.testing.assert_allclose(out[..., 12:], -out[..., :12], atol=1e-5)
    plain = models.build("fast_plain", **NET)
    variables = plain.init(jax.random.key(0))
    assert plain.fitted(variables, images) is variables


@pytest.mark.parametrize(("side", "window"), [(9, 2), (8, 2), (7, 3), (3, 3)])
def test_max_pool_and_its_gradient_are_those_of_flax(side, window, rng):
    """With ties as well (whole numbers): the first of equal maxima has the gradient."""
    for x in (rng.normal(size=(4, side, side, 5)), rng.integers(0, 3, size=(4, side, side, 5))):
        x = jnp.asarray(x, jnp.float32)
        ours, back = jax.vjp(lambda x: fast.max_pool(x, window), x)
        theirs, expected = jax.vjp(lambda x: nn.max_pool(x, (window, window), (window, window)), x)
        dy = jnp.asarray(rng.normal(size=ours.shape), jnp.float32)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(back(dy)[0], expected(dy)[0])


@pytest.mark.parametrize("shape", [(2, 300), (300, 2), (6, 513)])
def test_max_pool_of_long_sides(shape, rng):
    """The places are counted beyond 256, also where a square is no power of two."""
    for window in (2, 3):
        x = jnp.asarray(rng.normal(size=(1, *(max(side, window) for side in shape), 2)), jnp.float32)
        ours, back = jax.vjp(lambda x, w=window: fast.max_pool(x, w), x)
        theirs, expected = jax.vjp(lambda x, w=window: nn.max_pool(x, (w, w), (w, w)), x)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(back(jnp.ones_like(ours))[0], expected(jnp.ones_like(ours))[0])


def test_the_first_filters_start_as_the_identity(rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    layer = fast.DiracConv(6)
    out = layer.apply(layer.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(out[..., :3], x, atol=1e-6)
    assert np.abs(out[..., 3:]).max() > 0.1


def test_the_constant_of_gelu():
    """sup |GELU'|, on a fine grid: the bound lies above and near."""
    x = jnp.linspace(-6, 6, 100_001)
    slope = np.abs(jax.vmap(jax.grad(lambda v: nn.gelu(v, approximate=False)))(x)).max()
    assert fast.GELU_LIPSCHITZ - 1e-4 < slope < fast.GELU_LIPSCHITZ


@pytest.mark.more
@pytest.mark.parametrize("name", ["fast", "fast_plain"])
def test_the_lipschitz_bound_is_above_the_jacobian(name):
    net = models.build(name, **NET)
    variables = net.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    f = Partial(jax.jit(lambda v, x: net.eval(v, x).embeddings), variables)
    upper = lipschitz.bound(net.describe(variables), net.input_shape)
    assert 0 < lipschitz.jacobian_norm(f, x).max() <= upper < np.inf


def test_images_that_are_too_small():
    for name, side in models.LEAST_SIDE.items():
        models.build(name, **NET | {"input_shape": (side, side, 3)})
        with pytest.raises(UserError, match=str(side)):
            models.build(name, **NET | {"input_shape": (side - 1, 32, 3)})


# The recipe.


def test_alternating_flips_turn_each_image_in_every_other_epoch():
    ids = jnp.arange(500)
    turned = np.array([train.alternating_flips(jax.random.key(0), epoch, ids) for epoch in range(4)])
    assert 0.4 < turned[0].mean() < 0.6
    np.testing.assert_array_equal(turned[1], ~turned[0])
    np.testing.assert_array_equal(turned[2:], turned[:2])
    np.testing.assert_array_equal(train.alternating_flips(jax.random.key(0), 0, ids[::-1]), turned[0][::-1])


def test_translations_are_windows_of_the_mirrored_image(rng):
    """Each result is one of the 25 windows of the padded image, turned where it was asked for."""
    images = rng.integers(0, 256, size=(30, 6, 6, 2)).astype(np.uint8)
    flips = np.arange(30) % 2 == 1
    moved = np.asarray(data.translate_flip(jax.random.key(0), jnp.asarray(images), jnp.asarray(flips)))
    places = set()
    for image, turned, found in zip(images, flips, moved, strict=True):
        padded = np.pad(image[:, ::-1] if turned else image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        fits = [(i, j) for i in range(5) for j in range(5) if (padded[i : i + 6, j : j + 6] == found).all()]
        assert fits
        places.update(fits)
    assert len(places) > 10


def test_a_run_turns_every_image_once_in_two_epochs(rng):
    """Through `TrainSet.batch` and the step's own order: what `seen` shows of the same image, both ways."""
    images = rng.integers(0, 256, size=(8, 8, 8, 1)).astype(np.uint8)
    images[:] = images[:, :1, :, :]  # rows are alike: a shift up or down changes nothing
    p = problem("nominal", rng, images=images, labels=np.arange(8) % 2, **{
        "data.augment": "translate_alternate", "train.batch_size": 8, "train.epochs": 4,
    })  # fmt: skip
    centre = {}
    for epoch in range(2):
        state = p.state.replace(step=jnp.int32(epoch))
        batch, ids, _ = train.seen(p.trainer, state, p.train_set, p.order, p.key)
        for i, x in zip(np.asarray(ids), np.asarray(batch.x), strict=True):
            row = np.pad(images[i, 0, :, 0] / np.float32(255), 2, mode="reflect")
            windows = [row[j : j + 8] for j in range(5)]
            kept = any(np.allclose(x[0, :, 0], w, atol=1e-6) for w in windows)
            turned = any(np.allclose(x[0, :, 0], w[::-1], atol=1e-6) for w in windows)
            assert kept != turned
            centre.setdefault(int(i), []).append(turned)
    assert all(sorted(seen) == [False, True] for seen in centre.values()) and len(centre) == 8


@pytest.mark.parametrize("every", [2, 4])  # the last step is one of theirs, or none
def test_lookahead_by_hand(every, rng):
    """Slow weights after Zhang et al.: every so many steps they move, at the end they are the result."""
    total = 6
    p = problem("nominal", rng, **{"train.lookahead": every, "train.epochs": 1, "train.batch_size": 6})
    plain = problem("nominal", np.random.default_rng(0), **{"train.epochs": 1, "train.batch_size": 6})
    assert p.trainer.recipe.epochs * p.trainer.steps_per_epoch == total
    assert plain.state.slow is None
    fast_weights = [{"w": float(v)} for v in rng.normal(size=total)]
    slow, state = 0.0, p.state.replace(slow={"params": {"w": jnp.float32(0)}, "batch_stats": {}})
    for step, weights in enumerate(fast_weights, start=1):
        state = state.replace(params={"w": jnp.float32(weights["w"])}, batch_stats={})
        state = train.looked_ahead(every, step, total, state)
        expected = weights["w"]
        if step % every == 0:
            keep = 0.95**every * (step / total) ** 3
            slow = keep * slow + (1 - keep) * weights["w"]
        if step % every == 0 or step == total:
            expected = slow
        np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)
    end = p.run(total)
    for a, b in zip(jax.tree.leaves(end.params), jax.tree.leaves(end.slow["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # one value, rounded in two programs


def test_biases_of_batch_norm_have_a_rate_of_their_own(rng):
    """64 times the step on the gradient; the decay per step stays what it was."""
    recipe = get_config("nominal", **{
        "train.optimizer": "sgd", "train.norm_bias_rate": 64.0, "train.weight_decay": 0.1,
        "train.momentum": 0.0, "train.nesterov": False,
    }).train  # fmt: skip
    params = {"norm_0": {"bias": 2.0}, "BatchNorm_1": {"bias": 3.0}, "head": {"bias": 4.0, "kernel": 5.0}}
    params = jax.tree.map(jnp.float32, params)
    gradient = jax.tree.map(jnp.ones_like, params)
    transform, _ = trainers.optimizer(Recipe.of(recipe), 5)
    update = transform.update(gradient, transform.init(params), params)[0]
    expected = {
        "norm_0": {"bias": -(64 + 0.2)},
        "BatchNorm_1": {"bias": -(64 + 0.3)},
        "head": {"bias": -1.4, "kernel": -1.5},
    }
    for found, wanted in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_triangle():
    recipe = get_config(
        "nominal", **{"train.schedule": "triangle", "train.lr": 2.0, "train.epochs": 10}
    ).train
    _, rate = trainers.optimizer(Recipe.of(recipe), 10)
    np.testing.assert_allclose([rate(0), rate(23), rate(100)], [0.4, 2.0, 0.14], rtol=1e-6)
    np.testing.assert_allclose(rate(61.5), (2.0 + 0.14) / 2, rtol=1e-6)


def test_smoothed_labels(rng):
    """The cross entropy to the mixture of the label and the even distribution."""
    z, y = jnp.asarray(rng.normal(size=(20, 7)), jnp.float32), jnp.arange(20) % 7
    target = 0.8 * np.eye(7)[np.asarray(y)] + 0.2 / 7
    expected = -np.sum(target * np.asarray(jax.nn.log_softmax(z)), axis=1)
    np.testing.assert_allclose(losses.smoothed_cross_entropy(z, y, 0.2), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "term"), [("nominal", "loss"), ("trades", "natural"), ("qtrades", "natural")]
)
def test_a_step_takes_the_smoothing(method, term):
    loss = {}
    for smoothing in (0.0, 0.2):
        p = problem(method, np.random.default_rng(1), **{"train.label_smoothing": smoothing})
        _, metrics, (batch, _) = p.step()
        logits = p.trainer.net.train(p.state.variables, batch.x)[0].logits
        expected = losses.smoothed_cross_entropy(logits, batch.y, smoothing).mean()
        np.testing.assert_allclose(metrics[term], expected, rtol=1e-5)
        loss[smoothing] = float(metrics[term])
    assert loss[0.0] != loss[0.2]
