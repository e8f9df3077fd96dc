"""Turn a source into a data folder: `python train/prepare.py digits OUT`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transfusion_fast.data.index import Index
from transfusion_fast.data.prepare import prepare_digits
from transfusion_fast.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what the command line asks for; 0 on success, 2 with one line on stderr for input that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (InputError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description="Turn a source into a data folder.")
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    digits = sources.add_parser("digits", help="scikit-learn's 1797 handwritten digits, and sums in words")
    digits.add_argument("out", type=Path, metavar="OUT", help="folder to make; gets train/ and heldout/")
    digits.add_argument("--seq-len", type=int, default=512, help="positions of a pack (default: %(default)s)")
    digits.set_defaults(run=_digits)
    return parser


def _digits(options: argparse.Namespace) -> None:
    prepared = prepare_digits(options.out, sequence_length=options.seq_len)
    state = "already there" if prepared.reused else "written"
    for split, index in prepared.splits.items():
        print(f"{options.out / split}: {state}: {_summary(index)}")


def _summary(index: Index) -> str:
    return (
        f"{index.num_packs} packs of {index.sequence_length} in {len(index.shards)} shards, "
        f"{index.documents} documents, {index.tokens} tokens, {100 * index.waste:.2f} % waste"
    )


if __name__ == "__main__":
    sys.exit(main())
