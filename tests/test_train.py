"""The train step: what it draws, minimises, remembers and updates.

The network is the MLP: without batch norm its train and eval modes agree, and a NumPy copy of it
is three lines. So losses and gradients of whole objectives can be compared with slow references.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import linear_problems
import reference
from clustr_jax import data, models
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
from clustr_jax.storage import loading
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.training import objectives, refit, train, train_state, trainers
from clustr_jax.training.objectives import METHODS, Batch
from linear_problems import Stage
from runs import assert_same_arrays

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
    state = train.create(trainer, net.init(keys[0]))
    if trainer.magnet:
        state = refit.refit(trainer, state, train_set, keys[1])
    state = train.with_totals(trainer, state, train_set, keys[2])
    return Problem(trainer, train_set, state, train.epoch_order(keys[3], trainer.size, 0), jax.random.key(5))


# Steps, chunks, epochs


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("nominal", {}),
        ("free_at", {"train.replays": 3}),
        ("clustr_qtrades", {"train.ema": 0.9}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_length_of_a_chunk_changes_nothing(method, changes, rng):
    """5 steps at once, 1 + 4, and five times 1: the same state to the last bit, and one compilation."""
    p = problem(method, rng, **{"train.batch_size": 8, **changes})
    before = train.run_steps._cache_size()
    whole = p.run(p.state, STEPS)
    assert int(whole.step) == STEPS
    assert_same_arrays(p.run(p.run(p.state, 1), STEPS - 1), whole)
    state = p.state
    for _ in range(STEPS):
        state = p.run(state, 1)
    assert_same_arrays(state, whole)
    assert train.run_steps._cache_size() == before + 1
    assert_same_arrays(p.run(p.state, 0), p.state)


def test_totals_are_sums_over_the_steps(rng):
    """`totals` adds up the metrics of single steps (float32, in order)."""
    p = problem("trades", rng)
    state, expected = p.state, dict.fromkeys(p.state.totals, 0.0)
    step = jax.jit(lambda state: p.step(state))
    for _ in range(3):
        state, metrics = step(state)
        expected = {name: expected[name] + metrics[name] for name in expected}
    found = p.run(p.state, 3).totals
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", [1, 10, 1437])
def test_epoch_order_is_a_permutation(size, key):
    orders = [np.asarray(train.epoch_order(jax.random.clone(key), size, epoch)) for epoch in (0, 1, 0)]
    for order in orders:
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(orders[0], orders[2])
    assert size == 1 or (orders[0] != orders[1]).any()
    assert size == 1 or (orders[0] != np.arange(size)).any()


def spy(p):
    """`p`, and a compiled step of it whose metrics hold what its objective saw."""
    objective = p.trainer.method.objective

    def record(net, variables, batch, x_adv, clusters, settings):
        if callable(x_adv):  # made from the objective's own clean pass
            x_adv, _ = x_adv()
        loss, aux = objective(net, variables, batch, x_adv, clusters, settings)
        return loss, aux.replace(metrics={**aux.metrics, "batch": batch, "x_adv": x_adv})

    method = dataclasses.replace(p.trainer.method, objective=record)
    p = dataclasses.replace(p, trainer=dataclasses.replace(p.trainer, method=method))
    return p, jax.jit(lambda state: p.step(state))


@pytest.mark.parametrize(
    "method",
    [
        "trades",
        "clustr_qtrades",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("qtrades", "clustr_trades")),
    ],
)
@pytest.mark.parametrize("attack_bn", ["batch", "eval"])
def test_a_shared_clean_pass_changes_nothing(method, attack_bn, rng):
    """The adversary that starts from the objective's clean outputs is the one that makes its own."""
    p = problem(method, rng, **{"train.attack_bn": attack_bn, "train.lr": 0.1})
    assert objectives.shares_clean(p.trainer.method, p.trainer.settings) == (attack_bn == "batch")
    own, step = spy(p)
    expected = step(own.state)[0].params
    after = jax.jit(p.step)(p.state)[0].params
    assert_close(after, expected)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after, p.state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def assert_close(tree, expected):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def ids_of(p, x):
    """Which training points these are: all of them differ."""
    index = {point.tobytes(): i for i, point in enumerate(np.asarray(p.train_set.images))}
    return np.array([index[point.tobytes()] for point in np.asarray(x)])


