"""Steps and tokens that an inspection foretells are those that a training makes.

python -m pytest tests/tuples/test_inspection_training.py
"""

import numpy as np
import pytest

from arguments import Args
from configuration.dataset_settings import DatasetSettings
from data.cache import open_unverified
from data.feed import Feed
from data.token_store import TASKS
from training.recipes import recipes_for
from training.setup import lay_out_steps
from tuples.inspection_training import Recipe, forecast, tokens_of_first_epoch


def recipe_of(args: Args, processes: int, **more) -> Recipe:
    return Recipe(
        global_batch=args.train_batch_size * processes,
        max_length=args.max_seq_length,
        negatives={task: args.negatives_for(task) for task in TASKS},
        epochs=args.train_epochs,
        steps=args.train_steps,
        seed=args.seed,
        **more,
    )


@pytest.mark.parametrize(("batch", "processes", "epochs", "steps"), [(8, 1, 2, -1), (5, 3, 1, -1), (16, 1, 9, 7)])
def test_a_training_makes_the_steps_and_reads_the_tokens(toy_world, settings, batch, processes, epochs, steps):
    stores, _ = open_unverified(toy_world.stores)
    keys = {"train_batch_size": batch, "train_epochs": epochs, "train_steps": steps, "max_seq_length": 40, "seed": 4}
    args = Args(**settings | keys)
    recipes = recipes_for(args, stores, DatasetSettings())
    plan, schedule = lay_out_steps(args, stores, recipes, processes)
    recipe = recipe_of(args, processes, tokens_per_second=100.0)
    tokens = [tokens_of_first_epoch(store.tuples, np.diff(store.offsets), store.task, recipe) for store in stores]
    found = forecast([len(store.tuples) for store in stores], tokens, recipe)
    assert (found.steps, found.steps_per_epoch) == (schedule.steps, plan.steps_per_epoch)
    assert found.epochs == schedule.steps / plan.steps_per_epoch

    feed = Feed(stores, [one.negatives for one in recipes], plan, [one.max_length for one in recipes])
    read = 0
    for step in range(1, plan.steps_per_epoch + 1):
        _, one = feed.training(step)
        read += int(one.lengths[one.index.numpy()].sum())  # of the tuples' texts, also where one stands twice
    assert found.tokens_per_epoch == sum(tokens) == read > 5000
    assert found.tokens == round(read * found.epochs)
    assert found.seconds == found.tokens / 100


def test_without_lengths_in_tokens_only_steps_are_foretold():
    recipe = Recipe(4, 64, {}, epochs=2, steps=-1, seed=0, tokens_per_second=9.0)
    found = forecast([10, 1], [None, 50], recipe)
    assert (found.steps_per_epoch, found.steps) == (3 + 1, 8)  # nine of ten train, one is held out; of one, that one
    assert (found.tokens_per_epoch, found.tokens, found.seconds) == (None, None, None)
