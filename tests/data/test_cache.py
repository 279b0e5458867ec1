"""The warm-up: published layouts become the same stores, once, and what is damaged or half-written is refused.

python -m pytest tests/data/test_cache.py
"""

import json
import multiprocessing
import os
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy
from conftest import tokenize

from data import cache, published_layouts
from data.feed import describe
from data.token_store import open_store

NAME = "toy_retrieval"


def ids_of(store, i: int) -> list[int]:
    return store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()


def rows_of(store) -> list[list[list[int] | None]]:
    """Tuples as token ids, whatever the texts are numbered."""
    return [[ids_of(store, i) if i >= 0 else None for i in row] for row in store.tuples]


def columns(count: int) -> list[str]:
    return ["query_input_ids", "passage_input_ids", *(f"negative_{k}_input_ids" for k in range(1, count - 1))]


def write_v1(folder, store, name=NAME):
    """The published v1 layout: ids in the rows, and the raw texts beside them."""
    rows = rows_of(store)
    table = dict(zip(columns(len(rows[0])), map(list, zip(*rows, strict=True)), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | {"query": ["text"] * len(rows)}), folder / f"{name}.parquet")


def write_v2(folder, store, name=NAME, corpus="corpus.parquet", row_group_size=100):
    """The published v2 layout: document ids in the rows, documents in a corpus of all datasets together."""
    table = {"query_input_ids": [ids_of(store, i) for i in store.tuples[:, 0]]}
    for column, numbers in zip(columns(store.tuples.shape[1])[1:], store.tuples[:, 1:].T, strict=True):
        table[column] = [f"{name}_{i}" if i >= 0 else None for i in numbers]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / f"{name}_query.parquet")
    documents = np.unique(store.tuples[:, 1:])
    ids = [f"other_{i}" for i in range(250)] + [f"{name}_{i}" for i in documents[documents >= 0]]
    texts = [[1, store.eos]] * 250 + [ids_of(store, i) for i in documents[documents >= 0]]
    pq.write_table(pa.table({"doc_id": ids, "input_ids": texts}), folder / corpus, row_group_size=row_group_size)


@pytest.fixture
def store(toy_world):
    return open_store(toy_world.stores / NAME)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tasks.json").write_text(json.dumps({NAME: "retrieval"}))
    return tmp_path / "data"


@pytest.mark.parametrize("layout", ["v1", "v2 with corpus.parquet", "v2 with a corpus of its own"])
def test_published_layouts_hold_the_same_tuples(folder, tmp_path, store, layout):
    if layout == "v1":
        write_v1(folder, store)
    else:
        write_v2(folder, store, corpus="corpus.parquet" if "corpus.parquet" in layout else f"{NAME}_corpus.parquet")
    news = []
    (converted,), problems = cache.prepare(folder, tmp_path / "cache", news.append)
    assert problems == []
    assert rows_of(converted) == rows_of(store)
    assert (converted.name, converted.task, converted.eos) == (NAME, "retrieval", store.eos)
    assert converted.meta["texts"] == store.meta["texts"]  # each text once
    assert [line.split()[0] for line in news] == ["converted", "verified"]

    (again,), _ = cache.prepare(folder, tmp_path / "cache", lambda line: pytest.fail(line))  # found, not built
    assert again.folder == converted.folder


def test_missing_negatives_survive_the_conversion(folder, tmp_path, store):
    gappy = type("Store", (), {"tokens": store.tokens, "offsets": store.offsets, "eos": store.eos})
    gappy.tuples = store.tuples[:10, :6].copy()
    gappy.tuples[3, 4] = gappy.tuples[5, 2:] = -1
    write_v1(folder, gappy)
    assert rows_of(cache.prepare(folder, tmp_path / "cache")[0][0]) == rows_of(gappy)
    (folder / f"{NAME}.parquet").unlink()
    write_v2(folder, gappy)
    assert rows_of(cache.prepare(folder, tmp_path / "cache")[0][0]) == rows_of(gappy)


