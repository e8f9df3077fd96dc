"""Train a Transfusion model:  deepspeed [--num_gpus N] train/pretrain.py [CONFIG.yaml] [section.key=value ...]

The command is the same on a CPU, a GPU and a cluster. Run again, it resumes from its last checkpoint.
With --dry-run it checks settings, data and output, prints what the run would need on a cluster, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from transfusion_fast.config import Config
from transfusion_fast.config_reading import load_config, sources
from transfusion_fast.data.loader import complete_config, open_data
from transfusion_fast.data.mixture import Mixture
from transfusion_fast.errors import EXIT_STOPPED, InputError, NodeError
from transfusion_fast.model import ops
from transfusion_fast.training.launch import read_launch
from transfusion_fast.training.run_folder import check_output

# DeepSpeed calls collectives by names that torch has deprecated, which would print a warning on every rank.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

_DRY_RUN_OPTIONS = (
    ("--gpus", int, None, "number of GPUs; default: those of the launcher, or 1"),
    ("--gpus-per-node", int, None, "default: those of the launcher, or 8"),
    ("--gpu", str, "H100", "name of the GPU"),
    ("--mfu", float, 0.4, "model FLOPs utilization to assume"),
    ("--network", float, 400.0, "Gbit/s of each GPU to other nodes"),
    ("--storage", float, 10.0, "GB/s of the shared storage, for all nodes together"),
    ("--packs", int, 32, "packs to read; those at a URL are fetched into data.cache, as in training"),
)
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


def main() -> int:
    """Run one rank, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="CONFIG.yaml | section.key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # some launchers pass it
    _add_dry_run(parser)
    options = parser.parse_intermixed_args()
    arguments = options.arguments
    path = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else DEFAULT_CONFIG
    try:
        _check_dry_run(parser, options)
        config = load_config(path, arguments)
        data = open_data(config)
        config = complete_config(config, data)
        check_output(Path(config.train.output))
        ops.describe(config.model.backend, torch.device("cpu"))  # fails if it cannot run here
        if options.dry_run:
            return _dry_run(options, config, data, sources(config, path, arguments))
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


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("estimate of a run")
    group.add_argument("--dry-run", action="store_true", help="print what the run would need, and train nothing")
    for name, kind, default, meaning in _DRY_RUN_OPTIONS:
        suffix = "" if default is None else "; default: %(default)s"
        group.add_argument(name, type=kind, default=default, help=meaning + suffix)


def _check_dry_run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raise InputError for an option of the estimate in a command that would train."""
    for name, *_ in _DRY_RUN_OPTIONS:
        key = name.strip("-").replace("-", "_")
        if not options.dry_run and (got := getattr(options, key)) != parser.get_default(key):
            raise InputError(f"{name} must come with --dry-run, got {got} without; add it, or leave {name} out")


def _dry_run(
    options: argparse.Namespace, config: Config, data: Mixture, settings: Iterable[tuple[str, Any, str]]
) -> int:
    from transfusion_fast.training.dry_run import dry_run
    from transfusion_fast.training.estimate import Cluster

    launch = read_launch(os.environ)
    per_node = launch.local_size if launch.world_size > 1 else 8
    cluster = Cluster(
        gpu_name=options.gpu,
        gpus=launch.world_size if options.gpus is None else options.gpus,
        gpus_per_node=per_node if options.gpus_per_node is None else options.gpus_per_node,
        mfu=options.mfu,
        network=options.network * 1e9 / 8,
        storage=options.storage * 1e9,
    )
    if launch.rank == 0:
        print(dry_run(config, data, cluster, options.packs, settings))
    return 0


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
