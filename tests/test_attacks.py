"""The attacks of AutoAttack: exact on linear models, inside ball and box, and as the papers write them.

Nearly all tests share one affine model of 36 pixels and 5 classes, so that each attack is compiled once.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

import reference
import reference_attacks
from clustr_jax import attacks, losses
from clustr_jax.attacks import aims, ensemble, lanes, scheduler
from clustr_jax.attacks.aims import View
from clustr_jax.attacks.apgd import APGD, windows
from clustr_jax.attacks.fab import onto_hyperplane
from clustr_jax.attacks.geometry import ascend
from clustr_jax.attacks.input_checks import check_logits
from clustr_jax.attacks.square import sides
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation import sound_protocol
from clustr_jax.runtime.errors import UserError

SHAPE, CLASSES, N = (6, 6, 1), 5, 48
STEPS, QUERIES, SLOTS = 20, 400, 16
EPS = {"linf": 0.03, "l2": 0.1}
# l2 without a box, which has a closed form; with one in the slow tests
BOUNDS = {"linf": (0.0, 1.0), "l2": None}
ULP = 6e-8


def affine(params, x):
    return x.reshape(x.shape[0], -1) @ params[0] + params[1][None]


def weights(classes=CLASSES, seed=0):
    """Weight and bias of logits W.(x - 1/2)."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(36, classes)).astype(np.float32)
    return weight, (-weight.sum(axis=0) / 2).astype(np.float32)


