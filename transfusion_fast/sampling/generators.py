"""Random numbers of sampling, keyed by the seed and the number of a prompt, so that no prompt depends on the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from transfusion_fast.errors import InputError
from transfusion_fast.sampling.settings import is_integer
from transfusion_fast.settings import MAX_SEED


def text_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of the text that continues a prompt."""
    return _keyed(seed, number, 0)


def image_generator(seed: int, number: int, image: int = 0) -> torch.Generator:
    """Return the generator of an image's noise, the initial noise first: the image-th that is drawn for a prompt."""
    return _keyed(seed, number, 1 + image)


def _keyed(*key: int) -> torch.Generator:
    """Return a CPU generator for a key of numbers in 0..2^64 - 1; different keys give independent numbers."""
    words = [word for number in key for word in (number & 0xFFFFFFFF, number >> 32)]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))


def check_numbers(seed: int, numbers: Sequence[int], count: int) -> list[int]:
    """Return the numbers of the prompts; raise InputError if they or the seed cannot key random numbers."""
    listed = [*numbers] if isinstance(numbers, Iterable) else []
    whole = all(is_integer(x) and 0 <= x <= MAX_SEED for x in (seed, *listed))
    if not whole or len(listed) != count:
        rule = f"seed and prompt_numbers must be integers in 0..{MAX_SEED}, with a number for each of {count} prompts"
        raise InputError(f"{rule}, got {seed} and {listed or numbers!s:.60}; correct them")
    return [int(number) for number in listed]
