"""Hard negatives for one file of tuples: read, encode, index, search, choose, write; on one or many processes.

Processes work together through files in a folder that all of them see: each computes its share of what is missing, and
looks into the folder until the others have written theirs. A kill therefore loses only unfinished files, and the next
run, on any number of processes, continues with what is there. The first process does what cannot be shared.

    texts-DIGEST/      what was read                              tuples/mining/texts.py
    vectors-DIGEST/    of the passages, of the queries            retrieval/vectors.py
    index-DIGEST       FAISS's                                    retrieval/faiss_index.py
    blocks-DIGEST/     negatives of the queries, block by block   tuples/mining/blocks.py

DIGEST is one of everything that the content depends on, so a change of input or settings never finds old results.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from modeling.prompts import carries_instruction, split_prompt
from retrieval.encoders import open_encoder
from retrieval.faiss_index import FaissIndex, build
from retrieval.rescore import Cosines, CrossEncoderScores
from retrieval.search import BM25, groups_of_some, search
from retrieval.vectors import VectorFolder, Vectors
from tuples.mining import texts as mining_texts
from tuples.mining.blocks import BlockFolder, Find, Miner, Positives, Scorer, groups_of
from tuples.mining.rules import Rules
from tuples.mining.texts import Inputs, MiningTexts, TextFile
from utils import RunError, file_digest, hide_bar_unless, remove, short_digest

FORMAT = 1  # part of every digest; raised where what is computed changes, so that nothing old is found
_SECONDS = 0.1  # until the first look at what another process works on
_MOST_SECONDS = 3.0  # between two looks: each opens all shards


@dataclass(frozen=True)
class Share:
    """Which of `world` processes this is."""

    rank: int = 0
    world: int = 1

    def of(self, work: list) -> list:
        """This process's part of a list."""
        return work[self.rank :: self.world]

    @property
    def is_first(self) -> bool:
        """Whether this process does what cannot be shared."""
        return self.rank == 0


@dataclass(frozen=True)
class Model:
    """An embedding model, and how it is given texts."""

    folder: Path
    max_length: int | None = None
    bf16: bool = False
    query_prompt: str = ""  # before queries that carry no instruction
    corpus_prompt: str = ""
    strip_instruction: bool = False  # from all texts, for models that were trained without
    dtype: str = "float32"  # of the vectors on the disk

    def query(self, text: str) -> str:
        """A query as the model reads it."""
        text = self.bare(text)
        return text if carries_instruction(text) else self.query_prompt + text

    def passage(self, text: str) -> str:
        """A passage as the model reads it."""
        return self.corpus_prompt + self.bare(text)

    def bare(self, text: str) -> str:
        """A text as it is, or without its instruction where `strip_instruction` asks for that."""
        return split_prompt(text)[1] if self.strip_instruction else text


@dataclass(frozen=True)
class Plan:
    """How to search and to choose."""

    backend: str  # exact, faiss, bm25
    rules: Rules
    model: Model | None = None  # BM25 needs none
    cross_encoder: Path | None = None
    fill: bool = False  # whether random passages fill up rows with too few negatives
    index: str = "flat"  # a kind of retrieval.faiss_index
    lists: int = 0
    code_bytes: int = 0
    probes: int = 0


def digest_of(*facts) -> str:
    """16 hex digits for facts that JSON can hold."""
    return short_digest(json.dumps([FORMAT, *facts], sort_keys=True, default=str))


def model_digest(folder: Path) -> str:
    """Changes with every file of a model folder, whatever it is called and wherever it lies."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return digest_of([(str(path.relative_to(folder)), file_digest(path)) for path in files])


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for what other processes write. If one of them fails, its launcher ends this process too."""
    seconds = _SECONDS
    while not done():
        time.sleep(seconds)
        seconds = min(1.5 * seconds, _MOST_SECONDS)


