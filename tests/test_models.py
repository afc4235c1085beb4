"""Networks: shapes, batch-norm behaviour, where normalisation happens, and the size of ResNet-18."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import models

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = dict(num_classes=5, width=4, input_shape=(8, 8, 3), mean=MEAN, std=STD)
POINTS = dict(num_classes=5, width=4, input_shape=(2,), mean=(0.1, -0.2), std=(1.5, 2.0))
SETTINGS = {"resnet8": IMAGES, "cnn": IMAGES, "mlp": POINTS}
NAMES = sorted(SETTINGS)


def setup(name, batch=6):
    """A small network, its variables with non-trivial running statistics, and inputs in [0, 1]."""
    net = models.build(name, **SETTINGS[name])
    variables = jax.jit(net.init)(jax.random.key(0))
    shape = (batch, *SETTINGS[name]["input_shape"])
    x = jax.random.uniform(jax.random.key(1), shape)
    _, batch_stats = jax.jit(net.train)(variables, x)
    return net, {"params": variables["params"], "batch_stats": batch_stats}, x


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_hashing(name):
    """Outputs (logits [B, Y], embeddings [B, E]) in float32; equal settings give equal, hashable nets."""
    net, variables, x = setup(name)
    assert set(variables) == {"params", "batch_stats"}
    train, batch_stats = jax.jit(net.train)(variables, x)
    for outputs in (train, jax.jit(net.eval)(variables, x)):
        assert isinstance(outputs, models.Outputs)
        assert outputs.logits.shape == (6, 5) and outputs.embeddings.ndim == 2
        assert outputs.logits.dtype == outputs.embeddings.dtype == jnp.float32
        assert outputs.embeddings.shape[0] == 6
    assert jax.tree.structure(batch_stats) == jax.tree.structure(variables["batch_stats"])
    twin = models.build(name, **SETTINGS[name])
    assert twin == net and hash(twin) == hash(net)
    assert net != models.build(name, **SETTINGS[name] | {"num_classes": 6})


@pytest.mark.parametrize("name", NAMES)
def test_the_normalisation_is_the_first_line(name):
    """Pixels in the unit of [0, 1] with mean and std = normalised pixels with mean 0 and std 1.

    Zero padding comes after normalisation, so this holds at the border too. 1e-5: two roundings of
    the input, carried through at most 8 layers.
    """
    net, variables, x = setup(name)
    settings = SETTINGS[name]
    plain = {"mean": (0.0,) * len(settings["mean"]), "std": (1.0,) * len(settings["std"])}
    bare = models.build(name, **settings | plain)
    normalised = (x - np.float32(settings["mean"])[(None,) * (x.ndim - 1)]) / np.float32(settings["std"])[
        (None,) * (x.ndim - 1)
    ]
    expected, actual = jax.jit(bare.eval)(variables, normalised), jax.jit(net.eval)(variables, x)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(actual.embeddings, expected.embeddings, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_eval_sees_each_example_alone(name):
    """In eval mode an example's output does not depend on its batch (1e-5: sums of other shapes)."""
    net, variables, x = setup(name)
    together = jax.jit(net.eval)(variables, x)
    alone = jax.jit(net.eval)(variables, x[2:3])
    np.testing.assert_allclose(together.embeddings[2:3], alone.embeddings, atol=1e-5)
    np.testing.assert_allclose(together.logits[2:3], alone.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "cnn"])
def test_train_uses_and_updates_the_batch_statistics(name):
    """In train mode an example's output depends on its batch, and the running statistics move towards it."""
    net, variables, x = setup(name)
    train = jax.jit(net.train)
    outputs, batch_stats = train(variables, x)
    others, _ = train(variables, x.at[3:].set(1 - x[3:]))
    assert np.abs(outputs.logits[0] - others.logits[0]).max() > 1e-4
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), batch_stats, variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("name", ["resnet8", "cnn"])
def test_running_statistics_converge_to_train_mode(name):
    """Fed one batch again and again, eval agrees with train: the same network, the same statistics.

    0.9^150 = 1e-7 of the initial statistics is left. The running variance may be the unbiased one
    (n / (n - 1)), which for the 6 to 384 values per channel here is up to 20 %: hence 0.2 relative.
    """
    net, variables, x = setup(name)

    def step(_, batch_stats):
        return net.train({"params": variables["params"], "batch_stats": batch_stats}, x)[1]

    batch_stats = jax.jit(lambda stats: jax.lax.fori_loop(0, 150, step, stats))(variables["batch_stats"])
    variables = {"params": variables["params"], "batch_stats": batch_stats}
    train, evaluated = jax.jit(net.train)(variables, x)[0], jax.jit(net.eval)(variables, x)
    scale = np.abs(train.embeddings).max()
    np.testing.assert_allclose(evaluated.embeddings, train.embeddings, atol=0.2 * scale)


def test_mlp_is_the_same_in_train_and_eval():
    """No batch norm: nothing to update."""
    net, variables, x = setup("mlp")
    train, batch_stats = jax.jit(net.train)(variables, x)
    np.testing.assert_allclose(train.logits, jax.jit(net.eval)(variables, x).logits, atol=1e-6)
    assert not jax.tree.leaves(batch_stats)


def test_resnet_embeddings_are_means_after_relu():
    """Non-negative, and not all zero (the cluster head stands on them)."""
    net, variables, x = setup("resnet8")
    embeddings = jax.jit(net.eval)(variables, x).embeddings
    assert (embeddings >= 0).all() and (embeddings > 0).any(axis=1).all()


def test_logits_are_a_linear_function_of_the_resnet_embeddings():
    """The linear head stands on the embeddings: the affine fit of logits on 30 embeddings is exact."""
    net, variables, x = setup("resnet8", batch=30)
    outputs = jax.jit(net.eval)(variables, x)
    design = np.concatenate([outputs.embeddings, np.ones((30, 1))], axis=1)
    assert design.shape[1] < 30  # else any logits would fit
    _, residual, *_ = np.linalg.lstsq(design, np.float64(outputs.logits), rcond=None)
    fitted = design @ np.linalg.lstsq(design, np.float64(outputs.logits), rcond=None)[0]
    np.testing.assert_allclose(fitted, outputs.logits, atol=1e-4)


@pytest.mark.parametrize("classes, expected", [(10, 11_173_962), (100, 11_220_132)])
def test_resnet18_has_the_parameters_of_kuangliu(classes, expected):
    """11,173,962 parameters for 10 classes, 512-d embeddings; 90 more classes add 90 * 513. Shapes only."""
    net = models.build(
        "resnet18", num_classes=classes, width=64, input_shape=(32, 32, 3), mean=MEAN, std=STD
    )
    variables = jax.eval_shape(net.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
    outputs = jax.eval_shape(net.eval, variables, jnp.zeros((2, 32, 32, 3)))
    assert outputs.embeddings.shape == (2, 512) and outputs.logits.shape == (2, classes)


def test_different_keys_give_different_networks():
    """Initialisation depends on the key and only on it."""
    net = models.build("cnn", **IMAGES)
    first, again, other = (jax.jit(net.init)(jax.random.key(k))["params"] for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any(not np.array_equal(a, b) for a, b in leaves)


def test_an_unknown_name_is_a_value_error():
    """One line that names the culprit."""
    with pytest.raises(ValueError, match="resnet19"):
        models.build("resnet19", **IMAGES)
