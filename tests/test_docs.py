"""The pages say what is true: their links and paths lead somewhere, their commands and code run.

    python -m pytest tests/test_docs.py

Commands and Python of README.md and docs/ run in the order of the pages, in a folder that is laid out as the README
says, with the toy in place of the published model and data. What a test cannot run is listed below, with the reason.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import harness
import pytest
import toy
from accelerate.state import AcceleratorState, GradientState
from test_house_rules import DOORS, MAY_IMPORT

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
ALL_PAGES = [*PAGES, *sorted(ROOT.glob("docs/recipes/*.md"))]  # tests/docs/test_recipe_pages.py runs the recipes
GLOBAL_BATCH = 8 * 32  # processes of configs/accelerate_config.yaml x train_batch_size of configs/config.json

ONE_GPU = (
    "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend no "
    "run.py --config configs/config.json --experiment_id first_run"
)
OWN_DATA = (
    "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend no run.py "
    "--config configs/config.json --train_data_path my_data/tokenized --experiment_id my_run --warmup_steps 0"
)
OWN_INSTRUCTION = "Given a question, retrieve passages that can help answer the question."
LAUNCH = "accelerate launch --config_file configs/accelerate_config.yaml"
TOKENIZE = "python tokenize_data_qwen.py --tokenizer_path models/qwen3-0.6b"
WITHOUT_LAUNCHER = (
    "ACCELERATE_MIXED_PRECISION=bf16 python run.py --config configs/config.json --experiment_id first_run"
)
A_RUN_OF_ITS_OWN = "--experiment_id keys --train_steps 2"  # the page's run would continue in another one's folder
MINE = (
    "python -m tools.mine_hard_negatives --input raw/questions.parquet --output mined/questions.parquet "
    "--model models/qwen3-0.6b"
)
EMBED = (
    "python -m tools.embed_store --model models/qwen3-1.7b --stores training_data/data_tokenized_qwen "
    "--output training_data/teacher --max_seq_length 1024"
)
PRUNE = (
    "python -m tools.prune_model --input output/v2/stage1-0.6b/epoch_1 --output models/f2llm-v2-80m-pruned "
    "--num_layers 8 --hidden_size 320 --intermediate_size 2048 --calibration calibration.jsonl"
)
STEPS_TO_AVERAGE = [f"output/run/step_{step}" for step in (100, 200, 300)]
AVERAGE = f"python -m tools.merge_checkpoints --inputs {' '.join(STEPS_TO_AVERAGE)} --output merged"
RUN = {  # command -> what is appended to it here; on two CPU processes where the page starts eight
    f"{TOKENIZE} --input_dir training_data --output_dir training_data/data_tokenized_qwen": "",
    ONE_GPU: "",
    f"{LAUNCH} run.py --config configs/config.json": "--train_steps 2",
    f"{LAUNCH} run.py --config configs/config_lora.json": "",
    "python -m tools.merge_adapter output/0.6b+lora/epoch_2 merged": "",
    "python -m tools.export --model output/first_run/epoch_2 --output served --dtype bf16": "",
    "python -m tools.export --model output/first_run/epoch_2 --output for_llama_cpp --format gguf --dtype bf16": "",
    f"{TOKENIZE} --input_dir my_data --output_dir my_data/tokenized --task retrieval "
    f"--instruction {shlex.quote(OWN_INSTRUCTION)}": "",
    OWN_DATA: "",
    "python run.py --config configs/config.json --cache_only true": "",
    "python run.py --config configs/config.json --learning_rate 2e-5 --use_mrl true": A_RUN_OF_ITS_OWN,
    "python run.py --config configs/config.json --evaluation_data_path my_sets --evaluation_steps 500 "
    "--evaluation_dims 64,256 --best_metric nDCG@10 --early_stopping_patience 5": "--experiment_id evaluated "
    "--train_steps 2 --evaluation_dims 8,16 --evaluation_steps 1",
    WITHOUT_LAUNCHER: "--experiment_id without_launcher --train_steps 2",
    "python -m tools.plot_run output/first_run": "",
    "python -m tools.report output/first_run --output report.html": "",
    "python -m tools.report output/first_run output/my_run --output compared.html "
    "--names 'published data' 'my data'": "",
    "python -m tools.report output/first_run --output report.html --neighbours 8": "",
    f"{TOKENIZE} --input_dir training_data --output_dir training_data/joined --part 1/2": "",
    f"{TOKENIZE} --input_dir training_data --output_dir training_data/joined --part 2/2": "",
    f"{TOKENIZE} --input_dir training_data --output_dir training_data/joined --join 2": "",
    "python -m tools.inspect_data training_data": "",
    "python -m tools.inspect_data training_data/data_tokenized_qwen --config configs/config.json "
    "--page inspection.md": "",
    "python -m tools.build_tuples --source my_sources/banking.json --output_dir my_tuples": "",
    f"{TOKENIZE} --input_dir my_tuples --output_dir my_tuples/tokenized": "",
    MINE: "--num_negatives 2 --relative_margin 0 --max_score none",
    "python -m tools.evaluate --model output/my_run/epoch_2 --tasks my_sets --output evaluation": "",
    "python -m tools.inspect_data training_data --evaluation beir/scifact": "",
    EMBED: "",
    PRUNE: "--num_layers 1 --hidden_size 16 --intermediate_size 32",
    AVERAGE: "--output averaged",  # `merged` is there already, from another page
}
NOT_RUN = {  # how a command begins -> why no test runs it from the page
    "make quickstart": "eight minutes; tests/examples/test_code_search.py runs it in small",
    "make foundation": "fifty minutes; the quickstart with other numbers",
    ".venv/bin/python -m examples.code_search.search": "needs the foundation's model; a recipe runs it with another",
    "make v2-demo": "trains twelve models; tests/examples/test_v2_cascade.py runs it in small",
    "make test": "runs this test",
    "make chaos": "an hour or two; tests/runtime/test_chaos.py runs it in small",
    "make bench": "a quarter of an hour; tests/test_benchmarks.py runs a part in small",
    "make lint": "changes files",
    "pip install": "needs a package index",
    "hf download": "needs the hub",
    f"{LAUNCH} -m tools.mine_hard_negatives": "tests/tools/test_mine_hard_negatives.py launches it on two processes",
    f"{LAUNCH} --num_machines": "needs several machines; tests/runtime/test_two_hosts.py runs it",
    "python -m tools.export --model output/first_run/epoch_2 --output short": "needs a Matryoshka model; "
    "tests/tools/test_export.py cuts one",
    "python -m tools.export --model output/first_run/epoch_2 --output in_onnx": "tests/tools/test_export.py does it",
    "DO_NOT_TRACK=1 .venv-serving/bin/infinity_emb": "starts a server; tests/serving/test_server.py does too",
    "vllm serve": "needs vLLM; tests/export/test_server_files.py checks what it reads",
    "docker run": "needs a container; tests/export/test_server_files.py checks what it reads",
    "python -m sglang": "needs SGLang; tests/export/test_server_files.py checks what it reads",
    "python convert_hf_to_gguf.py": "needs llama.cpp; tests/export/test_server_files.py checks what it reads",
    "llama-server": "needs llama.cpp",
    "sbatch": "needs a cluster; tests/runtime/test_slurm.py runs the file",
    f"{LAUNCH} run.py --config configs/v2/": "trains Qwen3; tests/test_arguments.py reads these files",
    f"{LAUNCH} -m tools.embed_store": "tests/tools/test_embed_store.py launches it on two processes",
    "python -m benchmarks.": "takes minutes",
    "python run.py --config configs/config.json --experiment_id tracked": "starts a process of wandb's; "
    "tests/training/test_trackers.py does it",
    "python run.py --config configs/config.json --experiment_id pushed": "needs the hub; tests/export/test_pushing.py "
    "pushes to a stand-in",
    "python -m pytest": "runs tests",
    "UPDATE_GOLDEN=1": "rewrites the golden losses",
    "python -m examples.six_kinds.gather": "reads a whole machine; tests/examples/test_six_kinds.py runs it in small",
    "python -m tools.build_tuples --source 'six_kinds": "needs what the command before it gathers",
    "python -m tools.build_tuples --source 'configs/sources": "needs the hub; the tool's own tests run parts",
    "python -m tools.build_tuples --source configs/sources": "needs the hub",
    "python -m tools.evaluate --model output/0.6b": "needs the hub; tests/tools/test_evaluate.py evaluates local tasks",
    "python -m tools.evaluate --model foundation": "needs models; tests/tools/test_evaluate.py evaluates others",
    "python -m examples.local_tasks.make": "reads a whole machine; tests/examples/test_local_tasks.py runs it in small",
    "python -m examples.local_tasks.compare": "needs two evaluations; tests/examples/test_local_tasks.py makes them",
    "python -m tools.report output/first_run --output report.html --neighbours 8 --texts": "needs a file of texts; "
    "tests/tools/test_report.py makes one",
    "python -m tools.configuration_page": "rewrites a page, which a test of its own compares",
}


# ------------------------------------------------------------------------------------- what a page says


def without_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of a page's fenced blocks, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    """The commands of a sh block, each on one line, without comments; words with spaces are quoted."""
    lines = block.replace("\\\n", " ").splitlines()
    found = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [command for command in found if command]


def spans(text: str) -> list[str]:
    """Everything that a page has between single backticks."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def reason_not_to_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def steps(pages: list[Path]) -> list[tuple[str, str]]:
    """What a reader of these pages would run, in order: ("sh", a command) or ("python", a block)."""
    found = []
    for page in pages:
        for language, content in blocks(page.read_text()):
            if language == "sh":
                found += [("sh", command) for command in commands(content)]
            elif language == "python":
                found.append(("python", content))
    return found


