"""Every train step, k-means and attack is lowered for CUDA and TPU, on a machine without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from clustr_jax import clusters, data
from clustr_jax.attacks import attack_losses, device_loop
from clustr_jax.attacks.apgd import APGD
from clustr_jax.attacks.fab import FAB
from clustr_jax.attacks.pgd import as_partial, pgd
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.attacks.square import Square
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.training import train, train_state, trainers
from clustr_jax.training.objectives import METHODS
from configs import cifar10

PLATFORMS = ("cuda", "tpu")


def lowered(f, *args):
    """The exported module; a wrong platform or an operation that one lacks raises."""
    exported = export.export(jax.jit(f), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    return exported.mlir_module()


@functools.cache
def problem(method, model="resnet8", dtype="float32"):
    config = cifar10.get_config(method)
    config.model.name = model if config.model.name == "resnet18" else config.model.name
    config.model.dtype = dtype
    config = configuration.resolve(config)
    images, labels = np.zeros((240, 32, 32, 3), np.uint8), (np.arange(240) % 10).astype(np.int32)
    net = loading.build_net(
        ModelSettings.of(config.model), data.Split(images, labels, 10, 255.0, (0.0, 1.0), "")
    )
    return config, net, images, labels


def lowered_steps(method, **model):
    config, net, images, labels = problem(method, **model)
    trainer = trainers.Trainer(
        net, METHODS[method], TrainingSettings.of(config), Recipe.of(config.train), len(labels)
    )
    train_set = train_state.TrainSet(jnp.asarray(images), jnp.asarray(labels), 255.0, config.data.augment)
    key = jax.random.key(0)
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(net.init, key))
    state = train.blank(trainer, variables, train_set, key)
    order = train.epoch_order(key, len(labels), 0)
    return lowered(functools.partial(train.run_steps, trainer), state, train_set, order, key, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.one_in(3)
def test_every_train_step(method):
    text = lowered_steps(method)
    assert "stablehlo.convolution" in text and "stablehlo.while" in text


def test_a_step_in_bfloat16():
    text = lowered_steps("clustr_qtrades", dtype="bfloat16")
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("bf16" in line for line in convolutions)


def classifier(cluster_head):
    _, net, _, _ = problem("clustr")
    key = jax.random.key(0)
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(net.init, key))
    head = Clusters(jnp.zeros((10, 2, 64)), jnp.ones(())) if cluster_head else None
    return Classifier(variables, head, net)


@pytest.mark.parametrize("model", ["resnet8", "lip_cpl"])
def test_what_an_attack_follows_is_float32_on_every_platform(model):
    """Value and gradient: without a precision of its own an accelerator multiplies in TF32 or bfloat16."""
    _, net, _, _ = problem("clustr", model)
    variables = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    size = jax.eval_shape(net.eval, variables, x).embeddings.shape[1]
    clf = Classifier(variables, Clusters(jnp.zeros((10, 2, size)), jnp.ones(())), net)

    def ascent(x, clf):
        return jax.value_and_grad(lambda x: jnp.sum(clf.logits(x)))(x)

    text = lowered(ascent, x, clf)
    products = [
        line for line in text.splitlines() if "stablehlo.convolution" in line or "dot_general" in line
    ]
    assert len(products) > 20 and all(line.count("HIGHEST") == 2 for line in products), [
        line for line in products if line.count("HIGHEST") != 2
    ]


def test_resnet18_forward_and_input_gradient():
    _, net, _, _ = problem("nominal", "resnet18")
    variables = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    assert "convolution" in lowered(jax.grad(lambda x, v: net.eval(v, x).logits.sum()), x, variables)


def test_kmeans_of_all_classes():
    z, y = jax.ShapeDtypeStruct((200, 16), jnp.float32), np.arange(200) % 10
    lowered(lambda z: clusters.fit(jax.random.key(0), z, y, num_classes=10, k=2), z)


@pytest.mark.parametrize("cluster_head", [False, True], ids=["linear", "clusters"])
@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "square"])
def test_every_attack(name, cluster_head):
    """One device call of the scheduler; and `pgd` by itself."""
    clf, slots = classifier(cluster_head), 8
    model = as_partial(clf.view)
    common = {"eps": jnp.float32(8 / 255), "norm": "linf", "bounds": (0.0, 1.0)}
    attack = {
        "pgd": PGD(
            steps=20, step_size=jnp.float32(2 / 255), loss=attack_losses.one(attack_losses.margin), **common
        ),
        "apgd": APGD(steps=20, loss=attack_losses.one(attack_losses.dlr_targeted), **common),
        "fab": FAB(steps=20, **common),
        "square": Square(steps=20, **common),
    }[name]
    x, y = np.zeros((2 * slots, 32, 32, 3), np.float32), np.zeros(2 * slots, np.int32)
    key = jax.random.key(0)

    def call(key, model, x, y):
        work = device_loop.fill(key, y, y, y, x, y, y + 1)
        state = device_loop.empty(attack, jax.tree.map(lambda a: a[:slots], work))
        orders = device_loop.Orders(np.int32(5), np.int32(0), np.array([False]))
        best = jnp.full(1024, 10, jnp.int32)
        return device_loop.advance(
            attack, model, state, work, np.ones(2 * slots, bool), best, orders, first=True
        )

    assert "convolution" in lowered(call, key, model, x, y)
    if name == "pgd":
        lowered(
            lambda key, clf, x, y: pgd(key, clf.logits, x, y, eps=0.03, step_size=0.01, steps=5),
            key,
            clf,
            x,
            y,
        )
