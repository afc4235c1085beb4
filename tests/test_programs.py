"""The programs beside run.py: switches of JAX, streams, mistakes and interrupts, the same at each of them."""

import errno
import io
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from clustr_jax import stages
from clustr_jax.data import mend, prepare
from clustr_jax.doors import pytorch
from clustr_jax.evaluation import quirks
from clustr_jax.reference import switches
from clustr_jax.report import __main__ as report
from clustr_jax.runtime import programs
from clustr_jax.runtime.errors import UserError
from runs import ROOT, arrays, read
from smoke_runs import toy2d
from test_surroundings_switches import OTHER, numbers, switch  # noqa: F401  a fixture

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)
# Under these a run cannot end.
IMPOSSIBLE = {"jax_disable_jit": True, "jax_check_tracer_leaks": True, "jax_transfer_guard": "disallow"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of a small trained network on points."""
    root = tmp_path_factory.mktemp("trained") / "run"
    with jax.debug_key_reuse(False):
        stages.run(toy2d("clustr_qtrades"), str(root), ("1_warmup", "2_train"), quiet=True)
    return root


def of_quirks(root, tmp_path):
    assert quirks.main([str(root), "--n=12", "--steps=2", "--restarts=2"]) == 0
    found = read(root / "results" / "quirks.json")
    kept = {name: found[name] for name in ("clean", "robust", "rows", "adaptive", "network_sha")}
    return json.dumps(kept), *arrays(root / "results" / "quirks.npz").values()


def of_report(root, tmp_path):
    assert report.main([str(root)]) == 0
    # a drawing of the embeddings, which are computed for it
    return tuple(
        re.sub(r"<metadata>.*?</metadata>", "", path.read_text(), flags=re.DOTALL)
        for path in sorted((root / "figures").glob("embed*.svg"))
    )


def of_comparison(root, tmp_path):
    again = shutil.copytree(root, tmp_path / "again", dirs_exist_ok=True)
    assert report.main([str(root), str(again), f"--out={tmp_path / 'both.html'}"]) == 0
    return ((tmp_path / "both.html").read_text(),)


def of_pytorch(root, tmp_path):
    found = []

    def save(clf, path, source):
        found.extend((np.asarray(clf.logits(np.full((3, 2), 0.25))), *numbers()))
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch, "save", save)
        assert pytorch.main([str(root), f"--out={tmp_path / 'model.pt'}"]) == 0
    return tuple(found)


COMPUTE = {
    "quirks": of_quirks,
    "report": of_report,
    "report of several": of_comparison,
    "doors.pytorch": of_pytorch,
}


@pytest.mark.more
@pytest.mark.parametrize("name", COMPUTE)
def test_a_programs_numbers_do_not_depend_on_switches(name, trained, switch, tmp_path, capsys):  # noqa: F811
    """All switches at once; which of them would change what is in test_surroundings_switches.py."""
    with jax.debug_key_reuse(False):
        expected = COMPUTE[name](trained, tmp_path)
        assert expected and capsys.readouterr().err == ""
        for option, value in OTHER.items():
            switch(option, value)
        found = COMPUTE[name](trained, tmp_path)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and all(option.upper() in line for option in OTHER)
    assert all(getattr(jax.config, option) == value for option, value in OTHER.items())


@pytest.mark.parametrize("option", IMPOSSIBLE)
@pytest.mark.parametrize("main", [quirks.main, report.main, pytorch.main])
def test_a_switch_under_which_nothing_works_is_one_line(main, option, switch, tmp_path, capsys):  # noqa: F811
    switch(option, IMPOSSIBLE[option])
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and option.upper() in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("main", [quirks.main, report.main, pytorch.main, mend.main])
def test_help_is_given_under_any_switch(main, switch, capsys):  # noqa: F811
    for option, value in (OTHER | IMPOSSIBLE).items():
        switch(option, value)
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    captured = capsys.readouterr()
    assert left.value.code == 0 and "usage" in captured.out and captured.err == ""


# Where JAX computes nothing, its switches are nobody's business.


@pytest.mark.parametrize("option", [*OTHER, *IMPOSSIBLE])
def test_a_program_without_numbers_does_not_ask_for_switches(option, switch, monkeypatch, tmp_path, capsys):  # noqa: F811
    switch(option, (OTHER | IMPOSSIBLE)[option])
    assert switches.main([]) == 0
    assert mend.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert prepare.main(["cifar10", str(tmp_path)]) == 2
    assert option.upper() not in capsys.readouterr().err


# Any program


@pytest.mark.parametrize("computes", [True, False])
def test_how_a_program_ends(computes, capsys):
    def ending(error):
        @programs.program(computes=computes)
        def main(argv):
            raise error

        code = main([])
        return code, capsys.readouterr().err

    code, text = ending(UserError("a\nb" + 600 * "x"))
    assert code == 2 and text.startswith("error: a b") and text.count("\n") == 1 and len(text) <= 500
    code, text = ending(OSError(errno.ENOSPC, "No space left on device", "file"))
    assert code == 2 and text == "error: No space left on device: file\n"
    assert ending(KeyboardInterrupt()) == (130, "interrupted\n")
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not hidden
        ending(ZeroDivisionError())


@pytest.mark.parametrize("main", [switches.main, quirks.main, prepare.main])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_programs_output_ends_nothing(main, encoding, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(["nirgendwo-\u00e4"]) in (0, 2)


MODULES = ["report", "quirks", "fidelity", "prepare", "doors.pytorch", "data.mend"]


@pytest.mark.parametrize("module", MODULES)
def test_a_switch_that_jax_does_not_understand_is_one_line(module, start):
    """JAX reads it when it is imported, which a program's own package does."""
    process = start(program=("-m", f"clustr_jax.{module}"), JAX_ENABLE_X64="maybe", PYTHONPATH=str(ROOT))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stdout == "", stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and "maybe" in stderr


@pytest.mark.parametrize("name", ["report", "quirks", "fidelity", "prepare"])
def test_so_it_is_for_the_console_command(name, start):
    code = f"import sys; from clustr_jax.command import main; sys.exit(main([{name!r}]))"
    process = start(program=("-c", code), JAX_NUMPY_DTYPE_PROMOTION="some", PYTHONPATH=str(ROOT))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr


def test_every_program_of_the_package_is_one():
    """Whatever can be started with `python -m clustr_jax.NAME` begins and ends as the others."""
    package = ROOT / "clustr_jax"
    found = {
        path.relative_to(package).with_suffix("").as_posix(): path.read_text()
        for path in package.rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text()
    }
    assert found.keys() >= {"report/__main__", "quirks", "fidelity", "prepare", "doors/pytorch", "data/mend"}
    for name, text in found.items():
        assert "\n@program" in text or re.search(r"^from clustr_jax\.\S+ import main$", text, re.M), name
