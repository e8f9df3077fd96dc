"""Write the model of a run to a folder of its own, for `Transfusion.from_pretrained(OUT)`.

python train/export.py RUN OUT [--checkpoint NAME] [--raw]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transfusion_fast.errors import InputError
from transfusion_fast.training.checkpoint_files import find_checkpoint
from transfusion_fast.training.export import export_model


def main() -> int:
    """Export the run that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of train/pretrain.py")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--checkpoint", help="name, such as step-00000500 (default: the latest)")
    parser.add_argument("--raw", action="store_true", help="write the weights of the last step, not their average")
    options = parser.parse_args()
    try:
        checkpoint = find_checkpoint(options.run, options.checkpoint)
        export_model(options.run, checkpoint, options.out, raw=options.raw)
    except (InputError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(f"exported {checkpoint}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
