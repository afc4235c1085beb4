"""The train step of every objective, and the epoch as compiled loops; between epochs: refit.py."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from clustr_jax.clusters import Clusters
from clustr_jax.runtime import mesh, streams
from clustr_jax.training import learned, sampling, train_state
from clustr_jax.training.adversaries import Adversarial, shares_clean
from clustr_jax.training.objectives import Batch
from clustr_jax.training.train_state import TrainSet, TrainState
from clustr_jax.training.trainers import Trainer, optimizer, per_class, rows, strength

# Beside the metrics of an epoch where recipe.nonfinite is "skip": how many steps were.
SKIPPED = "skipped"


def create(trainer: Trainer, variables: dict) -> TrainState:
    """A fresh state at step 0: new optimiser, no clusters yet."""
    if trainer.learned:
        params = {**variables["params"], **_head(trainer, variables)}
        variables = {**variables, "params": params}
    transform, _ = optimizer(trainer.recipe, trainer.steps_per_epoch)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=transform.init(variables["params"]),
        totals={},
    )
    if trainer.replays > 1:
        state = state.replace(delta=jnp.zeros((trainer.batch_size, *trainer.net.input_shape)))
    if trainer.recipe.lookahead:
        state = state.replace(slow=state.variables)
    if trainer.recipe.ema:
        state = state.replace(average=state.variables)
    return state


def _head(trainer, variables):
    """What is learned of the head, at its start: one more entry of the parameters, or none."""
    num_classes, size = trainer.net.num_classes, _embedding(trainer, variables)
    k = max(per_class(trainer.settings.magnet, num_classes))
    head = learned.parameters(trainer.settings.train, num_classes, k, size)
    return {learned.HEAD: head} if head else {}


def _embedding(trainer, variables):
    x = jax.ShapeDtypeStruct((1, *trainer.net.input_shape), jnp.float32)
    return jax.eval_shape(trainer.net.eval, variables, x).embeddings.shape[-1]


def blank(trainer: Trainer, variables: dict, train_set: TrainSet, key: Array) -> TrainState:
    """A state of the right structure and shapes to restore into; nothing in it is meaningful."""
    state = create(trainer, variables)
    if trainer.magnet or trainer.learned:
        num_classes = trainer.net.num_classes
        k = max(per_class(trainer.settings.magnet, num_classes))
        clusters = Clusters(
            jnp.zeros((num_classes, k, _embedding(trainer, variables))),
            jnp.ones(()),
            jnp.ones((num_classes, k), bool),
        )
        averaged = state.average and trainer.method.head == "clusters"
        sampler = sampling.init(
            None,
            jnp.zeros(trainer.size, jnp.int32),
            num_classes * k,
            initial=0.0,
            stale=trainer.settings.switches.sampler == "stale",
        )
        state = state.replace(
            clusters=clusters,
            sampler=sampler if trainer.magnet else None,
            average_clusters=clusters if averaged else None,
        )
    return with_totals(trainer, state, train_set, key)


def draw_batch(
    trainer: Trainer,
    state: TrainState,
    train_set: TrainSet,
    order: Int[Array, "N"],
    key: Array,
    flips: Callable | None = None,
) -> tuple[Batch, Int[Array, "B"]]:
    """The batch of this step, augmented, and the ids of its examples (on a mesh: those of all devices).

    `flips` says of ids which are turned, where it is not chance that decides.
    """
    draw_key, augment_key = jax.random.split(key)
    magnet, stale = trainer.settings.magnet, trainer.settings.switches.sampler == "stale"
    if trainer.magnet:
        clusters = learned.split(state.params, state.clusters)[1]
        assert state.sampler is not None and clusters is not None  # `refit` has made them
        drawn = sampling.draw(
            draw_key,
            state.sampler,
            clusters,
            num_clusters=rows(magnet, trainer.net.num_classes),
            samples=magnet.samples,
            floor=0.0 if stale else magnet.seed_floor,
        )
        ids, mask, classes = drawn.ids.reshape(-1), drawn.mask.reshape(-1), drawn.classes
    else:
        position = (state.step % trainer.steps_per_epoch) // trainer.replays
        ids = jax.lax.dynamic_slice(order, (position * trainer.batch_size,), (trainer.batch_size,))
        mask, classes = jnp.ones(trainer.batch_size, bool), None
    x, y = train_set.batch(mesh.own(ids), augment_key, None if flips is None else mesh.own(flips(ids)))
    return Batch(x, y, mesh.own(mask), classes), ids


def head_clusters(trainer: Trainer, state: TrainState) -> Clusters | None:
    """What the objective and the adversary see of the clusters: nothing, where the head is linear.

    Where the head is trained, what it started from: `learned.split` has the rest.
    """
    return state.clusters if trainer.method.head == "clusters" else None


def prepare(trainer: Trainer, state: TrainState, train_set: TrainSet, order: Int[Array, "N"], key: Array):
    """What a step differentiates at: (batch, ids [B], `Adversarial`, batch statistics after the attack)."""
    stage_key, key = key, jax.random.fold_in(key, streams.Training.STEPS)
    draw_key, attack_key = jax.random.split(jax.random.fold_in(key, state.step // trainer.replays))
    flips = None
    if train_set.augment == train_state.ALTERNATE and not trainer.magnet:  # whose batches have no epochs
        flips = functools.partial(alternating_flips, stage_key, state.step // trainer.steps_per_epoch)
    batch, ids = draw_batch(trainer, state, train_set, order, draw_key, flips)
    adversarial, stats = Adversarial(), state.batch_stats
    if trainer.method.adversary is not None:
        params, clusters = learned.split(state.params, head_clusters(trainer, state))
        adversary = functools.partial(
            trainer.method.adversary,
            trainer.step_net,
            {**state.variables, "params": params},
            batch,
            clusters,
            attack_key,
            trainer.settings,
            strength(trainer, state.step),
        )
        # adversarial weights need the same images at two places
        if shares_clean(trainer.method, trainer.settings) and not trainer.recipe.awp:
            adversarial = Adversarial(make=adversary)
        else:
            images, stats = adversary()
            adversarial = Adversarial(images)
    return batch, ids, adversarial, stats


def _carried(trainer, state, batch):
    """Free AT: (the perturbed images in the box, where the box cut nothing off, radius, step size)."""
    scale, bounds = strength(trainer, state.step), trainer.settings.bounds
    attack = trainer.settings.train.attack
    low, high = (-jnp.inf, jnp.inf) if bounds is None else bounds
    eps = attack.eps * scale
    moved = batch.x + jnp.clip(state.delta, -eps, eps)
    return jnp.clip(moved, low, high), (moved >= low) & (moved <= high), eps, attack.step_size * scale


@jax.jit(static_argnums=0)
def seen(trainer: Trainer, state: TrainState, train_set: TrainSet, order: Int[Array, "N"], key: Array):
    """What the next step would work on: (batch, ids [B], perturbed images or None)."""
    batch, ids, adversarial, _ = prepare(trainer, state, train_set, order, key)
    if trainer.replays > 1:
        adversarial = Adversarial(_carried(trainer, state, batch)[0])
    return batch, ids, adversarial.alone()


def train_step(
    trainer: Trainer, state: TrainState, train_set: TrainSet, order: Int[Array, "N"], key: Array
) -> tuple[TrainState, dict]:
    """One step of any objective: draw, attack, differentiate, update, remember the sampler's losses.

    Returns (state, metrics of the batch). All randomness comes from (key, state.step).
    """
    settings, recipe, before = trainer.settings, trainer.recipe, state
    start = head_clusters(trainer, state)
    batch, ids, adversarial, stats = prepare(trainer, state, train_set, order, key)

    def loss_fn(params, adversarial):
        params, clusters = learned.split(params, start)
        variables = {"params": params, "batch_stats": stats}
        return trainer.method.objective(trainer.step_net, variables, batch, adversarial, clusters, settings)

    if trainer.replays > 1:
        # Free AT (Shafahi et al. 2019): one backward pass moves the weights and the perturbation
        assert state.delta is not None  # `create` has made it
        moved, inside, eps, step_size = _carried(trainer, state, batch)
        (loss, aux), (gradients, ascent) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(
            state.params, Adversarial(moved)
        )
        # The perturbation itself is not cut to the box, for the next images are others; what the box cuts
        # off has no gradient. On a mesh `ascent` is a multiple of the gradient; only its signs count.
        sign = jnp.where(inside, jnp.sign(ascent.images), 0.0)
        state = state.replace(delta=jnp.clip(state.delta + step_size * sign, -eps, eps))
    else:
        params = state.params
        if recipe.awp:
            uphill = mesh.average(jax.grad(loss_fn, has_aux=True)(params, adversarial)[0])
            params = worst_weights(uphill, params, recipe.awp)
        (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, adversarial)

    gradients = mesh.average(gradients)
    transform, rate = optimizer(recipe, trainer.steps_per_epoch)
    updates, opt_state = transform.update(gradients, state.opt_state, state.params)
    lr = rate(before.step)
    updates = jax.tree.map(lambda u: lr * u, updates)
    mask = batch.mask
    if state.sampler is not None:
        # replays draw the same batch again, from the same losses: these change after the last one
        last = (before.step + 1) % trainer.replays == 0
        seen = mesh.gather(jnp.stack([aux.per_example, mask], axis=1))
        mask = seen[:, 1] > 0
        state = state.replace(sampler=sampling.update(state.sampler, ids, seen[:, 0], mask & last))
    state = state.replace(
        params=optax.apply_updates(state.params, updates), batch_stats=aux.batch_stats, opt_state=opt_state
    )
    if recipe.lookahead:
        state = looked_ahead(
            recipe.lookahead, before.step + 1, recipe.epochs * trainer.steps_per_epoch, state
        )
    if recipe.ema:
        # the average starts at the first step's weights, not at random ones
        decay = jnp.minimum(recipe.ema, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, v: decay * a + (1 - decay) * v, state.average, state.variables)
        state = state.replace(average=average)
    if trainer.magnet and settings.switches.small_clusters == "skip":
        state = jax.tree.map(lambda new, old: jnp.where(jnp.all(mask), new, old), state, before)
    state = state.replace(step=before.step + 1)
    return state, {"loss": loss, "gradient_norm": optax.tree.norm(gradients), **aux.metrics}


# Of lookahead: how much of the slow weights is kept, per step, when the training ends.
_SLOWNESS = 0.95


def looked_ahead(every: int, step: int | Array, total: int, state: TrainState) -> TrainState:
    """Lookahead (Zhang et al. 2019) as cifar10-airbench has it: after step number `step` of `total`.

    Every so many steps the slow variables move towards the fast ones, which go on from there. They are slow
    only towards the end: they keep 0.95^every (step / total)^3 of themselves. After the last step, and its
    move where it is one of these, the slow ones are the result.
    """
    assert state.slow is not None  # `create` has made them
    keep = _SLOWNESS**every * (step / total) ** 3
    moves = step % every == 0
    keep = jnp.where(moves, keep, 1.0)
    meet = moves | (step >= total)
    slow = jax.tree.map(
        lambda s, v: jnp.where(meet, keep * s + (1 - keep) * v, s), state.slow, state.variables
    )
    fast = jax.tree.map(lambda s, v: jnp.where(meet, s, v), slow, state.variables)
    return state.replace(slow=slow, params=fast["params"], batch_stats=fast["batch_stats"])


def alternating_flips(key: Array, epoch: int | Array, ids: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Which of these examples are turned in this epoch: each in every other one, half in the first."""
    key = jax.random.fold_in(key, streams.Training.FLIPS)
    first = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i)))(ids)
    return first ^ (epoch % 2 == 1)


