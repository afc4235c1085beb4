"""The slot scheduler: outcomes that depend on no schedule, few wasted evaluations, runs that can go on.

One network (12 points -> tanh -> 4 classes) and one PGD, in 7 slots wherever the number does not matter:
they are compiled once. Its steps reach two thirds of the radius, so that the random start decides for many.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.tree_util import Partial

from clustr_jax import attacks, losses
from clustr_jax.attacks import aims, scheduler
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.evaluation import resume
from clustr_jax.runtime.errors import UserError

OPTIONS = (aims.margin, aims.cross_entropy, aims.margin_targeted)
STEPS, RESTARTS, SLOTS, SIZE, HIDDEN, CLASSES = 8, 4, 7, 12, 10, 4
EASY, MIXED, ROBUST = 0.5, 0.1, 1e-5
COUNTS = ("broken", "restart", "step", "spent")
TRACES = []


def network(params, x):
    TRACES.append(x.shape)
    return jnp.tanh(x @ params[0]) @ params[1] + params[2][None]


def random_network(seed=0):
    rng = np.random.default_rng(seed)
    params = rng.normal(size=(SIZE, HIDDEN)), rng.normal(size=(HIDDEN, CLASSES)), np.zeros(CLASSES)
    return Partial(network, [jnp.asarray(p, jnp.float32) for p in params])


@functools.cache
def problem(n=40):
    model = random_network()
    x = np.random.default_rng(1).uniform(0, 1, (n, SIZE)).astype(np.float32)
    return model, x, np.asarray(model(x)).argmax(axis=1).astype(np.int32)


def pgd_attack(eps, *, step_size=None, steps=STEPS, aim=aims.margin, kind=PGD, **more):
    return kind(
        eps=jnp.float32(eps), steps=np.int32(steps), norm="linf", bounds=(0.0, 1.0),
        step_size=jnp.float32(eps / 12 if step_size is None else step_size), aim=aims.among(aim, OPTIONS),
        **more,
    )  # fmt: skip


def run(model, x, y, *, eps=MIXED, key=0, restarts=RESTARTS, slots=SLOTS, attack=None, **more):
    attack = pgd_attack(eps) if attack is None else attack
    return scheduler.run(attack, jax.random.key(key), model, x, y, restarts=restarts, slots=slots, **more)


@functools.cache
def whole(eps=MIXED, n=40, restarts=RESTARTS):
    return run(*problem(n), eps=eps, restarts=restarts)


def same(found, expected, index=slice(None)):
    """Outcomes of the examples `index` of `expected`, images included, bit for bit."""
    for name in ("broken", "restart", "step", "x_adv"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[index], err_msg=name)


def wrong(model, x, y):
    return np.asarray(model(jnp.asarray(x))).argmax(axis=1) != y


# What an outcome is


def test_outcome_fields():
    """Successes are misclassified, inside ball and box; the rest comes back unchanged."""
    model, x, y = problem()
    found = whole()
    assert 8 < found.broken.sum() < 36 and (found.restart > 0).any() and (found.step > 1).any()
    np.testing.assert_array_equal(wrong(model, found.x_adv, y), found.broken)
    np.testing.assert_array_equal(found.x_adv[~found.broken], x[~found.broken])
    assert np.abs(found.x_adv - x).max() <= MIXED + 1e-6
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    for name in ("restart", "step"):
        np.testing.assert_array_equal(getattr(found, name) >= 0, found.broken)
    assert found.restart.max() < RESTARTS and found.step.max() <= STEPS
    # each restart before the successful one ran to its end
    for i, spent in enumerate(found.spent.T):
        last = found.restart[i] if found.broken[i] else RESTARTS
        assert (spent[:last] == STEPS).all()
        if found.broken[i]:
            assert spent[last] == min(found.step[i] + 1, STEPS)
    counted = [s[: r + 1].sum() if b else s.sum()
               for s, r, b in zip(found.spent.T, found.restart, found.broken, strict=True)]  # fmt: skip
    assert found.needed == sum(counted)


def test_step_counts_the_attacks_steps():
    """0: the start succeeded, which an attack that never moves shows."""
    model, x, y = problem()
    found = run(model, x, y, eps=EASY)
    again = run(model, x, y, attack=pgd_attack(EASY, step_size=0.0))  # the start alone
    at_start = found.broken & (found.restart == 0) & (found.step == 0)
    assert 5 < at_start.sum() < 40
    np.testing.assert_array_equal(at_start, again.broken & (again.restart == 0))


# No schedule matters


def test_outcomes_do_not_depend_on_order_or_split():
    """With ids, at fixed slots, bit for bit: other places, other neighbours, other queue lengths."""
    model, x, y = problem()
    ids = np.random.default_rng(2).permutation(1000)[:40].astype(np.int32)
    expected = run(model, x, y, ids=ids)
    assert 0 < expected.broken.mean() < 1
    order = np.random.default_rng(3).permutation(40)
    same(run(model, x[order], y[order], ids=ids[order]), expected, order)
    for part in np.array_split(np.arange(40), [1, 14, 20]):
        same(run(model, x[part], y[part], ids=ids[part]), expected, part)
    # and the ids do matter
    other = run(model, x, y, ids=ids + 1)
    assert (other.restart != expected.restart).any() and (other.x_adv != expected.x_adv).any()


def test_default_ids_count_from_zero():
    model, x, y = problem()
    same(run(model, x, y, ids=np.arange(40, dtype=np.int32)), whole())


def test_how_often_the_device_comes_back_does_not_matter(monkeypatch):
    """One iteration a call instead of many: the same outcomes at the same cost."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1.0})
    calls = []
    found = run(*problem(), report=lambda outcome: calls.append(outcome.evaluations))
    same(found, whole())
    np.testing.assert_array_equal(found.spent, whole().spent)
    assert found.evaluations == whole().evaluations
    assert len(calls) > 50 and set(np.diff(calls)) <= {0, SLOTS}


