"""Attacks on any function `x -> logits`: pure functions, x in [0, 1], one key, keyword-only settings."""

from clustr_jax.attacks.pgd import pgd, qtrades

__all__ = ["pgd", "qtrades"]
