"""From the words of a command line to the settings of a run: the config's file, fractions, near misses.

    spec, words = split(argv, default)          # what --config names, wherever it stands, and the rest
    config = read(spec, folder)                 # what the file's get_config returns, every setting there
    words = decimals(words, config)             # eps=8/255 as the number that it is

What then turns `--config.KEY=VALUE` into settings is ml_collections (run.py).
"""

import ast
import contextlib
import importlib.machinery
import importlib.util
import pathlib
import re
import traceback
from typing import Any

from ml_collections import ConfigDict

from clustr_jax.runtime.errors import UserError, first_line, nearest
from clustr_jax.runtime.paths import local

_NUMBER = r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,5})?"
_FRACTION = re.compile(rf"({_NUMBER})\s*/\s*({_NUMBER})")
# A tuple or list of numbers and fractions, with or without its brackets.
_NUMBERS = re.compile(r"[\s\d.,/()\[\]eE+-]+")
_SETTING = re.compile(r"--?config\.([^=]+)(=(.*))?", re.DOTALL)


def split(argv: list[str], default: str) -> tuple[str, list[str]]:
    """(what --config names, the other words): the last one counts, and settings may stand before it.

    >>> command_line.split(["run.py", "--config.seed=1", "--config", "toy2d:magnet"], "digits")
    ('toy2d:magnet', ['run.py', '--config.seed=1'])
    """
    spec, rest, words = default, [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--config", "-config"):
            rest.append(word)
            continue
        spec = value if equals else next(words, "")
        if not spec or spec.startswith("--"):
            raise UserError("--config needs a value: FILE.py[:METHOD[,VARIANT]], or the name of a config")
    return spec, rest


def read(spec: str, folder: pathlib.Path, complete: ConfigDict | None = None) -> ConfigDict:
    """The config of "FILE.py[:METHOD]", or of "NAME[:METHOD]" in `folder`.

    UserError for a file that is not there or fails, which says the line; where `complete` is given, for a
    config without one of its settings, or with one that looks like a misspelling of one.
    """
    name, colon, argument = spec.partition(":")
    path = _find(name, folder)
    try:
        loader = importlib.machinery.SourceFileLoader("clustr_jax_config", str(path))
        found = importlib.util.spec_from_file_location("clustr_jax_config", path, loader=loader)
        assert found is not None
        module = importlib.util.module_from_spec(found)
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(
                f"{path} has no function get_config(name), which returns the settings; configs/digits.py is "
                f"one that has"
            )
        config = get_config(*[argument] if colon else [])
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file is code
        raise UserError(f"{first_line(error)}{_place(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config in {path} returned {type(config).__name__}; expected a ConfigDict")
    if complete is not None:
        _check_names(config, complete, path)
    return config


def _find(name, folder):
    """The file of a config, by its path or by its name."""
    known = {p.stem: p for p in sorted(folder.glob("*.py")) if p.stem not in ("__init__", "common")}
    path = local(name, "--config")
    if name in known and not path.is_file():
        return known[name]
    if path.is_file():
        return path
    stem = path.name.removesuffix(".py")
    what = "is a folder" if path.is_dir() else "there is no such file"
    raise UserError(f"--config={name}: {what}{nearest(stem, known)}; known: {', '.join(known)}, or FILE.py")


def _place(error: BaseException, path) -> str:
    """ " (FILE, line N)" of what the file got wrong; nothing where it refused what it was given."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    if isinstance(error, ValueError):
        return ""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f" ({path}, line {lines[-1]})" if lines else f" ({path})"


def _check_names(config, complete, path, prefix=""):
    """UserError for a missing setting, one of another kind, and one that is nearly another's name."""
    for name, value in complete.items():
        if name not in config:
            raise UserError(f"the config of {path} has no {prefix}{name}; start from configs.common.base")
        if isinstance(value, ConfigDict) != isinstance(config[name], ConfigDict):
            kind = "settings" if isinstance(value, ConfigDict) else "a value"
            raise UserError(f"{prefix}{name} in {path} must be {kind}, got {str(config[name])[:100]!r}")
        if isinstance(value, ConfigDict):
            _check_names(config[name], value, path, f"{prefix}{name}.")
    for name in config:
        if name not in complete and (close := nearest(name, complete)):
            raise UserError(f"{path} sets {prefix}{name}, which nothing reads{close}")


def decimals(words: list[str], config: ConfigDict) -> list[str]:
    """The words with fractions in them, of settings that are numbers or tuples of them, as decimals.

    UserError for a setting that does not exist, and for a division by zero.

    >>> config = ConfigDict({"eps": 0.1, "curve": (0.1,), "name": "a"})
    >>> command_line.decimals(["--config.eps=8/255", "--config.curve=(1/4, 1)", "--config.name=1/4"], config)
    ['--config.eps=0.03137254901960784', '--config.curve=(0.25, 1)', '--config.name=1/4']
    """
    found, last = [], None
    for word in words:
        match = _SETTING.fullmatch(word)
        if match:
            kind = _kind(match[1], config)
            value, last = match[3], None if match[2] else kind
            found.append(word if value is None else f"{word.partition('=')[0]}={_decimal(word, value, kind)}")
        else:
            found.append(_decimal(word, word, last))
            last = None
    return found


def _kind(name: str, config: ConfigDict) -> type | None:
    """The type of this setting; UserError where there is none of that name."""
    section: Any = config
    for i, part in enumerate(parts := name.split(".")):
        if not isinstance(section, ConfigDict) or part.partition("[")[0] not in section:
            known = list(section) if isinstance(section, ConfigDict) else []
            where = ".".join(parts[:i]) or "config"
            if not known:
                raise UserError(f"--config.{name[:100]}: {where} is a value, and has no settings in it")
            close = nearest(part, known) or f"; {where} has {', '.join(known)}"
            raise UserError(f"--config.{name[:100]}: there is no such setting{close}")
        if "[" in part:
            raise UserError(
                f"--config.{name[:100]}: tuples are given whole: --config.{name.partition('[')[0]}=(...)"
            )
        section = section[part]
    if isinstance(section, ConfigDict):
        first = next(iter(section))
        raise UserError(
            f"--config.{name} holds settings: give one of them, e.g. --config.{name}.{first}=VALUE"
        )
    return type(section)


def _decimal(word: str, value: str, kind: type | None) -> str:
    """`value` with its fractions divided, if it is numbers for a number or for a tuple."""

    def divided(match):
        if not float(match[2]):
            raise UserError(f"{word[:100]} divides by zero")
        return repr(float(match[1]) / float(match[2]))

    if kind is float and _FRACTION.fullmatch(value.strip()):
        return _FRACTION.sub(divided, value.strip())
    if kind in (tuple, list) and _NUMBERS.fullmatch(value):
        found = _FRACTION.sub(divided, value)
        with contextlib.suppress(SyntaxError, ValueError):  # else it is shown as it was typed
            ast.literal_eval(found.strip())
            return found
    return value
