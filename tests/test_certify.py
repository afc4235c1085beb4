"""Certified radii against exact flip distances, attacks inside and outside of them, and bad input.

`rounding=0` where exact arithmetic is compared; the default elsewhere.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

import reference_certify as reference
from clustr_jax import attacks, certify
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError

SOUND = certify.SOUND


def make(centroids, variance=1.0, mask=None):
    mask = None if mask is None else jnp.asarray(mask)
    return Clusters(jnp.asarray(centroids, jnp.float32), jnp.float32(variance), mask)


def exact(clusters, z, y, rule, lipschitz=1.0):
    return certify.radius(clusters, z, y, lipschitz=lipschitz, rule=rule, rounding=0.0)


def random_problem(rng, max_classes=100):
    """(centroids [Y, K, E], mask, variance, f [E], y): Y in 2..100, K in 1..3, varying by class.

    f lies near one of the own centroids, near a boundary, or anywhere.
    """
    num_classes = int(rng.choice([2, 3, 5, 10, max_classes], p=[0.3, 0.25, 0.2, 0.15, 0.1]))
    k, dimension = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 8, 32]))
    centroids = rng.standard_normal((num_classes, k, dimension)) * rng.choice([0.3, 1.0, 3.0])
    mask = np.arange(k)[None, :] < rng.integers(1, k + 1, num_classes)[:, None]
    centroids = np.float64(np.float32(centroids))
    y = int(rng.integers(num_classes))
    spread = rng.choice([0.05, 0.3, 1.0])
    f = centroids[y, 0] + spread * rng.standard_normal(dimension)
    if rng.random() < 0.3:  # beside another class
        other = centroids[(y + 1) % num_classes, 0]
        f = f + 0.45 * (other - centroids[y, 0])
    variance = float(np.float32(10.0 ** rng.uniform(-2, 1)))
    return centroids, mask, variance, f, y


def assert_no_flip_inside(problem, radii):
    """No sound radius reaches a point that its rule classifies otherwise; sizes and orders are right."""
    centroids, mask, variance, f, y = problem
    distance = reference.hard_flip_distance(f, y, centroids, mask)
    assert radii["hard"] <= distance * (1 + 1e-6) + 1e-12
    assert radii["any_d"] <= radii["hard"] * (1 + 1e-6) and radii["any_d"] <= radii["soft"] * (1 + 1e-6)
    assert (radii["hard"] > 0) == reference.predicts(f, y, centroids, mask, variance, nearest=1)
    # radii are rounded down: the float32 below the exact value still holds
    for rule, rules in (("soft", (None,)), ("any_d", (1, 2, 3, 5, None))):
        if 0 < radii[rule] < np.inf:
            points = reference.worst_points(f, y, centroids, mask, variance, radii[rule] * (1 - 1e-9))
            for g in points[:: max(1, len(points) // 40)]:
                for nearest in rules:
                    assert reference.predicts(g, y, centroids, mask, variance, nearest)


def solve(problem):
    centroids, mask, variance, f, y = problem
    clusters = make(centroids, variance, mask)
    return {rule: exact(clusters, f[None], np.array([y]), rule)[0] for rule in (*SOUND, "paper")}


def check_problems(seed, count):
    """`count` random problems; returns how often the paper's rule claims more than the exact distance."""
    rng = np.random.default_rng(seed)
    claimed = wrong = 0
    for _ in range(count):
        problem = random_problem(rng)
        radii = solve(problem)
        assert_no_flip_inside(problem, radii)
        centroids, mask, _, f, y = problem
        if radii["paper"] > 0 and len(centroids) > 2:
            claimed += 1
            wrong += radii["paper"] > reference.hard_flip_distance(f, y, centroids, mask) * (1 + 1e-5)
    return wrong / claimed


@pytest.mark.more
def test_no_sound_radius_exceeds_the_flip_distance_in_200_random_problems():
    """And the paper's rule over-claims on a good part of those with more than two classes."""
    assert check_problems(seed=0, count=200) > 0.05


@pytest.mark.long
def test_no_sound_radius_exceeds_the_flip_distance_in_10000_random_problems():
    assert check_problems(seed=1, count=10_000) > 0.05


