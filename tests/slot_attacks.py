"""One network (12 points -> tanh -> 4 classes) and one PGD, in 7 slots wherever the number does not matter.

They are compiled once. The steps reach two thirds of the radius, so that the random start decides for many.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.scheduled_pgd import PGD

OPTIONS = (attack_losses.margin, attack_losses.cross_entropy, attack_losses.margin_targeted)
STEPS, RESTARTS, SLOTS, SIZE, HIDDEN, CLASSES = 8, 4, 7, 12, 10, 4
EASY, MIXED, ROBUST = 0.5, 0.1, 1e-5
COUNTS = ("broken", "restart", "step", "spent")
TRACES = []


def network(params, x):
    TRACES.append(x.shape)
    return jnp.tanh(x @ params[0]) @ params[1] + params[2][None]


def random_network(seed=0):
    rng = np.random.default_rng(seed)
    params = rng.normal(size=(SIZE, HIDDEN)), rng.normal(size=(HIDDEN, CLASSES)), np.zeros(CLASSES)
    return Partial(network, [jnp.asarray(p, jnp.float32) for p in params])


@functools.cache
def problem(n=40):
    model = random_network()
    x = np.random.default_rng(1).uniform(0, 1, (n, SIZE)).astype(np.float32)
    return model, x, np.asarray(model(x)).argmax(axis=1).astype(np.int32)


def pgd_attack(eps, *, step_size=None, steps=STEPS, loss=attack_losses.margin, kind=PGD, **more):
    return kind(
        eps=jnp.float32(eps),
        steps=np.int32(steps),
        norm="linf",
        bounds=(0.0, 1.0),
        step_size=jnp.float32(eps / 12 if step_size is None else step_size),
        loss=attack_losses.among(loss, OPTIONS),
        **more,
    )


def run(model, x, y, *, eps=MIXED, key=0, restarts=RESTARTS, slots=SLOTS, attack=None, **more):
    attack = pgd_attack(eps) if attack is None else attack
    return scheduler.run(attack, jax.random.key(key), model, x, y, restarts=restarts, slots=slots, **more)


@functools.cache
def whole(eps=MIXED, n=40, restarts=RESTARTS):
    return run(*problem(n), eps=eps, restarts=restarts)


def same(found, expected, index=slice(None)):
    """Outcomes of the examples `index` of `expected`, images included, bit for bit."""
    for name in ("broken", "restart", "step", "x_adv"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[index], err_msg=name)


def wrong(model, x, y):
    return np.asarray(model(jnp.asarray(x))).argmax(axis=1) != y
