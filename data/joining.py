"""The parts of a store joined: the bytes that one command would have written (tests/data/test_parts.py compares).

A text that several parts hold is kept where it came first, so texts have the numbers that one command would have given
them. What cannot be summed over parts, because a text would count twice, is counted again.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import token_store
from data.instructions import count_numbers, keep_most_frequent
from data.parts import SIDE_FILES, Part
from data.store_report import some
from data.store_writer import StoreWriter, is_done
from data.token_store import PARTS, StoreError, TokenStore
from utils import aside_of, file_digest, remove

_OF_A_PART = ("part", "rows", "rows_of_file")  # inputs of a part that a whole store does not have
_TEXTS = 65536  # joined at a time
_KEY_BYTES = 16


@dataclass(frozen=True)
class Join:
    """A store to be made of its parts."""

    folder: Path  # where it goes
    count: int  # of all parts, those included that have no row of it
    parts: list[TokenStore]  # in order; none if the store is there already

    def part_folders(self) -> list[Path]:
        """Where its parts may lie."""
        output_dir = self.folder.parent
        return [Part(number, self.count).folder(output_dir) / self.folder.name for number in range(1, self.count + 1)]


def plan_join(
    output_dir: Path, holders: list[int], count: int, name: str, expected: dict, overwrite: bool
) -> tuple[Join, list[str]]:
    """How a store is made of its parts, and every problem with that, one line each.

    Args:
        holders: numbers of the parts to which rows of the file fall.
        count: of all parts.
        expected: the inputs as the flags of the joining command make them, without the raw file's checksum.
        overwrite: replace a store made from other inputs.
    """
    folder = output_dir / name
    parts, problems = find_parts(Join(folder, count, []))
    if problems:
        return Join(folder, count, []), problems
    if not parts:
        return Join(folder, count, []), _problems_without_parts(folder, holders, count, expected)
    problems = part_problems(name, parts, expected, holders, count)
    done, folder_problems = is_done(folder, whole_inputs(parts[0]), overwrite)
    if done:
        parts = []
    return Join(folder, count, parts), problems + folder_problems


def _problems_without_parts(folder: Path, holders: list[int], count: int, expected: dict) -> list[str]:
    """That all parts are missing; no problem if the store that they would make already exists."""
    if folder.exists() and not token_store.quick_check(folder):
        inputs = token_store.open_store(folder).meta["inputs"]
        if inputs == expected | {"source_sha256": inputs.get("source_sha256")}:
            return []
    return [f"{folder.name}: all rows are missing; to be run first: {_commands(holders, count)}"]


def _commands(numbers: list[int], count: int) -> str:
    return some(f"--part {number}/{count}" for number in numbers)


def find_parts(join: Join) -> tuple[list[TokenStore], list[str]]:
    """The finished parts of a store, in order; and which of them cannot be opened, one line each."""
    parts = []
    problems = []
    for folder in join.part_folders():
        if not (folder / "meta.json").exists():
            continue  # not finished, or nothing of this file fell to it
        try:
            parts.append(token_store.open_store(folder))
        except StoreError as error:
            problems += str(error).splitlines()
    return parts, problems


def whole_inputs(part: TokenStore) -> dict:
    """The inputs of the store that a part is of."""
    return {name: value for name, value in part.meta["inputs"].items() if name not in _OF_A_PART}


def part_problems(name: str, parts: list[TokenStore], expected: dict, holders: list[int], count: int) -> list[str]:
    """Why these parts cannot be joined, one line each.

    Args:
        parts: of one store, in order; at least one.
        expected: as of `plan_join`.
        holders, count: as of `plan_join`.
    """
    problems = []
    for part in parts:
        inputs = whole_inputs(part)
        changes = []
        for key in {**expected, **inputs}:
            if key != "source_sha256" and inputs.get(key) != expected.get(key):
                changes.append(f"{key} {inputs.get(key)!r}, and here {expected.get(key)!r}")
        if changes:
            remedy = "join with the flags of the parts, or make the part again with --overwrite true"
            problems.append(f"{part.folder}: made with other flags ({'; '.join(changes)}): {remedy}")
    digests = {part.meta["inputs"]["source_sha256"] for part in parts}
    if len(digests) > 1:
        problems.append(f"{name}: the raw file changed between its parts: make them again, with --overwrite true")
    if not problems:
        problems += _missing_rows(name, parts, holders, count)
    if not problems and not any(part.meta["rows"] for part in parts):
        problems.append(f"{name}: no good row would be left")
    return problems


def _missing_rows(name: str, parts: list[TokenStore], holders: list[int], count: int) -> list[str]:
    """The rows of a file that no part has, one line for each gap."""
    whole = parts[0].meta["inputs"]["rows_of_file"]
    bounds = [part.meta["inputs"]["rows"] for part in parts] + [[whole, whole]]
    numbers = [int(part.meta["inputs"]["part"].partition("/")[0]) for part in parts] + [count + 1]
    problems = []
    reached = 0  # rows
    last = 0  # part
    for (begin, end), number in zip(bounds, numbers, strict=True):
        if begin != reached:
            lacking = _commands([holder for holder in holders if last < holder < number], count)
            problems.append(f"{name}: rows {reached:,} to {begin - 1:,} are missing; to be run first: {lacking}")
        reached = end
        last = number
    return problems


def join(plan: Join) -> None:
    """Write a store from all its parts; nothing if it already exists.

    Memory is that of one command: about 150 bytes a distinct text. A kill leaves the store whole or absent, and the
    parts as they are; the same command begins this store again.

    Raises:
        StoreError: a part is damaged.
    """
    parts = plan.parts
    if not parts:
        return
    problems = [line for part in parts for line in _damages(part)]
    if problems:
        raise StoreError("\n".join(problems))
    remove(aside_of(plan.folder))  # what an interrupted command without parts left there
    slots = max(part.meta["negatives"] for part in parts)  # of listed negatives each part has as many as it needs
    writer = StoreWriter(plan.folder, slots, whole_inputs(parts[0]))
    writer.stats.update(joined_stats(parts))
    total = sum(part.meta["texts"] for part in parts)
    with tqdm(total=total, desc=plan.folder.name, unit="text", disable=None, leave=False) as bar:
        for part in parts:
            _add_part(writer, part, bar)
    meta = {key: parts[0].meta[key] for key in ("name", "task", "max_seq_length", "eos_token_id", "tokenizer")}
    writer.finish(meta)


def joined_stats(parts: list[TokenStore]) -> dict:
    """What one command would have counted, but for "truncated", which is counted while texts are added.

    The keys are in that command's order, since meta.json is written in it and must have the same bytes.
    """
    stats = {}
    not_read = parts[0].meta["stats"].get("columns_not_read")
    if not_read:
        stats["columns_not_read"] = not_read
    stats["skipped"] = sum(part.meta["stats"]["skipped"] for part in parts)
    counts = [list(part.meta["stats"]["instructions"]["counts"]) for part in parts]
    numbers = [np.fromfile(part.folder / "queries", np.uint64) for part in parts]
    stats["instructions"] = count_numbers(counts, numbers)
    keep_most_frequent(stats)
    stats["truncated"] = 0
    stats["own"] = sum(part.meta["stats"]["own"] for part in parts)
    return stats


def _add_part(writer: StoreWriter, part: TokenStore, bar: tqdm) -> None:
    """Add a part's texts that no part before had, and all its tuples."""
    is_cut = np.fromfile(part.folder / "cut", np.uint8).astype(bool)  # [texts]
    numbers = np.empty(part.meta["texts"], np.int32)  # of the part's texts in the whole store
    with open(part.folder / "keys", "rb") as file:
        for begin in range(0, len(numbers), _TEXTS):
            end = min(begin + _TEXTS, len(numbers))
            content = file.read(_KEY_BYTES * (end - begin))
            keys = [content[at : at + _KEY_BYTES] for at in range(0, len(content), _KEY_BYTES)]
            is_new = np.array([key not in writer.numbers for key in keys])
            lengths = np.diff(part.offsets[begin : end + 1])
            tokens = part.tokens[part.offsets[begin] : part.offsets[end]][np.repeat(is_new, lengths)]
            new_keys = [key for key, new in zip(keys, is_new, strict=True) if new]
            writer.add_texts(new_keys, tokens, lengths[is_new], is_cut[begin:end][is_new])
            numbers[begin:end] = [writer.numbers[key] for key in keys]
            bar.update(end - begin)
    for begin in range(0, len(part.tuples), _TEXTS):
        tuples = np.array(part.tuples[begin : begin + _TEXTS])  # [rows, 2 + K of the part]
        exists = tuples >= 0
        tuples[exists] = numbers[tuples[exists]]
        missing = writer.negatives - part.meta["negatives"]
        writer.add_tuples(np.pad(tuples, ((0, 0), (0, missing)), constant_values=-1))


def _damages(part: TokenStore) -> list[str]:
    """What in a part is not as it was written, one line each."""
    paths = [part.folder / name for name in SIDE_FILES]
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(SIDE_FILES, pool.map(file_digest, paths), strict=True))
    if digests != part.meta["part_sha256"]:
        return [f"{part.folder}: was damaged or edited: delete it, and make this part again"]
    return token_store.deep_check(part)


def remove_parts(plan: Join) -> None:
    """Remove the parts of a store that was joined, and the folders in which nothing is left but a report."""
    for folder in plan.part_folders():
        remove(folder)
        _remove_empty(folder.parent)
    _remove_empty(plan.folder.parent / PARTS)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and all(path.name == "report.txt" for path in folder.iterdir()):
        remove(folder)
