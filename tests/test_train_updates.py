"""How a train step updates: optimisers, learning rates, the adversary of its own images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import Recipe, TrainingSettings
from clustr_jax.training import refit, train, trainers
from clustr_jax.training.adversaries import Adversarial
from clustr_jax.training.objectives import METHODS
from small_training import get_config, problem, spy, squares


@pytest.mark.parametrize(("nesterov", "factor"), [(True, 1.9), (False, 1.0)])
def test_a_step_is_the_optimiser_on_the_gradient_of_the_objective(nesterov, factor, rng):
    """Fresh state, SGD with Nesterov momentum: the first step is -1.9 rate (gradient + decay w), else -1."""
    changes = {
        "train.lr": 0.1,
        "train.weight_decay": 0.01,
        "train.optimizer": "sgd",
        "train.nesterov": nesterov,
    }
    p, step = spy(problem("pgd_at", rng, **changes))
    after, metrics = step(p.state)

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        variables = {"params": params, "batch_stats": {}}
        return METHODS["pgd_at"].objective(
            p.trainer.net,
            variables,
            metrics["batch"],
            Adversarial(metrics["x_adv"]),
            None,
            p.trainer.settings,
        )[0]

    value, gradient = objective(p.state.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    expected = jax.tree.map(lambda w, g: w - factor * 0.1 * (g + 0.01 * w), p.state.params, gradient)
    for new, wanted in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(new, wanted, rtol=1e-5, atol=1e-6)


def test_the_objective_sees_the_adversary_of_its_own_images(rng):
    """Inside the ball around them and the box, and at the next step another one."""
    p, step = spy(
        problem("clustr_qtrades", rng, **{"train.attack.eps": 0.1, "train.attack.step_size": 0.125})
    )
    state, first = step(p.state)
    _, second = step(state)
    for metrics in (first, second):
        x, x_adv = np.asarray(metrics["batch"].x), np.asarray(metrics["x_adv"])
        assert 0.05 < np.abs(x_adv - x).max() <= 0.1 + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (np.asarray(first["x_adv"]) != np.asarray(second["x_adv"])).any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_by_hand(nesterov):
    """v = 0.9 v + g; w -= rate v, or rate (g + 0.9 v) (Sutskever et al. 2013, as PyTorch has both)."""
    recipe = get_config("trades", **{"train.weight_decay": 0.0, "train.nesterov": nesterov}).train
    transform, _ = trainers.optimizer(recipe, 5)
    w, v, x = 1.0, 0.0, jnp.float32(1.0)
    state = transform.init(x)
    for _ in range(5):
        v = 0.9 * v + 2 * w
        w -= 0.01 * (2 * w + 0.9 * v if nesterov else v)
        update, state = transform.update(2 * x, state, x)
        x = x + 0.01 * update
        np.testing.assert_allclose(x, w, rtol=1e-5)


def test_the_recipe_moves_with_its_stage():
    """Where the warm-up is what a method trains with, so is its momentum."""
    config = get_config("at_pretrain", "cifar10", **{"train.nesterov": False, "warmup.nesterov": False})
    assert config.warmup.optimizer == "sgd" and not config.warmup.nesterov


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("multistep", [1.0] * 6 + [0.1] * 6 + [0.01] * 8),  # 2 steps per epoch, milestones at epochs 3 and 6
        ("cosine", [(1 + np.cos(np.pi * i / 20)) / 2 for i in range(20)]),
    ],
)
def test_learning_rates(schedule, expected):
    recipe = get_config("nominal", **{"train.schedule": schedule, "train.lr": 1.0, "train.epochs": 10})
    recipe = dataclasses.replace(Recipe.of(recipe.train), milestones=(3, 6))
    _, rate = trainers.optimizer(recipe, 2)
    np.testing.assert_allclose([float(rate(i)) for i in range(20)], expected, rtol=1e-5)


def test_one_cycle_rises_and_falls():
    recipe = get_config(
        "nominal", **{"train.schedule": "onecycle", "train.lr": 1.0, "train.epochs": 10}
    ).train
    recipe = Recipe.of(recipe)
    _, rate = trainers.optimizer(recipe, 10)
    rates = np.array([float(rate(i)) for i in range(100)])
    assert rates.max() == pytest.approx(1.0, rel=1e-3) and rates.argmax() == 30
    assert (np.diff(rates[:30]) > 0).all() and (np.diff(rates[31:]) < 0).all()
    assert rates[0] < 0.05 and rates[-1] < 0.01


@pytest.mark.parametrize(("name", "value"), [("schedule", "linear"), ("optimizer", "adagrad")])
def test_unknown_optimisers_are_refused(name, value):
    recipe = dataclasses.replace(Recipe.of(get_config("nominal").train), **{name: value})
    with pytest.raises(UserError, match=f"{name} must be .*{value}"):
        trainers.optimizer(recipe, 1)


def after_warmup(rng, split=None, **changes):
    """A trainer of clustr_trades with magnet.fit=linear_head, the warm-up's problem and its variables."""
    warm = problem("nominal", rng, split, **{"train.batch_size": 16, "train.lr": 0.01, **changes})
    settings = {"magnet.fit": "linear_head", "magnet.k": 1, "magnet.clusters": 3, "magnet.sharpness": 1.0}
    config = get_config("clustr_trades", **{"data.name": "digits", **settings})
    trainer = dataclasses.replace(
        warm.trainer, method=METHODS["clustr_trades"], settings=TrainingSettings.of(config)
    )
    return trainer, warm, warm.run(warm.state, 40).variables


@pytest.mark.more
def test_clusters_of_the_linear_head_are_the_same_classifier(rng):
    """magnet.fit=linear_head after a warm-up: its probabilities, and a state that fits its checkpoints."""
    points = squares(rng)
    images = np.tile(points.images[:, None, None, :1], (1, 8, 8, 1)) * np.linspace(0.2, 1, 8)[:, None, None]
    split = dataclasses.replace(points, images=images.astype(np.float32))
    trainer, warm, variables = after_warmup(rng, split, **{"model.name": "cnn", "model.mean": (0.5,)})
    state = refit.refit(trainer, train.create(trainer, variables), warm.train_set, jax.random.key(1))
    outputs = trainer.net.eval(variables, warm.train_set.images)
    reference.close(state.clusters.probs(outputs.embeddings), jax.nn.softmax(outputs.logits), 1e-4)
    owner = np.repeat(np.arange(3), np.diff(state.sampler.offsets))
    np.testing.assert_array_equal(warm.train_set.labels[state.sampler.members], owner)
    blank = train.blank(trainer, variables, warm.train_set, jax.random.key(2))
    for a, b in ((state.clusters, blank.clusters), (state.sampler, blank.sampler)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), a) == jax.tree.map(lambda x: (x.shape, x.dtype), b)


def test_a_head_behind_a_non_linearity_is_refused(rng):
    """The MLP's head sees relu(embeddings)."""
    trainer, warm, variables = after_warmup(rng)
    with pytest.raises(UserError, match="logits are linear in its embeddings"):
        refit.refit(trainer, train.create(trainer, variables), warm.train_set, jax.random.key(1))
