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
    monitor = _Monitor(ranks, limit, dist.TCPStore(host, port, wait_for_workers=False, timeout=timeout))
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

    def __init__(self, ranks: Ranks, limit: float, store: dist.TCPStore):
        self.ranks, self.limit, self.store, self.ended = ranks, limit, store, threading.Event()
        self.host = socket.gethostname()
        others = range(1, ranks.world_size) if ranks.is_main else [0]
        self.heard = {str(rank): (b"0 an-unknown-host 0", time.monotonic()) for rank in others}
        """The last message of each rank that this one listens to, `COUNT HOST PROCESS`, and when it arrived."""
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
                self.store.set(str(self.ranks.rank), f"{count} {self.host} {os.getpid()}")
                present = [rank for rank in self.heard if self.store.check([rank])]
                for rank, message in zip(present, self.store.multi_get(present), strict=True):
                    if message != self.heard[rank][0]:
                        self.heard[rank] = message, time.monotonic()
                if self.store.check([_VERDICT]):
                    self._end(*self.store.get(_VERDICT).decode().split())

    def _watch(self) -> None:
        while not self.ended.wait(self.limit / 6):
            for rank, (message, since) in self.heard.items():
                if time.monotonic() - since > self.limit:
                    self._end(rank, *message.decode().split()[1:])

    def _end(self, rank: str, host: str, process: str) -> None:
        """Name the lost rank, print the stacks of this rank's threads, and exit without waiting for anything."""
        if self.ranks.is_main:
            self.store.set(_VERDICT, f"{rank} {host} {process}")
        if self.ranks.is_main or rank == "0":
            lost = f"rank {rank} on {host} (process {process}) has not answered for {self.limit:.0f} s"
            print(f"pretrain: {lost}; the stacks of the others follow", file=sys.stderr, flush=True)
        print(f"rank {self.ranks.rank} on {self.host}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self.ranks.is_main:
            time.sleep(self.limit / 3)  # the others read the verdict from the store in this process
        if host == self.host:  # a stopped process does not act on milder signals
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        os._exit(EXIT_LOST_RANK)