STEPS = steps(PAGES)
ALL_COMMANDS = [text for language, text in STEPS if language == "sh"]


# ---------------------------------------------------------------------------------- links, paths, names


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def git_files() -> set[str]:
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")) - {""}


AT_THE_ROOT = {name.partition("/")[0] for name in git_files()}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_name)
def test_every_link_leads_somewhere(page):
    text = without_blocks(page.read_text())
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: no heading for {target}"


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    pages = [f"docs/{page.name}" for page in ROOT.glob("docs/*.md")]
    assert len(pages) > 10
    assert [page for page in pages if f"]({page}" not in text] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_name)
def test_every_path_in_backticks_exists(page):
    for span in spans(page.read_text()):
        for word in span.split():
            name, _, test = word.partition("::")
            of_the_repository = name.partition("/")[0] in AT_THE_ROOT and "/" in name and name != "tuples/s"
            file_at_the_root = re.fullmatch(r"[\w-]+\.(py|toml)", name)
            is_a_unit = name.endswith("/s")
            if is_a_unit or not (of_the_repository or file_at_the_root):
                continue
            assert (ROOT / name).exists(), f"{page.name}: {name}"
            if test:
                assert f"def {test}(" in (ROOT / name).read_text(), f"{page.name}: {word}"


def names_of_code(page: Path) -> list[str]:
    """Names such as `data.plan.Plan` in a page; of the table for readers of the published scripts the column "here"."""
    published, _, ours = page.read_text().partition("## Where did it go")
    rows = [line.split("|")[2] for line in ours.splitlines() if line.startswith("|")]
    found = [word for span in spans("\n".join([published, *rows])) for word in span.split()]
    rooms = {*MAY_IMPORT, *DOORS}
    dotted = [word for word in found if re.fullmatch(r"\w+(\.\w+)+", word) and not word.endswith((".py", ".npy"))]
    return [word for word in dotted if word.partition(".")[0] in rooms]


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_name)
def test_every_name_of_code_exists(page):
    for name in names_of_code(page):
        parts = name.split(".")
        if parts[0] in DOORS - {"run"}:  # python -m tools.NAME
            assert (ROOT / Path(*parts)).with_suffix(".py").exists(), f"{page.name}: {name}"
            continue
        files = 1
        while (ROOT / Path(*parts[:files])).is_dir() and files < len(parts):
            files += 1
        found = import_module(".".join(parts[:files]))
        for part in parts[files:]:
            assert hasattr(found, part), f"{page.name}: {name}"
            found = getattr(found, part)


