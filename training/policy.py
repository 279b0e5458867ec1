"""Which activations a run keeps, and how many tokens a forward pass has: the fastest way that fits into memory.

Keeping everything saves time and costs memory. Recomputing a layer costs its forward pass once more; parts cost a
forward pass over all tokens, launch kernels for fewer tokens, and under sharding gather the weights anew. Which is
cheapest depends on the model, the device and the engine. So the memory of each way is computed (training/memory.py),
and its time (training/step_time.py).

    python -m pytest tests/training/test_policy.py
"""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from data.batch import lengths_when_cut
from data.plan import Plan, choose_negatives, split_rows
from data.token_store import TokenStore
from model import Embedder
from training.memory import (
    Cost,
    Layout,
    Weights,
    bytes_for_activations,
    gradient_and_moment_bytes,
    weights_of,
    working_bytes,
)
from training.step_time import Device, Way, Work, device_of, step_seconds, work_of

ROUND = 1024  # tokens; where max_tokens_per_forward is chosen here, it is a multiple of this
NEAR = 0.1  # a way counts as fast as the fastest where it takes at most this share longer
STEPS = 64  # of an epoch, from which a usual one is found
USUAL = 0.95  # share of the steps that have at most as many tokens as a usual one


@dataclass(frozen=True)
class Policy:
    """What was chosen."""

    recompute_every: int  # recompute every such layer; 0 = none
    max_tokens_per_forward: int  # 0 = any number
    keep_gathered: bool = False  # weights that a sharded model gathered stay whole until its backward pass
    fits: bool = True  # False: by what is counted, a step will run out of memory
    parts: int = 1  # of a usual step


@dataclass(frozen=True)
class Fixed:
    """What the user fixed; None leaves it to `choose_policy`."""

    recompute_every: int | None = None
    max_tokens_per_forward: int | None = None  # 0 = any number
    keep_gathered: bool | None = None


@dataclass(frozen=True)
class Situation:
    """What a policy is chosen for: a model under an engine on a device, and its steps."""

    cost: Cost
    weights: Weights
    work: Work
    layout: Layout
    device: Device
    free: float  # bytes on the process that has least, its weights already there
    losses: float  # bytes at their peak
    usual_step: int  # tokens of a process
    longest_text: int  # tokens

    def activation_bytes(self, keep_gathered: bool) -> float:
        """What is left for activations; negative where not even the rest fits."""
        states = gradient_and_moment_bytes(self.weights, self.layout)
        working = working_bytes(self.weights, self.layout, keep_gathered)
        return bytes_for_activations(self.free, states + working, self.losses)

    def room(self, recompute_every: int, keep_gathered: bool) -> int:
        """Tokens of a forward pass that fit."""
        return max(0, int(self.activation_bytes(keep_gathered) / self.cost.per_token(recompute_every)))

    def seconds(self, policy: Policy) -> float:
        """How long a usual step takes by the model of it."""
        recomputed = self.cost.recomputed_layers(policy.recompute_every) / max(self.cost.layers, 1)
        way = Way(policy.parts, recomputed, policy.keep_gathered)
        return step_seconds(self.usual_step, way, self.work, self.weights, self.layout, self.device)


@dataclass(frozen=True)
class UsualStep:
    """What a process has in a step that only one in twenty exceeds."""

    tokens: int
    text_length: float  # tokens of a text, on average


def situation_of(
    model: Embedder,
    cost: Cost,
    layout: Layout,
    device_name: str,
    free: float,
    losses: int,
    usual: UsualStep,
    longest_text: int,
) -> Situation:
    """The situation of a model.

    Args:
        model: an engine may hold it in parts.
        device_name: as CUDA has it, or "cpu".
        free: bytes on the process that has least, its weights already there.
        losses: bytes at their peak.
        longest_text: tokens of the longest text there may be.
    """
    weights = weights_of(model)
    config = model.decoder().config
    heads = getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Situation(
        cost=cost,
        weights=weights,
        work=work_of(weights, len(model.layers()), model.hidden_size, heads * head_width, usual.text_length),
        layout=layout,
        device=device_of(device_name),
        free=free,
        losses=losses,
        usual_step=usual.tokens,
        longest_text=longest_text,
    )


NOTHING_FIXED = Fixed()


