"""From the config as given to the config as it runs: smoke sizes, fidelity switches, and what is refused."""

import math
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from clustr_jax import data, models
from clustr_jax.data import Split
from clustr_jax.evaluation import protocols
from clustr_jax.models import Net
from clustr_jax.reference import switches
from clustr_jax.runtime.errors import UserError
from clustr_jax.training import refit, train
from clustr_jax.training.objectives import CERTIFIED, METHODS, Method

# Of a setting: counts must fit the device's int32, and no rate or radius is larger.
_LARGEST = 2**31
# What the entries of tuples are; a config file gives ml_collections their number and no types.
_ENTRIES = {
    "model": {"mean": float, "std": float},
    "warmup": {"milestones": int}, "train": {"milestones": int},
    "magnet": {"k_per_class": int},
    "eval": {"protocols": str, "transfer": str, "paper_steps": int, "sweep": float, "curve": float},
    "certify": {"radii": float},
}  # fmt: skip
# The network of "auto" up to this side is cnn, whose hidden layer sees every pixel.
_SMALL = 16
# Switches of `fidelity` that change the clusters or statistics of weights trained with Magnet batches,
# and not those of their average.
_NOT_AVERAGED = ("cluster_images", "first_clusters", "variance_images", "epoch_statistics")
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
    method = METHODS.get(config.method)  # an unknown one is refused later
    return switches.apply(
        shrink(config) if config.smoke else config.copy_and_resolve_references(),
        fine_tunes=method is not None and method.sampler == "magnet" and method.warmup is not None,
    )


def complete(config: ConfigDict, train_split: Split, test_split: Split) -> ConfigDict:
    """What a config leaves to the data, filled in, so that config.json can be loaded without the data.

    An empty mean or std is that of the training images, per channel; the model "auto" is chosen by the
    size of the images; `data.sha` names the content of own images, whose eval.n is at most all of them.
    """
    config = config.copy_and_resolve_references()
    model = config.model
    if model.name == "auto":
        small, cheap = max(train_split.images.shape[1:3]) <= _SMALL, config.variant == "cpu"
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
    label = data.label(config.data).replace("/", "-")  # of imagenet_resized/32x32
    name = "-".join(part for part in (label, config.method, config.variant) if part)
    if pathlib.PurePath(name).name != name:
        raise UserError(f"variant may not contain path separators, got {config.variant!r}")
    return pathlib.Path("runs") / (name + ("-smoke" if config.smoke else ""))


def shrink(config: ConfigDict) -> ConfigDict:
    """The same job in seconds: few images, one epoch, a narrow network, few attack steps."""
    config = config.copy_and_resolve_references()
    config.data.train_size = min(config.data.train_size or math.inf, 400)
    config.data.test_size = min(config.data.test_size or math.inf, 200)
    config.pretrain.train_size = min(config.pretrain.train_size or math.inf, 400)
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


# How many a training stage has to train on, and held out.
Images = tuple[int, int]


def _stages(method: Method, own: Images, source: Images | None) -> dict[str, tuple[Method, Images]]:
    """Section of the config -> (method, images to train on and held out) of each training stage.

    Without a stage whose set is another one that is not read, because it is finished.
    """
    found = {"train": (method, own)}
    if method.warmup and (source or not method.source):
        found["warmup"] = METHODS[method.warmup], source or own
    return found


def _batches(config, stages: dict[str, tuple[Method, Images]], net: Net) -> dict[str, int]:
    """Images in a batch of each training stage, by the setting that decides it."""
    found = {}
    for name, (method, (size, _)) in stages.items():
        what = "magnet.clusters x magnet.samples" if method.sampler == "magnet" else f"{name}.batch_size"
        found[what] = train.Trainer(net, method, config, config[name], size).batch_size
    return found


def divisor(most: int, config, method: Method, net: Net, own: Images, source: Images | None = None) -> int:
    """The largest number of devices, up to `most`, that divides the batch of every stage.

    `own`, `source`: as for `check`.
    """
    sizes = _batches(config, _stages(method, own, source), net).values()
    return next(n for n in range(most, 0, -1) if not any(size % n for size in sizes))