@pytest.mark.slow
def test_outcomes_agree_across_slots():
    """At least 99.5 % for 7, 64 and 512 (floating-point sums differ); each difference with its margin."""
    model, x, y = problem(200)
    by_slots = {n: run(model, x, y, slots=n) for n in (7, 64, 512)}
    base = by_slots[7]
    assert 0.1 < base.broken.mean() < 0.9
    for n in (64, 512):
        differ = np.flatnonzero(by_slots[n].broken != base.broken)
        for i in differ:
            images = {k: by_slots[k].x_adv[i : i + 1] for k in (7, n)}
            print(n, i, {k: float(losses.margin(model(z), y[i : i + 1])[0]) for k, z in images.items()})
        assert len(differ) <= 0.005 * len(x)
        agree = (by_slots[n].restart == base.restart) & (by_slots[n].step == base.step)
        assert agree.mean() >= 0.98
        both = agree & base.broken
        np.testing.assert_allclose(by_slots[n].x_adv[both], base.x_adv[both], atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 6, 8])
def test_fewer_pairs_than_slots(n):
    """A single example, and sets about as small as the number of slots."""
    model, x, y = problem()
    for restarts in (1, RESTARTS):
        found = run(model, x[:n], y[:n], restarts=restarts)
        same(found, whole(restarts=restarts), slice(n))
        assert found.evaluations <= 1.05 * found.needed + SLOTS * STEPS


def test_nothing_to_attack():
    model, x, y = problem()
    found = run(model, x[:0], y[:0])
    assert found.evaluations == found.needed == 0 and found.x_adv.shape == (0, SIZE)


def test_more_restarts_never_raise_accuracy():
    """Restart r is the same whatever the number of restarts: a success stays, with its restart."""
    counts = []
    for restarts in (1, 2, RESTARTS, 10):
        found = whole(restarts=restarts)
        counts.append(found.broken.sum())
        full = whole(restarts=10)
        early = full.restart < restarts
        np.testing.assert_array_equal(found.broken, full.broken & early)
        np.testing.assert_array_equal(found.restart[found.broken], full.restart[found.broken])
        np.testing.assert_array_equal(found.x_adv[found.broken], full.x_adv[found.broken])
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.slow
def test_slots_break_what_pgd_breaks():
    """`attacks.pgd` with select="success" has the same streams: the same examples are broken."""
    model, x, y = problem(200)
    found = run(model, x, y)
    x_adv = attacks.pgd(
        jax.random.key(0), model, x, y, eps=MIXED, step_size=MIXED / 12, steps=STEPS, restarts=RESTARTS,
        loss_fn=losses.margin,
    )  # fmt: skip
    other = wrong(model, x_adv, y)
    assert np.mean(other == found.broken) >= 0.995
    both = other & found.broken
    close = np.abs(np.asarray(x_adv) - found.x_adv).max(axis=1) < 1e-5
    assert both.sum() > 40 and close[both].mean() > 0.98


