"""Opening a model: whatever it holds at the call becomes traced arguments, and nothing else is compiled in.

An attack is compiled once and called with many models. JAX keys a compiled program by the identity of the
function, and bakes in the arrays that it captures. So an attack after an update would use the weights of its
first call. Here a model is traced anew at every call (tens of milliseconds, no compilation). The arrays that
the trace captures become arguments of the program; the operations and the numbers in them are its name. The
same operations with other arrays run the same program; other operations are another program.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from clustr_jax.attacks import kept
from clustr_jax.attacks.attack_losses import View, logits_of
from clustr_jax.attacks.names import aval, coarsest, name_of, output_of, written
from clustr_jax.runtime.errors import UserError, first_line

# Methods of this package's own pytrees capture nothing and are never changed.
_OWN = "clustr_jax."


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["model"], meta_fields=["steady", "kind", "layout"]
)
@dataclasses.dataclass(frozen=True)
class Model:
    """What `wrap` makes of a model: a pytree, callable on images [B, ...] -> logits [B, Y]."""

    model: Partial
    steady: bool = True
    kind: str = "function"
    layout: str = "NHWC"  # of what the model takes; images are NHWC everywhere else

    def __call__(self, x: Float[Array | np.ndarray, "B ..."]) -> Float[Array, "B Y"]:
        """The logits."""
        return logits_of(logits_in(self.model(_laid_out(jnp.asarray(x, jnp.float32), self.layout))))


@dataclasses.dataclass(frozen=True)
class _Program:
    """The static part of an opened model. Two with the same name compute the same of their arguments."""

    name: bytes
    call: Callable = dataclasses.field(compare=False, repr=False)
    captured: tuple = dataclasses.field(compare=False, repr=False)

    def __call__(self, leaves, captured, x):
        """The logits, with `captured` in the place of the arrays that the function itself holds."""
        if not self.captured:
            return self.call(leaves, x)
        closed = jax.make_jaxpr(lambda leaves, x: self.call(leaves, x))(leaves, x)
        given = {id(old): new for old, new in zip(self.captured, captured, strict=True)}
        held = [c for c in closed.consts if isinstance(c, jax.Array)]
        if any(id(c) not in given for c in held):  # made while it is traced: the same ones in this order
            if [aval(c) for c in held] != [aval(c) for c in self.captured]:
                raise UserError(
                    f"logits_fn uses other arrays for {x.shape[0]} images than for another number; pass them "
                    f"as arguments: jax.tree_util.Partial(f, arrays), with f(arrays, x)"
                )
            given = {id(old): new for old, new in zip(held, captured, strict=True)}
        consts = [given.get(id(c), c) for c in closed.consts]
        return jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((leaves, x)))[0]


@dataclasses.dataclass(frozen=True)
class Opened:
    """What an attack needs to know of a model: how to call it, and what may be wrong with it.

    `kind` says how it goes into evaluation mode. `eager` calls it outside of its own jit, where it has
    one around arrays (None otherwise). `fickle`: it is another function each time it is traced.
    """

    model: Partial
    kind: str = "function"
    steady: bool = True
    eager: Callable | None = None
    fickle: bool = False
    classes: int | None = None  # None: it holds tracers, and was not looked at
    rounding: float = 0.0  # the coarsest unit in the last place of what it computes with


def as_partial(logits_fn: Callable) -> Partial:
    """`logits_fn` as a pytree, so that its arrays are traced: one compilation for all parameters.

    For code that is being traced, and for methods of this package's pytrees; `open_model` is for the rest.
    """
    if isinstance(logits_fn, Model):
        return logits_fn.model if logits_fn.layout == "NHWC" else Partial(_channels_first, logits_fn.model)
    if isinstance(logits_fn, Partial):
        return logits_fn
    owner = getattr(logits_fn, "__self__", None)
    if inspect.ismethod(logits_fn) and not jax.tree_util.all_leaves([owner]):
        return Partial(logits_fn.__func__, owner)
    if not inspect.isroutine(logits_fn) and not jax.tree_util.all_leaves([logits_fn]):
        return Partial(type(logits_fn).__call__, logits_fn)
    return Partial(logits_fn)


def open_model(logits_fn: Callable, shape: tuple[int, ...], sizes: tuple[int, ...] = ()) -> Opened:
    """Open it for batches of this shape. UserError where it cannot be called on them, or gives no logits.

    `sizes`: of other batches that it will be called on. Two that are one program at one size and not at
    another are two programs. Inside jit (where it holds tracers) nothing can be opened, and it is taken as
    it is.
    """
    if not callable(logits_fn):
        raise UserError(f"logits_fn must be a function of images [B, ...] -> [B, Y], got {_type(logits_fn)}")
    if isinstance(logits_fn, Model):
        return dataclasses.replace(
            _open(logits_fn.model, shape, sizes, logits_fn.layout),
            kind=logits_fn.kind,
            steady=logits_fn.steady,
        )
    return _open(logits_fn, shape, sizes)


def wrap(model: Callable, *, steady: bool = True, layout: str = "NHWC") -> Model:
    """A model as a pytree that attacks take, and a word on whether its logits may be unsteady.

    All attacks do this themselves, at every call, so that they never attack old weights. By hand it is needed
    for the two settings.

    Args:
        model: a function of images [B, H, W, C] -> logits [B, Y], a method of a pytree, a `Partial`, or a
            module of flax.nnx, bound flax.linen, equinox (`jax.vmap(model)`), haiku, Keras 3 on JAX,
            HuggingFace Flax (its `.logits` are taken).
        steady: False for a model whose logits are meant to depend on chance or on the batch (a randomised
            defence). Attacks then warn instead of refusing, and AutoAttack's result says so.
        layout: "NCHW" for a model that takes [B, C, H, W]: it gets the images [B, H, W, C] in its own layout.

    Returns:
        a `Model`, callable on images.

    Raises:
        UserError: for another layout.

    >>> weights = jnp.array([[1.0, -1.0]])
    >>> model = attacks.wrap(lambda x: x @ weights)
    >>> x, y = jnp.array([[0.2], [0.6]]), jnp.array([0, 0])
    >>> x_adv = attacks.fgsm(jax.random.key(0), model, x, y, eps=0.1)
    >>> print(x_adv[:, 0])
    [0.1 0.5]
    """
    if layout not in ("NHWC", "NCHW"):
        raise UserError(f"layout must be NHWC or NCHW, got {layout!r}")
    if isinstance(model, Model):
        return dataclasses.replace(model, steady=steady, layout=layout)
    return Model(as_partial(model), steady, kind_of(model), layout)


def _laid_out(x, layout):
    """Images [B, H, W, C] as a model of this layout takes them."""
    return jnp.moveaxis(x, -1, 1) if layout == "NCHW" else x


def _channels_first(model, x):
    return model(_laid_out(x, "NCHW"))


def kind_of(model: Any) -> str:
    """The library that a model comes from: "nnx", "equinox", "keras", "linen" or "function"."""
    inner = getattr(model, "__self__", None) or getattr(model, "__wrapped__", model)
    if isinstance(inner, Partial):
        inner = next(iter(inner.args), inner.func)
    names = {f"{base.__module__}." for base in type(inner).__mro__}
    for start, kind in (
        ("flax.nnx.", "nnx"),
        ("equinox.", "equinox"),
        ("keras.", "keras"),
        ("flax.linen.", "linen"),
    ):
        if any(name.startswith(start) for name in names):
            return kind
    return "function"


def _open(logits_fn, shape, sizes, layout="NHWC") -> Opened:
    partial = as_partial(logits_fn)
    kind = kind_of(logits_fn)
    leaves, tree = jax.tree.flatten((partial.args, partial.keywords))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return Opened(partial, kind)
    own = getattr(partial.func, "__module__", None) or ""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    if (
        layout == "NHWC"
        and own.startswith(_OWN)
        and not isinstance(partial.func, _Program)
        and all(map(_is_array, leaves))
    ):
        closed = _outputs(lambda _, x: logits_of(logits_in(partial(x))), [], images, kind)
        return Opened(partial, kind, classes=output_of(closed).shape[1], rounding=coarsest(closed.jaxpr))

    def caller(traced):
        def call(values, x):
            values = iter(values)
            full = [next(values) if t else a for t, a in zip(traced, leaves, strict=True)]
            args, keywords = jax.tree.unflatten(tree, full)
            with without_effects():
                return logits_in(partial.func(*args, _laid_out(x, layout), **keywords))

        return call

    # Python numbers are traced as well, where nothing branches on them; what is no array and no number is not
    traced = [_is_array(a) or type(a) in (int, float, complex) for a in leaves]
    if not all(map(_is_array, leaves)):
        try:
            kept.trace(caller(traced), [a for t, a in zip(traced, leaves, strict=True) if t], images)
        except Exception:  # told below, if this was not the reason
            traced = [_is_array(a) for a in leaves]
    call = caller(traced)
    values = [a for t, a in zip(traced, leaves, strict=True) if t]
    closed = _outputs(call, values, images, kind)
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        return Opened(partial, kind)
    found = name_of(closed, values, images)
    name, fickle, known = found.digest, False, (found.digest, sizes, written(partial.func))
    if known not in _KNOWN:
        fickle = kept.is_fickle(name, call, values, images)
        _KNOWN[known] = hashlib.sha256(name + b"".join(_names(call, values, images, sizes))).digest()
    if found.kept and not fickle:
        fickle = kept.check(closed, name, call, values, images)
    name = _KNOWN[known]
    while len(_KNOWN) > _MOST_KNOWN:
        del _KNOWN[next(iter(_KNOWN))]
    captured = tuple(c for c in closed.consts if isinstance(c, jax.Array))

    def eager(x):
        with jax.disable_jit():
            return call(values, jnp.asarray(x, jnp.float32))

    program = Partial(_Program(name, call, captured), values, captured)
    classes, rounding = output_of(closed).shape[1], coarsest(closed.jaxpr)
    return Opened(program, kind, True, eager if found.jitted else None, fickle, classes, rounding)


# Two models that are written alike and have one name at one size are not traced at the other sizes again.
# These are the names, by both; the oldest are forgotten.
_KNOWN: dict[tuple, bytes] = {}
_MOST_KNOWN = 1000


def _names(call, values, images, sizes):
    """The names of its traces for other numbers of images."""
    for size in sizes:
        others = jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype)
        try:
            yield name_of(kept.trace(call, values, others), values, others).digest
        except Exception:  # told when it is called on so many
            yield b"none"


def _outputs(call, values, images, kind):
    """The trace; UserError with a remedy where there is none, or where its result is not [B, Y]."""
    try:
        closed = kept.trace(call, values, images)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explained(call, values, images, error, kind)) from error
    output = output_of(closed)
    shape, dtype = output.shape, output.dtype
    if len(shape) != 2 or shape[0] != images.shape[0]:
        text = (
            f"logits_fn must return [B, Y] for images of shape {images.shape}, B = {images.shape[0]}, "
            f"got shape {shape}"
        )
        if _takes_one(call, values, images):
            text += "; it is a model of single images: give jax.vmap(logits_fn)"
        raise UserError(text)
    if shape[1] < 2:
        raise UserError(
            "logits_fn must return [B, Y] with at least 2 classes, got one column; of a binary model with "
            "the logit z [B, 1] give jnp.concatenate([jnp.zeros_like(z), z], axis=1)"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"logits_fn must return real numbers, got {dtype}; give logits, before any argmax or rounding"
        )
    return closed


def _explained(call, values, images, error, kind) -> str:
    """Why a model cannot be called on a batch, and what to do."""
    text = f"logits_fn fails on images of shape {images.shape}: {first_line(error, 160)}"
    shape = images.shape
    if _takes_one(call, values, images):
        return f"{text}; it takes single images: give jax.vmap(logits_fn)"
    if isinstance(error, (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError)):
        return f"{text}; it must be made of jax.numpy, without NumPy calls or `if` on pixels"
    if isinstance(error, jax.errors.UnexpectedTracerError) or "trace level" in str(error).lower():
        return f"{text}; it changes itself when called: {IN_EVALUATION[kind]}, and call it without nnx.jit"
    if _OF_TRAINING.search(str(error)):
        return f"{text}; {IN_EVALUATION[kind]}"
    if len(shape) == 4:
        swapped = (shape[0], *((shape[2], shape[3], shape[1]) if shape[1] <= 4 else (shape[3], *shape[1:3])))
        way = "x.transpose(0, 2, 3, 1)" if shape[1] <= 4 else "x.transpose(0, 3, 1, 2) inside logits_fn"
        other = jax.ShapeDtypeStruct(swapped, images.dtype)
        if _works(call, values, other):
            return f"{text}; it takes {swapped}: use {way}"
    if len(shape) > 1 and _works(call, values, jax.ShapeDtypeStruct((1, *shape), images.dtype)):
        return f"{text}; for one image give x[None] and y[None]"
    return text


def _takes_one(call, values, images) -> bool:
    return _works(call, values, jax.ShapeDtypeStruct(images.shape[1:], images.dtype), dimensions=1)


def _works(call, values, images, dimensions=2) -> bool:
    try:
        return len(output_of(kept.trace(call, values, images)).shape) == dimensions
    except Exception:  # whatever a model says of images that are not its own
        return False


def logits_in(outputs: Any):
    """The logits in a model's outputs: an array, a View, or an object's `.logits` (HuggingFace Flax)."""
    if isinstance(outputs, View):
        return outputs
    logits = getattr(outputs, "logits", None)
    if logits is not None:
        outputs = logits
    if hasattr(outputs, "shape") and hasattr(outputs, "dtype"):
        return outputs
    if isinstance(outputs, dict):
        keys = ", ".join(map(repr, list(outputs)[:8]))
        name = next((k for k in outputs if "logit" in str(k)), next(iter(outputs), "logits"))
        raise UserError(f"logits_fn returned a dict of {keys}; give lambda x: model(x)[{name!r}]")
    if isinstance(outputs, (tuple, list)):
        raise UserError(
            f"logits_fn returned a {type(outputs).__name__} of {len(outputs)}; give the one that holds the "
            f"logits: lambda x: model(x)[0]"
        )
    raise UserError(f"logits_fn returned {_type(outputs)}; it must return an array of logits [B, Y]")


# What modules say that are asked for dropout or for the statistics of a batch.
_OF_TRAINING = re.compile(
    "dropout|deterministic|rngs|PRNGKey|inference|running_average|is_training", re.IGNORECASE
)
# How a model of each library is put into evaluation mode.
IN_EVALUATION = {
    "nnx": "call model.eval() first",
    "equinox": "use eqx.nn.inference_mode(model)",
    "keras": "use lambda x: model(x, training=False)",
    "linen": "apply it with train=False (use_running_average=True, deterministic=True)",
    "function": (
        "put it into evaluation mode (nnx: model.eval(); equinox: eqx.nn.inference_mode(model); linen: "
        "use_running_average=True, deterministic=True; haiku: is_training=False; Keras: training=False)"
    ),
}


def without_effects():
    """A block in which Keras' layers leave their variables (moving averages, seeds) alone."""
    keras: Any = sys.modules.get("keras")
    return keras.StatelessScope() if hasattr(keras, "StatelessScope") else contextlib.nullcontext()


def _is_array(leaf) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _type(value) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