def check_classes(section: str, settings, train_split: Split) -> None:
    """UserError where a class has no image to train on, with the setting that decides it."""
    counts = np.bincount(train_split.labels, minlength=train_split.num_classes)
    gone = np.flatnonzero(counts == 0)
    if not len(gone):
        return
    more = f" (and {len(gone) - 1} more of {len(counts)} classes)" if len(gone) > 1 else ""
    setting = f"{section}.train_size={settings.train_size}: raise it to {len(counts)} or more, or 0 for all"
    remedy = (
        setting if settings.train_size else f"{section}.val_size={settings.val_size}: lower it, or add some"
    )
    raise UserError(f"class {train_split.who(gone[0])} has no training images{more}, with {remedy}")


def check(
    config,
    method: Method,
    net: Net,
    train_split: Split,
    test_split: Split,
    *,
    held_out: int,
    source: Images | None = None,
    devices: int = 1,
) -> None:
    """UserError now for what would fail after the warm-up.

    `held_out`: how many images are; `source`: how many at_pretrain's first stage trains on and holds out,
    None where it is finished.
    """
    magnet, stages = config.magnet, _stages(method, (len(train_split), held_out), source)
    if config.eval.n > len(test_split):
        raise UserError(
            f"eval.n is {config.eval.n}, but there are only {len(test_split)} test images; lower it"
        )
    for name, value in (
        ("train.lam", config.train.lam), ("train.beta", config.train.beta),
        ("train.xent_lam", config.train.xent_lam), ("magnet.alpha", magnet.alpha),
        ("train.radius", config.train.radius),
    ):  # fmt: skip
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be >= 0, got {value}")
    if magnet.n_init < 1 or magnet.max_iter < 1:
        raise UserError(
            f"magnet.n_init and magnet.max_iter must be >= 1, got {magnet.n_init} and {magnet.max_iter}"
        )
    if not 0 < magnet.sharpness < math.inf:
        raise UserError(f"magnet.sharpness must be > 0, got {magnet.sharpness}")
    if not 0 <= magnet.seed_floor <= 1:
        raise UserError(f"magnet.seed_floor is a share in [0, 1], got {magnet.seed_floor}")
    if not all(value > 0 for value in config.model.std):
        raise UserError(f"model.std must be > 0, got {config.model.std}")
    for name, recipe in (("warmup", config.warmup), ("train", config.train)):
        if recipe.epochs < 0 or recipe.batch_size < 1 or not recipe.lr > 0:
            raise UserError(
                f"{name}: epochs must be >= 0, batch_size >= 1 and lr > 0, "
                f"got {recipe.epochs}, {recipe.batch_size} and {recipe.lr}"
            )
        if not (recipe.decay >= 0 and recipe.weight_decay >= 0):
            raise UserError(
                f"{name}: decay and weight_decay must be >= 0, got {recipe.decay} and {recipe.weight_decay}"
            )
        if recipe.replays < 1 or not 0 <= recipe.ema < 1 or recipe.awp < 0 or not recipe.eps_ramp >= 0:
            raise UserError(
                f"{name}: replays must be >= 1, ema in [0, 1), awp and eps_ramp >= 0, "
                f"got {recipe.replays}, {recipe.ema}, {recipe.awp} and {recipe.eps_ramp}"
            )
        if not all(isinstance(m, int) and m >= 0 for m in recipe.milestones):
            raise UserError(f"{name}.milestones are epochs, whole numbers, got {recipe.milestones}")
        for option, known in (("nonfinite", ("stop", "skip")), ("select", ("last", "best"))):
            if recipe[option] not in known:
                raise UserError(f"{name}.{option} must be {' or '.join(known)}, got {recipe[option]!r}")
        if 0 < recipe.epochs < recipe.eps_ramp:
            raise UserError(
                f"{name}.eps_ramp={recipe.eps_ramp} is longer than the {recipe.epochs} epochs, and the "
                f"adversary's radius would end below eps; lower it"
            )
        if recipe.get("target", 0.0) > 1:
            raise UserError(f"{name}.target is an accuracy in [0, 1], got {recipe.target}")
        train.optimizer(recipe, 1)
    check_classes("data", config.data, train_split)
    for name, (own, (size, kept)) in stages.items():
        recipe = config[name]
        section = "pretrain" if name == "warmup" and source else "data"
        for option, off in (("select", "last"), ("target", 0.0)):
            if recipe.get(option, off) != off and not kept:
                raise UserError(
                    f"{name}.{option}={recipe[option]} needs held-out images, and {section}.val_size="
                    f"{config[section].val_size} of {size} leaves none; "
                    f"raise it, or set {name}.{option}={off}"
                )
        if recipe.replays > 1 and (own.adversary is not None or recipe.awp):
            what = "awp" if recipe.awp else "the adversary of this method"
            raise UserError(
                f"{name}.replays={recipe.replays} carries its own perturbation along (Free AT), which leaves "
                f"out {what}; set {name}.replays=1" + (f", or {name}.awp=0" if recipe.awp else "")
            )
        if own.objective in CERTIFIED and recipe.replays > 1:
            raise UserError(
                f"{name}.replays={recipe.replays} carries a perturbation along (Free AT), and this method's "
                f"objective looks at clean images alone; set {name}.replays=1"
            )
        if own.objective in CERTIFIED and config.model.name not in models.UNIT:
            raise UserError(
                f"{config.method} needs a 1-Lipschitz network ({', '.join(models.UNIT)}), got "
                f"model.name={config.model.name}"
            )
        for switch in _NOT_AVERAGED if recipe.ema and own.sampler == "magnet" else ():
            if config.fidelity[switch] == switches.SWITCHES[switch].authors:
                raise UserError(
                    f"{name}.ema={recipe.ema} evaluates averaged weights, which fidelity.{switch}="
                    f"{config.fidelity[switch]} does not reach; set {name}.ema=0"
                )
    for what, size in _batches(config, stages, net).items():
        if size % devices:
            raise UserError(
                f"a batch of {size} images ({what}) cannot be shared evenly by {devices} devices; "
                f"make it a multiple, or let JAX see fewer devices"
            )
    for name, known in (("consistency", ("ce", "kl", "mse")), ("attack_bn", ("batch", "eval"))):
        if config.train[name] not in known:
            raise UserError(f"train.{name} must be one of {', '.join(known)}, got {config.train[name]!r}")
    if config.train.attack.steps < 1 or config.train.nearest < 0:
        raise UserError(
            f"train.attack.steps must be >= 1 and train.nearest >= 0, "
            f"got {config.train.attack.steps} and {config.train.nearest}"
        )
    protocols.check_settings(
        eps=config.train.attack.eps, step_size=config.train.attack.step_size, start=config.train.attack.start
    )
    for section in ("data", "pretrain"):
        augment = config[section].augment
        if augment not in ("crop_flip", "crop", "flip", "none"):
            raise UserError(f"{section}.augment must be crop_flip, crop, flip or none, got {augment!r}")
        if augment != "none" and len(net.input_shape) == 1 and (section == "data" or method.source):
            raise UserError(f"{section}.augment is of images, and these are points; set it to none")
    if config.magnet.fit not in ("kmeans", "linear_head"):
        raise UserError(f"magnet.fit must be kmeans or linear_head, got {config.magnet.fit!r}")
    if method.sampler == "magnet" and config.magnet.fit == "linear_head":
        if method.warmup is None or set(train.per_class(config, net.num_classes)) != {1}:
            raise UserError(
                f"magnet.fit=linear_head takes one cluster per class from a warm-up's head; got "
                f"{config.method} with magnet.k={config.magnet.k}: set magnet.k=1, or magnet.fit=kmeans"
            )
        refit.check_linear(net, net.init(jax.random.key(0)), train_split.pixels(slice(0, 8)))
    if method.sampler == "magnet":
        train.rows(config, net.num_classes)
        counts = np.bincount(train_split.labels, minlength=net.num_classes)
        for c, (count, k) in enumerate(zip(counts, train.per_class(config, net.num_classes), strict=True)):
            if count < k:
                raise UserError(
                    f"class {c} has {count} training images, fewer than its k={k} clusters; lower magnet.k"
                )
