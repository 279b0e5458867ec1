"""A search task to train on and to be measured by: pairs, backbone, files that training reads, the score of a model.

    code         docstring -> Python function: installed packages to train on, the standard library held out
    packages     summary -> description of Debian packages (benchmarks/packages.py), one family in ten held out

Everything is written below a folder once and then kept, so that all rows of a benchmark have the same data.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from benchmarks import packages
from benchmarks.measured_rows import model_digest, short_digest
from benchmarks.pairs import Pair, bm25_negatives, random_negatives, with_instruction, write_raw
from benchmarks.training_commands import mine_by_command, tokenize
from examples.code_search import corpus, tuples
from examples.models import minilm, smollm2
from retrieval.encode import encode
from retrieval.metrics import score
from retrieval.search import BM25, search, unit_rows
from utils import RunError, write_json

NAMES = ("code", "packages")
PREFIXES = (8, 16, 32, 64, 128, 256)  # and the whole width
BY_MODEL = ("minilm", "trained")  # ways of mining that embed all texts first


@dataclass(frozen=True)
class Task:
    """The pairs of a search task, and the folder that holds all that is made of them."""

    folder: Path
    digest: str  # names instruction and pairs, so that rows measured on others are told apart
    instruction: str
    training: list[Pair]
    held_out: list[Pair]

    @property
    def minilm(self) -> Path:
        """Where all-MiniLM-L6-v2 is unpacked."""
        return self.folder.parent.parent / "models" / "minilm"

    def evaluated(self, count: int, for_trials: bool = False) -> list[Pair]:
        """Held-out pairs to be measured by, drawn once. Those of trials are others where there are enough.

        A learning rate chosen by the very pairs that it is measured by would look better than it is.
        """
        drawn = random.Random(0).sample(self.held_out, len(self.held_out))
        if for_trials and len(drawn) >= 2 * count:
            return drawn[count : 2 * count]
        return drawn[:count]


@dataclass(frozen=True)
class Variant:
    """One way to make training tuples of the pairs."""

    mining: str = "none"  # none, bm25, random, minilm, or trained: by a model that was trained on the same pairs
    negatives: int = 0  # of each tuple
    task: str = "retrieval"  # "clustering" trains with the hard negatives' loss alone
    instructed: bool = True

    @property
    def name(self) -> str:
        """Its folder's name."""
        words = [f"{self.mining}{self.negatives}", self.task]
        if not self.instructed:
            words.append("no-instruction")
        return "-".join(words)


def prepare(name: str, folder: Path, pairs: int, lists: Path = packages.LISTS) -> Task:
    """The task of this name; what an earlier call wrote below `folder` is read back.

    The folder of what is made of the pairs has their digest in its name: pairs that were made anew never meet the
    tuples of the old ones.

    Args:
        pairs: to train on at most, drawn at random.
        lists: apt's folder, for "packages".

    Raises:
        RunError: the data are not on this machine, or the earlier call read them from another folder.
    """
    path = folder / name / f"pairs-{pairs}.json"
    source = source_of(name, lists)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            instruction, training, held_out = read_pairs(name, lists)
            training = random.Random(0).sample(training, min(pairs, len(training)))
            content = {
                "source": source,
                "instruction": instruction,
                "training": [asdict(pair) for pair in training],
                "held_out": [asdict(pair) for pair in held_out],
            }
            write_json(path, content, indent=0)
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.pop("source", "an unknown source")
    if found != source:
        raise RunError(f"{path}: made of {found}, not of {source}; give another --folder, or remove the file")
    training = [Pair(**pair) for pair in content["training"]]
    held_out = [Pair(**pair) for pair in content["held_out"]]
    digest = short_digest(content)
    return Task(path.with_name(f"{path.stem}-{digest}"), digest, content["instruction"], training, held_out)


def source_of(name: str, lists: Path) -> str:
    """Where a task's pairs are read."""
    if name == "packages":
        return f"packages of {lists.resolve()}"
    return name


def read_pairs(name: str, lists: Path) -> tuple[str, list[Pair], list[Pair]]:
    """(instruction, pairs to train on, held-out pairs) of this machine."""
    if name == "packages":
        return packages.INSTRUCTION, *packages.package_pairs(lists)
    library = corpus.distinct(corpus.standard_library_functions())
    installed = corpus.distinct(corpus.installed_functions(), library)
    return tuples.SEARCH, pairs_of_functions(installed), pairs_of_functions(library)


def pairs_of_functions(functions: list[corpus.Function]) -> list[Pair]:
    """Functions of one name are copies or overrides of each other, so they make a group."""
    return [Pair(function.query, function.passage, function.own_name) for function in functions if function.passage]


def backbone(flags: argparse.Namespace) -> Path:
    """The folder of the backbone; made where none was given.

    Raises:
        RunError: it cannot be had.
    """
    folder = backbone_folder(flags)
    if flags.model is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            smollm2.make_backbone(folder, flags.layers)
    return folder


