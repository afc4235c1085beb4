"""Minimum norms in sound-3: the curve over the radius is an upper bound, and at eps it is the figure."""

import dataclasses
import json

import numpy as np
import pytest

import clustr_jax
from clustr_jax.evaluation import distances, plans, sound_protocol, witness, wording
from clustr_jax.evaluation.plans import Protocol, Row
from judged import EPS, N, curved, images, judged, small, timeless

DUAL = {"linf": 1, "l2": 2}


def linear(norm):
    """(model, x, y, exact distance of each image): margins over dual norms of the weights' difference."""
    w = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(N, 12)).astype(np.float32)
    z = x @ w
    y = z.argmax(axis=1)
    exact = np.full(N, np.inf)
    for i in range(N):
        for c in set(range(3)) - {y[i]}:
            size = np.linalg.norm(w[:, y[i]] - w[:, c], DUAL[norm])
            exact[i] = min(exact[i], (z[i, y[i]] - z[i, c]) / size)
    return lambda v: v @ w, x, y, exact


@pytest.mark.more
@pytest.mark.parametrize("norm", DUAL)
def test_distances_of_a_linear_model(norm):
    """Never below the exact ones, and hardly above; median and curve are counted from them."""
    model, x, y, exact = linear(norm)
    eps = float(np.median(exact)) * 1.01
    j = judged(model, x, y, eps=eps, norm=norm, bounds=None, settings=small(eps, apgd_steps=40, queries=5))
    found = j.distances
    assert (found >= exact * (1 - 1e-5)).all() and np.median(found / exact) < 1.01
    np.testing.assert_array_equal(j.broken_by == "", exact > eps)
    np.testing.assert_array_equal(j.broken_by == "", found > eps)
    told = j.content["distances"]
    assert told["median"] == np.median(found) and told["known"] == 1.0
    for radius, accuracy in told["curve"]:
        assert accuracy == np.mean(found > radius)
    assert dict(told["curve"])[eps] == j.robust and told["curve"][0] == [0.0, j.clean]
    assert f"{norm} {told['median']:.3g}" in str(j) and f"{told['median']:.3g}" in j._repr_html_()
    assert witness.check(j.content, j.witness, lambda v: np.asarray(model(v))).ok


@pytest.mark.more
def test_the_nearest_counts_where_it_lies_within_eps(monkeypatch):
    """By FMN alone; or by an attack at a larger radius whose image is brought in."""
    whole = judged()

    def nothing(near, plan, key, subject, examples, index, outcome, slots):
        return np.full(len(index), np.inf), examples.x[index]

    for row, name in ((Row("fmn", "nearest"), "fmn"), (None, sound_protocol.LARGER)):
        rows = tuple(filter(None, (Row("square", "others"), row or Row("fmn", "nearest"))))
        monkeypatch.setitem(plans.PROTOCOLS, "sound-3", Protocol("sound-3", rows, cascade=True))
        if row is None:  # FMN finds nothing
            monkeypatch.setattr(sound_protocol.Near, "look", nothing)
        j = judged()
        square = j.content["counts"]["broken_by"]["square"]
        assert square > 1 and j.attacks["fmn"]["robust"] == (j.clean if row is None else j.robust)
        assert (12 in j.content["failed"]) == (row is None)  # a black box breaks what gradients do not
        assert j.content["counts"]["broken_by"][name] > 0
        assert whole.robust <= j.robust < j.clean
        assert witness.check(j.content, j.witness, curved).ok, witness.check(j.content, j.witness, curved)
        radii = dict(j.content["curves"]["eps"])
        assert sorted(radii.values(), reverse=True) == [radii[r] for r in sorted(radii)]


@pytest.fixture(scope="module")
def bundle():
    j = judged()
    assert len(j.witness.near)
    return j.content, j.witness


def failed(content, found):
    return {what for what, good, _ in witness.check(content, found, curved).lines if not good}


@pytest.mark.more
def test_what_was_changed_is_noticed(bundle):
    content, found = bundle
    assert not failed(content, found)
    told = content["distances"]
    for name, value in (
        ("median", 2 * told["median"]),
        ("known", 0.5),
        ("curve", [[r, min(1.0, a + 0.1)] for r, a in told["curve"]]),
    ):
        changed = content | {"distances": told | {name: value}}
        assert failed(changed, found) == {f"distances: {name} is that of the images"}
    for value in (None, 3, {"curve": 3}):
        assert failed(content | {"distances": value}, found)

    def with_(**arrays):
        changed = dataclasses.replace(found, **arrays)
        return failed(content | {"sha256": witness.hashes(changed)}, changed)

    assert with_(x_near=found.x[found.near]) >= {
        "of an image that is left none is within eps", "nearest images are misclassified",
        "distances: curve is that of the images",
    }  # fmt: skip
    assert "nearest images are finite and inside the box" in with_(x_near=found.x_near + np.float32(np.nan))
    for near in (found.near + N, found.near * 0, found.near[1:]):
        assert "nearest images belong to images that are right" in with_(near=near)
    assert "sha256 of x_near" in failed(content, dataclasses.replace(found, x_near=found.x_near + 1e-7))


def test_a_bundle_of_before_is_read(bundle, tmp_path):
    """Without nearest images, and without their curve."""
    content, found = bundle
    content = {k: v for k, v in content.items() if k != "distances"}
    witness.write(tmp_path / witness.NPZ, found)
    with np.load(tmp_path / witness.NPZ) as file:
        arrays = {k: file[k] for k in file.files if k not in ("near", "x_near")}
    np.savez(tmp_path / witness.NPZ, **arrays)
    (tmp_path / witness.JSON).write_text(json.dumps(content))
    assert clustr_jax.verify(tmp_path, curved).ok


def test_nothing_known():
    """No image is right, or none has an adversarial one: no median, and a curve all the same."""
    x, y = images()
    restart, none = np.zeros(N, int), np.full(N, "")
    bare = witness.of(x, y, np.arange(N), x, none, restart, eps=EPS, norm="l2", bounds=None)
    told = distances.summary(distances.of(bare), distances.radii(EPS))
    assert told["median"] is None and told["known"] == 0.0 and told["curve"][-1][1] == 1.0
    wrong = dataclasses.replace(bare, attack=np.full(N, "clean"))
    told = distances.summary(distances.of(wrong), distances.radii(EPS))
    assert told["median"] is None and told["curve"][0][1] == 0.0
    assert wording.distance({"distances": told, "norm": "l2"}) == wording.distance({"norm": "l2"}) == ""


@pytest.mark.more
def test_an_audit_runs_no_minimum_norms():
    """They have no randomness; the curve is that of the union."""
    plain, audited = judged(), judged(audit=True)
    assert timeless(audited.content["distances"]) == timeless(plain.content["distances"])
    assert plans.SOUND_3.nearest and not plans.SOUND_3.within().nearest and not plans.SOUND_2.nearest
