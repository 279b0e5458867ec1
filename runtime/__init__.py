"""Processes that start, fail and end together, and what lets a run continue after a kill. Imports utils.

Processes:
    launcher.py      what accelerate launch and torchrun do to a process
    verdict.py       where one process is refused, none starts
    processes.py     from start to end: signals, exit statuses
    heartbeat.py     where one process fails, all end
    collectives.py   gather with gradient, and other exchanges
    engine.py        DDP, FSDP2 or DeepSpeed, by accelerate
    computing.py     how many threads, on which GPU, and whether in the same bits each time
    sharding.py      weights handed out to the processes of FSDP2

States:
    resume.py        what a state holds, from the processes and back into them
    background.py    written while training continues
    checkpoint.py    its folder on disk, whole or absent
    shards.py        its files, each with some rows of each tensor
"""
