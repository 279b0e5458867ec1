"""All six kinds of sources, from real functions to a trained model.

python -m pytest tests/examples/test_six_kinds.py
"""

import json
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
from conftest import tokenize, train_here

from data.token_store import open_store
from examples.code_search import corpus
from examples.six_kinds import gather
from tools import build_tuples
from tuples.sources.description import KINDS, read_description

MODULES = ("argparse", "configparser", "ipaddress", "mailbox", "pathlib", "shutil", "statistics", "tarfile", "zipfile")


def functions_of_the_standard_library() -> list[corpus.Function]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for name in MODULES for path in (root / f"{name}.py", root / name / "__init__.py") if path.exists()]
    functions = []
    for path in paths:
        name = path.parent.name if path.stem == "__init__" else path.stem
        functions += corpus.functions_of_source(path.read_text(), name)
    return functions


def test_there_is_a_description_of_each_kind():
    assert {read_description(path)[0].kind for path in gather.DESCRIPTIONS} == set(KINDS)


def test_all_six_kinds_are_built_tokenised_and_trained(toy_world, settings, tmp_path):
    functions = functions_of_the_standard_library()
    gather.write_sources(functions, tmp_path / "sources")
    descriptions = sorted((tmp_path / "sources").glob("*.json"))
    for path in descriptions:  # those beside the example are for the functions of a whole machine
        smaller = {"cap": 24}
        if path.name == "scored.json":
            smaller["threshold"] = 1
        path.write_text(json.dumps(json.loads(path.read_text()) | smaller))
    raw, stores = tmp_path / "raw", tmp_path / "stores"
    assert build_tuples.main(["--source", *map(str, descriptions), "--output_dir", str(raw)]) == 0
    tasks = json.loads((raw / "tasks.json").read_text())
    assert sorted(tasks.values()) == ["classification", "clustering", *["retrieval"] * 4]
    assert pq.read_table(raw / "code_packages.parquet").num_columns == 26
    assert tokenize(raw, stores, toy_world.backbone) == 0  # no flag: task and instruction came with the files
    for name, task in tasks.items():
        store = open_store(stores / name)
        report = json.loads((raw / f"{name}.build.json").read_text())
        assert (store.task, len(store.tuples)) == (task, report["tuples"])
        counts = {report["description"]["instruction"]: report["tuples"]}
        assert store.meta["stats"]["instructions"] == {"counts": counts, "other": 0, "none": 0}
    epoch = sum(-(-len(open_store(stores / name).tuples) // settings["train_batch_size"]) for name in tasks)
    done = train_here(settings | {"train_data_path": str(stores), "train_steps": epoch, "log_interval": 1})
    logged = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in logged if line["kind"] == "train" for name in line["losses"]} == set(tasks)