# Cost


@pytest.mark.parametrize("restarts", [1, RESTARTS, 10])
@pytest.mark.parametrize("eps", [EASY, MIXED, ROBUST], ids=["easy", "mixed", "robust"])
def test_few_evaluations_are_wasted(eps, restarts):
    """Lanes x iterations, idle ones included, against what no schedule could leave out."""
    found = whole(eps, 200, restarts)
    share = found.broken.mean()
    assert (share > 0.95) if eps == EASY else (share == 0) if eps == ROBUST else (0.1 < share < 0.9)
    assert found.needed <= found.evaluations <= 1.05 * found.needed + SLOTS * STEPS
    if eps == ROBUST:
        assert found.needed == 200 * restarts * STEPS


@pytest.mark.slow
def test_cost_with_many_slots():
    """The tail is slots x steps at most, also where the set hardly fills them."""
    model, x, y = problem(200)
    for n, restarts in ((200, 1), (200, 10), (30, 4)):
        found = run(model, x[:n], y[:n], slots=64, restarts=restarts)
        assert found.needed <= found.evaluations <= 1.05 * found.needed + 64 * STEPS


# All restarts, targets


def test_every_restart_runs_to_its_end():
    """first=False: `collect` sees each (example, restart) once, and the first success is the outcome's."""
    model, x, y = problem()
    seen, images = np.zeros((RESTARTS, 40), int), np.zeros((RESTARTS, *x.shape), np.float32)
    fooled = np.zeros((RESTARTS, 40), bool)

    def collect(example, restart, x_adv, wrong_):
        np.add.at(seen, (restart, example), 1)
        images[restart, example], fooled[restart, example] = x_adv, wrong_

    found = run(model, x, y, first=False, collect=collect)
    assert (seen == 1).all() and (found.spent > 0).all()
    for r in range(RESTARTS):
        np.testing.assert_array_equal(fooled[r], wrong(model, images[r], y))
    assert (found.spent[~fooled] == STEPS).all()
    np.testing.assert_array_equal(found.broken, fooled.any(axis=0))
    first = fooled.argmax(axis=0)
    np.testing.assert_array_equal(found.restart, np.where(found.broken, first, -1))
    expected = images[first, np.arange(40)]
    np.testing.assert_array_equal(found.x_adv[found.broken], expected[found.broken])
    assert (fooled.sum(axis=0) > 1).any() and (fooled[1:] & ~fooled[:1]).any()
    # the same as stopping early
    for name in ("broken", "restart", "step"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole(), name))
    np.testing.assert_allclose(found.x_adv, whole().x_adv, atol=1e-6)
    assert found.evaluations <= 1.05 * found.spent.sum() + SLOTS * STEPS


def one_way_out():
    """Class 2 is reached by moving five coordinates together, class 1 never: only one target succeeds."""
    first, second = np.zeros((SIZE, HIDDEN)), np.zeros((HIDDEN, CLASSES))
    first[np.arange(HIDDEN), np.arange(HIDDEN)] = 1.0
    second[0, 1], second[1:6, 2] = 1.0, 1.0
    bias = np.array([2.2, -10.0, 0.0, -20.0])
    return Partial(network, [jnp.asarray(p, jnp.float32) for p in (first, second, bias)])


