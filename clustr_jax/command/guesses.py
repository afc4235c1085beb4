"""What a newcomer types first and what is meant: the remedy for a word that no command and no flag is.

The texts follow "error: " and are one line each.
"""

import os
from collections.abc import Collection, Iterable

from ml_collections import ConfigDict

from clustr_jax.runtime.errors import listed, nearest, shown

_ASK = "--help has every flag on one screen"


def argument(word: str, configs: Collection[str], methods: Collection[str], commands: Iterable[str]) -> str:
    """A word without dashes where flags are expected: a config, a method, a command, a setting.

    >>> print(guesses.argument("cifar10:trades", ["cifar10"], ["trades"], []))
    unexpected argument 'cifar10:trades'; a config is given as --config=cifar10:trades
    """
    told = f"unexpected argument {shown(word)!r}; "
    name = word.partition(":")[0].partition(",")[0].removesuffix(".py")
    if word in commands:
        return told + f"that is a command: clustr-jax {word}"
    if "=" in word and not word.startswith(("=", ".", "/")):
        key = word.partition("=")[0]
        return (
            told
            + f"a setting is given as --config.{shown(word.removeprefix('config.'))}"
            + ("" if "." in key or key in ("seed", "smoke") else f"; {_ASK}")
        )
    if name.rpartition("/")[2] in configs:
        return told + f"a config is given as --config={shown(word)}"
    if name in methods:
        return told + f"a method follows its config: --config=digits:{shown(word)}"
    if os.path.isdir(word):  # any text: too long a name, or one with a null byte, is none
        return told + f"a work directory is given as --workdir={shown(word)}"
    close = nearest(name, [*configs, *methods])
    return told + f"options start with --{close}; {_ASK}"


def flag(name: str, config: ConfigDict, flags: Iterable[str]) -> str:
    """A flag that is none: a setting without its --config, or a near miss.

    >>> from configs import common
    >>> print(guesses.flag("train.epochs", common.base("digits"), []))
    there is no flag --train.epochs; the setting is --config.train.epochs
    """
    told = f"there is no flag --{shown(name)}"
    if name in ("dataset", "data", "method", "model_name", "attack"):
        return f"{told}; data set, method and variant are given together: --config=cifar10:trades,cpu"
    settings = list(names(config))
    places = [setting for setting in settings if setting == name or setting.endswith(f".{name}")]
    if places:
        kind = "settings of that name are" if places[1:] else "the setting is"
        return f"{told}; {kind} {listed([f'--config.{place}' for place in places])}"
    close = nearest(name, flags) or nearest(name, settings)
    return f"{told}{close}; settings are --config.KEY=VALUE, and {_ASK}"


def names(config: ConfigDict, prefix: str = "") -> Iterable[str]:
    """Every setting by its path: "train.attack.eps"."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
