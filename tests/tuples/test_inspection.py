"""An inspection counts what a loop counts, and raw files and token stores of the same tuples give the same figures.

python -m pytest tests/tuples/test_inspection.py
"""

import json
import random

import numpy as np
import pytest
import toy
from conftest import tokenize
from hypothesis import given
from hypothesis import strategies as st
from published import write_published

from data.raw_rows import RawError
from data.token_store import open_store
from modeling.prompts import split_prompt
from modeling.tokenizer import load_tokenizer
from tuples.inspection import raw as inspection_raw
from tuples.inspection.checks import ROLES, Lengths, lengths_of
from tuples.inspection.evaluation import read_evaluation
from tuples.inspection.look import MAX_LENGTHS, Options, find, inspect, together
from tuples.inspection.picture import bin_edges, histogram
from tuples.inspection.raw import in_threads, number_equal
from tuples.inspection.rules import NAMES, RULES, read_limits
from tuples.inspection.texts import MISSING
from tuples.inspection.training import Course, Use

NUMBERS_ALONE = {"duplicate_queries", "duplicate_tuples", "positive_is_negative", "false_negatives"}


def options(folder, **changes) -> Options:
    """No tokenizer, no evaluation set, no limits, but for the `changes`."""
    folder.mkdir(exist_ok=True)
    defaults = {"tokenizer_path": None, "tokenizer": None, "evaluation": None, "course": None, "limits": {}}
    return Options(**defaults | {"workers": 2, "cache_dir": folder} | changes)


def with_tokenizer(toy_world) -> dict:
    return {"tokenizer_path": str(toy_world.backbone), "tokenizer": load_tokenizer(str(toy_world.backbone))[0]}


def inspect_at(path, used: Options, tasks: dict | None = None) -> dict:
    """Dataset -> its inspection."""
    sources, problems = find(path, tasks or {})
    assert problems == []
    return {source.name: inspect(source, used) for source in sources}


def few_words(rows: int, slots: int, seed: int) -> list[dict]:
    """Tuples of so few different texts that everything doubtful happens; some negatives are missing."""
    rng = random.Random(seed)
    texts = [
        "tree",
        "a tree",
        "a tree house",
        "Stone  wall",
        "stone wall",
        "River bank",
        "the river bank",
        "é",
        "x" * 70,
    ]
    table = []
    for number in range(rows):
        query = rng.choice(texts)
        if number % 3 == 0:
            query = f"Instruct: Find it.\nQuery: {query}"
        row = {"query": query, "passage": rng.choice(texts)}
        row |= {f"negative_{k + 1}": rng.choice([None, "", *texts]) for k in range(slots)}
        table.append(row)
    return table


def counted(rows: list[dict], limit: int) -> dict:
    """The same figures by a loop over texts, for tuples that all have a query and a positive."""
    found = dict.fromkeys((*NUMBERS_ALONE, "query_in_passage", "passage_in_query", "negatives", "longer"), 0)
    positives_of = {}
    for row in rows:
        positives_of.setdefault(row["query"], set()).add(row["passage"])
    queries, tuples, texts = set(), set(), set()
    for row in rows:
        query, positive = row["query"], row["passage"]
        negatives = [text for name, text in row.items() if name.startswith("negative") and text]
        others = [text for text in negatives if text != positive]
        found["duplicate_queries"] += query in queries
        found["duplicate_tuples"] += (query, positive) in tuples
        found["positive_is_negative"] += len(negatives) - len(others)
        found["false_negatives"] += sum(text in positives_of[query] for text in others)
        bare, passage = (" ".join(text.lower().split()) for text in (split_prompt(query)[1], positive))
        found["query_in_passage"] += bare in passage
        found["passage_in_query"] += passage in bare
        found["negatives"] += len(others)
        found["longer"] += sum(len(text) > limit for text in [query, positive, *others])
        queries.add(query)
        tuples.add((query, positive))
        texts |= {query, positive, *others}
    return found | {"texts": len(texts)}


# -------------------------------------------------------------------------------------- against a loop


