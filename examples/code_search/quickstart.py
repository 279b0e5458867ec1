"""The main job on real data, in minutes, on a laptop: learn to find Python functions from what their docstrings say.

    make quickstart                                     or, in an environment with the packages:
    python -m examples.code_search.quickstart           all of it; everything goes into the folder quickstart/

It builds raw tuples from the functions on this machine, then runs the same commands that a user of this repository
runs: tokenise, warm up the cache, launch the training. At the end it searches in functions that training never saw.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import transformers

from retrieval.encode import encode
from retrieval.metrics import score
from retrieval.search import BM25, search
from training.plot import draw

from . import backbone, corpus, tuples
from .corpus import Function

FOLDER = Path("quickstart")  # holds everything this command makes; an earlier one is kept as quickstart.N
EVALUATED = 2000  # held-out functions that are searched in
QUERIES = ("download a page from a url", "encode bytes as base64", "copy a file with its permissions")


def main(argv: list[str] | None = None) -> int:
    """Run every step, print what it does and what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48000, help="training tuples for retrieval (default %(default)s)")
    parser.add_argument("--others", type=int, default=3000, help="of each other task (default %(default)s)")
    parser.add_argument(
        "--one_file_in", type=int, default=1, help="read only one of every so many Python files (default all)"
    )
    parser.add_argument(
        "--config", default="examples/code_search/config.json", help="what run.py is given (default %(default)s)"
    )
    flags, overrides = parser.parse_known_args(argv)
    began = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    keep_earlier_folder()
    library = build(flags.rows, flags.others, flags.one_file_in)
    settings = json.loads(Path(flags.config).read_text())
    train(flags.config, settings, overrides)
    output = Path(settings["output_dir"]) / settings["experiment_id"]
    trained = newest_model_folder(output)
    show_search(library, Path(settings["model_path"]), trained, settings["max_seq_length"])
    print(f"\nmodel folder: {trained}\nplot of loss and learning rate: {draw(output)}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes in all")
    return 0


def keep_earlier_folder() -> None:
    """Rename what an earlier quickstart made to quickstart.1, or the next number that is free."""
    if not FOLDER.exists():
        return
    number = 1
    while Path(f"{FOLDER}.{number}").exists():
        number += 1
    kept = FOLDER.rename(f"{FOLDER}.{number}")
    print(f"the earlier quickstart is kept as {kept}")


def build(rows: int, others: int, one_file_in: int) -> list[Function]:
    """Make raw tuples and a backbone in FOLDER; returns the held-out functions, those of the standard library."""
    title("raw tuples from the Python functions on this machine")
    library = corpus.distinct(corpus.standard_library_functions(one_file_in))
    functions = corpus.distinct(corpus.installed_functions(one_file_in), library)
    packages = len({function.package for function in functions})
    print(f"{len(functions):,} documented functions of {packages} installed packages, to train on")
    print(f"{len(library):,} of the standard library, held out", flush=True)
    tuples.write_tuples(functions, FOLDER / "training_data", rows, others)
    texts = [text for function in functions for text in (function.query, function.passage)]
    backbone.make_backbone(FOLDER / "models" / "tiny-qwen3", texts, vocab_size=16384, hidden_size=128, layers=1)
    return library


def train(config: str, settings: dict, overrides: list[str]) -> None:
    """Tokenise, warm up the cache and train, with the commands of a user.

    Args:
        config: path of the configuration, and `settings` what it holds.
        overrides: further words for run.py.
    """
    model, stores = settings["model_path"], settings["train_data_path"]
    folders = f"--tokenizer_path {model} --input_dir {FOLDER}/training_data --output_dir {stores}"
    run(f"python tokenize_data_qwen.py {folders} --max_seq_length 512")
    run(f"python run.py --config {config} --cache_only true")
    processes = processes_to_train_on()
    batch = settings["train_batch_size"] // processes  # per process; `settings` has that of one
    launch = f"accelerate launch --config_file configs/accelerate_cpu.yaml --num_processes {processes}"
    command = f"{launch} run.py --config {config} --train_batch_size {batch} {shlex.join(overrides)}"
    run(command.strip(), {"ACCELERATE_USE_CPU": "true"})


def newest_model_folder(output: Path) -> Path:
    """The model that a run saved last."""
    saved = [*output.glob("epoch_*"), *output.glob("step_*")]
    return max(saved, key=lambda path: path.stat().st_mtime)


def show_search(library: list[Function], untrained: Path, trained: Path, max_length: int) -> None:
    """Print how well both models and BM25 find functions by their docstrings, and what QUERIES find in the library."""
    functions = random.Random(0).sample(library, min(EVALUATED, len(library)))
    title(f"search in {len(functions):,} functions of the standard library that training never saw")
    descriptions = [function.query for function in functions]
    queries = [tuples.instruct(tuples.SEARCH, description) for description in descriptions]
    passages = [function.passage for function in functions]
    scores = {}
    for name, folder in (("untrained backbone", untrained), ("trained", trained)):
        found = search(encode(folder, queries, max_length), encode(folder, passages, max_length), k=10)
        scores[name] = score(found.passages)
    scores["BM25"] = score(BM25(passages).search(descriptions, k=10).passages)
    print(table(scores))

    title(f"what the trained model finds in all {len(library):,} of them")
    queries = [tuples.instruct(tuples.SEARCH, query) for query in QUERIES]
    passages = [function.passage for function in library]
    found = search(encode(trained, queries, max_length), encode(trained, passages, max_length), k=3)
    for query, best in zip(QUERIES, found.passages, strict=True):
        print(query)
        for rank, number in enumerate(best, start=1):
            function = library[number]
            name = f"{function.module}.{function.name}"
            print(f"  {rank}. {name:44}  {function.query[:70]}")


def run(command: str, environment: dict[str, str] | None = None) -> None:
    """Show a command as a user would type it, and run it with this Python.

    Args:
        environment: further environment variables, which stand before the command.
    """
    environment = environment or {}
    settings = [f"{key}={value}" for key, value in environment.items()]
    print("\n$", *settings, command, flush=True)
    words = shlex.split(command)
    if words[0] == "accelerate":
        program = ["-m", "accelerate.commands.launch", *words[2:]]
    else:
        program = words[1:]
    subprocess.run([sys.executable, *program], check=True, env=os.environ | environment)


def title(text: str) -> None:
    """Print a line that begins a step."""
    print(f"\n# {text}", flush=True)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Name -> metric -> value as an aligned table."""
    metrics = list(next(iter(rows.values())))
    lines = [f"{'':20}" + "".join(f"{metric:>11}" for metric in metrics)]
    for name, values in rows.items():
        lines.append(f"{name:20}" + "".join(f"{values[metric]:11.3f}" for metric in metrics))
    return "\n".join(lines)


def processes_to_train_on() -> int:
    """The largest power of two that is neither above the cores nor above 8: it changes the time, not the result."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # those that this process may use
    else:
        cores = os.cpu_count()
    return min(8, 2 ** (cores.bit_length() - 1))


if __name__ == "__main__":
    sys.exit(main())
