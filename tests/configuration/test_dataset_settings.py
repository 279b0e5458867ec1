"""Settings of single datasets, as their file says them: which entry wins, and every mistake named with its remedy.

python -m pytest tests/configuration/test_dataset_settings.py
"""

import json

import pytest

from configuration import dataset_settings
from configuration.dataset_settings import Settings


def read(tmp_path, content) -> tuple[dataset_settings.DatasetSettings, list[str]]:
    path = tmp_path / "dataset_settings.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return dataset_settings.read(path)


def test_an_own_entry_wins_over_that_of_all_key_by_key_and_null_takes_one_back(tmp_path):
    settings, problems = read(
        tmp_path,
        {
            "*": {"temperature": 0.1, "num_hard_neg": 3, "max_length": 64},
            "own": {"temperature": 0.02, "num_hard_neg": None},
        },
    )
    assert problems == []
    assert settings.of("own") == Settings(temperature=0.02, max_length=64)
    assert settings.of("other") == Settings(temperature=0.1, num_hard_neg=3, max_length=64)
    assert dataset_settings.read(None)[0].of("any") == Settings()


def test_the_file_that_is_given_wins_over_the_one_beside_the_data(tmp_path):
    assert dataset_settings.find(tmp_path, None) is None
    (tmp_path / "dataset_settings.json").write_text("{}")
    assert dataset_settings.find(tmp_path, None) == tmp_path / "dataset_settings.json"
    assert dataset_settings.find(tmp_path, str(tmp_path / "other.json")) == tmp_path / "other.json"


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"temprature": 1}, "a: temprature: no such setting; did you mean temperature?"),
        ({"max_seq_length": 64}, "a: max_seq_length: no such setting; did you mean max_length?"),
        ({"weight": 2}, "a: weight: no such setting; did you mean sampling_weight?"),
        ({"task": "retrieval"}, "a: task: no such setting; a dataset's task is declared when it is tokenised"),
        ({"zzz": 1}, "a: zzz: no such setting; the settings are num_hard_neg, losses,"),
        ({"temperature": 0}, "a: temperature: 0 must be above 0"),
        ({"temperature": "0.1"}, 'a: temperature: "0.1" is not a number or null; leave out the quotes'),
        ({"num_hard_neg": -1}, "a: num_hard_neg: -1 is below 0"),
        ({"num_hard_neg": 1.5}, "a: num_hard_neg: 1.5 is not a whole number"),
        ({"num_hard_neg": True}, "a: num_hard_neg: true is not a whole number"),
        ({"max_length": 1}, "a: max_length: 1 is below 2"),
        ({"sampling_weight": 0}, "a: sampling_weight: 0 must be above 0"),
        ({"sampling_weight": 101}, "a: sampling_weight: 101 is above 100"),
        ({"losses": "hard"}, 'a: losses: "hard" is not a list of texts or null'),
        ({"losses": []}, "a: losses: [] is not a list of texts"),
        ({"losses": ["inbatch"]}, 'a: losses: "inbatch" is not one of in_batch, hard; did you mean in_batch?'),
        ({"losses": ["hard", "hard"]}, 'a: losses: "hard" is given twice'),
        ({"losses": ["in_batch"], "num_hard_neg": 3}, "a: num_hard_neg: 3, but losses leave hard out"),
        ({"instruction": ""}, "a: instruction: must not be empty"),
        (3, "a: 3 is not an object of settings"),
    ],
)
def test_one_mistake(tmp_path, entry, problem):
    _, problems = read(tmp_path, {"a": entry, "b": {"temperature": 0.1}})
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path}/dataset_settings.json: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "must be one object of dataset names and their settings"),
        ('{"a": {}, "a": {}}', "a: given twice"),
        ('{"a": {"temperature": NaN}}', "NaN is not a number"),
        ('{"temperature": 0.1}', 'put it under the name of a dataset, or under "*" for all'),
    ],
)
def test_hostile_files(tmp_path, text, problem):
    assert any(problem in line for line in read(tmp_path, text)[1])


def test_a_file_that_is_not_there_is_a_problem(tmp_path):
    _, problems = dataset_settings.read(tmp_path / "nowhere.json")
    assert problems == [f"dataset_settings {tmp_path}/nowhere.json: No such file or directory"]


def test_all_mistakes_are_said_at_once_and_the_good_ones_are_kept(tmp_path):
    settings, problems = read(tmp_path, {"*": {"temperature": -1, "max_length": 9}, "b": {"sed": 1}, "c": []})
    assert len(problems) == 3
    assert settings.of("b") == Settings(max_length=9)


def test_names_of_no_dataset_are_refused_with_the_one_that_was_meant(tmp_path):
    settings, _ = read(tmp_path, {"*": {}, "toy_retrieva": {}, "toy_retrieval": {}, "zzz": {}})
    assert [line.partition(": ")[2] for line in dataset_settings.unknown_names(settings, ["toy_retrieval"])] == [
        "toy_retrieva: no such dataset; did you mean toy_retrieval?",
        "zzz: no such dataset",
    ]
