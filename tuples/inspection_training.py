"""What training on the inspected data will take: steps, tokens, time. The numbers are those of data/plan.py.

Steps are the very number that run.py says. Tokens are those of the first epoch, counted and not estimated, with the
negatives that it draws; other epochs draw others. A text that several tuples of a step share is counted each time,
while training runs it once, so the true number may be a little lower.
"""

from dataclasses import dataclass

import numpy as np

from data.plan import Plan, choose_negatives, split_rows, split_sizes

_BLOCK = 2**16  # tuples looked at together


@dataclass(frozen=True)
class Recipe:
    """What of a training configuration decides about steps and tokens."""

    global_batch: int  # tuples of a step, over all processes
    max_length: int  # tokens of a text at most, EOS included
    negatives: dict[str, int]  # task -> hard negatives drawn per tuple
    epochs: int
    steps: int  # training stops after these at the latest; not positive = after its epochs
    seed: int
    tokens_per_second: float | None = None  # of all processes together


@dataclass(frozen=True)
class Forecast:
    """What a training will take; None where lengths in tokens, or the speed, are not known."""

    steps_per_epoch: int
    steps: int
    epochs: float
    tokens_per_epoch: int | None
    tokens: int | None
    seconds: float | None


def forecast(tuples: list[int], tokens: list[int | None], recipe: Recipe) -> Forecast:
    """Of some datasets together: their tuples, and the tokens of their first epochs."""
    sizes = tuple(split_sizes(count)[0] for count in tuples)
    steps_per_epoch = Plan(sizes, recipe.global_batch, recipe.seed).steps_per_epoch
    steps = recipe.epochs * steps_per_epoch
    if recipe.steps > 0:  # whichever comes first
        steps = min(steps, recipe.steps)
    epochs = steps / steps_per_epoch if steps_per_epoch else 0.0
    if None in tokens:
        return Forecast(steps_per_epoch, steps, epochs, None, None, None)
    tokens_per_epoch = sum(tokens)
    all_tokens = round(tokens_per_epoch * epochs)
    seconds = all_tokens / recipe.tokens_per_second if recipe.tokens_per_second else None
    return Forecast(steps_per_epoch, steps, epochs, tokens_per_epoch, all_tokens, seconds)


def tokens_of_first_epoch(table: np.ndarray, lengths: np.ndarray, task: str, recipe: Recipe) -> int:
    """Tokens of the texts of all training tuples in epoch 0, each cut to the recipe's max_length.

    Args:
        table: int [n, 2 + K] text numbers, -1 = missing.
        lengths: int [texts], tokens with EOS.
    """
    rows, _ = split_sizes(len(table))
    drawn = min(recipe.negatives.get(task, 0), table.shape[1] - 2)
    cut = np.append(np.minimum(lengths, recipe.max_length), 0)  # text number -1 looks up the 0
    tokens = 0
    for begin in range(0, rows, _BLOCK):
        places = split_rows(np.arange(begin, min(begin + _BLOCK, rows)), len(table))
        tuples = table[places]  # [m, 2 + K]
        negatives = choose_negatives(tuples[:, 2:], drawn, recipe.seed, 0, places)  # [m, drawn]
        tokens += int(cut[tuples[:, :2]].sum() + cut[negatives].sum())
    return tokens