@given(st.integers(0, 10**6))
def test_two_classes_of_one_cluster_are_theorem_1(seed):
    """All four rules are Eq. 1 then, to float32, whatever the variance; and divide by the constant."""
    rng = np.random.default_rng(seed)
    centroids = np.float64(np.float32(rng.standard_normal((2, 1, 5))))
    f, lipschitz = centroids[0, 0] + 0.3 * rng.standard_normal(5), 10.0 ** rng.uniform(-3, 3)
    expected = max(reference.theorem_1(f, centroids[0, 0], centroids[1, 0]), 0.0) / lipschitz
    for rule in certify.RULES:
        found = exact(make(centroids, 10.0 ** rng.uniform(-3, 2)), f[None], np.array([0]), rule, lipschitz)[0]
        assert found <= expected * (1 + 1e-9)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_with_one_cluster_per_class_hard_is_the_exact_distance():
    rng = np.random.default_rng(0)
    for _ in range(50):
        centroids = np.float64(np.float32(rng.standard_normal((6, 1, 3))))
        f = centroids[2, 0] + 0.2 * rng.standard_normal(3)
        expected = reference.hard_flip_distance(f, 2, centroids, np.ones((6, 1), bool))
        for rule in SOUND:
            found = exact(make(centroids), f[None], np.array([2]), rule)[0]
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_papers_rule_over_claims_on_the_counter_example():
    """f = identity on the line, x = 0, centroids 1, 2, -2.1: 1.5 claimed, 0.55 true, flips at -0.6."""
    clusters = make([[[1.0]], [[2.0]], [[-2.1]]])
    z, y = np.zeros((1, 1)), np.array([0])
    assert exact(clusters, z, y, "paper")[0] == pytest.approx(1.5, rel=1e-6)
    for rule in SOUND:
        assert exact(clusters, z, y, rule)[0] == pytest.approx(3.41 / 6.2, rel=1e-6)
    assert int(jnp.argmax(clusters.log_scores(jnp.array([[-0.6]])))) == 2


def test_hard_and_soft_certify_different_classifiers():
    """Squared distances 2, 2 to A and 1.5 to B: the nearest centroid is B's, Eq. 4 says A."""
    centroids = np.array([[[np.sqrt(2.0), 0.0], [-np.sqrt(2.0), 0.0]], [[0.0, np.sqrt(1.5)], [0.0, 50.0]]])
    z = np.zeros((1, 2))
    radii = {(rule, c): exact(make(centroids), z, np.array([c]), rule)[0] for rule in SOUND for c in (0, 1)}
    assert radii["hard", 0] == 0 and radii["hard", 1] > 0
    assert radii["soft", 0] > 0 and radii["soft", 1] == 0
    assert radii["any_d", 0] == radii["any_d", 1] == 0


def test_the_hard_radius_does_not_hold_for_eq_4():
    """The control for `soft` and `any_d`: somewhere inside the hard radius Eq. 4 does flip."""
    rng = np.random.default_rng(0)
    flips = 0
    for _ in range(300):
        centroids = np.float64(np.float32(rng.standard_normal((3, 3, 2))))
        f, mask = centroids[0, 0] + 0.5 * rng.standard_normal(2), np.ones((3, 3), bool)
        r = exact(make(centroids, 1.0, mask), f[None], np.array([0]), "hard")[0]
        if r > 0:
            points = reference.worst_points(f, 0, centroids, mask, 1.0, 0.999 * r)
            flips += not all(reference.predicts(g, 0, centroids, mask, 1.0) for g in points)
    assert flips > 10


def test_radii_are_rounded_down_and_in_float32():
    """The float64 value of Theorem 1 with a constant of 3 is never exceeded, over 200 examples."""
    rng = np.random.default_rng(0)
    centroids = np.float64(np.float32(rng.standard_normal((2, 1, 4))))
    z = centroids[0, 0] + 0.1 * rng.standard_normal((200, 4))
    found = exact(make(centroids), z, np.zeros(200, int), "hard", lipschitz=3.0)
    expected = np.array([reference.theorem_1(f, centroids[0, 0], centroids[1, 0]) / 3.0 for f in z])
    assert found.dtype == np.float32 and found.shape == (200,)
    assert (found <= expected + 1e-15).all() and (found >= np.float32(expected) * (1 - 2e-7)).all()


