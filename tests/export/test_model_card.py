"""Model cards: what the hub reads of them, what runs in them, and that their figures can be changed later.

python -m pytest tests/export/test_model_card.py
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import interrupted, read_metrics, toy_settings, train_here
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from test_docs import blocks
from transformers import AutoTokenizer

from export import card_update, model_folder
from export.card_results import in_cell
from export.model_card import Facts, model_card
from modeling.backbone import load_backbone
from tools import export, merge_adapter, merge_checkpoints

ODD = "odd: | name #1 'x' \"y\" <b>*é* \\ [z](w)"
TEXTS = ["The river is old.", "价格 — naïve café?", "one two three " * 50, "a"]


def facts(**changes) -> Facts:
    values = {
        "hidden_size": 32, "max_seq_length": 24, "query_instruction": 'Find "it" \\ now.',
        "base_model": "Qwen/Qwen3-0.6B", "matryoshka_dims": [8, 16, 32],
        "training": {"steps": 3, "teacher": None, "settings": {"a|b": 1}},
        "datasets": {"toy": 1234, ODD: 5}, "tasks": {"toy": "retrieval", ODD: "clustering"},
    }  # fmt: skip
    return Facts(**values | changes)


def cells(line: str) -> list[str]:
    """The cells of a line of a table, as a reader of Markdown splits them."""
    return [cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]]


def rows_of(card: str, head: list[str]) -> list[list[str]]:
    """The rows of the table that has this head."""
    lines = card.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("|") and cells(line) == head)
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


# ---------------------------------------------------------------------------------------- the head


def test_the_hub_reads_the_head_of_a_card():
    evaluation = {ODD: {"32": {"ndcg_at_10": 0.5, "mrr_at_10": 0.25}, "8": {"ndcg_at_10": 0.4, "mrr_at_10": 0.2}}}
    evaluation["plain"] = {"32": {"accuracy": 0.75, "f1": float("nan"), "main_score": 0.75, "ndcg_at_3": 0.1}}
    declared = {"license": "apache-2.0", "languages": ["en", "no"], "base_on_hub": True, "hub_model_id": "me/my-model"}
    card = ModelCard(model_card(facts(results={"evaluation": evaluation}, **declared)))
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "no"]  # and not False, as YAML has it
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.tags == ["sentence-transformers", "feature-extraction", "f2llm", "matryoshka"]
    assert card.data.model_name == "me/my-model"
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    whole = {(ODD, "ndcg_at_10"): 0.5, (ODD, "mrr_at_10"): 0.25, ("plain", "accuracy"): 0.75}
    assert found == whole  # at the whole width, of many metrics the usual ones, and of these the finite ones
    for one in card.data.eval_results:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", one.dataset_type)


def test_what_nobody_declared_stands_nowhere_in_the_head():
    text = model_card(facts())
    head = ModelCard(text).data.to_dict()
    assert not {"license", "language", "base_model", "model-index", "datasets"} & set(head)  # the base is a folder
    assert "None was declared when this folder was saved." in text
    assert "## Results" not in text


@pytest.mark.parametrize("base", ["a: b\n---\n# c", 'quote " and \\', "Ünï ☃", "#no comment", "- [a"])
def test_any_base_model_leaves_a_card_that_is_read(base):
    evaluation = {"evaluation": {"t": {"32": {"accuracy": 1.0}}}}
    card = ModelCard(model_card(facts(base_model=base, base_on_hub=True, results=evaluation)))
    assert card.data.base_model == base
    assert card.data.eval_results[0].metric_value == 1.0
    assert card.text.startswith("\n# Text embeddings from ") or card.text.startswith("# Text embeddings from ")


def test_the_same_facts_give_the_same_card_after_a_round_through_json():
    said = facts(results={"evaluation": {"t": {32: {"b": 0.5, "a": 1.0}}}})
    read = Facts(**json.loads(json.dumps(asdict(said))))
    assert model_card(said) == model_card(said)
    assert model_card(replace(read, results=said.results)) == model_card(said)
    assert model_card(read) == model_card(said)  # JSON has texts for the dimensions


# --------------------------------------------------------------------------------------- the tables


def test_odd_names_stay_in_their_cells():
    rows = rows_of(model_card(facts()), ["dataset", "task", "training tuples"])
    assert rows == [["toy", "retrieval", "1,234"], [in_cell(ODD), "clustering", "5"]]
    assert "<b>" not in "".join(rows[1]).replace("\\<b\\>", "")
    assert rows_of(model_card(facts()), ["", ""])[-1] == ["settings", "{'a\\|b': 1}"]


def test_the_card_of_many_datasets_names_the_ten_largest_and_counts_the_others():
    sizes = {f"set_{number:02}": 1000 + number for number in range(13)}
    rows = rows_of(model_card(facts(datasets=sizes)), ["dataset", "task", "training tuples"])
    assert rows[0] == ["set_12", "", "1,012"]
    assert rows[9] == ["set_03", "", "1,003"]
    assert rows[10:] == [["and 3 other datasets", "", "3,003"]]
    few = dict(list(sizes.items())[:10])
    rows = rows_of(model_card(facts(datasets=few)), ["dataset", "task", "training tuples"])
    assert rows == [[name, "", f"{count:,}"] for name, count in few.items()]


def test_the_results_have_a_row_for_each_task_and_width():
    held_out = {
        "retrieval": {"in_batch": 1.5, "hard": 0.5, "in_batch@8": 2.5, "hard@8": 0.25},
        "clustering": {"hard": 3},
    }
    evaluation = {"b": {"32": {"accuracy": 0.5}}, "a": {"8": {"accuracy": 0.25}, "32": {"accuracy": 1.0}},
                  "search": {"32": {"mrr_at_10": 0.1, "ndcg_at_10": 0.2, "map_at_3": 0.3}},
                  "translated": {"32": {"accuracy": 0.5, "f1": 0.25, "main_score": 0.25}}}  # fmt: skip
    beside = {"other": {"a": {"64": {"accuracy": 0.9}, "8": {"accuracy": 0.1}}}}
    results = {"held_out": {"step": 1000, "measures": held_out}, "evaluation": evaluation, "beside": beside}
    card = model_card(facts(results=results))
    assert "after step 1,000" in card
    assert rows_of(card, ["task", "dimensions", "in-batch loss", "hard-negative loss"]) == [
        ["clustering", "32", "–", "3.0000"],
        ["retrieval", "32", "1.5000", "0.5000"],
        ["retrieval", "8", "2.5000", "0.2500"],
    ]
    rows = rows_of(card, ["evaluation", "dimensions", "accuracy"])
    assert rows == [["a", "32", "1.0000"], ["a", "8", "0.2500"], ["b", "32", "0.5000"]]
    assert rows_of(card, ["evaluation", "dimensions", "ndcg_at_10", "mrr_at_10"]) == [
        ["search", "32", "0.2000", "0.1000"]
    ]
    assert rows_of(card, ["evaluation", "metric", "this model", "other"]) == [
        ["a", "accuracy", "1.0000", "0.9000"],
        ["b", "accuracy", "0.5000", "–"],
        ["search", "ndcg_at_10", "0.2000", "–"],
        ["translated", "f1", "0.2500", "–"],  # mteb's main metric
    ]
    sets = {"files": {"32": {"Recall@10": 0.75, "nDCG@10": 0.5, "Recall@1": 0.25}}}
    card = model_card(facts(results={"in_training": {"step": 2000, "sets": sets}}))
    assert "after step 2,000" in card
    assert rows_of(card, ["evaluation", "dimensions", "nDCG@10", "Recall@10"]) == [["files", "32", "0.5000", "0.7500"]]
    rare = model_card(facts(results={"evaluation": {"t": {"32": {"z": 1.0, "a": 0.5}}}}))
    assert rows_of(rare, ["evaluation", "dimensions", "a", "z"]) == [["t", "32", "0.5000", "1.0000"]]


# ------------------------------------------------------------------------------------------- its use


@pytest.fixture(scope="module")
def trained(toy_world, tmp_path_factory):
    """A function (**changed keys) -> (run folder, its last model folder), one run for each set of keys."""
    made = {}

    def train(**changes):
        name = json.dumps(changes, sort_keys=True)
        if name not in made:
            settings = toy_settings(toy_world, tmp_path_factory.mktemp("card")) | {"validation_steps": 2}
            run = train_here(settings | changes)
            made[name] = run, run / "step_4"
        return made[name]

    return train


def python_of(card: str, texts: list[str]) -> list[str]:
    """The Python of a card, with these texts for its dots."""
    return [content.replace('["..."]', repr(texts)) for kind, content in blocks(card) if kind == "python"]


def run_python(code: str) -> list[torch.Tensor]:
    """The vectors of queries and documents that a card's Python makes."""
    names = {}
    exec(compile(code, "a card", "exec"), names)
    return [torch.as_tensor(names[kind]).cpu() for kind in ("queries", "documents")]


