"""The quickstart in small: the same command with a few hundred tuples and a few steps; and the parts that decide.

python -m pytest tests/examples/test_code_search.py
"""

import random
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_gguf
from harness import ROOT, run_command

from examples.code_search import corpus, foundation, quickstart, search, tuples
from examples.code_search.corpus import Function
from examples.models import weights
from utils import RunError

SOURCE = '''
class Box:
    def total(self, items):
        """Sum up the weights of all items in the box.

        A second paragraph.
        """
        return sum(item.weight for item in items)

    def empty(self):
        """Only a docstring with enough words."""

async def fetch(
    url,
):
    """Load a page over the
    network and return it."""
    # a comment
    return await get(url)

def short():
    """Too short."""
    return 1

def helper():
    return 2
'''


def test_functions_are_read_with_their_first_paragraph_and_without_their_docstring():
    total, fetch = corpus.functions_of_source(SOURCE, "box.inner")
    assert (total.package, total.module, total.name, total.own_name) == ("box", "box.inner", "Box.total", "total")
    assert total.query == "Sum up the weights of all items in the box."
    assert total.passage == "def total(self, items):\n    return sum(item.weight for item in items)"
    assert total.has_loop
    assert fetch.query == "Load a page over the network and return it."
    assert fetch.passage == "async def fetch(\n    url,\n):\n    # a comment\n    return await get(url)"
    assert not fetch.has_loop
    assert corpus.functions_of_source("def broken(:", "m") == []


@pytest.mark.parametrize("text", ["See above.", ":param x: the value of it", "== == == == a bb cc dd", "one two three"])
def test_what_nobody_would_search_for_is_no_query(text):
    assert not corpus.is_sentence(text)


def function(i: int, package: str = "p", **changes) -> Function:
    values = {
        "package": package, "module": f"{package}.m", "name": f"f{i}", "line": 1,
        "query": f"Find the number {i} of all of them", "passage": f"def f{i}(): return {i}", "has_loop": bool(i % 2),
    }  # fmt: skip
    return Function(**values | changes)


def test_duplicates_and_held_out_functions_are_left_out():
    functions = [
        function(0),
        function(1),
        function(2, query="find the NUMBER 0 of all of them"),
        function(3, passage="x"),
    ]
    assert corpus.distinct(functions) == [functions[0], functions[1], functions[3]]
    assert corpus.distinct(functions, others=[function(9, passage="x")]) == [functions[0], functions[1]]


