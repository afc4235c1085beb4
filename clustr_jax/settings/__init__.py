"""What a run's config says, section by section, as frozen dataclasses: what each room may read of it.

They are made once, at the door, from a ConfigDict or from config.json; names are those of `--config.*`.
"""

from clustr_jax.settings.sections import (
    AdversarySettings,
    AttackSettings,
    CertifySettings,
    DataSettings,
    EvalSettings,
    MagnetSettings,
    ModelSettings,
    Recipe,
    Settings,
    Switches,
    TermSettings,
    TrainingSettings,
)

__all__ = [
    "AdversarySettings", "AttackSettings", "CertifySettings", "DataSettings", "EvalSettings",
    "MagnetSettings", "ModelSettings", "Recipe", "Settings", "Switches", "TermSettings", "TrainingSettings",
]  # fmt: skip
