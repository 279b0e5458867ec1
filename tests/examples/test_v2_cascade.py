"""The cascade in small: teacher, pruned and random students, three cuts; and the same command again does nothing twice.

python -m pytest tests/examples/test_v2_cascade.py
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_gguf
from accelerate.state import AcceleratorState, GradientState

import run
import tokenize_data_qwen
from examples.code_search import job
from examples.v2_cascade import cascade
from examples.v2_cascade.plan import Cascade, Sizes
from examples.v2_cascade.report import Measured, table
from tools import prune_model

ROOT = Path(__file__).parent.parent.parent
SMALL = Cascade(
    quarter=Sizes(2, 32, 48),
    shallow=Sizes(1, 64, 96),
    narrow=Sizes(3, 48, 64),
    both=Sizes(2, 56, 80),
    seeds=(0, 1),
    gguf=Path("tiny.gguf"),
    layers=3,
    one_file_in=40,
    rows=400,
    others=60,
    teacher_steps=4,
    student_steps=3,
    cut_steps=2,
)


@pytest.fixture
def commands(monkeypatch):
    """The commands that the cascade runs, each done in this process: a launcher takes seconds every time."""
    seen = []
    doors = {
        "tokenize_data_qwen.py": tokenize_data_qwen.main,
        "run.py": run.main,
        "tools.prune_model": prune_model.main,
    }

    def run_here(command: str, environment: dict | None = None) -> None:
        seen.append(command)
        words = shlex.split(command)
        (place,) = [place for place, word in enumerate(words) if word in doors]
        assert doors[words[place]](words[place + 1 :]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    monkeypatch.setattr(job, "run", run_here)
    monkeypatch.setattr(cascade, "Cascade", lambda: SMALL)
    return seen


def test_the_whole_cascade_in_small(tmp_path, monkeypatch, commands, capsys):
    shutil.copytree(ROOT / "examples" / "v2_cascade", tmp_path / "examples" / "v2_cascade")
    tiny_gguf.write(tmp_path / "tiny.gguf", ["def f(a):\n    return a", "Sum up the weights."])
    monkeypatch.chdir(tmp_path)
    assert cascade.main(["--train_batch_size", "8", "--log_interval", "1"]) == 0
    rows = rows_of(capsys.readouterr().out)
    names = {"foundation, untrained", "teacher", "pruned, distilled", "pruned", "random weights"}
    names.add("pruned, distilled by a tenth")
    for cut in ("depth alone", "width alone", "depth and width"):
        names |= {f"{cut}, before", f"{cut}, after"}
    assert names <= set(rows)
    assert "±" in rows["pruned, distilled"]
    assert "±" not in rows["random weights"]
    assert (tmp_path / "v2_demo" / "matryoshka.png").read_bytes().startswith(b"\x89PNG")
    runs = [command for command in commands if " run.py " in command]
    assert len(runs) == 1 + 2 + 1 + 2 + 1 + 3
    taught = [command for command in runs if "--teacher_model_path v2_demo/output/teacher/step_4" in command]
    assert [shlex.split(command)[-1] for command in taught] == ["1.0", "1.0", "0.1"]  # two seeds, and a lighter weight
    assert len([command for command in commands if "tools.prune_model" in command]) == 4

    commands.clear()
    assert cascade.main([]) == 0

    assert commands == []  # nothing is done twice
    again = rows_of(capsys.readouterr().out)
    for name in names:
        assert again[name].split()[2:] == rows[name].split()[2:]  # all but the speed


def rows_of(printed: str) -> dict[str, str]:
    """Name -> the rest of its line in the tables."""
    return dict(re.findall(r"^(\w[\w, ]+?)  +([\d,]+ .*)$", printed, re.MULTILINE))


def test_the_planned_sizes_are_as_described():
    plan = Cascade()
    assert smollm2_parameters(Sizes(plan.layers, 576, 1536)) == 49_552_704
    for sizes, millions in ((plan.quarter, 12.8), (plan.shallow, 38.9), (plan.narrow, 38.8), (plan.both, 39.0)):
        assert round(smollm2_parameters(sizes) / 1e6, 1) == millions
        assert sizes.hidden_size % 9 == 0  # heads: Transformers takes no other Llama
    students = plan.students()
    assert [student.distillation for student in students] == [1.0, 0.1, 0.0, 0.0]
    assert len({student.experiment(0) for student in [*students, *plan.cuts()]}) == 7
    assert [plan.seeds_of(student) for student in students] == [(0, 1, 2), (0,), (0, 1, 2), (0,)]
    assert plan.seeds_of(plan.cuts()[0]) == (0,)


def smollm2_parameters(sizes: Sizes) -> int:
    """Of a decoder of these sizes with SmolLM2's vocabulary and heads: 9 for queries, 3 for keys and values, of 64."""
    attention = 2 * sizes.hidden_size * (9 + 3) * 64
    mlp = 3 * sizes.hidden_size * sizes.intermediate_size
    norms = 2 * sizes.hidden_size
    return (49_152 + 1) * sizes.hidden_size + sizes.layers * (attention + mlp + norms)


def test_a_table_has_means_and_no_cell_for_dimensions_that_a_model_lacks():
    one = Measured(1000, 50.0, {8: 0.1, 12: 0.3})
    two = Measured(1000, 70.0, {8: 0.2, 12: 0.5})
    wide = Measured(9000, 10.0, {8: 0.1, 16: 0.2, 20: 0.25})
    lines = table({"small": [one, two], "wide": [wide]})
    assert lines[1].split() == ["small", "1,000", "60", "0.150", "0.400", "±0.100"]
    assert lines[2].split() == ["wide", "9,000", "10", "0.100", "0.200", "0.250"]
