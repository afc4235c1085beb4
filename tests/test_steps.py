"""Whole steps by hand: Free AT, TRADES, AWP, the moving average, switches of sampler and clusters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_objectives as naive
from clustr_jax import data
from clustr_jax.training import refit, sampling, train
from linear_problems import (
    FLOAT32,
    ULP,
    Linear,
    assert_close,
    float64,
    label,
    problem,
)
from runs import assert_same_arrays


@pytest.mark.parametrize("box", [(-np.inf, np.inf), (0.0, 1.0)])
def test_free_at_is_algorithm_1(rng, box):
    """Shafahi et al. 2019: two batches, each three times; weights and perturbation after every step."""
    eps, replays = 0.1, 3
    changes = {"train.replays": replays, "train.attack.eps": eps, "train.attack.step_size": eps}
    if box[1] == 1.0:  # pixels; many at the ends of the box, or nearer to them than eps
        images = np.clip(rng.normal(0.5, 0.6, size=(40, 3)), 0, 1)
        changes |= {"images": images, "labels": np.arange(40) % 3, "data.name": "digits"}
    p = problem("free_at", rng, **changes)
    x, y = float64(p.train_set.images)[p.order], np.asarray(p.train_set.labels)[p.order]
    expected = naive.free_at(
        float64(p.state.params),
        [(x[:10], y[:10]), (x[10:20], y[10:20])],
        replays=replays,
        eps=eps,
        sgd=naive.Sgd(0.1, 0.01),
        box=box,
    )
    assert len(expected) == 2 * replays
    for i, (params, delta, gradient) in enumerate(expected):
        assert np.abs(gradient).min() > 1e-6  # no sign hangs on rounding
        state = p.run(i + 1)
        # up to six steps in float32, parameters near 1
        assert_close(state.params, params, rtol=FLOAT32, atol=1e-6)
        np.testing.assert_allclose(state.delta, delta, rtol=FLOAT32, atol=ULP)
    # after the first step on the second batch: eps where both batches agree, else 0
    agree = np.abs(expected[replays][1]) > eps / 2
    assert agree.any() and not agree.all()
    beyond = np.clip(x[:10] + expected[replays - 1][1], *box) != x[:10] + expected[replays - 1][1]
    assert beyond.any() == (box[1] == 1.0)


@pytest.mark.more
@pytest.mark.parametrize("method", ["free_at", "clustr"])
def test_replays_are_of_the_same_batch(method, rng):
    """The same views of the same images three times, then others.

    With Magnet batches (the authors' option) as well: their losses change from replay to replay, here
    from alpha to 0, and with them the chances of the next seed cluster, but not of this one.
    """
    if method == "free_at":
        labels, changes = np.arange(40) % 3, {"data.augment": "crop_flip"}
        images = rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    else:
        labels, changes = np.arange(60) % 3, {"magnet.k": 2, "magnet.clusters": 3}
        clump = 5 * rng.normal(size=(3, 2, 3))[labels, np.arange(60) // 3 % 2]
        images = clump + 0.3 * rng.normal(size=(60, 3))
    p = problem(method, rng, images=images, labels=labels, **{"train.replays": 3, **changes})
    state, seen = p.state, []
    for _ in range(30):
        state, _, (batch, _) = p.step(state)
        seen.append(np.asarray(batch.x))
    others = 0
    for i in range(0, 30, 3):
        np.testing.assert_array_equal(seen[i + 1], seen[i], err_msg=f"step {i + 1}")
        np.testing.assert_array_equal(seen[i + 2], seen[i], err_msg=f"step {i + 2}")
        others += i > 0 and (seen[i] != seen[i - 1]).any()
    assert others == 9


def test_trades_steps_by_hand(rng):
    """Two steps, two classes: the adversary in its corner, the loss, both gradients, Nesterov momentum."""
    eps, beta = 0.1, 6.0
    labels = np.arange(40) % 2
    images = rng.normal(size=(40, 3)) + 1.5 * rng.normal(size=(2, 3))[labels]
    p = problem(
        "trades",
        rng,
        images=images,
        labels=labels,
        **{"train.attack.eps": eps, "train.attack.step_size": eps / 4},
    )
    assert p.trainer.settings.train.beta == beta and p.trainer.settings.train.attack.steps == 10
    x, y = float64(p.train_set.images)[p.order], labels[p.order]
    state, params, sgd = p.state, float64(p.state.params), naive.Sgd(0.1, 0.01)
    for i in range(2):
        rows = slice(10 * i, 10 * i + 10)
        after, metrics, (batch, x_adv) = p.step(state)
        np.testing.assert_allclose(batch.x, x[rows], atol=0)
        # which of the two opposite corners depends on the random start: take that from the first coordinate
        corner = np.sign(params["kernel"][:, 1] - params["kernel"][:, 0])
        side = np.sign((np.asarray(x_adv) - x[rows])[:, :1] * corner[0])
        corners = x[rows] + eps * side * corner[None]
        np.testing.assert_allclose(x_adv, corners, atol=1e-6)
        assert (side > 0).any() and (side < 0).any()
        gradients, loss = naive.trades_gradients(params, x[rows], corners, y[rows], beta)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=FLOAT32)
        params = sgd.step(params, gradients)
        # x_adv is rounded by 1e-7 and beta multiplies what that changes
        assert_close(after.params, params, rtol=FLOAT32, atol=2e-6)
        state = after
    assert_close(p.run(2).params, params, rtol=FLOAT32, atol=2e-6)


@pytest.mark.parametrize("gamma", [0.005, 0.3])
def test_worst_weights(gamma, rng):
    """Wu et al. 2020: v = gamma |w| g / |g| for each kernel by itself; vectors and scalars stay."""
    shapes = {"conv": (3, 3, 2, 4), "dense": (4, 5), "bias": (5,), "scale": (4,), "scalar": ()}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    gradients = {
        name: jnp.asarray(10.0 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    found = train.worst_weights(gradients, params, gamma)
    for name, (w, g) in ((name, float64((params[name], gradients[name]))) for name in shapes):
        expected = w + gamma * np.sqrt(np.sum(w**2)) * g / np.sqrt(np.sum(g**2)) if w.ndim > 1 else w
        np.testing.assert_allclose(found[name], expected, rtol=FLOAT32, atol=1e-6 if w.ndim > 1 else 0)
    still = train.worst_weights(jax.tree.map(jnp.zeros_like, params), params, gamma)
    assert_same_arrays(still, params)


def test_a_step_with_awp(rng):
    """The gradient at the worst weights is applied to the weights themselves; the bias is not perturbed."""
    p = problem("nominal", rng, **{"train.awp": 0.3})
    x, y = float64(p.train_set.images)[p.order][:10], np.asarray(p.train_set.labels)[p.order][:10]
    params = float64(p.state.params)
    g, _ = naive.softmax_gradients(params, x, y)
    worst = dict(params)
    worst["kernel"] = params["kernel"] + 0.3 * np.linalg.norm(params["kernel"]) * g[
        "kernel"
    ] / np.linalg.norm(g["kernel"])
    expected = naive.Sgd(0.1, 0.01).step(params, naive.softmax_gradients(worst, x, y)[0])
    assert_close(p.run(1).params, expected, rtol=FLOAT32, atol=1e-6)
    assert np.abs(expected["kernel"] - naive.Sgd(0.1, 0.01).step(params, g)["kernel"]).max() > 1e-3


def test_the_moving_average_is_what_is_deployed(rng):
    """a <- d a + (1 - d) v, d = min(ema, (1 + step) / (10 + step)), of parameters and running statistics.

    Its clusters are fitted on its own embeddings: with one per class, the class means.
    """
    net = Linear((3,), 3, normed=True)
    p = problem("clustr", rng, net=net, **{"train.ema": 0.15, "train.lr": 0.5})
    state, average = p.state, float64(p.state.variables)
    for i in range(4):
        state, _, _ = p.step(state)
        d = min(0.15, (1 + i) / (10 + i))
        average = jax.tree.map(lambda a, v, d=d: d * a + (1 - d) * np.float64(v), average, state.variables)
    assert state.deployed[0] is state.average
    for name in ("params", "batch_stats"):
        assert_close(state.average[name], average[name], rtol=FLOAT32, atol=1e-6)
    assert np.abs(average["batch_stats"]["mean"] - state.batch_stats["mean"]).max() > 1e-3
    state = refit.refit(p.trainer, state, p.train_set, jax.random.key(2))
    for clusters, stats in (
        (state.clusters, state.batch_stats),
        (state.deployed[1], state.average["batch_stats"]),
    ):
        z = normalise(float64(p.train_set.images), stats["mean"], stats["var"])
        assert_class_means(clusters, z, np.asarray(p.train_set.labels))
    plain = problem("clustr", rng)
    assert plain.state.deployed[0]["params"] is plain.state.params
    assert plain.state.deployed[1] is plain.state.clusters


@pytest.mark.parametrize("method", ["nominal", "fast_at", "trades", "clustr_qtrades", "free_at"])
def test_what_a_step_works_on(method, rng):
    """The images of the next step, clean and perturbed, as arrays."""
    replays = 2 if method == "free_at" else 1
    p = problem(method, rng, **{"train.attack.eps": 0.1, "train.replays": replays})
    state = p.state if method != "free_at" else p.run(1)  # the first perturbation is zero
    batch, ids, x_adv = train.seen(p.trainer, state, p.train_set, p.order, jax.random.clone(p.key))
    np.testing.assert_array_equal(batch.x, np.float32(p.train_set.images)[ids])
    if method == "nominal":
        assert x_adv is None
        return
    moved = np.abs(np.asarray(x_adv - batch.x))
    assert 0 < moved.max() <= 0.1 + ULP


def test_the_rate_is_that_of_the_step(rng):
    """Not of the updates: after steps that were passed over, the schedule is where it would be."""
    changes = {"train.weight_decay": 0.0, "train.decay": 0.1}
    later, constant = (
        problem("nominal", np.random.default_rng(0), **changes, **{"train.milestones": milestones})
        for milestones in ((1,), ())
    )
    moves = []
    for p in (later, constant):
        start = p.state.replace(step=jnp.int32(4))  # an epoch has four; none of them updated anything
        state, *_ = p.step(start)
        moves.append(state.params["kernel"] - start.params["kernel"])
    np.testing.assert_allclose(moves[0], 0.1 * moves[1], rtol=1e-4, atol=1e-7)


# Switches of the sampler and of the clusters


@pytest.mark.parametrize("samples", [4, 20])
def test_small_clusters_skip(samples, rng):
    """A batch with a masked entry (20 samples, clusters of 13) changes nothing but the step."""
    changes = {"magnet.samples": samples, "train.ema": 0.5, "fidelity.small_clusters": "skip"}
    p = problem("clustr", rng, **changes)
    after, _, (batch, _) = p.step()
    assert int(after.step) == 1
    assert np.all(batch.mask) == (samples == 4)
    if samples == 20:
        assert_same_arrays(after.replace(step=p.state.step), p.state)
    else:  # the weights decay, if nothing else
        assert (np.asarray(after.params["kernel"]) != np.asarray(p.state.params["kernel"])).all()
        assert (np.asarray(after.sampler.losses) != np.asarray(p.state.sampler.losses)).any()


@pytest.mark.more
def test_a_stale_sampler(rng):
    """A step remembers as the authors do; a refit leaves their means; seeds have no floor."""
    p = problem("clustr", rng, **{"magnet.k": 2, "fidelity.sampler": "stale"})
    assert not np.any(p.state.sampler.seen) and not np.any(p.state.sampler.means)
    after, _, (batch, _) = p.step()
    x = np.asarray(p.train_set.images)[np.asarray(after.sampler.seen)]
    np.testing.assert_array_equal(np.sort(x, axis=0), np.sort(batch.x[batch.mask], axis=0))
    in_batch = np.asarray(batch.mask).reshape(len(batch.classes), -1).any(axis=1).sum()
    # the seed's class has a sixth cluster, which is left out
    assert np.count_nonzero(after.sampler.means) == in_batch == 5
    other = after.replace(params=jax.tree.map(jnp.zeros_like, after.params))
    again = refit.refit(p.trainer, other, p.train_set, jax.random.key(3)).sampler
    for name in ("losses", "seen", "means"):
        np.testing.assert_array_equal(getattr(again, name), getattr(after.sampler, name))

    # the only cluster that was ever seen is the only seed (row 0 of a batch)
    offsets, members = np.asarray(p.state.sampler.offsets), np.asarray(p.state.sampler.members)
    only = members[offsets[4] : offsets[5]]
    state = p.state.replace(
        sampler=sampling.update(p.state.sampler, jnp.asarray(only), jnp.ones(len(only)), only >= 0)
    )
    draw = jax.jit(functools.partial(train.draw_batch, p.trainer))
    for i in range(20):
        batch, ids = draw(state, p.train_set, p.order, jax.random.key(i))
        assert set(np.asarray(ids)[:4][np.asarray(batch.mask)[:4]]) <= set(only)


def normalise(x, mean, variance):
    """Batch norm, then flat."""
    z = (x - np.float64(mean)) / np.sqrt(np.float64(variance) + 1e-5)
    return z.reshape(len(x), -1)


def assert_class_means(clusters, z, labels, z_variance=None):
    """One cluster per class, its mean; sigma^2 from these embeddings, or `z_variance`, about these means."""
    means = np.stack([z[labels == c].mean(axis=0) for c in range(labels.max() + 1)])
    np.testing.assert_allclose(np.asarray(clusters.centroids)[:, 0], means, rtol=1e-4, atol=1e-5)
    spread = z if z_variance is None else z_variance
    variance = np.sum((spread - means[labels]) ** 2) / (len(labels) - 1)
    np.testing.assert_allclose(clusters.variance, variance, rtol=1e-4)


SIDE = (4, 4, 2)


def embeddings(pixels, stats, mode):
    """Train mode normalises by a batch's own statistics: the authors' 125 images, the last one smaller."""
    if mode == "eval":
        return normalise(pixels, stats["mean"], stats["var"])
    batch = 125
    pieces = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
    return np.concatenate([normalise(p, p.mean(axis=(0, 1, 2)), p.var(axis=(0, 1, 2))) for p in pieces])


def check_refit(rng, monkeypatch, name, size, **switches):
    """Clusters at the first and at a later refit. The augmentation is 255 - image, so that it is known."""
    monkeypatch.setattr(data, "crop_flip", lambda key, images, **_: 255 - images)
    labels = np.arange(size) % 3
    bright = np.linspace(40, 160, size)[:, None, None, None] + 20 * labels[:, None, None, None]
    images = np.uint8(np.clip(bright + 30 * rng.normal(size=(size, *SIDE)), 0, 255))
    net = Linear(SIDE, 3, normed=True, name=name)
    changes = {f"fidelity.{switch}": value for switch, value in switches.items()}
    p = problem(
        "clustr",
        rng,
        net=net,
        images=images,
        labels=labels,
        fit=False,
        **{"data.augment": "crop_flip", **changes},
    )
    views = {"clean": np.float64(images) / 255, "augmented": np.float64(255 - images) / 255}
    modes = {"clean": "eval", "augmented": "train"}  # of the variance
    state = p.state
    for first in (True, False):
        state = refit.refit(p.trainer, state, p.train_set, jax.random.key(1 + first))
        mode = switches.get("first_clusters", "eval") if first else "eval"
        z = embeddings(views[switches.get("cluster_images", "clean")], state.batch_stats, mode)
        spread = None
        if "variance_images" in switches:
            spread = embeddings(views["augmented"], state.batch_stats, modes["augmented"])
        assert_class_means(state.clusters, z, labels, spread)
    assert_same_arrays(state.batch_stats, p.state.batch_stats)


REFITS = [
    {},
    {"first_clusters": "train"},
    {"cluster_images": "augmented"},
    {"variance_images": "augmented"},
    {"first_clusters": "train", "cluster_images": "augmented", "variance_images": "augmented"},
]


@pytest.mark.parametrize("switches", REFITS, ids=label)
def test_images_and_modes_of_the_clusters(switches, rng, monkeypatch):
    """Whose embeddings make centroids and variance: clean or augmented images, in eval or train mode."""
    check_refit(rng, monkeypatch, f"1000 {switches}", 1000, **switches)


@pytest.mark.parametrize("switches", [REFITS[1], REFITS[3]], ids=label)
def test_train_mode_statistics_are_of_the_images_alone(switches, rng, monkeypatch):
    """A set that is no multiple of a batch: what fills up the last one is no image of it."""
    check_refit(rng, monkeypatch, f"601 {switches}", 601, **switches)
