"""Where the authors' code and the paper's text differ: one named switch each.

`config.fidelity.<switch>` is "" (follow the preset), this package's value, or the authors'. The preset ""
means this package's, but for what a method has as its own (`of`) or a config sets by itself (that of
clustr_qtrades sets `scores`); "paper_code" the authors', a leak of test-set statistics included.
docs/fidelity.md is this table, with the reasons.
"""

import dataclasses
import sys
from typing import Any

from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.programs import program


@dataclasses.dataclass(frozen=True)
class Switch:
    """One difference: this package's value, the authors' value, what it is about, and values beside these.

    `of`: method -> this package's value for that method.
    """

    ours: str
    authors: str
    about: str
    more: tuple[str, ...] = ()
    of: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> tuple[str, ...]:
        return (self.ours, self.authors, *self.more)


# Of what the switches mean, in done.json. 2: passes in train mode have the authors' number of images whatever
# the size of the set; PyTorch's variance, their order of statistics and the two 1e-8 came with it.
VERSION = "switches-2"

# The authors go through a set in 400 passes: images of one over their training and test sets. Where batch
# statistics are those of the images, that is what they are of, and a smaller set does not make it less.
_CIFAR_BATCHES = (125, 25)
_BATCHES = {"svhn_cropped": (183, 65), "svhn": (183, 65)}


def authors_batches(dataset: str) -> tuple[int, int]:
    """Images of one of their passes in train mode over the training and the test set of this name."""
    return _BATCHES.get(dataset, _CIFAR_BATCHES)


SWITCHES = {
    "scores": Switch(
        "log", "exp", "training logits: log scores, or un-normalised exp scores fed to cross entropy"
    ),
    "hinge": Switch("log", "eps", "Magnet loss in the log domain, or relu(-log(num / (den + 1e-8) + 1e-8))"),
    "small_clusters": Switch(
        "mask", "skip", "a batch with a cluster of fewer than S members: masked, or skipped"
    ),
    "sampler": Switch(
        "floor", "stale", "seed draw: optimistic with a floor, or unseen = 0 and stale after a refit"
    ),
    "cluster_images": Switch("clean", "augmented", "k-means on clean images, or on augmented views"),
    "first_clusters": Switch("eval", "train", "batch norm of the first clustering"),
    "variance_images": Switch(
        "clean", "augmented", "inference variance: clean images in eval mode, or augmented in train mode"
    ),
    "attack_statistics": Switch("keep", "update", "running statistics during the inner attack"),
    "running_variance": Switch(
        "biased",
        "unbiased",
        "what batch norm averages: the batch's biased variance, or PyTorch's unbiased one",
    ),
    "epoch_statistics": Switch(
        "keep",
        "leak_test",
        "after each epoch: nothing, or passes over train AND TEST images in train mode; `clean`: over "
        "training images alone, before the clusters are fitted",
        ("clean",),
        {"clustr_qtrades": "clean"},
    ),
    "logged_loss": Switch(
        "eq3", "plus_k", "logged Magnet loss: Eq. 3, or with K extra terms in the sum and the two 1e-8"
    ),
    "nearest": Switch(
        "config", "10_20", "train.nearest and eval.nearest: as configured, or 10 in training and 20 after"
    ),
    "epochs": Switch(
        "text", "readme", "fine-tuning epochs: appendix D, or the 25 of the authors' README at most"
    ),
    "kl": Switch(
        "correct",
        "probs",
        "QTRADES alone: cross entropy as in the text, or F.kl_div of probabilities, element mean",
    ),
}
PRESETS = ("", "paper_code")


def resolve(fidelity: Any, method: str = "") -> dict[str, str]:
    """The value of every switch for a method; UserError for a preset or value that does not exist."""
    if fidelity.preset not in PRESETS:
        raise UserError(f"fidelity.preset must be empty or paper_code, got {fidelity.preset!r}")
    values = {}
    for name, switch in SWITCHES.items():
        default = switch.authors if fidelity.preset else switch.of.get(method, switch.ours)
        values[name] = fidelity[name] or default
        if values[name] not in switch.values:
            *first, last = switch.values
            raise UserError(f"fidelity.{name} must be {', '.join(first)} or {last}, got {values[name]!r}")
    return values


def apply(config: Any, *, fine_tunes: bool):
    """Spell out every switch in `config.fidelity`, and the settings that two of them stand for.

    `fine_tunes`: whether `train` is what comes after a warm-up, by the Magnet loss; `epochs` is about that.
    """
    for name, value in resolve(config.fidelity, config.method).items():
        config.fidelity[name] = value
    if config.fidelity.nearest == "10_20":
        config.train.nearest = config.train.nearest or 10
        config.eval.nearest = config.eval.nearest or 20
    if config.fidelity.epochs == "readme" and fine_tunes:
        config.train.epochs = min(config.train.epochs, 25)
    return config


def table() -> str:
    """The switches as a Markdown table."""
    lines = ["| `config.fidelity.` | ours | authors' code | what |", "|---|---|---|---|"]
    for name, switch in SWITCHES.items():
        own = "".join(f"; {method}: `{value}`" for method, value in switch.of.items())
        lines.append(f"| `{name}` | `{switch.ours}`{own} | `{switch.authors}` | {switch.about} |")
    return "\n".join(lines)


@program(computes=False)
def main(argv: list[str]) -> None:
    """Prints the table."""
    print(table())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
