"""Attacks on any function `x -> logits`: pure functions, x in [0, 1], one key, keyword-only settings.

`pgd`, `qtrades`, `fgsm` and `noise` can be compiled into other functions; `apgd`, `fab`, `square` and
`autoattack` schedule any number of images over a fixed number of slots (`scheduler.run`).
"""

from clustr_jax.attacks.adaptive import adaptive_restarts
from clustr_jax.attacks.ensemble import AutoAttackResult, apgd, autoattack, fab, square
from clustr_jax.attacks.models import wrap
from clustr_jax.attacks.nearest import NearestResult, ddn, fmn
from clustr_jax.attacks.options import UnitWarning
from clustr_jax.attacks.pgd import fgsm, noise, pgd, qtrades
from clustr_jax.attacks.pma import pma
from clustr_jax.attacks.resuming import RecordWarning
from clustr_jax.attacks.targets import malt_targets
from clustr_jax.attacks.trust import UnsteadyWarning
from clustr_jax.attacks.unattacked import UnattackedWarning
from clustr_jax.attacks.watching import Interrupted

__all__ = [
    "AutoAttackResult", "Interrupted", "NearestResult", "RecordWarning", "UnattackedWarning", "UnitWarning",
    "UnsteadyWarning", "adaptive_restarts", "apgd", "autoattack", "ddn", "fab", "fgsm", "fmn", "malt_targets",
    "noise", "pgd", "pma", "qtrades", "square", "wrap",
]  # fmt: skip