@pytest.mark.parametrize("keys", [{"use_mrl": True}, {"use_lora": True, "lora_dropout": 0.0}], ids=["mrl", "lora"])
def test_the_python_of_a_card_gives_the_vectors_of_the_folder(trained, keys, tmp_path, monkeypatch):
    _, folder = trained(**keys)
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("path/to/this").mkdir(parents=True)
    Path("path/to/this/folder").symlink_to(folder)
    model = SentenceTransformer(str(folder), device="cpu")
    prompt = model.prompts["query"]
    assert prompt.startswith("Instruct: ")
    queries = model.encode([prompt + text for text in TEXTS], convert_to_tensor=True).cpu()
    documents = model.encode(TEXTS, convert_to_tensor=True).cpu()
    assert (queries - documents).abs().max() > 0.01  # the prompt says something
    found = [run_python(code) for code in python_of(card, TEXTS)]
    expected = [(queries, documents)] * 2
    if "use_mrl" in keys:
        short = [torch.nn.functional.normalize(rows[:, :16], dim=-1) for rows in (queries, documents)]
        expected.insert(1, short)
    assert len(found) == len(expected)
    for pair, expected_pair in zip(found, expected, strict=True):
        for rows, expected_rows in zip(pair, expected_pair, strict=True):
            torch.testing.assert_close(rows, expected_rows, atol=1e-5, rtol=0)


