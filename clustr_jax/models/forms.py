"""Which form of a convolution training uses on a CPU: by a table that benchmarks/convolutions.py measured.

A shape that the table does not have, an accelerator, another dtype, and everything that is evaluated keep the
convolution of `convolution.conv2d`.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from clustr_jax.models import patches, winograd

FILE = pathlib.Path(__file__).with_name("convolution_table.json")
PASSES = ("forward", "input_gradient", "kernel_gradient")


class Forms(NamedTuple):
    """The form of each pass: "winograd" or "patches"; "" is the usual one."""

    forward: str = ""
    input_gradient: str = ""
    kernel_gradient: str = ""


class Shape(NamedTuple):
    """What the choice depends on: kernel's side, stride, padding, image's side, channels in and out."""

    kernel: int
    stride: int
    padding: int
    side: int
    channels: int
    features: int


def usable(shape: Shape) -> tuple[str, ...]:
    """The forms that compute this convolution."""
    small = shape.kernel == winograd.SIZE and shape.stride == 1 and shape.padding < winograd.SIZE
    return ("winograd", "patches") if small else ("patches",)


@functools.cache
def table() -> dict[Shape, Forms]:
    """The measured shapes for which some form is faster than the usual one."""
    rows = json.loads(FILE.read_text())["shapes"]
    return {
        Shape(*(row[field] for field in Shape._fields)): Forms(*(row[name] for name in PASSES))
        for row in rows
    }


def chosen(x: Float[Array, "N H W C"], kernel: Float[Array, "k k C O"], stride: int, padding: int) -> Forms:
    """The table's forms for these arrays."""
    if x.dtype != jnp.float32 or kernel.dtype != jnp.float32 or x.shape[1] != x.shape[2]:
        return Forms()
    shape = Shape(kernel.shape[0], stride, padding, x.shape[1], *kernel.shape[2:])
    return table().get(shape, Forms())


def forward(form: str, x, kernel, stride: int, padding: int):
    """The convolution by this form."""
    if form == "winograd":
        return winograd.forward(x, kernel, padding)
    return patches.forward(x, kernel, stride, padding)


def input_gradient(form: str, dy, kernel, size: tuple[int, ...], stride: int, padding: int):
    """d loss / d x [N, *size, C] by this form."""
    if form == "winograd":  # the convolution of dy with the flipped kernel
        flipped = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
        return winograd.forward(dy, flipped, winograd.SIZE - 1 - padding)
    return patches.input_gradient(dy, kernel, size, stride, padding)


def kernel_gradient(form: str, x, dy, k: int, stride: int, padding: int):
    """d loss / d kernel by this form."""
    if form == "winograd":
        return winograd.kernel_gradient(x, dy, padding)
    return patches.kernel_gradient(x, dy, k, stride, padding)
