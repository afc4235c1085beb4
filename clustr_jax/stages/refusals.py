"""What is refused before hours have gone into it: settings that cannot work, one check for each section."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from clustr_jax import models
from clustr_jax.attacks.pgd import check_settings
from clustr_jax.data import Split
from clustr_jax.models import Net
from clustr_jax.reference.switches import SWITCHES
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.paths import local
from clustr_jax.runtime.stage_names import TRAIN, WARMUP
from clustr_jax.settings import DataSettings, MagnetSettings, ModelSettings, Recipe, Settings, TermSettings
from clustr_jax.stages import guarding
from clustr_jax.storage import loading
from clustr_jax.storage.workdir import Workdir
from clustr_jax.training import refit, trainers
from clustr_jax.training.adversaries import AIMS, towards_chosen
from clustr_jax.training.objectives import CERTIFIED, METHODS, Method, both_sides, draws_clusters
from clustr_jax.training.placement import Placement
from clustr_jax.training.train_state import ALTERNATE

# Switches of `fidelity` that change the clusters or statistics of weights trained with Magnet batches,
# and not those of their average.
_NOT_AVERAGED = ("cluster_images", "first_clusters", "variance_images", "epoch_statistics")
# But for these values, which reach both.
_AVERAGED_TOO = ("clean",)

_AUGMENTS = ("crop_flip", "crop", "flip", ALTERNATE, "none")

# How many a training stage has to train on, and held out.
Images = tuple[int, int]


def check(
    settings: Settings,
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
    stages = _stages(method, (len(train_split), held_out), source)
    if settings.eval.n > len(test_split):
        raise UserError(
            f"eval.n is {settings.eval.n}, but there are only {len(test_split)} test images; lower it"
        )
    check_terms(settings.training.train)
    check_magnet(settings.training.magnet)
    check_model(settings.model)
    for name, recipe in (("warmup", settings.warmup), ("train", settings.recipe)):
        check_recipe(name, recipe)
    check_classes("data", settings.data, train_split)
    for name, (own, images) in stages.items():
        _check_stage(name, own, images, settings, pretrained=bool(name == "warmup" and source))
    for what, size in _batches(settings, stages, net).items():
        if size % devices:
            raise UserError(
                f"a batch of {size} images ({what}) cannot be shared evenly by {devices} devices; "
                f"make it a multiple, or let JAX see fewer devices"
            )
    points = len(net.input_shape) == 1
    check_augment("data", settings.data, points=points)
    check_augment("pretrain", settings.pretrain, points=points and method.source)
    if method.head == "clusters" or draws_clusters(method, settings.training):
        _check_clusters(settings.training.magnet, settings.method, method, net, train_split)


def check_paths(settings: Settings) -> None:
    """UserError for a path that no file can have, of a setting that this run may never come to."""
    named = [
        ("init_from", settings.init_from),
        ("data.dir", settings.data.dir),
        ("pretrain.dir", settings.pretrain.dir),
        *(("eval.transfer", path) for path in settings.eval.transfer),
    ]
    for name, path in named:
        if path:
            local(path, name)


def check_start(settings: Settings, method: Method, place: Workdir, wanted: Sequence[str]) -> None:
    """UserError where the first stage is to start from a model that is not there."""
    first = WARMUP if method.warmup else TRAIN
    begun = place.finished(first) is not None or (place.stage(first) / "checkpoints").exists()
    if settings.init_from and first in wanted and not begun:
        loading.check_there(settings.init_from)


def check_classes(section: str, settings: DataSettings, train_split: Split) -> None:
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


def divisor(
    most: int, settings: Settings, method: Method, net: Net, own: Images, source: Images | None = None
) -> int:
    """The largest number of devices, up to `most`, that divides the batch of every stage.

    `own`, `source`: as for `check`.
    """
    sizes = _batches(settings, _stages(method, own, source), net).values()
    return next(n for n in range(most, 0, -1) if not any(size % n for size in sizes))


def _stages(method: Method, own: Images, source: Images | None) -> dict[str, tuple[Method, Images]]:
    """Section of the config -> (method, images to train on and held out) of each training stage.

    The warm-up on another data set is left out when it is finished: that set is then not read.
    """
    found = {"train": (method, own)}
    if method.warmup and (source or not method.source):
        found["warmup"] = METHODS[method.warmup], source or own
    return found


def _recipe(settings: Settings, section: str) -> Recipe:
    return settings.warmup if section == "warmup" else settings.recipe


def _batches(settings: Settings, stages: dict[str, tuple[Method, Images]], net: Net) -> dict[str, int]:
    """Images in a batch of each training stage, by the setting that decides it."""
    found = {}
    for name, (method, (size, _)) in stages.items():
        drawn = draws_clusters(method, settings.training)
        what = "magnet.clusters x magnet.samples" if drawn else f"{name}.batch_size"
        trainer = trainers.Trainer(net, method, settings.training, _recipe(settings, name), size)
        found[what] = trainer.batch_size
    return found


def check_terms(train: TermSettings) -> None:
    """Of `train`: the weights of the objectives, and their adversary."""
    for name in ("lam", "beta", "xent_lam", "radius", "temperature", "noise", "ikl"):
        if not 0 <= getattr(train, name) < math.inf:
            raise UserError(f"train.{name} must be >= 0, got {getattr(train, name)}")
    if not 0 <= train.label_smoothing < 1:
        raise UserError(f"train.label_smoothing must be in [0, 1), got {train.label_smoothing}")
    for name, known in (
        ("consistency", ("ce", "kl", "mse")),
        ("attack_bn", ("batch", "eval")),
        ("on_collapse", guarding.ANSWERS),
        ("loss", ("ce", "trades")),
        ("aim", tuple(AIMS)),
        ("centroids", ("learned", "simplex")),
        ("sampler", ("uniform", "magnet")),
    ):
        if getattr(train, name) not in known:
            raise UserError(f"train.{name} must be one of {', '.join(known)}, got {getattr(train, name)!r}")
    if not 0 < train.ikl_temperature < math.inf:
        raise UserError(f"train.ikl_temperature must be > 0, got {train.ikl_temperature}")
    if train.noise and train.attack.steps != 1:
        raise UserError(
            f"train.noise={train.noise} is of one step (N-FGSM), and train.attack.steps is "
            f"{train.attack.steps}; set train.noise=0, or take one step"
        )
    if train.probe < 0:
        raise UserError(f"train.probe is a number of held-out images, 0 for none, got {train.probe}")
    if train.attack.steps < 1 or train.nearest < 0:
        raise UserError(
            f"train.attack.steps must be >= 1 and train.nearest >= 0, "
            f"got {train.attack.steps} and {train.nearest}"
        )
    check_settings(eps=train.attack.eps, step_size=train.attack.step_size, start=train.attack.start)


def check_magnet(magnet: MagnetSettings) -> None:
    """Of `magnet`, whatever the data."""
    if not 0 <= magnet.alpha < math.inf:
        raise UserError(f"magnet.alpha must be >= 0, got {magnet.alpha}")
    if magnet.n_init < 1 or magnet.max_iter < 1:
        raise UserError(
            f"magnet.n_init and magnet.max_iter must be >= 1, got {magnet.n_init} and {magnet.max_iter}"
        )
    if not 0 < magnet.sharpness < math.inf:
        raise UserError(f"magnet.sharpness must be > 0, got {magnet.sharpness}")
    if not 0 <= magnet.seed_floor <= 1:
        raise UserError(f"magnet.seed_floor is a share in [0, 1], got {magnet.seed_floor}")
    if magnet.fit not in ("kmeans", "linear_head"):
        raise UserError(f"magnet.fit must be kmeans or linear_head, got {magnet.fit!r}")


def check_model(model: ModelSettings) -> None:
    """Of `model`, beside what `models.build` refuses."""
    if not all(value > 0 for value in model.std):
        raise UserError(f"model.std must be > 0, got {model.std}")


def check_recipe(name: str, recipe: Recipe) -> None:
    """Of `warmup` or `train`: how it is optimised."""
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
        value = getattr(recipe, option)
        if value not in known:
            raise UserError(f"{name}.{option} must be {' or '.join(known)}, got {value!r}")
    if 0 < recipe.epochs < recipe.eps_ramp:
        raise UserError(
            f"{name}.eps_ramp={recipe.eps_ramp} is longer than the {recipe.epochs} epochs, and the "
            f"adversary's radius would end below eps; lower it"
        )
    if not 0 <= recipe.momentum < 1 or recipe.norm_bias_rate <= 0 or recipe.lookahead < 0:
        raise UserError(
            f"{name}: momentum must be in [0, 1), norm_bias_rate positive and lookahead >= 0 (steps), "
            f"got {recipe.momentum}, {recipe.norm_bias_rate} and {recipe.lookahead}"
        )
    if recipe.target > 1:
        raise UserError(f"{name}.target is an accuracy in [0, 1], got {recipe.target}")
    trainers.optimizer(recipe, 1)


def _check_stage(name: str, method: Method, images: Images, settings: Settings, *, pretrained: bool) -> None:
    """What a stage's recipe asks of its method and images. `pretrained`: on the source data set."""
    recipe, (size, kept) = _recipe(settings, name), images
    section, source = ("pretrain", settings.pretrain) if pretrained else ("data", settings.data)
    for option, off in (("select", "last"), ("target", 0.0)):
        value = getattr(recipe, option)
        if value != off and not kept:
            raise UserError(
                f"{name}.{option}={value} needs held-out images, and {section}.val_size="
                f"{source.val_size} of {size} leaves none; raise it, or set {name}.{option}={off}"
            )
    answer = settings.training.train.on_collapse
    if answer != guarding.WARN and not kept:
        raise UserError(
            f"train.on_collapse={answer} needs held-out images to see a collapse, and {section}.val_size="
            f"{source.val_size} of {size} leaves none; raise it, or set train.on_collapse={guarding.WARN}"
        )
    if recipe.replays > 1 and (method.adversary is not None or recipe.awp):
        what = "awp" if recipe.awp else "the adversary of this method"
        raise UserError(
            f"{name}.replays={recipe.replays} carries its own perturbation along (Free AT), which leaves "
            f"out {what}; set {name}.replays=1" + (f", or {name}.awp=0" if recipe.awp else "")
        )
    one_sided = not both_sides(settings.training)
    if method.adversary is towards_chosen and settings.training.train.aim == "clean" and one_sided:
        raise UserError(
            "train.aim=clean leads away from the prediction on clean images, which train.loss=ce does not "
            "make; set train.loss=trades, or train.aim=labels"
        )
    if method.objective in CERTIFIED and recipe.replays > 1:
        raise UserError(
            f"{name}.replays={recipe.replays} carries a perturbation along (Free AT), and this method's "
            f"objective looks at clean images alone; set {name}.replays=1"
        )
    if method.objective in CERTIFIED and settings.model.name not in models.UNIT:
        raise UserError(
            f"{settings.method} needs a 1-Lipschitz network ({', '.join(models.UNIT)}), got "
            f"model.name={settings.model.name}"
        )
    averaged = recipe.ema and draws_clusters(method, settings.training)
    for switch in _NOT_AVERAGED if averaged else ():
        value = getattr(settings.training.switches, switch)
        if value not in (SWITCHES[switch].ours, *_AVERAGED_TOO):
            raise UserError(
                f"{name}.ema={recipe.ema} evaluates averaged weights, which fidelity.{switch}="
                f"{value} does not reach; set {name}.ema=0"
            )


