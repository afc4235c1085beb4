"""python -m clustr_jax.report DIR [DIR ...] [--out=compare.html]"""

import argparse
import pathlib
import sys

from clustr_jax import report
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.paths import local
from clustr_jax.runtime.programs import program
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


@program
def main(argv: list[str]) -> None:
    """The page; see `program` for its exit codes."""
    parser = argparse.ArgumentParser(
        prog="python -m clustr_jax.report",
        description=(report.__doc__ or "").split("\n\n    record")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", metavar="DIR")
    parser.add_argument("--out", metavar="FILE", help="of several directories; default: compare.html")
    args = parser.parse_args(argv)
    out = local(args.out, "--out") if args.out else None
    records = [report.read(path) for path in args.workdirs]
    warnings = []
    if len(records) > 1:
        records, warnings = zip(*map(_checked, records), strict=True)
        path = report.write_comparison(list(records), out or pathlib.Path("compare.html"))
    elif out:
        raise UserError("--out is for several directories; the page of one is DIR/report.html")
    else:
        record = report.read(args.workdirs[0], loading.digest(loading.load(args.workdirs[0])))
        path = report.write(
            record, report.look(record, stage_key(record.config["seed"], REPORT), None), _warn
        )
    for text in filter(None, warnings):
        _warn(text)
    print(f"report: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
