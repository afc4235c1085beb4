"""python -m clustr_jax.report DIR [DIR ...] [--out=compare.html]"""

import argparse
import pathlib
import sys

from clustr_jax import report
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.stage_names import REPORT
from clustr_jax.runtime.streams import stage_key
from clustr_jax.storage import loading


def _checked(record: report.Record) -> tuple[report.Record, str]:
    """Its record held against its network, and ""; where there are no weights as it is, and a warning."""
    try:
        network = loading.digest(loading.load(record.root))
    except UserError as error:
        return (
            record,
            f"warning: whether the results in {record.root} are of its network is not known: {error}",
        )
    return report.read(record.root, network), ""


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a mistake that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m clustr_jax.report",
        description=(report.__doc__ or "").split("\n\n    record")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", metavar="DIR")
    parser.add_argument("--out", metavar="FILE", help="of several directories; default: compare.html")
    args = parser.parse_args(argv)
    try:
        records = [report.read(path) for path in args.workdirs]
        warnings = []
        if len(records) > 1:
            records, warnings = zip(*map(_checked, records), strict=True)
            path = report.write_comparison(list(records), pathlib.Path(args.out or "compare.html"))
        elif args.out:
            raise UserError("--out is for several directories; the page of one is DIR/report.html")
        else:
            record = report.read(args.workdirs[0], loading.digest(loading.load(args.workdirs[0])))
            path = report.write(
                record, report.look(record, stage_key(record.config["seed"], REPORT), None), _warn
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or 'a file'}", file=sys.stderr)
        return 2
    for text in filter(None, warnings):
        print(text, file=sys.stderr)
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
