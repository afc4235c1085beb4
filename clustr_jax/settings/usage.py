"""What `run.py --help` and `run.py --list` print."""

import ast
import pathlib
import textwrap
from collections.abc import Callable

from clustr_jax.runtime.stage_names import STAGES

_WIDTH = 80  # columns of the narrowest terminal that people use


def screen(folder: pathlib.Path, methods: dict[str, Callable], variants: dict[str, Callable]) -> str:
    """One screen: every flag, the configs in `folder`, the methods and the exit codes."""
    configs = ", ".join(path.stem for path in _configs(folder))
    names = textwrap.fill(", ".join(methods), _WIDTH - 2, initial_indent="  ", subsequent_indent="  ")
    stages = ",".join(STAGES)
    return f"""\
usage: python run.py [--config=FILE.py[:METHOD[,VARIANT]]] [--workdir=DIR] ...

  --config            default: configs/digits.py:clustr_qtrades
                      configs/: {configs}
                      variant: {", ".join(variants)} (what two CPU cores train)
  --config.KEY=VALUE  any setting: --config.train.epochs=5, --config.seed=1;
                      --config.smoke=True shrinks everything to seconds
  --workdir           default: runs/<dataset>-<method>[-<variant>]; it resumes there
  --stages            default: {stages}
  --platform          cpu, cuda or tpu; default: the best that JAX finds
  --coordinator       HOST:PORT of process 0, or auto (SLURM, GKE, ...); with it
                      --num_processes and --process_id: several machines at once
  --profile           profiler traces of training and evaluation in WORKDIR/profile
  --quiet             print mistakes and nothing else
  --list              what each config, method and variant is

methods
{names}

exit codes: 0 done, 2 a mistake told in one line, 75 stopped by a signal (resume)"""


def listing(folder: pathlib.Path, methods: dict[str, Callable], variants: dict[str, Callable]) -> str:
    """The configs in `folder`, the methods and the variants, each with the first line of its docstring."""
    texts = {
        "configs": {
            path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            for path in _configs(folder)
        },
        "methods": {name: function.__doc__ for name, function in methods.items()},
        "variants": {name: function.__doc__ for name, function in variants.items()},
    }
    paragraphs = []
    for kind, entries in texts.items():
        lines = [f"  {name:18} {(text or '-').strip().splitlines()[0]}" for name, text in entries.items()]
        paragraphs.append("\n".join([kind, *lines]))
    return "\n\n".join(paragraphs)


def _configs(folder):
    """The config files in it that can be run."""
    return [path for path in sorted(folder.glob("*.py")) if path.stem not in ("__init__", "common")]
