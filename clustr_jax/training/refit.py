"""Between epochs: the training set is embedded by the network as it is, and clustered."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax import clusters as clusters_lib
from clustr_jax import data, models
from clustr_jax.clusters import Clusters
from clustr_jax.models import Net
from clustr_jax.runtime import mesh, streams
from clustr_jax.runtime.errors import UserError
from clustr_jax.training import learned, sampling, trainers
from clustr_jax.training.train_state import TrainSet, TrainState
from clustr_jax.training.trainers import Trainer

# Images that a trained head starts from.
_HEAD_IMAGES = 5000
# Of momentum 0.9, 3e-5 of what was there before is left after so many.
_BATCHES = 100
# Images of one forward pass.
_EVAL_BATCH = 200


@jax.jit(static_argnames=("net", "train_mode"))
def embed_all(
    net: Net, variables: dict, train_set: TrainSet, key: Array | None = None, train_mode: bool = False
) -> Float[Array, "N E"]:
    """Embeddings of the whole training split: eval mode and clean, unless asked otherwise (`fidelity`)."""
    size = train_set.labels.shape[0]

    def part(variables, train_set, key, ids):
        if train_set.sharded and mesh.axis():  # its own images: nothing has to be sent
            train_set, ids = train_set.share(), jnp.arange(ids.shape[0])
        count, batch = ids.shape[0], train_set.authors_batch if train_mode else _EVAL_BATCH
        whole = count // batch * batch

        def embed(i):
            x = train_set.batch(i, None if key is None else jax.random.fold_in(key, i[0]))[0]
            outputs = net.train(variables, x)[0] if train_mode else net.eval(variables, x)
            return outputs.embeddings

        # the rest is a batch of its own: filled up, it would change the statistics of train mode
        pieces = [embed(ids[whole:])] if whole < count else []
        if whole:
            z = jax.lax.map(embed, ids[:whole].reshape(-1, batch))
            pieces.insert(0, z.reshape(whole, -1))
        return mesh.gather(jnp.concatenate(pieces))

    if train_mode or key is not None:  # the authors' ways depend on who shares a batch: as on one device
        return part(variables, train_set, key, jnp.arange(size))
    ids = jnp.arange(-(-size // mesh.devices()) * mesh.devices()) % size
    inputs = (mesh.SAME, train_set.specs, mesh.SAME, mesh.ROWS)
    return mesh.spread(part, inputs, mesh.SAME)(variables, train_set, key, ids)[:size]


def begin(trainer: Trainer, state: TrainState, train_set: TrainSet, key: Array) -> TrainState:
    """A fresh state with the clusters that its head and its batches need."""
    if trainer.learned:
        state = first_head(trainer, state, train_set, key)
    return refit(trainer, state, train_set, key) if trainer.magnet else state


def first_head(trainer: Trainer, state: TrainState, train_set: TrainSet, key: Array) -> TrainState:
    """The state with the cluster head that training starts from, where the head is trained.

    Of the embeddings in train mode, for a fresh network's running statistics are none yet: of up to 5,000
    images, a stratified and shuffled part of the set in batches of the size that training has.
    """
    train, num_classes = trainer.settings.train, trainer.net.num_classes
    key = jax.random.fold_in(key, streams.Training.HEAD)
    order_key, fit_key = jax.random.split(key)
    k = trainers.per_class(trainer.settings.magnet, num_classes)
    labels = np.asarray(train_set.labels)
    some = data.stratified(labels, min(len(labels), _HEAD_IMAGES), num_classes)
    if (np.bincount(labels[some], minlength=num_classes) < k).any():  # of rare classes all are needed
        some = np.arange(len(labels))
    some = jnp.asarray(some)[jax.random.permutation(order_key, len(some))]
    labels, batch = train_set.labels[some], min(trainer.batch_size, len(some))
    part = train_set.replace(
        images=train_set.take(some), labels=labels, augment="none", authors_batch=batch, sharded=False
    )
    params, _ = learned.split(state.params, None)
    z = embed_all(trainer.net, {**state.variables, "params": params}, part, train_mode=True)
    if train.centroids == "simplex":
        head = learned.around(fit_key, z, num_classes, max(k))
    else:
        magnet = trainer.settings.magnet
        head = clusters_lib.fit(
            fit_key,
            z,
            labels,
            num_classes=num_classes,
            k=k,
            n_init=magnet.n_init,
            max_iter=magnet.max_iter,
        )
    head = _sharpened(head, trainer.settings.magnet)
    return state.replace(clusters=head, average_clusters=None if state.average is None else head)


def refit(trainer: Trainer, state: TrainState, train_set: TrainSet, key: Array) -> TrainState:
    """Cluster the training set by the network as it is now; examples keep their last seen losses."""
    magnet, switches = trainer.settings.magnet, trainer.settings.switches
    first = state.sampler is None
    key = jax.random.fold_in(jax.random.fold_in(key, streams.Training.REFIT), state.step)
    fit_key, images_key, variance_key, average_key = jax.random.split(key, 4)
    augmented = images_key if switches.cluster_images == "augmented" else None
    train_mode = first and switches.first_clusters == "train"
    if trainer.learned:
        clusters, assignments = state.clusters, _belongings(trainer, state, train_set)
    else:
        clusters, assignments = _fit(trainer, state.variables, train_set, fit_key, augmented, train_mode)
    assert clusters is not None  # `begin` has made those of a trained head
    if not trainer.learned and switches.variance_images == "augmented":
        z = embed_all(trainer.net, state.variables, train_set, variance_key, train_mode=True)
        clusters = _sharpened(clusters_lib.with_variance(clusters, z, train_set.labels), magnet)
    if state.sampler is None:
        sampler = sampling.init(
            None, assignments, clusters.valid.size, initial=magnet.alpha, stale=switches.sampler == "stale"
        )
    else:
        sampler = sampling.refit(state.sampler, assignments)
    state = state.replace(clusters=clusters, sampler=sampler)
    if state.average is not None and trainer.method.head == "clusters" and not trainer.learned:
        state = state.replace(average_clusters=_fit(trainer, state.average, train_set, average_key)[0])
    return state


def _belongings(trainer, state, train_set):
    """The cluster of each training image, by the trained head as it is."""
    params, head = learned.split(state.params, state.clusters)
    assert head is not None  # `begin` has made it
    z = embed_all(trainer.net, {**state.variables, "params": params}, train_set)
    return learned.assign(head, z, train_set.labels)


def _fit(trainer, variables, train_set, key, augmented=None, train_mode=False):
    magnet, num_classes = trainer.settings.magnet, trainer.net.num_classes
    z = embed_all(trainer.net, variables, train_set, augmented, train_mode)
    if magnet.fit == "linear_head":
        return _sharpened(_of_linear_head(trainer.net, variables, train_set, z), magnet), train_set.labels
    clusters, assignments = clusters_lib.fit_assign(
        key,
        z,
        train_set.labels,
        num_classes=num_classes,
        k=trainers.per_class(magnet, num_classes),
        n_init=magnet.n_init,
        max_iter=magnet.max_iter,
    )
    return _sharpened(clusters, magnet), assignments


def _of_linear_head(net: Net, variables, train_set: TrainSet, z) -> Clusters:
    """The clusters that classify as the linear head does, one per class (clusters.of_linear_head)."""
    kernel, bias = (variables["params"][models.HEAD][name] for name in ("kernel", "bias"))
    check_linear(net, variables, train_set.batch(jnp.arange(min(len(z), 64)), None)[0])
    members = jax.nn.one_hot(train_set.labels, net.num_classes)
    return clusters_lib.of_linear_head(kernel, bias, members.T @ z / jnp.sum(members, axis=0)[:, None])


def check_linear(net: Net, variables: dict, x: Float[Array | np.ndarray, "B ..."]) -> None:
    """UserError if the logits of these images are not linear in their embeddings by the head's weights."""
    kernel, bias = (variables["params"][models.HEAD][name] for name in ("kernel", "bias"))
    outputs = net.eval(variables, jnp.asarray(x))
    if not jnp.allclose(outputs.embeddings @ kernel + bias[None], outputs.logits, rtol=1e-3, atol=1e-3):
        raise UserError(
            "magnet.fit=linear_head needs a network whose logits are linear in its embeddings, and this "
            "one's are not; use magnet.fit=kmeans"
        )


