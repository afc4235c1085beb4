"""The sections of a config: equal ones hash alike, so that compiled functions can be keyed by them.

What a field means stands beside its default in configs/common.py.
"""

import dataclasses
import functools
import typing
from typing import Any, Protocol, Self

from clustr_jax.runtime.errors import UserError


class Keyed(Protocol):
    """A ConfigDict, or what JSON holds."""

    def __getitem__(self, name: Any, /) -> Any: ...

    def __contains__(self, name: Any, /) -> bool: ...


class Section:
    """A frozen dataclass that can be read from a mapping of its fields' names."""

    @classmethod
    def of(cls, section: Keyed) -> Self:
        """From a ConfigDict or from JSON; what is not a field is left where it is.

        UserError where a field without a default is missing: the config is not one of a run.
        """
        values, kinds = {}, _kinds(cls)
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]  the subclasses are dataclasses
            if field.name not in section:
                if field.default is dataclasses.MISSING:
                    raise UserError(f"the config has no {field.name!r}, which {cls.__name__} needs")
                continue
            value, kind = section[field.name], kinds[field.name]
            if isinstance(kind, type) and issubclass(kind, Section):
                value = kind.of(value)
            values[field.name] = tuple(value) if isinstance(value, (tuple, list)) else value
        return cls(**values)


@functools.cache
def _kinds(cls) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@dataclasses.dataclass(frozen=True)
class DataSettings(Section):
    """`config.data` and `config.pretrain`: which images, and how many of them."""

    name: str
    dir: str = ""
    train_size: int = 0
    test_size: int = 0
    val_size: float = 0.0
    augment: str = "none"
    placement: str = "auto"
    sha: str = ""  # of own images: names the content of both splits

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The box of the pixels; points in the plane have none."""
        return None if self.name.startswith("toy2d") else (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class ModelSettings(Section):
    """`config.model`."""

    name: str
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Recipe(Section):
    """How a stage is optimised: of `config.warmup` and of `config.train`."""

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    milestones: tuple[int, ...]
    decay: float
    replays: int
    eps_ramp: float
    ema: float
    nonfinite: str
    select: str
    awp: float
    target: float = 0.0  # accuracy at which a warm-up stops; 0: never
    nesterov: bool = True
    momentum: float = 0.9
    norm_bias_rate: float = 1.0
    lookahead: int = 0


@dataclasses.dataclass(frozen=True)
class AdversarySettings(Section):
    """`config.train.attack`: the adversary of training."""

    eps: float
    step_size: float
    steps: int
    start: str


@dataclasses.dataclass(frozen=True)
class TermSettings(Section):
    """What else `config.train` has: the terms of the objectives, and their adversary."""

    lam: float
    beta: float
    consistency: str
    stop_target: bool
    xent_lam: float
    radius: float
    nearest: int
    attack_bn: str
    monitor: bool
    attack: AdversarySettings
    label_smoothing: float = 0.0
    temperature: float = 0.0
    on_collapse: str = "warn"
    probe: int = 0
    noise: float = 0.0
    loss: str = "ce"
    aim: str = "labels"
    ikl: float = 0.0
    ikl_temperature: float = 4.0
    centroids: str = "learned"
    learn_variance: bool = False
    sampler: str = "uniform"


@dataclasses.dataclass(frozen=True)
class MagnetSettings(Section):
    """`config.magnet`: the Magnet loss, its batches and its clusters."""

    alpha: float
    fit: str
    k: int
    k_per_class: tuple[int, ...]
    clusters: int
    samples: int
    n_init: int
    max_iter: int
    sharpness: float
    seed_floor: float


@dataclasses.dataclass(frozen=True)
class Switches(Section):
    """`config.fidelity`, spelled out: this package's values or the authors', as reference.switches says."""

    scores: str
    hinge: str
    small_clusters: str
    sampler: str
    cluster_images: str
    first_clusters: str
    variance_images: str
    attack_statistics: str
    epoch_statistics: str
    logged_loss: str
    nearest: str
    epochs: str
    kl: str
    running_variance: str = "biased"


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """All that a train step may look at, but for how it is optimised (Recipe)."""

    method: str
    train: TermSettings
    magnet: MagnetSettings
    switches: Switches
    bounds: tuple[float, float] | None  # the box of the pixels

    @classmethod
    def of(cls, config: Keyed) -> Self:
        """Of a whole config."""
        return cls(
            config["method"],
            TermSettings.of(config["train"]),
            MagnetSettings.of(config["magnet"]),
            Switches.of(config["fidelity"]),
            DataSettings.of(config["data"]).bounds,
        )


@dataclasses.dataclass(frozen=True)
class AttackSettings(Section):
    """`config.eval.attack`: the attack of an evaluation."""

    eps: float
    step_size: float
    steps: int
    restarts: int


@dataclasses.dataclass(frozen=True)
class EvalSettings(Section):
    """`config.eval`."""

    n: int
    nearest: int
    quick: bool
    slots: int
    protocols: tuple[str, ...]
    diagnostics: bool
    transfer: tuple[str, ...]
    attack: AttackSettings
    paper_steps: tuple[int, ...]
    sweep: tuple[float, ...]
    curve: tuple[float, ...]
    apgd_steps: int
    targets: int
    queries: int


@dataclasses.dataclass(frozen=True)
class CertifySettings(Section):
    """`config.certify`."""

    rule: str
    radii: tuple[float, ...]
    steps: int
    restarts: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run's, as it runs (`stages.configuration.resolve`)."""

    method: str
    variant: str
    seed: int
    smoke: bool
    init_from: str
    data: DataSettings
    pretrain: DataSettings
    model: ModelSettings
    warmup: Recipe
    recipe: Recipe  # how stage 2 is optimised: config.train
    training: TrainingSettings
    eval: EvalSettings
    certify: CertifySettings

    @classmethod
    def of(cls, config: Keyed) -> Self:
        """Of a whole config whose switches are spelled out."""
        return cls(
            config["method"],
            config["variant"],
            config["seed"],
            config["smoke"],
            config["init_from"],
            DataSettings.of(config["data"]),
            DataSettings.of(config["pretrain"]),
            ModelSettings.of(config["model"]),
            Recipe.of(config["warmup"]),
            Recipe.of(config["train"]),
            TrainingSettings.of(config),
            EvalSettings.of(config["eval"]),
            CertifySettings.of(config["certify"]),
        )
