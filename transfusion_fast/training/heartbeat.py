"""Signs of life between ranks, so that a rank that is stopped or unreachable ends the run at once and is named.

Without this the others wait in a collective operation for its time limit, and the error does not say for whom.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from transfusion_fast.errors import EXIT_LOST_RANK
from transfusion_fast.training.ranks import Ranks

_VERDICT = "verdict"


@contextlib.contextmanager
def heartbeat(ranks: Ranks, limit: float) -> Iterator[None]:
    """End the run once a rank has not answered for `limit` seconds: all ranks that do print their stacks. Collective.

    A thread of every rank tells rank 0 a few times in that time that the rank is alive, and hears from rank 0.
    """
    if ranks.world_size == 1:
        yield
        return
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=limit)
    server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if ranks.is_main else None
    [port] = ranks.gather([server.port] if server else [])
    processes = ranks.gather([(socket.gethostname(), os.getpid())])
    monitor = _Monitor(ranks, limit, processes, dist.TCPStore(host, port, wait_for_workers=False, timeout=timeout))
    try:
        yield
        monitor.stop()
        ranks.barrier()  # rank 0 holds the store, so it ends last
    except RuntimeError:  # a collective operation fails when another rank exits, and that rank may know more
        monitor.ended.wait(limit / 3)
        raise
    finally:
        monitor.stop()


class _Monitor:
    """The threads of one rank. Rank 0 listens to all others; they listen to rank 0, which names a lost rank."""

    def __init__(self, ranks: Ranks, limit: float, processes: list[tuple[str, int]], store: dist.TCPStore):
        self.ranks, self.limit, self.processes, self.store = ranks, limit, processes, store
        self.ended = threading.Event()
        others = range(1, ranks.world_size) if ranks.is_main else [0]
        self.heard = {str(rank): (b"", time.monotonic()) for rank in others}
        """The last count of each rank that this one listens to, and when it arrived."""
        # A thread that speaks to the store waits for ever if the process of rank 0 is stopped, so another one watches.
        self.threads = [threading.Thread(target=task, daemon=True) for task in (self._speak, self._watch)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End the threads: Python aborts when it exits while one of them speaks to the store."""
        self.ended.set()
        for thread in self.threads:
            thread.join(self.limit / 3)

    def _speak(self) -> None:
        count = 0
        with contextlib.suppress(dist.DistError):  # rank 0 has ended
            while not self.ended.wait(self.limit / 6):
                count += 1
                self.store.set(str(self.ranks.rank), str(count))
                present = [rank for rank in self.heard if self.store.check([rank])]
                for rank, message in zip(present, self.store.multi_get(present), strict=True):
                    if message != self.heard[rank][0]:
                        self.heard[rank] = message, time.monotonic()
                if self.store.check([_VERDICT]):
                    self._end(int(self.store.get(_VERDICT)))

    def _watch(self) -> None:
        while not self.ended.wait(self.limit / 6):
            for rank, (_, since) in self.heard.items():
                if time.monotonic() - since > self.limit:
                    self._end(int(rank))

    def _end(self, lost: int) -> None:
        """Name the lost rank, print the stacks of this rank's threads, and exit without waiting for anything."""
        (host, process), (own_host, _) = self.processes[lost], self.processes[self.ranks.rank]
        if self.ranks.is_main:
            self.store.set(_VERDICT, str(lost))
        if self.ranks.is_main or lost == 0:
            named = f"rank {lost} on {host} (process {process}) has not answered for {self.limit:.0f} s"
            print(f"pretrain: {named}; the stacks of the others follow", file=sys.stderr, flush=True)
        print(f"rank {self.ranks.rank} on {own_host}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self.ranks.is_main:
            time.sleep(self.limit / 3)  # the others read the verdict from the store in this process
        if host == own_host:  # a stopped process does not act on milder signals
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        os._exit(EXIT_LOST_RANK)