@pytest.mark.parametrize(("method", "replays"), [("nominal", 1), ("free_at", 4)])
def test_an_epoch_sees_each_image_once(method, replays, rng):
    """90 images in batches of 16: five batches of different images, shuffled, each `replays` times."""
    p, step = spy(problem(method, rng, **{"train.batch_size": 16, "train.replays": replays}))
    assert p.trainer.steps_per_epoch == 5 * replays
    state, drawn = p.state, []
    for _ in range(5 * replays):
        state, metrics = step(state)
        drawn.append(ids_of(p, metrics["batch"].x))
    for i in range(0, 5 * replays, replays):
        for again in drawn[i : i + replays]:
            np.testing.assert_array_equal(again, drawn[i])
    once = np.concatenate(drawn[::replays])
    np.testing.assert_array_equal(once, np.asarray(p.order)[:80])


def test_a_step_has_separate_streams_of_randomness(rng, monkeypatch):
    """Drawing, augmenting and attacking use different keys, and other ones at the next step."""
    p, keys = problem("clustr_qtrades", rng), []

    def note(key):
        keys.append(bytes(np.asarray(jax.random.key_data(key))))

    def adversary(net, variables, batch, clusters, key, settings, strength=1.0):
        note(key)
        return batch.x, {}

    def objective(net, variables, batch, x_adv, clusters, settings):
        aux = objectives.Aux({}, jnp.zeros(len(batch.y)), {})
        return sum(jnp.sum(w) for w in jax.tree.leaves(variables["params"])), aux

    method = dataclasses.replace(p.trainer.method, objective=objective, adversary=adversary)
    p = dataclasses.replace(p, trainer=dataclasses.replace(p.trainer, method=method))
    for owner, name, position in ((train.sampling, "draw", 0), (train_state.TrainSet, "batch", 2)):
        original = getattr(owner, name)

        def wrapper(*args, original=original, position=position, **kwargs):
            note(args[position])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)
    state, _ = p.step()
    p.step(state)
    assert len(keys) == 6
    assert len(set(keys)) == 6


# Magnet batches and clusters


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


def test_numpy_mlp_is_the_mlp(rng):
    p = problem("nominal", rng)
    outputs = p.trainer.net.eval(p.state.variables, p.train_set.images)
    logits, embeddings = numpy_mlp(p.state.params, p.train_set.images)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
    np.testing.assert_allclose(outputs.embeddings, embeddings, atol=1e-5)


def test_embeddings_of_the_whole_set_in_pieces(rng):
    """1,100 examples are not a multiple of the piece; each has its own embedding, in order."""
    p = problem("nominal", rng, split=squares(rng, n=1100, classes=2))
    z = refit.embed_all(p.trainer.net, p.state.variables, p.train_set)
    np.testing.assert_allclose(z, numpy_mlp(p.state.params, p.train_set.images)[1], atol=1e-5)


def test_sharpness_divides_the_variance_of_the_head(rng):
    """In what trains and in what is deployed; the centroids are the same."""
    changes = {"magnet.sharpness": 4.0, "train.ema": 0.9}
    seed = int(rng.integers(2**31))
    sharp, plain = (
        problem("clustr", np.random.default_rng(seed), **c) for c in (changes, {"train.ema": 0.9})
    )
    for name in ("clusters", "average_clusters"):
        a, b = getattr(sharp.state, name), getattr(plain.state, name)
        np.testing.assert_array_equal(a.centroids, b.centroids)
        np.testing.assert_allclose(a.variance, b.variance / 4, rtol=1e-6)


@pytest.mark.parametrize("k", [(2, 2, 2), (1, 3, 2)], ids=str)
def test_refit_clusters_are_consistent(k, rng, key):
    """Each example belongs to the nearest centroid of its own class; sigma^2 is that of these distances."""
    p = problem("clustr", rng, **{"magnet.k_per_class": k})
    clusters, sampler, labels = p.state.clusters, p.state.sampler, np.asarray(p.train_set.labels)
    np.testing.assert_array_equal(np.asarray(clusters.mask).sum(axis=1), k)
    members, offsets = np.asarray(sampler.members), np.asarray(sampler.offsets)
    np.testing.assert_array_equal(np.sort(members), np.arange(90))
    _, z = numpy_mlp(p.state.params, p.train_set.images)
    assert len(offsets) == 3 * max(k) + 1
    for c in range(3 * max(k)):
        for i in members[offsets[c] : offsets[c + 1]]:
            own = np.asarray(clusters.centroids)[labels[i]][: k[labels[i]]]
            distances = np.sum((z[i] - own) ** 2, axis=1)
            assert c // max(k) == labels[i]
            assert distances[c % max(k)] <= distances.min() * (1 + 1e-4) + 1e-9
    expected = reference.variance(z, labels, clusters.centroids, mask=clusters.mask)
    np.testing.assert_allclose(clusters.variance, expected, rtol=1e-4)
    np.testing.assert_array_equal(sampler.losses, np.full(90, p.trainer.settings.magnet.alpha, np.float32))


