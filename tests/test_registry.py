"""What holds for every attack of the registry, by its own entry: a new attack is tested by being entered."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from affine_model import check_inside
from clustr_jax import attacks
from clustr_jax.attacks import device_loop, ensemble, registry, scheduler
from clustr_jax.attacks.attack_losses import View
from clustr_jax.attacks.registry import ATTACKS, Budget
from clustr_jax.attacks.targets import CHOOSERS
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError

ENTRIES = list(ATTACKS.values())
SHAPE, CLASSES, N, SLOTS = (6, 6, 1), 4, 16, 8
EPS = {"linf": 0.06, "l2": 0.25}
SMALL = Budget(eps=0.06, steps=8, step_size=0.02, queries=60, restarts=2)
# DDN's radius starts at 1 and falls by 5 % a step: it is below eps after 28 of them.
STEPS = {"ddn": 40}
DOCS = pathlib.Path(__file__).parents[1] / "docs/attacks.md"


def each(*, norms=False):
    """Entries, or (entry, norm); l2 of all but one in the slow tests."""
    if not norms:
        return [pytest.param(entry, id=entry.name) for entry in ENTRIES]
    return [
        pytest.param(
            entry,
            norm,
            id=f"{entry.name}-{norm}",
            marks=[pytest.mark.slow] if norm == "l2" and entry.name != "apgd-t" else [],
        )
        for entry in ENTRIES
        for norm in entry.norms
    ]


def view(clusters, weight, x):
    """A cluster head on features that are linear in the image."""
    z = x.reshape(x.shape[0], -1) @ weight
    logits = clusters.log_scores(z)
    return View(logits, logits, clusters.exponents(z))


def logits(clusters, weight, x):
    return view(clusters, weight, x).logits


def problem(entry, *, shape=SHAPE, classes=CLASSES):
    """(model, x, y): a view where the entry needs clusters, logits elsewhere; one label is wrong."""
    rng = np.random.default_rng(0)
    clusters = Clusters(jnp.asarray(rng.normal(size=(classes, 2, 5)), jnp.float32), jnp.float32(0.3))
    weight = jnp.asarray(rng.normal(size=(int(np.prod(shape)), 5)) / 2, jnp.float32)
    x = rng.uniform(0, 1, (N, *shape)).astype(np.float32)
    y = np.asarray(logits(clusters, weight, x)).argmax(axis=1).astype(np.int32)
    y[0] = (y[0] + 1) % classes
    return Partial(view if entry.clusters else logits, clusters, weight), x, y


def chosen(entry, model, x, y, norm, count):
    if entry.targets is None:
        return None
    outputs = scheduler.forward(model, x, SLOTS)
    return CHOOSERS[entry.targets](model, x, y, outputs, norm, count=count, slots=SLOTS)


def attacked(entry, budget, model, x, y, ids=None):
    targets = chosen(entry, model, x, y, budget.norm, 2)
    return scheduler.run(
        entry.make(budget, None),
        jax.random.key(0),
        model,
        x,
        y,
        ids=ids,
        targets=targets,
        restarts=budget.restarts,
        slots=SLOTS,
    )


@pytest.mark.parametrize(("entry", "norm"), each(norms=True))
@pytest.mark.one_in(3)
def test_outcomes(entry, norm):
    """Inside ball and box, success is misclassification, and an outcome does not depend on the place."""
    steps = STEPS.get(entry.name, SMALL.steps)
    budget = dataclasses.replace(SMALL, eps=EPS[norm], norm=norm, steps=steps)
    model, x, y = problem(entry)
    outcome = attacked(entry, budget, model, x, y)
    fooled = np.asarray(scheduler.judge(model, outcome.x_adv, y)[0])
    np.testing.assert_array_equal(outcome.broken, fooled)
    assert 2 <= outcome.broken.sum() <= N - 2  # some and not all: the ones after it say something
    np.testing.assert_array_equal(outcome.x_adv[~fooled], x[~fooled])
    check_inside(outcome.x_adv, x, EPS[norm], norm, (0.0, 1.0))
    assert (outcome.spent <= 2 + (budget.steps if entry.gradients else budget.queries)).all()
    order = np.random.default_rng(1).permutation(N)
    moved = attacked(entry, budget, model, x[order], y[order], ids=order.astype(np.int32))
    np.testing.assert_array_equal(moved.broken, outcome.broken[order])
    np.testing.assert_allclose(moved.x_adv, outcome.x_adv[order], atol=1e-5)


@pytest.mark.parametrize("entry", each())
def test_gradients_are_taken_where_the_entry_says_so(entry):
    @jax.custom_jvp
    def blocked(z):
        return z

    @blocked.defjvp
    def _(primals, tangents):
        raise ArithmeticError("differentiated")

    model, x, y = problem(entry)
    targets = chosen(entry, model, x, y, "linf", 1)
    ids = np.arange(N, dtype=np.int32)
    target = -np.ones(N, np.int32) if targets is None else targets[0]
    work = device_loop.fill(jax.random.key(0), ids, ids, 0 * ids, x, y, target)
    attack = entry.make(SMALL, None)

    def once():
        state = attack.init(work)
        return attack.update(lambda x: jax.tree.map(blocked, model(x)), work, state, jnp.zeros(N, jnp.int32))

    if entry.gradients:
        with pytest.raises(ArithmeticError):
            once()
    else:
        once()


@pytest.mark.parametrize("entry", each())
def test_it_reads_the_settings_that_it_names_and_no_others(entry):
    """`restarts` is the protocol's to spend, whatever else an attack makes of it."""
    changed = {"steps": 9, "step_size": 0.03, "queries": 61, "rescale_schedule": False}
    plain = jax.tree.leaves_with_path(entry.make(SMALL, None))
    for name, value in changed.items():
        other = entry.make(dataclasses.replace(SMALL, **{name: value}), None)
        same = str(jax.tree.leaves_with_path(other)) == str(plain) and jax.tree.structure(
            other
        ) == jax.tree.structure(entry.make(SMALL, None))
        assert same == (name not in entry.settings), name
    assert set(entry.settings) <= {*changed, "restarts"}


