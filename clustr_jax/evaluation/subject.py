"""What an evaluation is of: a function of images, the box and the norm, and what is known beside them.

The protocols and the checks take a `Subject` and nothing else of a model. `of_classifier` makes one of a
trained network with its head (run.py), `of_model` of whatever `attacks.gate` has admitted (clustr_jax.judge).
A part that a model does not have is None, and the checks that would look at it say so.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from clustr_jax.attacks import models
from clustr_jax.attacks.attack_losses import logits_of
from clustr_jax.attacks.gate import Admitted
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.classifier import Classifier
from clustr_jax.runtime import arrays


@dataclasses.dataclass(frozen=True)
class Subject:
    """`model` is what programs are compiled for; the other functions look at it from outside of them."""

    model: Partial  # images [B, ...] -> logits [B, Y], or a View
    logits: Callable  # the same logits, by the model's own call
    digest: Callable[[], str]  # of the arrays that it holds now
    bounds: tuple[float, float] | None
    norm: str = "linf"
    clustered: bool = False  # its outputs are a View with the exponents of clusters
    predict: Callable | None = None  # the deployed rule, where it is not the argmax of the logits
    opened: Partial | None = None  # (arrays that can be made float64)(images) -> logits
    transfer: dict[str, Callable] = dataclasses.field(default_factory=dict)  # other models' logits
    unsteady: str = ""  # what the user has said to be meant: logits that depend on chance or on the batch

    def with_sources(self, sources: dict[str, Callable]) -> "Subject":
        """The same, attacked from these models as well."""
        return dataclasses.replace(self, transfer={**self.transfer, **sources})


def of(what: Subject | Classifier) -> Subject:
    """A subject as it is, or that of a classifier."""
    return what if isinstance(what, Subject) else of_classifier(what)


def of_classifier(clf: Classifier) -> Subject:
    """Its view in the linf ball; transfer comes from the network's own linear head."""
    sources = {}
    if clf.clusters is not None:
        sources["transfer-linear-head"] = clf.replace(clusters=None, nearest=0).logits
    return Subject(
        model=as_partial(clf.view), logits=clf.logits,
        digest=lambda: arrays.digest((clf.variables, clf.clusters)),
        bounds=clf.bounds, clustered=clf.clusters is not None, predict=clf.predict,
        opened=Partial(_of_net, clf), transfer=sources,
    )  # fmt: skip


def of_model(logits_fn: Callable, given: Admitted, rows: int) -> Subject:
    """Of a model that `attacks.gate` has admitted; `rows` of its images are looked at side by side.

    Everything is computed in full float32: reduced precision of matrix products would hide gradients.
    """
    shape = (rows, *given.x.shape[1:])

    def own(x):
        with models.without_effects(), jax.default_matmul_precision("highest"):
            return logits_of(models.logits_in(logits_fn(jnp.asarray(x, jnp.float32))))

    program: Any = given.model.func
    opened = given.model
    if hasattr(program, "captured"):  # what the function itself holds stays as it is
        opened = Partial(program.call, given.model.args[0])
    return Subject(
        model=Partial(_precise, given.model),
        logits=own,
        bounds=given.bounds,
        norm=given.norm,
        digest=lambda: arrays.digest(models.open_model(logits_fn, shape).model),
        opened=Partial(_precise, opened),
        unsteady=given.note,
    )


def _precise(model, x):
    with jax.default_matmul_precision("highest"):
        return model(x)


def _of_net(clf, x):
    """The logits without the Classifier's methods, which are float32 only."""
    with jax.default_matmul_precision("highest"):
        z = clf.net.eval(clf.variables, x)
        return z.logits if clf.clusters is None else clf.clusters.log_scores(z.embeddings)