def test_a_run_writes_the_held_out_figures_and_its_settings_into_the_card(trained):
    run, folder = trained(use_mrl=True)
    last = read_metrics(run, "validation")[-1]
    card = (folder / "README.md").read_text()
    head = ["task", "dimensions", "in-batch loss", "hard-negative loss", "accuracy among its negatives",
            "MRR among its negatives"]  # fmt: skip
    rows = rows_of(card, head)
    assert [row[:2] for row in rows] == [[task, width] for task in ("classification", "clustering", "retrieval")
                                         for width in ("32", "16", "8")]  # fmt: skip
    by_name = {tuple(row[:2]): row[2:] for row in rows}
    for measure, place in (("in_batch", 0), ("hard", 1), ("group_mrr", 3)):
        assert by_name["retrieval", "32"][place] == f"{last['measures']['toy_retrieval'][measure]:.4f}"
        assert by_name["retrieval", "8"][place] == f"{last['measures']['toy_retrieval'][f'{measure}@8']:.4f}"
    datasets = rows_of(card, ["dataset", "task", "training tuples"])
    assert ["toy_retrieval", "retrieval", "198"] in datasets
    assert len(datasets) == 3
    told = dict(rows_of(card, ["", ""]))
    assert (told["steps"], told["learning_rate"], told["precision"]) == ("4", "0.001", "no")


def test_a_resumed_run_writes_the_same_card(trained, toy_world, tmp_path):
    keys = {"use_mrl": True, "validation_steps": 2, "checkpointing_steps": 2}
    settings = toy_settings(toy_world, tmp_path) | keys
    interrupted(settings, 4)
    folder = train_here(settings)
    assert (folder / "step_4" / "README.md").read_text() == (trained(use_mrl=True)[1] / "README.md").read_text()


# ------------------------------------------------------------------------------- figures put in later