@pytest.mark.parametrize(
    ("ending", "slots", "seed"), [(".parquet", 3, 0), (".jsonl", 2, 1), (".csv", 1, 2), (".tsv", 0, 3)]
)
def test_a_raw_file_is_counted_as_by_a_loop(tmp_path, monkeypatch, ending, slots, seed):
    monkeypatch.setattr(inspection_raw, "BATCH_ROWS", 7)  # repetitions lie in other batches
    rows = few_words(60, slots, seed)
    path = tmp_path / f"toy{ending}"
    if ending == ".parquet":
        toy.write_parquet(path, rows)
    elif ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        separator = "," if ending == ".csv" else "\t"
        pa_rows = [[f'"{text or ""}"' for text in row.values()] for row in rows]
        path.write_text("\n".join(separator.join(cells) for cells in [list(rows[0]), *pa_rows]))
    found = inspect_at(path, options(tmp_path / "cache"))["toy"]
    expected = counted(rows, limit=12)
    assert {name: found.found[name].count for name in expected if name in found.found} == {
        name: count for name, count in expected.items() if name in found.found
    }
    assert set(expected) - set(found.found) == {"negatives", "texts", "longer"}
    assert (found.tuples, found.texts, found.negatives) == (60, expected["texts"], expected["negatives"])
    assert sum(found.lengths[role].longer_than(12) for role in ROLES) == expected["longer"] > 0
    assert expected["duplicate_tuples"] > 0
    assert slots == 0 or min(expected[name] for name in NUMBERS_ALONE) > 0


def test_the_first_rows_are_named_as_they_stand_in_the_file(tmp_path):
    rows = [{"query": f"q{number}", "pos": ["p", f"p{number}"], "neg": ["n"] * (number % 3)} for number in range(6)]
    rows[4]["query"] = "q1"
    rows.insert(2, {"query": "", "pos": ["p"], "neg": []})
    lines = [json.dumps(row) for row in rows]
    lines.insert(1, "broken")
    (tmp_path / "toy.jsonl").write_text("\n".join(lines))
    found = inspect_at(tmp_path / "toy.jsonl", options(tmp_path / "cache"))["toy"].found
    assert found["unreadable_rows"].rows == (1,)
    assert (found["unreadable_rows"].count, found["unreadable_rows"].of) == (1, 8)
    assert found["empty_queries"].rows == (3,)
    # Each row is two tuples: the second of row 0 repeats its query, and both of row 6 repeat that of row 2.
    assert found["duplicate_queries"].rows == (0, 2, 4, 5, 6)
    assert found["duplicate_queries"].count == 5 + 2
    assert found["duplicate_tuples"].rows == (6,)


def test_threads_give_results_in_order_and_hold_few_at_a_time():
    taken = []

    def numbers():
        for number in range(50):
            taken.append(number)
            yield number

    for place, result in enumerate(in_threads(lambda number: number * 2, numbers(), workers=3)):
        assert result == 2 * place
        assert len(taken) <= place + 2 * 3 + 1
    assert len(taken) == 50


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), max_size=12))
def test_equal_keys_have_one_number_and_none_has_minus_one(keys):
    keys = np.array(keys, np.uint64).reshape(-1, 3)
    numbers, first = number_equal(keys)
    assert numbers.shape == keys.shape
    assert ((numbers == -1) == (keys == MISSING)).all()
    assert len(first) == len(set(keys.ravel().tolist()) - {MISSING})
    for number, place in enumerate(first):
        same = keys.ravel() == keys.ravel()[place]
        assert (numbers.ravel() == number).tolist() == same.tolist()
        assert place == np.argmax(same)


def test_lengths_are_exact_alone_and_together():
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, 30, 200), rng.integers(20, 60, 301)
    both = np.sort(np.concatenate([first, second]))
    found = lengths_of(first, np.ones(200)).plus(lengths_of(second, np.ones(301)))
    assert (found.count, found.total) == (501, both.sum())
    assert found.longer_than(25) == (both > 25).sum()
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        assert found.quantile(share) == np.quantile(both, share, method="inverted_cdf")
    times = rng.integers(0, 3, 200)
    repeated = np.repeat(first, times)
    assert lengths_of(first, times).total == repeated.sum()
    assert Lengths(np.zeros(0, int), np.zeros(0, int)).quantile(0.5) is None


# ----------------------------------------------------------------------------------- raw, store, published


