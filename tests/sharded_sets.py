"""Prints, as JSON, what eight virtual devices make of a train set that is sharded: see test_placement.py."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import clustr_jax
import on_devices
from clustr_jax import stages
from clustr_jax.runtime import mesh
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.training import placement, refit, train
from configs import digits

SIZE, STEPS = 163, 3  # a number of images that eight devices do not divide
BATCH, BATCHES = 16, 4  # of clean statistics: fewer batches than the set has
KEY = jax.random.key(0)
# method, and what of its config decides how images are drawn and the set is embedded
KINDS = {
    "epochs": ("nominal", {}),
    "alternating flips": ("nominal", {"data__augment": "translate_alternate"}),
    "replays": ("free_at", {}),
    "magnet": ("clustr_qtrades", {}),
    "stale": ("magnet", {"fidelity__sampler": "stale", "fidelity__small_clusters": "skip"}),
    "the authors' clusters": (
        "magnet",
        {
            "fidelity__cluster_images": "augmented",
            "fidelity__first_clusters": "train",
            "fidelity__variance_images": "augmented",
        },
    ),
    "learned head": ("clustr_at", {}),
    "learned head, magnet": ("clustr_at", {"train__sampler": "magnet"}),
    "linear head, magnet": ("linear_at", {"train__sampler": "magnet"}),
    "average": ("clustr_qtrades", {"train__ema": 0.9}),
}


def same(one, other):
    """Whether two trees have the same bits."""

    def bits(leaf):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return np.asarray(leaf)

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bits(a).tobytes() == bits(b).tobytes() for a, b in pairs)


def problem(kind):
    """(trainer, variables, placement -> train set on the devices)"""
    method, changes = KINDS[kind]
    trainer, variables, train_set = on_devices.prepare(method, False, **changes)
    images = np.asarray(train_set.images)

    def placed(name):
        lies = placement.of("data", name, images.nbytes, mesh.devices())
        return train_set.replace(
            images=lies.put(images), labels=mesh.place(train_set.labels), sharded=lies.sharded
        )

    return trainer, variables, placed


def begun(trainer, variables, train_set):
    state = refit.begin(trainer, mesh.place(train.create(trainer, variables)), train_set, KEY)
    return mesh.place(train.with_totals(trainer, state, train_set, KEY))


def compared(kind):
    """Every state, batch and embedding of a short training, by the two placements; and what it costs."""
    trainer, variables, placed = problem(kind)
    order, found, rows = train.epoch_order(KEY, SIZE, 0), [], []
    refit._BATCHES = BATCHES
    for name in (placement.EVERY_DEVICE, placement.SHARDED):
        train_set = placed(name)
        state = begun(trainer, variables, train_set)
        arguments = (trainer, state, train_set, order, KEY, STEPS)
        compiled = train.run_steps.lower(*arguments).compile()
        after = train.run_steps(*arguments)
        again = refit.refit(trainer, after, train_set, KEY) if trainer.magnet else after
        found.append(
            (
                state,
                after,
                again,
                train.seen(trainer, after, train_set, order, KEY),
                refit.embed_all(trainer.net, after.variables, train_set),
                refit.embed_all(trainer.net, after.variables, train_set, KEY, train_mode=True),
                refit.with_clean_statistics(trainer, after, train_set.replace(authors_batch=BATCH), KEY),
            )
        )
        embedding = refit.embed_all.lower(trainer.net, after.variables, train_set).compile()
        rows.append(
            {
                "received": mesh.received(compiled),
                "arguments": compiled.memory_analysis().argument_size_in_bytes,
                "embedding": mesh.received(embedding),
            }
        )
    image = int(np.prod(trainer.net.input_shape))
    return {
        "equal": [same(one, other) for one, other in zip(*found, strict=True)],
        "moved": not same(found[0][0].params, found[0][1].params),
        "every_device": rows[0],
        "sharded": rows[1],
        "image": image,
        "batch": trainer.batch_size,
    }


def taken():
    """Rows by id, of numbers of rows that devices divide or not, in and out of `spread`, of two types."""
    rng, wrong = np.random.default_rng(0), []
    for count in (1, 7, 8, 9, 64, 65):
        for kind in (np.uint8, np.float32):
            whole = rng.integers(0, 256, (count, 3, 2)).astype(kind)
            ids = rng.integers(0, count, 16).astype(np.int32)
            rows = mesh.scatter(whole)
            outside = jax.jit(mesh.taken)(rows, ids)
            inside = mesh.spread(
                lambda rows, ids: mesh.gather(mesh.taken(rows, ids)), (mesh.ROWS, mesh.ROWS), mesh.SAME
            )(rows, ids)
            shares = {shard.data.shape[0] for shard in rows.addressable_shards}
            if not (
                np.array_equal(outside, whole[ids])
                and np.array_equal(inside, whole[ids])
                and shares == {-(-count // 8)}
                and inside.dtype == outside.dtype == kind
            ):
                wrong.append((count, kind.__name__))
    return wrong


def resumed(folder):
    """A checkpoint of one placement, gone on with by the other: as if nothing had happened."""
    trainer, variables, placed = problem("magnet")
    order, found = train.epoch_order(KEY, SIZE, 0), {}
    for first, then in (
        (placement.SHARDED, placement.EVERY_DEVICE),
        (placement.EVERY_DEVICE, placement.SHARDED),
    ):
        state = train.run_steps(
            trainer, begun(trainer, variables, placed(first)), placed(first), order, KEY, 2
        )
        checkpoints = Checkpoints(pathlib.Path(folder, first), "test", mend=True)
        checkpoints.save(state)
        checkpoints.close()
        blank = train.blank(trainer, trainer.net.init(jax.random.key(9)), placed(then), KEY)
        restored = mesh.place(Checkpoints(pathlib.Path(folder, first), "test").restore(blank))
        found[f"{first}, then {then}"] = same(
            train.run_steps(trainer, restored, placed(then), order, KEY, 2),
            train.run_steps(trainer, state, placed(first), order, KEY, 2),
        )
    return found


def whole_run(folder):
    """run.py's stages: one directory all on every device, one whose second stage is sharded."""
    found = {}
    for name, second in (("same", placement.EVERY_DEVICE), ("other", placement.SHARDED)):
        for stage, lies in (("1_warmup", placement.EVERY_DEVICE), ("2_train", second)):
            config = digits.get_config("clustr")
            config.smoke, config.data.placement = True, lies
            config.magnet.clusters, config.magnet.samples = 8, 4
            stages.run(config, f"{folder}/{name}", (stage,))
        root = pathlib.Path(folder, name)
        clf = clustr_jax.load(root)
        weights = [
            np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves((clf.variables, clf.clusters))
        ]
        metrics = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        for record in metrics:  # what a clock says
            del record["epoch_seconds"], record["images_per_second"]
        chosen = json.loads((root / "2_train" / "done.json").read_text())["placement"]
        found[name] = {"placement": chosen, "weights": weights, "metrics": metrics}
    return found


if __name__ == "__main__":
    on_devices.SIZE = SIZE
    what, *rest = sys.argv[1:]
    if what == "run":
        result = whole_run(rest[0])
    else:
        with mesh.over(jax.devices()):
            if what == "taken":
                result = taken()
            elif what == "resumed":
                result = resumed(rest[0])
            else:
                result = {kind: compared(kind) for kind in rest or KINDS}
    print(json.dumps(result))
