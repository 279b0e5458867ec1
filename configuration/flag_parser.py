"""The parser of a command's flags: argparse's, but that a wrong command line is answered in a line, not a screenful."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from configuration.keys import did_you_mean


class FlagParser(argparse.ArgumentParser):
    """Shows the text of a module as it is written, names misspelt flags, and does not print the usage before an error.

    Args:
        prog: how the command is started; None for the name of its file.
        description: the module's text.
        epilog: what `--help` prints last.
    """

    def __init__(self, description: str, prog: str | None = None, epilog: str | None = None):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=as_written)

    def parse_args(self, words: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """What argparse makes of the words, None for those of the command line.

        Flags that do not exist are named before anything else: a misspelt one is why the right one is missing. Exits
        with status 2, after lines on standard error, if the words make no sense.
        """
        words = sys.argv[1:] if words is None else list(words)
        known = [name for name in self._option_string_actions if name.startswith("--")]  # argparse says it nowhere else
        unknown = [f"no such flag: {flag}{did_you_mean(flag, known)}" for flag in unknown_flags(words, known)]
        if unknown:
            self.error("; ".join(unknown))
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists every flag\n")


def unknown_flags(words: list[str], known: list[str]) -> list[str]:
    """The words that are flags and begin no known one; argparse takes the beginning of a flag for the whole.

    >>> unknown_flags(["--task", "x", "--tsk=y", "-h", "--", "--z"], ["--task", "--help"])
    ['--tsk']
    """
    found = []
    for word in words:
        if word == "--":
            break
        flag = word.partition("=")[0]
        if flag.startswith("--") and not any(name.startswith(flag) for name in known):
            found.append(flag)
    return found
