"""Checks of the machine and of the attacks themselves, on problems whose answers are known."""

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation.check import PASS, Check, status_of
from clustr_jax.runtime import canary


def toy(key: Array) -> Check:
    """17: nearest centroid on linear features, where the answer is known: the attack has to find it."""
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(5, 1, 12)).astype(np.float32)
    y = np.arange(100) % 5
    x = (mu[y, 0] + 0.4 * rng.normal(size=(100, 12))).astype(np.float32)
    eps = 0.6
    gaps = mu[y, 0][:, None] - mu[None, :, 0]
    margins = np.sum(gaps * (x[:, None] - (mu[y, 0][:, None] + mu[None, :, 0]) / 2), axis=2)
    margins = np.where(np.arange(5)[None] == y[:, None], np.inf, margins - eps * np.abs(gaps).sum(axis=2))
    exact = margins.min(axis=1) > 0
    model = Partial(_nearest_centroid, Clusters(jnp.asarray(mu), jnp.float32(1.0)))
    attack = PGD(
        eps=jnp.float32(eps),
        steps=20,
        norm="linf",
        bounds=None,
        step_size=jnp.float32(eps / 4),
        loss=attack_losses.one(attack_losses.margin_targeted),
    )
    targets = np.stack([(y + k) % 5 for k in range(1, 5)]).astype(np.int32)
    outcome = scheduler.run(attack, key, model, x, y, targets=targets)
    wrong = int(np.sum(outcome.broken == exact))
    return Check(17, "a problem whose answer is known: mistakes", status_of(wrong == 0), wrong, "0 of 100")


def compiler() -> Check:
    """21: the compiler computes right numbers; a wrong one has ended the program before this."""
    answer = canary.check()
    note = f"{answer.programs} programs of {answer.patterns} kinds against NumPy in float64"
    limit = f"<= {canary.TOLERANCE:g}"
    return Check(21, "the compiler computes right numbers: error", PASS, answer.worst, limit, note)


def _nearest_centroid(clusters, x):
    return clusters.log_scores(x)
