"""What a classifier is, besides its arrays, as JSON values; the files of several doors carry it."""

from collections.abc import Mapping
from typing import Any

from clustr_jax import models
from clustr_jax.classifier import Classifier
from clustr_jax.models import Net
from clustr_jax.runtime.errors import UserError

_FIELDS = ("model", "width", "num_classes", "input_shape", "mean", "std", "nearest", "bounds")


def describe(clf: Classifier) -> dict[str, Any]:
    """Architecture, shapes, normalisation, the deployed rule and the box of the pixels.

    describe(clf)["model"]                      # "cnn"
    """
    net, module = clf.net, clf.net.module
    return {
        "model": models.name_of(net),
        "width": module.width,
        "num_classes": net.num_classes,
        "input_shape": list(net.input_shape),
        "mean": list(module.mean),
        "std": list(module.std),
        "nearest": clf.nearest,
        "bounds": None if clf.bounds is None else list(clf.bounds),
    }


def network(description: Mapping[str, Any]) -> Net:
    """The network of a description; UserError where a field is missing or of another kind.

    network(describe(clf)) == clf.net            # but for the type that it was trained in (model.dtype)
    """
    missing = [name for name in _FIELDS if name not in description]
    if missing:
        raise UserError(f"the description of the network lacks {missing[0]!r}")
    try:
        return models.build(
            str(description["model"]),
            num_classes=int(description["num_classes"]),
            input_shape=tuple(int(n) for n in description["input_shape"]),
            mean=tuple(float(v) for v in description["mean"]),
            std=tuple(float(v) for v in description["std"]),
            width=int(description["width"]),
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"the description of the network cannot be read: {error}") from error


def bounds(description: Mapping[str, Any]) -> tuple[float, float] | None:
    """The box of the pixels, None for points."""
    box = description["bounds"]
    return None if box is None else (float(box[0]), float(box[1]))
