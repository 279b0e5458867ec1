"""Search and its measures, on numbers small enough for paper.

python -m pytest tests/retrieval/test_retrieval.py
"""

import math

import numpy as np
import pytest

from retrieval.metrics import metrics
from retrieval.search import top


def test_metrics_by_hand():
    # Query 0 finds its passage first, query 1 third, query 2 not among the best ten.
    found = np.array([[0, *range(20, 29)], [7, 8, 1, *range(20, 27)], [*range(20, 30)]])
    assert metrics(found) == {
        "nDCG@10": pytest.approx((1 + 1 / math.log2(4)) / 3),
        "MRR@10": pytest.approx((1 + 1 / 3) / 3),
        "recall@10": pytest.approx(2 / 3),
    }


def test_top_is_sorted_by_cosine():
    queries, passages = np.random.default_rng(0).normal(size=(2, 30, 8))
    assert np.array_equal(top(queries, passages, 5), np.argsort(-(queries @ passages.T), axis=1)[:, :5])
