"""The name of a program: a hash of all that its trace says, but for the values of the arrays it captures.

Two functions with the same name compute the same of their arguments and of what they capture.
"""

import contextlib
import hashlib
import re
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core as trace

from clustr_jax.runtime import arrays

ClosedJaxpr = trace.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]


def aval(array: Any):
    """Shape and dtype."""
    return array.shape, array.dtype


def output_of(closed: ClosedJaxpr) -> Any:
    """Of a traced model the first output, with its shape and dtype: the logits."""
    return closed.out_avals[0]


def coarsest(jaxpr: Any) -> float:
    """The largest unit in the last place, of 1, of the types that a trace computes with (0: no floats)."""
    types, seen, waiting = set(), set(), [jaxpr]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (tuple, list)):
            waiting.extend(value)
            continue
        if isinstance(value, trace.ClosedJaxpr):  # pyright: ignore[reportPrivateImportUsage]
            value = value.jaxpr
        if isinstance(value, (trace.Jaxpr, type(jaxpr))) and id(value) not in seen:
            seen.add(id(value))
            for eqn in value.eqns:
                types.update(getattr(v.aval, "dtype", None) for v in eqn.outvars)
                waiting.extend(eqn.params.values())
    floats = [t for t in types if t is not None and jnp.issubdtype(t, jnp.floating)]
    return max((float(jnp.finfo(t).eps) for t in floats), default=0.0)


def written(function: Any, depth: int = 4) -> Any:
    """How a function is written, as far as that is seen without a call: its code and the numbers it holds."""
    function = getattr(function, "__func__", function)
    if not depth or not hasattr(function, "__code__"):
        return function if isinstance(function, (int, float, str, type(None))) else type(function)
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # of a variable that has no value yet
            held.append(cell.cell_contents)
    return function.__code__, tuple(written(value, depth - 1) for value in held)


class Name(NamedTuple):
    """Of a trace: its hash, whether a jit inside holds arrays of its own, and whether anything inside is kept
    by JAX from one trace to the next."""

    digest: bytes
    jitted: bool = False
    kept: bool = False


def name_of(closed: ClosedJaxpr, values: Any, images: jax.ShapeDtypeStruct) -> Name:
    """The name of the trace of a `call(values, x)`."""
    writer = Writer()
    writer.closed(closed)
    if writer.ruled:  # the gradient of somebody's rule can hold what the forward pass does not
        direction = jax.ShapeDtypeStruct(*aval(output_of(closed)))
        given = [isinstance(c, jax.Array) for c in closed.consts]

        def backward(values, captured, x, d):
            """As the attack differentiates it: what the forward pass captures is an argument, and what a rule
            captures is compiled in, though it be the same array."""
            rest = iter(captured)
            consts = [next(rest) if g else c for g, c in zip(given, closed.consts, strict=True)]
            return jax.vjp(
                lambda x: jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((values, x)))[0], x
            )[1](d)

        captured = [c for g, c in zip(given, closed.consts, strict=True) if g]
        with contextlib.suppress(Exception):  # a model without a gradient: Square takes it all the same
            writer.closed(jax.make_jaxpr(backward)(values, captured, images, direction), arguments=set())
    return Name(writer.hash.digest(), writer.jitted, writer.cached)


# Objects that callbacks hold, known by their ids: one that went away would leave its id to another. The
# programs that call them hold them as well.
_ON_HOST: dict[int, object] = {}


