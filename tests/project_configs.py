"""The configs of the project: the data of each, and how one is opened."""

import importlib
import pathlib

import numpy as np
from absl import flags
from ml_collections import config_flags

from clustr_jax import data
from clustr_jax.training import objectives

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
VARIANTS = ("cpu", "fast")
# at_pretrain's first stage is on this set (imagenet_resized/32x32).
SOURCE = ((32, 32, 3), 1000, 1_281_167)


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
