"""Runs of run.py on the stand-in for a GPU, one after another in this process.

    LD_PRELOAD=device.so python tests/stand_in/program.py RESULTS CONFIG...

Writes into RESULTS, for each configuration: the exit status of the run, and for what the host waited in each step.
"""

import gc
import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from stand_in.gpu import install
from stand_in.tensors import WAITS, StandIn

import run


def main(results: str, *configs: str) -> None:
    install()
    waits: list[dict[str, int]] = []
    run.train_step = noted(run.train_step, waits)
    found = []
    with StandIn():
        for config in configs:
            status = run.main(["--config", config])
            found.append({"status": status, "waits": list(waits)})
            waits.clear()
            gc.collect()  # the run's lock on its folder goes with it
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    Path(results).write_text(json.dumps(found))


def noted(train_step, waits: list[dict[str, int]]):
    """`train_step`, that adds what the host waited for in each step."""

    def step(live, number):
        live.batches.training(number)  # made by another thread
        WAITS.clear()
        found = train_step(live, number)
        waits.append(dict(WAITS))
        return found

    return step


if __name__ == "__main__":
    main(*sys.argv[1:])