def test_each_target_has_its_restarts():
    """T targets x R restarts, target by target: restart t R + r goes for targets[t]."""
    model, x, y = one_way_out(), np.full((9, SIZE), 0.3, np.float32), np.zeros(9, np.int32)
    attack = pgd_attack(0.2, step_size=0.1, aim=aims.margin_targeted)
    for order in ((1, 2), (2, 1), (3, 1)):
        targets = np.repeat(np.array(order, np.int32)[:, None], 9, axis=1)
        found = run(model, x, y, attack=attack, targets=targets, restarts=3)
        assert found.spent.shape == (6, 9)
        if 2 not in order:
            assert not found.broken.any() and (found.spent == STEPS).all()
            continue
        assert found.broken.all() and (found.restart == 3 * order.index(2)).all()
        assert (found.spent[: 3 * order.index(2)] == STEPS).all()
    # per example
    targets = np.array([[1, 2, 3] * 3, [2, 3, 1] * 3], np.int32)
    found = run(model, x, y, attack=attack, targets=targets, restarts=1)
    np.testing.assert_array_equal(found.restart, [1, 0, -1] * 3)


# Interruptions


class Stop(Exception):
    pass


def interrupted(records, after, **more):
    """Run and stop after so many device calls, each of them recorded."""
    calls = []

    def report(outcome):
        records.save("pgd", outcome)
        calls.append(1)
        if len(calls) == after:
            raise Stop

    try:
        return run(*problem(), report=report, **more)
    except Stop:
        return None


@pytest.fixture
def often(monkeypatch):
    """The device comes back after each iteration, and every record is written."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1.0})
    monkeypatch.setattr("clustr_jax.attacks.records._RECORD_SECONDS", 0.0)


@pytest.mark.parametrize("stops", [(1,), (5,), (60,), (3, 30)])
def test_an_interrupted_run_goes_on(stops, often, tmp_path):
    """Records on disk, another process's Records: the same outcomes for the same evaluations in all."""
    _, x, _ = problem()
    outcome = None
    for stop in stops:
        assert interrupted(resume.Records(tmp_path, "me"), stop, outcome=outcome) is None
        outcome, extra = resume.Records(tmp_path, "me").load("pgd", x, RESTARTS)
        assert extra == {} and outcome is not None
        assert outcome.flight and 0 < outcome.evaluations < whole().evaluations
    found = run(*problem(), outcome=outcome)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole(), name), err_msg=name)
    assert found.evaluations == whole().evaluations and found.needed == whole().needed


