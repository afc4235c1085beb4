"""clustr_jax.judge: any model gets the figure, the checks and the verdict that a work directory gets."""

import dataclasses
import importlib
import json
import pickle
import types

import jax
import numpy as np
import pytest

import clustr_jax
from checked_classifiers import fits
from clustr_jax import attacks
from clustr_jax.attacks import resuming, scheduler
from clustr_jax.evaluation import auditing, budgets, judging, plans, robustbench, sound_protocol, witness
from clustr_jax.evaluation.check import Check
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import AttackSettings
from judged import EPS, N, curved, images, judged, small, statuses, timeless
from test_golden import fixed


@pytest.fixture(scope="module")
def judgement():
    with jax.debug_key_reuse(False):
        return judged()


def test_the_figure_is_what_the_images_show(judgement):
    """Every image that counts as broken is misclassified, within the ball; the figure is their share."""
    x, y = images()
    wrong = np.asarray(curved(judgement.x_adv)).argmax(axis=1) != y
    assert judgement.clean == (N - 2) / N and 0 < judgement.robust < judgement.clean
    assert judgement.robust == np.mean(~wrong)
    assert np.abs(judgement.x_adv - x).max() <= EPS + 1e-6
    np.testing.assert_array_equal(judgement.broken_by == "", ~wrong)
    assert (judgement.broken_by[:2] == "clean").all()
    low, high = judgement.interval
    assert low < judgement.robust < high


@pytest.mark.more
def test_nothing_that_autoattack_breaks_is_left(judgement):
    x, y = images()
    found = attacks.autoattack(jax.random.key(5), curved, x, y, eps=EPS, slots=N, progress=False)
    assert not (found.robust < (judgement.broken_by == "")).any()


def test_an_honest_model_is_believed(judgement):
    assert judgement.believable and "FAIL" not in statuses(judgement).values(), judgement.checks
    assert sorted(statuses(judgement)) == [*range(1, 29), 30]
    assert statuses(judgement)[13] == statuses(judgement)[18] == "SKIP"
    assert statuses(judgement)[5] == "PASS"  # opened: computed in float64
    assert judgement.verdict.startswith("Partly robust: ")
    assert "found no reason to distrust itself" in judgement.verdict
    assert judgement.content["protocol"].endswith("-custom")


def test_what_warns_says_what_to_do(judgement):
    for check in judgement.checks:
        assert bool(check["advice"]) == (check["status"] in ("WARN", "FAIL")), check
        assert check["limit"] or check["status"] == "SKIP"


def test_the_number_that_is_shown_is_the_one_that_decides(judgement):
    for check in judgement.checks:
        if check["value"] is not None:
            assert fits(Check(**check)), check


def test_it_prints_in_about_ten_lines(judgement):
    lines = str(judgement).splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 80
    assert lines[0].startswith("Partly robust")
    html = judgement._repr_html_()
    assert "Partly robust" in html and f"{100 * judgement.robust:.2f}" in html


def test_the_bundle(judgement, tmp_path):
    place = judgement.save(tmp_path / "new")
    assert {p.name for p in place.iterdir()} == {"judgement.json", "witness.npz", "report.html", "CARD.md"}
    page = (place / "report.html").read_text()
    assert "Partly robust" in page and "data:image/png" in page and "not changed" not in page
    assert clustr_jax.verify(place, curved).ok
    again = clustr_jax.Judgement.load(place)
    assert again.content == judgement.content
    np.testing.assert_array_equal(again.x_adv, judgement.x_adv)


def entry_of(judgement, changes, **about):
    """The entry of a judgement whose budget is the protocol's own, and which differs in this."""
    changed = judgement.content | {"protocol": "sound-3"} | changes
    return json.loads(json.dumps(robustbench.model_info(changed, **about)))


def test_the_entry_for_robustbench(judgement):
    entry = entry_of(judgement, {}, name="toy", authors="us")
    assert entry["clean_acc"] == f"{100 * judgement.clean:.2f}" and entry["unreliable"] is False
    assert set(entry) == {
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
        "architecture", "eps", "clean_acc", "reported", "autoattack_acc", "unreliable", "footnote",
    }  # fmt: skip
    assert entry["reported"] is None  # the authors' claim is not ours to make
    assert entry_of(judgement, {}, reported="41.00")["reported"] == "41.00"
    with pytest.raises(UserError, match="did you mean authors"):
        entry_of(judgement, {}, author="us")


@pytest.mark.parametrize(
    ("eps", "norm", "bounds", "wanted"),
    [
        (8 / 255, "linf", [0.0, 1.0], "8/255"),
        (8.0, "linf", [0.0, 255.0], "8/255"),
        (16 / 255, "linf", [-1.0, 1.0], "8/255"),
        (1.0, "l2", [-1.0, 1.0], "0.5"),
    ],
)
def test_the_radius_for_robustbench_is_of_pixels_from_0_to_1(judgement, eps, norm, bounds, wanted):
    assert entry_of(judgement, {"eps": eps, "norm": norm, "bounds": bounds})["eps"] == wanted