def worst_weights(gradients: dict, params: dict, gamma: float):
    """Adversarial weight perturbation (Wu et al. 2020): each kernel moves by gamma |w| up the loss."""

    def perturb(g, w):
        if w.ndim < 2:  # biases and batch norm stay
            return w
        length = jnp.maximum(jnp.linalg.norm(g.reshape(-1)), 1e-12)
        return w + gamma * jnp.linalg.norm(w.reshape(-1)) * g / length

    return jax.tree.map(perturb, gradients, params)


@jax.jit(static_argnums=0, inline=True)
def traced_step(
    trainer: Trainer, state: TrainState, train_set: TrainSet, order: Int[Array, "N"], key: Array
) -> tuple[TrainState, dict]:
    """`train_step` of a state without totals: traced once, for `with_totals` as for `run_steps`."""
    return train_step(trainer, state, train_set, order, key)


def with_totals(trainer: Trainer, state: TrainState, train_set: TrainSet, key: Array) -> TrainState:
    """The state with metric sums at zero, under the names that this objective reports."""
    state = state.replace(totals={})
    specs = _specs(state)
    inputs = _inputs(specs, train_set)
    step = mesh.spread(functools.partial(traced_step, trainer), inputs, (specs, mesh.SAME))
    order = jax.ShapeDtypeStruct((trainer.size,), jnp.int32)
    metrics = jax.eval_shape(step, state, train_set, order, key)[1]
    names = (*metrics, SKIPPED) if trainer.recipe.nonfinite == "skip" else tuple(metrics)
    return state.replace(totals={name: jnp.zeros(()) for name in names})


