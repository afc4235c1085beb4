"""What an interrupted evaluation had done: records of its attacks, without images, beside its results."""

from clustr_jax.attacks.records import Records

__all__ = ["Records"]
