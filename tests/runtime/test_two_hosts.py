"""Two machines by the two commands of docs/distributed.md, to the losses of one process.

python -m pytest -s tests/runtime/test_two_hosts.py        says which of the two ran

As root on Linux with iproute2 the machines are two network namespaces joined by a veth pair: they have no other way to
each other, and the cache is built on both. Elsewhere both launches run on the loopback device.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_metrics, train_here
from harness import PATIENCE, free_port, start_command

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(words: str) -> bool:
    return subprocess.run(["ip", *words.split()], capture_output=True).returncode == 0


@pytest.fixture
def hosts():
    """For each machine: what stands before a command on it, and its environment; and the first one's address."""
    names = [f"f2llm{os.getpid()}{side}" for side in "ab"]
    pair = [f"ve{os.getpid() % 10**6}{side}" for side in "ab"]
    made = shutil.which("ip") and all(ip(f"netns add {name}") for name in names)
    made = made and ip(f"link add {pair[0]} type veth peer name {pair[1]}")
    for name, device, address in zip(names, pair, ADDRESSES, strict=True):
        made = made and ip(f"link set {device} netns {name}") and ip(f"-n {name} addr add {address}/24 dev {device}")
        made = made and ip(f"-n {name} link set {device} up") and ip(f"-n {name} link set lo up")
    if made:
        print("\ntwo network namespaces joined by a veth pair")
        prefixes = [["ip", "netns", "exec", name] for name in names]
        yield [(p, {"GLOO_SOCKET_IFNAME": d}) for p, d in zip(prefixes, pair, strict=True)], ADDRESSES[0]
    else:
        print("\nnamespaces were refused: two launches on the loopback device")
        yield [([], {})] * 2, "127.0.0.1"
    for name in names:
        ip(f"netns del {name}")


def launch(machine, rank: int, address: str, port: int, config: dict, folder: Path) -> subprocess.Popen:
    """Start this machine's part of a run of two, as docs/distributed.md says; its log is two{rank}.log."""
    prefix, environment = machine
    path = folder / f"two{rank}.json"
    path.write_text(json.dumps(config))
    flags = f"--num_machines 2 --num_processes 2 --machine_rank {rank} --main_process_ip {address} "
    flags += f"--main_process_port {port}"
    words = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_cpu.yaml", *flags.split()]
    command = [*prefix, sys.executable, *words, "run.py", "--config", str(path)]
    return start_command(*command, log=folder / f"two{rank}.log", environment=os.environ | environment)


@pytest.mark.processes
@pytest.mark.parametrize(("refused", "wrong"), [(1, "train_data_path"), (0, "config")])
def test_no_machine_waits_for_one_that_was_refused(hosts, settings, tmp_path, refused, wrong):
    """The other one waited for an hour, for a process that was not coming."""
    machines, address = hosts
    port = free_port()
    running = []
    for rank, machine in enumerate(machines):
        config = settings | {"experiment_id": "two", "cache_dir": str(tmp_path / f"cache{rank}")}
        if rank == refused and wrong == "config":
            config = {"learning_rat": 3}  # leaves neither data nor model to be looked at
        elif rank == refused:
            config["train_data_path"] = str(tmp_path / "not here")
        running.append(launch(machine, rank, address, port, config, tmp_path))
    codes = [process.wait(PATIENCE) for process in running]
    assert all(codes)
    logs = [(tmp_path / f"two{rank}.log").read_text() for rank in range(2)]
    own, other = logs[refused], logs[1 - refused]
    assert "nothing was started" in own
    assert ("found 1 problem, nothing was started" if wrong == "train_data_path" else "nothing was started") in other
    assert "not here" not in other
    assert not (Path(settings["output_dir"]) / "two").exists()


@pytest.mark.processes
def test_two_machines_train_what_one_process_trains(hosts, settings, tmp_path):
    machines, address = hosts
    keys = {"train_steps": 4, "log_interval": 1, "validation_steps": 2, "use_mrl": True}
    port = free_port()
    running = []
    for rank, machine in enumerate(machines):
        # Each machine has its own cache folder, as without a shared file system; outputs are the main process's.
        own = {"experiment_id": "two", "train_batch_size": 4, "cache_dir": str(tmp_path / f"cache{rank}")}
        running.append(launch(machine, rank, address, port, settings | keys | own, tmp_path))
    codes = [process.wait(PATIENCE) for process in running]
    logs = [(tmp_path / f"two{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert "processes: 2" in logs[0]
    assert all("verified toy_retrieval" in log for log in logs)  # one cache build on each machine
    assert ["step 4/4" in log for log in logs] == [True, False]  # one writer

    two = Path(settings["output_dir"]) / "two"
    one = train_here(settings | keys | {"experiment_id": "one", "train_batch_size": 8})
    for kind, values in (("train", "losses"), ("validation", "measures")):
        lines = list(zip(read_metrics(two, kind), read_metrics(one, kind), strict=True))
        assert lines
        for ours, theirs in lines:
            for name, expected in theirs[values].items():
                of_prefixes = {kind: expected.pop(kind) for kind in list(expected) if "@" in kind}
                # these get near 0: differences of logits of up to 20, which fp32 holds to 2e-6
                ours_of_prefixes = {kind: ours[values][name].pop(kind) for kind in of_prefixes}
                assert ours_of_prefixes == pytest.approx(of_prefixes, rel=2e-5, abs=1e-6)
                assert ours[values][name] == pytest.approx(expected, rel=2e-5)
