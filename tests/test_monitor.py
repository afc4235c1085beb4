"""The monitor of catastrophic overfitting."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import data, stages
from clustr_jax.classifier import Classifier
from clustr_jax.models import Outputs
from clustr_jax.settings import Settings
from clustr_jax.stages import guarding
from clustr_jax.training import guard
from linear_problems import (
    Linear,
    float64,
    get_config,
)


@dataclasses.dataclass(frozen=True)
class Pocket:
    """A network that single steps cannot fool: class 1 only near x + eps / 2, in all coordinates at once.

    Images lie on whole numbers. The loss pulls each coordinate towards the pocket: ten steps of eps / 4
    end within eps / 4 of it on average; one step of 1.25 eps jumps across, and a random start is elsewhere.
    """

    eps: float

    def eval(self, variables, x):
        away = jnp.mean(jnp.abs(x - jnp.round(x) - self.eps / 2), axis=1) / self.eps
        return Outputs(jnp.stack([10 * (away - 0.3), jnp.zeros_like(away)], axis=1), x)


def monitored(net, variables, eps, x, y, **changes):
    """(metrics, alarms) of guarding.monitor on these held-out images."""
    lines = []
    config = get_config("fast_at", **{"train.attack.eps": eps, **changes})
    split = data.Split(np.float32(x), np.int32(y), 2, 1.0, None, "")
    settings, progress = Settings.of(config), types.SimpleNamespace(line=lines.append)
    run = stages.Run(config, settings, None, progress, net, split, split, split)
    clf = Classifier(variables, None, net, bounds=None)
    found = guarding.monitor(run, clf, jax.random.key(0))
    assert not lines
    return found, guard.alarms(None, None, found, updates=1)


@pytest.mark.filterwarnings("ignore:logits_fn returned bounded scores")  # so they are, on purpose
def test_the_monitor_warns_of_catastrophic_overfitting(rng):
    """One step leaves all, ten steps nothing."""
    found, alarms = monitored(Pocket(0.1), {}, 0.1, rng.integers(-3, 4, (30, 64)), np.zeros(30))
    assert found == {"single_step_accuracy": 1.0, "multi_step_accuracy": 0.0}
    assert set(alarms) == {guard.OVERFITTING} and not guarding.collapses(alarms)
    assert "100.0%" in alarms[guard.OVERFITTING] and "0.0%" in alarms[guard.OVERFITTING]


def test_the_monitor_is_silent_about_a_linear_classifier(rng):
    """One step from anywhere reaches the worst corner: both figures are the true robust accuracy, no line."""
    net = Linear((64,), 2)
    variables, x = net.variables(rng), rng.normal(size=(300, 64))
    params = float64(variables["params"])
    gap = (x @ params["kernel"] + params["bias"]) @ np.array([-1.0, 1.0])
    y = rng.integers(0, 2, 300)
    worst = np.where(y == 1, gap, -gap) - 0.1 * np.abs(params["kernel"] @ np.array([-1.0, 1.0])).sum()
    found, alarms = monitored(net, variables, 0.1, x, y)
    # one step of 1.25 eps reaches the corner from 7/8 of the starts: between the two a few images may differ
    robust = np.mean(worst[data.stratified(y, 256, 2)] > 0)
    assert found["multi_step_accuracy"] == robust and 0.1 < robust < 0.9
    assert robust <= found["single_step_accuracy"] <= robust + 0.1
    assert not alarms


def test_the_monitor_can_be_turned_off(rng):
    x = rng.normal(size=(4, 3))
    net = Linear((3,), 2)
    assert monitored(net, net.variables(rng), 0.1, x, np.zeros(4), **{"train.monitor": False}) == ({}, {})
    assert monitored(net, net.variables(rng), 0.1, x[:0], np.zeros(0)) == ({}, {})
