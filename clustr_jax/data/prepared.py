"""Sets that TFDS has prepared, read without TensorFlow; prepared in another process where they are not."""

import importlib.util
import os
import pathlib
import subprocess
import sys
from types import ModuleType

import numpy as np

from clustr_jax.data.split import Split
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.paths import local

# Sets of TFDS, and the published sizes of their splits.
PREPARED = {
    "cifar10": dict(sizes=(50_000, 10_000), num_classes=10),
    "cifar100": dict(sizes=(50_000, 10_000), num_classes=100),
    "svhn_cropped": dict(sizes=(73_257, 26_032), num_classes=10),
    "imagenet_resized/32x32": dict(sizes=(1_281_167, 50_000), num_classes=1000, test="validation"),
}


def default_data_dir() -> pathlib.Path:
    """Where TFDS looks: $TFDS_DATA_DIR or ~/tensorflow_datasets.

    >>> import os, pathlib
    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, TFDS_DATA_DIR="~/sets"):
    ...     data.default_data_dir() == pathlib.Path.home() / "sets"
    True
    """
    return local(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "TFDS_DATA_DIR")


def read(name: str, split: str, data_dir: str | pathlib.Path | None):
    import tensorflow_datasets as tfds

    directory = local(data_dir, "data.dir") if data_dir else default_data_dir()
    official = PREPARED[name]["sizes"][("train", "test").index(split)]
    split = PREPARED[name].get("test", "test") if split == "test" else split
    builder = _builder(tfds, name, directory)
    if builder is None:
        _prepare(name, directory)
        builder = _builder(tfds, name, directory)
    if builder is None or split not in builder.info.splits:
        raise UserError(
            f"{name} under {directory} has no {split} split; delete the folder and prepare it again"
        )
    size = builder.info.splits[split].num_examples
    try:
        source = builder.as_data_source(split=split)
        images = np.empty((size, 32, 32, 3), np.uint8)
        labels = np.empty(size, np.int32)
        for start in range(0, size, 1000):
            index = range(start, min(start + 1000, size))
            for i, example in zip(index, source.__getitems__(list(index)), strict=True):
                images[i], labels[i] = example["image"], example["label"]
    except MemoryError as error:
        raise UserError(
            f"the {size:,} images of {name}/{split} do not fit into this machine's memory ({error})"
        ) from error
    except Exception as error:  # array_record raises its own types for missing and truncated files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read {name}/{split} under {directory}: {reason}; delete it and prepare it again"
        ) from error
    subset = "" if size == official else f"{size} of the official {official} {split} images"
    return Split(images, labels, PREPARED[name]["num_classes"], 255.0, (0.0, 1.0), subset)


def _builder(tfds: ModuleType, name, directory):
    """The builder of a prepared set that can be read at random, or None."""
    try:
        builder = tfds.builder(name, data_dir=directory)
        builder.info.splits["train"]  # noqa: B018  raises where nothing is prepared
        formats = builder.info.file_format
    except (KeyError, ValueError, FileNotFoundError):
        return None
    if formats is None or formats.value not in ("array_record", "riegeli"):
        raise UserError(
            f"{name} under {directory} is prepared as {formats and formats.value}, which cannot be read "
            f"at random; set data.dir to another folder to have it prepared as array_record"
        )
    return builder


def _prepare(name, directory):
    """Download and prepare in another process: TensorFlow is never imported in this one."""
    hint = f"{name} is not prepared under {directory}"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{hint}; install tensorflow-cpu once and run `python -m clustr_jax.prepare {name}` to download "
            f"it, or set data.dir (pretrain.dir for what at_pretrain starts with, or TFDS_DATA_DIR) to a "
            f"folder that has it"
        )
    print(f"{hint}: downloading and preparing it, once ...", flush=True)
    command = [sys.executable, "-m", "clustr_jax.prepare", name, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{hint}; {last.removeprefix('error: ')}")
