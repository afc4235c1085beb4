"""Checkpoints of a training: restored states go on, the newest and the best are kept."""

import jax
import pytest

from clustr_jax.clusters import Clusters
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.training import train
from runs import assert_same_arrays
from small_training import problem


@pytest.mark.more
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("nominal", {}),
        ("free_at", {"train.replays": 2}),
        ("clustr_qtrades", {"train.ema": 0.9, "magnet.k_per_class": (1, 2, 3)}),
        ("clustr", {"train.optimizer": "sgd"}),
        ("nominal", {"train.lookahead": 2, "train.norm_bias_rate": 64.0}),
        ("clustr_at", {"train.ema": 0.0, "train.learn_variance": True, "magnet.k_per_class": (1, 2, 3)}),
        ("clustr_at", {"train.ema": 0.9, "train.sampler": "magnet"}),
        ("clustr_at", {"train.ema": 0.9, "train.centroids": "simplex", "magnet.k": 1}),
        ("clustr_at", {"train.ema": 0.0, "train.centroids": "simplex", "train.learn_variance": True}),
        ("linear_at", {"train.ema": 0.9, "train.sampler": "magnet"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_restored_state_goes_on_as_if_nothing_had_happened(method, changes, rng, tmp_path):
    """Saved after 2 steps and restored into a blank state: every leaf, and the third step, bit for bit."""
    p = problem(method, rng, **{"train.batch_size": 8, **changes})
    state = p.run(p.state, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a training")
    assert checkpoints.latest is None
    checkpoints.save(state)
    checkpoints.close()
    reader = Checkpoints(tmp_path / "checkpoints", "a training")
    assert reader.latest == 2
    net = p.trainer.net
    blank = train.blank(p.trainer, net.init(jax.random.key(99)), p.train_set, jax.random.key(98))
    restored = reader.restore(blank)
    assert_same_arrays(restored, state)
    assert_same_arrays(p.run(restored, 1), p.run(state, 1))
    variables, clusters = state.deployed
    assert_same_arrays(reader.model(jax.eval_shape(net.init, jax.random.key(0))), variables)
    if clusters is not None:
        stored = reader.clusters(net.num_classes, clusters.centroids.shape[1], clusters.centroids.shape[2])
        assert isinstance(stored, Clusters)
        assert_same_arrays(stored, clusters)
    reader.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_newest_two_and_the_best_are_kept(rng, tmp_path):
    """By held-out accuracy; what was saved without one, within an epoch, is no candidate."""
    p = problem("nominal", rng, **{"train.batch_size": 8})
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a training", mend=True)
    state, saved = p.state, {}
    for accuracy in (0.5, 0.9, None, 0.7, 0.6):
        state = p.run(state, 1)
        saved[int(state.step)] = state
        checkpoints.save(state, accuracy)
    checkpoints.wait()
    assert checkpoints.best == 2 and checkpoints.latest == 5
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {2, 4, 5}
    assert {int(path.stem) for path in (tmp_path / "seals").iterdir()} == {2, 4, 5}
    abstract = jax.eval_shape(p.trainer.net.init, jax.random.key(0))
    assert_same_arrays(checkpoints.model(abstract, checkpoints.best), saved[2].variables)
    checkpoints.close()
