"""The witness: whatever is changed in it is noticed, with NumPy alone."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import clustr_jax
from clustr_jax.evaluation import intervals, witness, wording
from clustr_jax.runtime.errors import UserError

N, EPS = 12, 0.1


def bright(x):
    """Class 0 above a half, 1 below."""
    z = 10 * (np.asarray(x).mean(axis=(1, 2, 3))[:, None] - 0.5)
    return np.concatenate([z, -z], axis=1)


def bundle():
    """(judgement.json, witness) of 12 images: 2 wrong, 4 broken by two attacks, 6 left."""
    means = np.r_[0.4, 0.3, [0.55] * 4, [0.9] * 6]
    x = np.broadcast_to(means[:, None, None, None], (N, 4, 4, 1)).astype(np.float32).copy()
    x += np.arange(N, dtype=np.float32)[:, None, None, None] / 4096  # no two are alike
    attack = np.array(["clean"] * 2 + ["pgd"] * 3 + ["square"] + [""] * 6)
    found = witness.of(
        x, np.zeros(N, int), np.arange(N) + 5, x - np.float32(EPS), attack, np.zeros(N, int), eps=EPS,
        norm="linf", bounds=(0.0, 1.0),
    )  # fmt: skip
    return content_of(found), found


def content_of(found):
    """What a judgement says of these arrays."""
    kept = int(np.sum(found.attack == ""))
    names, counts = np.unique(found.attack, return_counts=True)
    by = {str(n): int(c) for n, c in zip(names, counts, strict=True) if n not in ("", "clean")}
    right = int(np.sum(found.attack != "clean"))
    content = {
        "n": N, "clean": right / N, "clean_interval": list(intervals.wilson(right, N)),
        "constant": float(np.unique(found.y, return_counts=True)[1].max() / N),
        "checks": [{"number": 1, "status": "PASS"}, {"number": 7, "status": "FAIL"}],
        "eps": found.eps, "norm": found.norm, "bounds": [0.0, 1.0], "classes": 2, "robust": kept / N,
        "robust_interval": list(intervals.wilson(kept, N)), "sha256": witness.hashes(found),
        "counts": {"clean_wrong": N - right, "robust": kept, "broken_by": by},
    }  # fmt: skip
    told = {name: getattr(wording, name)(content) for name in ("failed", "status", "verdict")}
    return content | told


def test_checks_that_are_none_are_noticed():
    content, found = bundle()
    for checks in (None, 3, [{"number": 1}]):
        told = failed(witness.check(content | {"checks": checks}, found))
        assert "verdict is that of the checks" in told
    del content["checks"]
    assert "status is that of the checks" in failed(witness.check(content, found))


def failed(done):
    return {what for what, good, _ in done.lines if not good}


def test_what_is_right_is_verified():
    done = witness.check(*bundle(), bright)
    assert done.ok and str(done).endswith("\nverified"), done


@pytest.mark.parametrize("attack", ["clean", ""])
def test_where_nothing_was_broken_there_is_nothing_to_measure(attack):
    """Every image was wrong before, or withstood everything."""
    x = np.random.default_rng(0).uniform(size=(N, 4, 4, 1)).astype(np.float32)
    y = np.asarray(bright(x)).argmax(axis=1)
    y = 1 - y if attack == "clean" else y
    found = witness.of(
        x, y, np.arange(N), x, np.full(N, attack), np.zeros(N, int), eps=EPS, norm="l2", bounds=(0.0, 1.0)
    )
    done = witness.check(content_of(found), found, bright)
    assert done.ok, done


def changed(**arrays):
    """The bundle with other arrays, and hashes and counts made again for them."""
    _, found = bundle()
    return dataclasses.replace(found, **{name: make(getattr(found, name)) for name, make in arrays.items()})


def pushed(x_adv):
    x_adv = x_adv.copy()
    x_adv[0, 0, 0, 0] -= 2e-5
    return x_adv


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"x_adv": pushed}, "changes are inside the linf ball"),
        ({"x_adv": lambda a: a - 10}, "images are inside the box"),
        ({"x_adv": lambda a: a * np.nan}, "pixels are finite"),
        ({"y": lambda y: y + 2}, "labels are classes"),
        ({"broken": lambda b: b + 1}, "each image that was broken has its adversarial one"),
        ({"broken": lambda b: b + 100}, "adversarial images belong to images"),
        ({"ids": lambda i: i[1:]}, "arrays are of one length"),
        ({"ids": lambda i: i // 2}, "ids are distinct"),
        ({"x": lambda x: np.concatenate([x[:6], x[:1].repeat(6, 0)])}, "images are distinct"),
    ],
)
def test_arrays_that_do_not_fit_are_noticed(arrays, what):
    """Even where the hashes were made again."""
    found = changed(**arrays)
    content = content_of(found) if len(found.ids) == N else bundle()[0]
    assert what in failed(witness.check(content, found))


@pytest.mark.parametrize("name", ["x", "y", "ids", "x_adv", "attack", "restart"])
def test_an_array_that_was_changed_is_noticed(name):
    content, found = bundle()
    array = getattr(found, name).copy()
    array[0] = "other" if name == "attack" else array[0] + 1e-7 if array.dtype.kind == "f" else array[0] + 1
    assert f"sha256 of {name}" in failed(witness.check(content, dataclasses.replace(found, **{name: array})))


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("robust", 0.9, "robust accuracy is the count"),
        ("robust_interval", [0.1, 0.2], "95 % interval is Wilson's"),
        ("eps", 0.2, "eps is that of the judgement"),
        ("norm", "l2", "norm is that of the judgement"),
        ("bounds", None, "box is that of the judgement"),
        ("counts", {"clean_wrong": 2, "robust": 6, "broken_by": {"pgd": 4}}, "what each attack broke first"),
        (
            "counts",
            {"clean_wrong": 0, "robust": 6, "broken_by": {"pgd": 3, "square": 1}},
            "misclassified before",
        ),
        ("counts", {"clean_wrong": 2, "robust": 7, "broken_by": {"pgd": 3, "square": 1}}, "images left"),
        ("n", 120, "n is counted from the arrays"),
        ("clean", 1.0, "clean is counted from the arrays"),
        ("clean_interval", [0.9, 1.0], "clean_interval is counted from the arrays"),
        ("clean_interval", "none", "clean_interval is counted from the arrays"),
        ("constant", 0.1, "constant is counted from the arrays"),
        ("status", "NO CHECK FAILED", "status is that of the checks"),
        ("failed", [], "failed is that of the checks"),
        ("verdict", "Robust against all that was tried.", "verdict is that of the checks"),
    ],
)
def test_figures_that_were_changed_are_noticed(path, value, what):
    content, found = bundle()
    assert failed(witness.check(content | {path: value}, found)) == {what}


@pytest.mark.parametrize(("model", "what"), [
    (lambda x: bright(x + 0.3), {
        "images that count as wrong are misclassified", "adversarial images are misclassified",
    }),
    (lambda x: bright(x)[:, ::-1], {
        "images that count as right are classified correctly", "images that count as wrong are misclassified",
        "adversarial images are misclassified",
    }),
    (lambda x: 1e-7 * bright(x) + np.array([[0.0, 0.1]]), {
        "images that count as right are classified correctly",
    }),
])  # fmt: skip
def test_another_model_is_noticed(model, what):
    assert failed(witness.check(*bundle(), model)) == what


def test_ties_within_rounding_are_no_lie():
    """One image of four: the label and its rival are equal to six digits."""

    def rounded(x):
        z = np.array(bright(x))
        z[np.isclose(x[:, 0, 0, 0], 0.3, atol=0.01)] = 5.0, 5.0 - 1e-6
        return z

    done = witness.check(*bundle(), rounded)
    assert done.ok and "1 ties within rounding" in str(done)


def outlier(x):
    """Equal scores everywhere, and a class of one image that is far below."""
    z = np.tile([1.0, 0.9, 0.0], (len(x), 1))
    z[0, 2] = -1e6
    return z


@pytest.mark.parametrize("model", [lambda x: np.ones((len(x), 2)), outlier])
def test_more_ties_than_rounding_makes_are_another_model(model):
    done = failed(witness.check(*bundle(), model))
    assert {"images that count as wrong are misclassified", "adversarial images are misclassified"} <= done


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_misclassified(value):
    """NaN for adversarial images, say: argmax would name a class."""

    def broken(x):
        low = x.min(axis=(1, 2, 3))[:, None] < 0.5
        return np.where(low & (x.mean(axis=(1, 2, 3))[:, None] > 0.42), value, bright(x))

    assert "logits are numbers" in failed(witness.check(*bundle(), broken))


def written(folder):
    content, found = bundle()
    witness.write(folder / witness.NPZ, found)
    (folder / witness.JSON).write_text(json.dumps(content))
    return folder


def run(*arguments, folder):
    code = "import sys; from clustr_jax.verify import main; code = main(sys.argv[1:]); "
    code += "print('jax' in sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=folder
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_needs_numpy_alone(tmp_path, monkeypatch):
    """And a model of one's own module; 0 verified, 1 not, 2 a mistake."""
    monkeypatch.setenv("PYTHONPATH", str(__import__("pathlib").Path(clustr_jax.__file__).parents[1]))
    written(tmp_path)
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def bright(x):\n    z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)\n"
        "    return np.concatenate([z, -z], axis=1)\n"
        "def dark(x):\n    return -bright(x)\n"
    )
    assert run(tmp_path, folder=tmp_path)[1].endswith("verified\nFalse\n")
    code, told, _ = run(tmp_path, "--model=own:bright", folder=tmp_path)
    assert code == 0 and "ok    adversarial images are misclassified: 4 of 4" in told
    code, told, _ = run(tmp_path, "--model=own:dark", folder=tmp_path)
    assert code == 1 and "NOT verified" in told
    for wrong in ("own", "own:no", "none.pt2", "nowhere:f"):
        code, _, stderr = run(tmp_path, f"--model={wrong}", folder=tmp_path)
        assert code == 2 and stderr.startswith("error: model ") and stderr.count("\n") == 1