@pytest.fixture(scope="module")
def three(tmp_path_factory, toy_world):
    """Tuples of few texts as raw files, as token stores, and as the published scripts tokenise them."""
    folder = tmp_path_factory.mktemp("three")
    for name, task, seed in (("few", "retrieval", 5), ("fewer", "clustering", 6), ("labels", "classification", 7)):
        rows = few_words(50, 3, seed)
        for row in rows:  # a negative that is not the positive, and that no other tuple has
            row["negative_4"] = f"{row['passage']} {row['query']}"
        if task == "retrieval":
            rows[7]["passage"] = toy.sentence(random.Random(1), "river", 300)  # cut at 128 tokens
        toy.write_parquet(folder / "raw" / f"{name}.parquet", rows)
    tasks = {"few": "retrieval", "fewer": "clustering", "labels": "classification"}
    for kind in ("raw", "v1", "v2"):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / "tasks.json").write_text(json.dumps(tasks))
    assert tokenize(folder / "raw", folder / "stores", toy_world.backbone) == 0
    for name in tasks:
        write_published(folder, open_store(folder / "stores" / name))
    return folder


USES = {"few": Use(2, 64), "fewer": Use(3, 64, weight=2.0), "labels": Use(1, 40), "toy": Use(0, 32)}
COURSE = Course(8, USES, epochs=2, steps=-1, seed=3)


@pytest.mark.parametrize("kind", ["stores", "v1", "v2"])
def test_raw_and_tokenised_data_give_the_same_figures(three, toy_world, tmp_path, kind):
    rows = [{"query": "a tree", "passage": "STONE wall"}]
    evaluation = read_evaluation(toy.write_parquet(tmp_path / "held_out.parquet", rows))
    used = options(tmp_path / "cache", evaluation=evaluation, course=COURSE, **with_tokenizer(toy_world))
    raw, other = (inspect_at(three / folder, used) for folder in ("raw", kind))
    assert list(raw) == list(other) == ["few", "fewer", "labels"]
    for name, from_raw in raw.items():
        tokenised = other[name]
        for fact in ("task", "tuples", "texts", "negatives", "slots", "unit"):
            assert getattr(from_raw, fact) == getattr(tokenised, fact), fact
        shared = set(from_raw.found) & set(tokenised.found)
        if kind != "stores":  # a published file does not know what was left out before it was written
            shared -= {"positive_is_negative"}
        assert len(shared) >= 8
        for rule in shared:
            ours, theirs = from_raw.found[rule], tokenised.found[rule]
            assert (ours.count, ours.of) == (theirs.count, theirs.of), (name, rule)
            assert rule == "positive_is_negative" or ours.rows == theirs.rows
        assert from_raw.tokens == tokenised.tokens > 1000
        same_truncation(from_raw, tokenised, knows_the_cut=kind == "stores")
    assert raw["few"].found["evaluation_queries"].count > 0
    assert raw["few"].found["evaluation_passages"].count > 0
    assert raw["labels"].found["label_in_query"].count > 0


def same_truncation(raw, tokenised, knows_the_cut: bool) -> None:
    """Shares of longer texts are the same wherever the store can know them, which is said by the lengths."""
    was_cut = raw.lengths["texts"].longer_than(128) > 0
    for limit in MAX_LENGTHS:
        for role in ("texts", *ROLES):
            known = tokenised.truncated[limit][role]
            counts_the_cut = knows_the_cut and limit == 128 and role == "texts"
            if knows_the_cut and (limit < 128 or not was_cut or counts_the_cut):
                assert known is not None
            if known is not None:
                assert (known.count, known.of) == (raw.truncated[limit][role].count, raw.truncated[limit][role].of)
            else:
                assert limit >= 128 or not knows_the_cut


def test_one_store_and_one_published_file_are_inspected_alone(three, tmp_path):
    used = options(tmp_path / "cache")
    whole = inspect_at(three / "stores", used)["few"]
    alone = inspect_at(three / "stores" / "few", used)["few"]
    published = inspect_at(three / "v2" / "few_query.parquet", used)["few"]
    assert alone.found == whole.found
    assert (alone.kind, published.kind) == ("store", "published")
    assert whole.tuples == alone.tuples == published.tuples
    assert whole.texts == alone.texts == published.texts


def test_without_a_tokenizer_nothing_is_said_that_only_texts_can_tell(three, tmp_path):
    raw, store = (inspect_at(three / kind, options(tmp_path / "cache"))["few"] for kind in ("raw", "stores"))
    assert raw.unit == "characters"
    assert set(store.found) == NUMBERS_ALONE | {"empty_queries", "empty_positives"}
    assert {known for by_role in raw.truncated.values() for known in by_role.values()} == {None}
    assert raw.tokens is None