def test_refit_keeps_the_losses_and_follows_the_network(rng, key):
    """After some steps: new centroids from the new embeddings, every example's last seen loss kept."""
    p = problem("clustr", rng, **{"train.lr": 0.05})
    state = p.run(p.state, 4)
    again = refit.refit(p.trainer, state, p.train_set, key)
    np.testing.assert_array_equal(again.sampler.losses, state.sampler.losses)
    assert (np.asarray(again.clusters.centroids) != np.asarray(state.clusters.centroids)).any()
    _, z = numpy_mlp(state.params, p.train_set.images)
    expected = reference.variance(z, np.asarray(p.train_set.labels), again.clusters.centroids)
    np.testing.assert_allclose(again.clusters.variance, expected, rtol=1e-4)
    assert_same_arrays(again.params, state.params)
    assert int(again.step) == 4


@pytest.mark.parametrize("method", ["clustr", "clustr_qtrades"])
def test_losses_of_a_magnet_batch_land_in_the_sampler(method, rng):
    """Exactly the drawn examples get the Magnet loss they have in this batch, at the old parameters."""
    # clusters of about 15: some rows are masked
    p, step = spy(problem(method, rng, **{"magnet.samples": 20}))
    after, metrics = step(p.state)
    batch = metrics["batch"]
    mask, ids = np.asarray(batch.mask), ids_of(p, batch.x)
    assert 0 < (~mask).sum() and len(set(ids[mask])) == mask.sum()
    rows = len(batch.classes)
    _, z = numpy_mlp(p.state.params, batch.x)
    expected, _ = reference.magnet_loss(
        z.reshape(rows, -1, z.shape[-1]), np.asarray(batch.classes),
        alpha=p.trainer.settings.magnet.alpha, mask=mask.reshape(rows, -1),
    )  # fmt: skip
    losses = np.asarray(p.state.sampler.losses).copy()
    losses[ids[mask]] = expected.reshape(-1)[mask]
    np.testing.assert_allclose(after.sampler.losses, losses, rtol=1e-4, atol=1e-4)
    assert (losses != p.trainer.settings.magnet.alpha).any()
    # each row is one cluster, of the class it says
    labels = np.asarray(p.train_set.labels)
    np.testing.assert_array_equal(labels[ids].reshape(rows, -1)[:, 0], batch.classes)
    owner = np.empty(90, int)
    owner[np.asarray(p.state.sampler.members)] = np.repeat(np.arange(6), np.diff(p.state.sampler.offsets))
    for row, valid in zip(owner[ids].reshape(rows, -1), mask.reshape(rows, -1), strict=True):
        assert len(set(row[valid])) <= 1


# Objectives


def trained(p, steps):
    """Mean loss of the first and of the last of ten epochs, with a refit after each as in training."""
    tenth, state, found = steps // 10, p.state, []
    for _ in range(10):
        state = p.run(state, tenth)
        found.append(float(state.totals["loss"]) / tenth)
        if p.trainer.magnet:
            state = refit.refit(p.trainer, state, p.train_set, jax.random.key(1))
        state = train.with_totals(p.trainer, state, p.train_set, jax.random.key(0))
    return found[0], found[-1]


@pytest.mark.parametrize(
    "method",
    [
        m if m in ("free_at", "pgd_at") else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
        if not m.endswith("_certified")
    ],
)
def test_every_method_lowers_its_loss(method, rng):
    """900 steps of Adam on three classes of two clumps, with a small adversary."""
    # at 0.02 the loss of clustr_qtrades jumps: its end is on one processor above the limit, on another below
    rate = 0.005 if method == "clustr_qtrades" else 0.02
    p = problem(
        method, rng,
        **{"train.lr": rate, "train.optimizer": "adam", "train.schedule": "multistep", "train.milestones": (),
           "train.weight_decay": 0.0, "train.batch_size": 30, "train.attack.eps": 0.02,
           "train.attack.step_size": 0.02, "model.width": 12,
           "train.lam": 1.0},  # the entropy of the clean predictions, lam times, is no part of the progress
    )  # fmt: skip
    first, last = trained(p, 900)
    assert np.isfinite(last) and last < 0.9 * first


