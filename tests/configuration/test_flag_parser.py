"""A wrong command line is answered with the reason, not with all flags.

python -m pytest tests/configuration/test_flag_parser.py
"""

import pytest

from configuration.flag_parser import FlagParser


def parser() -> FlagParser:
    flags = FlagParser("What it does.\n\n    as it is written", prog="tool")
    flags.add_argument("--task", required=True)
    flags.add_argument("--max_rows", type=int, default=0)
    flags.add_argument("paths", nargs="*")
    return flags


def refusal(capsys, *words: str) -> list[str]:
    with pytest.raises(SystemExit) as refused:
        parser().parse_args(words)
    assert refused.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


def test_good_words_are_parsed_as_argparse_parses_them():
    found = parser().parse_args(["--task=clustering", "--max_r", "3", "a", "--", "--b"])
    assert (found.task, found.max_rows, found.paths) == ("clustering", 3, ["a", "--b"])


def test_misspelt_flags_are_named_before_what_is_missing_for_that_reason(capsys):
    assert refusal(capsys, "--tsk", "retrieval", "--rows=3") == [
        "tool: no such flag: --tsk; did you mean --task?; no such flag: --rows; did you mean --max_rows?",
        "tool --help lists every flag",
    ]


@pytest.mark.parametrize(("words", "said"), [
    ([], "tool: the following arguments are required: --task"),
    (["--task", "a", "--max_rows", "many"], "tool: argument --max_rows: invalid int value: 'many'"),
    (["--task", "a", "-x"], "tool: unrecognized arguments: -x"),
])  # fmt: skip
def test_other_errors_are_said_in_argparse_s_words_without_the_usage(words, said, capsys):
    assert refusal(capsys, *words) == [said, "tool --help lists every flag"]


def test_help_keeps_the_lines_of_the_description(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--help"])
    assert ended.value.code == 0
    assert "\n    as it is written\n" in capsys.readouterr().out
