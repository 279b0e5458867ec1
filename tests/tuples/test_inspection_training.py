"""Steps and tokens that an inspection foretells are those that a training makes.

python -m pytest tests/tuples/test_inspection_training.py
"""

import numpy as np
import pytest

from arguments import Args
from configuration.dataset_settings import DatasetSettings
from data.cache import open_unverified
from data.feed import Feed
from training.recipes import recipes_for
from training.steps import lay_out_steps
from tuples.inspection.training import Course, Use, forecast, tokens_of_first_pass

WEIGHTED = {"toy_clustering": {"sampling_weight": 2}, "toy_retrieval": {"num_hard_neg": 1, "max_length": 30}}


@pytest.mark.parametrize(("batch", "processes", "epochs", "steps"), [(8, 1, 2, -1), (5, 3, 1, -1), (16, 1, 9, 7)])
@pytest.mark.parametrize("entries", [{}, WEIGHTED], ids=["", "settings"])
def test_a_training_makes_the_steps_and_reads_the_tokens(toy_world, settings, batch, processes, epochs, steps, entries):
    stores, _ = open_unverified(toy_world.stores)
    keys = {"train_batch_size": batch, "train_epochs": epochs, "train_steps": steps, "max_seq_length": 40, "seed": 4}
    args = Args(**settings | keys)
    recipes = recipes_for(args, stores, DatasetSettings(entries=entries))
    plan, schedule = lay_out_steps(args, stores, recipes, processes)
    uses = {recipe.name: Use(recipe.negatives, recipe.max_length, recipe.sampling_weight) for recipe in recipes}
    course = Course(batch * processes, uses, epochs, steps, seed=4, tokens_per_second=100.0)
    tokens = {}
    for store in stores:
        lengths = np.diff(store.offsets)
        tokens[store.name] = tokens_of_first_pass(store.tuples, lengths, uses[store.name], seed=4)
    found = forecast({store.name: len(store.tuples) for store in stores}, tokens, course)
    assert (found.steps, found.steps_per_epoch) == (schedule.steps, plan.steps_per_epoch)
    assert found.epochs == schedule.steps / plan.steps_per_epoch

    feed = Feed(stores, [recipe.negatives for recipe in recipes], plan, [recipe.max_length for recipe in recipes])
    read = dict.fromkeys(tokens, 0)
    for step in range(1, plan.steps_per_epoch + 1):
        dataset, one = feed.training(step)
        if plan.step(step).epoch == 0:  # of a weighted dataset the first pass
            read[stores[dataset].name] += int(one.lengths[one.index.numpy()].sum())  # each time that a text stands
    assert tokens == read
    assert min(read.values()) > 300
    times = {name: 2 if entries and name == "toy_clustering" else 1 for name in read}
    assert found.tokens_per_epoch == sum(read[name] * times[name] for name in read)
    assert found.tokens == round(found.tokens_per_epoch * found.epochs)
    assert found.seconds == found.tokens / 100


def test_without_lengths_in_tokens_only_steps_are_foretold():
    uses = {"a": Use(1, 64), "b": Use(1, 64)}
    course = Course(4, uses, epochs=2, steps=-1, seed=0, tokens_per_second=9.0)
    found = forecast({"a": 10, "b": 1}, {"a": None, "b": 50}, course)
    assert (found.steps_per_epoch, found.steps) == (3 + 1, 8)  # nine of ten train, one is held out; of one, that one
    assert (found.tokens_per_epoch, found.tokens, found.seconds) == (None, None, None)