FITS = dict(shape=(8, 6, 6, 1), classes=4, clusters=True)


@pytest.mark.parametrize("entry", each())
def test_what_it_needs(entry):
    """Where something is lacking it is said, and only there."""
    fits = FITS | {"norm": entry.norms[0]}
    assert entry.lacking(**fits) == ""
    without = {
        "images": dict(shape=(8, 36)),
        "classes": dict(classes=2),
        "norm": dict(norm="l1"),
        "clusters": dict(clusters=False),
    }
    needed = {
        "images": entry.images,
        "classes": entry.min_classes > 2,
        "norm": True,
        "clusters": entry.clusters,
    }
    for name, change in without.items():
        text = entry.lacking(**fits | change)
        assert bool(text) == needed[name]
        assert not text or (text.startswith(entry.name) and "leave it out" in text)


@pytest.mark.slow
@pytest.mark.parametrize("entry", each())
def test_it_does_without_what_it_does_not_need(entry):
    """Points, two classes; and what needs clusters does not run without them."""
    if not entry.images:
        attacked(entry, SMALL, *problem(entry, shape=(36,)))
    if entry.min_classes == 2:
        attacked(entry, SMALL, *problem(entry, classes=2))
    if entry.clusters:
        model, x, y = problem(entry)
        with pytest.raises(Exception, match=r"clusters|exponents"):
            attacked(entry, SMALL, Partial(logits, *model.args), x, y)


def test_autoattack_takes_those_without_a_step_size(monkeypatch):
    """Each by its name; and names the ones it knows where it is given another."""
    monkeypatch.setattr(ensemble, "STEPS", SMALL.steps)
    monkeypatch.setattr(ensemble, "QUERIES", SMALL.queries)
    model, x, y = problem(ATTACKS["square"])
    names = registry.PARAMETER_FREE
    assert set(registry.STANDARD) <= set(names)
    assert set(names) == {e.name for e in ENTRIES if "step_size" not in e.settings and not e.clusters}
    both = [name for name in names if "linf" in ATTACKS[name].norms]
    result = attacks.autoattack(
        jax.random.key(0), model, x, y, eps=EPS["linf"], attacks=both, slots=SLOTS, progress=False
    )
    for name in set(names) - set(both):
        with pytest.raises(UserError, match=f"{name} works in l2, got norm='linf'; leave it out"):
            attacks.autoattack(jax.random.key(0), model, x, y, eps=0.1, attacks=(name,))
    assert set(result.broken_by) <= {"", "clean", *names} and 0 < result.robust.sum() < N - 1
    for name in (*(set(ATTACKS) - set(names)), "apgd"):
        with pytest.raises(UserError, match=f"unknown '{name}'; known: {', '.join(names)}"):
            attacks.autoattack(jax.random.key(0), model, x, y, eps=0.1, attacks=(name,))


def test_the_documented_table():
    """docs/attacks.md has the registry's table; paste what registry.table() has where not."""
    assert "\n".join(registry.table()) in DOCS.read_text()
