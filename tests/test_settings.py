"""Typed settings: every key of a config is a field of one section, and equal settings are one program."""

import dataclasses

import jax
import pytest
from ml_collections import ConfigDict

from clustr_jax.reference.switches import SWITCHES
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import DataSettings, EvalSettings, Recipe, Settings, Switches, TrainingSettings
from clustr_jax.training import train
from linear_problems import get_config, problem

# Where a section of the config is split in two, and what stands for something else by the time it is read.
OF_TRAIN = "recipe", "training.train"
READ_BEFORE = {"preset"}


def fields(settings):
    """Their names, of nested sections too, and those of a config, as one set of dotted names."""
    found = set()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        nested = fields(value) if dataclasses.is_dataclass(value) else ()
        found |= {f"{field.name}.{name}" for name in nested} or {field.name}
    return found


def keys(section):
    found = set()
    for name, value in section.items():
        found |= {f"{name}.{key}" for key in keys(value)} if hasattr(value, "items") else {name}
    return found


def test_every_key_of_a_config_is_read():
    config = get_config("clustr_qtrades", "digits")
    settings = Settings.of(config)
    read = fields(settings.recipe) | fields(settings.training.train)
    assert read - {"target"} == keys(config.train) and fields(settings.warmup) == keys(config.warmup)
    assert fields(settings.training.magnet) == keys(config.magnet)
    assert fields(settings.training.switches) == keys(config.fidelity) - READ_BEFORE == set(SWITCHES)
    assert fields(settings.data) - {"sha"} == keys(config.data)
    assert fields(settings.pretrain) - {"sha"} == keys(config.pretrain)
    for name in ("model", "eval", "certify"):
        assert fields(getattr(settings, name)) == keys(config[name]), name
    sections = {name for name in config if hasattr(config[name], "items")}
    own = {"data", "pretrain", "model", "warmup", "eval", "certify"} | {"train", "magnet", "fidelity"}
    assert sections == own
    assert set(config) - sections == {f.name for f in dataclasses.fields(settings)} - own - {
        "recipe",
        "training",
    }


@pytest.mark.parametrize("dataset", ["digits", "toy2d", "cifar10", "svhn"])
def test_values_are_those_of_the_config(dataset):
    config = get_config("clustr_trades", dataset)
    for section, kind in (
        ("data", DataSettings),
        ("train", Recipe),
        ("fidelity", Switches),
        ("eval", EvalSettings),
    ):
        found = kind.of(config[section])
        for field in dataclasses.fields(found):
            if field.name in config[section] and field.name != "attack":
                assert getattr(found, field.name) == config[section][field.name]
    assert EvalSettings.of(config.eval).attack.eps == config.eval.attack.eps
    assert Settings.of(config) == Settings.of(config.to_dict())


def test_lists_of_json_are_tuples_and_what_is_missing_is_named():
    config = get_config("clustr", "digits").to_dict()
    section = config["eval"] | {"curve": [0.1, 0.2]}
    assert EvalSettings.of(section).curve == (0.1, 0.2)
    assert hash(EvalSettings.of(section)) == hash(EvalSettings.of(ConfigDict(section)))
    del section["slots"]
    with pytest.raises(UserError, match="no 'slots'"):
        EvalSettings.of(section)


def test_equal_trainers_are_one_program(rng, monkeypatch):
    """Another stage with the same settings traces nothing."""
    here = problem("clustr_qtrades", rng, **{"magnet.alpha": 3.0})
    traces, original = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: traces.append(1) or original(*a))
    config = get_config("clustr_qtrades", **{"magnet.alpha": 3.0})
    once = here.run(2)
    counted = len(traces)
    again = dataclasses.replace(
        here.trainer,
        settings=dataclasses.replace(
            here.trainer.settings, magnet=dataclasses.replace(here.trainer.settings.magnet)
        ),
        recipe=Recipe.of(dataclasses.asdict(here.trainer.recipe)),
    )
    assert again == here.trainer and again is not here.trainer and hash(again) == hash(here.trainer)
    here.trainer = again
    here.run(2)
    assert counted and len(traces) == counted
    assert TrainingSettings.of(config).magnet.alpha == 3.0
    jax.block_until_ready(once.step)
