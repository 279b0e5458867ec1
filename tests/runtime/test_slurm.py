"""The SLURM examples with stand-ins for SLURM: told that its time is up, a run saves and queues up again.

python -m pytest tests/runtime/test_slurm.py
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import toy
from conftest import tokenize
from harness import PATIENCE, free_port, start_command

COMMANDS = {  # scancel tells all processes of a step, in whatever session they are, not the shell
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nSTEP_OF="$STANDINS" exec "$@"',
    "scancel": 'kill -USR1 $(grep -lzs "^STEP_OF=$STANDINS" /proc/[0-9]*/environ | cut -d/ -f3)',
    "scontrol": 'case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" > "$STANDINS/requeued" ;; esac',
}


def environment_of_a_job(stand_ins: Path) -> dict[str, str]:
    """What SLURM would set, what a user sets, and a PATH on which the stand-ins come first. Writes them."""
    for name, body in COMMANDS.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{body}\n")
        (stand_ins / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(free_port() - 20_000),  # the script makes the port from it again
        "SLURM_JOB_NODELIST": "a",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
    }
    user = {"BIN": str(Path(sys.executable).parent), "GPUS": "2", "ENGINE": "configs/accelerate_cpu.yaml"}
    return os.environ | slurm | user | {"STANDINS": str(stand_ins), "PATH": f"{stand_ins}:{os.environ['PATH']}"}


@pytest.mark.processes
def test_a_job_whose_time_is_up_saves_and_queues_up_again(settings, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings | {"train_steps": 4000, "train_batch_size": 4}))
    log = tmp_path / "log"
    environment = environment_of_a_job(tmp_path)
    words = ["examples/slurm/train.sbatch", str(config), "--log_interval", "1", "--experiment_id", "of_a_job"]
    job = start_command("bash", *words, log=log, environment=environment)
    deadline = time.monotonic() + PATIENCE
    while "step 3/4000" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE) == 0, log.read_text()
    folder = Path(settings["output_dir"]) / "of_a_job"
    assert (tmp_path / "requeued").exists(), log.read_text()
    assert any((folder / "state").glob("step_*/state.json"))
    assert "step 4000/4000" not in log.read_text()


@pytest.mark.processes
def test_an_array_job_and_its_join_write_the_stores_of_one_command(toy_world, tmp_path):
    raw, stores = tmp_path / "raw", tmp_path / "stores"
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(20, 2))
    flags = ["--task", "retrieval", "--max_seq_length", "128"]
    assert tokenize(raw, tmp_path / "whole", toy_world.backbone, *flags[:2]) == 0
    folders = ["--input_dir", str(raw), "--output_dir", str(stores), "--tokenizer_path", str(toy_world.backbone)]
    environment = os.environ | {"BIN": str(Path(sys.executable).parent), "SLURM_CPUS_PER_TASK": "1"}
    tasks = []
    for number in ("1", "2"):
        words = ["bash", "examples/slurm/tokenize.sbatch", "2", *folders, *flags]
        of_a_task = environment | {"SLURM_ARRAY_TASK_ID": number}
        tasks.append(start_command(*words, log=tmp_path / number, environment=of_a_task))
    assert [task.wait(PATIENCE) for task in tasks] == [0, 0]
    assert len(list(stores.glob(".parts/*/a/meta.json"))) == 2
    join = start_command(*words, log=tmp_path / "join", environment=environment)
    assert join.wait(PATIENCE) == 0, (tmp_path / "join").read_text()
    for path in (tmp_path / "whole" / "a").iterdir():
        assert (stores / "a" / path.name).read_bytes() == path.read_bytes()
