"""What people read on the console, at the start and at the end of a run, and in its picture.

python -m pytest tests/training/test_console.py
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from arguments import Args
from training.advice import PUBLISHED_INSTRUCTION, choose_query_instruction, unexpected, without_effect
from training.console import end_lines, format_means, format_seconds, format_train_line, how_to_go_on
from training.plot import curve, draw, evaluation_curves, read_tasks
from training.schedule import Schedule

ALL = [
    ("retrieval", "in_batch"),
    ("retrieval", "hard"),
    ("retrieval", "distillation"),
    ("clustering", "hard"),
    ("clustering", "distillation"),
    ("classification", "hard"),
    ("classification", "distillation"),
]
VALUES = {
    "epoch": 0.625,
    "lr": 1e-5,
    "grad_norm": 2.0,
    "padding": 0.0,
    "imbalance": 0.0,
    "tuples_per_second": 123.4,
    "tokens_per_second": 45678.0,
    "peak_gib": 12.5,
    "seconds_left": 3723.0,
}


def test_tasks_stand_in_one_order_and_keep_their_columns():
    some = {("clustering", "hard"): 1.0, ("retrieval", "hard"): 2.0}
    lines = [format_means(means, ALL) for means in (some, dict.fromkeys(ALL, 0.5), {})]
    assert lines[0].startswith("retrieval in_batch -      hard 2.0000 distillation -      | clustering hard 1.0000")
    columns = {tuple(place for place, letter in enumerate(line) if letter == "|") for line in lines}
    assert len(columns) == 1
    assert len(*columns) == 2
    assert format_means(some) == "retrieval hard 2.0000 | clustering hard 1.0000"


@pytest.mark.parametrize(("kinds", "width"), [(ALL, 120), (ALL[:2], 80), (ALL[:4], 100)])
def test_a_line_fits_a_narrow_terminal_and_says_what_matters_most(kinds, width):
    line = format_train_line(300, 2400, dict.fromkeys(kinds, 1.2345), VALUES, kinds, width)
    assert 0.8 * width < len(line) <= width
    assert line.startswith("300/2400 | ret batch 1.23")
    assert line.endswith(" | 1:02:03")
    assert len(format_train_line(300, 2400, dict.fromkeys(ALL, 1.2345), VALUES, ALL)) > 180  # into a file: everything


def test_padding_and_imbalance_are_shown_where_there_are_any():
    line = format_train_line(3, 24, {}, VALUES)
    assert line.startswith("step 3/24 | epoch 0.62 | ")
    assert "123.4 tuples/s 45.7k tokens/s" in line
    assert "padding" not in line
    assert "imbalance" not in line
    line = format_train_line(3, 24, {}, VALUES | {"padding": 0.5, "imbalance": 0.125, "grad_norm": None})
    assert "grad nan" in line
    assert "padding 50% | imbalance 12%" in line


def test_the_last_lines_say_what_to_use_and_how():
    lines = end_lines(60, 3723, {("retrieval", "hard"): 0.5}, "out/epoch_2", adapter=False, picture="out/training.png")
    assert lines == [
        "trained 60 steps in 1:02:03; losses at the end: retrieval hard 0.5000",
        "use it:   SentenceTransformer('out/epoch_2')",
        "plot:     out/training.png",
    ]
    lines = end_lines(60, 3723, {}, "out/epoch_2", adapter=False, picture=None, best="out/best: nDCG@10 0.5 at step 9")
    assert lines[-1] == "best:     out/best: nDCG@10 0.5 at step 9"
    lines = end_lines(1, 59, {}, "out/step_1", adapter=True, picture=None)
    assert lines[-1] == "merge it: python -m tools.merge_adapter out/step_1 out/step_1-merged"
    assert "the same command continues" in how_to_go_on(3, 9, resumable=True)
    assert "cannot continue" in how_to_go_on(3, 9, resumable=False)


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (86400, "24:00:00")])
def test_seconds_as_people_read_them(seconds, shown):
    assert format_seconds(seconds) == shown


# ------------------------------------------------------------------------------------------ advice


def store(name: str, tuples: int, cut: int | None = 128):
    return SimpleNamespace(name=name, tuples=range(tuples), meta={"max_seq_length": cut})


def advice(stores, steps: int = 100, warmup: int = 10, length: int = 128, train_steps: int = -1) -> list[str]:
    plan = SimpleNamespace(sizes=[len(s.tuples) - (len(s.tuples) > 1) for s in stores], global_batch=16)
    args = Args("m", "x", "o", "t", "d", "c", max_seq_length=length, train_steps=train_steps, train_epochs=2)
    recipes = [SimpleNamespace(name=s.name, task="retrieval", in_batch=True, max_length=length) for s in stores]
    return unexpected(args, plan, Schedule(1e-4, 1e-7, warmup, steps), stores, recipes)


def test_what_is_usual_is_not_mentioned():
    assert advice([store("a", 1000), store("b", 50, None)], length=512) == []


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ({"stores": [store("a", 1000), store("b", 10)]}, "b: fewer tuples than the global batch of 16"),
        ({"stores": [store("a", 1000), store("b", 1)]}, "b: one tuple alone: nothing is held out"),
        ({"warmup": 100}, "warmup_steps 100 is not below the 100 steps of this run"),
        ({"train_steps": 200}, "train_steps 200 is more than train_epochs 2 make: the run ends after 100 steps"),
        ({"length": 256}, "max_seq_length 256, but tokenising cut the texts at 128"),
    ],
)
def test_what_a_person_may_not_have_meant_is_one_line(case, line):
    (found,) = advice(**{"stores": [store("a", 1000)]} | case)
    assert line in found


def test_keys_that_nothing_reads_are_named():
    args = Args("m", "x", "o", "t", "d", "c", kd_weight=0.5, lora_r=16, lora_alpha=64)
    assert without_effect(args) == [
        "kd_weight 0.5: without a teacher nothing is distilled",
        "lora_alpha, lora_r: all weights are trained, as use_lora is false",
    ]
    assert without_effect(replace(args, use_lora=True, teacher_embeddings="folder")) == []


def test_hundreds_of_small_datasets_are_one_line():
    (found,) = advice([store(f"d{number}", 10) for number in range(502)])
    assert found.startswith("d0, d1, d2 and 499 more datasets: fewer tuples")


def asking(name: str, task: str, counts: dict | None, rows: int = 100):
    """A store whose queries carry these instructions."""
    known = (
        {} if counts is None else {"instructions": {"counts": counts, "other": 0, "none": rows - sum(counts.values())}}
    )
    return SimpleNamespace(name=name, task=task, meta={"rows": rows, "stats": known})


def test_the_query_prompt_is_what_most_retrieval_queries_carry():
    stores = [asking("a", "retrieval", {"Find it.": 90}), asking("b", "clustering", {"Group it.": 100})]
    chosen, line = choose_query_instruction(None, stores)
    assert chosen == "Find it."
    assert line == "query prompt: 'Find it.', which 90% of the retrieval queries carry"
    assert choose_query_instruction(None, [asking("a", "retrieval", {})])[0] == ""
    assert choose_query_instruction(None, [asking("a", "retrieval", None)])[0] == PUBLISHED_INSTRUCTION
    assert choose_query_instruction("Find it.", stores) == ("Find it.", "query prompt: 'Find it.'")
    assert choose_query_instruction("", [asking("a", "retrieval", {})])[0] == ""


def test_a_prompt_that_was_not_trained_is_said_with_its_share_by_dataset():
    stores = [asking("a", "retrieval", {"Find it.": 97, "Look.": 3}), asking("b", "retrieval", {"Find it.": 100})]
    chosen, line = choose_query_instruction("Look.", stores)
    assert chosen == "Look."
    assert line.startswith("warning: query_instruction 'Look.' is carried by 3% of a, 0% of b alone")
    assert "(98%) carry 'Find it.'" in line
    _, line = choose_query_instruction("Look.", [asking("a", "retrieval", {"Look.": 10})])
    assert "most retrieval queries (90%) carry none" in line


# ----------------------------------------------------------------------------------------- picture


def write_run(folder, datasets: int, tasks: bool = True):
    names = [f"d{number}" for number in range(datasets)]
    kinds = ("retrieval", "clustering", "classification")
    task_of = {name: kinds[number % 3] for number, name in enumerate(names)}
    (folder / "manifest.json").write_text(json.dumps({"tasks": task_of} if tasks else {}))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in (10, 20, 30):
            losses = {name: {"hard": 1.0 / step, "in_batch": 2.0 / step} for name in names}
            line = {"step": step, "kind": "train", "lr": 1e-5, "grad_norm": 1.0, "losses": losses}
            file.write(json.dumps(line) + "\n")
        measures = {name: {"hard": 0.1, "group_mrr": 0.5} for name in names}
        file.write(json.dumps({"step": 30, "kind": "validation", "measures": measures}) + "\n")
    return folder


@pytest.mark.parametrize("datasets", [1, 5, 300])
def test_a_picture_has_a_panel_for_each_task(tmp_path, datasets):
    path = draw(write_run(tmp_path, datasets))
    with Image.open(path) as picture:
        wide, high = picture.size
        colours = len(picture.convert("RGB").getcolors(2**24))
    assert wide == 1560
    assert high == (552 if datasets == 1 else 1104)  # one row of two panels, or two rows
    assert colours > 50  # something is drawn


def test_evaluations_have_a_panel_of_their_own(tmp_path):
    write_run(tmp_path, 1)  # one task, and the schedule: one row of two panels
    lines = []
    for step in (10, 20):
        sets = {"a": {"8": {"nDCG@10": 0.1 * step}, "32": {"nDCG@10": 0.2 * step}}}
        lines.append({"step": step, "kind": "evaluation", "sets": sets})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert evaluation_curves(lines, "a") == {32: ([10, 20], [2.0, 4.0]), 8: ([10, 20], [1.0, 2.0])}
    assert evaluation_curves(lines, "b") == {}
    with Image.open(draw(tmp_path)) as picture:
        assert picture.size == (1560, 1104)


def test_an_older_run_has_one_panel(tmp_path):
    write_run(tmp_path, 5, tasks=False)
    line = {"losses": {"d0": {}, "d1": {}}}
    assert read_tasks(tmp_path, [line]) == {"d0": "all", "d1": "all"}
    assert draw(tmp_path)


def test_a_curve_is_the_mean_over_the_datasets_that_occurred():
    lines = [
        {"step": 1, "losses": {"a": {"hard": 1.0}, "b": {"hard": 3.0}}},
        {"step": 2, "losses": {"b": {"hard": 5.0}}},
        {"step": 3, "losses": {}},
    ]
    assert curve(lines, "losses", ["a", "b"], "hard") == ([1, 2], [2.0, 5.0])
