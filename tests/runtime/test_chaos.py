"""A run that is killed again and again ends in the bytes of one that was left alone.

python -m pytest -s tests/runtime/test_chaos.py        `make chaos` does the same with 200 kills
"""

import pytest
from chaos import POINTS, TOKENISING, weather


@pytest.mark.processes
def test_kills_anywhere_change_nothing(tmp_path):
    storm, tokenising, equal = weather(tmp_path, kills=4, epochs=3, tokenising=2)
    assert {point for point in POINTS if storm.seen[point]} == set(POINTS)
    assert {point for point in TOKENISING if tokenising[point]} == set(TOKENISING)
    assert storm.seen["random"] >= 2  # a kill may come too late, when the run is over
    assert storm.unreadable == []
    assert storm.hangs == []
    assert equal
