"""The checks that look at the model themselves, on a few hundred of its images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool

from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.geometry import on_sphere, project, projected_step, start_in_ball
from clustr_jax.attacks.input_checks import diagnose
from clustr_jax.attacks.models import wrap
from clustr_jax.attacks.pgd import run_pgd
from clustr_jax.classifier import Classifier
from clustr_jax.data import Examples
from clustr_jax.evaluation import intervals, scores, slopes
from clustr_jax.evaluation.check import FAIL, SKIP, WARN, Check, Measure, at_most, decided, status_of
from clustr_jax.evaluation.plans import attack_on
from clustr_jax.evaluation.precision import SLOPE, Closed, precision
from clustr_jax.evaluation.subject import Subject, of
from clustr_jax.runtime import rounding, streams
from clustr_jax.runtime.errors import UserError, first_line
from clustr_jax.settings import EvalSettings

# Test images that the checks look at themselves; the rest is read off the sound result.
IMAGES, FEW = 256, 32
# Points of accuracy by which a stronger or a blind attack may differ: half a point, or one image.
POINTS = 0.005
_DRAWS = 50
_SCALES = (1e-3, 1e-2, 1e-1, 1e1, 1e2, 1e3)
# Median margins: below, exponentials of all classes are alike; above, those of all but one are 0.
_MARGINS = (1e-2, 1e3)
# Share of images whose label's score, or its rival's, may stand still: an attack sees half of the margin.
_BLIND = 0.1
# A change that no honest network minds: this part of the radius, and what it may cost.
_NUDGE, _NUDGED = 8, 0.05


class Probe:
    """The checks that look at the model itself, on a few hundred images that it classifies correctly.

    `robust` says which of them the sound protocol left: another attack that breaks more of those than
    `slack` shows that the protocol's figure is too high.
    """

    def __init__(
        self,
        key: Array,
        what: Subject | Classifier,
        examples: Examples,
        settings: EvalSettings,
        robust: Bool[np.ndarray, "N"],
    ):
        self.key, self.subject, self.examples, self.settings = key, of(what), examples, settings.attack
        self.eps, self.n = settings.attack.eps, max(len(examples), 1)
        self.slack = max(POINTS, 1.0 / self.n)
        self.robust, self.slots = robust, settings.slots
        self.before = self.subject.digest()

    def _pieces(self):
        """Places of the images, `slots` at a time (the last piece is filled up), and how many are new."""
        for start in range(0, len(self.examples), self.slots):
            index = np.arange(start, min(start + self.slots, len(self.examples)))
            yield np.resize(index, self.slots), len(index)

    def _right(self, x_adv):
        wrong = [
            scheduler.misjudged(self.subject.model, x_adv[index], self.examples.y[index], count)
            for index, count in self._pieces()
        ]
        return ~np.concatenate(wrong)

    def _accuracy(self, x_adv) -> float:
        return intervals.fraction(self._right(x_adv))

    def _gain(self, x_adv) -> float:
        """Share of the images that only this attack breaks, and not the sound protocol."""
        return intervals.fraction(self.robust & ~self._right(x_adv))

    def _pgd(self, *, steps, step_size=None, restarts=1, scale=1.0) -> scheduler.Outcome:
        """Margin PGD with the program that the sound protocol has compiled, at `scale` x the radius."""
        step_size = scale * (self.settings.step_size if step_size is None else step_size)
        attack = attack_on(self.subject, "margin", eps=scale * self.eps, steps=steps, step_size=step_size)
        return scheduler.run(
            attack, self.key, self.subject.model, self.examples.x, self.examples.y, ids=self.examples.ids,
            restarts=restarts, slots=self.slots,
        )  # fmt: skip

    def outputs(self):
        """2, 3, 26: the same every time, for every batch size, in the log domain, and of a sane size."""
        x = self.examples.x[:64]
        logits = np.asarray(self.subject.logits(x))
        scale = scores.scale(logits)
        others = [np.asarray(self.subject.logits(x)) for _ in range(4)]
        for size in (1, 7):
            parts = [self.subject.logits(x[i : i + size]) for i in range(0, len(x), size)]
            others.append(np.concatenate(parts))
        traced = np.asarray(_traced(self.subject.model, x))  # what every attack sees
        others.append(traced)
        worst = max(float(np.max(np.abs(o - logits), initial=0.0)) for o in others) / scale
        changed = int(np.sum(np.any([o.argmax(1) != logits.argmax(1) for o in others], axis=0)))
        yield decided(
            2,
            "the same logits every time, whatever the batch, and in a program",
            Measure(worst, worst <= 1e-4, "<= 1e-4", "of the spread of the two best logits"),
            Measure(changed, not changed, "0", "images whose predicted class changes"),
        )
        problem, text = diagnose(logits)
        spread = float(np.ptp(logits)) if logits.size else 0.0
        told = [Measure(None, False, "logits", text, FAIL if problem else WARN)] if text else []
        yield decided(
            3, "outputs are logits: their range", *told, Measure(spread, spread > 1, "> 1", "", WARN)
        )
        size = (
            float(np.median(np.abs(scores.margins(logits, self.examples.y[: len(x)]))))
            if logits.size
            else 0.0
        )
        low, high = _MARGINS
        yield Check(
            26, "margins are of a size that float32 losses can see", status_of(low <= size <= high), size,
            f"{low:g} to {high:g}", "median clean margin",
        )  # fmt: skip

    def gradients(self):
        """4, 22, 28: no vanishing gradients, of either side of the margin; a loss that has stopped rising."""
        share = {}
        for name, loss in (("margin", attack_losses.margin), ("ce", attack_losses.cross_entropy)):
            zero, values = self._trace(loss)
            share[name] = float(np.max(zero))
            if name == "margin":
                tail = values[-1] - values[max(len(values) - 10, 0)]
                rise = float(tail / max(abs(values[-1] - values[0]), 1e-12))
        limit = "<= 1 % of images"
        yield decided(
            4,
            "gradients are neither zero nor infinite",
            Measure(share["margin"], share["margin"] <= 0.01, limit, "of the margin"),
            Measure(share["ce"], share["ce"] <= 0.01, limit, "of the cross entropy of the logits", WARN),
        )
        yield Check(
            22,
            "the adversarial loss has converged: its last rise",
            status_of(rise <= 0.05, WARN),
            rise,
            "<= 5 % of the whole rise",
        )
        found = [
            [
                np.asarray(a)[:count]
                for a in _sides(self.subject.model, self.examples.x[i], self.examples.y[i])
            ]
            for i, count in self._pieces()
        ]
        *useless, rivals, logits = (np.concatenate(parts) for parts in zip(*found, strict=True))
        # a score that is the same of all images, of a reference class say, has no gradient to hide
        moves = np.ptp(logits, axis=0) > 0
        own, rival = (
            float(np.mean(u & moves[which]))
            for u, which in zip(useless, (self.examples.y, rivals), strict=True)
        )
        blind = float(max(own, rival))
        yield decided(
            28,
            "the label's score and its rival's both have a gradient",
            Measure(blind, blind <= _BLIND, f"<= {100 * _BLIND:g} % of images without"),
            Measure(blind, blind <= 0.01, "<= 1 % of images without", "", WARN),
            note=f"label {100 * own:.1f} %, rival {100 * rival:.1f} %",
        )

    def _trace(self, loss):
        chosen = attack_losses.among(loss, (attack_losses.margin, attack_losses.cross_entropy))
        found = []
        for index, count in self._pieces():
            part = self.examples.take(index)
            path = _path(
                self.key,
                self.subject.model,
                chosen,
                part.x,
                part.y,
                part.ids,
                eps=jnp.float32(self.settings.eps),
                step_size=jnp.float32(self.settings.step_size),
                steps=self.settings.steps,
                norm=self.subject.norm,
                bounds=self.subject.bounds,
            )
            zero, values = jax.device_get(path)
            found.append((zero[:, :count], values[:, :count]))
        zero, values = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        return np.mean(zero, axis=1), np.mean(values, axis=1)

    def precision(self):
        """5: float32 gradients against float64, and against finite differences."""
        name = "float32 gradient signs are those of float64"
        try:
            agreement, error = precision(self.subject, self.examples.take(slice(0, FEW)))
        except Closed as why:
            yield Check(5, name, SKIP, None, "", str(why))
            return
        slope = [] if error is None else [
            Measure(error, error <= SLOPE, f"<= {SLOPE:g}", "relative error of a derivative")
        ]  # fmt: skip
        yield decided(5, name, Measure(agreement, agreement >= 0.99, ">= 99 %"), *slope)

    def slopes(self):
        """30: differences of the margin along random signs are those that its gradient says."""
        key, found = jax.random.fold_in(self.key, streams.Checks.SLOPES), []
        for i, count in () if self.subject.unsteady else self._pieces():
            key, own = jax.random.split(key)
            ball = {"eps": self.eps, "norm": self.subject.norm, "bounds": self.subject.bounds}
            x, y = self.examples.x[i], self.examples.y[i]
            found.append(slopes.errors(own, self.subject.model, x, y, **ball)[:count])
        yield slopes.check(np.concatenate(found) if found else None)

    def scales(self):
        """6: cross entropy with scaled logits breaks nothing that the sound protocol left."""

        def attacked(scale):
            model = wrap(
                Partial(_scaled, jnp.float32(scale), self.subject.model), steady=not self.subject.unsteady
            )
            parts = []
            for index, count in self._pieces():
                part = self.examples.take(index)
                x_adv = run_pgd(
                    self.key, model, part.x, part.y, eps=self.eps, step_size=self.settings.step_size,
                    steps=20, norm=self.subject.norm, bounds=self.subject.bounds, ids=part.ids,
                )  # fmt: skip
                parts.append(np.asarray(x_adv)[:count])
            return np.concatenate(parts)

        found, refused = [], []
        for scale in (*_SCALES, 1.0):
            try:
                found.append(attacked(scale))
            except UserError as error:  # logits near the end of float32 overflow when they are scaled
                refused.append(f"x {scale:g}: {first_line(error, 80)}")
        gain, left = max(map(self._gain, found), default=0.0), [*map(self._accuracy, found)]
        spread = max(left, default=0.0) - min(left, default=0.0)
        limit = max(0.02, self.slack)
        yield decided(
            6,
            "logits x 1e-3 ... 1e3 break nothing more",
            Measure(gain, gain <= limit, at_most(limit)),
            *(Measure(None, False, "finite logits", text, WARN) for text in refused[-1:]),
            Measure(
                spread, spread <= limit, at_most(limit), "what cross entropy alone leaves varies so", WARN
            ),
        )

    def effort(self):
        """1, 7, 10, 20, 25: in the ball, what more steps or a larger one break, unchanged by looking."""
        steps = self.settings.steps
        outcome = self._pgd(steps=steps)
        beyond = rounding.outside(outcome.x_adv, self.examples.x, self.eps, self.subject.norm)
        excess, lost = (
            float(np.max(beyond[np.isfinite(beyond)], initial=0.0)),
            int(np.sum(~np.isfinite(outcome.x_adv))),
        )
        ball = Measure(excess, excess <= 0, "<= 0", "beyond rounding")
        yield decided(
            1,
            "adversarial images are finite and in the ball: beyond eps",
            ball,
            Measure(lost, not lost, "0", "pixels without a number"),
        )
        one = self._accuracy(self._pgd(steps=1, step_size=1.25 * self.eps).x_adv)
        many, gain = self._accuracy(outcome.x_adv), self._gain(self._pgd(steps=2 * steps).x_adv)
        good = one >= many - self.slack and gain <= self.slack
        yield Check(
            7,
            "twice the steps break nothing more, nor does one step",
            status_of(good),
            max(gain, many - one),
            at_most(self.slack),
            f"one step {100 * one:.1f} %, {steps} steps {100 * many:.1f} %",
        )
        silent = intervals.fraction(outcome.unconfirmed & ~outcome.broken)
        yield Check(
            25,
            "what fools a single attack's program fools the model",
            status_of(silent <= self.slack),
            silent,
            at_most(self.slack),
        )
        # Each radius from scratch: the curve of the result goes on with what smaller radii left.
        smaller, larger = (self._accuracy(self._pgd(steps=steps, scale=s).x_adv) for s in (0.5, 2.0))
        rise = max(many - smaller, larger - many)
        yield Check(
            10,
            "a larger eps breaks no fewer",
            status_of(rise <= self.slack),
            rise,
            at_most(self.slack),
            f"eps x 0.5, 1, 2: {100 * smaller:.1f}, {100 * many:.1f}, {100 * larger:.1f} %",
        )
        changed = int(self.subject.digest() != self.before)
        yield Check(
            20, "evaluating did not change the model: arrays changed", status_of(not changed), changed, "0"
        )

    def black_box(self):
        """24, 27: random points find nothing that gradients do not; a nudge does not change the answers."""
        gain = self._gain(self._pgd(steps=1, step_size=0.0, restarts=_DRAWS).x_adv)
        yield Check(
            24,
            f"{_DRAWS} random points break nothing more",
            status_of(gain <= self.slack),
            gain,
            at_most(self.slack),
        )
        lost = 1 - self._accuracy(self._nudged())
        limit = max(_NUDGED, self.slack)
        yield Check(
            27, f"answers survive random noise of eps / {_NUDGE}", status_of(lost <= limit), lost,
            at_most(limit),
        )  # fmt: skip

    def _nudged(self):
        """Each image and a random change of eps / 8, of a stream of its own."""
        key = jax.random.fold_in(self.key, streams.Checks.NUDGE)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(self.examples.ids))
        x, eps = jnp.asarray(self.examples.x), self.eps / _NUDGE
        direction = on_sphere(keys, x, self.subject.norm)
        return np.asarray(project(x + eps * direction, x, eps, self.subject.norm, self.subject.bounds))


@jax.jit
def _traced(model, x):
    return attack_losses.logits_of(model(x))


def _scaled(scale, model, x):
    return scale * attack_losses.logits_of(model(x))


@functools.partial(jax.jit, static_argnames=("steps", "norm", "bounds"))
def _path(key, model, loss, x, y, ids, *, eps, step_size, steps, norm, bounds):
    """Along PGD without stopping: [steps, B] whether gradients are useless, and [steps, B] losses."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), 0))(ids)
    ball = {"eps": eps, "norm": norm, "bounds": bounds}
    z = start_in_ball(keys, x, start="uniform", **ball)

    def step(z, _):
        def total(z):
            value = loss(model(z), y, y)
            return jnp.sum(value), value

        gradient, value = jax.grad(total, has_aux=True)(z)
        return projected_step(z, gradient, x, step_size=step_size, **ball), (_useless(gradient), value)

    return jax.lax.scan(step, z, None, length=steps)[1]


def _useless(gradient):
    """[B] whether it is zero or not finite."""
    size = jnp.max(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim)))
    return ~(jnp.isfinite(size) & (size > 0))


@jax.jit
def _sides(model, x, y):
    """Whether the label's score, and the largest other one, have a useless gradient at x: [B], [B].

    And the class of that other one [B], and the logits [B, Y].
    """

    def score(x, rival):
        logits = attack_losses.logits_of(model(x))
        own = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        others = jnp.where(jnp.arange(logits.shape[1])[None, :] == y[:, None], -jnp.inf, logits)
        total = jnp.sum(jnp.where(rival, jnp.max(others, axis=1), own))
        return total, (jnp.argmax(others, axis=1), logits)

    (own, _), (rival, told) = (jax.grad(score, has_aux=True)(x, rival) for rival in (False, True))
    return _useless(own), _useless(rival), *told