# --------------------------------------------------------------------------------------------- README


def test_the_readme_is_short_and_begins_with_a_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert lines.index("make quickstart") < 25


def test_the_readmes_table_of_folders_is_the_one_that_is_enforced():
    rows = re.findall(r"^\| (`.*) \| .* \| (.*) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    shown: dict[str, set[str]] = {}
    for names, may_import in rows:
        imports = set(re.findall(r"`(\w+)`", may_import))
        if may_import == "every folder and file above":
            imports = set(shown)
        for name in re.findall(r"`([^`]+)`", names):
            shown[name.rstrip("/").removesuffix(".py")] = imports
    assert {room: shown[room] for room in MAY_IMPORT} == MAY_IMPORT


@pytest.mark.parametrize("page", ["README.md", "docs/distributed.md", "configs/accelerate_config.yaml"])
def test_the_global_batch_of_eight_gpus_is_said(page):
    launch = (ROOT / "configs/accelerate_config.yaml").read_text()
    config = (ROOT / "configs/config.json").read_text()
    processes = int(re.search(r"^num_processes: (\d+)$", launch, flags=re.MULTILINE)[1])
    batch = int(re.search(r'"train_batch_size": (\d+)', config)[1])
    assert processes * batch == GLOBAL_BATCH
    said = (ROOT / page).read_text()
    assert str(GLOBAL_BATCH) in said
    assert "512" in said  # v1's


# ------------------------------------------------------------------------------------------- commands


def test_every_command_is_run_or_listed_with_a_reason():
    unknown = [command for command in ALL_COMMANDS if command not in RUN and not reason_not_to_run(command)]
    assert unknown == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_name)
