"""python -m clustr_jax.report DIR [DIR ...] [--out=compare.html]"""

import argparse
import pathlib
import sys

from clustr_jax import loading, report
from clustr_jax.errors import UserError
from clustr_jax.stages import REPORT, stage_key


def _network(path: pathlib.Path, unknown: list[str]) -> str | None:
    """Its digest; None, and a line more in `unknown`, where results came without weights to compare with."""
    try:
        return loading.digest(loading.load(path))
    except UserError as error:
        unknown.append(f"warning: whether the results in {path} are of its network is not known: {error}")
        return None


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a mistake that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m clustr_jax.report", description=(report.__doc__ or "").split("\n\n    record")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("workdirs", nargs="+", metavar="DIR")
    parser.add_argument("--out", metavar="FILE", help="of several directories; default: compare.html")
    args = parser.parse_args(argv)
    try:
        records = [report.read(path) for path in args.workdirs]
        unknown = []
        if len(records) > 1:
            records = [report.read(record.root, _network(record.root, unknown)) for record in records]
            path = report.write_comparison(records, pathlib.Path(args.out or "compare.html"))
        elif args.out:
            raise UserError("--out is for several directories; the page of one is DIR/report.html")
        else:
            record = report.read(args.workdirs[0], loading.digest(loading.load(args.workdirs[0])))
            path = report.write(record, report.look(record, stage_key(record.config["seed"], REPORT), None))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'a file'}", file=sys.stderr)
        return 2
    for text in unknown:
        print(text, file=sys.stderr)
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
