"""The checks that look at the model themselves, on a few hundred of its images, and at the machine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from clustr_jax import losses
from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.geometry import l2_norm, projected_step, start_in_ball
from clustr_jax.attacks.input_checks import diagnose
from clustr_jax.attacks.pgd import as_partial, pgd
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation import intervals
from clustr_jax.evaluation.sound_protocol import attack_on
from clustr_jax.runtime import canary
from clustr_jax.settings import EvalSettings
from clustr_jax.storage import loading

PASS, WARN, FAIL, SKIP = "PASS", "WARN", "FAIL", "SKIP"
# Test images that the checks look at themselves; the rest is read off the sound result.
IMAGES, FEW = 256, 32
# Points of accuracy by which a stronger or a blind attack may differ: half a point, or one image.
POINTS = 0.005
_DRAWS = 50
_SLOPE = 0.01  # relative error of a derivative in float64, where differences of 1e-6 are good to about 1e-8
_SCALES = (1e-3, 1e-2, 1e-1, 1e1, 1e2, 1e3)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the verdict: `value` is the number that was compared with `limit`."""

    number: int
    name: str
    status: str
    value: float | None
    limit: str
    note: str = ""


def at_most(limit: float) -> str:
    """A limit as it is compared."""
    return f"<= {100 * limit:.2g} points"


def status_of(good: bool, otherwise: str = FAIL) -> str:
    """PASS, or what it is otherwise."""
    return PASS if good else otherwise


