"""Formulas in plain PyTorch that torch.compile turns into C++ where they run on a CPU and the time pays off.

Every operation of PyTorch is a pass over memory, and a compiled formula is a single one. Compiling takes seconds for
each formula and dtype; PyTorch caches the results on disk. TORCH_COMPILE_DISABLE=1 turns it off.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import any_torch_dispatch_mode_on_stack

LEAST = 2**18  # numbers in the inputs of one call: with fewer, a call saves less than a millisecond


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile needs on a CPU, or None where it is missing."""
    return shutil.which(cpp_compiler_name())


def cpp_compiler_name() -> str:
    """Return the compiler that the environment variable CXX names, or the platform's own."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def used_compiler() -> str | None:
    """Return the path of the compiler of large formulas, or None where they run uncompiled."""
    return None if torch._dynamo.config.disable else cpp_compiler()


class Compiled:
    """A function that computes `formula`, compiled for large tensors on a CPU where gradients are enabled.

    Everywhere else it computes `plain`, by default the formula itself: without a C++ compiler, where the compiler
    fails, and inside another torch.compile, which compiles the formula with what surrounds it. The size alone decides,
    so equal inputs give equal bits in every process of a machine. The first axis of every tensor may differ from call
    to call without another compilation. Beyond eight compilations for other widths, dtypes or gradients, PyTorch warns
    and runs the formula uncompiled.
    """

    def __init__(self, formula: Callable[..., Any], plain: Callable[..., Any] | None = None):
        self.formula, self.plain = formula, plain or formula

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.plain(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        # Fake tensors have no data, and the compiler would leave a formula alone forever that it first saw in a mode.
        ordinary = all(x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) for x in tensors)
        if not ordinary or sum(x.numel() for x in tensors) < LEAST or any_torch_dispatch_mode_on_stack():
            return self.plain(*args)
        for x in tensors:
            if x.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            return self._compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason, _, _hint = str(error).partition("\n\n")
            _warn(f"torch.compile fails: {' '.join(reason.split())}")
            self._compiled = self.plain
            return self.plain(*args)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        if used_compiler() is not None:
            return torch.compile(self.formula, dynamic=False)
        if not torch._dynamo.config.disable:
            _warn(f"there is no C++ compiler {cpp_compiler_name()}; install one")
        return self.plain


@cache
def _warn(reason: str) -> None:
    logging.getLogger(__name__).warning("ops of the torch backend run uncompiled, and slower on this CPU: %s", reason)
