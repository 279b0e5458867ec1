"""What a user reads when a run is refused. Imports no torch, which takes seconds: a mistyped key is named before.

Like run.py it looks at the configuration as a whole.
"""

import sys

import arguments
from runtime import launcher
from utils import plural


def answer_at_once(argv: list[str]) -> list[str]:
    """Print what is known from the words of the command line and the config file: the help, or their problems.

    The process ends here after the help, and where the problems leave neither data nor model to be looked at.

    Returns:
        The problems that were printed.
    """
    if asks_for_help(argv):
        print(arguments.help_text())
        sys.exit(launcher.FINISHED)
    _, problems, unknown = arguments.parse(argv)
    if unknown >= {"model_path", "train_data_path"} and not launcher.has_other_machines():
        sys.exit(refuse(problems))  # other machines would wait for this one, and are told first (runtime/verdict.py)
    _say(problems)
    return problems


def asks_for_help(argv: list[str]) -> bool:
    """Whether someone wants to read about the keys."""
    return "--help" in argv or "-h" in argv


def refuse(problems: list[str], printed: list[str] = ()) -> int:
    """Print the problems that keep a run from starting, and how many there are.

    Args:
        problems: one line each.
        printed: those of them that are on the screen already.

    Returns:
        The exit status.
    """
    total = f"{plural(len(problems), 'problem')}, nothing was started"
    _say([problem for problem in problems if problem not in printed] + [total])
    launcher.repeat_below_launcher(_prefixed([*problems, total]))
    return launcher.REFUSED


def refuse_with_others(where: str) -> int:
    """Say that another process was refused, whose machine says why. Returns the exit status."""
    lines = [f"{where}, nothing was started"]
    _say(lines)
    launcher.repeat_below_launcher(_prefixed(lines))
    return launcher.REFUSED


def _say(lines: list[str]) -> None:
    if launcher.is_first_on_machine():  # each machine sees its own disks
        launcher.say(_prefixed(lines))


def _prefixed(lines: list[str]) -> list[str]:
    return [f"run.py: {line}" for line in lines]
