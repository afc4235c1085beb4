"""Every config with every method: it builds, its train step type-checks at full size, and typos are refused.

Nothing is computed here: `jax.eval_shape` runs the real train step on shapes.
"""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from clustr_jax import data
from clustr_jax.evaluation import protocols
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import EvalSettings, ModelSettings, Recipe, Settings, TrainingSettings
from clustr_jax.stages import configuration, refusals
from clustr_jax.storage import loading
from clustr_jax.training import objectives, train, train_state, trainers
from marks import in_ci

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# config -> (shape of an example, classes, size of the train split as published)
DATA = {
    "cifar10": ((32, 32, 3), 10, 50_000),
    "cifar100": ((32, 32, 3), 100, 50_000),
    "svhn": ((32, 32, 3), 10, 73_257),
    "digits": ((8, 8, 1), 10, 1_438),
    "toy2d": ((2,), 2, 1_000),
    "folder": ((32, 32, 3), 10, 1_000),  # whatever the user has
}
METHODS = tuple(objectives.METHODS)
VARIANTS = ("cpu",)
# at_pretrain's first stage is on this set (imagenet_resized/32x32).
SOURCE = ((32, 32, 3), 1000, 1_281_167)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The configs are files beside the package, not part of it."""
    monkeypatch.syspath_prepend(CONFIGS.parent)


def get_config(name, method):
    return importlib.import_module(f"configs.{name}").get_config(method)


def parse(name, *arguments, method="clustr_qtrades"):
    """The config as run.py gets it: through absl flags, locked and typed."""
    values = flags.FlagValues()
    path = f"{CONFIGS / name}.py:{method}"
    argv = ["run.py", *arguments]
    config_flags.DEFINE_config_file("config", path, lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def fake_split(shape, classes, size):
    """A split of the right shape and labels that takes no memory."""
    pixel = np.float32(0) if len(shape) == 1 else np.uint8(0)
    images = np.broadcast_to(pixel, (size, *shape))
    return data.Split(images, np.arange(size, dtype=np.int32) % classes, classes, 255.0, None, "")


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_variants_are_named_after_the_method(method, variant):
    """ "method,variant" changes settings, names the default work directory, and passes run.py's checks."""
    config = parse("cifar10", method=f"{method},{variant}")
    assert (config.method, config.variant) == (method, variant)
    assert configuration.default_workdir(config).name == f"cifar10-{method}-{variant}"
    assert config != parse("cifar10", method=method)
    split = fake_split(*DATA["cifar10"])
    config = configuration.resolve(config)
    protocols.check_config(EvalSettings.of(config.eval))
    refusals.check(
        Settings.of(config),
        objectives.METHODS[method],
        loading.build_net(ModelSettings.of(config.model), split),
        split,
        split,
        held_out=1,
    )


@pytest.mark.parametrize("name", ["digits", "toy2d"])
def test_the_cpu_variant_of_small_sets(name):
    """No more test images than there are, and radii of their own."""
    config, own = get_config(name, "nominal,cpu"), get_config(name, "nominal")
    assert (config.eval.n, config.eval.curve) == (own.eval.n, own.eval.curve) and config != own


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({"train.select": "best"}, None, "train.select=best needs .* set train.select=last"),
        ({"warmup.target": 0.9}, None, r"data.val_size=0.0 of [0-9]+ leaves none; .* set warmup.target=0.0"),
        ({"method": "at_pretrain", "warmup.target": 0.9}, (9, 0), "pretrain.val_size"),
    ],
)
def test_what_needs_held_out_images(changes, source, message):
    """Refused where there are none of them, however val_size came to leave none."""
    config = get_config("digits", "clustr_qtrades")
    config.data.val_size, config.warmup.target = 0.0, 0.0
    config.update_from_flattened_dict(changes)
    method, split = objectives.METHODS[config.method], fake_split(*DATA["digits"])
    net = loading.build_net(ModelSettings.of(config.model), split)
    with pytest.raises(UserError, match=message):
        refusals.check(
            Settings.of(config), method, net, split, split, held_out=0 if source is None else 9, source=source
        )
    refusals.check(Settings.of(config), method, net, split, split, held_out=9, source=source and (9, 9))