def images(rng, n=N):
    """Half of them with many pixels at the border of the box, half far from it."""
    x = rng.uniform(0.3, 0.7, (n, *SHAPE))
    x[: n // 2] = np.clip(rng.uniform(-0.7, 1.7, (n // 2, *SHAPE)), 0, 1)
    return x.astype(np.float32)


@functools.cache
def problem(classes=CLASSES):
    """(weight, bias, model, x, y): every label right but each ninth."""
    weight, bias = weights(classes)
    model = Partial(affine, [jnp.asarray(weight), jnp.asarray(bias)])
    x = images(np.random.default_rng(1))
    y = np.asarray(model(x)).argmax(axis=1).astype(np.int32)
    y[::9] = (y[::9] + 1) % classes
    return weight, bias, model, x, y


def call(name, key, model, x, y, *, eps, norm="linf", bounds="default", **more):
    """One of the attacks by name, at the common number of steps."""
    bounds = BOUNDS[norm] if bounds == "default" else bounds
    common = dict(eps=eps, norm=norm, bounds=bounds, **more)
    if name == "pgd":
        return np.asarray(
            attacks.pgd(key, model, x, y, step_size=eps / 4, steps=STEPS, loss_fn=losses.margin, **common)
        )
    if name == "fab":
        return attacks.fab(key, model, x, y, steps=STEPS, slots=SLOTS, **common)
    if name == "square":
        return attacks.square(key, model, x, y, queries=QUERIES, slots=SLOTS, **common)
    return attacks.apgd(
        key, model, x, y, steps=STEPS, slots=SLOTS, targeted=name == "apgd-t",
        loss_fn=losses.dlr if name == "apgd-dlr" else losses.cross_entropy, **common,
    )  # fmt: skip


@functools.cache
def attacked(name, norm, bounds="default"):
    _, _, model, x, y = problem()
    return call(name, jax.random.key(3), model, x, y, eps=EPS[norm], norm=norm, bounds=bounds)


def wrong(model, x, y):
    return np.asarray(model(jnp.asarray(x))).argmax(axis=1) != y


def check_inside(x_adv, x, eps, norm, bounds):
    delta = (np.float64(x_adv) - x).reshape(len(x), -1)
    size = np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    assert np.isfinite(x_adv).all() and size.max() <= eps * (1 + 1e-6) + 6 * ULP  # sqrt(36) pixels
    if bounds is not None:
        assert x_adv.min() >= bounds[0] and x_adv.max() <= bounds[1]


# Exact answers


def check_linear(name, norm, share, bounds="default"):
    """Robust ones survive; of those that break within 97 % of the radius, `share` are broken."""
    weight, bias, model, x, y = problem()
    bounds = BOUNDS[norm] if bounds == "default" else bounds
    x_adv = attacked(name, norm, bounds)
    exact = functools.partial(reference_attacks.linear_robust, x, y, weight, bias, norm=norm, bounds=bounds)
    robust, easy = exact(eps=EPS[norm]) > 1e-5, exact(eps=0.97 * EPS[norm]) < 0
    right, broken = ~wrong(model, x, y), wrong(model, x_adv, y)
    assert (right & robust).sum() >= 10 and (right & easy).sum() >= 10
    assert (right & ~robust & ~easy).sum() <= 4  # so near to the radius that either would do
    assert not broken[robust].any()
    assert np.mean(broken[right & easy]) >= share
    check_inside(x_adv, x, EPS[norm], norm, bounds)


# DLR's and cross entropy's gradients bend with the logits, Square guesses: bounds, not exact answers.
SHARES = {"apgd-t": 1.0, "fab": 1.0, "pgd": 0.8, "square": 0.7, "apgd-ce": 0.8}


def pairs(*names):
    """(name, norm) of attacks; a compilation each, so some of l2 only in the slow tests."""
    slow = [("pgd", "l2"), ("square", "l2")]
    both = [(name, norm) for name in names for norm in ("linf", "l2")]
    return [pytest.param(*pair, marks=[pytest.mark.slow] if pair in slow else []) for pair in both]


@pytest.mark.parametrize(("name", "norm"), pairs("apgd-t", "fab", "pgd", "square"))
def test_linear_models_have_a_known_answer(name, norm):
    """linf in the box: each coordinate moves as far as it can; l2: margin / |w_y - w_c|_2."""
    check_linear(name, norm, SHARES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apgd-t", "fab", "pgd", "square", "apgd-ce", "apgd-dlr"])
def test_linear_models_without_a_box(name):
    """linf: robust iff z_y - z_c > eps |w_y - w_c|_1."""
    check_linear(name, "linf", SHARES.get(name, 0.6), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_untargeted_apgd_on_linear_models(name, norm):
    check_linear(name, norm, 0.6)


def test_far_from_the_box_the_l1_norm_decides():
    """The linf answer of the images in the middle, by the formula without a box."""
    weight, bias, model, x, y = problem()
    middle = np.arange(N) >= N // 2
    exact = functools.partial(reference_attacks.linear_robust, x, y, weight, bias)
    w, eps = np.float64(weight), EPS["linf"]
    z = np.float64(x).reshape(N, -1) @ w + bias
    for i in np.flatnonzero(middle):
        slack = [
            z[i, y[i]] - z[i, c] - eps * np.abs(w[:, y[i]] - w[:, c]).sum()
            for c in range(CLASSES)
            if c != y[i]
        ]
        np.testing.assert_allclose(exact(eps=eps)[i], min(slack), atol=1e-9)
    middle &= ~wrong(model, x, y)
    for name in ("apgd-t", "fab"):
        broken = wrong(model, attacked(name, "linf", BOUNDS["linf"]), y)
        assert not broken[middle & (exact(eps=eps) > 1e-5)].any()
        assert broken[middle & (exact(eps=0.97 * eps) < 0)].all()


def few_steps(monkeypatch):
    """`autoattack` with the steps of the other tests, whose programs it then shares."""
    build = functools.partial(ensemble.build, steps=STEPS, queries=QUERIES)
    monkeypatch.setattr(ensemble, "build", build)


def check_ensemble(result, weight, bias, model, x, y, eps, names):
    right, broken = ~wrong(model, x, y), wrong(model, result.x_adv, y)
    assert result.robust.dtype == bool and result.robust.shape == (len(x),)
    np.testing.assert_array_equal(result.robust, right & ~broken)
    np.testing.assert_array_equal(result.robust, result.broken_by == "")
    np.testing.assert_array_equal(result.broken_by == "clean", ~right)
    assert set(result.broken_by) <= {"", "clean", *names}
    unchanged = ~right | result.robust
    np.testing.assert_array_equal(result.x_adv[unchanged], x[unchanged])
    exact = functools.partial(reference_attacks.linear_robust, x, y, weight, bias, bounds=(0.0, 1.0))
    assert result.robust[right & (exact(eps=eps) > 1e-5)].all()
    assert not result.robust[exact(eps=0.97 * eps) < 0].any()
    check_inside(result.x_adv, x, eps, "linf", (0.0, 1.0))


def test_the_ensemble_and_what_broke_each_image(monkeypatch):
    """`broken_by` names the first attack that succeeds; each attack gets what the ones before left."""
    few_steps(monkeypatch)
    weight, bias, model, x, y = problem()
    names = ("square", "apgd-t", "fab-t")
    result = attacks.autoattack(jax.random.key(3), model, x, y, eps=EPS["linf"], slots=SLOTS, attacks=names)
    check_ensemble(result, weight, bias, model, x, y, EPS["linf"], names)
    assert (result.broken_by == "square").any() and (result.broken_by == "apgd-t").any()
    # the order is decided by the ids, not by the place
    order = np.random.default_rng(0).permutation(N)
    moved = attacks.autoattack(
        jax.random.key(3), model, x[order], y[order], eps=EPS["linf"], slots=SLOTS, attacks=names,
        ids=order.astype(np.int32),
    )  # fmt: skip
    np.testing.assert_array_equal(moved.broken_by, result.broken_by[order])
    np.testing.assert_allclose(moved.x_adv, result.x_adv[order], atol=1e-6)


@pytest.mark.slow
def test_two_classes_have_one_target(monkeypatch):
    """The targeted attacks fall back to the plain margin, which is exact."""
    few_steps(monkeypatch)
    names = ("apgd-t", "fab-t")
    weight, bias, model, x, y = problem(2)
    result = attacks.autoattack(jax.random.key(3), model, x, y, eps=0.06, slots=SLOTS, attacks=names)
    check_ensemble(result, weight, bias, model, x, y, 0.06, names)
    assert (result.broken_by == "apgd-t").sum() >= 5 and result.robust.sum() >= 5
    with pytest.raises(UserError, match="apgd-dlr needs at least 3 classes"):
        attacks.autoattack(jax.random.key(3), model, x, y, eps=0.06, slots=SLOTS, attacks=("apgd-dlr",))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_the_standard_ensemble_with_few_classes(classes):
    """All four attacks as they are by default: 100 steps, 5,000 queries."""
    weight, bias, model, x, y = problem(classes)
    eps = 0.05
    result = attacks.autoattack(jax.random.key(3), model, x, y, eps=eps)
    check_ensemble(result, weight, bias, model, x, y, eps, ensemble.STANDARD)


def test_nothing_to_attack():
    """All labels wrong: nothing is run and the images come back; no images: no images."""
    _, _, model, x, y = problem()
    false = (np.asarray(model(x)).argmax(axis=1) + 1) % CLASSES
    result = attacks.autoattack(jax.random.key(0), model, x, false, eps=0.1, slots=SLOTS)
    assert (result.broken_by == "clean").all() and not result.robust.any()
    np.testing.assert_array_equal(result.x_adv, x)
    empty = attacks.autoattack(jax.random.key(0), model, x[:0], y[:0], eps=0.1, slots=SLOTS)
    assert empty.x_adv.shape == (0, *SHAPE) and empty.robust.shape == empty.broken_by.shape == (0,)


# Inside the ball and the box

INSIDE = settings(max_examples=5)


def check_radius(name, norm, eps, seed, bounds="default"):
    _, _, model, _, _ = problem()
    bounds = BOUNDS[norm] if bounds == "default" else bounds
    x = images(np.random.default_rng(seed), SLOTS)
    if bounds is not None:  # into another box as well
        x = np.clip(x, *np.float32(bounds))
    y = np.asarray(model(x)).argmax(axis=1)
    x_adv = call(name, jax.random.key(seed), model, x, y, eps=eps, norm=norm, bounds=bounds)
    assert x_adv.shape == x.shape and x_adv.dtype == np.float32
    check_inside(x_adv, x, eps, norm, bounds)
    if eps == 0:
        np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize(("name", "norm"), pairs("apgd-t", "fab", "square"))
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnitWarning")
@INSIDE
@given(eps=st.one_of(st.just(0.0), st.floats(1e-4, 1.5)), seed=st.integers(0, 99))
def test_inside_the_ball_and_the_box(name, norm, eps, seed):
    """For any radius; eps = 0 changes nothing. (attacks.pgd: test_pgd.py.)"""
    check_radius(name, norm, eps, seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnitWarning")
@pytest.mark.parametrize("name", ["apgd-ce", "fab", "square"])
@INSIDE
@given(norm=st.sampled_from(["linf", "l2"]), eps=st.one_of(st.just(0.0), st.floats(1e-4, 3.0)),
       seed=st.integers(0, 99))  # fmt: skip
def test_inside_another_box(name, norm, eps, seed):
    check_radius(name, norm, eps, seed, (0.1, 0.9))


@pytest.mark.parametrize("name", ["apgd-t", "fab", "square"])
def test_zero_radius_breaks_nothing(name):
    _, _, model, x, y = problem()
    x_adv = call(name, jax.random.key(0), model, x, y, eps=0.0)
    np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize("name", ["apgd-t", "fab", "square"])
def test_what_is_wrong_already_comes_back_unchanged(name):
    _, _, model, x, y = problem()
    clean = wrong(model, x, y)
    assert clean.sum() == len(y[::9])
    np.testing.assert_array_equal(attacked(name, "linf", BOUNDS["linf"])[clean], x[clean])


# APGD


def test_checkpoints_are_the_papers():
    """At 100 steps p_j = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    at = reference_attacks.checkpoints(100)
    assert at == [22, 41, 57, 70, 80, 87, 93, 99]
    found = windows(100)
    np.testing.assert_array_equal(np.flatnonzero(found), at)
    np.testing.assert_array_equal(found[found > 0], [22, 19, 16, 13, 10, 7, 6, 6])


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 14, 30, 50, 200, 1000])
def test_windows_for_any_number_of_steps(steps):
    """A window is the distance to the checkpoint before; the first is 22 % of the steps, rounded down."""
    found = windows(steps)
    at = np.flatnonzero(found)
    assert len(found) == steps and found[0] == 0
    np.testing.assert_array_equal(np.diff(at, prepend=0), found[at])
    if steps > 1:
        assert at[0] == max(int(0.22 * steps), 1)
        assert (np.diff(found[at]) <= 0).all()
        assert steps - at[-1] <= max(found[at[-1]] - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    if steps % 100 == 0:
        np.testing.assert_array_equal(at, reference_attacks.checkpoints(steps))


def tanh_model(params, x):
    """Class 0 always wins, by its bias."""
    return jnp.tanh(x @ params[0]) @ params[1] + jnp.array([[30.0, 0.0, 0.0]])


@pytest.mark.parametrize(("norm", "steps"), [("linf", 14), pytest.param("l2", 10, marks=pytest.mark.slow)])
def test_apgd_matches_a_slow_one(norm, steps):
    """Iterates and step sizes of 16 examples on a network, from the same start (no ties with these steps)."""
    rng = np.random.default_rng(2)
    params = [rng.normal(size=(8, 10)).astype(np.float32), rng.normal(size=(10, 3)).astype(np.float32)]
    model = Partial(tanh_model, [jnp.asarray(p) for p in params])
    x, y = rng.uniform(0, 1, (16, 8)).astype(np.float32), np.zeros(16, np.int32)
    eps, bounds = 1.0 if norm == "l2" else 0.4, (0.0, 1.0)
    attack = APGD(
        eps=jnp.float32(eps), steps=steps, norm=norm, bounds=bounds, aim=aims.one(aims.margin_targeted)
    )
    number = np.arange(16, dtype=np.int32)
    target = 1 + number % 2
    work = lanes.fill(jax.random.key(0), number, number, 0 * number, x, y, target)
    state, update = jax.jit(APGD.init)(attack, work), jax.jit(APGD.update)
    path, sizes = [np.asarray(state.candidate)], []
    for step in range(steps):
        state = update(attack, model, work, state, jnp.full(16, step, jnp.int32))
        path.append(np.asarray(state.candidate))
        sizes.append(np.asarray(state.step_size))

    first, second = np.float64(params[0]), np.float64(params[1])
    halvings = 0
    for i in range(16):
        gap = second[:, target[i]] - second[:, 0]

        def value(z, gap=gap):
            return np.tanh(z @ first) @ gap - 30

        def gradient(z, gap=gap):
            return first @ ((1 - np.tanh(z @ first) ** 2) * gap)

        iterates, expected = reference_attacks.apgd(
            path[0][i], np.float64(x[i]), value, gradient, list(np.flatnonzero(windows(steps))),
            eps=eps, steps=steps, norm=norm, bounds=bounds,
        )  # fmt: skip
        np.testing.assert_allclose([s[i] for s in sizes], expected, rtol=1e-6)
        np.testing.assert_allclose([p[i] for p in path], iterates, atol=2e-5)
        halvings += expected[-1] < expected[0]
    assert halvings >= 8
    assert len({float(s) for s in sizes[-1]}) > 1  # they were not all halved alike


@pytest.mark.slow
def test_apgd_starts_at_the_border_of_the_ball():
    """x + eps t / |t|: a uniform draw scaled by its largest entry, a Gaussian by its length."""
    x = np.full((4, 50), 0.5, np.float32)
    number = np.arange(4, dtype=np.int32)
    work = lanes.fill(jax.random.key(0), number, number, 0 * number, x, number, number)
    for norm, size in (("linf", lambda d: np.abs(d).max(1)), ("l2", lambda d: np.linalg.norm(d, axis=1))):
        attack = APGD(eps=jnp.float32(0.1), steps=5, norm=norm, bounds=None, aim=aims.one(aims.cross_entropy))
        delta = np.asarray(attack.init(work).candidate) - x
        np.testing.assert_allclose(size(delta), 0.1, rtol=1e-5)
        assert np.ptp(delta, axis=1).min() > 0.05 and not np.allclose(delta[0], delta[1])


# FAB


def hyperplanes(seed, n=8, size=7, spread=1.0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (n, size)).astype(np.float32)
    x[0] = np.round(x[0])
    w = rng.normal(size=(n, size)).astype(np.float32)
    w[1, :3] = 0
    offset = (-np.sum(w * x, axis=1) + spread * rng.normal(size=n)).astype(np.float32)
    return x, w, offset


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["no_box", "box"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_onto_a_hyperplane(norm, bounds):
    """On it, in the box, and as near as the solver's point."""
    x, w, offset = hyperplanes(0)
    move = np.float64(onto_hyperplane(x, w, offset, norm, bounds))
    feasible = 0
    for i in range(len(x)):
        best = reference_attacks.onto_hyperplane_linf(np.float64(x[i]), np.float64(w[i]), offset[i], bounds)
        if best is None:
            continue
        feasible += 1
        if norm == "l2":
            best = reference_attacks.onto_hyperplane_l2(np.float64(x[i]), np.float64(w[i]), offset[i], bounds)
        z = x[i] + move[i]
        assert abs(w[i] @ z + offset[i]) < 1e-5
        size = np.abs(move[i]).max() if norm == "linf" else np.linalg.norm(move[i])
        np.testing.assert_allclose(size, best, atol=2e-5)
        if bounds:
            assert z.min() >= -1e-7 and z.max() <= 1 + 1e-7
    assert feasible >= 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_hyperplane_out_of_reach(norm):
    """As far as it goes: the corner that comes nearest; pixels without a weight stay."""
    x, w, _ = hyperplanes(1)
    for sign in (1.0, -1.0):
        move = np.asarray(onto_hyperplane(x, w, np.full(len(x), sign * 1e3, np.float32), norm, (0.0, 1.0)))
        corner = np.where(w == 0, x, np.where(sign * w > 0, 0.0, 1.0))
        np.testing.assert_allclose(x + move, corner, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_of_many_pixels_nearly_out_of_reach(norm):
    """3,072 pixels, most of them stopped by the box: Newton's iteration has to pass all those pieces."""
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 1, (4, 3072)).astype(np.float32)
    w = (rng.normal(size=x.shape) * rng.exponential(size=x.shape) ** 2).astype(np.float32)
    capacity = np.sum(np.where(w > 0, w * x, -w * (1 - x)), axis=1)
    share = np.array([0.5, 0.9, 0.99, 0.999])
    offset = (-np.sum(w * x, axis=1) + share * capacity).astype(np.float32)
    move = np.float64(onto_hyperplane(x, w, offset, norm, (0.0, 1.0)))
    left = np.abs(np.sum(w * (x + move), axis=1) + offset)
    assert (left <= 1e-4 * capacity).all(), left / capacity


# Square


@pytest.mark.parametrize(("queries", "height", "width"), [(10_000, 32, 32), (5000, 28, 28), (1000, 8, 8)])
def test_squares_shrink_as_in_the_paper(queries, height, width):
    """Side round(sqrt(p H W)): compared between the halvings, where no off-by-one of the counting matters."""
    found = sides(queries, (height, width, 3), 1, False)
    assert len(found) == queries and (np.diff(found) <= 0).all() and found.min() >= 1
    for at in (5, 30, 125, 350, 750, 1500, 3000, 5000, 7000, 9000, 9999):
        i = at * queries // 10_000
        share = reference_attacks.square_share(at, 10_000)
        assert found[i] == max(1, round(np.sqrt(share * height * width))), at
    assert sides(20, (1, 8, 1), 1, False).min() == 1  # images one pixel high have squares as well
    # l2: odd and at least 3
    found = sides(queries, (height, width, 3), 3, True)
    assert (found % 2 == 1).all() and found.min() == 3 and found.max() <= min(height, width)


@pytest.mark.parametrize(("norm", "smallest", "odd"), [("linf", 1, False), ("l2", 3, True)])
def test_the_schedule_of_autoattack_is_that_of_10000_queries(norm, smallest, odd):
    """resc_schedule=False: share 0.8 until proposal 10, halved after 10, 50, 200 ...: 3 pixels at 5,000."""
    found = sides(5000, (32, 32, 3), smallest, odd, False)
    for at in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999):
        side = max(round(np.sqrt(reference_attacks.square_share(at, 10_000) * 32 * 32)), smallest)
        assert found[at] == (side + 1 - side % 2 if odd else side), at
    assert found[-1] == 3 and sides(5000, (32, 32, 3), 1, False)[-1] == 1
    # of 10,000 queries both are one, and beyond them AutoAttack starts over
    np.testing.assert_array_equal(*(sides(10_000, (32, 32, 3), smallest, odd, r) for r in (True, False)))
    assert (sides(10_100, (32, 32, 3), smallest, odd, False)[10_001:] == found[0]).all()


@pytest.mark.parametrize("rescale", [True, False])
def test_where_squares_lie(rescale):
    """Everywhere; with AutoAttack's schedule where its own do: never in the last row and column."""
    attack = ensemble.build("square", eps=0.1, rescale_schedule=rescale)

    def corners(*size):
        return jax.vmap(lambda key: attack._corner(key, *size))(jax.random.split(jax.random.key(0), 2000))

    rows, columns = corners(3, 8, 6)
    assert (int(rows.max()), int(columns.max())) == ((5, 3) if rescale else (4, 2))
    assert int(rows.min()) == int(columns.min()) == 0
    assert not np.any(corners(8, 8, 8))  # a square that is the whole image has one place


def test_which_schedule_is_whose(monkeypatch):
    """AutoAttack's by default in the ensemble, Square's own in `square`, and each has the other's."""
    seen = []

    def run(attack, key, model, x, y, **more):
        seen.append(attack.rescale)
        return scheduler.Outcome.fresh(x, 1)

    monkeypatch.setattr(scheduler, "run", run)
    x, y = np.full((2, 4, 4, 1), 0.9, np.float32), np.zeros(2, int)

    def model(x):
        z = x.mean(axis=(1, 2, 3))[:, None] - 0.5
        return jnp.concatenate([z, -z], axis=1)

    for chosen in ({}, {"rescale_schedule": True}, {"rescale_schedule": False}):
        attacks.square(jax.random.key(0), model, x, y, eps=0.1, queries=3, **chosen)
        attacks.autoattack(jax.random.key(0), model, x, y, eps=0.1, attacks=("square",), **chosen)
    assert seen == [True, False, True, True, False, False]


@pytest.mark.slow
def test_square_starts_with_stripes_and_paints_one_square_a_query():
    """linf: each column +-eps; then a square of at most the scheduled side at +-eps, per channel."""
    x, number = np.full((4, 8, 8, 3), 0.5, np.float32), np.arange(4, dtype=np.int32)
    attack = ensemble.build("square", eps=0.1, queries=100)
    work = lanes.fill(jax.random.key(0), number, number, 0 * number, x, number, number)
    state = attack.init(work)
    first = np.asarray(state.candidate) - x
    np.testing.assert_allclose(np.abs(first), 0.1, atol=1e-6)
    assert np.ptp(first, axis=1).max() < 1e-6 and np.ptp(first, axis=2).max() > 0.1

    def model(z):  # always right, by the mean of the first channel
        return jnp.stack([jnp.ones(len(z)), *[z[..., 0].mean(axis=(1, 2)) / 10] * 3], axis=1)

    y = np.zeros(4, np.int32)
    for step in (0, 3, 60):
        state = attack.update(model, work.replace(y=y), state, jnp.full(4, step, jnp.int32))
        delta = np.asarray(state.candidate) - x
        np.testing.assert_allclose(np.abs(delta), 0.1, atol=1e-6)
        changed = np.any(np.abs(np.asarray(state.candidate - state.best)) > 1e-6, axis=3)
        side = sides(100, (8, 8, 3), 1, False)[step]
        for mask in changed:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows):
                assert np.ptp(rows) < side and np.ptp(columns) < side
    assert not bool(state.fooled.any())


# Losses, targets


def test_targeted_dlr(rng):
    logits, y = rng.normal(size=(20, 6)).astype(np.float32), rng.integers(0, 6, 20)
    target = (y + 1 + rng.integers(0, 5, 20)) % 6
    reference.close(
        aims.dlr_targeted(logits, y, target), reference_attacks.dlr_targeted(logits, y, target), 1e-5
    )
    few = logits[:, :3]
    y, target = y % 3, (y % 3 + 1) % 3
    expected = [z[t] - z[c] for z, c, t in zip(few, y, target, strict=True)]
    np.testing.assert_allclose(aims.dlr_targeted(few, y, target), expected, rtol=1e-6)
    np.testing.assert_allclose(aims.margin_targeted(few, y, target), expected, rtol=1e-6)


def test_targets_are_the_likeliest_other_classes():
    logits = np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 5.0, 1.0]])
    np.testing.assert_array_equal(ensemble.likely_targets(logits, [0, 3], 2), [[2, 1], [1, 2]])
    np.testing.assert_array_equal(ensemble.likely_targets(logits, [1, 1], 9), [[0, 2], [2, 3], [3, 0]])
    assert logits[0, 0] == 3.0  # the argument is left as it was


