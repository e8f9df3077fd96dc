"""Tasks for the processes of a pool, in a module that they can import."""

import time

from transfusion_fast.errors import InputError
from transfusion_fast.prepare.pool import worker_number


def slowly(job, task):
    """(job, task, which process it was)."""
    time.sleep(0.05)
    return job, task, worker_number()


def refuse(job, task):
    """Fail at once for task 0; take a minute for others."""
    time.sleep(60 if task else 0)
    raise InputError(f"refused {task}")