def backbone_folder(flags: argparse.Namespace) -> Path:
    """Where the backbone is, or will be."""
    if flags.model is not None:
        return flags.model
    return flags.folder / "models" / f"smollm2-{flags.layers}-layers"


def raw_file(task: Task, variant: Variant, miner: Path | None = None) -> Path:
    """The variant's raw Parquet file, written at the first call.

    Args:
        miner: the model folder that finds the negatives, where the variant's are found by a model.
    """
    path = task.folder / "raw" / folder_name(variant, miner) / "search.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(task.folder / f"{variant.name}.lock"):
        if not path.exists() and variant.mining in BY_MODEL:
            mine_by_model(task, variant, miner, path)
        elif not path.exists():
            instruction = task.instruction if variant.instructed else ""
            whole = path.with_suffix(".partial")
            write_raw(whole, task.training, mine(task, variant), instruction)
            whole.rename(path)
    return path


def folder_name(variant: Variant, miner: Path | None) -> str:
    """Of what is made for a variant: what one trained model mined is not another's."""
    if variant.mining == "trained":
        return f"{variant.name}-{miner.name}"
    return variant.name


def token_stores(
    task: Task, variant: Variant, model: Path, max_seq_length: int, threads: int, miner: Path | None = None
) -> Path:
    """The folder of token stores that the tokenising command makes of a variant. `miner`: see `raw_file`."""
    raw = raw_file(task, variant, miner)
    name = folder_name(variant, miner)
    stores = task.folder / f"tokens-{model.name}-{model_digest(model)}-{max_seq_length}" / name
    with FileLock(task.folder / f"{variant.name}.lock"):
        tokenize(raw, stores, model, max_seq_length, variant.task, threads)  # what is done is not done again
    return stores


def mine(task: Task, variant: Variant) -> list[list[str]]:
    """For each training pair its negatives, where no model is needed to find them."""
    if variant.mining == "none":
        return [[] for _ in task.training]
    if variant.mining == "random":
        return random_negatives(task.training, variant.negatives)
    return bm25_negatives(task.training, variant.negatives)


def mine_by_model(task: Task, variant: Variant, miner: Path, path: Path) -> None:
    """Write the raw tuples whose negatives a model finds, by the mining command with the published rules.

    Passages of a query's own group are none, and random ones fill up, as with the other ways of mining. MiniLM never
    saw an instruction, and reads queries without.
    """
    queries = task.folder / "pairs.parquet"
    with FileLock(f"{queries}.lock"):
        if not queries.exists():
            whole = queries.with_suffix(".partial")
            write_raw(whole, task.training, mine(task, Variant()), task.instruction, with_group=True)
            whole.rename(queries)
    rules = ["--num_negatives", str(variant.negatives), "--too_few", "random", "--group_column", "group"]
    if variant.mining == "minilm":
        rules += ["--strip_instruction", "true"]
    mine_by_command(queries, path, miner, rules)


def evaluate(folder: Path, pairs: list[Pair], instruction: str, max_seq_length: int, bf16: bool) -> dict:
    """How well a model folder finds each pair's passage among all of them.

    Args:
        bf16: embed in bf16 under autocast, as all systems train then; cosines are computed in fp32.

    Returns:
        metric -> value, and "prefixes": number of first dimensions -> nDCG@10.
    """
    texts = with_instruction(instruction, pairs) + [pair.passage for pair in pairs]
    vectors = encode(folder, texts, max_seq_length, bf16)  # [2n, d]
    queries, passages = np.split(vectors, 2)  # [n, d] both
    width = queries.shape[1]
    scores = score(search(queries, passages, k=10).passages)
    scores["prefixes"] = {}
    for dim in (*[dim for dim in PREFIXES if dim < width], width):
        found = search(unit_rows(queries[:, :dim]), unit_rows(passages[:, :dim]), k=10)
        scores["prefixes"][str(dim)] = score(found.passages)["nDCG@10"]
    return scores


def evaluate_bm25(pairs: list[Pair]) -> dict[str, float]:
    """How well BM25 finds the passages by their words."""
    index = BM25([pair.passage for pair in pairs])
    return score(index.search([pair.query for pair in pairs], k=10).passages)


def evaluate_minilm(pairs: list[Pair], folder: Path) -> dict[str, float]:
    """How well all-MiniLM-L6-v2 finds them, without instruction, as it was trained.

    Args:
        folder: where the model is unpacked.

    Raises:
        RunError: its package, or Sentence Transformers, is not installed.
    """
    queries = minilm_vectors([pair.query for pair in pairs], folder)
    passages = minilm_vectors([pair.passage for pair in pairs], folder)
    return score(search(queries, passages, k=10).passages)


def minilm_vectors(texts: list[str], folder: Path) -> np.ndarray:
    """Unit vectors by all-MiniLM-L6-v2, fp32 [n, 384]."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name("minilm.lock")):
        minilm.unpack(folder)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise RunError("all-MiniLM-L6-v2 needs the package: pip install sentence-transformers") from None
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
