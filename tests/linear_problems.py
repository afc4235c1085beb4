"""Problems that one can write down: a linear network with batch norm, its adversary, its training."""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax.models import Outputs
from clustr_jax.settings import Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.training import refit, train, train_state, trainers
from clustr_jax.training.objectives import METHODS, Batch

# A distance is a sum of a few squares and a loss the mean of some such terms, each rounded by 6e-8.
FLOAT32 = 1e-5
# Central differences of the reference are good to about 1e-9; both sides compute in float64.
FLOAT64 = 1e-7
# Coordinates near 1 after an addition or two in float32.
ULP = 3e-7


def get_config(method, name="toy2d", **changes):
    """A config of the project as it would run, with changes by dotted name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parents[1]))
        config = importlib.import_module(f"configs.{name}").get_config(method)
    config.update_from_flattened_dict(changes)
    return configuration.resolve(config)


def label(value):
    return (
        value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in getattr(value, "items", dict)())
    )


# Networks whose steps can be written down


@dataclasses.dataclass(frozen=True)
class Linear:
    """models.Net's interface on x -> (normalise the channels, if `normed`) = embeddings -> x W + b.

    Batch norm as usual: the batch's mean and biased variance, running ones 0.9 old + 0.1 batch.
    `name` only makes it another static argument, where a test must not find compiled functions of another.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    normed: bool = False
    name: str = ""

    def _outputs(self, variables, x, mean, variance):
        if self.normed:
            x = (x - mean) / jnp.sqrt(variance + 1e-5)
        z = x.reshape(x.shape[0], -1)
        params = variables["params"]
        return Outputs(z @ params["kernel"] + params["bias"][None], z)

    def _expand(self, statistic):
        return jnp.reshape(statistic, (1,) * len(self.input_shape) + (-1,))

    def train(self, variables, x):
        if not self.normed:
            return self._outputs(variables, x, 0.0, 1.0), {}
        axes, old = tuple(range(x.ndim - 1)), variables["batch_stats"]
        mean, variance = jnp.mean(x, axis=axes), jnp.var(x, axis=axes)
        stats = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * variance}
        return self._outputs(variables, x, self._expand(mean), self._expand(variance)), stats

    def eval(self, variables, x):
        if not self.normed:
            return self._outputs(variables, x, 0.0, 1.0)
        stats = variables["batch_stats"]
        return self._outputs(variables, x, self._expand(stats["mean"]), self._expand(stats["var"]))

    def variables(self, rng):
        """Parameters and, if `normed`, running statistics that are not those of any batch."""
        size, channels = int(np.prod(self.input_shape)), self.input_shape[-1]
        params = {
            "kernel": rng.normal(size=(size, self.num_classes)),
            "bias": rng.normal(size=self.num_classes),
        }
        stats = (
            {"mean": rng.normal(size=channels), "var": rng.uniform(0.5, 2, channels)} if self.normed else {}
        )
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {"params": params, "batch_stats": stats})


def float64(tree):
    """As NumPy arrays, so that a reference starts from the same numbers."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def noise(key, count, shape, draw):
    """One draw per example from fold_in(fold_in(key, id), restart 0), as attacks.pgd documents it."""

    def one(i):
        return draw(jax.random.fold_in(jax.random.fold_in(key, i), 0), shape)

    return np.float64(jax.vmap(one)(jnp.arange(count)))


def uniform(key, shape):
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def attack(method, net, variables, x, key, y=None, clusters=None, **changes):
    """(x_adv, batch statistics) of the method's adversary."""
    y = np.zeros(len(x)) if y is None else y
    batch = Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), jnp.ones(len(x), bool))
    return _adversary(method, net, tuple(changes.items()))(variables, batch, clusters, jax.random.clone(key))


@functools.cache
def _adversary(method, net, changes):
    return jax.jit(
        functools.partial(
            METHODS[method].adversary, net, settings=TrainingSettings.of(get_config(method, **dict(changes)))
        )
    )


def steps_of(steps, step_size, eps=0.1, start="zero", bn="batch"):
    values = {"steps": steps, "step_size": step_size, "eps": eps, "start": start}
    return {"train.attack_bn": bn, **{f"train.attack.{name}": value for name, value in values.items()}}


@dataclasses.dataclass
class Stage:
    """A stage of training at its start."""

    trainer: trainers.Trainer
    train_set: train_state.TrainSet
    state: train_state.TrainState
    order: jax.Array
    key: jax.Array


class Problem(Stage):
    """That of a Linear network."""

    def run(self, count, state=None):
        """`count` steps, as in a run."""
        state = self.state if state is None else state
        state = train.with_totals(self.trainer, state, self.train_set, jax.random.key(7))
        key = jax.random.clone(self.key)
        return train.run_steps(self.trainer, state, self.train_set, self.order, key, count)

    def step(self, state=None):
        """One step: (state, metrics, (batch, x_adv) that the objective saw)."""
        return self._step(self.state if state is None else state, jax.random.clone(self.key))

    @functools.cached_property
    def _step(self):
        @jax.jit
        def step(state, key):
            seen = []
            objective = self.trainer.method.objective

            def spy(net, variables, batch, adversarial, clusters, settings):
                # Free AT differentiates by its images, so these are tracers
                seen.append((batch, None if self.trainer.replays > 1 else adversarial.images))
                return objective(net, variables, batch, adversarial, clusters, settings)

            method = dataclasses.replace(self.trainer.method, objective=spy)
            trainer = dataclasses.replace(self.trainer, method=method)
            state, metrics = train.train_step(trainer, state, self.train_set, self.order, key)
            return state, metrics, seen[-1]

        return step


def problem(method, rng, net=None, images=None, labels=None, fit=True, **changes):
    """`method` at step 0, on 40 points of three classes unless given others."""
    if images is None:
        labels = np.arange(40) % 3
        images = rng.normal(size=(40, 3)) + 2 * rng.normal(size=(3, 3))[labels]
    net = net or Linear(images.shape[1:], int(labels.max()) + 1)
    changes = {
        "train.optimizer": "sgd",
        "train.lr": 0.1,
        "train.schedule": "multistep",
        "train.milestones": (),
        "train.weight_decay": 0.01,
        "train.batch_size": 10,
        "train.epochs": 10,
        "magnet.samples": 4,
        "magnet.k": 1,
        "magnet.n_init": 1,
        "magnet.max_iter": 5,
        **changes,
    }
    config = get_config(method, **changes)
    trainer = trainers.Trainer(
        net, METHODS[method], TrainingSettings.of(config), Recipe.of(config.train), len(labels)
    )
    if images.dtype != np.uint8:
        images = np.float32(images)
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    train_set = train_state.TrainSet(
        jnp.asarray(images), jnp.asarray(labels, jnp.int32), scale=scale, augment=config.data.augment
    )
    state = train.create(trainer, net.variables(rng))
    if fit:
        state = refit.begin(trainer, state, train_set, jax.random.key(8))
    order = train.epoch_order(jax.random.key(6), len(labels), 0)
    return Problem(trainer, train_set, state, order, jax.random.key(5))


def assert_close(found, expected, **tolerance):
    """Two dictionaries of arrays."""
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **tolerance)
