"""What an interrupted evaluation had done: records of its attacks, without images, beside its results."""

from typing import Protocol

import numpy as np
from jaxtyping import Float

from clustr_jax.attacks.records import Records
from clustr_jax.attacks.scheduler import Outcome

__all__ = ["Records", "Store"]


class Store(Protocol):
    """Where a protocol looks for what its attacks had done, and keeps it: `Records`, or those of a judge."""

    def load(
        self, name: str, x: Float[np.ndarray, "N ..."], restarts: int
    ) -> tuple[Outcome | None, dict[str, np.ndarray]]:
        """(the outcome to go on from, what was saved with it)."""
        ...

    def save(
        self,
        name: str,
        outcome: Outcome,
        extra: dict[str, np.ndarray] | None = None,
        *,
        now: bool = False,
        leaving: bool = False,
    ) -> None:
        """Store it, if it is time to; `now`: it has ended, `leaving`: it is interrupted."""
        ...