def test_a_damaged_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no judgement\.json"):
        clustr_jax.verify(tmp_path)
    written(tmp_path)
    (tmp_path / witness.NPZ).write_bytes(b"PK and nothing")
    with pytest.raises(UserError, match="cannot be read"):
        clustr_jax.verify(tmp_path)


def test_a_deployed_rule_counts_as_in_the_attacks():
    """What the logits have right and the nearest clusters wrong is wrong, of a Classifier and of its view."""
    from test_golden import fixed

    clf, *_ = fixed()
    clf = clf.replace(nearest=1)
    x = np.random.default_rng(0).uniform(size=(200, 6, 6, 2)).astype(np.float32)
    logits, deployed = np.asarray(clf.logits(x)).argmax(axis=1), np.asarray(clf.predict(x))
    apart = np.flatnonzero(logits != deployed)[:5]
    same = np.flatnonzero(logits == deployed)[:5]
    assert len(apart) and len(same)
    index = np.r_[apart, same]
    y = logits[index]
    attack = np.where(np.arange(len(index)) < len(apart), "clean", "")
    found = witness.of(
        x[index],
        y,
        index,
        x[index],
        attack,
        np.zeros(len(index), int),
        eps=EPS,
        norm="linf",
        bounds=(0.0, 1.0),
    )
    content = content_of(found)
    about = {"images that count as wrong are misclassified", "logits are numbers"}
    for model in (clf, clf.view):
        assert not failed(witness.check(content, found, model)) & about
    assert "images that count as wrong are misclassified" in failed(witness.check(content, found, clf.logits))


@pytest.mark.parametrize(
    "change",
    [
        {"bounds": 5}, {"robust": "x"}, {"counts": None}, {"robust_interval": [None, None]}, {"classes": "3"},
        {"sha256": None}, {"counts": {"broken_by": 3}}, {"robust_interval": 0.5}, {"robust": None},
    ],
)  # fmt: skip
def test_a_judgement_of_another_form_is_not_verified(change, tmp_path):
    """One line says so: whoever verifies has not written it."""
    written(tmp_path)
    path = tmp_path / witness.JSON
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    done = clustr_jax.verify(tmp_path)
    assert not done.ok and "NOT verified" in str(done)
    for other in ([], "text", 3):
        path.write_text(json.dumps(other))
        done = clustr_jax.verify(tmp_path)
        assert not done.ok and done.lines[-1][0] == "judgement.json is as a judgement is written"
