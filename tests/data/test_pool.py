"""Processes that share the tasks of a job."""

from pool_tasks import slowly

from transfusion_fast.data.pool import worker_pool


def test_every_task_is_done_once_by_processes_that_are_numbered():
    with worker_pool("job", 3) as each:
        done = list(each(slowly, range(40)))
    assert sorted(task for _, task, _ in done) == list(range(40))
    assert {job for job, _, _ in done} == {"job"} and {number for _, _, number in done} == {0, 1, 2}


def test_one_process_is_this_one():
    with worker_pool("job", 1) as each:
        assert list(each(slowly, range(3))) == [("job", task, 0) for task in range(3)]