def reset_totals(state: TrainState) -> TrainState:
    """For the next epoch: the sums of this one at zero."""
    return state.replace(totals=jax.tree.map(jnp.zeros_like, state.totals))


def _specs(state: TrainState) -> TrainState:
    """What of a state each device has to itself: its rows of Free AT's perturbation."""
    specs = jax.tree.map(lambda _: mesh.SAME, state)
    return specs.replace(delta=None if state.delta is None else mesh.ROWS)


def _inputs(specs: TrainState, train_set: TrainSet) -> tuple:
    """The state, the train set, and order and key (and count) that every device has."""
    return specs, train_set.specs, mesh.SAME, mesh.SAME


@jax.jit(static_argnums=0)
def run_steps(
    trainer: Trainer,
    state: TrainState,
    train_set: TrainSet,
    order: Int[Array, "N"],
    key: Array,
    count: ArrayLike,
) -> TrainState:
    """`count` (traced) train steps in one compiled loop: any chunk length, one compilation, equal results.

    A step whose loss or gradient is not finite changes nothing: the loop ends before it (the returned
    `step` tells), or with `nonfinite` "skip" it is counted in `totals` and passed over.
    """

    def steps(state, train_set, order, key, count):
        skip, end = trainer.recipe.nonfinite == "skip", state.step + count

        def body(carry):
            before, _ = carry
            after, metrics = traced_step(trainer, before.replace(totals={}), train_set, order, key)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            totals = {name: before.totals[name] + value for name, value in metrics.items()}
            if skip:
                totals[SKIPPED] = before.totals[SKIPPED]
            after = after.replace(totals=totals)
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
            if skip:
                missed = before.totals[SKIPPED] + jnp.where(finite, 0.0, 1.0)
                kept = kept.replace(step=after.step, totals=kept.totals | {SKIPPED: missed})
            return kept, finite | skip

        return jax.lax.while_loop(lambda c: (c[0].step < end) & c[1], body, (state, jnp.array(True)))[0]

    specs = _specs(state)
    inputs = (*_inputs(specs, train_set), mesh.SAME)
    return mesh.spread(steps, inputs, specs)(state, train_set, order, key, count)


@jax.jit(static_argnums=1)
def epoch_order(key: Array, size: int, epoch: ArrayLike) -> Int[Array, "N"]:
    """The permutation of the training set in this epoch."""
    key = jax.random.fold_in(jax.random.fold_in(key, streams.Training.ORDER), epoch)
    return jax.random.permutation(key, size).astype(jnp.int32)
