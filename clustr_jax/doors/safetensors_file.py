"""Classifiers as .safetensors files: `save` and `load` of clustr_jax.storage.safetensors_file."""

from clustr_jax.storage.safetensors_file import load, save

__all__ = ["load", "save"]
