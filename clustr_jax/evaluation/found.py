"""The adversarial images that a sound protocol finds: within eps, and the nearest one at any distance.

FMN and DDN look for the nearest; what other attacks found at any radius competes. All of them are brought in
along their own line, and one that then lies within eps counts as broken, whatever found it.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from clustr_jax.attacks import nearest
from clustr_jax.attacks.scheduler import Outcome
from clustr_jax.data import Examples
from clustr_jax.evaluation.plans import Plan
from clustr_jax.evaluation.subject import Subject
from clustr_jax.runtime.rounding import lengths


@dataclasses.dataclass
class Near:
    """The nearest adversarial image of each example (x where none is known), and its distance (inf)."""

    x: Float[np.ndarray, "N ..."]
    norm: str
    images: Float[np.ndarray, "N ..."]
    distance: Float[np.ndarray, "N"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "N ..."], norm: str) -> "Near":
        """Nothing known yet."""
        return cls(x, norm, np.array(x, np.float32), np.full(len(x), np.inf))

    def take(
        self, index: Int[np.ndarray, "M"], x_adv: Float[np.ndarray, "M ..."], restart: object = None
    ) -> None:
        """These examples are broken by these images, at whatever distance."""
        distance = lengths(x_adv, self.x[index], self.norm)
        nearer = distance < self.distance[index]
        self.images[index[nearer]], self.distance[index[nearer]] = x_adv[nearer], distance[nearer]

    def bring_in(self, subject: Subject, y: Int[np.ndarray, "N"], slots: int) -> None:
        """Each image to where its own line crosses the boundary."""
        index = np.flatnonzero(np.isfinite(self.distance))
        brought, distance = nearest.bring_in(
            subject.model, self.images[index], self.x[index], y[index], self.norm, subject.bounds, slots
        )
        self.take(index[np.isfinite(distance)], brought[np.isfinite(distance)])

    def look(
        self,
        plan: Plan,
        key: Array,
        subject: Subject,
        examples: Examples,
        index: Int[np.ndarray, "M"],
        outcome: Outcome,
        slots: int,
    ) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M ..."]]:
        """(distances, images) that an attack of minimum norm found on the examples at `index`; it takes them.

        inf, and the image itself, where it found none.
        """
        attack: Any = plan.attack
        part = examples.take(index)
        place, images = nearest.images_found(
            attack, key, subject.model, part.x, part.y, outcome, ids=part.ids, slots=slots
        )
        own, distance = np.array(part.x, np.float32), np.full(len(index), np.inf)
        own[place], distance[place] = nearest.bring_in(
            subject.model, images, part.x[place], part.y[place], self.norm, subject.bounds, slots
        )
        known = np.isfinite(distance)
        self.take(index[known], own[known])
        return distance, own


@dataclasses.dataclass
class Found:
    """The first adversarial image of each example in the order of the protocol (x where there is none).

    `restart` counts (target, restart) pairs of the attack; -1 where nothing broke it, or a transfer did.
    `near`: the nearest ones, of a protocol that looks for them.
    """

    x_adv: np.ndarray
    restart: np.ndarray
    near: Near | None = None

    @classmethod
    def of(cls, x: Float[np.ndarray, "N ..."]) -> "Found":
        """Nothing found yet."""
        return cls(np.array(x, np.float32), np.full(len(x), -1, np.int32))

    def take(
        self, index: Int[np.ndarray, "M"], x_adv: Float[np.ndarray, "M ..."], restart: Int[np.ndarray, "M"]
    ) -> None:
        """These examples were broken by these images."""
        self.x_adv[index], self.restart[index] = x_adv, restart
        if self.near is not None:
            self.near.take(index, x_adv)
