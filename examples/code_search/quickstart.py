"""The main job on real data, in minutes, on a laptop: learn to find Python functions from what their docstrings say.

    make quickstart                                     or, in an environment with the packages:
    python -m examples.code_search.quickstart           all of it; everything goes into the folder quickstart/

It builds raw tuples from the functions on this machine, then runs the same commands that a user of this repository
runs: tokenise, warm up the cache, launch the training. At the end it searches in functions that training never saw.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import transformers

from retrieval.encode import embed
from retrieval.metrics import metrics
from retrieval.search import BM25, top
from tools.plot_run import plot

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
        "--config", default="examples/code_search/config.json", help="what run.py is given (default %(default)s)"
    )
    flags, overrides = parser.parse_known_args(argv)
    began = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if FOLDER.exists():
        earlier = next(path for n in itertools.count(1) if not (path := Path(f"{FOLDER}.{n}")).exists())
        print(f"the earlier quickstart is kept as {FOLDER.rename(earlier)}")
    library = build(flags.rows, flags.others)

    settings = json.loads(Path(flags.config).read_text())
    model, stores, batch = settings["model_path"], settings["train_data_path"], settings["train_batch_size"]
    folders = f"--tokenizer_path {model} --input_dir {FOLDER}/training_data --output_dir {stores}"
    run(f"python tokenize_data_qwen.py {folders} --max_seq_length 512")
    run(f"python run.py --config {flags.config} --cache_only true")
    processes = 2 ** min(3, available_cores().bit_length() - 1)  # changes the time, not the result
    launch = f"accelerate launch --config_file configs/accelerate_cpu.yaml --num_processes {processes}"
    overrides = shlex.join(overrides)
    train = f"{launch} run.py --config {flags.config} --train_batch_size {batch // processes} {overrides}"
    run(train.strip(), {"ACCELERATE_USE_CPU": "true"})

    output = Path(settings["output_dir"]) / settings["experiment_id"]
    trained = max([*output.glob("epoch_*"), *output.glob("step_*")], key=lambda path: path.stat().st_mtime)
    show_search(library, Path(settings["model_path"]), trained, settings["max_seq_length"])
    print(f"\nmodel folder: {trained}\nplot of loss and learning rate: {plot(output)}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes in all")
    return 0


def build(rows: int, others: int) -> list[Function]:
    """Make raw tuples and a backbone in FOLDER; returns the held-out functions, those of the standard library."""
    title("raw tuples from the Python functions on this machine")
    library = corpus.distinct(corpus.standard_library_functions())
    functions = corpus.distinct(corpus.installed_functions(), library)
    packages = len({function.package for function in functions})
    print(f"{len(functions):,} documented functions of {packages} installed packages, to train on")
    print(f"{len(library):,} of the standard library, held out", flush=True)
    tuples.write_tuples(functions, FOLDER / "training_data", rows, others)
    texts = [text for function in functions for text in (function.query, function.passage)]
    backbone.make_backbone(FOLDER / "models" / "tiny-qwen3", texts, vocab_size=16384, hidden_size=128, layers=1)
    return library


def show_search(library: list[Function], untrained: Path, trained: Path, max_length: int) -> None:
    """Print how well both models and BM25 find functions by their docstrings, and what QUERIES find in the library."""
    functions = random.Random(0).sample(library, min(EVALUATED, len(library)))
    title(f"search in {len(functions):,} functions of the standard library that training never saw")
    passages = [function.passage for function in functions]
    queries = [tuples.instruct(tuples.SEARCH, function.query) for function in functions]
    rows = {}
    for name, folder in {"untrained backbone": untrained, "trained": trained}.items():
        vectors = (embed(folder, texts, max_length) for texts in (queries, passages))
        rows[name] = metrics(top(*vectors, k=10))
    rows["BM25"] = metrics(BM25(passages).search([f.query for f in functions], 10))
    print(table(rows))
    title(f"what the trained model finds in all {len(library):,} of them")
    asked = embed(trained, [tuples.instruct(tuples.SEARCH, query) for query in QUERIES], max_length)
    answers = top(asked, embed(trained, [f.passage for f in library], max_length), k=3)
    for query, best in zip(QUERIES, answers, strict=True):
        print(query)
        for rank, function in enumerate((library[i] for i in best), start=1):
            print(f"  {rank}. {f'{function.module}.{function.name}':44}  {function.query[:70]}")


def run(command: str, environment: dict[str, str] | None = None) -> None:
    """Show a command as a user would type it, and run it with this Python."""
    environment = environment or {}
    print("\n$", *(f"{key}={value}" for key, value in environment.items()), command, flush=True)
    words = shlex.split(command)
    program = ["-m", "accelerate.commands.launch", *words[2:]] if words[0] == "accelerate" else words[1:]
    subprocess.run([sys.executable, *program], check=True, env=os.environ | environment)


def title(text: str) -> None:
    """A line that begins a step."""
    print(f"\n# {text}", flush=True)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Name -> metric -> value as an aligned table."""
    names = list(next(iter(rows.values())))
    lines = [f"{'':20}" + "".join(f"{name:>11}" for name in names)]
    return "\n".join(
        lines + [f"{row:20}" + "".join(f"{values[name]:11.3f}" for name in names) for row, values in rows.items()]
    )


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


if __name__ == "__main__":
    sys.exit(main())
