"""A method's training on points of the unit square.

The network is the MLP: without batch norm its train and eval modes agree, and a NumPy copy of it
is three lines. So losses and gradients of whole objectives can be compared with slow references.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import linear_problems
from clustr_jax import data, models
from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
from clustr_jax.storage import loading
from clustr_jax.training import refit, train, train_state, trainers
from clustr_jax.training.adversaries import Adversarial
from clustr_jax.training.objectives import METHODS
from linear_problems import Stage

STEPS = 5


def get_config(method, name="toy2d", **changes):
    """A config of the project as it would run but for its size, with changes by dotted name."""
    small = {"model.width": 6, "magnet.samples": 5, "magnet.n_init": 1, "magnet.max_iter": 10}
    return linear_problems.get_config(method, name, **{**small, **changes})


def squares(rng, n=90, classes=3):
    """Points of the unit square (so with a box, as pixels), a few clumps per class."""
    centres = rng.uniform(0.2, 0.8, (classes, 2, 2))
    labels = np.arange(n) % classes
    points = centres[labels, rng.integers(0, 2, n)] + 0.05 * rng.normal(size=(n, 2))
    return data.Split(
        np.clip(points, 0, 1).astype(np.float32), labels.astype(np.int32), classes, 1.0, (0.0, 1.0), ""
    )


class Problem(Stage):
    """That of a network of the project."""

    def step(self, state=None):
        return train.train_step(
            self.trainer, state or self.state, self.train_set, self.order, jax.random.clone(self.key)
        )

    def run(self, state, count):
        state = jax.tree.map(jnp.copy, state)  # run_steps donates it
        return train.run_steps(
            self.trainer, state, self.train_set, self.order, jax.random.clone(self.key), count
        )


def problem(method, rng, split=None, **changes):
    """`method` at step 0 on three classes of points in the unit square."""
    split = split or squares(rng)
    # the name decides whether there is a box; digits have one
    config = get_config(
        method, **{"data.name": "digits", "magnet.k": 2, "model.mean": (0.0,), "model.std": (1.0,), **changes}
    )
    net = loading.build_net(ModelSettings.of(config.model), split)
    trainer = trainers.Trainer(
        net, METHODS[method], TrainingSettings.of(config), Recipe.of(config.train), len(split)
    )
    train_set = train_state.TrainSet(
        jnp.asarray(split.images), jnp.asarray(split.labels), scale=1.0, augment="none"
    )
    keys = jax.random.split(jax.random.key(4), 4)
    state = refit.begin(trainer, train.create(trainer, net.init(keys[0])), train_set, keys[1])
    state = train.with_totals(trainer, state, train_set, keys[2])
    return Problem(trainer, train_set, state, train.epoch_order(keys[3], trainer.size, 0), jax.random.key(5))


def spy(p):
    """`p`, and a compiled step of it whose metrics hold what its objective saw."""
    objective = p.trainer.method.objective

    def record(net, variables, batch, adversarial, clusters, settings):
        adversarial = Adversarial(adversarial.alone())
        loss, aux = objective(net, variables, batch, adversarial, clusters, settings)
        return loss, aux.replace(metrics={**aux.metrics, "batch": batch, "x_adv": adversarial.images})

    method = dataclasses.replace(p.trainer.method, objective=record)
    p = dataclasses.replace(p, trainer=dataclasses.replace(p.trainer, method=method))
    return p, jax.jit(lambda state: p.step(state))


def assert_close(tree, expected):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def ids_of(p, x):
    """Which training points these are: all of them differ."""
    index = {point.tobytes(): i for i, point in enumerate(np.asarray(p.train_set.images))}
    return np.array([index[point.tobytes()] for point in np.asarray(x)])


def numpy_mlp(params, x):
    """(logits, embeddings) of models.MLP in float64."""
    layers = (params[name] for name in layer_names(params))
    first, second, head = (jax.tree.map(np.float64, layer) for layer in layers)
    hidden = np.maximum(np.float64(x) @ first["kernel"] + first["bias"], 0)
    embeddings = hidden @ second["kernel"] + second["bias"]
    return np.maximum(embeddings, 0) @ head["kernel"] + head["bias"], embeddings


def layer_names(params):
    hidden = sorted(name for name in params if name != models.HEAD)
    return *hidden, models.HEAD