class Probe:
    """The checks that look at the model itself, on a few hundred images that it classifies correctly.

    `robust` says which of them the sound protocol left: another attack that breaks more of those than
    `slack` shows that the protocol's figure is too high.
    """

    def __init__(self, key, clf, examples, settings: EvalSettings, robust):
        self.key, self.clf, self.examples, self.settings = key, clf, examples, settings.attack
        self.eps, self.n = settings.attack.eps, max(len(examples), 1)
        self.slack = max(POINTS, 1.0 / self.n)
        self.robust, self.slots = robust, settings.slots
        self.before = loading.digest(clf)

    def _right(self, x_adv):
        return ~scheduler.misjudged(as_partial(self.clf.view), x_adv, self.examples.y)

    def _accuracy(self, x_adv) -> float:
        return intervals.fraction(self._right(x_adv))

    def _gain(self, x_adv) -> float:
        """Share of the images that only this attack breaks, and not the sound protocol."""
        return intervals.fraction(self.robust & ~self._right(x_adv))

    def _pgd(self, *, steps, step_size=None, restarts=1, scale=1.0) -> scheduler.Outcome:
        """Margin PGD with the program that the sound protocol has compiled, at `scale` x the radius."""
        step_size = scale * (self.settings.step_size if step_size is None else step_size)
        attack = attack_on(self.clf, "margin", eps=scale * self.eps, steps=steps, step_size=step_size)
        return scheduler.run(
            attack, self.key, as_partial(self.clf.view), self.examples.x, self.examples.y,
            ids=self.examples.ids, restarts=restarts, slots=self.slots,
        )  # fmt: skip

    def outputs(self):
        """2, 3: the same every time, for every batch size, and in the log domain."""
        x = self.examples.x[:64]
        logits = np.asarray(self.clf.logits(x))
        scale = max(float(np.max(np.abs(logits), initial=0.0)), 1e-12)
        others = [np.asarray(self.clf.logits(x)) for _ in range(4)]
        for size in (1, 7):
            others.append(np.concatenate([self.clf.logits(x[i : i + size]) for i in range(0, len(x), size)]))
        worst = max(float(np.max(np.abs(o - logits), initial=0.0)) for o in others) / scale
        same = all((o.argmax(1) == logits.argmax(1)).all() for o in others)
        yield Check(
            2, "deterministic, whatever the batch", status_of(same and worst <= 1e-4), worst, "<= 1e-4"
        )
        problem, text = diagnose(logits)
        spread = float(np.ptp(logits)) if logits.size else 0.0
        status = FAIL if problem else status_of(not text and spread > 1, WARN)
        yield Check(3, "range of the outputs", status, spread, "> 1", text)

    def gradients(self):
        """4, 7b: no vanishing gradients on the way, and a loss that has stopped rising."""
        share = {}
        for name, loss in (("margin", attack_losses.margin), ("ce", attack_losses.cross_entropy)):
            zero, values = _trace(
                self.key, as_partial(self.clf.view), self.examples, self.settings, loss, self.clf
            )
            share[name] = float(np.max(zero))
            if name == "margin":
                tail = values[-1] - values[max(len(values) - 10, 0)]
                rise = float(tail / max(abs(values[-1] - values[0]), 1e-12))
        yield Check(
            4, "zero or non-finite gradients (margin)",
            FAIL if share["margin"] > 0.01 else status_of(share["ce"] <= 0.01, WARN),
            share["margin"], "<= 1 %",
            f"log cross entropy: {100 * share['ce']:.1f} %",
        )  # fmt: skip
        yield Check(
            7, "the adversarial loss has converged", status_of(rise <= 0.05, WARN), rise, "<= 5 % of it"
        )

    def precision(self):
        """5: float32 gradients against float64, and against finite differences."""
        few = self.examples.take(slice(0, FEW))
        agreement, error = precision(self.clf, few)
        yield Check(
            5, "float32 gradient signs as in float64", status_of(agreement >= 0.99 and error <= _SLOPE),
            agreement, ">= 99 %", f"derivative off by {error:.1e}; <= {_SLOPE:g}",
        )  # fmt: skip

    def scales(self):
        """6: cross entropy with scaled logits breaks nothing that the sound protocol left."""
        attacked = [
            pgd(
                self.key, Partial(_scaled, jnp.float32(scale), self.clf), self.examples.x, self.examples.y,
                eps=self.eps, step_size=self.settings.step_size, steps=20, bounds=self.clf.bounds,
                ids=self.examples.ids,
            )
            for scale in (*_SCALES, 1.0)
        ]  # fmt: skip
        gain, found = max(map(self._gain, attacked)), [self._accuracy(x_adv) for x_adv in attacked]
        spread = max(found) - min(found)
        yield Check(
            6, "logits x 1e-3 ... 1e3 break more",
            FAIL if gain > max(0.02, self.slack) else status_of(spread <= 0.02, WARN), gain,
            at_most(max(0.02, self.slack)),
            f"cross entropy alone varies by {100 * spread:.1f} points",
        )  # fmt: skip

    def effort(self):
        """1, 7, 8, 10, 20: in the ball, more steps or a larger one break more, nothing changed by looking."""
        steps = self.settings.steps
        outcome = self._pgd(steps=steps)
        delta = float(np.max(np.abs(outcome.x_adv - self.examples.x), initial=0.0))
        inside = delta <= self.eps + 1e-6 and bool(np.isfinite(outcome.x_adv).all())
        excess = max(delta - self.eps, 0.0)
        yield Check(1, "threat model: |delta| beyond eps, finite", status_of(inside), excess, "<= 1e-6")
        one = self._accuracy(self._pgd(steps=1, step_size=1.25 * self.eps).x_adv)
        many, gain = self._accuracy(outcome.x_adv), self._gain(self._pgd(steps=2 * steps).x_adv)
        good = one >= many - self.slack and gain <= self.slack
        yield Check(
            7, "twice the steps break more, or one step does", status_of(good), gain, at_most(self.slack),
            f"one step {100 * one:.1f} %, {steps} steps {100 * many:.1f} %",
        )  # fmt: skip
        silent = intervals.fraction(outcome.unconfirmed & ~outcome.broken)
        yield Check(8, "silent successes", status_of(silent <= self.slack), silent, at_most(self.slack))
        # Each radius from scratch: the curve of the result goes on with what smaller radii left.
        smaller, larger = (self._accuracy(self._pgd(steps=steps, scale=s).x_adv) for s in (0.5, 2.0))
        rise = max(many - smaller, larger - many)
        yield Check(
            10, "accuracy rises with eps", status_of(rise <= self.slack), rise, at_most(self.slack),
            f"eps x 0.5, 1, 2: {100 * smaller:.1f}, {100 * many:.1f}, {100 * larger:.1f} %",
        )  # fmt: skip
        changed = float(loading.digest(self.clf) != self.before)
        yield Check(20, "evaluation changed the statistics", status_of(not changed), changed, "0")

    def black_box(self):
        """12b: many random points find nothing that gradients do not."""
        gain = self._gain(self._pgd(steps=1, step_size=0.0, restarts=_DRAWS).x_adv)
        yield Check(
            12, f"{_DRAWS} random points break more", status_of(gain <= self.slack), gain, at_most(self.slack)
        )


def _scaled(scale, clf, x):
    return scale * clf.logits(x)