def test_points_are_not_augmented():
    config, split = get_config("toy2d", "nominal"), fake_split(*DATA["toy2d"])
    config.data.augment = "flip"
    method, net = objectives.METHODS["nominal"], loading.build_net(ModelSettings.of(config.model), split)
    with pytest.raises(UserError, match="data.augment is of images"):
        refusals.check(Settings.of(config), method, net, split, split, held_out=1)


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown variant 'gpu' .did you mean cpu\?.; known: cpu"):
        get_config("cifar10", "clustr,gpu")


@pytest.mark.parametrize("name", DATA)
def test_magnet_batches_are_those_of_appendix_d(name):
    """12 clusters of 20 images (or all clusters, if fewer), and as many batches as fill the set."""
    split = fake_split(*DATA[name])
    config = configuration.complete(get_config(name, "clustr"), split, split)
    clusters = config.magnet.k * DATA[name][1]
    trainer = trainers.Trainer(
        loading.build_net(ModelSettings.of(config.model), split),
        objectives.METHODS["clustr"],
        TrainingSettings.of(config),
        Recipe.of(config.train),
        len(split),
    )
    assert trainer.batch_size == min(12, clusters) * 20
    assert trainer.steps_per_epoch == len(split) // trainer.batch_size


def test_there_is_a_test_for_every_config_and_method():
    assert {path.stem for path in CONFIGS.glob("*.py")} - {"__init__", "common"} == set(DATA)
    common = importlib.import_module("configs.common")
    assert set(common.METHODS) == set(METHODS) and tuple(common.VARIANTS) == VARIANTS


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_config_is_json_and_knows_its_method(name, method):
    """config.json gives back what was run; every leaf can be set on the command line."""
    config = get_config(name, method)
    assert config.method == method
    assert json.loads(json.dumps(config.to_dict())).keys() == config.to_dict().keys()
    assert parse(name, method=method).to_dict() == config.to_dict()
    other = get_config(name, method)
    other.train.epochs += 1
    assert get_config(name, method) == config  # no state shared between calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10", dict(lam=8.0, alpha=12.5, epochs=30, target=0.90, nearest=0)),
        ("svhn", dict(lam=9.7, alpha=10.0, epochs=60, target=0.90, nearest=0)),
        ("cifar100", dict(lam=2.0, alpha=8.5, epochs=60, target=0.75, nearest=20)),
    ],
)
def test_hyperparameters_of_the_paper(name, expected):
    """Appendix D, footnote 4 and section 4.2 of arXiv 2006.07682; step sizes of the authors' code."""
    config = get_config(name, "clustr_qtrades")
    found = dict(
        lam=config.train.lam, alpha=config.magnet.alpha, epochs=config.train.epochs,
        target=config.warmup.target, nearest=config.eval.nearest,
    )  # fmt: skip
    assert found == expected
    assert (config.warmup.lr, config.warmup.epochs, config.warmup.milestones) == (1e-2, 90, (30, 60))
    assert (config.train.lr, config.train.milestones) == (1e-4, ())
    assert (config.magnet.k, config.magnet.samples, config.magnet.clusters) == (2, 20, 0)
    attack = config.train.attack
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 10 / 255, 1)
    attack = config.eval.attack
    assert (attack.eps, attack.step_size, attack.steps, attack.restarts) == (8 / 255, 2 / 255, 100, 10)
    assert config.eval.sweep == (2 / 255, 16 / 255, 25.5 / 255) and config.eval.paper_steps == (20, 100)
    assert config.model.name == "resnet18" and config.model.width == 0
    assert config.data.augment == ("none" if name == "svhn" else "crop_flip")


def test_methods_change_what_they_should():
    """nominal trains by the warm-up's recipe; Magnet from scratch runs as long as both stages of ClusTR."""
    nominal, magnet, clustr = (get_config("cifar10", m) for m in ("nominal", "magnet", "clustr"))
    for name in (
        "epochs",
        "batch_size",
        "optimizer",
        "nesterov",
        "lr",
        "weight_decay",
        "schedule",
        "milestones",
        "decay",
    ):
        assert nominal.train[name] == nominal.warmup[name]
    assert magnet.train.epochs == clustr.warmup.epochs + clustr.train.epochs
    assert get_config("svhn", "clustr").magnet.alpha == 13.0


@pytest.mark.parametrize("name", DATA)
def test_an_unknown_method_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown method 'trade' .did you mean trades\?.; known: nominal, "):
        get_config(name, "trade")