def test_clustr_qtrades_by_the_formula(rng):
    """Eq. 5 in float64 and loops: value, and gradient by finite differences.

    Masked entries count nowhere; clusters and adversarial images are constants; both sides of the
    cross entropy are differentiated. Other methods: test_steps.py; other losses: test_objectives.py.
    """
    p = problem("clustr_qtrades", rng)
    classes, samples = np.array([0, 1, 0, 2, 1]), 4
    labels = np.asarray(p.train_set.labels)
    ids = np.stack([rng.choice(np.flatnonzero(labels == c), samples, replace=False) for c in classes])
    mask = np.ones((5, samples), bool)
    mask[2, 3] = mask[4, 2:] = False
    x = np.asarray(p.train_set.images)[ids.reshape(-1)]
    x_adv = np.clip(x + rng.uniform(-0.05, 0.05, x.shape), 0, 1).astype(np.float32)
    batch = Batch(x, labels[ids.reshape(-1)], mask.reshape(-1), classes)
    config, clusters = p.trainer.settings, p.state.clusters

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        variables = {"params": params, "batch_stats": {}}
        return METHODS["clustr_qtrades"].objective(p.trainer.net, variables, batch, x_adv, clusters, config)[
            0
        ]

    flat, unravel = _ravel(jax.tree.map(np.float64, p.state.params))
    head = functools.partial(
        reference.log_scores, centroids=np.asarray(clusters.centroids), variance=float(clusters.variance)
    )

    def naive(vector):
        _, z = numpy_mlp(unravel(vector), x)
        _, z_adv = numpy_mlp(unravel(vector), x_adv)
        magnet, _ = reference.magnet_loss(
            z.reshape(5, samples, -1), classes, alpha=config.magnet.alpha, mask=mask
        )
        consistency = reference.cross_entropy(head(z_adv), reference.softmax(head(z)))
        return np.mean((magnet.reshape(-1) + config.train.lam * consistency)[mask.reshape(-1)])

    value, gradient = objective(p.state.params)
    np.testing.assert_allclose(value, naive(flat), rtol=1e-4)
    expected = reference.finite_difference(naive, flat)
    found, _ = _ravel(jax.tree.map(np.float64, gradient))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def _ravel(tree):
    """A pytree of NumPy arrays as one vector, and the way back."""
    leaves, structure = jax.tree.flatten(tree)
    flat = np.concatenate([leaf.reshape(-1) for leaf in leaves])
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def unravel(vector):
        parts = np.split(vector, ends)
        return jax.tree.unflatten(structure, [v.reshape(x.shape) for v, x in zip(parts, leaves, strict=True)])

    return flat, unravel


def test_the_adversary_depends_on_the_parameters(rng, key):
    """(That no gradient flows through its making is in test_adversaries.py.)"""
    p = problem("clustr_qtrades", rng, **{"train.attack.eps": 0.1, "train.attack.step_size": 0.05})
    x, y = p.train_set.images[:20], p.train_set.labels[:20]
    batch = Batch(x, y, jnp.ones(20, bool), jnp.zeros(5, int))

    @jax.jit
    def attack(params, clusters):
        variables = {"params": params, "batch_stats": {}}
        return p.trainer.method.adversary(p.trainer.net, variables, batch, clusters, key, p.trainer.settings)[
            0
        ]

    with jax.debug_key_reuse(False):  # the same attack on purpose
        other = jax.tree.map(lambda w: w[::-1], p.state.params)
        x_adv, other_adv = (
            np.asarray(attack(params, p.state.clusters)) for params in (p.state.params, other)
        )
    assert (x_adv != other_adv).any()
    assert 0.04 < np.abs(x_adv - np.asarray(x)).max() <= 0.1 + 1e-6


# Updates