def test_only_row_groups_that_can_hold_a_document_are_read(folder, tmp_path, store, monkeypatch):
    write_v2(folder, store)
    read = []
    iterate = pq.ParquetFile.iter_batches

    def spy(self, *args, row_groups=None, **kwargs):
        read.append(row_groups)
        return iterate(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert cache.prepare(folder, tmp_path / "cache")[1] == []
    groups = [groups[0] for groups in read if groups]
    assert 0 not in groups  # "other_..." alone
    assert 1 not in groups
    assert len(groups) > 2


def test_stores_are_used_where_they_are_and_verified_once(toy_world, tmp_path):
    news = []
    stores, problems = cache.prepare(toy_world.stores, tmp_path / "cache", news.append)
    assert problems == []
    assert [store.name for store in stores] == ["toy_classification", "toy_clustering", "toy_retrieval"]
    assert all(store.folder.parent == toy_world.stores for store in stores)
    assert len(news) == 3
    cache.prepare(toy_world.stores, tmp_path / "cache", lambda line: pytest.fail(line))


@pytest.fixture(scope="module")
def many(toy_world, tmp_path_factory):
    """A folder of twelve stores, set_00 with 3 tuples to set_11 with 14."""
    raw = toy.write_many(tmp_path_factory.mktemp("many") / "raw", 12)
    assert tokenize(raw, raw.parent / "stores", toy_world.backbone) == 0
    return raw.parent / "stores"


def test_many_datasets_are_prepared_with_one_line_about_all(many, tmp_path, capsys):
    news = []
    stores, problems = cache.prepare(many, tmp_path / "cache", news.append)
    assert (len(stores), problems) == (12, [])
    (line,) = news
    assert line.startswith("verified 12 datasets; in all 12 datasets, ")
    cache.prepare(many, tmp_path / "cache", lambda line: pytest.fail(line))
    for store in stores:
        write_v1(tmp_path / "published", store, store.name)
    (tmp_path / "published" / "tasks.json").write_text(json.dumps({store.name: "retrieval" for store in stores}))
    cache.prepare(tmp_path / "published", tmp_path / "cache", news.append)
    assert news[1:] == [news[-1]]
    assert news[1].startswith("converted 12 datasets and verified 12 datasets; in all 12 datasets, ")
    assert capsys.readouterr() == ("", "")


def test_of_many_datasets_the_largest_are_described_and_a_file_lists_all(many, tmp_path):
    stores, _ = cache.prepare(many, tmp_path / "cache", lambda _: None)
    summary, *shown, rest = describe(stores)
    assert summary.startswith("data ready: 12 datasets, 102 tuples, ")
    assert [line.split()[0] for line in shown] == [f"set_{number:02}" for number in range(11, 1, -1)]
    assert rest == "  and 2 more"
    listing = tmp_path / "cache" / "datasets.txt"
    assert describe(stores, listing)[-1] == f"  and 2 more, in {listing}"
    assert [line.split()[0] for line in listing.read_text().splitlines()] == [store.name for store in stores]
    assert set(shown) <= set(listing.read_text().splitlines())
    listing.unlink()
    assert [line.split()[0] for line in describe(stores[:10], listing)[1:]] == [store.name for store in stores[:10]]
    assert not listing.exists()


def test_more_stores_are_opened_than_a_system_first_allows_files(many, tmp_path):
    """A limit of 1,024 files, which most systems begin with, was full at 341 stores."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
    try:
        early, _ = cache.open_unverified(many)
        stores, problems = cache.prepare(many, tmp_path / "cache", lambda _: None)
        assert len(os.listdir("/proc/self/fd")) > used + 30
    finally:
        del early
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (len(stores), problems) == (12, [])


def test_the_report_of_the_tokenising_command_is_no_dataset(many, tmp_path):
    (many / "report.txt").write_text("set_00 ...")
    assert len(cache.prepare(many, tmp_path / "cache", lambda _: None)[0]) == 12


def prepare_in_a_process(folder, cache_dir, queue):
    news = []
    stores, problems = cache.prepare(folder, cache_dir, news.append)
    queue.put((len(stores), problems, len(news)))


def test_processes_of_a_node_build_once(folder, tmp_path, store):
    write_v1(folder, store)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=prepare_in_a_process, args=(folder, tmp_path / "cache", queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert found == [(1, [], 0), (1, [], 0), (1, [], 2)]  # one converted and verified, the others waited


def problems_of(folder, tmp_path) -> str:
    stores, problems = cache.prepare(folder, tmp_path / "cache")
    assert stores == []
    return "\n".join(problems)


def test_everything_wrong_with_a_folder_is_said_at_once(folder, tmp_path, store):
    toy.write_parquet(folder / "raw.parquet", toy.raw_rows(3, 1))
    (folder / "garbage.parquet").write_bytes(b"no Parquet")
    (folder / "lines.jsonl").write_text("{}")
    (folder / "packed.JSONL.gz").write_text("{}")
    (folder / ".half.partial").mkdir()
    write_v2(folder, store, name="lonely")
    (folder / "corpus.parquet").unlink()
    write_v2(folder, store, name="odd", corpus="odd_corpus.parquet")
    pq.write_table(pa.table({"id": ["a"]}), folder / "odd_corpus.parquet")
    found = problems_of(folder, tmp_path)
    for line in (
        "raw.parquet: no query_input_ids and passage_input_ids in it: if these are raw texts, tokenise them first",
        "garbage.parquet: ",
        "lines.jsonl: raw texts",
        "packed.JSONL.gz: raw texts",
        ".half.partial: half-written store",
        "odd_corpus.parquet has no columns doc_id and input_ids",
        "lonely_query.parquet: its documents are missing: neither corpus.parquet nor lonely_corpus.parquet",
    ):
        assert line in found, line
    assert not (tmp_path / "cache" / "stores").exists()


def test_an_empty_folder(tmp_path):
    (tmp_path / "data").mkdir()
    assert "no dataset in it" in problems_of(tmp_path / "data", tmp_path)


def test_an_unknown_dataset_says_how_to_declare_it(folder, tmp_path, store):
    write_v1(folder, store, name="unheard_of")
    found = problems_of(folder, tmp_path)
    assert "no task is known for 'unheard_of'" in found
    assert '{"unheard_of": "retrieval"}' in found
    assert "tasks.json" in found


def test_a_missing_document_is_named(folder, tmp_path, store):
    write_v2(folder, store)
    corpus = pq.read_table(folder / "corpus.parquet")
    victim = f"{NAME}_{store.tuples[7, 1]}"
    kept = [doc != victim for doc in corpus["doc_id"].to_pylist()]
    pq.write_table(corpus.filter(pa.array(kept)), folder / "corpus.parquet")
    found = problems_of(folder, tmp_path)
    assert f"passage_input_ids: document {victim!r} is not in {folder / 'corpus.parquet'}" in found


def test_texts_that_end_differently_are_refused(folder, tmp_path, store):
    pq.write_table(pa.table({"query_input_ids": [[1, 2]], "passage_input_ids": [[1, 3]]}), folder / f"{NAME}.parquet")
    assert "texts end in 2 different token ids" in problems_of(folder, tmp_path)
    pq.write_table(pa.table({"query_input_ids": [[1, 2]], "passage_input_ids": [[]]}), folder / f"{NAME}.parquet")
    assert "row 0: an empty or null query or positive" in problems_of(folder, tmp_path)


def test_a_damaged_store_is_found_and_stays_found(toy_world, tmp_path, store):
    target = tmp_path / "data" / NAME
    target.mkdir(parents=True)
    for path in store.folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    assert cache.prepare(tmp_path / "data", tmp_path / "cache")[1] == []
    data = bytearray((target / "tokens.npy").read_bytes())
    data[-5] ^= 4
    (target / "tokens.npy").write_bytes(data)
    for _ in range(2):
        assert "tokens.npy: checksum differs" in problems_of(tmp_path / "data", tmp_path)
    (target / "meta.json").unlink()
    assert "half of a store" in problems_of(tmp_path / "data", tmp_path)


def test_a_document_twice_is_one_text_and_twice_different_is_refused(folder, tmp_path, store):
    write_v2(folder, store)
    corpus = pq.read_table(folder / "corpus.parquet")
    pq.write_table(pa.concat_tables([corpus, corpus.slice(260, 20)]), folder / "corpus.parquet", row_group_size=90)
    (converted,), problems = cache.prepare(folder, tmp_path / "cache")
    assert problems == []
    assert rows_of(converted) == rows_of(store)
    assert converted.meta["texts"] == store.meta["texts"]
    other = corpus.slice(260, 1).set_column(1, "input_ids", pa.array([[7, store.eos]]))
    pq.write_table(pa.concat_tables([corpus, other]), folder / "corpus.parquet")
    assert "occurs twice in it, with different ids" in problems_of(folder, tmp_path)


def test_other_arrow_types_of_the_same_data_are_read(folder, tmp_path, store):
    write_v2(folder, store)
    table, corpus = (pq.read_table(folder / f"{name}.parquet") for name in (f"{NAME}_query", "corpus"))
    table = table.set_column(1, "passage_input_ids", table["passage_input_ids"].cast(pa.large_string()))
    table = table.set_column(2, "negative_1_input_ids", table["negative_1_input_ids"].dictionary_encode())
    table = table.append_column("negative_25_input_ids", pa.nulls(len(table)))
    ids = corpus["input_ids"].cast(pa.large_list(pa.int64()))
    pq.write_table(table, folder / f"{NAME}_query.parquet")
    pq.write_table(corpus.set_column(1, "input_ids", ids), folder / "corpus.parquet")
    (converted,), problems = cache.prepare(folder, tmp_path / "cache")
    assert problems == []
    assert [row[:-1] for row in rows_of(converted)] == rows_of(store)
    assert (converted.tuples[:, -1] == -1).all()


def test_a_declared_task_is_part_of_what_a_conversion_is(folder, tmp_path, store):
    write_v1(folder, store)
    assert cache.prepare(folder, tmp_path / "cache")[0][0].task == "retrieval"
    (folder / "tasks.json").write_text(json.dumps({NAME: "clustering"}))
    assert cache.prepare(folder, tmp_path / "cache")[0][0].task == "clustering"


def test_a_damaged_page_is_a_problem_with_a_name(folder, tmp_path, store):
    write_v1(folder, store)
    path = folder / f"{NAME}.parquet"
    data = bytearray(path.read_bytes())
    data[100:4000] = bytes(3900)
    path.write_bytes(data)
    assert f"{path}: cannot be read" in problems_of(folder, tmp_path)


def test_an_interrupted_conversion_continues_to_the_same_bytes(folder, tmp_path, store, monkeypatch):
    write_v2(folder, store)
    monkeypatch.setattr(published_layouts, "BATCH_ROWS", 40)
    monkeypatch.setattr(published_layouts, "COMMIT_ROWS", 40)
    (whole,), _ = cache.prepare(folder, tmp_path / "whole")
    add, calls = published_layouts.StoreWriter.add_tuples, []

    def dies_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(published_layouts.StoreWriter, "add_tuples", dies_at_the_third)
        cache.prepare(folder, tmp_path / "cache")
    read = []
    documents = published_layouts._add_documents
    monkeypatch.setattr(published_layouts, "_add_documents", lambda *a: read.append(1) or documents(*a))
    (again,), _ = cache.prepare(folder, tmp_path / "cache")
    assert read == []  # the documents had been committed
    for name in ("tokens.npy", "offsets.npy", "tuples.npy", "meta.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
