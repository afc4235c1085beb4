"""Typos and settings that cannot be trained or evaluated are refused."""

import json

import pytest
from absl import flags

from clustr_jax.evaluation import protocols
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import EvalSettings, ModelSettings, Settings
from clustr_jax.stages import configuration, refusals
from clustr_jax.storage import loading
from clustr_jax.training import objectives
from project_configs import DATA, fake_split, get_config, parse

pytestmark = pytest.mark.usefixtures("importable")


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
        with pytest.raises(UserError, match="eval.transfer: "):
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
