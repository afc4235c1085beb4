"""experiments/certified.py: its rows are settings of a config that a run takes, and what its table says."""

import importlib
import json
import pathlib

import pytest

from clustr_jax import models
from clustr_jax.evaluation import certificates
from clustr_jax.settings import CertifySettings, MagnetSettings, Settings
from clustr_jax.stages import configuration

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module("experiments.certified")


def test_every_row_is_a_config_that_can_be_certified(rows):
    names = [*rows.ROWS, *(f"orthogonal+{head}" for head in rows.HEADS)]
    for name in names:
        config = importlib.import_module("configs.cifar10").get_config("clustr_certified,cpu")
        for key, value in rows.settings(name, 1).items():
            section, _, field = key.rpartition(".")
            place = config[section] if section else config
            assert field in place, key  # a lock would refuse it on the command line
            place[field] = str(value) if isinstance(value, pathlib.Path) else value
        settings = Settings.of(configuration.resolve(config))
        assert settings.model.name in models.UNIT
        certificates.check_config(
            CertifySettings.of(config.certify), MagnetSettings.of(config.magnet), config.eval.nearest
        )


@pytest.mark.parametrize("name", ["orthogonl", "orthogonal+", "orthogonal+nothing", "+centroids"])
def test_other_names_are_refused(rows, name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["certified.py", f"--only=cpl,{name}", "--list"])
    with pytest.raises(SystemExit) as left:
        rows.main()
    told = capsys.readouterr()
    assert left.value.code == 2 and not told.out
    assert told.err.startswith(f"error: --only: unknown {name!r}; known: orthogonal, ")


def test_rows_and_other_heads_have_their_commands(rows, monkeypatch, capsys):
    for asked, lines in (("--only=cpl+centroids-2", 2), ("--only=cpl", 1), ("--seed=0", len(rows.ROWS))):
        monkeypatch.setattr("sys.argv", ["certified.py", asked, "--list"])
        monkeypatch.setattr(rows, "RUNS", pathlib.Path("nowhere"))
        assert rows.main() == 0
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_another_head_starts_from_the_row_s_network_and_trains_nothing(rows):
    found = rows.settings("cpl+centroids-2", 3)
    assert found["init_from"] == pathlib.Path("runs/certified/cpl-3/1_warmup") and found["warmup.epochs"] == 0
    assert found["magnet.k"] == 2 and found["magnet.fit"] == "kmeans" and found["train.epochs"] == 0
    assert "--config.magnet.k=2" in rows.command("cpl+centroids-2", 3)


def test_the_table_says_what_is_there(rows, tmp_path, monkeypatch):
    row = {
        "seed": 0, "certified": 0.53, "certified_interval": [0.52, 0.54], "clean": 0.63, "radius": "0.141176",
        "sweep": {"0.141176": 0.53, "0.282353": 0.4, "0.423529": 0.3, "1.000000": 0.05},
        "training_seconds": 600.0, "images_per_second": 812.4, "lipschitz": {"lower": 0.9, "upper": 1.0001},
    }  # fmt: skip
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    (tmp_path / rows.RESULTS).mkdir(parents=True)
    (tmp_path / rows.RESULTS / "long-0.json").write_text(json.dumps(row))
    line = rows.table().splitlines()[-1]
    expected = [
        "long",
        "0",
        "10",
        "812",
        "63.0",
        "53.0 [52.0, 54.0]",
        "40.0",
        "30.0",
        "5.0",
        "0.900 to 1.0001",
    ]
    assert [cell.strip() for cell in line.strip("|").split("|")] == expected