@pytest.mark.parametrize(("nesterov", "factor"), [(True, 1.9), (False, 1.0)])
def test_a_step_is_the_optimiser_on_the_gradient_of_the_objective(nesterov, factor, rng):
    """Fresh state, SGD with Nesterov momentum: the first step is -1.9 rate (gradient + decay w), else -1."""
    changes = {
        "train.lr": 0.1, "train.weight_decay": 0.01, "train.optimizer": "sgd", "train.nesterov": nesterov
    }  # fmt: skip
    p, step = spy(problem("pgd_at", rng, **changes))
    after, metrics = step(p.state)

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        variables = {"params": params, "batch_stats": {}}
        return METHODS["pgd_at"].objective(
            p.trainer.net, variables, metrics["batch"], metrics["x_adv"], None, p.trainer.settings
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


# Checkpoints


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("nominal", {}),
        ("free_at", {"train.replays": 2}),
        ("clustr_qtrades", {"train.ema": 0.9, "magnet.k_per_class": (1, 2, 3)}),
        ("clustr", {"train.optimizer": "sgd"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_restored_state_goes_on_as_if_nothing_had_happened(method, changes, rng, tmp_path):
    """Saved after 2 steps and restored into a blank state: every leaf, and the third step, bit for bit."""
    p = problem(method, rng, **{"train.batch_size": 8, **changes})
    state = p.run(p.state, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a training")
    assert checkpoints.latest is None
    checkpoints.save(state)
    checkpoints.close()
    reader = Checkpoints(tmp_path / "checkpoints", "a training")
    assert reader.latest == 2
    net = p.trainer.net
    blank = train.blank(p.trainer, net.init(jax.random.key(99)), p.train_set, jax.random.key(98))
    restored = reader.restore(blank)
    assert_same_arrays(restored, state)
    assert_same_arrays(p.run(restored, 1), p.run(state, 1))
    variables, clusters = state.deployed
    assert_same_arrays(reader.model(jax.eval_shape(net.init, jax.random.key(0))), variables)
    if clusters is not None:
        stored = reader.clusters(net.num_classes, clusters.centroids.shape[1], clusters.centroids.shape[2])
        assert isinstance(stored, Clusters)
        assert_same_arrays(stored, clusters)
    reader.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_newest_two_and_the_best_are_kept(rng, tmp_path):
    """By held-out accuracy; what was saved without one, within an epoch, is no candidate."""
    p = problem("nominal", rng, **{"train.batch_size": 8})
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a training", mend=True)
    state, saved = p.state, {}
    for accuracy in (0.5, 0.9, None, 0.7, 0.6):
        state = p.run(state, 1)
        saved[int(state.step)] = state
        checkpoints.save(state, accuracy)
    checkpoints.wait()
    assert checkpoints.best == 2 and checkpoints.latest == 5
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {2, 4, 5}
    assert {int(path.stem) for path in (tmp_path / "seals").iterdir()} == {2, 4, 5}
    abstract = jax.eval_shape(p.trainer.net.init, jax.random.key(0))
    assert_same_arrays(checkpoints.model(abstract, checkpoints.best), saved[2].variables)
    checkpoints.close()


# Masked means


def test_mean_counts_the_unmasked(rng):
    values, mask = rng.normal(size=10).astype(np.float32), rng.random(10) < 0.5
    np.testing.assert_allclose(objectives.mean(values, mask), values[mask].mean(), rtol=1e-6)
    assert float(objectives.mean(values, np.zeros(10, bool))) == 0.0


# What is traced


@pytest.mark.parametrize("method", ["nominal", "free_at", "trades", "clustr_qtrades"])
@pytest.mark.parametrize("sampler", ["floor", "stale"])
def test_three_epochs_trace_a_step_once(method, sampler, rng, monkeypatch):
    """Every kind of sampler: the metrics' names and the loop share one trace, later epochs need none."""
    traces, original = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: traces.append(1) or original(*a))
    changes = {"train.batch_size": 8, "train.lr": 0.0123, "fidelity.sampler": sampler}
    p = problem(method, rng, **changes | ({"train.replays": 3} if method == "free_at" else {}))
    state = p.state
    for _ in range(3):
        state = p.run(state, p.trainer.steps_per_epoch)
        if p.trainer.magnet:
            state = refit.refit(p.trainer, state, p.train_set, jax.random.key(9))
        state = train.reset_totals(state)
        assert not any(float(value) for value in state.totals.values())
    assert len(traces) == 1


def test_equal_trainers_are_one_program(rng):
    """A trainer is its settings: made again it compiles nothing, with another setting it does."""
    p = problem("clustr", rng, **{"train.lr": 0.0321})
    p.run(p.state, 1)
    before = train.run_steps._cache_size()
    again = problem("clustr", np.random.default_rng(0), **{"train.lr": 0.0321})
    assert again.trainer is not p.trainer and again.trainer == p.trainer
    again.run(again.state, 1)
    assert train.run_steps._cache_size() == before
    other = problem("clustr", np.random.default_rng(0), **{"train.lr": 0.0322})
    assert other.trainer != p.trainer
    other.run(other.state, 1)
    assert train.run_steps._cache_size() == before + 1
