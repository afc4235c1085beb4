"""FMN and DDN: slow ones in NumPy, linear models, whose distances are known, and what is returned at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import reference_attacks
from affine_model import SLOTS, problem, wrong
from clustr_jax import attacks
from clustr_jax.attacks import attack_losses, device_loop, nearest, scheduler
from clustr_jax.attacks.fmn import DDN, FMN
from clustr_jax.runtime.errors import UserError

# What the line search leaves: a halving of the distance twelve times, and a step beyond the boundary.
CLOSE = 1e-3


def tanh_model(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


@functools.cache
def curved():
    """(model, x, y, f, its Jacobian): 8 pixels, 3 classes, all right."""
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(8, 10)).astype(np.float32), rng.normal(size=(10, 3)).astype(np.float32)
    model = Partial(tanh_model, [jnp.asarray(first), jnp.asarray(second)])
    x = rng.uniform(0, 1, (12, 8)).astype(np.float32)
    a, b = np.float64(first), np.float64(second)
    return (
        model,
        x,
        np.asarray(model(x)).argmax(axis=1).astype(np.int32),
        lambda z: np.tanh(z @ a) @ b,
        lambda z: (a @ ((1 - np.tanh(z @ a) ** 2)[:, None] * b)).T,
    )


def path_of(attack, model, x, y, steps):
    """(iterates, the last state)."""
    number = np.arange(len(x), dtype=np.int32)
    work = device_loop.fill(jax.random.key(0), number, number, 0 * number, x, y, number)
    state, update = jax.jit(type(attack).init)(attack, work), jax.jit(type(attack).update)
    path = [np.asarray(state.x)]
    for step in range(steps):
        assert not np.asarray(state.fooled).any()  # no success before the end
        state = update(attack, model, work, state, jnp.full(len(x), step, jnp.int32))
        path.append(np.asarray(state.x))
    return path, state


def check_path(attack, slow, steps):
    """Iterates, and the nearest of them that was misclassified."""
    model, x, y, f, _ = curved()
    path, state = path_of(attack, model, x, y, steps)
    found = 0
    for i in range(len(x)):
        best, iterates = slow(i)
        margins = [np.sort(f(z))[-1] - np.sort(f(z))[-2] for z in iterates]
        if min(margins) < 1e-4:
            continue  # so near to the boundary that rounding decides on which side
        np.testing.assert_allclose([p[i] for p in path[:-1]], iterates, atol=5e-5)
        assert (best is not None) == np.isfinite(state.distance[i]) == bool(state.fooled[i])
        np.testing.assert_allclose(state.candidate[i], x[i] if best is None else best, atol=5e-5)
        found += best is not None
    assert found >= 6


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["no_box", "box"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fmn_matches_a_slow_one(norm, bounds):
    _, x, y, f, jacobian = curved()
    steps, step_size = 14, 0.4
    attack = FMN(
        eps=jnp.float32(jnp.inf),
        steps=np.int32(steps),
        norm=norm,
        bounds=bounds,
        step_size=jnp.float32(step_size),
        margin=attack_losses.one(attack_losses.margin),
    )

    def slow(i):
        def rival(z):
            return max((v, c) for c, v in enumerate(f(z)) if c != y[i])[1]

        return reference_attacks.fmn(
            np.float64(x[i]),
            lambda z: f(z)[rival(z)] - f(z)[y[i]],
            lambda z: jacobian(z)[rival(z)] - jacobian(z)[y[i]],
            steps=steps,
            step_size=step_size,
            norm=norm,
            bounds=bounds,
        )

    check_path(attack, slow, steps)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["no_box", "box"])
def test_ddn_matches_a_slow_one(bounds):
    _, x, y, f, jacobian = curved()
    steps, step_size = 14, 0.4
    attack = DDN(
        eps=jnp.float32(jnp.inf),
        steps=np.int32(steps),
        norm="l2",
        bounds=bounds,
        step_size=jnp.float32(step_size),
    )

    def slow(i):
        def gradient(z):
            """Of the cross entropy: sum_c p_c grad z_c - grad z_y."""
            p = np.exp(f(z) - f(z).max())
            return p / p.sum() @ jacobian(z) - jacobian(z)[y[i]]

        return reference_attacks.ddn(
            np.float64(x[i]),
            lambda z: f(z).argmax() != y[i],
            gradient,
            steps=steps,
            step_size=step_size,
            bounds=bounds,
        )

    check_path(attack, slow, steps)


def exact_distances(classes, norm, bounds):
    """[N] of the linear problem: to the nearest hyperplane, in the box if there is one."""
    weight, bias, _, x, y = problem(classes)
    w, points = np.float64(weight), np.float64(x).reshape(len(x), -1)
    found = np.full(len(x), np.inf)
    for i, (point, own) in enumerate(zip(points, y, strict=True)):
        for c in range(classes):
            if c == own:
                continue
            slope, offset = w[:, c] - w[:, own], bias[c] - bias[own]
            if bounds is None:
                dual = np.abs(slope).sum() if norm == "linf" else np.linalg.norm(slope)
                distance = abs(slope @ point + offset) / dual
            elif norm == "linf":
                distance = reference_attacks.onto_hyperplane_linf(point, slope, offset, bounds)
            else:
                distance = reference_attacks.onto_hyperplane_l2(point, slope, offset, bounds)
            found[i] = min(found[i], np.inf if distance is None else distance)
    return found


def check_linear(found, classes, norm, bounds):
    """Right images: misclassified, in the box, as far as it says, and as near as can be. Wrong ones: 0."""
    _, _, model, x, y = problem(classes)
    clean = wrong(model, x, y)
    np.testing.assert_array_equal(found.distance[clean], 0.0)
    np.testing.assert_array_equal(found.x_adv[clean], x[clean])
    assert wrong(model, found.x_adv, y).all()
    delta = (np.float64(found.x_adv) - x).reshape(len(x), -1)
    size = np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    np.testing.assert_allclose(found.distance, size, rtol=1e-9)
    if bounds is not None:
        assert found.x_adv.min() >= bounds[0] and found.x_adv.max() <= bounds[1]
    expected = exact_distances(classes, norm, bounds)[~clean]
    assert (found.distance[~clean] >= expected - 1e-6).all()
    np.testing.assert_allclose(found.distance[~clean], expected, rtol=CLOSE, atol=1e-6)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["no_box", "box"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fmn_on_linear_models_of_two_classes(norm, bounds):
    """|margin| / |w|_dual without a box, a linear or quadratic program with one."""
    _, _, model, x, y = problem(2)
    found = attacks.fmn(jax.random.key(0), model, x, y, norm=norm, bounds=bounds, steps=60, slots=SLOTS)
    check_linear(found, 2, norm, bounds)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fmn_towards_each_class(norm):
    """Of five classes: one run towards each, and the nearest of what they find; untargeted may miss it."""
    _, _, model, x, y = problem(5)
    call = functools.partial(attacks.fmn, norm=norm, bounds=None, steps=60, slots=SLOTS)
    found = call(jax.random.key(0), model, x, y, targeted=True)
    check_linear(found, 5, norm, None)
    untargeted = call(jax.random.key(0), model, x, y)
    assert (untargeted.distance >= found.distance * (1 - CLOSE)).all()
    likely = call(jax.random.key(0), model, x, y, targeted=True, targets="likely")
    np.testing.assert_allclose(likely.distance, found.distance, rtol=CLOSE)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["no_box", "box"])
def test_ddn_on_linear_models_of_two_classes(bounds):
    _, _, model, x, y = problem(2)
    found = attacks.ddn(jax.random.key(0), model, x, y, bounds=bounds, steps=100, slots=SLOTS)
    check_linear(found, 2, "l2", bounds)


def far(x):
    """Class 0 everywhere in the box."""
    z = x.sum(axis=1)
    return jnp.stack([0 * z + 100, z], axis=1)


def flat(x):
    """Two classes, and no gradient that says where the other one is."""
    z = jnp.where(x[:, 0] > 0.9, 1.0, -1.0)
    return jnp.stack([-z, z], axis=1)


@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
@pytest.mark.parametrize("model", [far, flat])
@pytest.mark.parametrize("door", [attacks.fmn, attacks.ddn])
def test_where_nothing_is_found(door, model):
    """The distance is inf and the image comes back as it was."""
    x = np.array([[0.2, 0.3], [0.5, 0.1]], np.float32)
    found = door(jax.random.key(0), model, x, np.zeros(2, int), steps=5, slots=2)
    np.testing.assert_array_equal(found.distance, [np.inf, np.inf])
    np.testing.assert_array_equal(found.x_adv, x)


def test_the_box_decides_the_unit():
    """Images in 0..255, and the same in [0, 1]: the same distances, but for the unit."""
    _, _, model, x, y = problem(2)

    def levels(x):
        return model(x / 255)

    for door in (attacks.fmn, attacks.ddn):
        one = door(jax.random.key(0), model, x, y, steps=30, slots=SLOTS)
        other = door(jax.random.key(0), levels, 255 * x, y, steps=30, slots=SLOTS, bounds=(0, 255))
        np.testing.assert_allclose(other.distance / 255, one.distance, rtol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_rounding_undid_is_taken_farther(norm):
    """Points just short of the boundary, and points far beyond it: both end at it; others are not found."""
    _, _, model, x, y = problem(2)
    right = np.flatnonzero(~wrong(model, x, y))[:6]
    x, y = x[right], y[right]
    found = attacks.fmn(jax.random.key(0), model, x, y, norm=norm, bounds=None, slots=SLOTS)
    boundary = exact_distances(2, norm, None)[right]
    for share in (1 - 1e-6, 1 - 5e-3, 1.5, 3.0, 0.5):
        delta = (found.x_adv - x) * (share * boundary / found.distance).reshape(-1, 1, 1, 1)
        x_adv, distance = nearest.bring_in(model, np.float32(x + delta), x, y, norm, None, 4)
        if share == 0.5:
            assert np.isinf(distance).all() and (x_adv == x).all()
            continue
        assert wrong(model, x_adv, y).all()
        np.testing.assert_allclose(distance, boundary, rtol=1.1e-2 if share < 1 else 2 * CLOSE)


def test_unconfirmed_images_are_attacked_once_more(monkeypatch):
    """The pass that judges says no to all that the first run found."""
    _, _, model, x, y = problem(2)
    wanted = attacks.fmn(jax.random.key(0), model, x, y, steps=20, slots=SLOTS)
    judged, run, calls = scheduler.misjudged, scheduler.run, []

    def doubting(attack, key, model, x, y, **settings):
        calls.append(len(x))
        with pytest.MonkeyPatch.context() as patch:
            if len(calls) == 1:
                patch.setattr(scheduler, "misjudged", lambda *args: np.zeros_like(judged(*args)))
            return run(attack, key, model, x, y, **settings)

    monkeypatch.setattr(scheduler, "run", doubting)
    found = attacks.fmn(jax.random.key(0), model, x, y, steps=20, slots=SLOTS)
    assert calls == [np.sum(wanted.distance > 0)] * 2
    np.testing.assert_allclose(found.distance, wanted.distance, rtol=1e-5)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(step_size=0.0), "step_size must be above 0"),
        (dict(step_size="1"), "step_size must be a number"),
        (dict(steps=2.5), "steps must be a whole number"),
        (dict(targets="near"), "targets must be one of likely, malt"),
        (dict(norm="l1"), "norm must be one of"),
    ],
)
def test_settings_that_are_refused(change, text):
    _, _, model, x, y = problem(2)
    with pytest.raises(UserError, match=text):
        attacks.fmn(jax.random.key(0), model, x, y, **change)


def steep_at_the_root(x):
    """Logits that are finite everywhere, with a gradient that is not: sqrt of 0."""
    rise = jnp.sqrt(jnp.maximum(x - 2, 0)).sum(axis=1, keepdims=True)
    z = 4 * (x.sum(axis=1, keepdims=True) - 4) + rise
    return jnp.concatenate([z, -z], axis=1)


@pytest.mark.parametrize("name", ["fmn", "ddn"])
def test_a_gradient_that_is_none_is_refused(name):
    """As at every other attack, and not told as "nothing found"."""
    x = np.random.default_rng(0).uniform(0.55, 0.9, (6, 8)).astype(np.float32)
    attack = getattr(attacks, name)
    settings = dict(norm="l2") if name == "fmn" else {}
    with pytest.raises(UserError, match="NaN"):
        attack(jax.random.key(0), steep_at_the_root, x, np.zeros(6, int), steps=4, slots=SLOTS, **settings)
    with pytest.raises(UserError, match="NaN"):
        attacks.autoattack(
            jax.random.key(0), steep_at_the_root, x, np.zeros(6, int), eps=0.3, norm="l2", attacks=(name,),
            slots=SLOTS,
        )  # fmt: skip
