"""Every config with every method: it builds, and its train step type-checks at full size.

Nothing is computed here: `jax.eval_shape` runs the real train step on shapes.
"""

import importlib

import jax
import jax.numpy as jnp
import pytest

from clustr_jax.evaluation import protocols
from clustr_jax.settings import EvalSettings, ModelSettings, Recipe, Settings, TrainingSettings
from clustr_jax.stages import configuration, refusals
from clustr_jax.storage import loading
from clustr_jax.training import objectives, train, train_state, trainers
from marks import in_ci
from project_configs import CONFIGS, DATA, METHODS, SOURCE, VARIANTS, fake_split, get_config

pytestmark = pytest.mark.usefixtures("importable")


def one_step_of_each_stage(name, method, smoke):
    """The settings pass run.py's checks, and a train step of each stage has consistent shapes.

    The state that comes out has the structure, shapes and types of the one that goes in: what a
    compiled loop and a checkpoint need.
    """
    config = get_config(name, method)
    config.smoke = smoke
    config = configuration.resolve(config)
    own = objectives.METHODS[method]
    size = config.data.train_size or DATA[name][2]
    split = fake_split(*DATA[name][:2], size)
    config = configuration.complete(config, split, split)
    net = loading.build_net(ModelSettings.of(config.model), split)
    protocols.check_config(EvalSettings.of(config.eval))
    refusals.check(Settings.of(config), own, net, split, split, held_out=1)
    _one_step(config, own, config.train, net, split)
    if own.warmup:
        if own.source and len(net.input_shape) == 3:
            split = fake_split(*SOURCE[:2], config.pretrain.train_size or SOURCE[2])
            net = loading.build_net(ModelSettings.of(config.model), split)
        _one_step(config, objectives.METHODS[own.warmup], config.warmup, net, split)


def _one_step(config, method, recipe, net, split):
    trainer = trainers.Trainer(net, method, TrainingSettings.of(config), Recipe.of(recipe), len(split))

    def one_step(key, images, labels):
        keys = jax.random.split(key, 4)
        train_set = train_state.TrainSet(images, labels, scale=split.scale, augment=config.data.augment)
        before = train.blank(trainer, net.init(keys[0]), train_set, keys[1])
        order = train.epoch_order(keys[2], trainer.size, 0)
        # traced by `blank` already
        after, metrics = train.traced_step(trainer, before.replace(totals={}), train_set, order, keys[3])
        return before, after.replace(totals=before.totals), metrics

    images, labels = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (split.images, split.labels))
    before, after, metrics = jax.eval_shape(one_step, jax.random.key(0), images, labels)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert set(metrics) == set(before.totals) >= {"loss", "gradient_norm"}
    assert {"accuracy", "adversarial_accuracy"} & set(metrics)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["digits", "toy2d"])
@pytest.mark.one_in(3)
def test_train_step_of_the_small_configs(name, method, smoke):
    one_step_of_each_stage(name, method, smoke)


@pytest.mark.parametrize(
    "method", ["free_at", "trades", pytest.param("clustr_qtrades", marks=pytest.mark.slow)]
)
def test_train_step_at_full_size(method):
    """ResNet-18 on 50,000 images, one method of each kind; others, and other sets, in the test below."""
    one_step_of_each_stage("cifar100", method, smoke=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", in_ci(METHODS, "at_pretrain", "clustr_trades", "clustr_certified"))
@pytest.mark.parametrize(
    ("name", "smoke"),
    in_ci(
        [("cifar10", False), ("cifar100", True), ("svhn", False), ("folder", True)],
        ("cifar10", False),
        ("folder", True),
    ),
)
def test_train_step_of_the_large_configs(name, method, smoke):
    one_step_of_each_stage(name, method, smoke)


def test_there_is_a_test_for_every_config_and_method():
    assert {path.stem for path in CONFIGS.glob("*.py")} - {"__init__", "common"} == set(DATA)
    common = importlib.import_module("configs.common")
    assert set(common.METHODS) == set(METHODS) and tuple(common.VARIANTS) == VARIANTS