def test_what_robustbench_cannot_take(judgement):
    with pytest.raises(UserError, match="bounds of the pixels"):
        entry_of(judgement, {"bounds": None})
    with pytest.raises(UserError, match=r"this is sound-3-custom; judge without settings="):
        judgement.robustbench()


@pytest.mark.more
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_interrupted_it_goes_on_bit_for_bit(judgement, stop, tmp_path, monkeypatch):
    """Ctrl-C at a report; the same call with the folder ends as the one that was not interrupted."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1000.0})
    calls = []

    def interrupt(text):
        if text.startswith("judge "):
            calls.append(text)
        if len(calls) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("clustr_jax.judge"), "_SECONDS", 0.0)
    with pytest.raises(attacks.Interrupted, match="the same call with folder="):
        clustr_jax.judge(
            curved, *images(), eps=EPS, slots=N, settings=small(), folder=tmp_path, progress=interrupt
        )
    assert list((tmp_path / "partial").glob("*.npz"))
    again = judged(folder=tmp_path)
    wanted, found = timeless(judgement.content), timeless(again.content)
    wanted.pop("parts"), found.pop("parts")
    assert found == wanted
    np.testing.assert_array_equal(again.x_adv, judgement.x_adv)
    assert not (tmp_path / "partial").exists()


@pytest.mark.more
def test_a_finished_folder_is_read_and_another_call_refused(judgement, tmp_path, monkeypatch):
    first = judged(folder=tmp_path)
    monkeypatch.setattr(sound_protocol, "execute", None)
    assert judged(folder=tmp_path).content == first.content
    with pytest.raises(UserError, match=r"judgement of another call \(different: model\)"):
        judged(lambda x: 1.01 * curved(x), folder=tmp_path)
    with pytest.raises(UserError, match=r"different: key, settings"):
        judged(folder=tmp_path, seed=1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(protocol="sound-1"), "did you mean sound-"),
        (dict(norm="l1"), "norm must be one of"),
        (dict(eps=-1.0), "eps must be >= 0"),
        (dict(slots=0), "slots must be at least 1"),
        (dict(ids=np.zeros(N, int)), f"ids: {N - 1} of {N} are there twice"),
        (dict(folder=""), "folder must be a path"),
        (dict(seed="a"), "seed must be a whole number"),
        (dict(seed=0.5), "seed must be a whole number"),
        (dict(x=np.zeros((0, 6, 6, 1), np.float32), y=np.zeros(0, int)), "no images"),
    ],
)
def test_mistakes_are_refused(settings, text):
    x, y = images()
    with pytest.raises(UserError, match=text):
        clustr_jax.judge(curved, **dict(x=x, y=y, eps=EPS) | settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (lambda: small(targets=0), "settings.targets must be at least 1, got 0"),
        (lambda: small(targets=3), "sound-3 says itself how many targets each attack has"),
        (lambda: small(queries=0), "settings.queries must be at least 1, got 0"),
        (lambda: small(apgd_steps=0), "settings.apgd_steps must be at least 1, got 0"),
        (lambda: small(apgd_steps=2.5), r"settings.apgd_steps must be a whole number, got 2\.5"),
        (lambda: small(attack=AttackSettings(EPS, EPS / 4, 8, 0)), "settings.attack.restarts must be at"),
        (lambda: small(attack=AttackSettings(EPS, EPS / 4, 0, 2)), "settings.attack.steps must be at least"),
        (lambda: small(attack=AttackSettings(EPS, -1.0, 8, 2)), "step_size must be >= 0"),
        (lambda: small(attack=AttackSettings(0.0, EPS, 8, 2)), "settings.attack.eps must be above 0"),
        (lambda: small(curve=(-1.0,)), "eps must be >= 0"),
        (lambda: {"steps": 3}, "settings must be EvalSettings"),
    ],
)
def test_budgets_that_attack_nothing_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        clustr_jax.judge(curved, *images(), eps=EPS, settings=settings())


def test_settings_say_how_many_restarts_and_targets_there_are():
    """And what is recorded is what was read."""
    shape = {"eps": EPS, "shape": (6, 6, 1), "classes": 3}
    subject = types.SimpleNamespace(norm="linf", bounds=(0.0, 1.0), clustered=False)
    for restarts in (2, 20):
        settings = small(attack=AttackSettings(EPS, EPS / 4, 8, restarts))
        (pma,) = [p for p in plans.SOUND_3.plans(subject, settings, **shape) if p.name == "pma"]
        assert pma.restarts == restarts
    assert plans.SOUND_3.own_targets and not plans.SOUND_2.own_targets


def test_no_radius_is_claimed_within_which_an_image_is_kept(judgement):
    """Of whatever attack found it, also where the attacks at other radii are weak."""
    weak = judged(settings=small(apgd_steps=1, curve=(1.5 * EPS, 2 * EPS, 4 * EPS)))
    for found in (judgement, weak):
        assert "targets" not in found.content["attack"]
        told = dict(found.content["curves"]["eps"])
        assert len(told) > 3
        for eps, robust in told.items():
            assert robust <= np.mean(found.distances > eps) + 1e-9, eps


def test_a_step_is_a_part_of_the_radius():
    """Settings of another radius: the step is scaled with it, and that of their own is left as it is."""
    for eps in (EPS, 4 * EPS):
        found = budgets.at_radius(small(EPS), eps, 3)
        assert (found.attack.eps, found.attack.step_size, found.slots) == (eps, eps / 4, 3)


@pytest.mark.more
@pytest.mark.parametrize(("missed", "status"), [(1, "PASS"), (3, "FAIL")])
def test_what_an_audit_breaks_is_broken(judgement, missed, status, monkeypatch):
    """A first run that misses some, and an interval that would be wide enough to hide them."""
    real, runs = sound_protocol.run_sound, []

    def careless(*arguments, found, **more):
        result, outcomes = real(*arguments, found=found, **more)
        if not runs:
            index = np.flatnonzero(~outcomes["robust"] & (outcomes["broken_by"] != "clean"))[:missed]
            outcomes["robust"][index], outcomes["broken_by"][index] = True, ""
            found.x_adv[index], found.restart[index] = arguments[2].x[index], -1
            result["robust"] = float(np.mean(outcomes["robust"]))
        runs.append(result["robust"])
        return result, outcomes

    monkeypatch.setattr(sound_protocol, "run_sound", careless)
    found = judged(audit=True)
    assert runs[0] == judgement.robust + missed / N
    assert found.robust == judgement.robust and found.content["counts"]["broken_by"]["audit"] == missed
    assert statuses(found)[29] == status and found.content["audit"]["broken_there_only"] == missed
    assert witness.check(found.content, found.witness, curved).ok
    assert found.believable == (status == "PASS")


@pytest.mark.more
def test_a_model_that_the_protocol_changed_is_noticed(monkeypatch):
    """20: the first digest is of before the protocol, not of before the checks."""
    x, y = images()
    case = judging.prepare(
        curved, x, y, eps=EPS, norm="linf", bounds=(0.0, 1.0), ids=None, protocol="sound-3",
        settings=small(), slots=N, seed=0,
    )  # fmt: skip
    state = ["before"]
    case = dataclasses.replace(case, subject=dataclasses.replace(case.subject, digest=lambda: state[0]))
    real = sound_protocol.run_sound

    def changing(*arguments, **more):
        state[0] = "after"
        return real(*arguments, **more)

    monkeypatch.setattr(sound_protocol, "run_sound", changing)
    content, _ = judging.judge(case, resuming.Kept(None, {}), lambda left, what: None)
    assert 20 in content["failed"]


def test_how_many_an_audit_may_break():
    assert [auditing.allowed(n) for n in (1, 32, 200, 201, 1000)] == [1, 1, 1, 2, 5]


@pytest.mark.slow
def test_an_audit_agrees(judgement):
    found = judged(audit=True)
    assert statuses(found)[29] == "PASS" and found.content["audit"]["agrees"]
    assert found.robust == judgement.robust


@pytest.mark.slow
def test_a_cluster_head_is_attacked_through_its_clusters():
    """A Classifier, or its logits: attacks made for clusters run, and float64 looks inside."""
    clf, x, y = fixed()
    found = judged(clf.logits, x, y)
    assert {"centroid", "away"} <= found.attacks.keys() and statuses(found)[5] == "PASS"
    assert found.believable and 0 < found.robust < found.clean
    wrong = np.asarray(clf.logits(found.x_adv)).argmax(axis=1) != y
    np.testing.assert_array_equal(found.broken_by == "", ~wrong)


@pytest.mark.slow
def test_l2_is_judged_too():
    """Linear: the smallest change is the margin over the norm of the difference of the weights."""
    w = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(N, 12)).astype(np.float32)
    z = x @ w
    y = z.argmax(axis=1)
    gaps = z[np.arange(N), y][:, None] - z
    norms = np.linalg.norm(w[:, y].T[:, :, None] - w[None], axis=1)
    exact = np.where(np.arange(3) == y[:, None], np.inf, gaps / np.maximum(norms, 1e-9)).min(axis=1)
    eps = float(np.median(exact)) * 1.01
    j = judged(lambda x: x @ w, x, y, eps=eps, norm="l2", bounds=None)
    np.testing.assert_array_equal(j.broken_by == "", exact > eps)
    assert np.linalg.norm(j.x_adv - x, axis=1).max() <= eps * (1 + 1e-5)


def test_the_names_are_functions_and_modules():
    """Whichever was imported first."""
    for name in ("judge", "verify"):
        module = importlib.import_module(f"clustr_jax.{name}")
        assert callable(module) and callable(getattr(clustr_jax, name))
        function = getattr(module, name)
        assert pickle.loads(pickle.dumps(function)) is function