@pytest.mark.parametrize("rule", certify.RULES)
def test_ties_and_misclassified_examples_get_nothing(rule):
    clusters = make([[[-1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    z = np.array([[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]])
    y = np.array([0, 0, 1])  # a tie, misclassified, two classes at one place
    for rounding in (0.0, 1e-5):
        np.testing.assert_array_equal(
            certify.radius(clusters, z, y, lipschitz=1.0, rule=rule, rounding=rounding),
            np.zeros(3, np.float32),
        )


def test_float_rounding_is_allowed_for():
    """The default radius is smaller than the exact one, by 1e-4 of the features' size at most here."""
    rng = np.random.default_rng(0)
    centroids = 100 + rng.standard_normal((5, 2, 16))
    z, y = centroids[:, 0] + 0.1, np.arange(5)
    for rule in SOUND:
        loose = exact(make(centroids), z, y, rule)
        safe = certify.radius(make(centroids), z, y, lipschitz=1.0, rule=rule)
        size = np.linalg.norm(z, axis=1)
        assert (safe < loose - 1e-5 * size).all() and (safe > loose - 1e-4 * size).all()


def test_missing_clusters_do_not_count():
    """A mask gives what leaving the clusters out gives; whatever stands at their place."""
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((4, 1, 3))
    z, y = centroids[:, 0] + 0.1 * rng.standard_normal((4, 3)), np.arange(4)
    padded = np.concatenate([centroids, np.tile(z[:1, None], (4, 1, 1))], axis=1)
    mask = np.array([[True, False]] * 4)
    for rule in certify.RULES:
        np.testing.assert_allclose(
            exact(make(padded, 1.0, mask), z, y, rule), exact(make(centroids), z, y, rule), rtol=1e-6
        )


def test_a_class_without_clusters_never_wins_and_never_is_certified():
    clusters = make([[[0.0]], [[1.0]], [[0.1]]], mask=[[True], [True], [False]])
    for rule in SOUND:
        found = exact(clusters, np.zeros((2, 1)), np.array([0, 2]), rule)
        np.testing.assert_allclose(found, [0.5, 0.0], rtol=1e-6)


@given(st.integers(0, 10**6), st.sampled_from(SOUND), st.floats(1.01, 5.0))
def test_moving_the_other_centroids_away_never_shrinks_a_radius(seed, rule, factor):
    """From f, along the line through it: every D_jl grows, which is what the radius is made of.

    With one own cluster: with more, G_jl can grow faster than D_jl.
    """
    rng = np.random.default_rng(seed)
    f = rng.standard_normal(3)
    own = f + 0.3 * rng.standard_normal(3)
    others = rng.standard_normal((3, 3)) * 2
    near = make(np.concatenate([own[None, None], others[:, None]]))
    direction = others - own
    far = make(np.concatenate([own[None, None], (own + factor * direction)[:, None]]))
    before, after = (exact(c, f[None], np.array([0]), rule)[0] for c in (near, far))
    assert after >= before * (1 - 1e-5)


@pytest.mark.more
def test_10000_examples_with_200_centroids_take_less_than_2_seconds():
    """CIFAR-100 with two clusters per class and 512-d embeddings; the best of three, for busy machines."""
    rng = np.random.default_rng(0)
    centroids = np.float32(rng.standard_normal((100, 2, 512)))
    y = rng.integers(0, 100, 10_000)
    z = centroids[y, 0] + np.float32(0.5 * rng.standard_normal((10_000, 512)))
    clusters = make(centroids, 10.0)
    for rule in certify.RULES:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            found = certify.radius(clusters, z, y, lipschitz=1.0, rule=rule)
            seconds.append(time.perf_counter() - started)
        assert (found > 0).mean() > 0.9
        assert min(seconds) < 2.0


@pytest.mark.wrong_arrays
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lipschitz": 0.0}, "lipschitz must be a positive"),
        ({"lipschitz": -1.0}, "lipschitz must be a positive"),
        ({"lipschitz": float("nan")}, "lipschitz must be a positive"),
        ({"lipschitz": float("inf")}, "lipschitz must be a positive"),
        ({"lipschitz": np.ones(3)}, "lipschitz must be a positive"),
        ({"rule": "tight"}, "rule must be one of hard, soft, any_d, paper, got 'tight'"),
        ({"z": np.zeros((3, 5))}, r"z must be \[B, E\] with E = 2"),
        ({"y": np.zeros(4, int)}, r"y must be \[B\] with B = 3"),
        ({"y": np.array([0, 1, 2])}, r"y must lie in 0\.\.1"),
        ({"y": np.zeros(3)}, "y must hold integer labels"),
        ({"rounding": -0.1}, "rounding must be a relative error"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, message):
    settings = dict(z=np.zeros((3, 2)), y=np.zeros(3, int), lipschitz=1.0) | changes
    with pytest.raises(UserError, match=message) as caught:
        certify.radius(make([[[0.0, 1.0]], [[1.0, 0.0]]]), settings.pop("z"), settings.pop("y"), **settings)
    assert "\n" not in str(caught.value)


def test_the_constant_has_no_default():
    with pytest.raises(TypeError, match="lipschitz"):
        certify.radius(make([[[0.0]], [[1.0]]]), np.zeros((1, 1)), np.array([0]))  # pyright: ignore


def test_certified_accuracy_counts_what_is_certified_beyond_r():
    np.testing.assert_allclose(
        certify.accuracy(np.float32([0, 0.125, 0.25, 0.5]), np.array([0, 0.25, 0.375])), [0.75, 0.25, 0.25]
    )


# Attacks on a network where the radius is tight: features z = A x with A a multiple of an isometry.


@pytest.fixture(scope="module")
def linear():
    """Inputs, labels, logits and radii of a nearest-centroid classifier on z = 3 Q x, Q orthogonal."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    matrix = jnp.asarray(3 * q, jnp.float32)
    centroids = rng.standard_normal((5, 1, 6)) * 2
    clusters = make(centroids, 0.5)
    y = np.arange(60) % 5
    z = centroids[y, 0] + 0.4 * rng.standard_normal((60, 6))
    x = jnp.asarray(np.linalg.solve(3 * q, z.T).T, jnp.float32)
    radii = {rule: certify.radius(clusters, x @ matrix.T, y, lipschitz=3.0, rule=rule) for rule in SOUND}
    return x, jnp.asarray(y), lambda x: clusters.log_scores(x @ matrix.T), radii


def attacked(linear, rule, factor):
    """Which examples l2-PGD fools at `factor` x their radius, towards one class after the other.

    PGD has one eps for all: it moves u in the unit ball, and x + r u goes into the network.
    """
    x, y, logits, radii = linear
    known = radii[rule] > 0
    x, y, r = x[known], y[known], jnp.asarray(radii[rule][known] * factor)

    def scaled(x, r, u):
        return logits(x + r[:, None] * u)

    def of_one(target, x, r, y):
        """Each example is a model of its own, which moves about it."""

        def towards(z, y):
            return z[:, target] - jnp.take_along_axis(z, y[:, None], axis=1)[:, 0]

        model = Partial(scaled, x[None], r[None])
        u = attacks.pgd(
            jax.random.key(target), model, jnp.zeros((1, 6)), y[None], eps=1.0, step_size=0.25, steps=20,
            norm="l2", bounds=None, loss_fn=towards,
        )  # fmt: skip
        return jnp.argmax(model(u)[0]) != y

    found = [jax.jit(jax.vmap(functools.partial(of_one, target)))(x, r, y) for target in range(5)]
    return np.any(found, axis=0)


@pytest.mark.more
def test_l2_pgd_inside_the_radius_never_succeeds_and_beyond_it_does(linear):
    """0.999 of the radius: no success; 1.5 x: always, since the map is a multiple of an isometry (tight)."""
    inside, beyond = attacked(linear, "any_d", 0.999), attacked(linear, "any_d", 1.5)
    assert len(inside) > 40 and not inside.any()
    assert beyond.all()


def test_the_nearest_centroid_s_radius_does_not_hold_for_eq_4():
    """Why `hard` is no certificate of a head with K = 2: inside its radius all clusters decide otherwise."""
    heads = make(np.array([[[0.0, 1.0], [0.0, -1.0]], [[1.55, 0.0], [60.0, 0.0]]]))
    z, y = np.array([[0.9, 0.0]], np.float32), np.array([1])
    radii = {rule: certify.radius(heads, z, y, lipschitz=1.0, rule=rule)[0] for rule in SOUND}
    assert np.argmax(heads.log_scores(z), axis=1) == y and radii["hard"] > 0.1
    moved = z - np.array([[0.1, 0.0]], np.float32)
    assert np.argmax(heads.log_scores(moved), axis=1) != y and radii["soft"] < 0.1 and radii["any_d"] < 0.1
    assert "hard" not in certify.sound_rules(2, 0) and "hard" in certify.sound_rules(1, 0)


@pytest.mark.parametrize("variance", [1.0, 1e6])
def test_rounding_of_the_sum_over_clusters(variance, rng):
    """With a large variance all log scores are near log K, where float32 cannot tell classes apart."""
    centroids = rng.normal(size=(3, 2, 4)).astype(np.float32)
    clusters = Clusters(jnp.asarray(centroids), jnp.float32(variance))
    z = rng.normal(size=(20_000, 4)).astype(np.float32)
    squared = np.square(z[:, None, None].astype(np.float64) - centroids).sum(axis=-1)
    y = np.exp(-squared / 2 / variance).sum(axis=-1).argmax(axis=1)
    predicted = np.asarray(clusters.log_scores(z)).argmax(axis=1)
    radii = certify.radius(clusters, z, y, lipschitz=1.0, rule="soft")
    assert (radii > 0).any() and not (radii[predicted != y] > 0).any()
    if variance > 1:  # without the allowance some would be certified
        assert (predicted != y).any()
        assert (
            certify.radius(clusters, z, y, lipschitz=1.0, rule="soft", rounding=0.0)[predicted != y] > 0
        ).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_features_need_an_allowance_of_their_own(dtype):
    """The default is float32's; what such features are off by nobody has told."""
    head = make([[[0.0, 0.0]], [[4.0, 0.0]]])
    z, y = jnp.array([[0.5, 0.0]], dtype), np.array([0])
    with pytest.raises(UserError, match="last place of"):
        certify.radius(head, z, y, lipschitz=1.0)
    exactly = certify.radius(head, z, y, lipschitz=1.0, rounding=0.0)
    allowed = certify.radius(head, z, y, lipschitz=1.0, rounding=0.02)
    assert 1.4999 < exactly <= 1.5 and 0 < allowed < exactly
