"""Whether a run may continue from a state: what has changed since the run began, and what a person reads about it.

Almost everything is known before a model is loaded, and is refused with all other problems. Only that the model has
other weights than before, or computes in another precision, shows when it is there.
"""

import json
from pathlib import Path

from arguments import Args
from configuration.dataset_settings import DatasetSettings
from data.token_store import TokenStore
from runtime import launcher, resume
from training.identity import KNOWN_LATE, assumed_of_old_states, described_identity, key_identity
from training.models import describe_student
from training.recipes import recipes_for
from training.steps import lay_out_steps
from utils import RunError

_HOW_TO_TRAIN_LONGER = (
    "  a cosine ends where it was planned to end. To train longer, begin another run: another experiment_id, and",
    "  model_path set to this run's last model folder (of an adapter, merged first: python -m tools.merge_adapter).",
    "  A run begun with scheduler_type constant_with_warmup can be made longer as it is",
)
# A store of longer texts may give this run the same tokens as before, where the run cuts texts to fewer. That is not
# looked for: both stores would have to be there, and be read whole.
_HOW_TEXTS_STAY = (
    "  its token store was rewritten: tokenise as before, with the same instruction and the same --max_seq_length,",
    "  also if this run cuts texts shorter than the store does",
)
_OF_DATASETS = ("dataset ", "texts of ", "task of ", "settings of ")  # what such names of an identity begin with


def known_changes(
    args: Args, unknown: set[str], stores: list[TokenStore], settings: DatasetSettings, tokenizer
) -> list[str]:
    """What has changed since the run began that would be continued, as one problem; none where there is no such run.

    Every process looks, so that each that sees the folder refuses the run. Loads no weight.

    Args:
        unknown: keys of `args` that do not hold what the user meant.
        stores, settings, tokenizer: of the run, in which no problem was found; without stores only keys are compared.
    """
    if args.cache_only or unknown & {"output_dir", "experiment_id", "resume"}:
        return []
    folder = run_folder(args)
    facts = resume.known_facts(args.resume, folder / "state")
    if not facts:
        return []
    earlier = facts[resume.IDENTITY_KEY]
    if stores:
        recipes = recipes_for(args, stores, settings)
        plan, schedule = lay_out_steps(args, stores, recipes, launcher.processes())
        now = described_identity(args, plan, schedule, stores, recipes, tokenizer, describe_student(args))
        earlier = {name: value for name, value in earlier.items() if name not in KNOWN_LATE}
    else:
        now = {name: value for name, value in key_identity(args).items() if name not in unknown}
        earlier = {name: value for name, value in earlier.items() if name in now}
    return _refusal(folder, now, earlier, args.model_path, facts)


def refuse_changes(args: Args, identity: dict, facts: dict) -> None:
    """Compare the whole identity of a run with that in the facts of the state that it will continue from.

    Raises:
        RunError: they differ.
    """
    if not facts:
        return
    problems = _refusal(run_folder(args), identity, facts[resume.IDENTITY_KEY], args.model_path, facts)
    if problems:
        raise RunError("\n".join(problems))


def run_folder(args: Args) -> Path:
    """Where a run writes."""
    return Path(args.output_dir) / args.experiment_id


# ------------------------------------------------------------------------------------- what a person reads


def _refusal(folder: Path, now: dict, earlier: dict, path: str, facts: dict) -> list[str]:
    """One problem of several lines, or none. `facts` are those of the state."""
    changes = differences(now, assumed_of_old_states(now) | earlier, path, facts.get("model_path"))
    if not changes:
        return []
    lines = [f"{folder}: cannot continue, because this has changed:", *changes]
    lines.append("put it back, or choose another experiment_id")
    return ["\n  ".join(lines)]


def differences(now: dict, earlier: dict, path: str | None = None, earlier_path: str | None = None) -> list[str]:
    """Which parts of a run's identity have changed, one line each; below some, indented, what helps.

    Args:
        now, earlier: the identities.
        path, earlier_path: of the models, where they are known: an identity holds only a digest of a model's shapes.
    """
    changed = [name for name in sorted(set(now) | set(earlier)) if now.get(name) != earlier.get(name)]
    lines = []
    for name in changed:
        if name == "model":
            lines.append(f"model: was {_model(earlier.get(name), earlier_path)}, is now {_model(now.get(name), path)}")
        elif name == "weights":
            if "model" not in changed:  # of another model they differ anyway
                lines.append(f"weights: training began with those of {earlier_path!r}, and {path!r} holds others")
        elif name.startswith(_OF_DATASETS):
            lines += _dataset_lines(name, now, earlier)
        else:
            lines.append(_value_line(name, now.get(name), earlier.get(name)))
        if name == "steps" and "global batch" not in changed and _is_longer(now.get(name), earlier.get(name)):
            lines += _HOW_TO_TRAIN_LONGER
    return lines


def _model(digest: str | None, path: str | None) -> str:
    """A model for people: by its path and the digest of its shapes."""
    return f"{path!r} (shapes {digest})" if path else f"one of the shapes {digest}"


def _is_longer(steps: int | None, earlier: int | None) -> bool:
    """Whether a run whose cosine had an end is to end later; None = a constant rate, which has none."""
    return steps is not None and earlier is not None and steps > earlier


def _dataset_lines(name: str, now: dict, earlier: dict) -> list[str]:
    """What has changed of one dataset; a new one, or one that is gone, is said once."""
    what = next(start for start in _OF_DATASETS if name.startswith(start))
    dataset = name.removeprefix(what)
    value, earlier_value = now.get(name), earlier.get(name)
    is_there, was_there = (f"dataset {dataset}" in identity for identity in (now, earlier))
    if what == "dataset ":
        if not was_there:
            return [f"{name}: is among the data now, and was not when the run began"]
        if not is_there:
            return [f"{name}: was among the data when the run began, and is not now"]
        return [f"{name}: its tuples are others (checksum was {earlier_value}, is now {value})"]
    if not (is_there and was_there):
        return []
    if what == "texts of ":
        changed = f"dataset {dataset}: its tokenised texts are others (checksum was {earlier_value}, is now {value})"
        return [changed, *_HOW_TEXTS_STAY]
    if what == "task of ":
        return [f"dataset {dataset}: its task was {earlier_value}, is now {value}"]
    return [f"dataset {dataset}: its settings were {earlier_value or 'none'}, are now {value or 'none'}"]


def _value_line(name: str, value, earlier) -> str:
    """What has changed of anything else."""
    if name == "global batch":
        return f"global batch (train_batch_size times processes): was {earlier} tuples, is now {value}"
    if name == "steps":
        return f"steps of the run: were {_steps(earlier)}, are now {_steps(value)}"
    if name == "precision":
        return f"mixed precision: was {earlier}, is now {value}: accelerate launch --mixed_precision {earlier}"
    if name == "tokenizer":
        return f"tokenizer: is another one (fingerprint was {earlier}, is now {value})"
    if name == "teacher embeddings":
        return f"teacher_embeddings: are others (checksum was {earlier or 'none'}, is now {value or 'none'})"
    return f"{name}: was {_json(earlier)}, is now {_json(value)}"


def _steps(count: int | None) -> str:
    return "not fixed (a constant rate)" if count is None else f"{count:,}"


def _json(value) -> str:
    """A value as the config file has it."""
    return json.dumps(value, ensure_ascii=False)
