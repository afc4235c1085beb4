"""Settings that came later: work directories of before stay what they are."""

import copy
import json

import pytest

from clustr_jax import UserError
from clustr_jax.stages import evaluation
from clustr_jax.storage import additions
from clustr_jax.storage.workdir import Workdir, config_dict, training_sha
from linear_problems import get_config


def older(content):
    """As config.json was before there were these settings."""
    content = copy.deepcopy(content)
    for section, name in additions.ADDED:
        del content[section][name]
    return content


def test_a_config_without_them_is_one_that_has_their_old_value():
    content = config_dict(get_config("trades"))
    before = older(content)
    assert additions.plain(content) == before and additions.filled(before) == content
    assert training_sha(content) == training_sha(before)
    assert evaluation._identity(get_config("trades"), "clean")  # of JSON values without them, too


@pytest.mark.parametrize(
    "changes",
    [{"train.nesterov": False}, {"warmup.nesterov": False}, {"fidelity.running_variance": "unbiased"}],
)
def test_another_value_is_another_training(changes, tmp_path):
    config = get_config("trades")
    workdir = Workdir(tmp_path / "run")
    workdir.root.mkdir()
    (workdir.root / "config.json").write_text(json.dumps(older(config_dict(config))))
    workdir.open(config)  # and goes on
    assert training_sha(config_dict(get_config("trades", **changes))) != training_sha(config_dict(config))
    (workdir.root / "config.json").write_text(json.dumps(older(config_dict(config))))
    with pytest.raises(UserError, match=next(iter(changes))):
        workdir.open(get_config("trades", **changes))


def test_the_preset_has_them_all():
    fidelity = get_config("clustr", **{"fidelity.preset": "paper_code"}).fidelity
    assert (
        fidelity.running_variance == "unbiased" and get_config("clustr").fidelity.running_variance == "biased"
    )
