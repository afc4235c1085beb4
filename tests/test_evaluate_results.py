"""Results of both protocols: padding, order and split of the images, several attacks and radii."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from centroid_classifiers import (
    LinearNet,
    Stub,
    attack_soundly,
    eval_settings,
    points,
    silent,
    small_attack,
    two_classes,
)
from clustr_jax import data, models
from clustr_jax.attacks import scheduler
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation import protocols, sound_protocol
from clustr_jax.models import Outputs


def small_problem(net, variables, shape):
    """70 inputs, some misclassified, with clusters at random embeddings; two deployed rules (D = 4 of 6)."""
    rng = np.random.default_rng(5)
    x = rng.uniform(size=(70, *shape)).astype(np.float32)
    z = np.asarray(net.eval(variables, x).embeddings)
    variance = np.var(z, axis=0).sum() / 20
    head = Clusters(jnp.asarray(z[:6].reshape(3, 2, -1)), jnp.float32(variance))
    clf = Classifier(variables, head, net, nearest=4)
    y = np.asarray(clf.predict(x)).copy()
    y[::9] = (y[::9] + 1) % 3
    return clf, points(x, y, ids=rng.permutation(1000)[:70].astype(np.int32))


@dataclasses.dataclass(frozen=True)
class TanhNet(LinearNet):
    """f(x) = tanh(x W): the cheapest classifier that is not linear."""

    num_classes = 5

    def eval(self, variables, x):
        z = jnp.tanh(super().eval(variables, x).embeddings)
        return Outputs(z, z)


@pytest.fixture(scope="module")
def small():
    weight = np.random.default_rng(6).normal(size=(12, 5)).astype(np.float32) / 2
    return small_problem(TanhNet(), {"w": jnp.asarray(weight)}, (12,))


@pytest.fixture(scope="module")
def small_cnn():
    net = models.build("cnn", num_classes=3, input_shape=(8, 8, 1), mean=(0.3,), std=(0.4,), width=4)
    return small_problem(net, net.init(jax.random.key(1)), (8, 8, 1))


@pytest.mark.parametrize("name", ["paper", pytest.param("sound", marks=pytest.mark.slow)])
def test_padding_is_not_counted(name, small, key):
    """70 images in slots of 32 are 70 images; each appears once and fractions are of 70."""
    clf, examples = small
    result, outcomes, seconds = protocols.run(name, key, clf, examples, small_attack(), silent)
    assert result["n"] == 70 and seconds > 0
    assert all(len(values) == 70 for values in outcomes.values())
    np.testing.assert_array_equal(outcomes["ids"], examples.ids)
    np.testing.assert_array_equal(outcomes["y"], examples.y)
    for figure in ("clean", "robust"):
        assert (result[figure] * 70) % 1 in (0, pytest.approx(0), pytest.approx(1))
    assert 0 < result["robust"] < result["clean"] < 1


@pytest.mark.parametrize("protocol", ["paper", "sound"])
def test_every_batch_has_the_same_number_of_lanes(protocol, key):
    """70 images x 2 restarts in slots of 32: the attack is compiled for 32 images and for nothing else."""
    seen = set()

    def scores(x):
        if isinstance(x, jax.core.Tracer):
            seen.add(x.shape[0])
        return two_classes(x)

    examples = points(np.linspace(-1, -0.01, 70)[:, None], np.zeros(70))
    settings = dict(eps=0.5, step_size=0.125, steps=8, restarts=2, slots=32, report=silent)
    if protocol == "paper":
        robust = protocols.paper_pgd(key, Stub(scores), examples, **settings)["robust"]
    else:
        settings.pop("report")
        robust, _ = attack_soundly(key, Stub(scores), examples, **settings)
    assert seen == {32}
    np.testing.assert_array_equal(robust, examples.x[:, 0] < -0.5)


@pytest.mark.more
def test_sound_outcomes_are_nested(small, key):
    """robust implies clean, `broken_by` says for the others why, and the figures are their means."""
    clf, examples = small
    result, outcomes = sound_protocol.run_sound(key, clf, examples, small_attack(), silent)
    robust, clean, broken_by = outcomes["robust"], outcomes["clean"], outcomes["broken_by"]
    assert (clean >= robust).all() and result["robust"] <= result["clean"]
    np.testing.assert_array_equal(clean, np.asarray(clf.predict(examples.x)) == examples.y)
    np.testing.assert_array_equal(robust, broken_by == "")
    assert set(broken_by) <= {"", "clean", "smaller-eps", *result["attacks"]}
    assert (broken_by[~clean] == "clean").all()
    assert result["clean"] == clean.mean() and result["robust"] == robust.mean()
    survivors = {name: outcomes[f"robust_{name}"] for name in result["attacks"]}
    for name, survived in survivors.items():
        assert result["attacks"][name]["robust"] == survived.mean() >= result["robust"]
        others = [s for n, s in survivors.items() if n != name]
        kills = np.all(others, axis=0) & ~survived & clean
        assert result["attacks"][name]["unique_kills"] == kills.sum()


def test_paper_result_is_the_worst_case_of_its_attacks(small, key):
    """`robust` counts examples that survive both PGD^3 and PGD^5; other radii go under `sweep`."""
    clf, examples = small
    result, outcomes = protocols.run_paper(key, clf, examples, small_attack(), silent)
    both = outcomes["pgd3_0.050000"] & outcomes["pgd5_0.050000"] & outcomes["clean"]
    assert result["robust"] == both.mean() <= min(result["attacks"].values())
    assert result["attacks"] == {name: outcomes[f"{name}_0.050000"].mean() for name in ("pgd3", "pgd5")}
    assert set(result["sweep"]) == {"0.020000", "0.100000"}
    for eps, attacks in result["sweep"].items():
        assert attacks == {name: outcomes[f"{name}_{eps}"].mean() for name in ("pgd3", "pgd5")}
    assert result["attack"]["restarts"] == 2 and result["attack"]["steps"] == [3, 5]


def test_quick_runs_only_the_main_radius(small, key):
    clf, examples = small
    quick = small_attack(**{"eval.quick": True})
    paper, _ = protocols.run_paper(jax.random.clone(key), clf, examples, quick, silent)
    assert list(paper["attacks"]) == ["pgd20"] and paper["sweep"] == {}


@pytest.mark.parametrize("protocol", [pytest.param("paper", marks=pytest.mark.slow), "sound"])
def test_outcomes_do_not_depend_on_order_or_split(protocol, small_cnn, key):
    """At a fixed number of slots an example's outcome is its own, whoever is beside it."""
    clf, examples = small_cnn
    settings = dict(eps=0.05, step_size=0.0125, steps=5, restarts=2, slots=16)

    def outcome(index):
        part = data.Examples(examples.x[index], examples.y[index], examples.ids[index])
        if protocol == "paper":
            found = protocols.paper_pgd(jax.random.clone(key), clf, part, report=silent, **settings)
            names = ("robust", "any_restart", "fooled_outside_box")
            return np.stack([found[name] for name in names], axis=1)
        return attack_soundly(jax.random.clone(key), clf, part, **settings)[0]

    whole = outcome(np.arange(70))
    assert 0 < whole.mean() < 1
    order = np.random.default_rng(3).permutation(70)
    np.testing.assert_array_equal(outcome(order), whole[order])
    parts = np.array_split(np.arange(70), [1, 20, 57])
    np.testing.assert_array_equal(np.concatenate([outcome(part) for part in parts]), whole)


