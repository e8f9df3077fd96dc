"""Processes that share the tasks of a job."""

import multiprocessing
import time

import pytest
from pool_tasks import refuse, slowly

from transfusion_fast.errors import InputError
from transfusion_fast.prepare.pool import worker_pool


@pytest.mark.parametrize("processes", [1, 3])
def test_every_task_is_done_once_by_processes_that_are_numbered(processes):
    with worker_pool("job", processes) as each:
        done = list(each(slowly, range(40)))
    assert sorted(task for _, task, _ in done) == list(range(40))
    assert {job for job, _, _ in done} == {"job"} and {number for _, _, number in done} == set(range(processes))


def test_a_task_that_fails_ends_the_processes_of_the_pool_and_no_other():
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    other.start()
    begun = time.monotonic()
    try:
        with pytest.raises(InputError, match="refused 0"), worker_pool("job", 2) as each:
            list(each(refuse, range(8)))
        assert time.monotonic() - begun < 50, "no task was waited for"
        while multiprocessing.active_children() != [other]:
            assert time.monotonic() - begun < 50, "the processes of the pool remain"
            time.sleep(0.05)
    finally:
        other.kill()  # it may have inherited a handler of SIGTERM
        other.join()
