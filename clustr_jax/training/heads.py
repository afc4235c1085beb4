"""Heads in training: the logits and the probabilities of a network's outputs, linear or by clusters."""

import jax
import jax.numpy as jnp

from clustr_jax.clusters import Clusters
from clustr_jax.models import Outputs
from clustr_jax.settings import TrainingSettings

# Log score, below the best class, of a class that owns none of the `train.nearest` clusters: far
# enough to count as zero probability, near enough to keep cross entropies finite.
_CUT = 50.0


def head_logits(outputs: Outputs, clusters: Clusters | None, settings: TrainingSettings):
    """Logits of the linear head, or of the clusters (log scores; exp scores as the authors do)."""
    if clusters is None:
        return outputs.logits
    nearest = settings.train.nearest or None
    if settings.switches.scores == "exp":
        return clusters.scores(outputs.embeddings, nearest)
    log_scores = clusters.log_scores(outputs.embeddings, nearest)
    if nearest is None:
        return log_scores
    floor = jnp.max(log_scores, axis=1, keepdims=True) - _CUT
    return jnp.where(jnp.isneginf(log_scores), floor, log_scores)


def head_probs(outputs: Outputs, clusters: Clusters | None, settings: TrainingSettings):
    """Class probabilities p(f(x)); with exp scores normalised as the authors do (their 1e-12)."""
    logits = head_logits(outputs, clusters, settings)
    if clusters is None or settings.switches.scores == "log":
        return jax.nn.softmax(logits)
    return logits / jnp.maximum(jnp.sum(logits, axis=1, keepdims=True), 1e-12)