class Mining:
    """One mining, in a folder that all processes see.

    Args:
        work: the folder.
        inputs: what to read.
        plan: what to do with it.
        device: where models and products are computed.
        say: called with lines for people, by the first process.
    """

    def __init__(self, work: Path, inputs: Inputs, plan: Plan, share: Share, device: str, say: Callable[[str], None]):
        self.work = work
        self.inputs = inputs
        self.plan = plan
        self.share = share
        self.device = device
        self.say = say if share.is_first else lambda line: None
        self.texts = self._read()
        self.encoder = cache(self._open_encoder)  # opened when a vector is missing, once
        if plan.model is not None:
            self.model_digest = model_digest(plan.model.folder)
            facts = [asdict(plan.model) | {"folder": ""}, self.model_digest, self.texts.meta["digest"]]
            folder = work / f"vectors-{digest_of(*facts)}"
            passages, queries = len(self.texts.passages), len(self.texts.queries)
            self.passage_folder = VectorFolder(folder / "passages", passages, plan.model.dtype)
            self.query_folder = VectorFolder(folder / "queries", queries)
        self.blocks = BlockFolder(work / f"blocks-{self._digest()}", len(self.texts.queries))

    def _read(self) -> MiningTexts:
        """Read the input, or open what an earlier run read."""
        inputs = self.inputs
        files = [inputs.tuples, *[path for path, _ in inputs.corpora]]
        facts = [inputs.columns.names, inputs.slots, inputs.instruction, inputs.group_column]
        facts.append([column for _, column in inputs.corpora])
        self.texts_folder = self.work / f"texts-{digest_of(facts, [file_digest(path) for path in files])}"
        if self.share.is_first and not self.texts_folder.exists():
            mining_texts.write(self.texts_folder, inputs)
        wait_until(self.texts_folder.exists)
        return mining_texts.open_texts(self.texts_folder)

    def _digest(self) -> str:
        """Of everything that the negatives depend on."""
        plan = self.plan
        arrays = (self.texts.rows, self.texts.topics, self.texts.groups)
        texts = [self.texts.meta["digest"], *[hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]]
        facts = [plan.backend, asdict(plan.rules), plan.fill]
        if plan.model is not None:
            facts += [asdict(plan.model) | {"folder": ""}, self.model_digest]
        if plan.backend == "faiss":
            facts += [plan.index, plan.lists, plan.code_bytes, plan.probes]
        if plan.cross_encoder is not None:
            facts.append(model_digest(plan.cross_encoder))
        return digest_of(texts, facts)

    def forget(self) -> None:
        """Remove what this mining wrote into its folder, and the folder where it is empty then."""
        remove(self.texts_folder)
        remove(self.blocks.folder)
        if self.plan.model is not None:
            remove(self.passage_folder.folder.parent)
        if not any(self.work.iterdir()):
            self.work.rmdir()

    # ------------------------------------------------------------------------------------- vectors

    def encode(self) -> None:
        """Compute the vectors that are missing."""
        if self.plan.model is None:
            return
        model = self.plan.model
        self._encode(self.passage_folder, self.texts.passages, model.passage, "encoding passages")
        self._encode(self.query_folder, self.texts.queries, model.query, "encoding queries")
        wait_until(lambda: not self.passage_folder.missing() and not self.query_folder.missing())

    def _encode(self, folder: VectorFolder, texts: TextFile, as_read: Callable[[str], str], what: str) -> None:
        """This process's share of the shards of a folder that are missing when it looks."""
        missing = set(folder.missing())
        mine = [shard for shard in self.share.of(list(range(folder.shards))) if shard in missing]
        done = folder.shards - len(missing)
        if done and missing:
            self.say(f"{what}: {done} of {folder.shards} shards are already there")
        for shard in self._bar(mine, what, "shard"):
            begin, end = folder.bounds(shard)
            vectors, cut = self.encoder().encode([as_read(texts.get(number)) for number in range(begin, end)])
            check_finite(vectors, begin)
            folder.write(shard, vectors, cut)

    def _open_encoder(self):
        model = self.plan.model
        encoder = open_encoder(model.folder, model.max_length, model.bf16, self.device)
        self.say(f"{model.folder}: {encoder.description}")
        return encoder

    def _bar(self, work: list, what: str, unit: str) -> tqdm:
        return tqdm(work, desc=what, unit=unit, disable=hide_bar_unless(self.share.is_first))

    # -------------------------------------------------------------------------------------- search

    def index(self) -> None:
        """Build FAISS's index, where one is asked for and missing."""
        plan = self.plan
        if plan.backend != "faiss":
            return
        path = self._index_path()
        if self.share.is_first and not path.exists():
            build(path, self.passage_folder.open(), plan.index, plan.lists, plan.code_bytes)
        wait_until(path.exists)

    def _index_path(self) -> Path:
        plan = self.plan
        return self.passage_folder.folder.with_name(f"index-{digest_of(plan.index, plan.lists, plan.code_bytes)}")

    def mine(self) -> None:
        """Mine the blocks that are missing, and wait for those of the others."""
        if self.share.is_first:
            self.blocks.remove_damaged()
        missing = set(self.blocks.missing())
        mine = [block for block in self.share.of(list(range(self.blocks.count))) if block in missing]
        if mine:
            miner = self.miner()
            for block in self._bar(mine, "mining", "block"):
                self.blocks.write(block, miner.mine(self.blocks.numbers(block)))
        if self.share.is_first:  # the others are not needed any more
            wait_until(lambda: not self.blocks.missing())

    def miner(self) -> Miner:
        """Put together what mines a block."""
        plan = self.plan
        return Miner(
            texts=self.texts,
            positives=Positives(self.texts),
            groups=groups_of(self.texts),
            rules=plan.rules,
            find=self.finder(),
            scorer=self._scorer(),
            rescore=plan.cross_encoder is not None or plan.backend == "faiss" or self._is_lexical_with_model(),
            fill=plan.fill,
        )

    def _is_lexical_with_model(self) -> bool:
        return self.plan.backend == "bm25" and self.plan.model is not None

    def _scorer(self) -> Scorer | None:
        if self.plan.cross_encoder is not None:
            bare = self.plan.model.bare if self.plan.model else str
            return CrossEncoderScores(
                self.plan.cross_encoder,
                lambda number: bare(self.texts.queries.get(number)),
                lambda number: bare(self.texts.passages.get(number)),
                self.device,
            )
        if self.plan.model is not None:
            return Cosines(self.query_folder.open(), self.passage_folder.open())
        return None

    def finder(self) -> Find:
        """The search of the plan's backend."""
        if self.plan.backend == "bm25":
            return self._lexical()
        queries = self.query_folder.open()
        if self.plan.backend == "faiss":
            return self._by_index(queries)
        return self.exact(queries)

    def exact(self, queries: Vectors) -> Find:
        """Search by comparing all with all."""
        passages = self.passage_folder.open()
        groups = groups_of(self.texts)

        def find(numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            own = groups_of_some(groups, numbers)
            found = search(queries.take(numbers), passages, k, self.device, own)
            return np.where(np.isfinite(found.scores), found.passages, -1), found.scores

        return find

    def _by_index(self, queries: Vectors) -> Find:
        index = FaissIndex(self._index_path(), self.plan.probes)
        self.say(f"FAISS {self.plan.index}: {index.description}")

        def find(numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            found = index.search(queries.take(numbers), k)
            return found, np.zeros(found.shape, np.float32)  # scored anew

        return find

    def _lexical(self) -> Find:
        texts = self.texts
        passages = [split_prompt(texts.passages.get(number))[1] for number in range(len(texts.passages))]
        try:
            index = BM25(passages)
        except ValueError as error:
            raise RunError(str(error)) from None
        groups = groups_of(texts)

        def find(numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            own = groups_of_some(groups, numbers)
            queries = [split_prompt(texts.queries.get(number))[1] for number in numbers]
            found = index.rank(queries, k, own)
            return np.where(found.scores > 0, found.passages, -1), found.scores  # 0: no word in common

        return find


def check_finite(vectors: np.ndarray, begin: int) -> None:
    """Raise RunError if a text has no vector of numbers; `begin` is the number of the first."""
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise RunError(f"text {begin + broken[0]} has a vector that is not finite: the model's weights are damaged")
