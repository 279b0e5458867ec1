"""Pushing to the hub: refused before a run where it cannot work, and never a reason to lose one. Nothing is sent here.

python -m pytest tests/export/test_pushing.py
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import door_here
from huggingface_hub import ModelCard

from export import hub
from training.card import push


class StandIn:
    """As much of HfApi as a push needs; remembers what it was asked."""

    def __init__(self, fails: str = ""):
        self.fails = fails
        self.asked = []

    def __call__(self):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(("create", repo_id, private, exist_ok))
        if self.fails == "create":
            raise OSError("403 Forbidden\nlong")
        return SimpleNamespace(repo_id=f"me/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        self.asked.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir()), commit_message))
        if self.fails == "upload":
            raise ConnectionError("no route to the hub")


@pytest.fixture
def online(monkeypatch):
    """A machine with a token that may ask the hub."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")


@pytest.mark.usefixtures("online")
def test_what_can_be_pushed_is_not_refused():
    assert hub.push_problems(False, None) == []
    assert hub.push_problems(True, "me/model") == []
    assert hub.push_problems(True, "model") == []  # the hub puts the token's owner before it


@pytest.mark.usefixtures("online")
def test_what_could_not_be_pushed_is_refused_in_a_sentence_each(monkeypatch):
    assert hub.push_problems(True, None) == [
        "hub_model_id: missing; push_to_hub needs the repository's id, as NAME/MODEL"
    ]
    (line,) = hub.push_problems(True, "a/b/c")
    assert line.startswith("hub_model_id: Repo id must")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert hub.push_problems(True, "me/model") == [
        "push_to_hub: there is no hub token here: `hf auth login` stores one, or set HF_TOKEN"
    ]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.push_problems(True, "me/model") == [
        "push_to_hub: HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out"
    ]


@pytest.mark.parametrize("license", [None, "apache-2.0", "mit", "cc-by-nc-sa-4.0", "other"])
def test_licences_that_may_be_the_hubs(license):
    assert hub.licence_problem(license) is None


@pytest.mark.parametrize("license", ["Apache-2.0", "Apache License", "", "mit\n", "a: b"])
def test_licences_that_are_none_of_the_hubs(license):
    assert "not an identifier of the hub" in hub.licence_problem(license)


def test_a_folder_is_pushed_to_a_repository_that_is_made_private(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("card")
    api = StandIn()
    monkeypatch.setattr(hub, "HfApi", api)
    assert hub.push(tmp_path, "model", 7) == f"pushed {tmp_path} to me/model"
    assert api.asked == [("create", "model", True, True), ("upload", "me/model", ["README.md"], "step 7 of training")]


@pytest.mark.parametrize(("fails", "why"), [("create", "403 Forbidden"), ("upload", "no route to the hub")])
def test_a_push_that_fails_is_said_with_what_to_do(fails, why, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", StandIn(fails))
    line = hub.push(tmp_path, "me/model", 7)
    assert line.startswith(f"warning: not pushed to me/model: {why}. The run is finished all the same")
    assert f"`hf upload me/model {tmp_path}`" in line


@pytest.mark.parametrize("language", [None, "en", "en,de", "multilingual, zho"])
def test_languages_that_may_be(language):
    assert hub.language_problem(language) is None


@pytest.mark.parametrize("language", ["English", "en;de", "en,", "EN"])
def test_languages_that_are_none(language):
    assert "is not a code of ISO 639" in hub.language_problem(language)


# ------------------------------------------------------------------------------------------- a run


def test_a_run_that_could_not_push_is_refused_before_it_trains(settings, capsys):
    keys = {"push_to_hub": True, "use_lora": True, "license": "Apache", "language": "English"}
    assert door_here(settings | keys) == 2
    said = capsys.readouterr().err
    for problem in ("hub_model_id: missing", "push_to_hub: adapters name", "license: 'Apache'", "language: 'English'"):
        assert problem in said
    assert door_here(settings | {"push_to_hub": True, "hub_model_id": "me/model"}) == 2
    assert "push_to_hub: HF_HUB_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.usefixtures("online")
def test_a_run_pushes_its_last_folder_and_tries_again_when_its_command_is_given_again(settings, monkeypatch, capsys):
    keys = {"push_to_hub": True, "hub_model_id": "me/model", "license": "mit", "language": "en,de", "train_steps": 1}
    monkeypatch.setattr(hub, "HfApi", StandIn("upload"))
    assert door_here(settings | keys) == 0
    assert "warning: not pushed to me/model: no route to the hub" in capsys.readouterr().out
    api = StandIn()
    monkeypatch.setattr(hub, "HfApi", api)
    assert door_here(settings | keys) == 0
    folder = Path(settings["output_dir"]) / "toy" / "step_1"
    assert f"pushed {folder} to me/model" in capsys.readouterr().out
    assert ("upload", "me/model", sorted(path.name for path in folder.iterdir()), "step 1 of training") in api.asked
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.language) == ("mit", ["en", "de"])
    assert 'SentenceTransformer("me/model")' in card.text


@pytest.mark.usefixtures("online")
def test_the_best_folder_goes_to_the_hub_where_there_is_one(tmp_path, monkeypatch, capsys):
    api = StandIn()
    monkeypatch.setattr(hub, "HfApi", api)
    for name, steps in {"best": 5, "epoch_2": 8}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "f2llm.json").write_text(f'{{"training": {{"steps": {steps}}}}}')
    run = SimpleNamespace(
        args=SimpleNamespace(push_to_hub=True, hub_model_id="me/model", best_metric="MRR@10", checkpointing_steps=0),
        is_finished=True,
        steps_done=8,
        feed=SimpleNamespace(plan=SimpleNamespace(steps_per_epoch=4)),
        accelerator=SimpleNamespace(is_main_process=True),
        evaluations=SimpleNamespace(best=SimpleNamespace(step=7)),  # the folder knows better
        folder=tmp_path,
    )
    push(run)
    assert capsys.readouterr().out == f"pushed {tmp_path / 'best'} to me/model\n"
    assert api.asked[1][3] == "step 5 of training"
    run.is_finished = False  # told to stop: it will continue
    push(run)
    assert len(api.asked) == 2
    run.is_finished = True
    shutil.rmtree(tmp_path / "best")
    for known in (run.evaluations.best, None):  # of a run that has ended early, it is still known
        run.evaluations.best = known
        push(run)
        why, pushed = capsys.readouterr().out.splitlines()
        assert why == f"{tmp_path / 'best'}: there is no model that MRR@10 chose: the last one, epoch_2, is pushed"
        assert pushed == f"pushed {tmp_path / 'epoch_2'} to me/model"
    run.args.best_metric = None
    push(run)
    assert capsys.readouterr().out == f"pushed {tmp_path / 'epoch_2'} to me/model\n"