class Writer:
    """Writes a trace into a hash.

    `jitted`: a jit inside of it holds arrays of its own. `ruled`: it has derivatives of somebody's own.
    `cached`: it has parts that JAX keeps from one trace to the next, and that are not of JAX itself.
    """

    def __init__(self):
        self.hash, self.seen, self.jitted, self.ruled, self.cached = hashlib.sha256(), {}, False, False, False
        self.inside = 0  # of how many jits of JAX itself
        self.kept = []  # what `seen` knows by its id must not go away

    def add(self, *parts: object):
        self.hash.update(repr(parts).encode())

    def closed(self, closed: ClosedJaxpr, arguments: set[int] | None = None):
        """A trace; of its arrays those that are arguments (None: all) have no value yet."""
        self.jaxpr(closed.jaxpr)
        for const in closed.consts:
            if isinstance(const, jax.Array) and (arguments is None or id(const) in arguments):
                self.add("argument", aval(const))
            else:
                self.value(const)

    def jaxpr(self, jaxpr: trace.Jaxpr):
        if id(jaxpr) in self.seen:  # jit gives the same object for the same function and shapes
            return self.add("again", self.seen[id(jaxpr)])
        self.seen[id(jaxpr)] = len(self.seen)
        self.kept.append(jaxpr)
        names = {}

        def variables(atoms):
            for atom in atoms:
                if isinstance(atom, trace.Literal):
                    self.value(atom.val)
                else:
                    self.add(names.setdefault(atom, len(names)), str(atom.aval))

        self.add("jaxpr", len(jaxpr.constvars), len(jaxpr.invars))
        variables((*jaxpr.constvars, *jaxpr.invars))
        for eqn in jaxpr.eqns:
            self.add(eqn.primitive.name, len(eqn.invars))
            self.ruled |= eqn.primitive.name.startswith("custom_") and not _known_rule(eqn.params)
            own = _is_of_jax(eqn)
            self.cached |= not self.inside and not own and _may_be_kept(eqn)
            self.inside += own
            variables(eqn.invars)
            for key in sorted(eqn.params):
                self.add(key)
                self.value(eqn.params[key], within=eqn.primitive.name)
            self.inside -= own
            variables(v for v in eqn.outvars if not isinstance(v, trace.DropVar))
        self.add("out")
        variables(jaxpr.outvars)

    def value(self, value: Any, within: str = ""):
        if isinstance(value, ClosedJaxpr):
            self.jaxpr(value.jaxpr)
            self.jitted |= within in ("jit", "pjit") and any(np.ndim(c) for c in value.consts)
            self.value(tuple(value.consts))
        elif isinstance(value, trace.Jaxpr):
            self.jaxpr(value)
        elif isinstance(value, (str, bytes, int, float, complex, bool, type(None), np.dtype)):
            self.add(value)
        elif isinstance(value, (tuple, list)):
            self.add(type(value).__name__, len(value))
            for part in value:
                self.value(part, within)
        elif isinstance(value, dict):
            self.value(tuple(sorted(value.items(), key=lambda item: str(item[0]))), within)
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            self.array(value)
        elif callable(value):
            self.add(getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__name__))
            if within.endswith("callback"):
                self.on_host(getattr(value, "callback_func", value))
        else:
            self.add(_ADDRESS.sub("", repr(value)))

    def on_host(self, function: Any, depth: int = 4):
        """What a callback runs: the compiled program calls this very function, with what it captures."""
        if isinstance(function, (int, float, complex, str, bytes, type(None))):
            return self.add(function)
        if not depth or not hasattr(function, "__code__"):
            _ON_HOST[id(function)] = function
            return self.add("object", id(function))
        _ON_HOST[id(function.__code__)] = function.__code__
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # of a variable that has no value yet
                held.append(cell.cell_contents)
        self.add("function", id(function.__code__), len(held))
        for value in held:
            self.on_host(value, depth - 1)

    def array(self, value: Any):
        value = arrays.plain(value)
        self.add(value.shape, str(value.dtype))
        self.hash.update(np.ascontiguousarray(value).tobytes())


def _known_rule(params) -> bool:
    """Whether a function with a derivative of its own is one of the libraries', which hold no arrays."""
    inner = params.get("call_jaxpr") or params.get("fun_jaxpr")
    source = getattr(getattr(getattr(inner, "jaxpr", inner), "debug_info", None), "func_src_info", None) or ""
    return _LIBRARY.search(source) is not None


def _may_be_kept(eqn) -> bool:
    """Whether JAX may know this part again by the function that made it, which may capture what changes.

    Under vmap the branches of a cond are a selection.
    """
    if eqn.primitive.name.startswith("custom_"):  # traced every time
        return False
    return eqn.primitive.name == "select_n" or bool(_inner(eqn))


def _is_of_jax(eqn) -> bool:
    """Whether it is a jitted function of jax.numpy, jax.nn and so on, which was given no functions."""
    inner = _inner(eqn) if eqn.primitive.name in ("jit", "pjit") else []
    return bool(inner) and all(
        _OF_JAX.search(getattr(part.debug_info, "func_src_info", None) or "") for part in inner
    )


def _inner(eqn):
    return [part for value in eqn.params.values() for part in _parts(value)]


def _parts(value):
    if isinstance(value, (tuple, list)):
        return [part for each in value for part in _parts(each)]
    value = getattr(value, "jaxpr", value)
    return [value] if isinstance(value, trace.Jaxpr) else []


_OF_JAX = re.compile(r"site-packages/jax/_src/(numpy|nn|random|scipy|image|lax)(?!/control_flow)\b")
# but for what wraps the rules of others
_LIBRARY = re.compile(
    r"site-packages/(jax/_src/(?!custom_derivatives|api)|flax/(?!.*transforms)|optax/|keras/|haiku/)|/clustr_jax/"
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|id=\d+")
