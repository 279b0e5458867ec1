"""Numbers worked out by hand from the reports' equations, on inputs small enough for paper.

python -m pytest tests/test_parity.py
"""

import math

import pytest
import torch
from transformers import get_scheduler

from losses import distillation_loss, hard_negative_loss, in_batch_loss, matryoshka_weights, over_prefixes
from training.schedule import Schedule

T = 0.05


def test_hard_negative_term():
    # q = (1, 0), d+ = (0.6, 0.8), n1 = (0.5, sqrt 0.75), n2 = (0, 1): all of length 1, so s(q, .) is the first
    # component: 0.6, 0.5, 0. Divided by 0.05: 12, 10, 0.
    # loss = -ln( e^12 / (e^12 + e^10 + e^0) ) = ln( 1 + e^-2 + e^-12 ) = 0.1269334...
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[[0.5, math.sqrt(0.75)], [0.0, 1.0]]])
    expected = math.log(1 + math.exp(-2) + math.exp(-12))
    assert hard_negative_loss(query, positive, negatives, T).item() == pytest.approx(expected, rel=1e-5)
    # Without the second negative its term leaves the sum.
    mask = torch.tensor([[True, False]])
    expected = math.log(1 + math.exp(-2))
    assert hard_negative_loss(query, positive, negatives, T, mask).item() == pytest.approx(expected, rel=1e-5)


def test_in_batch_term():
    # q1 = (1, 0), q2 = (0, 1), d1 = (0.6, 0.8), d2 = (0.8, 0.6). s(q1, d1) = 0.6, s(q1, d2) = 0.8; s(q2, d2) = 0.6,
    # s(q2, d1) = 0.8. Each query has its own at 12 and the other's at 16: loss = ln(1 + e^4) = 4.0181499...
    queries = torch.eye(2)
    positives = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    loss = in_batch_loss(queries, positives, torch.arange(2), T)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(4)), rel=1e-5)


def test_matryoshka_term():
    # Hidden size 16 has the prefixes 16 (weight 1) and 8 (weight 1 / (2 * sqrt(16 / 8)) = 0.3535534).
    # q = e1, d+ = (e1 + e9) / sqrt 2, n = e9, as unit vectors of length 16.
    # Full width: s(q, d+) = 1 / sqrt 2, s(q, n) = 0: loss = ln(1 + e^(-20 / sqrt 2)) = ln(1 + e^-14.142136).
    # Prefix 8: d+ becomes e1 / sqrt 2, normalised again e1, s = 1; n becomes 0, whose cosine is taken as 0:
    # loss = ln(1 + e^-20). Without normalising again it would be ln(1 + e^-14.14) once more.
    query, positive, negative = torch.zeros(1, 16), torch.zeros(1, 16), torch.zeros(1, 1, 16)
    query[0, 0] = 1
    positive[0, 0] = positive[0, 8] = 1
    negative[0, 0, 8] = 1
    inputs = [x.double() for x in (query, positive, negative)]
    expected = math.log1p(math.exp(-20 / math.sqrt(2))) + math.log1p(math.exp(-20)) / (2 * math.sqrt(2))
    found = over_prefixes(hard_negative_loss, matryoshka_weights(16), *inputs, temperature=T)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_distillation_term():
    # Student (1, 2) and (0, 0), teacher (1, 0, 9) and (3, 1, 9): the third dimension is not compared.
    # Squares: 0, 4, 9, 1; their mean over 2 * 2 elements: 14 / 4 = 3.5.
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0, 9.0], [3.0, 1.0, 9.0]])
    assert distillation_loss(student, teacher).item() == pytest.approx(3.5)


@pytest.mark.parametrize("kind", ["cosine", "constant_with_warmup"])
def test_schedule_is_the_published_one(kind):
    # The published loop: get_scheduler, and after each update a clamp from below at min_lr.
    schedule = Schedule(peak=1e-4, floor=1e-6, warmup=10, steps=100, constant=kind == "constant_with_warmup")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.peak)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(100):
        published = optimizer.param_groups[0]["lr"]
        expected = max(published, schedule.floor) if step == 0 else published  # the first update had a rate of 0
        assert schedule.rate(step + 1) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()
        optimizer.param_groups[0]["lr"] = max(optimizer.param_groups[0]["lr"], schedule.floor)
    assert schedule.rate(100) >= schedule.floor
