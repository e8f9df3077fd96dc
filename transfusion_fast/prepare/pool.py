"""Processes that work on the tasks of one job, and end with the process in charge, however that ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, forkserver, get_context, parent_process
from multiprocessing.sharedctypes import Synchronized
from typing import Any, ClassVar, TypeVar

from transfusion_fast.errors import InputError

Job = TypeVar("Job")
Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def worker_pool(job: Job, processes: int) -> Iterator[Callable[..., Iterator]]:
    """Gives `each(function, tasks)`: function(job, task) of every task, in any order, in so many processes.

    InputError where one of them ends early.
    """
    if processes < 1:
        raise InputError(f"processes must be 1 or more, got {processes}")
    if processes == 1:
        yield lambda function, tasks: (function(job, task) for task in tasks)
        return
    others = set(active_children())
    context = get_context("forkserver")  # threads of libraries do not survive a fork
    with _interrupts_ignored():  # by its children too: Ctrl-C reaches all, and the process in charge ends the others
        forkserver.ensure_running()
    with ProcessPoolExecutor(processes, context, _begin, (job, context.Value("i", 0))) as executor:

        def each(function: Callable[[Job, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
            waiting: set[Future[Result]] = set()
            for task in tasks:
                waiting.add(executor.submit(_run, function, task))
                if len(waiting) > 2 * processes:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in waiting)

        try:
            yield each
        except BrokenProcessPool as error:
            raise InputError(
                f"one of {processes} processes ended early, perhaps for memory; run it again with fewer: it goes on"
            ) from error
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def worker_number() -> int:
    """Which of its pool's processes this is, counted from 0; 0 where there is no pool."""
    return _Worker.number


class _Worker:
    """What a process of the pool was started with."""

    job: ClassVar[Any]
    number: ClassVar[int] = 0


def _begin(job: object, begun: Synchronized[int]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with begun.get_lock():
        _Worker.number = begun.value
        begun.value += 1
    _Worker.job = job


def _end_with_parent() -> None:
    """Who killed that one may begin anew in the same folder."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_Worker.job, task)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set, and no interrupt arrives
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
