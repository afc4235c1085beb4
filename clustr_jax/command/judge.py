"""Judge a model from a shell: the figure, the checks and the verdict, and a folder that anyone can verify.

    clustr-jax judge own:model --data=cifar10 --eps=8/255 --n=1000
    clustr-jax judge runs/digits-clustr_qtrades --data=digits --eps=0.1
    clustr-jax judge own:make_model --data=images.npz --eps=0.5 --norm=l2

MODEL is a work directory, or module:name of a model or of a function of images [B, H, W, C] in [0, 1] ->
logits [B, Y]. A function that takes nothing is called once, and makes the model. DATA is a prepared set, a
folder of images, or an .npz file with x and y (or x_test and y_test). Run again, the same command goes on
where it was interrupted. The exit code is 0 where no check failed, 1 where one did, 2 for a mistake of the
user.
"""

import argparse
import inspect
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from clustr_jax import data
from clustr_jax.judge import PROTOCOL, judge
from clustr_jax.runtime import extras
from clustr_jax.runtime.errors import UserError, first_line, shown
from clustr_jax.runtime.paths import local
from clustr_jax.runtime.programs import program
from clustr_jax.verify import named


def number(text: str) -> float:
    """8/255 or 0.03; UserError for anything else."""
    try:
        above, slash, below = text.partition("/")
        return float(above) / float(below) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"expected a number or a fraction like 8/255, got {shown(text, 50)!r}") from None


def model_of(spec: str) -> Callable:
    """The model that a work directory, or module:name, names."""
    if ":" not in spec and pathlib.Path(spec).exists():
        try:
            from clustr_jax.storage import loading
        except ModuleNotFoundError as error:
            raise extras.explained(error, "a work directory") from error
        return loading.load(spec)  # pyright: ignore[reportReturnType]
    found = named(spec)
    if inspect.isfunction(found) and not inspect.signature(found).parameters:
        return found()
    return found


def images_of(name: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, y, their places in the test split); `size` of them with the classes' shares, 0 for all."""
    path = local(name, "--data")
    if path.suffix == ".npz" and path.is_file():
        x, y = _of_file(path)
    elif path.exists():
        x, y = data.load("folder", "test", data_dir=str(path))
    else:
        x, y = data.load(name, "test")
    check_labels(x, y)
    index = np.arange(len(y))
    if size and size < len(y):
        index = data.stratified(y, size, int(y.max()) + 1)
    return x[index], y[index], index.astype(np.int32)


def check_labels(x: np.ndarray, y: np.ndarray) -> None:
    """UserError for labels that no subset can be taken of: those of all images, as whole numbers from 0."""
    kind, found = np.asarray(y).dtype, f"y {np.asarray(y).dtype} {np.shape(y)}"
    if np.ndim(y) == 2 and np.shape(y)[1] == 1:
        found += ", a column: give y[:, 0]"
    elif np.ndim(y) == 2:
        found += ": give the classes, y.argmax(axis=1)"
    if np.ndim(y) != 1 or kind.kind not in "iu" or (len(y) and y.min() < 0):
        raise UserError(f"--data: labels must be whole numbers >= 0, one for each image, got {found}")
    if np.ndim(x) == 0 or len(x) != len(y):
        raise UserError(f"--data: {len(y):,} labels for x of shape {np.shape(x)}; expected as many of both")


def _of_file(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            for names in (("x", "y"), ("x_test", "y_test")):
                if all(name in file.files for name in names):
                    x, y = (file[name] for name in names)
                    break
            else:
                raise UserError(f"{shown(path)} has {', '.join(file.files) or 'nothing'}; expected x and y")
    except UserError:
        raise
    except Exception as error:  # zip and NumPy raise many types for damaged files
        raise UserError(f"{shown(path)} cannot be read: {first_line(error, 150)}") from error
    return (x.astype(np.float32) / 255 if x.dtype == np.uint8 else x), np.asarray(y)


def _say_memory(line: str) -> None:
    """Of the progress what a log keeps: how much memory it takes."""
    if line.startswith("memory: "):
        print(line, file=sys.stderr, flush=True)


@program
def main(argv: list[str]) -> int:
    """Returns the exit code: 0 believable, 1 not; see `program` for the others."""
    parser = argparse.ArgumentParser(
        prog="clustr-jax judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eps", required=True, help="radius, a number or a fraction like 8/255")
    parser.add_argument("--norm", default="linf", help="linf or l2")
    parser.add_argument("--n", type=int, default=1000, help="images to judge; 0 = all (default: 1000)")
    parser.add_argument("--protocol", default=PROTOCOL)
    parser.add_argument("--folder", default="judgement", help="where the results go (default: judgement)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=64, help="images attacked side by side: the memory")
    parser.add_argument("--audit", action="store_true", help="once more with another seed, order and slots")
    args = parser.parse_args(argv)
    if args.n < 0:
        raise UserError(f"--n must be >= 0 (0 = all), got {args.n}")
    local(args.folder, "--folder")
    eps = number(args.eps)
    model = model_of(args.model)
    x, y, ids = images_of(args.data, args.n)
    found = judge(
        model, x, y, eps=eps, norm=args.norm, protocol=args.protocol, ids=ids, folder=args.folder,
        seed=args.seed, slots=args.slots, audit=args.audit,
        progress=None if sys.stderr.isatty() else _say_memory,
    )  # fmt: skip
    print(found)
    print(f"judgement: {pathlib.Path(args.folder)} (python -m clustr_jax.verify {args.folder})")
    return 0 if found.believable else 1