def test_no_command_hides_in_a_block_of_another_kind(page):
    for language, content in blocks(page.read_text()):
        assert language in ("sh", "python", "math", "bibtex", ""), f"{page.name}: a block of {language}"
        if not language:
            hidden = re.search(r"^\$? ?(python|make|accelerate|pip|torchrun) ", content, flags=re.MULTILINE)
            assert not hidden, f"{page.name}: a command outside of a sh block"


def test_the_lists_of_commands_hold_nothing_else():
    assert set(RUN) <= set(ALL_COMMANDS)
    assert not [command for command in RUN if reason_not_to_run(command)]
    for start, reason in NOT_RUN.items():
        assert any(command.startswith(start) for command in ALL_COMMANDS), start
        for path in re.findall(r"tests/\S+\.py", reason):
            assert (ROOT / path).exists(), path


def lay_out(folder: Path, toy_world) -> None:
    """Make a folder like a clone of this repository with the README's model and data in it."""
    for room in {*MAY_IMPORT, *DOORS}:
        name = room if (ROOT / room).is_dir() else f"{room}.py"
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for path in (folder / "configs").glob("*.yaml"):  # the pages launch on eight GPUs
        path.write_text(path.read_text().replace("num_processes: 8", "num_processes: 2"))
    (folder / "models").mkdir()
    (folder / "models" / "qwen3-0.6b").symlink_to(toy_world.backbone)
    shutil.copytree(toy_world.raw, folder / "training_data")


