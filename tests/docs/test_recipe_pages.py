"""The recipes run from top to bottom, each in a folder of its own, with the toy in place of models and data.

python -m pytest tests/docs/test_recipe_pages.py

`python run.py` and `python -m ...` run in this process, which has imported everything.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import test_docs
from test_docs import ROOT, lay_out, steps

PAGES = sorted(ROOT.glob("docs/recipes/*.md"))
INDEX = ROOT / "docs/recipes/README.md"
TOY_SIZE = {  # how a command begins -> what is appended to it here; of a flag that is there already the last one counts
    "python run.py": "--max_seq_length 64 --log_interval 4 --num_hard_neg 2",
    "python -m tools.prune_model": "--num_layers 1 --hidden_size 16 --intermediate_size 32",
    "python -m tools.embed_store": "--max_seq_length 64 --dimensions 16",
}
NOT_RUN = {  # how a command begins -> why it is not run
    "python run.py --config configs/config.json --experiment_id first_run --license": "needs the hub; "
    "tests/export/test_pushing.py pushes to a stand-in"
}


def reason_not_to_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def at_toy_size(command: str) -> list[str]:
    """The words of a command, with what makes it small."""
    more = [flags for start, flags in TOY_SIZE.items() if command.startswith(start)]
    return shlex.split(" ".join([command, *more]))


@pytest.fixture
def folder(toy_world, tmp_path, monkeypatch) -> Path:
    """What a reader of a recipe has: the program, a decoder, training data, code of his own; as the current folder."""
    lay_out(tmp_path, toy_world)
    shutil.copytree(toy_world.stores, tmp_path / "training_data" / "data_tokenized_qwen")
    for name in ("utils.py", "losses.py", "data/plan.py", "data/batch.py", "data/feed.py", "modeling/pooling.py"):
        (tmp_path / "my_code" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "my_code" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_through(page: str, monkeypatch, capsys) -> str:
    """Do what a page says, in its order; returns what its commands printed."""
    printed = []
    for language, text in steps([ROOT / "docs/recipes" / page]):
        if language == "python":
            exec(compile(text, page, "exec"), {})
        elif not reason_not_to_run(text):
            with monkeypatch.context() as patch:
                test_docs.run_here(at_toy_size(text), patch)
            printed.append(capsys.readouterr().out)
    assert printed
    return "\n".join(printed)


def card(folder: str) -> str:
    return Path(folder, "README.md").read_text()


def metrics(run: str, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in Path("output", run, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# ------------------------------------------------------------------------------------------ the pages


@pytest.mark.usefixtures("folder")
def test_own_data_lora(monkeypatch, capsys):
    printed = read_through("own-data-lora.md", monkeypatch, capsys)
    assert "LoRA of rank 8" in printed
    (line,) = metrics("my_lora", "evaluation")
    value = line["sets"]["questions"]["32"]["nDCG@10"]
    assert 0 < value <= 1
    assert Path("output/my_lora/best/adapter_config.json").exists()
    assert Path("my_model/model.safetensors").exists()
    assert "| questions | retrieval | 5 |" in card("my_model")  # of six one is held out for validation
    assert f"| questions | 32 | {value:.4f} |" in card("my_model")


@pytest.mark.usefixtures("folder")
def test_distil(monkeypatch, capsys):
    read_through("distil.md", monkeypatch, capsys)
    pruned = json.loads(Path("models/pruned-80m/config.json").read_text())
    assert (pruned["num_hidden_layers"], pruned["hidden_size"], pruned["intermediate_size"]) == (1, 16, 32)
    losses = metrics("v2/student-80m", "train")[-1]["losses"]
    assert losses
    assert all("distillation" in of_dataset for of_dataset in losses.values())
    assert "| teacher_model_path | output/first_run/epoch_2 |" in card("output/v2/student-80m/epoch_4")


@pytest.mark.usefixtures("folder")
def test_multilingual(monkeypatch, capsys):
    printed = read_through("multilingual.md", monkeypatch, capsys)
    assert "sampling weight 3" in printed
    assert set(metrics("languages", "evaluation")[-1]["sets"]) == {"de", "en"}
    assert "language:\n- en\n- de\n" in card("output/languages/best")
    assert "| bitext | retrieval | 3 |" in card("output/languages/best")  # two in both directions, one of four held out


@pytest.mark.usefixtures("folder")
def test_code_search(monkeypatch, capsys):
    printed = read_through("code-search.md", monkeypatch, capsys)
    lines = printed.strip().splitlines()[-5:]
    assert all("my_code/" in line for line in lines)
    assert "Retrieve the most relevant code snippet" in card("output/my_code/best")
    assert metrics("my_code", "evaluation")[-1]["sets"]["functions"]["32"]["recall@100"] > 0


@pytest.mark.usefixtures("folder")
def test_new_data(monkeypatch, capsys):
    printed = read_through("new-data.md", monkeypatch, capsys)
    assert "training output/first_run/epoch_2:" in printed
    assert "sampling weight 0.2" in printed
    for name, count in {"toy_retrieval": 198, "strings": 2}.items():
        assert f"| {name} | retrieval | {count} |" in card("output/second_run/epoch_1")
    assert "## Results" in card("output/first_run/epoch_2")
    assert "## Results" not in card("output/between")


@pytest.mark.usefixtures("folder")
def test_deploy(monkeypatch, capsys):
    read_through("deploy.md", monkeypatch, capsys)
    assert Path("served/model.safetensors").exists()


# --------------------------------------------------------------------------------- nothing is left out


def test_every_page_is_run_and_named_in_the_index():
    pages = {page.stem for page in PAGES if page != INDEX}
    assert len(pages) >= 6
    for page in pages:
        assert f"test_{page.replace('-', '_')}" in globals()
        assert f"]({page}.md)" in INDEX.read_text()


def test_what_is_not_run_is_listed_with_a_reason():
    commands = [text for language, text in steps(PAGES) if language == "sh"]
    assert len(commands) > 10
    for start in [*NOT_RUN, *TOY_SIZE]:
        assert any(command.startswith(start) for command in commands), start


def test_the_pages_name_no_decoder_that_the_toy_does_not_stand_for():
    for page in PAGES:
        for word in page.read_text().replace("`", " ").split():
            if word.startswith("models/"):
                assert word.rstrip(",.") in ("models/qwen3-0.6b", "models/pruned-80m"), page.name
