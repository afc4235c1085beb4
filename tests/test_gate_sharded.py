"""Models whose parameters are spread over devices: the gate takes them, with their current weights.

The work is done by `sharded_models.py` in a process with eight virtual devices.
"""

import pytest

import eight_devices

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return eight_devices.run("sharded_models")


def test_outcomes_are_those_on_one_device(found):
    """Wherever parameters and images are, before and after an update: no old weights."""
    assert len(found["found"]) > 40
    assert {case: value for case, value in found["found"].items() if value[0] > 2e-5} == {}


def test_an_update_compiles_nothing(found):
    assert {case: value for case, value in found["found"].items() if value[1]} == {}


def test_arrays_on_different_devices_are_one_line(found):
    text = found["apart"]
    assert "different devices" in text and "jax.device_put(arrays, sharding)" in text
    assert len(text) <= 500 and "\n" not in text
