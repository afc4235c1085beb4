"""Prints, as JSON, what eight virtual CPU devices make of what one of them does: see test_mesh.py."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from clustr_jax import attacks, clusters, data
from clustr_jax.runtime import mesh
from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.training import learned, refit, train, train_state, trainers
from clustr_jax.training.objectives import METHODS
from configs import digits

ONE, ALL = jax.devices()[:1], jax.devices()
SIZE, STEPS = 160, 5


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def difference(a, b):
    """Relative, in the Euclidean norm over all leaves."""
    return float(np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(a)))


def split():
    rng = np.random.default_rng(0)
    labels = (np.arange(SIZE) % 10).astype(np.int32)
    images = rng.integers(0, 17, (10, 8, 8, 1))[labels] + rng.integers(0, 5, (SIZE, 8, 8, 1))
    return data.Split(images.astype(np.uint8), labels, 10, 21.0, (0.0, 1.0), "")


def prepare(method, wide, **changes):
    """(trainer, variables, train set) of a small problem."""
    config = digits.get_config(method)
    config.model.width, config.magnet.samples, config.data.augment = 4, 4, "crop_flip"
    config.warmup.batch_size = config.train.batch_size = 32
    config.train.eps_ramp, config.train.optimizer, config.train.lr = 0.0, "sgd", 1e-3
    for name, value in changes.items():
        section, name = name.split("__")
        config[section][name] = value
    config = configuration.resolve(config)
    part = split()
    net = loading.build_net(ModelSettings.of(config.model), part)
    variables = net.init(jax.random.key(0))
    if wide:
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)
    trainer = trainers.Trainer(
        net, METHODS[method], TrainingSettings.of(config), Recipe.of(config.train), SIZE
    )
    train_set = train_state.TrainSet(
        jnp.asarray(part.images), jnp.asarray(part.labels), part.scale, config.data.augment
    )
    return trainer, variables, train_set


def trained(devices, trainer, variables, train_set, *, folder=None, steps=STEPS):
    """(state after some steps, compiled program)."""
    with mesh.over(devices):
        key, train_set = jax.random.key(0), mesh.place(train_set)
        state = refit.begin(trainer, mesh.place(train.create(trainer, variables)), train_set, key)
        state = mesh.place(train.with_totals(trainer, state, train_set, key))
        order = train.epoch_order(key, SIZE, 0)
        compiled = train.run_steps.lower(trainer, state, train_set, order, key, steps).compile()
        state = train.run_steps(trainer, state, train_set, order, key, steps)
        if folder is not None:
            checkpoints = Checkpoints(folder, "test", mend=True)
            checkpoints.save(state)
            checkpoints.close()
        return state, compiled


def methods(names, wide):
    """For each method: how far parameters and clusters are apart, and what is sent."""
    jax.config.update("jax_enable_x64", wide)
    for name in names:
        # with clusters of an untrained network the consistency term is steep: a step is then a leap; and
        # the first step of TRADES' attack, where the divergence is next to nothing, follows rounding
        rate = {"clustr_qtrades": 1e-6, "clustr_trades": 1.4e-8, "trades": 1e-4}.get(name, 1e-3)
        trainer, variables, train_set = prepare(name, wide, train__lr=rate)
        one, _ = trained(ONE, trainer, variables, train_set)
        many, compiled = trained(ALL, trainer, variables, train_set)
        row = {
            "params": difference(one.params, many.params),
            "moved": difference(variables["params"], learned.split(one.params, None)[0]),
            "totals": difference(one.totals, many.totals),
            "batch_stats": difference(one.batch_stats, many.batch_stats),
            "sent": mesh.sent(compiled),
            "gradients": sum(leaf.size for leaf in jax.tree.leaves(one.params)),
            "statistics": sum(leaf.size for leaf in jax.tree.leaves(one.batch_stats)),
            # of classes, whose probabilities the term between centroids adds up
            "rows": trainers.rows(trainer.settings.magnet, 10) if trainer.magnet else 10 * trainer.learned,
            "embedding": 0 if one.clusters is None else one.clusters.centroids.shape[-1],
        }
        if one.clusters is not None:
            row["centroids"] = difference(one.clusters.centroids, many.clusters.centroids)
        if one.sampler is not None:
            row["losses"] = difference(one.sampler.losses, many.sampler.losses)
        yield name, row


def fitted():
    """k-means on 1 and on all devices, with a number of classes that they do not divide."""
    rng = np.random.default_rng(1)
    y = np.arange(130) % 10
    z = rng.normal(size=(10, 6))[y] + 0.3 * rng.normal(size=(130, 6))
    found = []
    for devices in (ONE, ALL):
        with mesh.over(devices):
            found.append(clusters.fit(jax.random.key(0), jnp.float32(z), y, num_classes=10, k=2))
    return difference(*found)


def attacked():
    """Share of equal outcomes of each attack on a model trained a little."""
    trainer, variables, train_set = prepare("nominal", False, train__optimizer="adam", train__lr=5e-3)
    state, _ = trained(ONE, trainer, variables, train_set, steps=60)
    part = split()
    x, y = part.pixels(), part.labels

    def model(x):
        return trainer.net.eval(jax.device_get(state.variables), x).logits

    found = {}
    for name, attack in {
        "apgd": lambda: attacks.apgd(jax.random.key(0), model, x, y, eps=0.003, steps=10),
        "autoattack": lambda: (
            attacks.autoattack(
                jax.random.key(0), model, x, y, eps=0.003, attacks=("apgd-ce", "square"), slots=20
            ).x_adv
        ),
        "pgd": lambda: attacks.pgd(jax.random.key(0), model, x, y, eps=0.003, step_size=0.001, steps=5),
    }.items():
        broken = []
        for devices in (ONE, ALL):
            with mesh.over(devices):
                broken.append(np.asarray(model(attack())).argmax(1) != y)
        found[name] = {"equal": float(np.mean(broken[0] == broken[1])), "broken": float(broken[0].mean())}
    return found


def moved(folder):
    """A checkpoint written on all devices is read on one, and the other way round; free_at has rows."""
    found = {}
    for writers, readers in ((ALL, ONE), (ONE, ALL)):
        trainer, variables, train_set = prepare("free_at", False)
        place = f"{folder}/{len(writers)}/checkpoints"
        state, _ = trained(writers, trainer, variables, train_set, folder=place)
        with mesh.over(readers):
            key = jax.random.key(0)
            template = train.blank(trainer, trainer.net.init(key), train_set, key)
            restored = mesh.place(Checkpoints(place, "test").restore(template))
            equal = all(
                np.array_equal(a, b)
                for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True)
            )
            order = train.epoch_order(key, SIZE, 0)
            after = train.run_steps(trainer, restored, mesh.place(train_set), order, key, STEPS)
        found[f"{len(writers)} to {len(readers)}"] = {"equal": equal, "step": int(after.step)}
    return found


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what in ("float32", "float64"):
        result = dict(methods(rest, what == "float64"))
    elif what == "attacks":
        result = attacked()
    else:
        result = {"kmeans": fitted(), "moved": moved(rest[0])}
    print(json.dumps(result))
