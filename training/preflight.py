"""The door's other half: everything that can stand against a run, found without loading a weight.

What a user says is judged here as a whole, so this room takes the configuration, as only the doors do.
"""

import hashlib
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from arguments import Args
from data import cache
from data.plan import Plan
from data.token_store import TokenStore
from modeling.backbone import check_backbone, check_teacher
from modeling.tokenizer import fingerprint, fitting_tokenizer
from training.records import tracker_problems
from training.schedule import Schedule

# What may change between a run and its resume: it alters nothing that is trained.
HARMLESS = {
    "output_dir", "tb_dir", "cache_dir", "cache_only", "experiment_id", "model_path", "train_data_path",
    "train_batch_size", "log_interval", "validation_steps", "checkpointing_steps", "save_dtype", "query_instruction",
    "report_to", "process_timeout", "num_processes", "resume", "save_every_minutes", "save_total_limit",
    "max_skipped_steps", "gradient_checkpointing", "attn_backend", "max_tokens_per_forward", "compile", "liger",
    "train_epochs", "train_steps",
}  # fmt: skip


def find_problems(args: Args, problems: list[str], unknown: set[str]) -> tuple[list[TokenStore], object, list[str]]:
    """Look at data, model, tokenizer and output folder without loading a weight.

    Data are converted and verified only where nothing else stands against the run.

    Args:
        problems: what is known to be wrong already.
        unknown: keys of `args` that do not hold what the user meant; what depends on them is not judged.

    Returns:
        (stores, tokenizer, problems); every problem there is, one line each.
    """
    problems = [*problems, *check_outputs(args, unknown), *([] if args.cache_only else check_machine(args, unknown))]
    stores, folder = [], Path(args.train_data_path)
    if folder.is_dir() and not {"train_data_path", "cache_dir"} & unknown:
        opened, wrong = cache.open_unverified(folder)
        tokenizer, more = check_models(args, opened, unknown)
        problems += wrong + more
        if not problems:
            stores, problems = cache.prepare(folder, Path(args.cache_dir))
            if stores:  # now what was converted is known too
                problems = check_models(args, stores, unknown)[1] + datasets_without_loss(args, stores)
        return stores, tokenizer, problems
    return [], None, problems + check_models(args, [], unknown)[1]


def check_outputs(args: Args, unknown: set[str]) -> list[str]:
    """What stands against writing the results, one line each."""
    if args.cache_only:
        return []
    folder, problems = Path(args.output_dir) / args.experiment_id, []
    if not {"output_dir", "experiment_id", "resume"} & unknown and folder.exists():
        if folder.is_file() or (any(folder.iterdir()) and not (folder / "args.json").exists()):
            problems.append(f"{folder}: holds something else than a run: choose another experiment_id")
        elif args.resume == "never" and any(folder.iterdir()):
            problems.append(f"{folder}: holds a run already: choose another experiment_id, or --resume auto to go on")
    if args.resume not in ("auto", "never") and not (Path(args.resume) / "state.json").exists():
        problems.append(f"resume: {args.resume!r} is neither auto, never, nor the folder of a state, state/step_N")
    return problems + tracker_problems([] if "report_to" in unknown else args.trackers())


def check_machine(args: Args, unknown: set[str]) -> list[str]:
    """What this machine cannot do, one line each."""
    gpu, backend = torch.cuda.is_available(), "auto" if "attn_backend" in unknown else args.attn_backend
    packed = backend in ("auto", "segments", "varlen")
    rules = {
        "liger: needs a GPU and its package (pip install liger-kernel): set it to false": not args.liger
        or (gpu and find_spec("liger_kernel")),
        "attn_backend: varlen needs a GPU: set it to auto": gpu or backend != "varlen",
        f"compile: not with attn_backend {backend}: set that to auto": packed or not args.compile,
    }
    return [line for line, holds in rules.items() if not holds]


def datasets_without_loss(args: Args, stores: list[TokenStore]) -> list[str]:
    """Datasets that no loss applies to, one line each: they would train nothing and look perfect."""
    idle = [
        store
        for store in stores
        if store.task != "retrieval" and not min(args.negatives_for(store.task), store.meta["negatives"])
    ]
    return [
        f"{store.folder}: {store.task} has the hard-negative loss alone, and no negatives "
        f"({'num_hard_neg is 0' if store.meta['negatives'] else 'there are none in it'}): nothing would be learnt of it"
        for store in ([] if args.cache_only or args.teacher_model_path else idle)
    ]


def check_models(args: Args, stores: list[TokenStore], unknown: set[str]) -> tuple[object, list[str]]:
    """The tokenizer, and what in model and teacher does not fit each other or the data, one line each."""
    if args.cache_only or "model_path" in unknown:
        return None, []
    largest = max((store.meta["max_token_id"] for store in stores), default=0)
    length = 0 if "max_seq_length" in unknown else args.max_seq_length
    targets = args.lora_targets() if args.use_lora and "lora_target_modules" not in unknown else []
    config, wrong = check_backbone(args.model_path, largest, length, args.attn_backend, targets)
    tokenizer, more = fitting_tokenizer(args.model_path, stores) if config else (None, [])
    problems = [f"model_path: {problem}" for problem in wrong + more]
    if args.teacher_model_path and "teacher_model_path" not in unknown and config:
        wrong = check_teacher(args.teacher_model_path, config, largest)
        remedy = "take a teacher with the student's tokenizer"
        more = [] if wrong else fitting_tokenizer(args.teacher_model_path, stores, remedy)[1]
        problems += [f"teacher_model_path: {problem}" for problem in wrong + more]
    return tokenizer, problems


def run_identity(
    args: Args, schedule: Schedule, plan: Plan, stores: list[TokenStore], tokenizer, model: nn.Module
) -> dict:
    """What a run stands on: keys that change what is trained, data, tokenizer, model, global batch."""
    keys = {key: value for key, value in asdict(args).items() if key not in HARMLESS}
    data_now = {f"dataset {store.name}": store.meta["sha256"]["tuples"][:16] for store in stores}
    shape = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]
    steps = None if schedule.constant else schedule.steps  # a cosine depends on where it ends
    whole = {"model": digest, "tokenizer": fingerprint(tokenizer), "global batch": plan.global_batch, "steps": steps}
    return keys | data_now | whole
