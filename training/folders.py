"""After which steps a run writes a model folder, what it is called, and how much room all of them take."""

from pathlib import Path

from utils import read_json

BEST = "best"  # the folder of the model that was best in the evaluations
_MUCH_ROOM = 50e9  # bytes


def steps_of(folder: Path) -> int | None:
    """After how many steps the model in a folder was saved; None if there is none."""
    path = folder / "f2llm.json"
    return read_json(path)["training"]["steps"] if path.exists() else None


def folder_name(step: int, every: int, steps: int, steps_per_epoch: int) -> str | None:
    """The name of the model folder that is written after a step; None if none is.

    >>> [folder_name(step, every=2, steps=7, steps_per_epoch=4) for step in range(1, 8)]
    [None, 'step_2', None, 'epoch_1', None, 'step_6', 'step_7']

    Args:
        every: checkpointing_steps; 0 = only at the ends of epochs and of the run.
        steps: of the whole run.
    """
    if step % steps_per_epoch == 0:  # the same weights would be step_N's: one folder holds them
        return f"epoch_{step // steps_per_epoch}"
    if step == steps or (every and step % every == 0):
        return f"step_{step}"
    return None


def room_lines(size: int, limit: int, every: int, steps: int, steps_per_epoch: int) -> list[str]:
    """A line about the model folders of a run, where they come to more than 50 GB; none if they do not.

    Args:
        size: bytes of one.
        limit: model_folders_limit; 0 = all are kept.
        every, steps, steps_per_epoch: as for `folder_name`.
    """
    count = sum(1 for step in range(1, steps + 1) if folder_name(step, every, steps, steps_per_epoch))
    kept = min(count, limit + 1) if limit else count  # the oldest goes when the newest is there
    if kept * size <= _MUCH_ROOM:
        return []
    line = (
        f"{count:,} model folders of {size / 1e9:,.1f} GB will be written, and {kept * size / 1e9:,.0f} GB of them "
        f"kept: checkpointing_steps {every} (0 = only at the ends of epochs), model_folders_limit {limit} (0 = all)"
    )
    return [line]
