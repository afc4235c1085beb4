"""A Classifier in one .safetensors file: parameters, statistics, clusters, and what it takes to rebuild it.

    save(clustr_jax.load("runs/digits-clustr_qtrades"), "model.safetensors")
    clf = clustr_jax.load("model.safetensors")              # bit for bit the same

Arrays are called params.<layer>.<name>, batch_stats.<layer>.<name> and clusters.<name>, in JAX's order; the
header's metadata has `format`, `classifier` (JSON: doors/description.py) and `sha256`, that of both. Files of
the format before, whose `sha256` is that of the arrays alone, are read as well.
Any reader of safetensors opens it, without JAX as well.
"""

import contextlib
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError, first_line
from clustr_jax.runtime.paths import local
from clustr_jax.storage import description

FORMAT, _ARRAYS_ALONE = "clustr_jax-2", "clustr_jax-1"
_CLUSTERS = ("centroids", "variance", "mask")


def save(clf: Classifier, path: str | pathlib.Path, **about: Any) -> None:
    """Write `clf` to `path`, in one piece; `about` (JSON values) is kept in its description.

    save(clf, "model.safetensors", trained="digits, ClusTR + QTRADES, seed 0")
    """
    arrays: dict[str, Any] = flatten_dict(clf.variables, sep=".")
    if clf.clusters is not None:
        found = {name: getattr(clf.clusters, name) for name in _CLUSTERS}
        arrays |= {f"clusters.{name}": value for name, value in found.items() if value is not None}
    arrays = {name: np.array(value, order="C") for name, value in arrays.items()}
    described = json.dumps(description.describe(clf) | {"about": about})
    metadata = {"format": FORMAT, "classifier": described, "sha256": _digest(arrays, described)}
    path = local(path, "the file")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(safetensors.numpy.save(arrays, metadata))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load(path: str | pathlib.Path) -> Classifier:
    """The classifier of a file that `save` wrote; UserError where it is damaged, or another kind of file.

    clf = load("model.safetensors")         # as clustr_jax.load does
    """
    path = local(path, "the file")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path} as a safetensors file: {first_line(error)}") from error
    if metadata.get("format") not in (FORMAT, _ARRAYS_ALONE):
        raise UserError(
            f"{path} has the format {metadata.get('format')!r}; expected {FORMAT!r}, as "
            f"clustr_jax.doors.safetensors_file.save writes it"
        )
    described = "" if metadata["format"] == _ARRAYS_ALONE else metadata.get("classifier", "")
    if metadata.get("sha256") != _digest(arrays, described):
        what = "arrays or description are" if described else "arrays are"
        raise UserError(f"{path} is damaged: its {what} not as they were saved; get it again")
    try:
        return _classifier(json.loads(metadata["classifier"]), arrays)
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold a classifier of this version: {first_line(error)}") from error


def _classifier(about, arrays):
    net = description.network(about)
    with jax.enable_x64(False):  # files hold float32, whatever the session computes in
        shapes: dict[str, Any] = flatten_dict(jax.eval_shape(net.init, jax.random.key(0)), sep=".")
    variables, clusters = {}, {}
    for name, value in arrays.items():
        if name.startswith("clusters."):
            clusters[name.removeprefix("clusters.")] = jnp.asarray(value)
            continue
        wanted = shapes.get(name)
        if wanted is None or (wanted.shape, wanted.dtype) != (value.shape, value.dtype):
            raise UserError(f"{name} {value.dtype} {value.shape} is not part of {about['model']}")
        variables[name] = jnp.asarray(value)
    missing = [name for name in shapes if name not in variables]
    if missing:
        raise UserError(f"{missing[0]} is missing")
    head = None
    if clusters:
        shape = clusters["centroids"].shape
        if shape[:1] != (net.num_classes,):
            raise UserError(f"clusters of shape {shape} for {net.num_classes} classes")
        head = Clusters(clusters["centroids"], clusters["variance"], clusters.get("mask"))
    nested = {"params": {}, "batch_stats": {}} | unflatten_dict(variables, sep=".")
    return Classifier(nested, head, net, nearest=int(about["nearest"]), bounds=description.bounds(about))


def _digest(arrays, described):
    """SHA-256 of names, types, shapes and bytes, then of the description."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name]
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    digest.update(described.encode())
    return digest.hexdigest()