@pytest.mark.parametrize(
    "argument",
    [
        "--config.train.epohcs=5",
        "--config.trian.epochs=5",
        "--config.magnet.epochs=5",
        "--config.train.epochs=5.5",
        "--config.train.epochs=many",
        "--config.train.lam=much",
        "--config.smoke=perhaps",
        "--config.train=5",
    ],
)
def test_a_misspelt_key_or_a_wrong_type_fails(argument):
    with pytest.raises((flags.Error, AttributeError, KeyError, TypeError, ValueError)):
        parse("digits", argument)


def test_a_locked_config_takes_no_new_keys_and_no_other_types():
    config = parse("digits")
    with pytest.raises(AttributeError):
        config.train.epohcs = 5
    with pytest.raises(TypeError):
        config.train.epochs = "5"
    with pytest.raises(TypeError):
        config.eval.attack.eps = "8/255"


def test_overrides_arrive_typed():
    config = parse(
        "digits", "--config.train.epochs=3", "--config.train.attack.eps=0.03137255", "--config.train.lam=2",
        "--config.magnet.k_per_class=(1,2)", "--config.eval.protocols=('sound',)", "--config.data.name=svhn",
        method="clustr",
    )  # fmt: skip
    assert config.train.epochs == 3 and config.train.attack.eps == 0.03137255
    assert config.train.lam == 2.0 and isinstance(config.train.lam, float)
    assert config.magnet.k_per_class == (1, 2) and config.eval.protocols == ("sound",)
    assert config.data.name == "svhn" and config.method == "clustr"


def test_a_smoke_config_is_smaller_and_leaves_the_original_alone():
    for name in DATA:
        config = get_config(name, "clustr_qtrades")
        before = config.to_dict()
        config.smoke = True
        small = configuration.resolve(config)
        config.smoke = False
        assert config.to_dict() == before
        assert small.warmup.epochs == small.train.epochs == 1
        assert small.data.train_size <= min(400, DATA[name][2]) and small.eval.n <= 32
        assert small.eval.attack.steps <= 4 and small.eval.attack.restarts <= 2
        # enough images of each class for its clusters
        assert small.data.train_size * (1 - small.data.val_size) // DATA[name][1] >= small.magnet.k


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnet.k": 200}, "class 0 has 144 training images, fewer than its k=200"),
        ({"magnet.k": 0}, "magnet.k must be at least 1"),
        ({"magnet.k_per_class": (1, 2)}, "magnet.k_per_class have 10 entries"),
        ({"magnet.fit": "mean"}, "magnet.fit must be kmeans or linear_head, got 'mean'"),
        ({"magnet.fit": "linear_head"}, "one cluster per class .* set magnet.k=1"),
        ({"magnet.clusters": 21}, "magnet.clusters is 21, but there are only 20"),
        ({"magnet.clusters": 1}, "magnet.clusters must be 0"),
        ({"magnet.samples": 1}, "magnet.samples at least 2"),
        ({"magnet.alpha": -1.0}, "magnet.alpha must be >= 0"),
        ({"train.lam": -1.0}, "train.lam"),
        ({"train.lr": 0.0}, "lr > 0"),
        ({"warmup.batch_size": 0}, "batch_size >= 1"),
        ({"train.epochs": -1}, "epochs must be >= 0"),
        ({"train.schedule": "linear"}, "schedule must be"),
        ({"warmup.optimizer": "lion"}, "optimizer must be adam or sgd"),
        ({"data.augment": "flop"}, "data.augment must be"),
        ({"train.attack.eps": -0.1}, "eps must be >= 0"),
        ({"train.attack.start": "middle"}, "start must be one of"),
        ({"train.attack.steps": -1}, "steps must be"),
        ({"train.lam": float("nan")}, "train.lam"),
        ({"magnet.n_init": 0}, "n_init"),
        ({"magnet.seed_floor": 1.5}, "seed_floor"),
        ({"magnet.seed_floor": -0.1}, "seed_floor"),
        ({"train.milestones": ("a",)}, "milestones"),
        ({"model.std": (0.0,)}, "std"),
        ({"pretrain.augment": "flop"}, "pretrain.augment must be"),
        (
            {"train.replays": 2},
            "the adversary of this method; set train.replays=1",
        ),
        ({"warmup.replays": 2, "warmup.awp": 0.01}, "leaves out awp; .* or warmup.awp=0"),
        ({"train.ema": 0.9, "fidelity.cluster_images": "augmented"}, "fidelity.cluster_images=augmented"),
        ({"train.ema": 0.9, "fidelity.epoch_statistics": "leak_test"}, "set train.ema=0"),
        ({"train.decay": -0.1}, "decay and weight_decay must be >= 0"),
        ({"warmup.weight_decay": -1.0}, "warmup: decay and weight_decay must be >= 0"),
        ({"train.epochs": 3, "train.eps_ramp": 6.0}, "train.eps_ramp=6.0 is longer than the 3 epochs"),
        ({"warmup.target": 90.0}, r"warmup.target is an accuracy in \[0, 1\], got 90.0"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_the_warm_up(changes, message):
    """Also those that only the second stage would stumble over, hours later."""
    config = get_config("digits", "clustr_qtrades")
    config.update_from_flattened_dict(changes)
    split = fake_split(*DATA["digits"])
    with pytest.raises(UserError, match=message):
        net = loading.build_net(ModelSettings.of(config.model), split)
        refusals.check(Settings.of(config), objectives.METHODS[config.method], net, split, split, held_out=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.replays": 2}, "looks at clean images alone; set train.replays=1"),
        ({"model.name": "cnn"}, "needs a 1-Lipschitz network .lip_sll, .* model.name=cnn"),
    ],
)
def test_what_a_certified_method_cannot_be(changes, message):
    config = get_config("digits", "clustr_certified")
    split = fake_split(*DATA["digits"])

    def check():
        net = loading.build_net(ModelSettings.of(config.model), split)
        refusals.check(Settings.of(config), objectives.METHODS[config.method], net, split, split, held_out=1)

    check()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check()


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("method", objectives.METHODS)
def test_the_radius_of_training_grows_to_its_end(method, smoke):
    """Also where smoke leaves one epoch: otherwise the settings would be refused."""
    config = get_config("cifar10", f"{method},cpu")
    config.smoke = smoke
    config = configuration.resolve(config)
    assert all(r.eps_ramp <= r.epochs or not r.epochs for r in (config.train, config.warmup))


