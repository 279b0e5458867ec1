"""Validation measures each Matryoshka prefix as the cut embeddings do, and the full width as before.

python -m pytest tests/training/test_measures.py
"""

import numpy as np
import pytest
import torch
import toy
from conftest import read_metrics, tokenize, train_here
from harness import door_on_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.feed import Feed
from data.plan import Plan
from data.token_store import open_store
from losses import matryoshka_weights
from training.objective import MEASURES, Objective

TEMPERATURE = 0.05


@pytest.fixture(scope="module")
def stores(toy_world, tmp_path_factory):
    """Three held-out tuples with missing negatives, so that one of two processes has two of them."""
    root = tmp_path_factory.mktemp("measured")
    raw = toy.write_gappy(root / "raw", {"retrieval": 310, "clustering": 120}, negatives=3)
    assert tokenize(raw, root / "stores", toy_world.backbone) == 0
    return root / "stores"


def cosine(a, b) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def naively(batch, embeddings: np.ndarray, dim: int) -> dict[str, float]:
    """All measures of the first `dim` dimensions, by loops over tuples; [texts, d] embeddings of the tuples' texts."""
    cut = embeddings[:, :dim]
    rows, slots = batch.mask.shape
    queries, positives = cut[:rows], cut[rows : 2 * rows]
    existing = iter(cut[2 * rows :])
    in_batch, hard, ranks = [], [], []
    for i in range(rows):
        own = cosine(queries[i], positives[i])
        others = [cosine(queries[i], next(existing)) for k in range(slots) if batch.mask[i, k]]
        logits = np.array([own, *others]) / TEMPERATURE
        hard.append(np.log(np.exp(logits).sum()) - logits[0])
        all_logits = np.array([cosine(queries[i], positive) for positive in positives]) / TEMPERATURE
        in_batch.append(np.log(np.exp(all_logits).sum()) - all_logits[i])
        if others:
            ranks.append(1 + sum(other >= own for other in others))
    return {
        "in_batch": np.mean(in_batch),
        "hard": np.mean(hard),
        "group_accuracy": np.mean([rank == 1 for rank in ranks]),
        "group_mrr": np.mean([1 / rank for rank in ranks]),
    }


def test_each_prefix_measures_what_the_cut_embeddings_do(stores):
    store = open_store(stores / "retrieval")
    _, batch = Feed([store], [3], Plan((300,), 40, 0), [64]).training(1)
    assert {int(count) for count in batch.mask.sum(dim=1)} == {0, 1, 2, 3}
    torch.manual_seed(0)
    embeddings = torch.randn(len(batch.lengths), 32, dtype=torch.float64)
    goal = Objective(TEMPERATURE, matryoshka_weights(32))
    found = goal.measures_by_width(batch, embeddings, True)
    of_texts = batch.spread(embeddings).numpy()
    for dim in (8, 16, 32):
        expected = naively(batch, of_texts, dim)
        for kind in MEASURES:
            value, rows = found[kind if dim == 32 else f"{kind}@{dim}"]
            assert value.item() == pytest.approx(expected[kind], rel=1e-10)
            assert rows == (40 if kind in ("in_batch", "hard") else int(batch.mask.any(dim=1).sum()))
    assert len({found[f"in_batch{at}"][0].item() for at in ("", "@8", "@16")}) == 3
    assert set(found) == set(goal.measured)


@pytest.mark.parametrize("retrieval", [True, False])
def test_the_full_width_is_as_before_and_without_matryoshka_nothing_is_added(stores, retrieval):
    store = open_store(stores / "retrieval")
    _, batch = Feed([store], [3], Plan((300,), 40, 0), [64]).training(1)
    embeddings = torch.randn(len(batch.lengths), 32)
    plain = Objective(TEMPERATURE, {32: 1.0})
    before = plain.measures(batch, embeddings, retrieval)
    assert plain.measures_by_width(batch, embeddings, retrieval) == before
    assert plain.measured == list(MEASURES)
    by_width = Objective(TEMPERATURE, matryoshka_weights(32)).measures_by_width(batch, embeddings, retrieval)
    for kind, (value, rows) in before.items():
        assert by_width[kind] == (value, rows)
    assert len(by_width) == 3 * len(before)


def configuration(toy_world, stores, folder, processes: int, **changes) -> dict:
    return {
        "model_path": str(toy_world.backbone), "experiment_id": "measured", "output_dir": str(folder / "output"),
        "tb_dir": str(folder / "tb"), "cache_dir": str(folder / "cache"), "train_data_path": str(stores),
        "train_batch_size": 16 // processes, "max_seq_length": 64, "num_hard_neg": 3, "train_steps": 1,
        "learning_rate": 1e-30, "min_lr": 0.0, "warmup_steps": 0, "report_to": "none", "use_mrl": True,
        "max_tokens_per_forward": 0, "gradient_checkpointing": False, "checkpointing_steps": 0, "validation_steps": 1,
    } | changes  # fmt: skip


def test_a_run_writes_them_beside_the_full_width_and_its_line_stays(toy_world, stores, tmp_path, capsys):
    config = configuration(toy_world, stores, tmp_path, 1, report_to="tensorboard")
    folder = train_here(config)
    line = next(line for line in capsys.readouterr().out.splitlines() if "| validation |" in line)
    assert "@" not in line
    (by_width,) = read_metrics(folder, "validation")
    plain = train_here(config | {"use_mrl": False, "experiment_id": "plain"})
    assert line in capsys.readouterr().out  # of the same weights, to the digit
    (without,) = read_metrics(plain, "validation")
    for name, values in without["measures"].items():
        found = by_width["measures"][name]
        assert {kind: found[kind] for kind in values} == values
        expected = {*values, *(f"{kind}@{dim}" for kind in values for dim in (8, 16))}
        assert set(found) == expected
    events = EventAccumulator(str(tmp_path / "tb" / "measured")).Reload()
    tags = {"retrieval/valid_loss_in_batch@8", "retrieval/valid_group_mrr@16", "Avg/clustering/valid_loss_hard@8"}
    assert tags | {"retrieval/valid_loss_in_batch"} <= set(events.Tags()["scalars"])


@pytest.mark.processes
def test_two_processes_measure_what_one_does(toy_world, stores, tmp_path):
    alone = train_here(configuration(toy_world, stores, tmp_path / "one", 1))
    together = configuration(toy_world, stores, tmp_path / "two", 2)
    assert [end.status for end in door_on_processes(2, together)] == [0, 0]
    (expected,) = read_metrics(alone, "validation")
    (found,) = read_metrics(tmp_path / "two" / "output" / "measured", "validation")
    assert len(expected["measures"]["retrieval"]) == 12
    for name, values in expected["measures"].items():
        assert found["measures"][name] == pytest.approx(values, rel=1e-5)
