"""Networks: shapes, batch-norm behaviour, where normalisation happens, and the size of ResNet-18."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import models
from clustr_jax.runtime.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = dict(num_classes=5, width=4, input_shape=(8, 8, 3), mean=MEAN, std=STD)
POINTS = dict(num_classes=5, width=4, input_shape=(2,), mean=(0.1, -0.2), std=(1.5, 2.0))
SETTINGS = {"resnet8": IMAGES, "cnn": IMAGES, "mlp": POINTS}
SETTINGS |= {name: IMAGES | {"input_shape": (16, 16, 3)} for name in ("fast", "fast_plain")}
NAMES = sorted(SETTINGS)
DIMENSIONS = {
    "resnet8": 16,
    "cnn": 16,
    "mlp": 4,
    "fast": 8,
    "fast_plain": 8,
}  # 4 * width: 2 stages of doubling, a hidden layer; width


# Nets are hashable: one compilation for all tests of this file.
init = jax.jit(lambda net, key: net.init(key), static_argnums=0)
train = jax.jit(lambda net, variables, x: net.train(variables, x), static_argnums=0)
evaluate = jax.jit(lambda net, variables, x: net.eval(variables, x), static_argnums=0)


@functools.cache
def setup(name):
    """A small network, its variables with non-trivial running statistics, and 20 inputs in [0, 1]."""
    net = models.build(name, **SETTINGS[name])
    variables = init(net, jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (20, *SETTINGS[name]["input_shape"]))
    _, batch_stats = train(net, variables, x)
    return net, {"params": variables["params"], "batch_stats": batch_stats}, x


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_hashing(name):
    """Outputs (logits [B, Y], embeddings [B, E]) in float32; equal settings give equal, hashable nets."""
    net, variables, x = setup(name)
    assert set(variables) == {"params", "batch_stats"}
    trained, batch_stats = train(net, variables, x)
    for outputs in (trained, evaluate(net, variables, x)):
        assert isinstance(outputs, models.Outputs)
        assert outputs.logits.shape == (20, 5) and outputs.logits.dtype == jnp.float32
        assert outputs.embeddings.shape == (20, DIMENSIONS[name])
        assert outputs.embeddings.dtype == jnp.float32
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
    normalised = (np.asarray(x) - np.float32(settings["mean"])) / np.float32(settings["std"])
    expected, actual = evaluate(bare, variables, normalised), evaluate(net, variables, x)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(actual.embeddings, expected.embeddings, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_eval_sees_each_example_alone(name):
    """In eval mode the outputs of the first examples do not change with the rest of the batch."""
    net, variables, x = setup(name)
    first, other = evaluate(net, variables, x), evaluate(net, variables, x.at[3:].set(1 - x[3:]))
    np.testing.assert_allclose(first.embeddings[:3], other.embeddings[:3], atol=1e-6)
    np.testing.assert_allclose(first.logits[:3], other.logits[:3], atol=1e-6)
    assert np.abs(first.logits[3:] - other.logits[3:]).max() > 1e-2


def test_eval_does_not_depend_on_the_batch_size():
    """A batch of one gives what the batch of 20 gave; 1e-5: sums in another order."""
    net, variables, x = setup("cnn")
    together, alone = evaluate(net, variables, x), evaluate(net, variables, x[2:3])
    np.testing.assert_allclose(alone.logits, together.logits[2:3], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "cnn", "fast", "fast_plain"])
def test_train_uses_and_updates_the_batch_statistics(name):
    """In train mode an example's output depends on its batch, and the running statistics move towards it."""
    net, variables, x = setup(name)
    outputs, batch_stats = train(net, variables, x)
    others, _ = train(net, variables, x.at[3:].set(1 - x[3:]))
    assert np.abs(outputs.logits[0] - others.logits[0]).max() > 1e-4
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), batch_stats, variables["batch_stats"])
    frozen = moved.get("first", {}).pop("kernel", None)  # of whitening: not trained, and not a statistic
    assert min(jax.tree.leaves(moved)) > 0 and (frozen == 0 if name == "fast" else frozen is None)


