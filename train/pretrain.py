"""Train a Transfusion model:  deepspeed [--num_gpus N] train/pretrain.py [CONFIG.yaml] [section.key=value ...]

The command is the same on a CPU, a GPU and a cluster. Run again, it resumes from its last checkpoint.
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

from transfusion_fast.config import Config, load_config
from transfusion_fast.data.loader import complete_config, open_data
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import EXIT_STOPPED, InputError, NodeError
from transfusion_fast.model import ops
from transfusion_fast.training.run_folder import check_output

# DeepSpeed calls collectives by names that torch has deprecated, which would print a warning on every rank.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


def main() -> int:
    """Run one rank, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.yaml | section.key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # some launchers pass it
    arguments = parser.parse_args().arguments
    path = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else DEFAULT_CONFIG
    try:
        config = load_config(path, arguments)
        data = open_data(config)
        config = complete_config(config, data)
        check_output(Path(config.train.output))
        ops.describe(config.model.backend, torch.device("cpu"))  # fails if it cannot run here
        code = _train(config, data)
    except (InputError, NotImplementedError, OSError) as error:
        _report(error)
        code = error.exit_code if isinstance(error, InputError) else 2
        if isinstance(error, OSError):  # the other ranks may not have it, so waiting for them would be in vain
            return code
    # If a gloo thread still held the last collective when Python exits, it would abort the process.
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _train(config: Config, data: Mixture) -> int:
    """Train, and return the exit code."""
    # These imports take seconds, which an error in the settings should not wait for.
    from transfusion_fast.training.heartbeat import heartbeat
    from transfusion_fast.training.ranks import join_ranks
    from transfusion_fast.training.run_lock import lock_run
    from transfusion_fast.training.trainer import Trainer

    ranks = join_ranks(config.train)
    with heartbeat(ranks, config.train.heartbeat), lock_run(Path(config.train.output), ranks):
        return 0 if Trainer(config, data, ranks).run() else EXIT_STOPPED


def _report(error: Exception) -> None:
    """Print an error once: rank 0 prints errors that all ranks have, and the others give it time before they exit.

    An error of the operating system, such as a full disk, may concern one rank alone, so each rank prints its own. An
    error of a node is printed by its first rank.
    """
    rank = os.environ.get("LOCAL_RANK" if isinstance(error, NodeError) else "RANK", "0")
    if int(rank) and not isinstance(error, OSError):
        time.sleep(3)
    else:
        print(f"pretrain: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