def test_transfer_from_a_network_of_other_images_is_refused(tmp_path):
    """Before hours of training, not after them."""
    config = get_config("digits", "clustr_qtrades")
    net = loading.build_net(ModelSettings.of(config.model), fake_split(*DATA["digits"]))
    (tmp_path / "2_train").mkdir()
    done = tmp_path / "2_train" / "done.json"
    config.eval.transfer = (str(tmp_path),)
    for shape, classes in (((8, 8, 3), 10), ((8, 8, 1), 100)):
        done.write_text(json.dumps({"input_shape": shape, "num_classes": classes}))
        with pytest.raises(UserError, match="eval.transfer: .* name a run on the same data"):
            protocols.check_transfer(EvalSettings.of(config.eval), net)
    done.write_text(json.dumps({"input_shape": (8, 8, 1), "num_classes": 10}))
    protocols.check_transfer(EvalSettings.of(config.eval), net)
    config.eval.transfer = (str(tmp_path / "nowhere"),)
    with pytest.raises(UserError, match="no finished stage"):
        protocols.check_transfer(EvalSettings.of(config.eval), net)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.attack.eps": -0.1}, "eps must be >= 0"),
        ({"eval.attack.eps": float("nan")}, "eps must be >= 0"),
        ({"eval.attack.step_size": -0.1}, "step_size must be >= 0"),
        ({"eval.attack.steps": 0}, "eval.attack.steps must be at least 1"),
        ({"eval.attack.restarts": 0}, "eval.attack.restarts must be at least 1"),
        ({"eval.slots": 0}, "eval.slots must be at least 1"),
        ({"eval.n": -1}, "eval.n must be at least 0"),
        ({"eval.nearest": -1}, "eval.nearest must be at least 0"),
        ({"eval.sweep": (0.1, -0.2)}, "eps must be >= 0"),
        ({"eval.protocols": ("paper", "autoattack")}, "unknown 'autoattack'; known: paper, sound"),
        ({"eval.paper_steps": (20, 0)}, "eval.paper_steps"),
        ({"eval.paper_steps": ()}, "eval.paper_steps"),
    ],
)
def test_settings_that_cannot_be_evaluated_are_refused(changes, message):
    config = get_config("digits", "clustr_qtrades")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        protocols.check_config(EvalSettings.of(config.eval))
