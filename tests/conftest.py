"""What every test shares: one thread, so that sums round alike, and the same examples in every run."""

import os

# Before torch is imported, and inherited by the ranks that tests start: the number of threads changes the order of
# sums, and with it the sixth digit.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")