def test_the_sum_is_that_of_all_datasets(three, tmp_path, toy_world):
    found = list(
        inspect_at(three / "raw", options(tmp_path / "cache", course=COURSE, **with_tokenizer(toy_world))).values()
    )
    total = together(found, three / "raw")
    assert total.tuples == sum(one.tuples for one in found) == 150
    assert total.lengths["queries"].count == 150
    assert total.lengths["texts"].total == sum(one.lengths["texts"].total for one in found)
    assert total.tokens == sum(one.tokens for one in found)
    assert total.found["false_negatives"].count == sum(one.found["false_negatives"].count for one in found)
    assert total.found["label_in_query"].of == 50  # of classification alone
    assert total.found["query_in_passage"].of == 100
    assert total.truncated[64]["texts"].count == sum(one.truncated[64]["texts"].count for one in found) > 0
    assert total.broken == []


# ------------------------------------------------------------------------------------------------- rules


def plain_rows(count: int) -> list[dict]:
    return [{"query": f"query {n}", "passage": f"passage {n}", "negative_1": f"wrong {n}"} for n in range(count)]


def spoil(rule: str, row: dict, first: dict) -> str | None:
    """Make one of the rows break a rule; a text in place of the row where it cannot be read."""
    changes = {
        "empty_queries": {"query": " "},
        "empty_positives": {"passage": None},
        "instruction_only": {"query": "Instruct: Find it.\nQuery: "},
        "duplicate_queries": {"query": first["query"]},
        "duplicate_tuples": {"query": first["query"], "passage": first["passage"]},
        "positive_is_negative": {"negative_1": row["passage"]},
        "false_negatives": {"query": first["query"], "negative_1": first["passage"]},
        "without_negatives": {"negative_1": None},
        "query_in_passage": {"passage": f"It says {row['query'].upper()}."},
        "passage_in_query": {"query": f"which  {row['passage']}"},
        "label_in_query": {"query": f"this is {row['passage']}"},
        "evaluation_queries": {"query": "Instruct: Find it.\nQuery: KEPT  for later"},
        "evaluation_passages": {"passage": "The answer to it"},
        "truncated": {"query": "word " * 40, "passage": "word " * 50, "negative_1": "word " * 60},
    }
    if rule == "unreadable_rows":
        return "{broken"
    row.update(changes[rule])
    return None


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_broken_just_above_its_limit(tmp_path, toy_world, rule):
    held_out = [{"query": "kept for later", "passage": "the answer to it"}]
    used = {"evaluation": read_evaluation(toy.write_parquet(tmp_path / "held_out.parquet", held_out))}
    used |= {"course": COURSE, "limits": dict.fromkeys(NAMES, 1.0)}
    used |= with_tokenizer(toy_world)
    bad, rows = 3, plain_rows(20)
    lines = [json.dumps(row) for row in rows]
    for number in (4, 9, 16):
        lines[number] = spoil(rule.name, rows[number], rows[0]) or json.dumps(rows[number])
    path = tmp_path / "toy.jsonl"
    path.write_text("\n".join(lines))
    task = {"toy": rule.tasks[0]}

    def broken(limit: float) -> list:
        limits = used["limits"] | {rule.name: limit}
        return inspect_at(path, options(tmp_path / "cache", **used | {"limits": limits}), task)["toy"].broken

    share = bad / 20  # three of twenty tuples, each with one negative, three texts
    assert broken(share) == []
    (only,) = broken(share - 0.0001)
    assert (only.rule, only.limit) == (rule, share - 0.0001)
    assert only.found.share == share
    assert only.found.rows == (() if rule.name == "truncated" else (4, 9, 16))


def test_clean_data_break_no_rule_and_defaults_are_strict(tmp_path):
    path = toy.write_parquet(tmp_path / "toy.parquet", plain_rows(100))
    assert inspect_at(path, options(tmp_path / "cache"))["toy"].broken == []
    rows = plain_rows(100)
    rows[3]["query"] = rows[5]["query"] = "query 0"
    rows[3]["negative_1"] = "passage 5"
    broken = inspect_at(toy.write_parquet(path, rows), options(tmp_path / "cache"))["toy"].broken
    assert [one.rule.name for one in broken] == ["false_negatives"]  # two repeated queries of 100 are allowed