def _sharpened(clusters, magnet):
    """What training and the deployed head work with, as the Magnet loss does: sigma^2 / magnet.sharpness."""
    return clusters.replace(variance=clusters.variance / magnet.sharpness)


def with_clean_statistics(trainer: Trainer, state: TrainState, train_set: TrainSet, key: Array) -> TrainState:
    """The state, and its average of weights, with the batch statistics of training images as they are.

    A step of an adversarial method leaves those of the images that its adversary moved. The images are in
    an order of their own: where momentum is short, the last batches decide, and a set may lie class by class.
    So no more than the last hundred are passed, wherever the set lies, and every device holds those. Of a
    small set, with fewer batches than some forty, the statistics keep a part of what they were before.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, streams.Training.STATISTICS), state.step)
    size = train_set.labels.shape[0]
    order = jax.random.permutation(key, size)
    batch = min(train_set.authors_batch, size)
    order = order[: size // batch * batch][-_BATCHES * batch :]
    if train_set.sharded:
        some = order
        images, labels = train_set.take(some), train_set.labels[some]
        train_set = train_set.replace(images=images, labels=labels, sharded=False)
        order = jnp.arange(len(some))
    state = state.replace(batch_stats=_statistics(trainer.net, state.variables, train_set, order, batch))
    if state.average is None:
        return state
    stats = _statistics(trainer.net, state.average, train_set, order, batch)
    return state.replace(average={**state.average, "batch_stats": stats})


@jax.jit(static_argnums=(0, 4))
def _statistics(net: Net, variables: dict, train_set: TrainSet, order: Array, batch: int) -> dict:
    """Those after a pass in train mode over whole batches, in this order and without augmentation."""
    params, _ = learned.split(variables["params"], None)  # without a trained head

    def step(stats, ids):
        return net.train({"params": params, "batch_stats": stats}, train_set.batch(ids, None)[0])[1], None

    return jax.lax.scan(step, variables["batch_stats"], order.reshape(-1, batch))[0]


@jax.jit(static_argnums=(0, 3))
def pass_in_train_mode(net: Net, variables: dict, pixels: Float[Array, "N ..."], batch: int) -> dict:
    """Batch statistics after a pass over `pixels` in batches: the authors' leak (docs/fidelity.md)."""
    whole = len(pixels) // batch * batch

    def step(stats, x):
        return net.train({**variables, "batch_stats": stats}, x)[1], None

    batches = pixels[:whole].reshape(-1, batch, *pixels.shape[1:])
    stats = jax.lax.scan(step, variables["batch_stats"], batches)[0]
    return step(stats, pixels[whole:])[0] if whole < len(pixels) else stats
