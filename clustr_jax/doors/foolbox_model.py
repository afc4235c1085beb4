"""A Classifier for the attacks of Foolbox (3.3.4), which runs on JAX through eagerpy: no copy of the network.

    fmodel = to_foolbox(clf)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.05, steps=20)
    _, x_adv, success = attack(fmodel, jnp.asarray(x), jnp.asarray(y), epsilons=0.2)

Images are NHWC in [0, 1] JAX arrays, labels int32. Foolbox takes every step outside of a compiled loop:
for many restarts `clustr_jax.attacks` is far faster (benchmarks/attacks.py).
"""

import importlib
from typing import Any

from clustr_jax.classifier import Classifier
from clustr_jax.runtime.errors import UserError

_OUTPUTS = ("logits", "scores", "deployed")


def to_foolbox(clf: Classifier, output: str = "logits") -> Any:
    """A foolbox.JAXModel of a classifier.

    Judge success by `clf.predict`: Foolbox looks at the argmax of what it attacks.

        fmodel = to_foolbox(clustr_jax.load("runs/digits-clustr_qtrades"))
        foolbox.accuracy(fmodel, jnp.asarray(x), jnp.asarray(y))

    Args:
        clf: of images.
        output: "logits" (log-domain scores of all clusters, or the linear head), "scores" (the exp scores
            that the paper attacks) or "deployed" (log scores of the deployed rule).

    Returns:
        a foolbox.JAXModel.

    Raises:
        UserError: without Foolbox, and for points, whose pixels have no bounds.
    """
    if output not in _OUTPUTS:
        raise UserError(f"output must be one of {', '.join(_OUTPUTS)}, got {output!r}")
    if clf.bounds is None:
        raise UserError(
            "Foolbox needs bounds of the inputs, and these points have none; use clustr_jax.attacks"
        )
    try:
        foolbox = importlib.import_module("foolbox")
    except ModuleNotFoundError as error:
        if error.name not in ("foolbox", "eagerpy"):
            raise
        raise UserError("this needs Foolbox, which is not installed: pip install foolbox==3.3.4") from error
    return foolbox.JAXModel(getattr(clf, output), bounds=clf.bounds, data_format="channels_last")
