"""What an interrupted evaluation had done: the records of attacks, without images, in its results' `partial`."""

from clustr_jax.attacks.records import Records

__all__ = ["Records"]
