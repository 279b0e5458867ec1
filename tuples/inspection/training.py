"""What training on the inspected data will take: steps, tokens, time. The numbers are those of data/plan.py.

The number of steps is exactly the one that run.py prints. Tokens are counted, not estimated: those of the first pass
over each dataset, with the negatives that this pass draws; later passes draw others. An epoch has as many passes over a
dataset as its sampling weight says. A text that several tuples of a step share is counted each time, but training runs
it once, so the true number may be a little lower.
"""

from dataclasses import dataclass

import numpy as np

from data.plan import Plan, choose_negatives, split_rows, split_sizes

_BLOCK = 2**16  # tuples looked at together


@dataclass(frozen=True)
class Use:
    """How a training uses one dataset."""

    negatives: int  # hard negatives drawn per tuple, where the dataset has as many
    max_length: int  # tokens of a text at most, EOS included
    weight: float = 1.0  # passes over the dataset in an epoch


@dataclass(frozen=True)
class Course:
    """The part of a training configuration that decides how many steps and tokens there are."""

    global_batch: int  # tuples of a step, over all processes
    uses: dict[str, Use]  # dataset -> its use
    epochs: int
    steps: int  # training stops after these at the latest; not positive = after its epochs
    seed: int
    tokens_per_second: float | None = None  # of all processes together


@dataclass(frozen=True)
class Forecast:
    """What a training will take; None if lengths in tokens, or the speed, are not known."""

    steps_per_epoch: int
    steps: int
    epochs: float
    tokens_per_epoch: int | None
    tokens: int | None
    seconds: float | None


def forecast(tuples: dict[str, int], tokens: dict[str, int | None], course: Course) -> Forecast:
    """Of some datasets together: the tuples of each, and the tokens of a pass over each, by name."""
    sizes = tuple(split_sizes(count)[0] for count in tuples.values())
    weights = tuple(course.uses[name].weight for name in tuples)
    plan = Plan(sizes, course.global_batch, course.seed, weights)
    steps_per_epoch = plan.steps_per_epoch
    steps = course.epochs * steps_per_epoch
    if course.steps > 0:  # whichever comes first
        steps = min(steps, course.steps)
    epochs = steps / steps_per_epoch if steps_per_epoch else 0.0
    if None in tokens.values():
        return Forecast(steps_per_epoch, steps, epochs, None, None, None)
    tokens_per_epoch = 0
    for name, batches, of_pass in zip(tuples, plan.batches, plan.batches_of_pass, strict=True):
        if of_pass:
            tokens_per_epoch += round(tokens[name] * batches / of_pass)
    all_tokens = round(tokens_per_epoch * epochs)
    seconds = all_tokens / course.tokens_per_second if course.tokens_per_second else None
    return Forecast(steps_per_epoch, steps, epochs, tokens_per_epoch, all_tokens, seconds)


def tokens_of_first_pass(table: np.ndarray, lengths: np.ndarray, use: Use, seed: int) -> int:
    """Tokens of the texts of all training tuples in the first pass over them, each cut to the use's max_length.

    Args:
        table: int [n, 2 + K] text numbers, -1 = missing.
        lengths: int [texts], tokens with EOS.
    """
    rows, _ = split_sizes(len(table))
    drawn = min(use.negatives, table.shape[1] - 2)
    cut = np.append(np.minimum(lengths, use.max_length), 0)  # text number -1 looks up the 0
    tokens = 0
    for begin in range(0, rows, _BLOCK):
        places = split_rows(np.arange(begin, min(begin + _BLOCK, rows)), len(table))
        tuples = table[places]  # [m, 2 + K]
        negatives = choose_negatives(tuples[:, 2:], drawn, seed, 0, places)  # [m, drawn]
        tokens += int(cut[tuples[:, :2]].sum() + cut[negatives].sum())
    return tokens
