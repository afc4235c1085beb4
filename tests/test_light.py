"""The core is light: attacks need JAX and NumPy; what the rest needs is named with its command."""

import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

from clustr_jax.command import COMMANDS
from clustr_jax.runtime.extras import EXTRAS

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = {*sum(EXTRAS.values(), ())}
# Of a package, its name on the index where that is another one.
ON_THE_INDEX = {
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "PIL": "pillow",
    "absl": "absl-py",
    "sklearn": "scikit-learn",
}


def python(code):
    """What a fresh process prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "what",
    [
        "import clustr_jax",
        "from clustr_jax import attacks, losses, clusters, certify, lipschitz, kmeans",
        "from clustr_jax import Clusters, Classifier, UserError",
        "from clustr_jax.settings import EvalSettings",
        "from clustr_jax import judge, verify",
    ],
)
def test_the_core_imports_nothing_heavy(what):
    listed = "json.dumps(sorted({m.split('.')[0] for m in sys.modules}))"
    found = python(f"{what}; import json, sys; print({listed})")
    assert not HEAVY & set(found)


BLOCKED = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
{code}
"""


@pytest.mark.more
def test_autoattack_runs_without_any_extra():
    code = """
import jax, jax.numpy as jnp, numpy as np
from clustr_jax import attacks
def logits(x):
    z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    return jnp.concatenate([z, -z], axis=1)
x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
found = attacks.autoattack(jax.random.key(0), logits, x, np.array([0, 0]), eps=0.1, slots=2)
print(json.dumps(found.robust.tolist()))
"""
    assert python(BLOCKED.format(blocked=sum(EXTRAS.values(), ()), code=code)) == [False, True]


REPORT_ALONE = tuple(sorted(HEAVY - {*EXTRAS["report"], "rich", "PIL"}))


def test_a_judgements_page_needs_the_extra_report_alone():
    code = "from clustr_jax.report import judgement_page; print(json.dumps(judgement_page.__name__))"
    assert python(BLOCKED.format(blocked=REPORT_ALONE, code=code)) == "clustr_jax.report.judgement_page"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocked", "files"),
    [
        (tuple(sorted(HEAVY)), {"judgement.json", "witness.npz", "CARD.md"}),
        (REPORT_ALONE, {"judgement.json", "witness.npz", "CARD.md", "report.html"}),
    ],
)
def test_judge_runs_without_extras(tmp_path, blocked, files):
    """Without any the bundle lacks report.html alone, and one line says what would make it."""
    code = f"""
import jax.numpy as jnp, numpy as np
import clustr_jax
def logits(x):
    z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    return jnp.concatenate([z, -z], axis=1)
x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
j = clustr_jax.judge(logits, x, np.array([0, 0]), eps=0.1, slots=2, folder={str(tmp_path)!r})
print(json.dumps([j.robust, clustr_jax.verify({str(tmp_path)!r}, logits).ok]))
"""
    assert python(BLOCKED.format(blocked=blocked, code=code)) == [0.5, True]
    assert {p.name for p in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("clustr_jax.load", "flax", "train"),
        ("clustr_jax.stages", "optax", "train"),
        ("clustr_jax.models", "flax", "train"),
        ("clustr_jax.report", "jinja2", "report"),
    ],
)
def test_what_is_missing_is_named_with_its_command(code, package, extra):
    name = code.partition(".")[2]
    attempt = f"""
import clustr_jax
try:
    from clustr_jax import {name}
except clustr_jax.UserError as error:
    print(json.dumps([str(error), isinstance(error, ImportError)]))
"""
    told, also = python(BLOCKED.format(blocked=(package,), code=attempt))
    assert (
        also
        and told.startswith("clustr_jax.")
        and told.partition(" ")[2]
        == (
            f"needs {package}, which is not installed: pip install 'clustr-jax[{extra}]', "
            f"or 'clustr-jax[all]' for everything"
        )
    )


def test_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {r.split(">")[0].split("[")[0].strip() for r in requirements}

    extras = project["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert {ON_THE_INDEX.get(p, p) for p in packages} <= names(extras[extra]), extra
    assert names(project["dependencies"]) == {"jax", "jaxtyping", "numpy"}
    assert set(sum((extras[extra] for extra in EXTRAS), [])) == set(extras["all"])


def test_the_wheel_has_every_package_and_the_configs():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "clustr_jax").rglob("*.py")}
    places = {p.parent.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.py")}
    configs = {f"clustr_jax.{'.'.join(place.parts)}": place.as_posix() for place in places}
    assert set(tools["packages"]) == folders | configs.keys()
    assert tools["package-dir"] == configs


def console(*arguments, blocked=()):
    """(exit code, stdout, stderr) of the console command."""
    code = BLOCKED.format(
        blocked=blocked, code=f"from clustr_jax.command import main\nsys.exit(main({list(arguments)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.more
def test_the_console_command():
    assert "  train  " in console("--help")[1] and console()[0] == 2
    code, stdout, _ = console("fidelity")
    assert code == 0 and stdout.startswith("| `config.fidelity.`")
    assert console("prepare")[0] == console("report")[0] == 2
    assert console("train", "--list")[1].startswith("configs")
    code, _, stderr = console("trian")
    assert code == 2 and stderr == (
        f"error: unknown command 'trian' (did you mean train?); known: {', '.join(COMMANDS)}\n"
    )
    for name in ("train", "report", "quirks"):
        code, _, stderr = console(name, "x", blocked=("flax", "ml_collections", "jinja2"))
        assert code == 2 and stderr.count("\n") == 1 and "pip install 'clustr-jax[" in stderr
