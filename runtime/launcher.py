"""What `accelerate launch` and torchrun do to a process that they start, and how the process deals with it.

They set its number of threads, print a traceback of their own below its last lines, and pass signals on, or die of
them. Imports no torch, because it is needed before: while a mistyped key is reported.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Exit statuses that are needed before torch is imported; runtime/processes.py has all of them.
FINISHED = 0
REFUSED = 2  # a problem was found before the run, and nothing was started

INTERRUPTED = "run.py: interrupted"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the one that started it ends
_PATIENCE_SECONDS = 60  # torchrun gives the other processes 30 s to end, before it ends itself
# Run in a Python of its own. Its first argument is a file descriptor that becomes readable when the launcher has ended.
_REPEATER = """
import os, select, sys
launcher, milliseconds, lines = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ended = select.poll()
ended.register(launcher, select.POLLIN)
if ended.poll(milliseconds):
    os.write(2, lines.encode())
"""


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process: each sets one of these for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ


def is_first_on_machine() -> bool:
    """Whether this process is the one that speaks for its machine, launched or not."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def processes() -> int:
    """How many processes the launcher started, on all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def has_other_machines() -> bool:
    """Whether the launcher started processes on other machines as well."""
    return processes() > int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def main_address() -> tuple[str, int, int] | None:
    """Where the launcher keeps the store of its processes, and how many these are: (host, port, processes).

    None for a process alone, and where the store will live in one of the processes instead.
    """
    if processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), processes()


# ---------------------------------------------------------------------------------------- threads


def threads_of_environment() -> int | None:
    """The number of threads that a person chose by OMP_NUM_THREADS or for the launcher; None if nobody chose one.

    Where it is unset both launchers set OMP_NUM_THREADS=1, accelerate always and torchrun for several processes. So a 1
    was chosen by a person only if the launcher was started with it, in its environment or as accelerate's option. A
    larger number is a person's, or accelerate's own share of the cores, and is taken as it is.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # "4,2": of loops, and of loops inside of loops
    if not text.isdigit() or int(text) == 0:
        return None
    if int(text) == 1 and is_launched() and not _launcher_was_given_threads():
        return None
    return int(text)


def _launcher_was_given_threads() -> bool:
    """Whether the launcher, as it was started, had a number of threads; False also where the system does not tell."""
    launcher = Path(f"/proc/{os.getppid()}")
    try:
        environment = (launcher / "environ").read_bytes().split(b"\0")  # as at its start: nothing that it set later
        words = (launcher / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    in_environment = any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment)
    return in_environment or any(word.startswith(b"--num_cpu_threads_per_process") for word in words)


# ----------------------------------------------------------------------------------------- memory


def use_expandable_segments() -> None:
    """Have CUDA's allocator extend its segments, where nobody chose anything else; before torch is imported.

    Each step has another number of tokens. Without this, memory is reserved in pieces whose sizes fit no later step: a
    fifth more and above is then reserved than used, until a step does not fit.
    """
    chosen = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if not any(name in os.environ for name in chosen):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


# ---------------------------------------------------------------------------------------- the end


def stop_when_launcher_ends() -> None:
    """From now on this process gets SIGTERM when its launcher ends, so that it saves and stops, too. On Linux only.

    `accelerate launch` of one process dies of a SIGTERM or a Ctrl-C and does not pass it on.
    """
    if is_launched() and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def say(lines: Sequence[str]) -> None:
    """Print lines for a person where errors go."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def repeat_below_launcher(lines: Sequence[str]) -> None:
    """Have lines printed once more when the launcher has ended, so that they stand below its traceback.

    A child process waits for that, a minute at most. It has a session of its own, because torchrun ends the whole
    process group of each process that it started. Without a launcher, and on other systems than Linux, nothing is done.
    """
    launcher = os.getppid()
    if not is_launched() or not is_first_on_machine() or launcher == 1:
        return
    text = "\n" + "\n".join(lines)[:10_000] + "\n"
    try:
        descriptor = os.pidfd_open(launcher)
    except (AttributeError, OSError):
        return
    words = [sys.executable, "-I", "-S", "-c", _REPEATER, str(descriptor), str(_PATIENCE_SECONDS * 1000), text]
    nothing = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        subprocess.Popen(
            words, stdin=nothing, stdout=nothing, pass_fds=[descriptor], start_new_session=True, cwd=os.sep
        )
    os.close(descriptor)


def install_excepthook() -> None:
    """From now on an interrupt prints a line and no traceback, and any other error its traceback and then a line."""
    sys.excepthook = _last_words_of


def _last_words_of(kind: type[BaseException], error: BaseException, traceback) -> None:
    """As sys.excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        lines = [INTERRUPTED]
        if is_first_on_machine():
            say(lines)
            repeat_below_launcher(lines)
        return
    sys.__excepthook__(kind, error, traceback)
    repeat_below_launcher([f"run.py: {one_line(error)} (the traceback is above the launcher's)"])


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of its message, where it has one."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