def test_outcomes_depend_on_key_and_ids(small, key):
    """Restarts and data set indices have randomness of their own (so the test above is not vacuous)."""
    clf, examples = small
    settings = dict(eps=0.05, step_size=0.0, steps=1, restarts=1, slots=70)
    first, _ = attack_soundly(jax.random.clone(key), clf, examples, **settings)
    other = dataclasses.replace(examples, ids=examples.ids + 1)
    assert (attack_soundly(jax.random.clone(key), clf, other, **settings)[0] != first).any()
    assert (attack_soundly(jax.random.key(9), clf, examples, **settings)[0] != first).any()


def test_more_restarts_break_more(small, key):
    clf, examples = small
    settings = dict(eps=0.03, step_size=0.0075, steps=5)
    one, _ = attack_soundly(jax.random.clone(key), clf, examples, restarts=1, **settings)
    four, _ = attack_soundly(jax.random.clone(key), clf, examples, restarts=4, **settings)
    assert (four <= one).all() and four.sum() < one.sum()


def test_run_clean_is_the_deployed_rule(small):
    clf, examples = small
    result, outcomes, _ = protocols.run_clean(clf, examples.x, examples.y)
    correct = np.asarray(clf.deployed(examples.x)).argmax(axis=1) == examples.y
    np.testing.assert_array_equal(outcomes["clean"], correct)
    assert (
        result["n"] == 70 and result["clean"] == result["robust"] == correct.mean() and result["eps"] == 0.0
    )
    guesses = np.asarray(clf.deployed(examples.x)).argmax(axis=1)
    for name, classes in (("predicted", guesses), ("labelled", examples.y)):
        assert result[name] == [float(np.mean(classes == c)) for c in range(clf.net.num_classes)], name


@pytest.mark.slow
def test_what_nothing_confirms_is_counted(small, key, monkeypatch):
    """Images that attacks fooled in their own program and that stand all the same (check 8)."""
    clf, examples = small
    config = eval_settings(**{"eval.quick": True, "eval.attack.eps": 0.1, "eval.slots": 16})
    counts = []
    for _ in range(2):
        result, outcomes = sound_protocol.run_sound(jax.random.clone(key), clf, examples, config, silent)
        counts.append((result["unconfirmed"], int(outcomes["robust"].sum()), int(outcomes["clean"].sum())))
        nothing = lambda model, x, y: (np.zeros(len(x), bool), np.ones(len(x), bool))  # noqa: E731
        monkeypatch.setattr(scheduler, "judge", nothing)
    (confirmed, left, clean), (unconfirmed, all_left, _) = counts
    assert confirmed == 0 and left < clean == all_left and unconfirmed == clean - left
