"""Certified l2 radii of the cluster head: how far an input can move before the prediction can change.

    r = certify.radius(clf.clusters, clf.embed(x), y, lipschitz=bound)      # [B], pixels in [0, 1]

Statements and proofs are in docs/certificates.md. Everything here is float64 NumPy; only the result is
float32, rounded down. Notation: j runs over the clusters of the own class, l over those of the others,
u = -|f - mu|^2 / 2 sigma^2, D_jl = u_j - u_l, G_jl = |mu_j - mu_l| / sigma^2. A shift of the features
by rho lowers D_jl by at most rho G_jl.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clustr_jax.clusters import Clusters
from clustr_jax.runtime import arrays
from clustr_jax.runtime.errors import UserError

# rule -> what it certifies
RULES = {
    "hard": "the nearest centroid decides (D = 1)",
    "soft": "all clusters decide (Eq. 4)",
    "any_d": "hard, soft, and every rule of the D nearest clusters at once",
    "paper": "NOT SOUND for more than two centroids: Theorem 1 between the two closest ones",
}
SOUND = ("hard", "soft", "any_d")
_UNIT = 2.0**-24  # rounding of a float32 number near 1
# Examples per block: B x clusters distances are held at once.
_BLOCK = 1000
# Halvings of an interval that is at most log(K) / G wide: far below float32 resolution.
_BISECTIONS = 30


def sound_rules(k: int, nearest: int) -> tuple[str, ...]:
    """The rules whose radii hold for K clusters per class of which the D = `nearest` are deployed.

    They must hold for its log scores too, which are Eq. 4 with all clusters. With K = 1 every rule decides by
    the nearest centroid. Otherwise `hard` is about another rule than any that is asked here, and `soft` about
    another than the one deployed, unless that is Eq. 4 with all.

    Args:
        k: clusters of each class.
        nearest: D; 0 for all.

    Returns:
        names of RULES.

    >>> certify.sound_rules(1, 20), certify.sound_rules(2, 0), certify.sound_rules(2, 20)
    (('hard', 'soft', 'any_d'), ('soft', 'any_d'), ('any_d',))
    """
    if k == 1:
        return SOUND
    return ("any_d",) if nearest else ("soft", "any_d")


def radius(
    clusters: Clusters,
    z: Float[np.ndarray, "B E"],
    y: Int[np.ndarray, "B"],
    *,
    lipschitz: float,
    rule: str = "any_d",
    rounding: float = 1e-5,
) -> Float[np.ndarray, "B"]:
    """l2 radius (units of x) within which every input is still classified as y; 0 where none is certain.

    Ties and misclassified examples get 0. Radii are rounded down. Proofs: docs/certificates.md.

    Args:
        clusters: the head.
        z: embeddings f(x) [B, E].
        y: labels [B].
        lipschitz: upper bound of |f(x) - f(x')| / |x - x'| in l2 (see `clustr_jax.lipschitz`); it has no
            default.
        rule: which classifier is certified (RULES); "paper" is kept for comparison and is not sound.
        rounding: allows for float32. Features are taken to be off by `rounding` x the largest norm of a
            feature or centroid, squared distances by that share of themselves, and sums over clusters by some
            units in the last place of 1; 0 certifies exact arithmetic. Features of float16 or bfloat16 need
            more than the default.

    Returns:
        radii [B], float32.

    Raises:
        UserError: for a bound that is not positive and finite, an unknown rule, and shapes that do not fit.

    >>> c = Clusters(jnp.array([[[0.0, 0.0]], [[4.0, 0.0]]]), jnp.float32(1.0))  # bisector at z_0 = 2
    >>> z, y = np.array([[0.5, 0.0], [1.0, 7.0], [3.0, 0.0]]), np.array([0, 0, 0])
    >>> print(certify.radius(c, z, y, lipschitz=2.0))  # distance to it / 2; the last is misclassified
    [0.75 0.5  0.  ]
    """
    centroids, variance, valid, z, y = _checked(clusters, z, y, lipschitz, rule, rounding)
    slope = _distances(centroids) / variance
    rho = np.zeros(len(z))
    for i in range(0, len(z), _BLOCK):
        block = slice(i, i + _BLOCK)
        pairs = _pairs(centroids, variance, valid, slope, z[block], y[block], rounding)
        rho[block] = _RULE_FUNCTIONS[rule](pairs)
    largest = np.sqrt(np.sum(np.where(valid[..., None], centroids, 0.0) ** 2, axis=-1)).max(initial=0.0)
    error = rounding * np.maximum(np.linalg.norm(z, axis=1), largest)
    # both f(x) as computed here and f(x') as computed later may be off
    return _round_down(np.fmax(rho - 2 * error, 0.0) / lipschitz)  # fmax: 0 for NaN


def accuracy(radii: Float[np.ndarray, "B"], r: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
    """Certified accuracy at each radius: the fraction of examples certified beyond it (r = 0: at all).

    Args:
        radii: [B], of `radius`.
        r: [R], in the same units.

    Returns:
        fractions [R].

    Raises:
        UserError: for negative radii and for NaN.

    >>> print(certify.accuracy(np.array([0.0, 0.1, 0.3, 0.4]), np.array([0.0, 0.2, 0.3])))
    [0.75 0.5  0.25]
    """
    radii = _radii(radii, "radii", "B", empty=False)
    return np.mean(radii[None, :] > _radii(r, "r", "R", empty=True)[:, None], axis=1)


def _radii(values, name, axis, *, empty):
    """float64 [.], none negative or NaN (inf: there is no other class); UserError otherwise."""
    values = np.asarray(arrays.as_array(values, name), np.float64)
    arrays.check_shape(values, name, axis, {}, empty=empty)
    if not (values >= 0).all():
        raise UserError(f"{name} must be radii, 0 or more, got {values[~(values >= 0)][0]:.4g}")
    return values


class _Pairs(NamedTuple):
    """Own clusters (axis 1) against all clusters (axes 2, 3), for a block of examples.

    Entries of missing clusters and of the own class as "other" are set so that they never decide:
    difference +inf against a missing other, -inf for a missing own cluster.
    """

    difference: np.ndarray  # D_jl [B, K, Y, K]
    slope: np.ndarray  # G_jl [B, K, Y, K]
    squared: np.ndarray  # |f - mu|^2 / 2 sigma^2 [B, Y, K], inf where missing
    y: np.ndarray  # [B]


def _distances(centroids):
    """|mu_j - mu_l| of all pairs [Y, K, Y, K]."""
    num_classes, k, dimension = centroids.shape
    flat = centroids.reshape(-1, dimension)
    rows = [np.linalg.norm(flat - point, axis=1) for point in flat]
    return np.stack(rows).reshape(num_classes, k, num_classes, k)


def _pairs(centroids, variance, valid, slope, z, y, rounding) -> _Pairs:
    num_classes, k, dimension = centroids.shape
    flat = centroids.reshape(-1, dimension)
    # float64: the expanded square keeps more digits than a float32 difference has. Centred on the
    # centroids' mean, so that a common offset costs none.
    centre = flat[valid.reshape(-1)].mean(axis=0) if valid.any() else 0.0
    a, b = z - centre, np.where(valid.reshape(-1, 1), flat - centre, 0.0)
    squared = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)[None, :] - 2 * a @ b.T
    squared = np.maximum(squared, 0.0).reshape(-1, num_classes, k) / (2 * variance)
    index = np.arange(len(z))
    own = squared[index, y][:, :, None, None]
    difference = (1 - rounding) * squared[:, None] - (1 + rounding) * own
    if rounding and k > 1:  # log scores near log K, whose digits are not those of the distances
        difference = difference - 8 * _UNIT * (1 + math.log(k))
    other = valid[None] & (np.arange(num_classes)[None, :] != y[:, None])[:, :, None]
    difference = np.where(other[:, None], difference, np.inf)
    difference = np.where(valid[y][:, :, None, None], difference, -np.inf)
    return _Pairs(difference, slope[y], np.where(valid[None], squared, np.inf), y)


def _distance(pairs):
    """D / G: signed feature distance of f to the bisector of each pair, -inf where they coincide."""
    with np.errstate(divide="ignore", invalid="ignore"):
        m = np.where(np.isinf(pairs.difference), pairs.difference, pairs.difference / pairs.slope)
    # centroids of two classes at one place: neither is ever strictly nearer
    return np.where((pairs.slope > 0) | np.isinf(pairs.difference), m, -np.inf)


def _hard(pairs):
    """min over other clusters of max over own clusters of the distance to their bisector."""
    return _positive(np.min(np.max(_distance(pairs), axis=1), axis=(1, 2)))


def _paper(pairs):
    """Theorem 1 for the nearest own centroid and the other class's centroid nearest *in distance*."""
    index = np.arange(len(pairs.y))
    own = np.argmin(pairs.squared[index, pairs.y], axis=1)
    others = pairs.squared.copy()
    others[index, pairs.y] = np.inf
    rival = np.argmin(others.reshape(len(index), -1), axis=1)
    m = _distance(pairs).reshape(len(index), others.shape[2], -1)
    return _positive(m[index, own, rival])


def _positive(rho):
    """0 where the example is not strictly correct; inf stays where there is no other cluster at all."""
    return np.where(rho > 0, rho, 0.0)


def _any_d(pairs):
    """sup{rho: for every other class, sum over its clusters of min_j exp(-D_jl + rho G_jl) < 1}."""
    return _smallest_root(pairs, lambda a: np.max(a, axis=0), slack=0.0)


def _soft(pairs):
    """sup{rho: for every other class, sum over its clusters of 1 / sum_j exp(D_jl - rho G_jl) < 1}."""
    k = pairs.difference.shape[1]
    return _smallest_root(pairs, _logsumexp, slack=math.log(k))


def _smallest_root(pairs, lead, slack):
    """min over classes c of sup{rho >= 0: logsumexp_{l in c}(-lead_l(rho)) < 0}, 0 where rho = 0 fails.

    lead_l(rho) is `lead` of the D_jl - rho G_jl over j; it lies between the largest of them and that plus
    `slack`. So the root of a class of K clusters lies between min_l max_j (D_jl - log K) / G_jl and min_l
    max_j (D_jl + slack) / G_jl. Only classes whose bracket reaches below every other's end are bisected. The
    lower end is returned.
    """
    k = pairs.difference.shape[1]

    def bracket(shift):
        shifted = pairs._replace(difference=pairs.difference + shift)
        return np.min(np.max(_distance(shifted), axis=1), axis=2)  # [B, Y]

    low, high = np.maximum(bracket(-math.log(k)), 0.0), bracket(slack)
    end = np.min(high, axis=1)
    rho = np.where(end > 0, end, 0.0)
    finite = np.isfinite(end) & (end > 0)
    rows, classes = np.nonzero((low <= end[:, None]) & np.isfinite(high) & finite[:, None])
    # [K own, K others, P]: sums over the short axes come first
    d = np.moveaxis(pairs.difference[rows, :, classes], 0, 2).copy()
    g = np.moveaxis(pairs.slope[rows, :, classes], 0, 2).copy()
    low, high = low[rows, classes], end[rows]

    def holds(rho):
        return _logsumexp(-lead(d - rho * g)) < 0

    low = np.where(holds(low), low, 0.0)  # the bracket is exact up to rounding: check it
    correct = holds(np.zeros(len(rows)))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = holds(middle)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    np.minimum.at(rho, rows, np.where(correct, low, 0.0))
    return rho


def _logsumexp(a):
    """Over the first axis; -inf entries count nothing."""
    top = np.max(a, axis=0)
    finite = np.isfinite(top)
    total = np.sum(np.exp(a - np.where(finite, top, 0.0)), axis=0, where=finite, initial=0.0)
    return top + np.log(np.where(finite, total, 1.0))


_RULE_FUNCTIONS = {"hard": _hard, "soft": _soft, "any_d": _any_d, "paper": _paper}


def _round_down(r):
    """float64 -> float32, never above."""
    rounded = r.astype(np.float32)
    return np.where(rounded > r, np.nextafter(rounded, np.float32(-np.inf)), rounded).astype(np.float32)


def _checked(clusters, z, y, lipschitz, rule, rounding):
    """Everything in float64, or a UserError that says what does not fit."""
    if rule not in RULES:
        raise UserError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    arrays.positive(lipschitz, "lipschitz", "a positive, finite upper bound")
    arrays.number(rounding, "rounding", "a relative error in [0, 1)", lambda v: 0 <= v < 1)
    for given in (clusters.centroids, clusters.variance, clusters.mask, z, y, lipschitz, rounding):
        if not arrays.concrete(given):
            raise UserError("certify.radius is NumPy and does not run inside jit; call it outside")
    fields = clusters._checked()
    centroids, variance = np.asarray(fields["centroids"], np.float64), float(fields["variance"])
    valid = np.asarray(clusters.valid, bool)
    num_classes, _, dimension = centroids.shape
    sizes = {"E": dimension}
    unit, given = arrays.unit(z), getattr(z, "dtype", None)
    z = np.asarray(arrays.floats(z, "z", "B E", sizes, empty=True, double=True), np.float64)
    if 0 < rounding < unit:
        raise UserError(
            f"z is {given}, with a last place of {unit:.1g}, and rounding={rounding:g} is of "
            f"float32; compute the features in float32, or give the rounding= that they have"
        )
    y = np.asarray(arrays.labels(y, num_classes, sizes))
    return centroids, variance, valid, z, y
