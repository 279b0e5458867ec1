"""Before a run begins: where one process is refused, none of them starts, and none of them waits for it.

Each process looks at its own disks and its own GPU, so one machine of eight may lack a folder. If it just ended, the
others would wait for it at the first collective until the timeout, an hour. So all processes first say through the
key-value store of their launcher whether they found problems.

    refused     where problems were found, written by the first that has some
    verdicts    how many processes have said what they found
"""

import socket
import time
from datetime import timedelta

from torch.distributed import TCPStore

from runtime.launcher import main_address
from utils import plural

_WAIT = timedelta(minutes=60)  # for the slowest machine, which may still be converting its data
_FAREWELL_SECONDS = 15  # a refused process stays so long at most, for the others to read why
_INTERVAL = 0.2  # seconds
_REFUSED, _VERDICTS = "f2llm/refused", "f2llm/verdicts"


def refused_elsewhere(problems: int) -> str | None:
    """Tell the other processes how many problems this one found, and wait to hear whether any of them found some.

    Args:
        problems: found by this process.

    Returns:
        Where problems were found, for people; None if nobody found any. A process with problems of its own gets
        None once the others know.
    """
    address = main_address()
    if address is None:
        return None
    host, port, processes = address
    try:
        store = TCPStore(host, port, is_master=False, timeout=_WAIT, wait_for_workers=False)
        if problems:
            store.compare_set(_REFUSED, "", f"{socket.gethostname()} found {plural(problems, 'problem')}")
        store.add(_VERDICTS, 1)
        patience = _FAREWELL_SECONDS if problems else _WAIT.total_seconds()
        return _wait_for_verdicts(store, processes, patience, problems > 0)
    except RuntimeError:  # the launcher that kept the store has ended
        return None if problems else f"the main machine, {host}, has ended"


def _wait_for_verdicts(store: TCPStore, processes: int, patience: float, is_refused: bool) -> str | None:
    """Wait until all have spoken or, for a process without problems, one was refused.

    Args:
        patience: seconds.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if not is_refused and store.check([_REFUSED]):
            return store.get(_REFUSED).decode()
        if store.add(_VERDICTS, 0) >= processes:
            break
        time.sleep(_INTERVAL)
    if is_refused:
        return None
    if store.check([_REFUSED]):
        return store.get(_REFUSED).decode()
    if store.add(_VERDICTS, 0) < processes:
        return f"not all processes had arrived after {patience / 60:.0f} minutes"
    return None
