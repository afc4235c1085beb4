"""A long attack in front of a user: a bar where somebody looks, and Ctrl-C that loses nothing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from clustr_jax.runtime import extras


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a scheduled attack. `found` is what it would have returned, as far as it came.

    No number: images that are not broken in it have not been attacked to the end. With `folder=` the same
    call goes on from here.

        try:
            result = attacks.autoattack(key, clf.logits, x, y, eps=8/255)
        except attacks.Interrupted as stopped:
            result = stopped.found
    """

    def __init__(self, found: Any, text: str):
        super().__init__(text)
        self.found = found


@contextlib.contextmanager
def bar(progress: bool | None, name: str) -> Iterator[Callable | None]:
    """`report(outcome)` for the scheduler, which draws a bar; None where there is none to draw.

    `progress` None: on terminals and in notebooks, and not into pipes and files.
    """
    if progress is False:
        yield None
        return
    try:  # an attack without a bar needs JAX and NumPy only
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError as error:
        if progress:
            raise extras.explained(error, "progress=True") from error
        yield None
        return

    console = Console(stderr=True)
    if progress is None and not (console.is_terminal or console.is_jupyter):
        yield None
        return
    with Progress(console=console, transient=True) as drawn:
        task = drawn.add_task(name, total=1.0)

        def report(outcome):
            ended = np.all(outcome.spent > 0, axis=0) | outcome.broken
            left = 1 - float(np.mean(outcome.broken))
            drawn.update(task, completed=float(np.mean(ended)), description=f"{name}, {left:.1%} unbroken")

        yield report