def choose_policy(situation: Situation, fixed: Fixed = NOTHING_FIXED) -> Policy:
    """The policy for a usual step that takes least time among those that fit.

    Of those that are NEAR the fastest the one with the fewest parts: what a part costs is the least certain number of
    the model. A part must hold the longest text. Where nothing fits, the policy with the least memory, marked so.
    """
    options = [fixed.recompute_every]
    if fixed.recompute_every is None:
        options = recomputing_options(situation.cost.layers)
    gathered = [bool(fixed.keep_gathered)]
    if fixed.keep_gathered is None and situation.layout.sharded:
        gathered = [False, True]
    policies = []
    for keep_gathered, recompute_every in product(gathered, options):
        policies.append(_policy_of(situation, recompute_every, keep_gathered, fixed.max_tokens_per_forward))
    fitting = [policy for policy in policies if policy.fits]
    if not fitting:
        return _policy_of(situation, options[-1], gathered[0], fixed.max_tokens_per_forward)
    fastest = min(situation.seconds(policy) for policy in fitting)
    near = [policy for policy in fitting if situation.seconds(policy) <= (1 + NEAR) * fastest]
    return min(near, key=lambda policy: (policy.parts, situation.seconds(policy)))


def _policy_of(
    situation: Situation, recompute_every: int, keep_gathered: bool, max_tokens_per_forward: int | None
) -> Policy:
    """The policy with this choice made: how many tokens a pass may have, how many parts that makes, whether it fits.

    Args:
        max_tokens_per_forward: as the user fixed it; None leaves it to what fits.
    """
    room = situation.room(recompute_every, keep_gathered)
    if max_tokens_per_forward is None:
        max_tokens_per_forward = room // ROUND * ROUND or max(room, situation.longest_text)
        needed = situation.longest_text
    else:
        needed = situation.usual_step
        if max_tokens_per_forward:
            needed = min(needed, max(max_tokens_per_forward, situation.longest_text))
    parts = count_parts(situation.usual_step, max_tokens_per_forward)
    return Policy(recompute_every, max_tokens_per_forward, keep_gathered, room >= needed, parts)


def count_parts(tokens: int, max_tokens_per_forward: int) -> int:
    """How many parts a step of so many tokens runs in, at least.

    >>> count_parts(5000, 2048), count_parts(5000, 0)
    (3, 1)
    """
    if not max_tokens_per_forward:
        return 1
    return max(1, math.ceil(tokens / max_tokens_per_forward))


def recomputing_options(layers: int) -> list[int]:
    """Which layers to recompute, as in Policy.recompute_every, from none to all; each option recomputes more layers.

    >>> recomputing_options(8)
    [0, 8, 4, 3, 2, 1]
    """
    options = [0]
    for recomputed in range(1, layers + 1):
        every = math.ceil(layers / recomputed)
        if every not in options:
            options.append(every)
    return options


def format_recomputing(recompute_every: int) -> str:
    """What is recomputed, for people."""
    if recompute_every == 0:
        return "all kept"
    if recompute_every == 1:
        return "recomputed in all layers"
    return f"recomputed in one of every {recompute_every} layers"


# ------------------------------------------------------------------------------------- a usual step


def find_usual_step(
    stores: list[TokenStore], negatives: list[int], plan: Plan, max_lengths: list[int], processes: int
) -> UsualStep:
    """A usual step: of STEPS steps spread over the first epoch the USUAL share have no more tokens.

    Args:
        stores: in the order of the plan.
        negatives: drawn per tuple, by dataset.
        max_lengths: tokens of a text at most, by dataset.
    """
    count = min(STEPS, plan.steps_per_epoch)
    steps = np.unique(np.linspace(1, plan.steps_per_epoch, count).astype(int))
    tokens = []
    texts = 0
    for step in steps:
        lengths = _lengths_of_step(stores, negatives, plan, max_lengths, processes, int(step))
        tokens.append(int(lengths.sum()))
        texts += len(lengths)
    usual = np.quantile(tokens, USUAL, method="higher")
    return UsualStep(math.ceil(usual / processes), sum(tokens) / texts)


def _lengths_of_step(
    stores: list[TokenStore], negatives: list[int], plan: Plan, max_lengths: list[int], processes: int, step: int
) -> np.ndarray:
    """Tokens of the texts that all processes run in a step; a text counts once on each process that has it."""
    planned = plan.step(step)
    store = stores[planned.dataset]
    rows = split_rows(planned.rows, len(store.tuples))
    slots = store.tuples[rows, 2:]
    drawn = choose_negatives(slots, negatives[planned.dataset], plan.seed, planned.epoch, rows)  # [m, n]
    tuples = np.concatenate([store.tuples[rows, :2], drawn], axis=1)  # [m, 2 + n] text numbers, -1 = missing
    lengths = []
    for rank in range(min(processes, len(rows))):
        texts = np.unique(tuples[rank::processes])  # which rows a process has is dealt anew, by their tokens
        lengths.append(lengths_when_cut(store, texts[texts >= 0], max_lengths[planned.dataset]))
    return np.concatenate(lengths)