def test_limits_are_read_and_wrong_ones_named():
    assert read_limits(["empty_queries=0.5", "truncated=1"]) == ({"empty_queries": 0.5, "truncated": 1.0}, [])
    _, problems = read_limits(["empty=0", "truncated", "truncated=2", "truncated=x", "truncated=nan"])
    assert [word for word, _ in problems] == ["empty=0", "truncated", "truncated=2", "truncated=x", "truncated=nan"]
    assert "no rule is called 'empty'" in problems[0][1]


def test_tuples_that_lose_their_only_negative_have_none(tmp_path):
    rows = plain_rows(10)
    rows[2]["negative_1"] = rows[2]["passage"]
    rows[6]["negative_1"] = None
    path = toy.write_parquet(tmp_path / "toy.parquet", rows)
    found = inspect_at(path, options(tmp_path / "cache"), {"toy": "clustering"})["toy"]
    assert (found.found["without_negatives"].count, found.found["without_negatives"].of) == (2, 10)
    assert found.found["without_negatives"].rows == (2, 6)
    assert (found.tuples, found.file_rows) == (9, 10)  # the first of them is a bad row, which tokenising refuses


# --------------------------------------------------------------------------------------------- bad input


def test_a_file_without_a_row_to_read_is_refused(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_text("broken\nbroken\n")
    with pytest.raises(RawError, match="row 0"):
        inspect_at(path, options(tmp_path / "cache"))


def test_what_cannot_be_inspected_is_named(tmp_path, three, toy_world):
    def problem(path) -> str:
        sources, problems = find(path, {})
        assert sources == []
        return "\n".join(problems)

    assert "no such file or folder" in problem(tmp_path / "nothing")
    assert "no dataset in it" in problem(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    assert "nor a token store" in problem(tmp_path / "notes.txt")
    assert "holds documents and no queries" in problem(three / "v2" / "few_corpus.parquet")
    (tmp_path / "few").symlink_to(three / "stores" / "few")
    toy.write_parquet(tmp_path / "raw.parquet", plain_rows(3))
    assert "would count twice" in problem(tmp_path)


def test_names_that_two_files_have_or_none_are_refused(tmp_path):
    for name in ("toy.jsonl", "toy.csv"):
        (tmp_path / name).write_text("")
    _, problems = find(tmp_path, {"tyo": "clustering"})
    assert "two files are called 'toy'" in problems[0]
    assert problems[1].startswith("--task tyo=clustering: no file is called tyo.parquet")


def test_a_file_of_bad_rows_alone_is_counted(tmp_path, toy_world):
    rows = [{"query": "", "passage": "p", "negative_1": "n"}, {"query": "q", "passage": None, "negative_1": "n"}]
    path = toy.write_parquet(tmp_path / "toy.parquet", rows)
    found = inspect_at(path, options(tmp_path / "cache", course=COURSE, **with_tokenizer(toy_world)))["toy"]
    assert (found.file_rows, found.tuples, found.texts, found.negatives, found.tokens) == (2, 0, 0, 0, 0)
    assert [broken.rule.name for broken in found.broken] == ["empty_queries", "empty_positives"]
    assert together([found, found], tmp_path).tuples == 0


def test_a_long_text_is_counted_whole(tmp_path):
    rows = plain_rows(3)
    rows[1]["passage"] = "é" * 10**6
    found = inspect_at(toy.write_parquet(tmp_path / "toy.parquet", rows), options(tmp_path / "cache"))["toy"]
    assert found.lengths["positives"].quantile(1) == 10**6
    assert found.broken == []


def test_a_histogram_loses_no_text():
    lengths = lengths_of(np.array([0, 1, 2, 3, 5, 90, 1000]), np.array([1, 1, 2, 1, 1, 1, 3]))
    for least, most in ((1, 1000), (1, 1), (7, 7)):
        edges = bin_edges(least, most)
        assert edges[0] == least
        assert edges[-1] == most + 1
        assert (np.diff(edges) > 0).all()
        assert histogram(lengths, edges).sum() == lengths.count == 10
    assert histogram(lengths, np.array([1, 2, 3, 1001])).tolist() == [2, 2, 6]  # 0 and 1, 2 and 2, the others
