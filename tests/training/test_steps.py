"""How many steps a run has, and where its learning rate ends.

python -m pytest tests/training/test_steps.py
"""

import math
from types import SimpleNamespace

import pytest

from arguments import Args
from training.setup import lay_out_steps


@pytest.mark.parametrize(("train_steps", "steps"), [(-1, 20), (7, 7), (20, 20), (30, 20)])
def test_a_run_and_its_cosine_end_with_train_steps_or_train_epochs_whichever_comes_first(train_steps, steps):
    stores = [SimpleNamespace(tuples=range(101))]  # of which 100 are trained on: 10 steps an epoch
    recipes = [SimpleNamespace(sampling_weight=1.0)]
    keys = {"train_batch_size": 5, "train_epochs": 2, "train_steps": train_steps, "warmup_steps": 0, "min_lr": 0.0}
    args = Args("m", "x", "o", "t", "d", "c", learning_rate=1.0, **keys)
    plan, schedule = lay_out_steps(args, stores, recipes, processes=2)
    assert (plan.steps_per_epoch, schedule.steps) == (10, steps)
    assert schedule.rate(steps) == pytest.approx(0.5 * (1 + math.cos(math.pi * (steps - 1) / steps)))
