"""Score the stored images of a judgement again: ball, box, labels, hashes, counts, and a model's answers.

    python -m clustr_jax.verify FOLDER [--model=module:function|FILE.pt2|FILE.ts] [--layout=NCHW|NHWC]

NumPy alone; a model needs what it is made of (`module:function` in JAX, say, or PyTorch for an exported
module, which gets NCHW images unless --layout says NHWC). The exit code is 0 where all of it holds.
"""

import argparse
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from clustr_jax.evaluation import answers, witness
from clustr_jax.evaluation.witness import Verification
from clustr_jax.runtime import callable_module
from clustr_jax.runtime.errors import UserError, first_line, shown
from clustr_jax.runtime.programs import program

__all__ = ["Verification", "verify"]


def verify(folder: str | pathlib.Path, model: Callable | Any = None) -> Verification:
    """What the files of a judgement say, measured again: ball, box, labels, hashes, counts.

    NumPy alone, but for what the model needs. Of images that count as right and of adversarial ones one, or 1
    %, may be a tie: its two best scores differ by less than 1e-5 of them.

    Args:
        folder: what `judge(..., folder=)` or `Judgement.save` wrote.
        model: a function of images [B, ...] (as they were judged) -> logits [B, Y] (or a View, with the
            deployed rule), or a Classifier. Every image that counts as right then has to be classified
            correctly, every adversarial one misclassified, and logits have to be finite.

    Returns:
        a `Verification`, whose `.ok` says whether all of it holds; printed line by line.

    Raises:
        UserError: where the folder has no judgement.
    """
    return witness.check(*witness.read(folder), model)


def model_of(spec: str, layout: str = "NCHW") -> Callable | Any:
    """The model of "module:function" (of a folder that Python looks in, or this one), .pt2 or .ts."""
    path = pathlib.Path(spec)
    if path.suffix in (".pt2", ".ts"):
        return _torch_model(path, layout)
    return named(spec)


def named(spec: str) -> Callable | Any:
    """The object that "module:name" names, dots in it allowed; UserError where there is none."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise UserError(f"model {shown(spec, 100)}: expected module:function, or a file .pt2 or .ts")
    if "" not in sys.path and "." not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"model {shown(spec, 100)}: {first_line(error, 200)}") from error
    if not callable(found) and not answers.is_classifier(found):
        raise UserError(f"model {shown(spec, 100)} is {type(found).__name__}; expected a function of images")
    return found


def _torch_model(path, layout) -> Callable:
    if not path.is_file():
        raise UserError(f"model {shown(path, 150)}: there is no such file")
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"model {shown(path, 100)} needs torch, which is not installed: pip install torch"
        ) from error
    try:
        scripted, file = path.suffix == ".ts", str(path)
        load = torch.jit.load(file).eval() if scripted else torch.export.load(file).module()
    except Exception as error:  # PyTorch raises many types for damaged files
        what = "torch.jit.save" if path.suffix == ".ts" else "torch.export.save"
        raise UserError(
            f"model {shown(path, 150)} cannot be read ({first_line(error, 150)}); give a file of {what}"
        ) from error

    def call(x):
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1) if layout == "NCHW" and x.ndim == 4 else x)
        try:
            with torch.no_grad():
                return load(torch.from_numpy(x)).numpy()
        except Exception as error:  # of the module: shapes, types
            raise UserError(
                f"model {shown(path, 100)} does not take images {x.shape} ({first_line(error, 150)}); export "
                f"it for a batch of any size, and say --layout=NHWC if it takes channels last"
            ) from error

    return call


@program(computes=False)
def main(argv: list[str]) -> int:
    """Returns the exit code: 0 verified, 1 not, 2 a mistake that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m clustr_jax.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder")
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument(
        "--layout", choices=("NCHW", "NHWC"), default="NCHW", help="of an exported PyTorch module"
    )
    args = parser.parse_args(argv)
    done = verify(args.folder, model_of(args.model, args.layout) if args.model else None)
    print(done)
    return 0 if done.ok else 1


callable_module.make(__name__)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
