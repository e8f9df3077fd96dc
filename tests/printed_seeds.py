"""The seeds of dropout in the output of a run, by a setup that ranks can import."""

import os
import re

import torch


def print_seeds() -> None:
    """Print the seeds that torch is given."""
    seed = torch.manual_seed

    def told(number: int) -> torch.Generator:
        os.write(1, f"seed {number}\n".encode())
        return seed(number)

    torch.manual_seed = told


def seeds_in(printed: str) -> list[int]:
    """Return the seeds of dropout, which unlike that of the run have 64 bits."""
    return [number for number in map(int, re.findall(r"^seed (\d+)$", printed, re.MULTILINE)) if number >> 32]
