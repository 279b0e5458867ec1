"""A run that is killed again and again ends in the bytes of one that was left alone.

python -m pytest -s tests/runtime/test_chaos.py        `make chaos` does the same with 1,000 kills, over more engines
"""

import pytest
from chaos import POINTS, TOKENISING, lay_ground, weather


@pytest.mark.processes
def test_kills_anywhere_change_nothing(tmp_path):
    tokenising = lay_ground(tmp_path, tokenising=2)
    assert {point for point in TOKENISING if tokenising[point]} == set(TOKENISING)
    storm, problem = weather(tmp_path, [(2, "ddp")], "LoRA with dropout", kills=4, epochs=3)
    assert {point for point in POINTS if storm.seen[point]} == set(POINTS)
    assert storm.seen["random"] >= 2  # a kill may come too late, when the run is over
    assert storm.unreadable == []
    assert storm.hangs == []
    assert problem == ""
