"""Processes that start together, stop together when one is told to, and end together when one fails."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator

from runtime import heartbeat, launcher
from runtime.engine import start
from utils import RunError, first_line, is_disk_error, refusal_of_file

# Exit statuses, the same on every process of a run.
FINISHED = launcher.FINISHED
FAILED = heartbeat.FAILED
REFUSED = launcher.REFUSED
STOPPED = 75  # told to stop, and can continue: EX_TEMPFAIL of sysexits.h

_STOPPING = f"{launcher.INTERRUPTED}: stopping after this step"
_STOPPING_AT_ONCE = (
    "; Ctrl-C again ends at once, and the same command continues from the last saved state, if there is one"
)


def user_message(error: BaseException) -> str | None:
    """What a user of run.py should read instead of a traceback; None if a traceback tells more."""
    if isinstance(error, KeyboardInterrupt):
        return launcher.INTERRUPTED
    if isinstance(error, RunError):
        return f"run.py: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"run.py: the memory of the GPU is full ({first_line(error)}), outside of a training step. "
            "In a validation or an evaluation a lower max_tokens_per_forward helps; if this came at the start, "
            "share the model out over more GPUs (configs/accelerate_config.yaml). What was saved before is intact"
        )
    if is_disk_error(error):
        return (
            f"run.py: {refusal_of_file(error)}\n"
            "run.py: what was saved before is intact, and the same command continues from there"
        )
    return None


@contextmanager
def process_group(
    trackers: list[str],
    logging_dir: str,
    silence: float,
    message_of: Callable[[BaseException], str | None] = user_message,
) -> Iterator[Accelerator]:
    """Start accelerate; inside, an exception on any process ends all of them, with its message printed once.

    Args:
        silence: seconds without a sign of life after which a process counts as hanging.
        message_of: what a person should read of an error, or None if its traceback tells more.
    """
    accelerator = start(trackers, logging_dir)
    if accelerator.num_processes == 1:
        yield accelerator
        accelerator.state.destroy_process_group()
        return
    signs_of_life = heartbeat.Heartbeat(accelerator.process_index, accelerator.num_processes, silence, message_of)
    try:
        yield accelerator
    except BaseException as error:  # an exit or an interrupt ends the others as well
        signs_of_life.fail(error)
    signs_of_life.stop()
    dist.barrier()  # the store lives in one of the processes: it must not end before the others
    dist.destroy_process_group()


class StopSignal:
    """Whether this process was told to stop: SIGTERM before a machine is taken away, SIGUSR1 by a scheduler, or Ctrl-C.

    The signal only sets `stop`; the loop looks at it between two steps, so a second signal does no harm. But a second
    Ctrl-C means "at once": it is left to the system, which waits for no step and no file that is being written. What
    was saved before is whole, whenever that comes.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.stop = False
        self.earlier_handlers = {}

    def __enter__(self) -> "StopSignal":
        """Listen to the signals."""
        for number in self.SIGNALS:
            self.earlier_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _frame) -> None:
        self.stop = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if launcher.is_first_on_machine():
                # A launcher does not pass a second Ctrl-C on. And `print` may be what was interrupted: not called here.
                line = _STOPPING if launcher.is_launched() else _STOPPING + _STOPPING_AT_ONCE
                os.write(2, f"\n{line}\n".encode())

    def __exit__(self, *_) -> None:
        """Put back what the signals did before."""
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)
