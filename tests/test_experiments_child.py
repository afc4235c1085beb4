"""What experiments share: rows that are commands and then a JSON."""

import importlib
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))
child = importlib.import_module("child")


@pytest.mark.parametrize("code", [0, 3])
def test_a_row_is_written_only_after_all_its_commands(tmp_path, code):
    target, done = tmp_path / "rows" / "row-0.json", tmp_path / "done"
    first = ["-c", f"raise SystemExit({code})"]
    second = ["-c", f"import pathlib; pathlib.Path({str(done)!r}).touch()"]
    assert child.make(target, [first, second], lambda: {"value": 1}) == code
    assert done.exists() == target.exists() == (code == 0)
    if not code:
        assert json.loads(target.read_text()) == {"value": 1}


def test_commands_are_printed_as_a_shell_takes_them():
    assert child.listed([["run.py", "--seed=1"], ["a.py"]]) == "python run.py --seed=1\npython a.py"