def test_nearest_clusters_are_those_of_other_classes():
    """Numbered class * K + j, best first; where clusters are missing the best one stands in."""
    u = np.array([[[-1.0, -9.0], [-2.0, -3.0], [-0.5, -np.inf]]])
    np.testing.assert_array_equal(sound_protocol.nearest_clusters(u, [0], 9), [[4], [2], [3], [4]])
    np.testing.assert_array_equal(sound_protocol.nearest_clusters(u, [1], 2), [[4], [0]])
    np.testing.assert_array_equal(sound_protocol.nearest_clusters(u, [2], 3), [[0], [2], [3]])


def cluster_view(z, centroids, variance, mask=None):
    head = Clusters(jnp.asarray(centroids), jnp.float32(variance), mask)
    scores = head.log_scores(z)
    return View(scores, scores, head.exponents(z))


def test_cluster_aims_match_their_formulas(rng):
    """Of points about 3 classes x 2 clusters: centroid, feature, magnet, hinged magnet, away."""
    mu, z = rng.normal(size=(3, 2, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    y, target, variance = rng.integers(0, 3, 9), rng.integers(0, 6, 9), 0.7
    view = cluster_view(z, mu, variance)
    u = reference_attacks.exponents(z, mu, variance)
    own = np.array([u[i, c].max() for i, c in enumerate(y)])
    goal = u.reshape(9, 6)[np.arange(9), target]
    others = np.array([reference.logsumexp(np.delete(u[i], c, axis=0).ravel()) for i, c in enumerate(y)])
    for aim, expected in (
        (aims.centroid, goal - own), (aims.feature, goal), (aims.away, -own), (aims.magnet, others - own),
        (aims.magnet_hinged(1.0), np.maximum(1.0 + others - own, 0)),
    ):  # fmt: skip
        reference.close(aim(view, y, target), expected, 1e-5)
    assert (1.0 + others - own < 0).any() and (1.0 + others - own > 0).any()


@pytest.mark.slow
def test_missing_clusters_take_no_part(rng):
    """Values and gradients stay finite, and are those of the clusters that exist."""
    mu, z = rng.normal(size=(3, 2, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    mask = jnp.array([[True, True], [True, False], [True, False]])
    y, target = np.arange(6) % 3, np.array([2, 4, 0, 4, 1, 2])
    u = reference_attacks.exponents(z, mu, 1.0)
    u[1:, :, 1] = u[1:, :, 1]
    u[:, 1:, 1] = -np.inf
    own = np.array([u[i, c].max() for i, c in enumerate(y)])
    others = np.array([reference.logsumexp(np.delete(u[i], c, axis=0).ravel()) for i, c in enumerate(y)])
    reference.close(aims.magnet(cluster_view(z, mu, 1.0, mask), y, target), others - own, 1e-5)
    reference.close(aims.away(cluster_view(z, mu, 1.0, mask), y, target), -own, 1e-5)
    for aim in (aims.centroid, aims.feature, aims.magnet, aims.away):
        slope = jax.grad(lambda p, aim=aim: jnp.sum(aim(cluster_view(p, mu, 1.0, mask), y, target)))(z)
        assert np.isfinite(slope).all() and (np.abs(slope).max(axis=1) > 0).all()


def test_the_hinge_hides_what_is_far(rng):
    """Where the margin exceeds alpha the paper's adaptive attack has no gradient; without a hinge it has."""
    mu = np.array([[[0.0, 0.0]], [[10.0, 0.0]]], np.float32)
    z, y = np.array([[0.0, 0.0], [4.9, 0.0]], np.float32), np.zeros(2, np.int32)

    def slope(aim):
        return np.asarray(jax.grad(lambda p: jnp.sum(aim(cluster_view(p, mu, 1.0), y, y)))(z))

    hinged, free = slope(aims.magnet_hinged(12.5)), slope(aims.magnet)
    np.testing.assert_array_equal(hinged[0], 0)  # margin 50
    np.testing.assert_allclose(hinged[1], free[1])  # margin 1
    np.testing.assert_allclose(free, [[10, 0], [10, 0]], rtol=1e-5)
    assert aims.magnet_hinged(12.5) is aims.magnet_hinged(12.5)  # compared by identity


# One step and none


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_step_of_length_eps(norm):
    """x + eps sign(g), or x + eps g / |g|, then the box; the key does not matter."""
    weight, bias = weights(2)
    model, eps = Partial(affine, [jnp.asarray(weight), jnp.asarray(bias)]), 0.1
    x = images(np.random.default_rng(4), 8)
    y = np.asarray(model(x)).argmax(axis=1)
    found = [np.asarray(attacks.fgsm(jax.random.key(k), model, x, y, eps=eps, norm=norm)) for k in (0, 1)]
    np.testing.assert_array_equal(*found)
    g = np.float64(weight)[:, 1 - y].T - np.float64(weight)[:, y].T
    step = np.sign(g) if norm == "linf" else g / np.linalg.norm(g, axis=1, keepdims=True)
    expected = np.clip(np.float64(x) + eps * step.reshape(x.shape), 0, 1)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "norm"), [("uniform", "linf"), ("gaussian", "linf"), ("uniform", "l2")])
def test_noise_in_the_ball(kind, norm):
    """Inside, spread as its kind says, and the misclassified draw comes back where there is one."""
    _, _, model, x, y = problem()
    eps = 3 * EPS[norm]
    x_adv = np.asarray(attacks.noise(
        jax.random.key(0), model, x, y, eps=eps, draws=8, kind=kind, norm=norm, bounds=None
    ))  # fmt: skip
    check_inside(x_adv, x, eps, norm, None)
    once, eight = wrong(model, x, y), wrong(model, x_adv, y)
    assert (once <= eight).all() and once.sum() < eight.sum() < N
    delta = (x_adv - x).reshape(N, -1) / eps
    if norm == "linf":  # uniform: sd 1 / sqrt(3) = 0.577; N(0, 1/4) cut at 2 sd: 0.48, and some at the border
        assert abs(delta.std() - (0.577 if kind == "uniform" else 0.484)) < 0.03
        assert (np.mean(np.abs(delta) > 1 - 1e-4) > 0.01) == (kind == "gaussian")
    else:  # uniform in the ball of 36 dimensions: mean length 36/37
        assert abs(np.linalg.norm(delta, axis=1).mean() - 36 / 37) < 0.02


# Bad input


def bad_inputs():
    _, _, model, x, y = problem()
    return {
        "outside": (dict(x=x + 0.1), "x must lie in bounds"),
        "negative": (dict(x=x - 0.1), "x must lie in bounds"),
        "nan": (dict(x=np.where(np.arange(N)[:, None, None, None] == 3, np.nan, x)), "x has values"),
        "high": (dict(y=np.full(N, CLASSES)), r"y must lie in 0\.\.4"),
        "low": (dict(y=np.full(N, -1)), r"y must lie in 0\.\.4"),
        "float": (dict(y=y.astype(np.float32)), "y must hold integer labels"),
        "few": (dict(y=y[:-1]), r"x must be \[B, \.\.\.\] and y \[B\]"),
        "flat": (dict(x=x.reshape(-1)), r"x must be \[B, \.\.\.\] and y \[B\]"),
        "column": (dict(y=y[:, None]), r"y must be labels \[B\]|and y \[B\]"),
        "few_ids": (dict(ids=np.arange(N - 1)), "ids must be one whole number for each"),
        "many_ids": (dict(ids=np.arange(N + 1)), "ids must be one whole number for each"),
        "float_ids": (dict(ids=np.arange(N) / 2), "ids must be one whole number for each"),
        "norm": (dict(norm="l1"), "norm must be one of"),
        "eps": (dict(eps=-0.1), "eps must be >= 0"),
        "nan_eps": (dict(eps=float("nan")), "eps must be >= 0"),
        "probabilities": (dict(logits_fn=lambda x: jax.nn.softmax(model(x))), "logits_fn returned prob"),
        "infinite": (dict(logits_fn=lambda x: model(x).at[0, 0].set(jnp.inf)), "logits_fn returned values"),
        "shape": (dict(logits_fn=lambda x: model(x)[:, 0]), r"logits_fn must return \[B, Y\]"),
    }  # fmt: skip


@pytest.mark.wrong_arrays
@pytest.mark.parametrize("case", list(bad_inputs()))
@pytest.mark.parametrize("name", ["apgd", "autoattack", "pgd"])
def test_bad_input_is_named(name, case):
    """One UserError, whose text says which argument; nothing has been attacked by then."""
    _, _, model, x, y = problem()
    change, text = bad_inputs()[case]
    given_ = dict(logits_fn=model, x=x, y=y, eps=0.1) | change
    if name == "pgd":
        if case in ("few", "shape"):
            given_["bounds"] = (0.0, 1.0)
        given_ |= dict(step_size=0.1, steps=1)
    else:
        given_["slots"] = SLOTS
    with pytest.raises(UserError, match=text):
        getattr(attacks, name)(jax.random.key(0), **given_)


@pytest.mark.wrong_arrays
@pytest.mark.parametrize("case", ["outside", "nan", "probabilities", "infinite", "shape", "few"])
def test_bad_input_beside_probabilities_is_named(case):
    """QTRADES has no labels, and looks at the rest all the same."""
    _, _, model, x, y = problem()
    change, text = bad_inputs()[case]
    probs = np.full((len(change.get("y", y)), CLASSES), 1 / CLASSES, np.float32)
    given_ = dict(logits_fn=model, x=x) | {k: v for k, v in change.items() if k != "y"}
    with pytest.raises(UserError, match=text):
        attacks.qtrades(jax.random.key(0), **given_, probs=probs, eps=0.1, step_size=0.1)


@pytest.mark.wrong_arrays
def test_a_column_of_labels_is_refused_inside_jit_as_well():
    """[B, 1] would pass for probabilities, whose gradient is 0 for label 0: a blind attack."""
    _, _, model, x, y = problem()
    with pytest.raises(UserError, match="y must be labels"):
        jax.jit(lambda y: attacks.pgd(jax.random.key(0), model, x, y, eps=0.1, step_size=0.1, steps=1))(
            y[:, None]
        )


def test_keys_of_another_kind():
    """Those of a hardware generator: their seed is taken, and the same key gives the same images."""
    _, _, model, x, y = problem()
    run = functools.partial(attacks.apgd, logits_fn=model, x=x, y=y, eps=0.03, steps=STEPS, slots=SLOTS)
    keys = [jax.random.key(seed, impl="rbg") for seed in (0, 0, 1)]
    with jax.debug_key_reuse(False):
        first, again, other = (run(key) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert wrong(model, first, y).sum() == wrong(model, run(jax.random.key(0)), y).sum()


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e-15, 1e-25, 1e-35])
def test_l2_steps_have_their_length_however_small_the_gradient(size, rng):
    gradient = (size * rng.normal(size=(5, 3, 4))).astype(np.float32)
    gradient[4] = 0.0
    moved = np.asarray(ascend(jnp.zeros((5, 3, 4)), jnp.asarray(gradient), 0.1, "l2"), np.float64)
    direction = np.float64(gradient[:4]) / np.linalg.norm(
        np.float64(gradient[:4]), axis=(1, 2), keepdims=True
    )
    np.testing.assert_allclose(moved[:4], 0.1 * direction, atol=1e-6)
    assert not moved[4].any()


def test_a_confident_softmax_hides_nothing_from_l2():
    """A margin of 64 nats, so cross entropy's gradient is of the order 1e-26: the way out is 0.4 long."""
    x, y = np.full((2, 2, 2, 1), 0.5, np.float32), np.zeros(2, np.int32)
    x[:, 0, 0] = 0.9
    model = Partial(lambda x: 80 * jnp.stack([x[:, 0, 0, 0] - 0.5, 0.5 - x[:, 0, 0, 0]], axis=1))
    assert np.ptp(model(x), axis=1).min() > 60
    x_adv = attacks.apgd(jax.random.key(0), model, x, y, eps=0.5, steps=20, norm="l2", slots=2)
    assert wrong(model, x_adv, y).all()


def test_a_transferred_image_without_finite_logits_is_no_success():
    model = Partial(lambda x: jnp.stack([jnp.sqrt(x[:, 0] - 0.5), x[:, 0]], axis=1))
    x, y = np.float32([[0.6], [0.4], [0.7]]), np.int32([0, 1, 1])
    with pytest.raises(UserError, match="non-finite logits"):
        scheduler.misjudged(model, x, y)
    np.testing.assert_array_equal(scheduler.misjudged(model, x[[0, 2]], y[[0, 2]]), [True, False])


@pytest.mark.parametrize("name", ["apgd", "fab", "square", "autoattack"])
def test_slots_must_be_positive(name):
    _, _, model, x, y = problem()
    with pytest.raises(UserError, match="slots must be at least 1, got 0"):
        getattr(attacks, name)(jax.random.key(0), model, x, y, eps=0.1, slots=0)


@pytest.mark.wrong_arrays
def test_other_bad_settings():
    _, _, model, x, y = problem()
    key = jax.random.key(0)
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        attacks.apgd(key, model, x, y, eps=0.1, steps=0)
    with pytest.raises(UserError, match="restarts must be at least 1, got 0"):
        attacks.fab(key, model, x, y, eps=0.1, restarts=0)
    with pytest.raises(UserError, match=r"attacks: unknown 'apgd'; known: apgd-ce"):
        attacks.autoattack(key, model, x, y, eps=0.1, attacks=("apgd",))
    with pytest.raises(UserError, match=r"square takes images \[B, H, W, C\]"):
        attacks.square(key, model, x.reshape(N, -1), y, eps=0.1, slots=SLOTS)
    with pytest.raises(UserError, match="kind must be uniform or gaussian"):
        attacks.noise(key, model, x, y, eps=0.1, kind="salt")


def exp_scores(mu, x):
    return Clusters(mu, jnp.float32(1.0)).scores(x.reshape(x.shape[0], -1))


def test_exp_scores_are_recognised():
    """Bounded scores that are no probabilities: a warning, from `pgd` and from the scheduled attacks."""
    x = np.random.default_rng(0).uniform(size=(SLOTS, *SHAPE)).astype(np.float32)
    model = Partial(exp_scores, jnp.asarray(x.reshape(SLOTS, 1, -1)[:4]))
    y = np.zeros(SLOTS, np.int32)
    y[:4] = np.arange(4)
    with pytest.warns(UserWarning, match="logits_fn returned bounded scores"):
        attacks.pgd(jax.random.key(0), model, x, y, eps=0.01, step_size=0.01, steps=1)
    with pytest.warns(UserWarning, match="logits_fn returned bounded scores"):
        false = (np.asarray(model(x)).argmax(axis=1) + 1) % 4  # nothing to attack
        attacks.autoattack(jax.random.key(0), model, x, false, eps=0.01, slots=SLOTS)
    with warnings.catch_warnings():  # what they should be
        warnings.simplefilter("error")
        check_logits(np.log(model(x)), y)


@pytest.mark.parametrize("case", ["outside", "high", "probabilities"])
def test_inside_jit_values_are_not_looked_at(case):
    """In a training step `pgd` costs nothing extra and refuses nothing that it cannot see."""
    _, _, model, x, y = problem()
    change, _ = bad_inputs()[case]
    given_ = dict(logits_fn=model, x=x, y=y) | change
    f = given_["logits_fn"]

    @jax.jit
    def run(key, x, y):
        return attacks.pgd(key, f, x, y, eps=0.1, step_size=0.1, steps=1)

    assert run(jax.random.key(0), given_["x"], given_["y"]).shape == x.shape
