"""A pool of processes that work on the tasks of one job, and end with the process in charge, however that ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, forkserver, get_context, parent_process, resource_tracker
from multiprocessing.sharedctypes import Synchronized
from typing import Any, ClassVar, TypeVar

from transfusion_fast.errors import InputError

Job = TypeVar("Job")
Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def worker_pool(job: Job, processes: int) -> Iterator[Callable[..., Iterator]]:
    """Provide `each(function, tasks)`, which yields function(job, task) of every task, in any order.

    With one process, the calling process does the work. Tasks are taken from their iterable as processes become free.

    Raises:
        InputError: `processes` is below 1, or a process ended early.
    """
    if processes < 1:
        raise InputError(f"processes must be 1 or more, got {processes}; give a larger number")
    _use_one_thread()
    if processes == 1:
        yield lambda function, tasks: (function(job, task) for task in tasks)
        return
    others = set(active_children())
    context = get_context("forkserver")  # threads of libraries do not survive a fork
    # What the server imports before it forks is in memory once and not once for each process.
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.startswith("transfusion_fast.")))
    # Ctrl-C reaches all processes. The main process ends the others, which inherit the signal as blocked.
    resource_tracker.ensure_running()  # first, as it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with ProcessPoolExecutor(processes, context, _Worker.begin, (job, context.Value("i", 0))) as executor:

        def each(function: Callable[[Job, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
            waiting: set[Future[Result]] = set()
            for task in tasks:
                waiting.add(executor.submit(_Worker.run, function, task))
                if len(waiting) > 2 * processes:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in waiting)

        try:
            yield each
        except BrokenProcessPool as error:
            raise InputError(
                f"{processes} processes must run to their end, got one that ended early, perhaps for lack of memory; "
                "run it again with fewer: it resumes"
            ) from error
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def worker_number() -> int:
    """Return the number of this process in its pool, counted from 0; 0 without a pool."""
    return _Worker.number


class _Worker:
    """The state of a process of the pool."""

    job: ClassVar[Any]
    number: ClassVar[int] = 0

    @classmethod
    def begin(cls, job: object, begun: Synchronized[int]) -> None:
        _use_one_thread()
        threading.Thread(target=_end_with_parent, daemon=True).start()
        with begun.get_lock():
            cls.job, cls.number = job, begun.value
            begun.value += 1

    @classmethod
    def run(cls, function: Callable[[Any, Task], Result], task: Task) -> Result:
        return function(cls.job, task)


def _use_one_thread() -> None:
    """Keep tokenizers, which have threads for every core, to the cores that `processes` asks for."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _end_with_parent() -> None:
    """End this process with its parent: after a kill, the user may start again in the same folder at once."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
