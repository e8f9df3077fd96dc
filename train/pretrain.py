"""Trains a Transfusion model:  deepspeed [--num_gpus N] train/pretrain.py [CONFIG.yaml] [section.key=value ...]

The same command on a CPU, a GPU and a cluster. Run again, it resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from transfusion_fast.config import load_config
from transfusion_fast.data.loader import open_data
from transfusion_fast.errors import InputError
from transfusion_fast.model import ops
from transfusion_fast.training.run_folder import check_output

# DeepSpeed calls collectives by names that torch renames; a line from every rank about it helps nobody.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


def main() -> int:
    """Runs one rank; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.yaml | section.key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from launchers that still pass it
    arguments = parser.parse_args().arguments
    path = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else DEFAULT_CONFIG
    try:
        config = load_config(path, arguments)
        data = open_data(config)
        check_output(Path(config.train.output))
        ops.describe(config.model.backend, torch.device("cpu"))  # refuses one that cannot run here
        from transfusion_fast.training.ranks import join_ranks
        from transfusion_fast.training.trainer import Trainer

        Trainer(config, data, join_ranks(config.train)).run()
        code = 0
    except OSError as error:
        _report(error)
        return 2
    except (InputError, NotImplementedError) as error:
        _report(error)
        code = 2
    # A thread of gloo that still holds the last collective while Python ends would abort the process.
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _report(error: Exception) -> None:
    """Prints the error once where all ranks have it: the others leave rank 0 time to speak, then go down with it.

    What the operating system refuses, a full disk say, may concern one rank alone, which then says so.
    """
    if int(os.environ.get("RANK", "0")) and not isinstance(error, OSError):
        time.sleep(3)
    else:
        print(f"pretrain: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
