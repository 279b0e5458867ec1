"""The rows of benchmarks.ingredients, group by group: how the training of each differs from the plain row."""

from dataclasses import dataclass, field

from benchmarks.search_task import Variant

MINED = Variant("bm25", 7)  # the plain row's tuples; a run draws as many of the seven as it wants
HARD_NEGATIVES = 3  # where a row has some and says no number
LORA_RATES = (5e-4, 1e-3, 2e-3)  # of adapters, and of all weights beside them
BATCHES = (32, 64, 128, 512)  # among them the plain row's, unless another --batch is given
TWO_PASS_TOKENS = 16384  # of a forward pass of the largest batch, which takes two passes


@dataclass(frozen=True)
class Row:
    """One way to train, and its name in the table of its group.

    Attributes:
        changes: keys of run.py that differ from the plain row's.
        batch: tuples of a step, for as many tuples in all as the plain row; None = the plain row's.
        same_time_as: name of a row of the group: this one makes as many steps as fit into that row's training time.
        paced_by: with it, the row whose seconds per step say how many steps that is.
    """

    name: str
    changes: dict = field(default_factory=dict)
    variant: Variant = MINED
    processes: int = 1
    batch: int | None = None
    same_time_as: str | None = None
    paced_by: str | None = None


def groups() -> dict[str, list[Row]]:
    """Group -> its rows, in the order in which they are measured and printed."""
    return {
        "losses": losses(),
        "negatives": negatives(),
        "gather": gather(),
        "matryoshka": matryoshka(),
        "lora": lora(),
        "batch": batches(),
        "instruction": instruction(),
    }


def losses() -> list[Row]:
    """Each loss alone, and their sum, on the same tuples."""
    alone = Variant(MINED.mining, MINED.negatives, task="clustering")  # this task has no in-batch loss
    hard = {"num_hard_neg": HARD_NEGATIVES}
    return [Row("in-batch alone"), Row("hard alone", hard, alone), Row("both", hard)]


def negatives() -> list[Row]:
    """How many hard negatives, and by whom they are found; for the same steps, and for the same time."""
    rows = [Row("none")]
    for count in (1, 3, 7):
        rows.append(Row(f"{count} by BM25", {"num_hard_neg": count}))
    for mining in ("random", "minilm"):
        rows.append(mined_by(mining))
    for count in (3, 7):
        name = f"{count} by BM25"
        timed = Row(f"{name}, time of none", {"num_hard_neg": count}, same_time_as="none", paced_by=name)
        rows.append(timed)
    return [*rows, mined_by("trained")]


def mined_by(mining: str) -> Row:
    """Both losses, with negatives that are found this way."""
    return Row(f"{HARD_NEGATIVES} by {mining}", {"num_hard_neg": HARD_NEGATIVES}, Variant(mining, MINED.negatives))


def gather() -> list[Row]:
    """With and without the gradient to the positives of all processes; two processes, half the batch each."""
    return [
        Row("gradient through the gather", {"gather_with_grad": True}, processes=2),
        Row("no gradient", {"gather_with_grad": False}, processes=2),
    ]


def matryoshka() -> list[Row]:
    """Losses on prefixes as well; the table has a column for each prefix."""
    return [Row("full width alone"), Row("Matryoshka", {"use_mrl": True})]


def lora() -> list[Row]:
    """Adapters of rank 16 in all linear layers beside training all weights, both at the same learning rates.

    Adapters want a higher rate than all weights do, so at a single rate one of the two would be at a disadvantage.
    Where the plain rate is among these, its row stands under two names and is measured once.
    """
    adapters = {"use_lora": True, "lora_r": 16, "lora_target_modules": "all-linear"}
    rows = [Row("all weights")]
    for rate in LORA_RATES:
        rows.append(Row(f"all weights, {rate:g}", {"learning_rate": rate}))
    for rate in LORA_RATES:
        rows.append(Row(f"LoRA, {rate:g}", adapters | {"learning_rate": rate}))
    return rows


def batches() -> list[Row]:
    """In-batch negatives by the batch, for equally many tuples; all at one learning rate."""
    rows = []
    for batch in BATCHES:
        changes = {}
        if batch == max(BATCHES):
            changes = {"max_tokens_per_forward": TWO_PASS_TOKENS}
        rows.append(Row(f"batch {batch}", changes, batch=batch))
    return rows


def instruction() -> list[Row]:
    """With and without the instruction before queries, in training and in evaluation."""
    return [Row("instruction"), Row("no instruction", variant=Variant(MINED.mining, MINED.negatives, instructed=False))]
