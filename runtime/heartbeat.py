"""Signs of life between processes: when one fails, is killed or hangs, all end within seconds.

NCCL alone would wait ten minutes for a process that is gone, gloo thirty.
"""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable

import torch.distributed as dist

FAILED = 1  # exit status of every process when one has failed
_LOST_CONTACT = ("Connection closed", "Connection reset", "Timed out", "gloo", "NCCL", "Broken pipe")


class Heartbeat:
    """One process's part in a ring, where each beats and listens to the next, through the store that they met at.

    Whoever first fails, or first misses a beat for too long, leaves the reason under one key of the store; everybody
    reads that key with every beat and ends. The process that failed prints its traceback, the others one line a machine.

    Args:
        silence: seconds without a beat after which the next process counts as hanging.
        message_of: what a person should read of an error, or None where its traceback tells more.
    """

    def __init__(self, rank: int, world: int, silence: float, message_of: Callable[[BaseException], str | None]):
        self.rank, self.world = rank, world
        self.silence = silence
        self.message_of = message_of
        self.interval = min(2.0, silence / 10)
        # A connection of its own: a blocked main thread must not hold up the beat. Torch has no public way to it.
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat_until_stopped, name="heartbeat", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """The run is over: this process will be silent, and needs to hear nobody."""
        self.stopped.set()
        self.thread.join()
        self.store.set(f"beat/{self.rank}", "over")

    def fail(self, error: BaseException) -> None:
        """Tell everybody, print the error if nobody failed before, and end this process."""
        lost_contact = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_CONTACT)
        if lost_contact:
            self.stopped.wait(2 * self.interval)  # another process may be about to say what really happened
        first = self._leave_reason(f"{type(error).__name__}: {error}", if_store_is_gone=not lost_contact)
        if first:
            self._print_error(error)
            self.stopped.wait(2 * self.interval)  # the store may live in this process: let the others read it
        self._end(first)

    def _beat_until_stopped(self) -> None:
        neighbour = (self.rank + 1) % self.world
        last_beat, patience, count = None, self.silence, 0
        while not self.stopped.wait(self.interval):
            count += 1
            beat = self._exchange_beats(count, neighbour)
            if beat != last_beat or beat == b"over":
                patience = self.silence
            else:
                patience -= self.interval
            last_beat = beat
            if patience <= 0:
                self._end_because_of_silence(neighbour)

    def _exchange_beats(self, count: int, neighbour: int) -> bytes | None:
        """Give a beat, and return the neighbour's newest; ends this process where another one has failed."""
        try:
            self.store.set(f"beat/{self.rank}", str(count))
            if self.store.check(["failure"]):
                self._end(first=False)
            if self.store.check([f"beat/{neighbour}"]):
                return self.store.get(f"beat/{neighbour}")
            return None
        except RuntimeError as error:  # the process that keeps the store is gone
            _say(f"run.py: lost the main process ({str(error).splitlines()[0]})")
            os._exit(FAILED)

    def _end_because_of_silence(self, neighbour: int) -> None:
        silent = f"process {neighbour} gave no sign of life for {self.silence:.0f} s"
        if self._leave_reason(silent):
            _say(f"run.py: {silent}: it hangs or its machine is gone")
        self._end(first=True)

    def _leave_reason(self, reason: str, if_store_is_gone: bool = True) -> bool:
        """Leave the reason of the end where all look. Returns whether this process was the first to do so."""
        own = f"process {self.rank} on {socket.gethostname()}: {reason}"
        try:
            return self.store.compare_set("failure", "", own).decode() == own
        except RuntimeError:
            return if_store_is_gone

    def _print_error(self, error: BaseException) -> None:
        message = self.message_of(error)
        if message:
            _say(message)
        else:
            traceback.print_exception(error)

    def _end(self, first: bool) -> None:
        if not first and int(os.environ.get("LOCAL_RANK", self.rank)) == 0:
            try:
                reason = self.store.get("failure").decode()[:300]
            except RuntimeError:
                reason = "the end of process 0, which kept the others together"
            _say(f"run.py: ended, because of {reason}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)  # an orderly end would wait for collectives that nobody answers


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