def check_augment(section: str, images: DataSettings, *, points: bool) -> None:
    """Of `data` and `pretrain`: the augmentation; `points`: it is of points that are trained on."""
    if images.augment not in _AUGMENTS:
        known = f"{', '.join(_AUGMENTS[:-1])} or {_AUGMENTS[-1]}"
        raise UserError(f"{section}.augment must be {known}, got {images.augment!r}")
    if images.augment != "none" and points:
        raise UserError(f"{section}.augment is of images, and these are points; set it to none")


def check_leak(settings: Settings, lies: Placement) -> None:
    """UserError where all training images would be on a device at once, and are too many for it."""
    switch = settings.training.switches.epoch_statistics
    if lies.sharded and switch == SWITCHES["epoch_statistics"].authors:
        raise UserError(
            f"fidelity.epoch_statistics={switch} puts all training images on every device, and they are "
            "sharded (data.placement); set fidelity.epoch_statistics=keep, or data.placement=every_device"
        )


def _check_clusters(magnet: MagnetSettings, name: str, method: Method, net: Net, train_split: Split) -> None:
    """What the clusters ask of the network and of the training images."""
    k_of = trainers.per_class(magnet, net.num_classes)
    if magnet.fit == "linear_head":
        if method.warmup is None or set(k_of) != {1}:
            raise UserError(
                f"magnet.fit=linear_head takes one cluster per class from a warm-up's head; got "
                f"{name} with magnet.k={magnet.k}: set magnet.k=1, or magnet.fit=kmeans"
            )
        refit.check_linear(net, net.init(jax.random.key(0)), train_split.pixels(slice(0, 8)))
    trainers.rows(magnet, net.num_classes)
    counts = np.bincount(train_split.labels, minlength=net.num_classes)
    for c, (count, k) in enumerate(zip(counts, k_of, strict=True)):
        if count < k:
            raise UserError(
                f"class {c} has {count} training images, fewer than its k={k} clusters; lower magnet.k"
            )
