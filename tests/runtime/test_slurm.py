"""The SLURM example with stand-ins for SLURM's commands: told that its time is up, it saves and queues up again.

python -m pytest tests/runtime/test_slurm.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness import free_port

ROOT = Path(__file__).parent.parent.parent
COMMANDS = {  # scancel tells all processes of a step, in whatever session they are, not the shell
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nSTEP_OF="$STANDINS" exec "$@"',
    "scancel": 'kill -USR1 $(grep -lzs "^STEP_OF=$STANDINS" /proc/[0-9]*/environ | cut -d/ -f3)',
    "scontrol": 'case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" > "$STANDINS/requeued" ;; esac',
}


def start(tmp_path: Path, config: Path) -> tuple[subprocess.Popen, Path]:
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(free_port() % 20000),
        "SLURM_JOB_NODELIST": "a",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
    }
    ours = {"BIN": str(Path(sys.executable).parent), "GPUS": "2", "ENGINE": "configs/accelerate_cpu.yaml"}
    environment = os.environ | job | ours | {"STANDINS": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    log = tmp_path / "log"
    words = ["bash", "examples/slurm/train.sbatch", str(config)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log.open("a"), stderr=subprocess.STDOUT), log


def test_a_job_whose_time_is_up_saves_and_queues_up_again(settings, tmp_path):
    config, folder = tmp_path / "config.json", Path(settings["output_dir"]) / "toy"
    config.write_text(json.dumps(settings | {"train_steps": 400, "log_interval": 1, "train_batch_size": 4}))
    job, log = start(tmp_path, config)
    deadline = time.monotonic() + 120
    while "step 3/400" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0, log.read_text()
    assert (tmp_path / "requeued").exists(), log.read_text()
    assert any((folder / "state").glob("step_*/state.json"))
    assert "step 400/400" not in log.read_text()
