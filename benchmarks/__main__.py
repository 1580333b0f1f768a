"""`python -m benchmarks`: every part, or those that are named."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab import Lab
from benchmarks.parts import PARTS
from benchmarks.parts.model import REFERENCE
from benchmarks.report import Table, machine, write_json
from benchmarks.sizes import FULL, QUICK, Sizes, changed

EPILOG = """\
examples:
  python -m benchmarks                      every part; a quarter of an hour on two cores
  python -m benchmarks --quick              the same, small: does it work?
  python -m benchmarks write levers         two parts
  python -m benchmarks write --rows 100000 --rounds 5
  python -m benchmarks --full --json all.json

Everything that is needed is started here and removed afterwards: a Postgres server, an endpoint
that answers from memory, the local model server. DATABASE_URL and API keys are not used. Every
run's rows are read back and compared with the truth; a wrong vector ends the benchmark.
Ratios travel to other machines, seconds do not. benchmarks/README.md has the last table."""


def at_least_one(text: str) -> int:
    """A size or a number of rounds from the command line; of none there is no median."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parts = "\n".join(f"  {name:11} {part.about}" for name, part in PARTS.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures the product against the floors of the same run.\n\nparts:\n" + parts,
        epilog=EPILOG,
    )
    made.add_argument("parts", nargs="*", metavar="PART", help="which parts (default: all)")
    made.add_argument("--quick", action="store_true", help="small sizes: two minutes")
    made.add_argument("--full", action="store_true", help="the sizes of the targets: an hour")
    made.add_argument("--rounds", type=at_least_one, help="alternating rounds (default: 3)")
    made.add_argument("--rows", type=at_least_one, help="rows embedded in a round")
    made.add_argument("--script-rows", type=at_least_one, help="rows for the hand-written script")
    made.add_argument(
        "--table-rows", type=at_least_one, help="rows where nothing, or little, is pending"
    )
    made.add_argument("--index-rows", type=at_least_one, help="rows in the index parts")
    made.add_argument(
        "--memory-rows", type=at_least_one, nargs="+", help="sizes whose memory is compared"
    )
    made.add_argument(
        "--growth-rows", type=at_least_one, nargs="+", help="sizes of the growth part"
    )
    made.add_argument(
        "--freshness-commits", type=at_least_one, help="commits of the freshness part"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument(
        "--reference-python", type=Path, metavar="PYTHON",
        help="an interpreter with sentence-transformers, for the part `model`",
    )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 2 for a part that does not exist."""
    made = parser()
    options = made.parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        made.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    preset = QUICK if options.quick else FULL if options.full else Sizes()
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items()}
    sizes = changed(preset, given)
    if options.reference_python:
        os.environ[REFERENCE] = str(options.reference_python)
    about = machine()
    print("; ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    found: dict[str, Sequence[Table]] = {}
    with Lab() as lab:
        for name in options.parts or PARTS:
            began = time.monotonic()
            found[name] = PARTS[name].run(lab, sizes)
            print(f"\n## {name}: {PARTS[name].about}\n", flush=True)
            for table in found[name]:
                print(table.markdown(), flush=True)
            print(f"({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
            if options.json:
                write_json(options.json, found, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
