"""Training images sharded by rows: the same training, bit for bit, and what is chosen, said and refused.

The work of eight virtual devices is done by `sharded_sets.py` in a process of its own, as for test_mesh.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eight_devices
from clustr_jax.reference.switches import SWITCHES
from clustr_jax.runtime import memory, mesh
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import Settings
from clustr_jax.stages import refusals
from clustr_jax.training import placement
from clustr_jax.training.placement import Placement
from clustr_jax.training.train_state import TrainSet
from linear_problems import get_config
from marks import in_ci

GB = 10**9
# Those of sharded_sets.KINDS.
KINDS = (
    "epochs", "alternating flips", "replays", "magnet", "stale", "the authors' clusters", "learned head",
    "learned head, magnet", "linear head, magnet", "average",
)  # fmt: skip


def test_rows_are_taken_by_id_from_the_devices_that_have_them():
    assert eight_devices.run("sharded_sets", "taken") == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", in_ci(KINDS, "magnet", "the authors' clusters"))
def test_a_sharded_set_trains_bit_for_bit_as_one_on_every_device(kind):
    """States before, after and refitted, what the next step sees, embeddings in eval and in train mode.

    A device holds a share of the images. It receives a batch of them for each step, with the ids, and nothing
    for embedding the set.
    """
    found = eight_devices.run("sharded_sets", "compared", kind)[kind]
    assert found["equal"] == [True] * 7 and found["moved"]
    every, own = found["every_device"], found["sharded"]
    assert every["arguments"] - own["arguments"] == (163 - 21) * found["image"]
    assert own["received"] - every["received"] == found["batch"] * (found["image"] + 4)
    assert own["embedding"] == every["embedding"]


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_the_other_placement(tmp_path):
    assert set(eight_devices.run("sharded_sets", "resumed", tmp_path).values()) == {True}


@pytest.mark.slow
def test_a_work_directory_goes_on_with_the_other_placement(tmp_path):
    """The second stage of run.py is sharded: equal metrics and weights; done.json says which it was."""
    found = eight_devices.run("sharded_sets", "run", tmp_path)
    assert [found[name].pop("placement") for name in ("same", "other")] == ["every_device", "sharded"]
    assert found["same"] == found["other"] and len(found["same"]["metrics"]) == 2


@pytest.mark.parametrize("limit", [None, 4 * GB])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("asked", placement.KNOWN)
def test_what_is_chosen_goes_by_size(asked, devices, limit, monkeypatch):
    """auto: by a quarter of a device's memory, or by 1 GiB; one device has nothing to share."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(memory, "of_device", lambda: limit)
    least = 2**30 if limit is None else GB
    for whole, large in ((least - 2**20, False), (least + 1, True)):
        found = placement.of("data", asked, whole, devices)
        wanted = devices > 1 and (asked == "sharded" or (asked == "auto" and large))
        assert found == Placement(wanted, whole, devices)
        assert found.each == (-(-whole // devices) if wanted else whole)
        assert ("sharded by rows" in str(found)) == wanted == (found.name == "sharded")


def test_virtual_devices_share_the_memory_of_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "of_device", lambda: 16 * GB)
    assert placement.of("data", "auto", GB, 1) == Placement(False, GB, 1)
    assert placement.of("data", "auto", GB, 8) == Placement(True, GB, 8)


@pytest.mark.parametrize(
    ("asked", "whole", "devices", "remedy"),
    [
        ("auto", 40 * GB, 8, "use more devices, or fewer or smaller images (data.train_size)"),
        ("sharded", 40 * GB, 8, "use more devices"),
        ("every_device", 5 * GB, 8, "set data.placement=sharded"),
        ("auto", 5 * GB, 1, "use more devices"),
        ("evry_device", 1, 1, "did you mean every_device"),
    ],
)
def test_what_no_device_can_hold_is_refused(asked, whole, devices, remedy, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(memory, "of_device", lambda: 4 * GB)
    with pytest.raises(UserError) as error:
        placement.of("data", asked, whole, devices)
    message = str(error.value)
    assert remedy in message and "\n" not in message and len(message) <= 500
    monkeypatch.setattr(memory, "of_device", lambda: None)  # where nothing is known nothing is refused
    if asked in placement.KNOWN:
        placement.of("data", asked, whole, devices)


def test_the_authors_leak_needs_all_images_at_once():
    authors = SWITCHES["epoch_statistics"].authors
    leaking = Settings.of(get_config("clustr", "digits", **{"fidelity.epoch_statistics": authors}))
    refusals.check_leak(leaking, Placement(False, 10, 8))
    for method in ("clustr", "clustr_qtrades"):  # the latter takes statistics of some of the images
        refusals.check_leak(Settings.of(get_config(method, "digits")), Placement(True, 10, 8))
    with pytest.raises(UserError, match="epoch_statistics=keep, or data.placement=every_device"):
        refusals.check_leak(leaking, Placement(True, 10, 8))


def test_one_device_has_all_rows(rng):
    """Without a mesh a set that is called sharded is any other set."""
    images, ids = rng.integers(0, 256, (9, 4, 4, 1)).astype(np.uint8), np.array([8, 0, 8, 3])
    train_set = TrainSet(mesh.scatter(images), np.arange(9), 255.0, "none", sharded=True)
    assert train_set.images.shape == images.shape and train_set.images.dtype == np.uint8
    for found, expected in zip(
        train_set.batch(ids),
        TrainSet(jnp.asarray(images), np.arange(9), 255.0, "none").batch(ids),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
