"""What experiments/beyond.py compares: methods, the settings tried of each, and how much each may spend.

Every method has the same number of recipes, in the order in which they are tried, so that the first N of
each are an equal tuning budget. All share a network, an optimiser, a batch size and an average of weights
unless the recipe says otherwise.
"""

import dataclasses
import importlib

from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.training import cost

# Gradient passes of a row, of those that its scale allows.
TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Scale:
    """Where rows of equal cost are compared. `passes`: gradient passes per training image."""

    passes: int
    model: dict
    images: dict = dataclasses.field(default_factory=dict)


_HELD_OUT = {"data.train_size": 11_000, "data.val_size": 1 / 11}
SCALES = {
    # small budget, for tuning: 10,000 images, 1,000 of the training split held out
    "tune": Scale(30, {"model.width": 32}, _HELD_OUT),
    # all images, the fast network at half its width, for a short and a longer time, and at its own
    "quarter": Scale(30, {"model.width": 32}),
    "half": Scale(60, {"model.width": 32}),
    "fast": Scale(90, {"model.width": 64}),
    "resnet": Scale(30, {"model.name": "resnet8", "model.width": 64, "data.augment": "crop_flip"}),
    # of the tests: no figure means anything
    "dry": Scale(
        6, {"model.width": 4}, {"data.train_size": 300, "data.val_size": 0.2, "train.batch_size": 32}
    ),
}
# The share of the epochs over which the radius grows.
RAMP = 0.2

SHARED = {
    "train.optimizer": "sgd", "train.schedule": "onecycle", "train.momentum": 0.9, "train.nesterov": True,
    "train.batch_size": 128, "train.lr": 0.1, "train.weight_decay": 5e-4, "train.ema": 0.999,
}  # fmt: skip


def _lr(value: float) -> dict:
    return {"train.lr": value}


def _decay(value: float) -> dict:
    return {"train.weight_decay": value}


def _steps(count: int, step: float) -> dict:
    """Of `step` 255ths."""
    return {"train.attack.steps": count, "train.attack.step_size": step / 255}


_CE = {"train.loss": "ce", "train.ikl": 0.0}
_FGSM = _steps(1, 10) | {"train.noise": 0.0}
_TRADES = {"train.ikl": 0.0, "train.stop_target": False, "train.beta": 6.0}
# Of one stage, through either head.
_ONE_STAGE = (
    {}, _CE, _TRADES, _lr(0.2), _lr(0.05), {"train.loss": "ce"}, {"train.ikl": 5.0}, {"train.aim": "rival"},
)  # fmt: skip
_NOISE = _steps(1, 8) | {"train.noise": 2.0}
_FEW = _steps(1, 8) | {"train.attack_bn": "batch", "train.attack.start": "uniform"}
RECIPES: dict[str, tuple[dict, ...]] = {
    "clustr_at": (
        *_ONE_STAGE,
        {"magnet.k": 2},
        {"train.centroids": "simplex"},
        {"train.sampler": "magnet", "magnet.clusters": 10, "magnet.samples": 12},
        {"train.learn_variance": True},
    ),
    "linear_at": (*_ONE_STAGE, _decay(2e-3), _FGSM, {"train.beta": 6.0}, {"train.ema": 0.98}),
    "fast_at": (
        _steps(1, 10), _NOISE, _NOISE | _lr(0.2), _lr(0.2), _lr(0.05), _steps(1, 8), _NOISE | _decay(2e-3),
        _NOISE | _lr(0.05), _decay(2e-3), _NOISE | {"train.ema": 0.98}, _NOISE | _lr(0.4), _lr(0.4),
    ),
    "pgd_at": (
        _steps(2, 5), _steps(2, 5) | _lr(0.2), _steps(2, 5) | _lr(0.05), _steps(5, 3), _steps(9, 2),
        _steps(2, 5) | _decay(2e-3), _steps(5, 3) | _lr(0.2), _steps(2, 6), _steps(5, 3) | _lr(0.05),
        _steps(2, 5) | {"train.ema": 0.98}, _steps(2, 5) | _lr(0.4), _steps(5, 3) | _decay(2e-3),
    ),
    "trades": (
        _FEW, _steps(3, 4), _FEW | _lr(0.2), _FEW | {"train.beta": 9.0}, _FEW | {"train.beta": 4.0},
        _FEW | _lr(0.05), _FEW | {"train.noise": 2.0}, _FEW | _decay(2e-3),
        _steps(3, 4) | {"train.beta": 9.0}, _steps(8, 2), _FEW | {"train.ema": 0.98},
        _FEW | {"train.stop_target": True},
    ),
}  # fmt: skip


def row(name: str) -> tuple[str, dict]:
    """(method, what its recipe changes) of METHOD-NUMBER, counted from 1."""
    method, _, number = name.rpartition("-")
    if method not in RECIPES or not number.isdigit() or not 1 <= int(number) <= len(RECIPES[method]):
        known = ", ".join(f"{m}-1 to -{len(recipes)}" for m, recipes in RECIPES.items())
        raise UserError(f"there is no row {name!r}; known: {known}")
    return method, RECIPES[method][int(number) - 1]


def names(first: int) -> list[str]:
    """The first so many recipes of every method, in turns."""
    return [f"{method}-{i + 1}" for i in range(first) for method in RECIPES]


def settings(name: str, scale: str) -> dict:
    """All that a row sets on top of `configs/cifar10.py:METHOD,fast`, with the epochs that its passes allow.

    UserError where no whole number of epochs is within 5 % of the passes.
    """
    method, changes = row(name)
    chosen = SCALES[scale]
    found = SHARED | chosen.model | chosen.images | changes
    if "batch_size" not in str(changes) and scale == "dry":
        found["train.batch_size"] = chosen.images["train.batch_size"]
    each = gradients(method, found)
    epochs = max(1, round(chosen.passes / each))
    if abs(epochs * each - chosen.passes) > TOLERANCE * chosen.passes:
        raise UserError(
            f"{name} makes {each} gradient passes per image and epoch, and no number of epochs is within "
            f"{TOLERANCE:.0%} of the {chosen.passes} of scale {scale}; change train.attack.steps"
        )
    return found | {"train.epochs": epochs, "train.eps_ramp": round(RAMP * epochs, 2)}


def gradients(method: str, changes: dict) -> int:
    """Gradient passes per image and epoch of these settings."""
    config = importlib.import_module("configs.cifar10").get_config(f"{method},fast")
    config.update_from_flattened_dict(
        {k: v for k, v in changes.items() if k.startswith(("train.", "magnet."))}
    )
    config = configuration.resolve(config)
    return cost.gradients(method, TrainingSettings.of(config), Recipe.of(config.train))
