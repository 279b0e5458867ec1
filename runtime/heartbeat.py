"""Signs of life between processes: when one fails, is killed or hangs, all end within seconds.

NCCL alone would wait ten minutes for a process that is gone, gloo thirty.
"""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from runtime import launcher
from utils import first_line

FAILED = 1  # exit status of every process when one has failed
# Words in the errors of collectives whose other side is gone: they follow from a failure, and are seldom its cause.
_LOST_CONTACT = ("Connection closed", "Connection reset", "Connection was", "Timed out", "gloo", "NCCL", "Broken pipe")


def new_connection() -> dist.Store:
    """A new connection to the key-value store of the process group; torch has no public function for it.

    Each thread needs one of its own, since a call that waits blocks the connection.
    """
    return dist.distributed_c10d._get_default_store().clone()


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_CONTACT)


class Heartbeat:
    """One process's part in a ring: each process beats, and listens to the next one, in a thread of its own.

    They do so through the key-value store of torch.distributed at which the processes met:

        beat/RANK    how many beats this process has given, or "over" when it has finished
        failure      why the run must end, written once: by the first that fails, or that no longer hears the next one

    Every process looks for "failure" with every beat and ends when it is there. The process that failed prints its
    message or traceback; of the others one on each machine prints a line.

    Args:
        silence: seconds without a beat after which the next process counts as hanging.
        message_of: what a person should read of an error, or None if its traceback tells more.
    """

    def __init__(self, rank: int, world: int, silence: float, message_of: Callable[[BaseException], str | None]):
        self.rank = rank
        self.neighbour = (rank + 1) % world
        self.silence = silence
        self.message_of = message_of
        self.interval = min(2.0, silence / 10)  # seconds between two beats
        self.store = new_connection()  # of its own: a blocked main thread must not hold up the beat
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat_until_stopped, name="heartbeat", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """The run is over: this process will be silent, and needs to hear nobody."""
        self.stopped.set()
        self.thread.join()
        self.store.set(f"beat/{self.rank}", "over")

    def fail(self, error: BaseException) -> NoReturn:
        """Tell everybody, print the error if nobody failed before, and end this process."""
        lost_contact = is_lost_contact(error)
        if lost_contact:
            self.stopped.wait(2 * self.interval)  # another process may be about to say what really happened
        # Where the store cannot be reached, lost contact means that another process failed before this one.
        first = self._leave_reason(_reason_of(error), first_without_store=not lost_contact)
        if first:
            self._print_error(error)
            self.stopped.wait(2 * self.interval)  # the store may live in this process: let the others read it
        self._end(say_why=not first)

    def _beat_until_stopped(self) -> None:
        count = 0
        last_heard = None
        patience = self.silence  # seconds left to the neighbour
        while not self.stopped.wait(self.interval):
            count += 1
            heard = self._exchange_beats(count)
            if heard != last_heard or heard == b"over":
                patience = self.silence
            else:
                patience -= self.interval
            last_heard = heard
            if patience <= 0:
                self._end_because_of_silence()

    def _exchange_beats(self, count: int) -> bytes | None:
        """Give a beat, and return the neighbour's newest; None before its first.

        Ends this process where another one has failed.
        """
        try:
            self.store.set(f"beat/{self.rank}", str(count))
            if self.store.check(["failure"]):
                self._end(say_why=True)
            if self.store.check([f"beat/{self.neighbour}"]):
                return self.store.get(f"beat/{self.neighbour}")
            return None
        except RuntimeError as error:  # the process that keeps the store is gone
            _print_line(f"lost the main process ({first_line(error)})")
            os._exit(FAILED)

    def _end_because_of_silence(self) -> NoReturn:
        reason = f"process {self.neighbour} gave no sign of life for {self.silence:.0f} s"
        if self._leave_reason(f": {reason}"):
            _print_line(f"{reason}: it hangs or its machine is gone")
        self._end(say_why=False)

    def _leave_reason(self, reason: str, first_without_store: bool = True) -> bool:
        """Leave the reason of the end where all look.

        Args:
            reason: what follows the name of this process: ": ..." or ", which ...".
            first_without_store: what to return where the store cannot be reached any more.

        Returns:
            Whether this process was the first to leave one.
        """
        own = f"process {self.rank} on {socket.gethostname()}{reason}"
        try:
            stored = self.store.compare_set("failure", "", own)  # writes only where there is nothing yet
        except RuntimeError:
            return first_without_store
        return stored.decode() == own

    def _print_error(self, error: BaseException) -> None:
        message = self.message_of(error)
        if message:
            _print_line(message)
        else:
            traceback.print_exception(error)
            launcher.repeat_below_launcher([launcher.one_line(error)])

    def _end(self, say_why: bool) -> NoReturn:
        """End this process at once.

        Args:
            say_why: print the reason that another process left, if this one is the first of its machine.
        """
        if say_why and int(os.environ.get("LOCAL_RANK", self.rank)) == 0:
            try:
                reason = self.store.get("failure").decode()[:300]
            except RuntimeError:
                reason = "the end of process 0, which kept the others together"
            _print_line(f"ended, because of {reason}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)  # an orderly end would wait for collectives that nobody answers


def _reason_of(error: BaseException) -> str:
    """What follows the name of a process that was ended by this error."""
    if isinstance(error, KeyboardInterrupt):
        return ", which was interrupted"
    return f": {launcher.one_line(error)}"


def _print_line(line: str) -> None:
    """Print a line for the user; on each machine one process has it repeated below what a launcher prints."""
    launcher.say([line])
    launcher.repeat_below_launcher([line])