@pytest.fixture
def folder(toy_world, tmp_path) -> Path:
    """A model folder with held-out figures."""
    tokenizer = AutoTokenizer.from_pretrained(toy_world.backbone)
    backbone = load_backbone(str(toy_world.backbone), torch.float32)
    said = facts(results={"held_out": {"step": 7, "measures": {"retrieval": {"hard": 0.5}}}})
    model_folder.save(tmp_path / "m", backbone, tokenizer, said, torch.float32)
    return tmp_path / "m"


def test_an_evaluation_is_put_into_the_card_of_a_finished_folder(folder):
    before = Facts(**json.loads((folder / "f2llm.json").read_text()))
    assert card_update.add_evaluation(folder, {"a": {"32": {"accuracy": 0.5}}})
    assert card_update.add_evaluation(
        folder, {"b": {"32": {"accuracy": 0.25}}}, beside={"o": {"b": {"32": {"accuracy": 1}}}}
    )
    after = Facts(**json.loads((folder / "f2llm.json").read_text()))
    text = (folder / "README.md").read_text()
    assert text == model_card(after)
    assert replace(after, results=before.results) == before
    assert after.results["held_out"] == before.results["held_out"]
    assert rows_of(text, ["evaluation", "dimensions", "accuracy"]) == [["a", "32", "0.5000"], ["b", "32", "0.2500"]]
    assert [one.metric_value for one in ModelCard(text).data.eval_results] == [0.5, 0.25]
    assert model_folder.is_finished(folder, before)  # a resumed run finds the folder that it wrote
    assert not model_folder.is_finished(folder, replace(before, training={"steps": 4}))
    assert not list(folder.glob("*.tmp"))


def test_what_somebody_wrote_into_a_card_stays(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Training", "## Mine\n\nmy words\n\n## Training"))
    card_update.add_evaluation(folder, {"a": {"32": {"accuracy": 0.5}}})
    card_update.add_evaluation(folder, {"a": {"32": {"accuracy": 0.75}}})
    text = card.read_text()
    assert "## Mine\n\nmy words\n\n## Training" in text
    assert text.count("## Results") == 1
    assert rows_of(text, ["evaluation", "dimensions", "accuracy"]) == [["a", "32", "0.7500"]]
    assert "after step 7" in text


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("theirs")
    assert not card_update.add_evaluation(tmp_path, {"a": {"32": {"accuracy": 0.5}}})
    card_update.forget_results(tmp_path)
    assert (tmp_path / "README.md").read_text() == "theirs"


def test_averaged_weights_have_no_figures_of_the_first_folder(folder, tmp_path):
    assert "## Results" in (folder / "README.md").read_text()
    assert merge_checkpoints.main(["--inputs", str(folder), str(folder), "--output", str(tmp_path / "mean")]) == 0
    assert "## Results" not in (tmp_path / "mean" / "README.md").read_text()
    assert json.loads((tmp_path / "mean" / "f2llm.json").read_text())["results"] == {}


def test_a_merged_adapter_keeps_its_figures(trained, tmp_path):
    _, folder = trained(use_lora=True, lora_dropout=0.0)
    assert merge_adapter.main([str(folder), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "README.md").read_text() == (folder / "README.md").read_text()


def test_the_python_of_a_folder_that_cuts_embeddings_gives_what_it_gives(trained, tmp_path, monkeypatch):
    _, folder = trained(use_mrl=True)
    monkeypatch.chdir(tmp_path)
    assert export.main(["--model", str(folder), "--output", "path/to/this/folder", "--dimension", "16"]) == 0
    card = Path("path/to/this/folder/README.md").read_text()
    assert "16 dimensions, at most" in card
    in_st, shorter, in_transformers = (run_python(code) for code in python_of(card, TEXTS))
    assert (in_st[0].shape, shorter[0].shape) == ((4, 16), (4, 8))
    for rows, expected in zip(in_transformers, in_st, strict=True):
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


def test_the_card_of_an_onnx_folder_says_how_that_is_loaded():
    card = model_card(facts(in_onnx=True))
    assert card.count('SentenceTransformer("path/to/this/folder", backend="onnx"') == 2
    assert "AutoModel" not in card