@pytest.fixture
def laid_out(toy_world, tmp_path, monkeypatch) -> Path:
    """What all pages but the recipes start from, as the current folder."""
    lay_out(tmp_path, toy_world)
    toy.write_parquet(tmp_path / "raw" / "questions.parquet", toy.raw_rows(60, 0))
    toy.make_backbone(tmp_path / "models" / "qwen3-1.7b", hidden_size=48)
    for trained in ("output/v2/stage1-0.6b/epoch_1", *STEPS_TO_AVERAGE):
        (tmp_path / trained).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / trained).symlink_to(toy_world.backbone)
    (tmp_path / "calibration.jsonl").write_text("".join(f'"{text}"\n' for text in toy.SUBJECTS))
    (tmp_path / "beir" / "scifact" / "qrels").mkdir(parents=True)
    for name, text in {"queries": "Find it.", "corpus": "The river is old."}.items():
        (tmp_path / "beir" / "scifact" / f"{name}.jsonl").write_text(json.dumps({"_id": "1", "text": text}) + "\n")
    (tmp_path / "beir" / "scifact" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(words: list[str], monkeypatch) -> None:
    """`python FILE ...` or `python -m MODULE ...` in this process, which has imported everything.

    Args:
        words: of the command; assignments of environment variables may stand first.
    """
    program = words.index("python") + 1
    for assignment in words[: program - 1]:
        name, _, value = assignment.partition("=")
        monkeypatch.setenv(name, value)
    arguments = words[program:]
    as_module = arguments[0] == "-m"
    monkeypatch.setattr(sys, "argv", arguments[1:] if as_module else arguments)
    status = None
    try:
        if as_module:
            monkeypatch.delitem(sys.modules, arguments[1], raising=False)  # or runpy warns
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert status in (0, None)


def launch(words: list[str], folder: Path) -> str:
    """`accelerate launch ...` on the CPU; returns what it printed."""
    command = ["-m", "accelerate.commands.launch", *words[2:]]
    done = harness.run_command(*command, environment=os.environ | {"ACCELERATE_USE_CPU": "true"}, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.processes
def test_the_commands_and_the_python_of_the_pages_run(laid_out, monkeypatch, capsys):
    printed = {}
    for language, text in STEPS:
        if language == "python":
            exec(compile(text, "a page", "exec"), {})
        elif text in RUN and text not in printed:
            words = shlex.split(f"{text} {RUN[text]}")
            if words[0] == "accelerate":
                printed[text] = launch(words, laid_out)
            else:
                with monkeypatch.context() as patch:
                    run_here(words, patch)
                printed[text] = capsys.readouterr().out
    assert set(printed) == set(RUN)
    # One process without a word from accelerate about flags that were not given.
    assert "processes: 1, mixed precision: bf16" in printed[ONE_GPU]
    assert "were not passed to `accelerate launch`" not in printed[ONE_GPU]
    assert "processes: 1, mixed precision: bf16" in printed[WITHOUT_LAUNCHER]
    assert "processes: 2, mixed precision: bf16" in printed[f"{LAUNCH} run.py --config configs/config.json"]
    output = laid_out / "output"
    for path in ("first_run/epoch_2/modules.json", "first_run/training.png", "0.6b+lora/epoch_2/adapter_config.json"):
        assert (output / path).exists(), path
    assert (output / "my_run" / "epoch_2" / "modules.json").exists()
    assert (laid_out / "mined" / "questions.parquet").exists()
    assert (output / "evaluated" / "best" / "modules.json").exists()
    prompts = json.loads((output / "my_run" / "epoch_2" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == f"Instruct: {OWN_INSTRUCTION}\nQuery: "  # only the tokenising was told
    assert list(json.loads((laid_out / "evaluation" / "results.json").read_text())) == ["questions"]
    for name in ("merged", "averaged", "models/f2llm-v2-80m-pruned"):
        assert (laid_out / name / "model.safetensors").exists(), name
    assert (laid_out / "training_data" / "teacher" / "toy_retrieval").is_dir()
