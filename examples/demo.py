"""ClusTR + QTRADES on CIFAR-10, about as many updates as the paper's, attacked twice: nothing to download.

    python examples/demo.py [--n=100] [--folder=runs/demo] [--no-browser]        # or: make demo

The network and 100 CIFAR-10 test images are in results/operating-point (experiments/levers.py --export made
them). First the paper's attack, PGD^20 on exp scores, of whose ten restarts the largest loss counts; then
clustr_jax.judge with its sound protocol. What judge found is kept in the folder, which is begun again where
none is named, and its page opens in a browser.
"""

import argparse
import pathlib
import shutil
import sys
import time
import warnings
import webbrowser

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import clustr_jax  # noqa: E402
from clustr_jax import attacks  # noqa: E402
from clustr_jax.evaluation import intervals  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from clustr_jax.runtime.programs import program  # noqa: E402

HERE = ROOT / "results" / "operating-point"
EPS = 8 / 255


def said(what: str, right: np.ndarray, started: float) -> None:
    low, high = intervals.wilson(int(right.sum()), len(right))
    print(
        f"{what:34} {100 * right.mean():6.2f} %  [{100 * low:.1f}, {100 * high:.1f}]"
        f"   {time.perf_counter() - started:4.0f} s",
        flush=True,
    )


@program
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help="of the 100 images")
    parser.add_argument("--folder", help="for what judge finds; default: runs/demo, begun again")
    parser.add_argument("--no-browser", action="store_true", help="say where the page is, do not open it")
    args = parser.parse_args(argv)
    if args.n < 1:
        raise UserError(f"--n must be from 1 to 100, got {args.n}")
    folder = pathlib.Path(args.folder or ROOT / "runs" / "demo")
    if not args.folder:  # of other images or other code, which judge would not go on from
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    clf = clustr_jax.load(HERE / "clustr_qtrades.safetensors")
    with np.load(HERE / "images.npz") as file:
        x, y, ids = (file[name][: args.n] for name in ("images", "labels", "ids"))
    x = x.astype(np.float32) / 255
    print(
        f"ClusTR + QTRADES on CIFAR-10, {len(y)} test images, linf 8/255. Accuracy, its 95 % interval, time:"
    )
    right = np.asarray(clf.predict(x) == y)
    said("clean", right, started)
    with warnings.catch_warnings():  # that exp scores are bounded is the point
        warnings.filterwarnings("ignore", "logits_fn returned bounded scores", UserWarning)
        x_adv = attacks.pgd(
            jax.random.key(0),
            clf.scores,
            x,
            y,
            eps=EPS,
            step_size=EPS / 4,
            steps=20,
            restarts=10,
            select="loss",
        )
    said("the paper's attack (PGD^20 x 10)", np.asarray(clf.predict(x_adv) == y) & right, started)
    judged = clustr_jax.judge(clf, x, y, eps=EPS, ids=ids, folder=folder, slots=len(y))
    said("a sound protocol (sound-3)", np.asarray(judged.broken_by == ""), started)
    print(f"\n{judged}\n")
    page = pathlib.Path(folder, "report.html").resolve()
    opened = not args.no_browser and sys.stdout.isatty() and webbrowser.open(page.as_uri())
    print(f"{'opened' if opened else 'the page:'} {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
