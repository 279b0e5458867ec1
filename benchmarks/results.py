"""Run the benchmarks that take a quarter of an hour together; what each prints goes into RESULTS.md below its command.

make bench
"""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

PAGE = Path(__file__).with_name("RESULTS.md")
ANYWHERE = (
    "python -m benchmarks.step",
    "python -m benchmarks.memory_batch",
    "python -m benchmarks.data_path",
    "python -m benchmarks.tokenising",
    "python -m benchmarks.gather_gradients",
)
RANDOM_MODEL = "quickstart/models/tiny-qwen3"  # of the quickstart with --backbone random
AFTER_QUICKSTART = (f"python -m benchmarks.backends --model {RANDOM_MODEL}",)  # on its data
ON_A_GPU = (
    "python -m benchmarks.gpu --parts equality,speed",
    "python -m benchmarks.gpu --parts equality,speed --sizes 4B",
    "python -m benchmarks.gpu --parts run",
)


def main() -> None:
    """Run what this machine can run, and rewrite the page after each command."""
    for command in commands():
        output = run(command)
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replaced(page, command, output), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"Machine: .*", f"Machine: {machine()}", page, count=1), encoding="utf-8")


def commands() -> list[str]:
    """What this machine can run."""
    found = list(ANYWHERE)
    if Path(RANDOM_MODEL).exists():
        found += AFTER_QUICKSTART
    if torch.cuda.is_available():
        found += ON_A_GPU
    return found


def run(command: str) -> str:
    """Run one benchmark with this Python, show what it prints, and give it back; end the program where it fails."""
    print(f"\n$ {command}", flush=True)
    began = time.monotonic()
    words = [sys.executable, "-W", "ignore", *command.split()[1:]]
    done = subprocess.run(words, capture_output=True, text=True)
    errors = done.stderr if done.returncode else ""
    print(f"{done.stdout}{errors}({time.monotonic() - began:.0f} s)", flush=True)
    if done.returncode:
        sys.exit(f"{command} failed")
    return done.stdout.strip("\n")


def replaced(page: str, command: str, output: str) -> str:
    """The page with `output` in the first code block after the command.

    Raises:
        ValueError: the page does not name the command.
    """
    pattern = re.compile(rf"(`{re.escape(command)}`.*?\n```\n).*?(\n```)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{PAGE}: no section for {command}")
    return pattern.sub(lambda found: found[1] + output + found[2], page, count=1)


def machine() -> str:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} CPUs ({processor()}), {gpu}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"Transformers {transformers.__version__}."
    )


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        model = re.search(r"model name\s*: (.*)", facts.read_text())
        if model:
            return model[1]
    return platform.machine()


if __name__ == "__main__":
    main()