@functools.partial(jax.jit, static_argnames=("steps", "bounds"))
def _path(key, model, loss, x, y, ids, eps, step_size, steps, bounds):
    """Along PGD without stopping: [steps] shares of useless gradients, and [steps] mean losses."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), 0))(ids)
    ball = {"eps": eps, "norm": "linf", "bounds": bounds}
    z = start_in_ball(keys, x, start="uniform", **ball)

    def step(z, _):
        def total(z):
            value = loss(model(z), y, y)
            return jnp.sum(value), value

        gradient, value = jax.grad(total, has_aux=True)(z)
        size = jnp.max(jnp.abs(gradient), axis=tuple(range(1, z.ndim)))
        useless = jnp.mean(~(jnp.isfinite(size) & (size > 0)))
        moved = projected_step(z, gradient, x, step_size=step_size, **ball)
        return moved, (useless, jnp.mean(value))

    return jax.lax.scan(step, z, None, length=steps)[1]


def _trace(key, model, examples, settings, loss, clf):
    chosen = attack_losses.among(loss, (attack_losses.margin, attack_losses.cross_entropy))
    return jax.device_get(_path(
        key, model, chosen, examples.x, examples.y, examples.ids, jnp.float32(settings.eps),
        jnp.float32(settings.step_size), steps=settings.steps, bounds=clf.bounds,
    ))  # fmt: skip


def precision(clf, examples) -> tuple[float, float]:
    """Of the margin: (share of gradient signs that float32 and float64 agree on, error of a derivative).

    The error is that of the float64 derivative along each image's own gradient against a central
    difference, relative to it: the median over the images, for some have a kink in between.
    """

    def total(clf, x, y):
        with jax.default_matmul_precision("highest"):  # as the Classifier's methods, which are float32 only
            z = clf.net.eval(clf.variables, x)
            logits = z.logits if clf.clusters is None else clf.clusters.log_scores(z.embeddings)
            values = losses.margin(logits, y)
            return jnp.sum(values), values

    single = np.asarray(jax.jit(jax.grad(total, 1, has_aux=True))(clf, examples.x, examples.y)[0], np.float64)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, clf
        )
        x, y = jnp.asarray(examples.x, jnp.float64), jnp.asarray(examples.y)
        compiled = jax.jit(jax.value_and_grad(total, 1, has_aux=True))
        double = np.asarray(compiled(wide, x, y)[1])
        norm = np.asarray(l2_norm(double))
        direction = double / np.maximum(norm, 1e-300)
        step = 1e-6
        ahead, behind = (np.asarray(compiled(wide, x + s * direction, y)[0][1]) for s in (step, -step))
    slope, difference = norm.reshape(-1), (ahead - behind) / (2 * step)
    seen = (double != 0) & np.isfinite(single)
    agreement = float(np.mean(np.sign(single[seen]) == np.sign(double[seen]))) if seen.any() else 0.0
    return agreement, float(np.median(np.abs(slope - difference) / np.maximum(np.abs(difference), 1e-12)))


def toy(key) -> Check:
    """17: nearest centroid on linear features, where the answer is known: the attack has to find it."""
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(5, 1, 12)).astype(np.float32)
    y = np.arange(100) % 5
    x = (mu[y, 0] + 0.4 * rng.normal(size=(100, 12))).astype(np.float32)
    eps = 0.6
    gaps = mu[y, 0][:, None] - mu[None, :, 0]
    margins = np.sum(gaps * (x[:, None] - (mu[y, 0][:, None] + mu[None, :, 0]) / 2), axis=2)
    margins = np.where(np.arange(5)[None] == y[:, None], np.inf, margins - eps * np.abs(gaps).sum(axis=2))
    exact = margins.min(axis=1) > 0
    model = Partial(_nearest_centroid, Clusters(jnp.asarray(mu), jnp.float32(1.0)))
    attack = PGD(
        eps=jnp.float32(eps), steps=20, norm="linf", bounds=None, step_size=jnp.float32(eps / 4),
        loss=attack_losses.one(attack_losses.margin_targeted),
    )  # fmt: skip
    targets = np.stack([(y + k) % 5 for k in range(1, 5)]).astype(np.int32)
    outcome = scheduler.run(attack, key, model, x, y, targets=targets)
    wrong = int(np.sum(outcome.broken == exact))
    return Check(17, "known answer (linear features): mistakes", status_of(wrong == 0), wrong, "0 of 100")


def compiler() -> Check:
    """21: the compiler computes right numbers; a wrong one has ended the program before this."""
    answer = canary.check()
    note = f"{answer.programs} programs of {answer.patterns} kinds against NumPy in float64"
    limit = f"<= {canary.TOLERANCE:g}"
    return Check(21, "error of programs whose answers are known", PASS, answer.worst, limit, note)


def _nearest_centroid(clusters, x):
    return clusters.log_scores(x)
