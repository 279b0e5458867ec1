"""What the last model of each run finds for sample queries: of its own held-out tuples, or of a file of texts."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.plan import split_rows, split_sizes
from data.token_store import TASKS
from tools.reporting.read import RunLog, last_model, started_in
from tools.reporting.stores import Dataset
from utils import RunError, plural

POOL = 256  # texts that are searched at most: embedding them is what takes time
CHUNK = 32  # texts between two moves of the bar
FOUND = 3  # neighbours that are shown


@dataclass(frozen=True)
class Sample:
    """Queries and the texts that are searched for them."""

    words: str  # where they are from
    queries: list[str]
    passages: list[str]
    right: list[int | None]  # by query: which passage is its positive
    itself: list[int | None]  # by query: which passage is the query, and no neighbour of itself
    carry_prompts: bool  # texts stand as training saw them, with their instructions


@dataclass(frozen=True)
class Answers:
    """What one run's model finds, or why there is nothing."""

    run: int
    model: str = ""
    found: list[list[tuple[int, float]]] | None = None  # by query: (passage, cosine), the nearest first
    ranks: list[int | None] = field(default_factory=list)  # by query: at which place its positive comes, from 1
    reason: str = ""


def even(count: int, of: int) -> list[int]:
    """`count` numbers below `of`, or all of them where there are fewer, evenly from the first to the last.

    >>> even(3, 9), even(5, 2)
    ([0, 4, 8], [0, 1])
    """
    return sorted(set(np.linspace(0, of - 1, min(count, of)).astype(int).tolist()))


def sample_of_file(path: Path, count: int) -> Sample:
    """Lines of a file, each a text: `count` of them ask, all are searched.

    Raises:
        RunError: it cannot be read, or has fewer than two texts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"--texts {path}: cannot be read as UTF-8 text: {error}") from None
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(texts) < 2:
        raise RunError(f"--texts {path}: {plural(len(texts), 'text')}; a neighbour needs at least two, one a line")
    texts = [texts[place] for place in even(POOL, len(texts))]
    asking = even(count, len(texts))
    queries = [texts[place] for place in asking]
    return Sample(f"{plural(len(texts), 'text')} of {path.name}", queries, texts, [None] * len(asking), asking, False)


def sample_of_run(runs: list[RunLog], datasets: list[Dataset], count: int) -> Sample:
    """Held-out tuples of the first dataset, retrieval before other tasks: their queries, and all their positives.

    Raises:
        RunError: no run's token stores or tokenizer can be reached.
    """
    from modeling.tokenizer import load_tokenizer  # imports Transformers

    for dataset in sorted(datasets, key=lambda dataset: _place(dataset.task)):
        if dataset.store is None or split_sizes(len(dataset.store.tuples))[1] < 2:
            continue
        for folder in _tokenizer_folders(runs[dataset.run]):
            tokenizer, _ = load_tokenizer(str(folder))
            if tokenizer is not None:
                return _sample(dataset, tokenizer, count)
    raise RunError(
        "--neighbours: no run's held-out tuples can be read (its token stores, two held-out tuples in them, and a "
        "tokenizer): give texts by --texts FILE, one a line"
    )


def _place(task: str) -> int:
    return TASKS.index(task) if task in TASKS else len(TASKS)


def _tokenizer_folders(run: RunLog) -> list[Path]:
    folders = [last_model(run), started_in(run) / str(run.configuration.get("model_path", ""))]
    return [folder for folder in folders if folder is not None and (folder / "tokenizer.json").is_file()]


def _sample(dataset: Dataset, tokenizer, count: int) -> Sample:
    store = dataset.store
    _, held_out = split_sizes(len(store.tuples))
    rows = split_rows(np.array(even(POOL, held_out)), len(store.tuples), held_out=True)  # [n]
    pool = list(dict.fromkeys(store.tuples[rows, 1].tolist()))  # text numbers of the distinct positives
    asking = rows[even(count, len(rows))]  # [q]

    def text(number: int) -> str:
        ids = store.tokens[store.offsets[number] : store.offsets[number + 1]]
        return tokenizer.decode(ids, skip_special_tokens=True)

    queries = [text(number) for number in store.tuples[asking, 0]]
    right = [pool.index(positive) for positive in store.tuples[asking, 1].tolist()]
    words = f"{plural(len(pool), 'passage')} of {dataset.name}'s held-out tuples"
    return Sample(words, queries, [text(number) for number in pool], right, [None] * len(queries), True)


def answer(runs: list[RunLog], sample: Sample) -> list[Answers]:
    """What each run's last model finds; the models are loaded one after the other."""
    return [_answer(index, run, sample) for index, run in enumerate(runs)]


def _answer(index: int, run: RunLog, sample: Sample) -> Answers:
    folder = last_model(run)
    if folder is None:
        return Answers(index, reason="it has saved no model folder yet")
    from retrieval.encoders import open_encoder, prompts_of  # imports torch and Transformers

    length = run.configuration.get("max_seq_length")
    try:
        encoder = open_encoder(folder, length if isinstance(length, int) else None)
    except RunError as error:
        return Answers(index, folder.name, reason=str(error))
    query_prompt, passage_prompt = ("", "") if sample.carry_prompts else prompts_of(folder)
    queries = _encode(encoder, [query_prompt + text for text in sample.queries], run.name)  # [q, d]
    passages = _encode(encoder, [passage_prompt + text for text in sample.passages], run.name)  # [p, d]
    cosines = queries @ passages.T  # [q, p]
    return Answers(index, folder.name, nearest(cosines, sample.itself), ranks(cosines, sample.right))


def _encode(encoder, texts: list[str], name: str) -> np.ndarray:
    """Unit vectors fp32 [n, d]."""
    parts = []
    with tqdm(total=len(texts), desc=f"encoding with {name}", unit="text", disable=None) as bar:
        for begin in range(0, len(texts), CHUNK):
            vectors, _ = encoder.encode(texts[begin : begin + CHUNK])
            parts.append(vectors)
            bar.update(len(vectors))
    return np.concatenate(parts)


def nearest(cosines: np.ndarray, itself: list[int | None]) -> list[list[tuple[int, float]]]:
    """By query the FOUND passages of highest cosine, best first; of equal ones the first.

    Args:
        cosines: fp32 [q, p].
        itself: by query the passage that is left out.
    """
    found = []
    for row, own in zip(cosines, itself, strict=True):
        order = [place for place in np.argsort(-row, kind="stable").tolist() if place != own][:FOUND]
        found.append([(place, float(row[place])) for place in order])
    return found


def ranks(cosines: np.ndarray, right: list[int | None]) -> list[int | None]:
    """By query the place of its positive among all passages, 1 for the nearest; None if it has none.

    Args:
        cosines: fp32 [q, p].
        right: by query the number of its positive.
    """
    return [None if own is None else 1 + int((row > row[own]).sum()) for row, own in zip(cosines, right, strict=True)]