def test_all_three_tasks_are_written_in_the_published_layout(tmp_path):
    functions = [function(i, f"package{i % 5}") for i in range(400)]
    tuples.write_tuples(functions, tmp_path / "a", 300, 40)
    tuples.write_tuples(functions, tmp_path / "b", 300, 40)
    searches, clusters, loops = (
        pq.read_table(tmp_path / "a" / f"code_{n}.parquet").to_pylist() for n in ("search", "packages", "loops")
    )
    names = ["query", "passage", *(f"negative_{k}" for k in range(1, 25))]
    assert list(searches[0]) == list(clusters[0]) == names
    assert list(loops[0]) == names[:3]
    package_of, loop_of = {f.passage: f.package for f in functions}, {f.passage: f.has_loop for f in functions}
    for row in searches:
        assert row["query"].startswith(
            "Instruct: Retrieve the most relevant code snippet for the given query.\nQuery: "
        )
        assert len({row[name] for name in names[1:]}) == 25  # 24 negatives, all different, none the positive
    for row in clusters:
        own = package_of[row["passage"]]
        assert package_of[row["query"].partition("\nQuery: ")[2]] == own
        assert own not in {package_of[row[name]] for name in names[2:]}
    for row in loops:
        assert row["passage"] == tuples.LABELS[loop_of[row["query"].partition("\nQuery: ")[2]]]
        assert {row["passage"], row["negative_1"]} == set(tuples.LABELS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()  # deterministic


@pytest.mark.parametrize(
    ("packages", "found"), [(["p"], "1 package with"), (["p", "small"], "1 package with"), ([], "0")]
)
def test_a_cluster_without_another_is_refused(packages, found, tmp_path):
    """Of `small` there are fewer functions than a cluster needs."""
    functions = [function(i, package) for package in packages for i in range(5 if package == "small" else 40)]
    with pytest.raises(RunError, match=f"code_packages: {found}"):
        tuples.package_tuples(functions, random.Random(0), 10)


@pytest.mark.processes
def test_the_whole_command_in_small(tmp_path, monkeypatch, capsys):
    """Build, tokenise, warm up, launch on two processes, evaluate, plot: as `make quickstart`, but for the sizes.

    Then the search command, with the model that it trained, in a file of this repository.
    """
    left_out = shutil.ignore_patterns(".*", "quickstart*", "foundation*", "quality", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path, ignore=left_out, dirs_exist_ok=True)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", dirs_exist_ok=True)  # has files called quickstart
    tiny_gguf.write(tmp_path / "tiny.gguf", [SOURCE])
    backbone = "--gguf tiny.gguf --layers 2"
    sizes = "--rows 600 --others 60 --train_steps 6 --log_interval 2 --train_batch_size 16 --validation_steps 5"
    words = ["-m", "examples.code_search.quickstart", "--one_file_in", "10", *backbone.split(), *sizes.split()]
    done = run_command(*words, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python tokenize_data_qwen.py --tokenizer_path quickstart/models/smollm2" in done.stdout
    assert "accelerate launch --config_file configs/accelerate_cpu.yaml" in done.stdout
    for line in ("nDCG@10", "untrained backbone", "trained", "BM25", "encode bytes as base64", "  3. "):
        assert line in done.stdout, line
    output = tmp_path / "quickstart" / "output" / "code_search"
    assert (output / "step_6" / "modules.json").exists()
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    words = ["replace a file in one step", "utils.py", "--top", "30"]
    assert search.main(words) == 0
    found = capsys.readouterr().out
    source = (ROOT / "utils.py").read_text()
    assert len(found.splitlines()) == len(re.findall(r"^def ", source, re.MULTILINE)) > 10
    line = source.splitlines().index("def flush(path: Path) -> None:") + 1
    assert re.search(rf"^-?[01]\.\d{{3}}  utils\.py:{line}  flush  Make a file", found, re.MULTILINE)
    assert (output / "step_6.vectors.npz").exists()
    assert search.main(words) == 0
    assert capsys.readouterr().out == found  # from the vectors that were kept


def test_search_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert search.main(["words", "."]) == 2
    assert "no trained model here" in capsys.readouterr().err
    assert search.main(["words", "nowhere", "--model", "."]) == 2
    assert capsys.readouterr().err == "nowhere: no such file or folder\n"
    (tmp_path / "a.py").write_text("x = 1")
    assert search.main(["words", ".", "--model", "."]) == 2
    assert capsys.readouterr().err == ".: no Python function there\n"
    (tmp_path / "a.py").write_text("def f(): return 1")
    assert search.main(["words", "a.py", "--model", "."]) == 2
    assert "no model folder that Sentence Transformers can load" in capsys.readouterr().err


def test_a_search_skips_what_is_not_ones_own_code_and_what_cannot_be_read(tmp_path):
    for folder in (".venv", "lib/site-packages", "src"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("def f(): return 1")
    (tmp_path / "src" / "broken.py").symlink_to("nowhere.py")
    (tmp_path / "src" / "folder.py").mkdir()
    (tmp_path / "src" / "latin.py").write_bytes(b"def g(): return '\xe9'")
    assert [path for path, _ in search.functions_in(tmp_path)] == [tmp_path / "src" / "a.py"]


def test_vectors_are_kept_for_one_state_of_the_model(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    state = search.state_of(model)
    kept = tmp_path / "model.vectors.npz"
    search.write_vectors(kept, state, {"a": np.ones(3, np.float32)})
    assert search.read_vectors(kept, state)["a"].tolist() == [1, 1, 1]
    (model / "config.json").write_text("{} ")
    assert search.read_vectors(kept, search.state_of(model)) == {}
    kept.write_bytes(kept.read_bytes()[:40])
    assert search.read_vectors(kept, state) == {}
    assert search.read_vectors(tmp_path / "none.npz", state) == {}


def test_all_functions_are_searched_in_and_keep_their_docstrings():
    functions = corpus.all_functions_of_source(SOURCE, "box")
    assert [f.name for f in functions] == ["Box.total", "Box.empty", "fetch", "short", "helper"]
    assert functions[0].passage.startswith('def total(self, items):\n    """Sum up the weights')
    assert functions[-1].passage == "def helper():\n    return 2"
    assert functions[-1].query == ""


def test_the_quickstart_needs_the_package_or_another_backbone(monkeypatch, capsys, tmp_path):
    absent = weights.Weights(package="no-such-package==1.0", module="no_such_module", file="x", sha256="")
    monkeypatch.setattr(weights, "SMOLLM2", absent)
    monkeypatch.chdir(tmp_path)
    assert quickstart.main([]) == 2
    said = capsys.readouterr()
    assert f"no-such-package==1.0 is missing: {weights.INSTALL}" in said.err
    assert "--backbone random" in said.err
    assert said.out == ""  # before minutes of reading files


def test_a_depth_that_the_decoder_has_not_is_refused_before_anything_is_moved(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    tiny_gguf.write(tmp_path / "tiny.gguf", [SOURCE])
    (tmp_path / "quickstart").mkdir()
    for layers in (0, 4):
        assert quickstart.main(["--gguf", "tiny.gguf", "--layers", str(layers)]) == 2
        assert f"layers: {layers} is not between 1 and 3" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart", "tiny.gguf"]


def test_the_random_backbone_has_its_own_settings():
    job, overrides = quickstart.read_flags(["--backbone", "random", "--train_steps", "5"], quickstart.QUICKSTART)
    assert job == quickstart.RANDOM
    assert (job.layers, job.rows, job.others) == (None, 48000, 3000)
    assert job.settings()["model_path"] == "quickstart/models/tiny-qwen3"
    assert overrides == ["--train_steps", "5"]
    job, _ = quickstart.read_flags(["--layers", "5"], foundation.FOUNDATION)
    assert (job.layers, job.folder.name) == (5, "foundation")


@pytest.mark.parametrize(
    ("words", "preset", "said"),
    [
        (["--learning_rat", "1"], quickstart.QUICKSTART, "did you mean learning_rate"),
        (["--output_dir", "x"], quickstart.QUICKSTART, "output_dir: the folders of this job are fixed"),
        (["--config", "x"], quickstart.QUICKSTART, "config: the configuration of this job is fixed"),
        (["--backbone", "random"], foundation.FOUNDATION, "its settings are the quickstart's"),
        (["--backbone", "random", "--layers", "2"], quickstart.QUICKSTART, "goes without --layers and --gguf"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_done(words, preset, said, capsys):
    with pytest.raises(SystemExit) as ended:
        quickstart.read_flags(words, preset)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