@pytest.mark.parametrize("name", ["resnet8", "cnn", "fast", "fast_plain"])
def test_running_statistics_converge_to_train_mode(name):
    """Fed one batch again and again, eval agrees with train: the same network, the same statistics.

    0.9^150 = 1e-7 of the initial statistics is left. The running variance may be the unbiased one,
    n / (n - 1) with n >= 20 here, in each of at most 8 layers: 2.6 % of the output scale per layer.
    """
    net, variables, x = setup(name)
    batch_stats = variables["batch_stats"]
    for _ in range(150):
        outputs, batch_stats = train(net, {"params": variables["params"], "batch_stats": batch_stats}, x)
    evaluated = evaluate(net, {"params": variables["params"], "batch_stats": batch_stats}, x)
    before = evaluate(net, variables, x)
    scale = np.abs(outputs.embeddings).max()
    np.testing.assert_allclose(evaluated.embeddings, outputs.embeddings, atol=0.2 * scale)
    error = np.abs(evaluated.embeddings - outputs.embeddings).mean()
    assert error < 0.5 * np.abs(before.embeddings - outputs.embeddings).mean()


def test_mlp_is_the_same_in_train_and_eval():
    """No batch norm: nothing to update."""
    net, variables, x = setup("mlp")
    outputs, batch_stats = train(net, variables, x)
    np.testing.assert_allclose(outputs.logits, evaluate(net, variables, x).logits, atol=1e-6)
    assert not jax.tree.leaves(batch_stats)


def test_resnet_embeddings_are_means_after_relu():
    """Non-negative, and not all zero (the cluster head stands on them)."""
    net, variables, x = setup("resnet8")
    embeddings = evaluate(net, variables, x).embeddings
    assert (embeddings >= 0).all() and (embeddings > 0).any(axis=1).all()


def test_logits_are_an_affine_function_of_the_resnet_embeddings():
    """The linear head stands on the embeddings: 16 weights and a bias explain 20 logits per class."""
    net, variables, x = setup("resnet8")
    outputs = evaluate(net, variables, x)
    design = np.concatenate([np.float64(outputs.embeddings), np.ones((20, 1))], axis=1)
    weights = np.linalg.lstsq(design, np.float64(outputs.logits), rcond=None)[0]
    np.testing.assert_allclose(design @ weights, outputs.logits, atol=1e-5)


@pytest.mark.parametrize("classes, expected", [(10, 11_173_962), (100, 11_220_132)])
def test_resnet18_has_the_parameters_of_kuangliu(classes, expected):
    """11,173,962 parameters for 10 classes, 512-d embeddings; 90 more classes add 90 * 513. Shapes only."""
    net = models.build("resnet18", num_classes=classes, width=64, input_shape=(32, 32, 3), mean=MEAN, std=STD)
    variables = jax.eval_shape(net.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
    outputs = jax.eval_shape(net.eval, variables, jnp.zeros((2, 32, 32, 3)))
    assert outputs.embeddings.shape == (2, 512) and outputs.logits.shape == (2, classes)


def test_different_keys_give_different_networks():
    """Initialisation depends on the key and only on it."""
    net = models.build("cnn", **IMAGES)
    first, again, other = (init(net, jax.random.key(k))["params"] for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any(not np.array_equal(a, b) for a, b in leaves)


def test_an_unknown_name_is_a_value_error():
    """One line that names the culprit."""
    with pytest.raises(ValueError, match="resnet19"):
        models.build("resnet19", **IMAGES)


@pytest.mark.more
@pytest.mark.parametrize("name", ["resnet8", "cnn"])
def test_bfloat16_computes_layers_in_training_mode_only(name):
    """Its training passes are near float32's and not equal; eval mode, outputs and statistics are float32."""
    net, variables, x = setup(name)
    mixed = models.build(name, **SETTINGS[name], dtype="bfloat16")
    assert mixed != net

    def loss(params, net):
        outputs, stats = net.train({**variables, "params": params}, x)
        return jnp.mean(jnp.square(outputs.embeddings - 1.0)), (outputs, stats)

    graded = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    full, (outputs, _) = graded(variables["params"], net)
    reduced, (rough, stats) = graded(variables["params"], mixed)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((reduced, rough, stats)))
    spread = float(jnp.std(outputs.embeddings))
    error = float(jnp.max(jnp.abs(outputs.embeddings - rough.embeddings)))
    assert 1e-5 * spread < error < 0.3 * spread
    flat, near = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (full, reduced))
    assert float(flat @ near / jnp.linalg.norm(flat) / jnp.linalg.norm(near)) > 0.98
    np.testing.assert_array_equal(evaluate(mixed, variables, x).logits, evaluate(net, variables, x).logits)


@pytest.mark.parametrize("name, dtype", [("resnet8", "float16"), ("mlp", "bfloat16"), ("fast", "bfloat16")])
def test_dtypes_that_are_refused(name, dtype):
    with pytest.raises(UserError, match="float32"):
        models.build(name, **SETTINGS[name], dtype=dtype)