def test_a_finished_record_is_not_run_again(often, tmp_path):
    """`now` writes the end: going on from it costs nothing."""
    records = resume.Records(tmp_path, "me")
    records.save("pgd", whole(), now=True)
    outcome, _ = resume.Records(tmp_path, "me").load("pgd", problem()[1], RESTARTS)
    found = run(*problem(), outcome=outcome, report=lambda outcome: pytest.fail("it ran"))
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole(), name))
    assert found.evaluations == whole().evaluations


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_record_cut_off_by_a_crash_starts_again(share, often, tmp_path):
    """The attack is run from its beginning instead of failing, or worse, going on from half of it."""
    interrupted(resume.Records(tmp_path, "me"), 5)
    (path,) = tmp_path.rglob("*.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert resume.Records(tmp_path, "me").load("pgd", problem()[1], RESTARTS) == (None, {})


def test_records_of_another_evaluation_are_left_alone(often, tmp_path):
    """Another identity, name, number of restarts or of examples."""
    _, x, _ = problem()
    records = resume.Records(tmp_path, "me")
    interrupted(records, 5)
    assert resume.Records(tmp_path, "me").load("pgd", x, RESTARTS)[0] is not None
    assert resume.Records(tmp_path, "you").load("pgd", x, RESTARTS) == (None, {})
    assert records.load("apgd", x, RESTARTS) == (None, {})
    assert records.load("pgd", x, RESTARTS + 1) == (None, {})
    assert records.load("pgd", x[:-1], RESTARTS) == (None, {})
    resume.Records(tmp_path, "you").clear()
    assert records.load("pgd", x, RESTARTS)[0] is not None
    records.clear()
    assert not list(tmp_path.rglob("*.npz"))


def test_records_are_throttled(tmp_path):
    records = resume.Records(tmp_path, "me")
    records.save("pgd", whole())
    assert not list(tmp_path.rglob("*"))
    records.save("pgd", whole(), {"loss": np.arange(3)}, now=True)
    _, extra = records.load("pgd", problem()[1], RESTARTS)
    np.testing.assert_array_equal(extra["loss"], np.arange(3))


# The smaller program at the end


def whole_numbers(params, x):
    """Integer weights on pixels rounded to 1/1024: exact in float32, so the same in any batch."""
    x = x + jax.lax.stop_gradient(jnp.round(x * 1024) / 1024 - x)
    return jax.nn.relu((x - 0.5) @ params[0]) @ params[1]


@pytest.mark.slow
def test_shrinking_changes_no_outcome(monkeypatch):
    """When few slots are busy the rest moves to a program of a quarter of the slots, and costs less."""
    rng = np.random.default_rng(5)
    params = [rng.integers(-3, 4, (6, 8)).astype(np.float32), rng.integers(-3, 4, (8, 3)).astype(np.float32)]
    model = Partial(whole_numbers, [jnp.asarray(p) for p in params])
    x = rng.uniform(0, 1, (18, 6)).astype(np.float32)
    y = np.asarray(model(x)).argmax(axis=1).astype(np.int32)
    lanes = []

    def watch(outcome):
        lanes.append(len(outcome.flight.active))

    full = run(model, x, y, eps=0.1, slots=16, restarts=1, report=watch)
    assert set(lanes) == {16} and 0 < full.broken.mean() < 1
    monkeypatch.setattr(scheduler, "_WORTH", 0)
    lanes.clear()
    small = run(model, x, y, eps=0.1, slots=16, restarts=1, report=watch)
    assert set(lanes) == {16, 4}
    same(small, full)
    np.testing.assert_array_equal(small.spent, full.spent)
    assert small.needed == full.needed and small.evaluations < full.evaluations


# Compilation


def test_radii_steps_aims_and_models_share_a_program():
    """Nothing is traced again for another eps, step size, aim of the same options, number of steps or of
    restarts, or for other parameters."""
    model, x, y = problem()
    whole()
    before = len(TRACES)
    for eps, step_size, aim in ((0.01, 0.1, aims.cross_entropy), (0.3, 0.0, aims.margin)):
        run(model, x, y, attack=pgd_attack(eps, step_size=step_size, aim=aim))
    run(random_network(5), x, y, attack=pgd_attack(0.1, steps=3), restarts=2)
    run(model, x[:9], y[:9])
    assert len(TRACES) == before


# What must not happen


class Leaving(PGD):
    """PGD whose images are moved by `shift` in the end."""

    shift: jax.Array = struct.field(default=None)

    def update(self, model, work, state, step):
        state = super().update(model, work, state, step)
        return state.replace(candidate=work.x + self.shift)


def test_an_attack_that_leaves_ball_or_box_is_caught():
    """A broken attack must not make a number."""
    model, x, y = problem()
    for eps, shift, what in ((0.1, 0.11, "linf ball"), (1.0, 0.9, "box"), (1.0, -0.9, "box")):
        attack = pgd_attack(eps, kind=Leaving, shift=jnp.float32(shift))
        with pytest.raises(AssertionError, match=f"attack left the {what}"):
            run(model, x, y, attack=attack)


def test_logits_that_are_not_finite_end_the_run():
    """They would count as misclassified: 3e38 overflows where the attack takes it."""
    first, second = np.zeros((SIZE, HIDDEN)), np.zeros((HIDDEN, CLASSES))
    first[0, :2], first[1, :2], second[:2, 1] = 3.0, -3.0, 3e38
    model = Partial(network, [jnp.asarray(p, jnp.float32) for p in (first, second, np.zeros(CLASSES))])
    x = np.tile(np.float32([0.3, 0.5] + [0.5] * 10), (20, 1))
    assert np.isfinite(model(x)).all() and not wrong(model, x, np.zeros(20)).any()
    with pytest.raises(UserError, match="logits_fn returned non-finite logits"):
        run(model, x, np.zeros(20, np.int32), attack=pgd_attack(0.3, step_size=0.3))
