"""Prints, as JSON, what attacks make of models spread over eight devices: see test_gate_sharded.py."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

import clustr_jax
from clustr_jax import attacks, models

SHAPE, CLASSES, B = (4, 4, 3), 8, 16
DOORS = {
    "pgd": functools.partial(attacks.pgd, eps=0.1, step_size=0.05, steps=3, restarts=2),
    "apgd": functools.partial(attacks.apgd, eps=0.3, steps=4, slots=8),
    "square": functools.partial(attacks.square, eps=0.3, queries=5, slots=8),
}


def weights(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(48, 64)).astype(np.float32) / 4, rng.normal(size=(64, 8)).astype(np.float32)


def images():
    return np.random.default_rng(9).uniform(size=(B, *SHAPE)).astype(np.float32)


def apply(w, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ w[0]) @ w[1]


def meshes():
    for kind in (AxisType.Auto, AxisType.Explicit):
        yield kind.name, jax.make_mesh((8,), ("d",), axis_types=(kind,))
    yield "Auto, two axes", jax.make_mesh((2, 4), ("a", "d"), axis_types=(AxisType.Auto,) * 2)


def put(mesh, *specs):
    return lambda w: tuple(
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(w, specs, strict=True)
    )


def shard_mapped(mesh):
    """The rows by their device, inside of the model."""

    def f(w, x):
        return jax.shard_map(apply, mesh=mesh, in_specs=((P(), P()), P("d")), out_specs=P("d"))(w, x)

    return f


def constrained(mesh):
    def f(w, x):
        hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ w[0])
        return jax.lax.with_sharding_constraint(hidden, NamedSharding(mesh, P(None, "d"))) @ w[1]

    return f


def cases():
    """name -> (where weights are put, how the model is called)."""
    for name, mesh in meshes():
        split, copies = put(mesh, P(None, "d"), P("d", None)), put(mesh, P(), P())
        if "Explicit" not in name:  # there a product over a split axis is the model's own error
            yield f"{name}, split", mesh, split, lambda w: Partial(apply, w)
            yield f"{name}, split, captured", mesh, split, lambda w: lambda x: apply(w, x)
            f = constrained(mesh)
            yield f"{name}, split, constraint", mesh, split, lambda w, f=f: Partial(f, w)
        yield f"{name}, copies", mesh, copies, lambda w: lambda x: apply(w, x)
        if name == "Auto":
            f = shard_mapped(mesh)
            yield "shard_map", mesh, copies, lambda w, f=f: Partial(f, w)
            yield "shard_map, captured", mesh, copies, lambda w, f=f: lambda x: f(w, x)
            g = jax.jit(apply)
            yield "jit", mesh, split, lambda w, g=g: lambda x: g(w, x)


def places(mesh):
    return {
        "host": lambda a: a,
        "first device": lambda a: jax.device_put(a, jax.devices()[0]),
        "last device": lambda a: jax.device_put(a, jax.devices()[-1]),
        "rows": lambda a: jax.device_put(a, NamedSharding(mesh, P("d"))),
    }


def array(found):
    return np.asarray(getattr(found, "x_adv", found))


def compiled(f):
    """(its result, how often XLA compiled)."""
    found = []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        return f(), len(found)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def main():
    x, key, found = images(), jax.random.key(0), {}
    logits = [np.asarray(apply(weights(s), x)) for s in (0, 1)]
    labels = [z.argmax(axis=1).astype(np.int32) for z in logits]
    alone = {
        (door, s): array(call(key, Partial(apply, tuple(map(jnp.asarray, weights(s)))), x, labels[s]))
        for door, call in DOORS.items()
        for s in (0, 1)
    }
    for number, (name, mesh, place, model) in enumerate(cases()):
        for where, at in places(mesh).items():
            for inside in (False, True):
                # of the first model all places with all doors, of the others two
                few = number and (where, inside) not in (("host", False), ("rows", True))
                if few or (inside and where == "last device"):
                    continue
                with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
                    for door, call in DOORS.items():
                        if number and door == "apgd":
                            continue
                        case = f"{name}; images: {where}; {'in the mesh; ' if inside else ''}{door}"
                        w = [place(weights(s)) for s in (0, 1)]
                        first = array(call(key, model(w[0]), at(x), at(labels[0])))
                        second, count = compiled(
                            lambda: array(call(key, model(w[1]), at(x), at(labels[1])))  # noqa: B023
                        )
                        apart = max(
                            np.abs(first - alone[door, 0]).max(), np.abs(second - alone[door, 1]).max()
                        )
                        found[case] = [float(apart), count]
    net = models.build("cnn", num_classes=4, input_shape=(8, 8, 3), mean=(0.5,) * 3, std=(0.2,) * 3)
    clf = clustr_jax.Classifier(net.init(jax.random.key(1)), None, net)
    mesh = next(meshes())[1]
    spread = clf.replace(variables=jax.device_put(clf.variables, NamedSharding(mesh, P())))
    pictures = np.random.default_rng(1).uniform(size=(8, 8, 8, 3)).astype(np.float32)
    for where, at in places(mesh).items():
        apart = np.abs(np.asarray(spread.logits(at(pictures))) - np.asarray(clf.logits(pictures))).max()
        found[f"Classifier; images: {where}"] = [float(apart), 0]
    apart = [jax.device_put(jnp.asarray(a), d) for a, d in zip(weights(0), jax.devices(), strict=False)]
    try:
        DOORS["pgd"](key, Partial(apply, apart), x, labels[0])
        said = ""
    except clustr_jax.UserError as error:
        said = str(error)
    print(json.dumps({"found": found, "apart": said}))


if __name__ == "__main__":
    main()
