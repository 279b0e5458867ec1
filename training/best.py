"""What a run evaluates and when, which of its models is the best, by what metric, and whether the run should end.

Everything follows from the evaluations in metrics.jsonl, so a resumed run reads them there and keeps no other state.

    python -m pytest tests/training/test_evaluation.py
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from configuration.keys import did_you_mean
from retrieval.beir import RetrievalSet
from retrieval.metrics import METRICS
from utils import plural

Results = dict[str, dict[str, dict[str, float]]]  # set -> dimensions -> metric -> value, as in metrics.jsonl


class Choice(NamedTuple):
    """What best_metric names."""

    metric: str
    set: str | None = None  # None = the mean of all sets
    dim: int | None = None  # None = the whole width


class Best(NamedTuple):
    """The best evaluation of some."""

    step: int
    value: float
    worse_since: int  # evaluations after it


def parse_dims(given: int | str | list[int] | None) -> tuple[list[int] | None, str | None]:
    """The numbers of evaluation_dims, or what is wrong with them.

    >>> parse_dims("64, 256"), parse_dims([8]), parse_dims(None)
    (([64, 256], None), ([8], None), (None, None))
    """
    if given is None:
        return None, None
    words = [str(number) for number in given] if isinstance(given, list) else str(given).split(",")
    dims = []
    for word in words:
        if not word.strip().isdecimal() or int(word) == 0:
            return None, f"evaluation_dims: {word.strip()!r} is not a number of dimensions: give some as 64,256"
        dims.append(int(word))
    return dims, None


def dims_problem(dims: list[int] | None, width: int) -> str | None:
    """What is wrong with dimensions for embeddings of this width."""
    too_many = [dim for dim in dims or [] if dim > width]
    if too_many:
        return f"evaluation_dims: {too_many[0]} is more than the {width} dimensions that the model has"
    return None


def all_dims(dims: list[int] | None, prefixes: Sequence[int]) -> list[int]:
    """The dimensions to evaluate at, ascending; the last is the whole width.

    Args:
        dims: as asked for; None = those that are trained.
        prefixes: those that are trained, the whole width among them.
    """
    return sorted({*(prefixes if dims is None else dims), max(prefixes)})


def parse_choice(text: str, sets: Sequence[str], dims: Sequence[int]) -> tuple[Choice | None, str | None]:
    """What a best_metric names, or what is wrong with it.

    METRIC, SET/METRIC, DIMENSIONS/METRIC or SET/DIMENSIONS/METRIC; METRIC also as mteb spells it, ndcg_at_10.

    Args:
        sets: the names of the sets that there are.
        dims: all that are evaluated at.
    """
    *place, word = text.split("/")
    metric = next((name for name in METRICS if name.lower() == word.lower().replace("_at_", "@")), None)
    if metric is None:
        return None, f"best_metric: {word!r} is not one of {', '.join(METRICS)}{did_you_mean(word, METRICS)}"
    choice = Choice(metric)
    if place and place[0] in sets:
        choice = choice._replace(set=place.pop(0))
    if place and place[0].isdecimal():
        choice = choice._replace(dim=int(place.pop(0)))
    if place:
        return None, f"best_metric: there is no set {place[0]!r}, only {', '.join(sets)}{did_you_mean(place[0], sets)}"
    if choice.dim is not None and choice.dim not in dims:
        return None, f"best_metric: {choice.dim} is not one of the evaluated dimensions, {', '.join(map(str, dims))}"
    return choice, None


def value_of(results: Results, choice: Choice, sets: Sequence[str]) -> float | None:
    """The value that a choice names; None if these results lack it: the sets may have been others then.

    Args:
        sets: the names of the sets that there are now.
    """
    names = sets if choice.set is None else [choice.set]
    values = []
    for name in names:
        by_dim = results.get(name, {})
        dim = choice.dim or max(map(int, by_dim), default=0)
        value = by_dim.get(str(dim), {}).get(choice.metric)
        if value is None:
            return None
        values.append(value)
    return sum(values) / len(values)


def best_of(values: Sequence[tuple[int, float]]) -> Best | None:
    """The best of (step, value), of equal ones the first; None if there are none."""
    if not values:
        return None
    place = max(range(len(values)), key=lambda number: (values[number][1], -number))
    step, value = values[place]
    return Best(step, value, len(values) - 1 - place)


def of_kept_model(values: list[tuple[int, float]], kept: int | None) -> list[tuple[int, float]]:
    """The values that still count, when the model that was kept as the best is that of step `kept`; None = none is.

    Mostly that model has the best value, and all count. After a change of best_metric it may not. Then it is the one to
    beat: better values, whose models are gone, no longer count, nor do those of earlier steps.

    >>> of_kept_model([(2, 0.1), (4, 0.3), (6, 0.2)], 4)
    [(2, 0.1), (4, 0.3), (6, 0.2)]
    >>> of_kept_model([(2, 0.5), (4, 0.3), (6, 0.2), (8, 0.4)], 4)
    [(4, 0.3), (6, 0.2)]
    """
    best = best_of(values)
    if best is None or best.step == kept:
        return values
    value = dict(values).get(kept)
    if value is None:
        return []
    return [(step, other) for step, other in values if step >= kept and other <= value]


@dataclass
class Evaluations:
    """What a run evaluates, when, and the values up to now."""

    sets: list[RetrievalSet]
    dims: list[int]  # ascending, the whole width last
    every: int  # steps; 0 = never
    choice: Choice | None = None  # the metric that decides which model is best
    patience: int = 0  # evaluations without a better one after which the run ends; 0 = any number
    values: list[tuple[int, float]] = field(default_factory=list)  # (step, value) of `choice`

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the model is evaluated after a step; it is after the last of `steps`."""
        return bool(self.sets and self.every) and (step % self.every == 0 or step == steps)

    def note(self, step: int, results: Results) -> bool:
        """Keep what decides; returns whether the model is the best so far."""
        value = None
        if self.choice is not None:
            value = value_of(results, self.choice, [retrieval_set.name for retrieval_set in self.sets])
        if value is None:
            return False
        self.values.append((step, value))
        return self.best.step == step

    def forget_lost_models(self, kept: int | None, steps_done: int, best_of_state: int | None = None) -> None:
        """When a run continues after `steps_done`, drop the values of models that are gone.

        A run that has ended because no better model came stays ended, even if its folder best was moved away since.

        Args:
            kept: the step of the model in the folder best; None if there is none.
            best_of_state: the step of the best model, by the state that the run continues from; None if it names none.
        """
        if self.best is None:
            return
        is_to_be_saved = self.best.step == steps_done
        will_be_trained_again = kept is not None and kept > steps_done
        was_moved_away = kept is None and self.is_over and self.best.step == best_of_state
        if not (is_to_be_saved or will_be_trained_again or was_moved_away):
            self.values = of_kept_model(self.values, kept)

    @property
    def best(self) -> Best | None:
        """The best evaluation up to now."""
        return best_of(self.values)

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough for a better model."""
        return bool(self.patience and self.values) and self.best.worse_since >= self.patience

    def lines(self) -> list[str]:
        """What is evaluated, for people; empty if nothing is."""
        if not self.sets or not self.every:
            return []
        queries = sum(len(retrieval_set.queries) for retrieval_set in self.sets)
        documents = sum(len(retrieval_set.documents) for retrieval_set in self.sets)
        facts = [
            f"evaluation: {plural(len(self.sets), 'set')}",
            f"{queries:,} queries",
            f"{documents:,} documents",
            f"every {plural(self.every, 'step')}",
            f"at {', '.join(map(str, self.dims))} dimensions",
        ]
        if self.patience:
            facts.append(f"the run ends after {plural(self.patience, 'evaluation')} without a better one")
        return [", ".join(facts)]
