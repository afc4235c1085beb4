"""What the configs say: variants, hyperparameters of the paper, what methods change, smoke runs."""

import json

import pytest

from clustr_jax.evaluation import protocols
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import EvalSettings, ModelSettings, Recipe, Settings, TrainingSettings
from clustr_jax.stages import configuration, refusals
from clustr_jax.storage import loading, workdir
from clustr_jax.training import objectives, trainers
from project_configs import DATA, METHODS, VARIANTS, fake_split, get_config, parse

pytestmark = pytest.mark.usefixtures("importable")


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


@pytest.mark.parametrize("name", ["digits", "toy2d"])
def test_the_fast_variant_is_not_for_small_sets(name):
    with pytest.raises(ValueError, match="9 pixels"):
        get_config(name, "nominal,fast")


def test_fast_after_cpu_is_fast():
    """It is cpu's recipe with another network, so either order and both together mean the same."""
    one, both = (get_config("cifar10", f"clustr_qtrades,{variants}") for variants in ("fast", "cpu,fast"))
    assert one == both


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
        lam=config.train.lam,
        alpha=config.magnet.alpha,
        epochs=config.train.epochs,
        target=config.warmup.target,
        nearest=config.eval.nearest,
    )
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


def test_numbers_in_tuples_have_one_type():
    """(0,) and (0.0,) compare equal, and are one setting: one config and one hash."""
    found = []
    for mean, sweep in (((0,), (1, 0.5)), ((0.0,), (1.0, 0.5))):
        config = get_config("digits", "nominal")
        config.model.mean, config.eval.sweep = mean, sweep
        found.append(json.dumps(workdir.config_dict(configuration.resolve(config))))
    assert found[0] == found[1] and '"sweep": [1.0, 0.5]' in found[0]


def test_a_smoke_run_has_images_of_all_the_classes_of_its_source():
    config = get_config("cifar10", "at_pretrain")
    config.smoke = True
    assert config.pretrain.name.startswith("imagenet")
    assert configuration.resolve(config).pretrain.train_size == 2000  # of 1,000 classes, 2 % held out
