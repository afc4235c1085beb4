"""From the config as given to the config as it runs: smoke sizes, switches, and what the data decides."""

import math
import pathlib

import numpy as np
from ml_collections import ConfigDict

from clustr_jax import data
from clustr_jax.data import Split
from clustr_jax.reference import switches
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import DataSettings
from clustr_jax.training.objectives import METHODS

# Of a setting: counts must fit the device's int32, and no rate or radius is larger.
_LARGEST = 2**31
# What the entries of tuples are; a config file gives ml_collections their number and no types.
_ENTRIES = {
    "model": {"mean": float, "std": float},
    "warmup": {"milestones": int},
    "train": {"milestones": int},
    "magnet": {"k_per_class": int},
    "eval": {"protocols": str, "transfer": str, "paper_steps": int, "sweep": float, "curve": float},
    "certify": {"radii": float},
}
# The network of "auto" up to this side is cnn, whose hidden layer sees every pixel.
_SMALL = 16
# Bytes of float64 pixels at a time, whatever the size of the images: 1,000 of 32 x 32 and more.
_CHUNK_BYTES = 2**25
_KINDS = {int: "whole numbers", float: "numbers", str: "words in quotes"}


def check_values(config: ConfigDict) -> None:
    """UserError for numbers that are none, and for tuples whose entries are of another type."""

    def check_number(name, value):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not -_LARGEST < value < _LARGEST:  # not a number fails as well
                raise UserError(f"{name} must be a finite number, got {value}")

    def visit(section, prefix):
        for name, value in section.items():
            if hasattr(value, "items"):
                visit(value, f"{prefix}{name}.")
            elif isinstance(value, (tuple, list)):
                entry = _ENTRIES.get(prefix[:-1], {}).get(name, float)
                accepted = (int, float) if entry is float else entry
                if not all(isinstance(v, accepted) and not isinstance(v, bool) for v in value):
                    raise UserError(f"{prefix}{name} must hold {_KINDS[entry]}, got {value}")
                for v in value:
                    check_number(prefix + name, v)
            else:
                check_number(prefix + name, value)

    visit(config, "")


def resolve(config: ConfigDict) -> ConfigDict:
    """The config as it will run: smoke settings applied, fidelity switches spelled out."""
    check_values(config)
    config = _floats(config)
    method = METHODS.get(config.method)  # an unknown one is refused later
    return switches.apply(
        shrink(config) if config.smoke else config.copy_and_resolve_references(),
        fine_tunes=method is not None and method.sampler == "magnet" and method.warmup is not None,
    )


def _floats(config):
    """Tuples of numbers as numbers of one type: (0,) and (0.0,) are one setting, and have one hash."""
    config = config.copy_and_resolve_references()
    for section, entries in _ENTRIES.items():
        for name, entry in entries.items():
            if entry is float and section in config:
                config[section][name] = tuple(float(value) for value in config[section][name])
    return config


def complete(config: ConfigDict, train_split: Split, test_split: Split) -> ConfigDict:
    """The config with what it leaves to the data filled in: config.json can then be loaded without the data.

    An empty mean or std is that of the training images, per channel. The models "auto" and, for two CPU
    cores, "auto_small" are chosen by the size of the images. `data.sha` names the content of own images,
    whose eval.n is at most all of them.
    """
    config = config.copy_and_resolve_references()
    model = config.model
    if model.name in ("auto", "auto_small"):
        small, cheap = max(train_split.images.shape[1:3]) <= _SMALL, model.name == "auto_small"
        model.name = "cnn" if small else "resnet8" if cheap else "resnet18"
    if not model.mean or not model.std:
        mean, std = statistics(train_split)
        model.mean, model.std = model.mean or mean, model.std or std
    if train_split.sha:
        with config.unlocked():
            config.data.sha = train_split.sha
    if config.smoke or train_split.sha:  # these numbers were chosen without knowing the set
        config.eval.n = min(config.eval.n, len(test_split))
    return config


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel's pixels in [0, 1], six digits; a channel of one colour has std 1."""
    rows = split.images.reshape(-1, split.images.shape[-1])  # of pixels: one image can be too large
    total, squares = np.zeros((2, rows.shape[1]))
    chunk = max(1, _CHUNK_BYTES // (8 * rows.shape[1]))
    for start in range(0, len(rows), chunk):
        pixels = (rows[start : start + chunk].astype(np.float32) / np.float32(split.scale)).astype(np.float64)
        total, squares = total + pixels.sum(axis=0), squares + np.square(pixels).sum(axis=0)
    mean = total / len(rows)
    std = np.sqrt(np.maximum(squares / len(rows) - np.square(mean), 0.0))
    std = np.where(std < 1e-6, 1.0, std)
    return tuple(round(float(v), 6) for v in mean), tuple(round(float(v), 6) for v in std)


def default_workdir(config: ConfigDict) -> pathlib.Path:
    """runs/<dataset>-<method>[-<variant>]"""
    label = data.label(DataSettings.of(config.data)).replace("/", "-")  # as in imagenet_resized/32x32
    name = "-".join(part for part in (label, config.method, config.variant) if part)
    if pathlib.PurePath(name).name != name:
        raise UserError(f"variant may not contain path separators, got {config.variant!r}")
    return pathlib.Path("runs") / (name + ("-smoke" if config.smoke else ""))


def shrink(config: ConfigDict) -> ConfigDict:
    """The same job in seconds: few images, one epoch, a narrow network, few attack steps."""
    config = config.copy_and_resolve_references()
    config.data.train_size = min(config.data.train_size or math.inf, 400)
    config.data.test_size = min(config.data.test_size or math.inf, 200)
    # of ImageNet's thousand classes each needs an image
    most = 2000 if config.pretrain.name.startswith("imagenet") else 400
    config.pretrain.train_size = min(config.pretrain.train_size or math.inf, most)
    config.pretrain.test_size = min(config.pretrain.test_size or math.inf, 100)
    for recipe in (config.warmup, config.train):
        recipe.epochs = min(recipe.epochs, 1)
        recipe.eps_ramp = min(recipe.eps_ramp, recipe.epochs)
        recipe.batch_size = min(recipe.batch_size, 64)
    config.model.width = min(config.model.width or 4, 4)
    config.train.attack.steps = min(config.train.attack.steps, 2)
    config.magnet.samples = min(config.magnet.samples, 4)
    config.magnet.n_init = 1
    config.eval.n = min(config.eval.n or 32, 32)
    config.eval.slots = min(config.eval.slots, 32)
    config.eval.attack.steps = min(config.eval.attack.steps, 4)
    config.eval.attack.restarts = min(config.eval.attack.restarts, 2)
    config.eval.paper_steps = tuple(sorted({min(steps, 4) for steps in config.eval.paper_steps}))
    config.eval.sweep, config.eval.curve = config.eval.sweep[:1], config.eval.curve[:1]
    config.eval.apgd_steps, config.eval.queries = min(config.eval.apgd_steps, 4), min(config.eval.queries, 20)
    config.eval.targets = min(config.eval.targets, 2)
    config.certify.steps, config.certify.restarts = min(config.certify.steps, 4), 1
    return config
