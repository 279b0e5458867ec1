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
COMMANDS = (
    "python -m benchmarks.step",
    "python -m benchmarks.memory_batch",
    "python -m benchmarks.data_path",
    "python -m benchmarks.tokenising",
    "python -m benchmarks.gather_gradients",
)
QUICKSTART = ("python -m benchmarks.backends",)  # on the data of `make quickstart`
CUDA = ("python -m benchmarks.gpu",)


def main() -> None:
    """Run, print, replace."""
    commands = [*COMMANDS, *(QUICKSTART if Path("quickstart").exists() else ())]
    commands += CUDA if torch.cuda.is_available() else ()
    for command in commands:
        began = time.monotonic()
        print(f"\n$ {command}", flush=True)
        words = [sys.executable, "-W", "ignore", *command.split()[1:]]
        done = subprocess.run(words, capture_output=True, text=True)
        print(f"{done.stdout}{done.stderr if done.returncode else ''}({time.monotonic() - began:.0f} s)", flush=True)
        if done.returncode:
            sys.exit(f"{command} failed")
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), command, done.stdout.strip("\n")), encoding="utf-8")
    page = re.sub(r"Machine: .*", f"Machine: {machine()}", PAGE.read_text(encoding="utf-8"), count=1)
    PAGE.write_text(page, encoding="utf-8")


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
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{os.cpu_count()} CPUs ({model[1] if model else platform.machine()}), {gpu}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, Transformers {transformers.__version__}."
    )


if __name__ == "__main__":
    main()
