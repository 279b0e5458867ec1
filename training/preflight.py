"""Every problem that can keep a run from starting, found without loading a weight.

Many of them lie between several keys, so this file takes the configuration whole.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PretrainedConfig

from arguments import Args
from configuration import dataset_settings
from configuration.dataset_settings import DatasetSettings
from data import cache, embedding_store
from data.token_store import TokenStore
from export import hub
from losses import matryoshka_weights
from modeling import versions
from modeling.attention import is_packed
from modeling.backbone import check_backbone, check_teacher, read_config
from modeling.hub import DOWNLOAD
from modeling.tokenizer import fitting_tokenizer
from retrieval import beir
from retrieval.beir import RetrievalSet
from runtime import engine, launcher
from training import best
from training.continuing import known_changes, run_folder
from training.recipes import Recipe, not_as_tokenised, recipes_for, too_long, without_loss
from training.trackers import tracker_problems


def open_inputs(
    args: Args, problems: list[str], unknown: set[str]
) -> tuple[list[TokenStore], list[Recipe], object, list[str]]:
    """Open the data and the tokenizer, and find every problem with them, the model and the output folder.

    No weight is loaded. Data are converted and verified, which may take long, only where no other problem was found.
    Where other problems were found, only the keys are compared with those of the run that would be continued.

    Args:
        problems: what is known to be wrong already.
        unknown: keys of `args` that do not hold what the user meant; what depends on them is not looked at.

    Returns:
        (stores, how each is trained, tokenizer, problems); the problems one line each, `problems` among them.
    """
    problems = versions.too_old() + problems
    if not args.cache_only:
        problems += output_problems(args, unknown)
        problems += machine_problems(args, unknown)
    settings, settings_problems = read_settings(args, unknown)
    problems += settings_problems
    folder = Path(args.train_data_path)
    if not folder.is_dir() or unknown & {"train_data_path", "cache_dir"}:
        _, model_problems = check_models(args, [], settings, unknown)
        return [], [], None, problems + model_problems + known_changes(args, unknown, [], settings, None)
    unverified, data_problems = cache.open_unverified(folder)
    tokenizer, model_problems = check_models(args, unverified, settings, unknown)
    problems += data_problems + model_problems
    sources, _ = cache.find_sources(folder)
    if settings.entries:
        problems += dataset_settings.unknown_names(settings, [source.name for source in sources])
    are_known = not problems and len(unverified) == len(sources)  # nothing is left to convert
    known_stores = unverified if are_known else []
    instruction_problems = not_as_tokenised(known_stores, recipes_for(args, known_stores, settings), settings)
    problems += instruction_problems + known_changes(args, unknown, known_stores, settings, tokenizer)
    if problems:
        return [], [], tokenizer, problems
    stores, problems = cache.prepare(folder, Path(args.cache_dir))
    if stores:  # now what was converted is known too
        _, problems = check_models(args, stores, settings, unknown)
    recipes = recipes_for(args, stores, settings)
    if not are_known:
        problems += not_as_tokenised(stores, recipes, settings)
    if not args.cache_only and not args.teacher_model_path and not args.teacher_embeddings:
        problems += without_loss(stores, recipes)
    if args.teacher_embeddings and not args.cache_only and not problems:
        problems += verify_embeddings(args, stores)
    if not are_known and not problems:
        problems += known_changes(args, unknown, stores, settings, tokenizer)
    return stores, recipes, tokenizer, problems


def read_evaluation_sets(args: Args, unknown: set[str]) -> tuple[list[RetrievalSet], list[str]]:
    """The retrieval sets of a run that evaluates, and what is wrong with them or with what is asked of them."""
    if args.cache_only or unknown & {"evaluation_data_path", "evaluation_steps"}:
        return [], []
    evaluates = args.evaluation_data_path is not None and args.evaluation_steps > 0
    problems = []
    if args.best_metric is not None and not evaluates:
        problems.append("best_metric: nothing is evaluated: give evaluation_data_path, and evaluation_steps above 0")
    if args.early_stopping_patience and args.best_metric is None and "best_metric" not in unknown:
        problems.append("early_stopping_patience: needs best_metric, which says what is better: nDCG@10, for one")
    if not evaluates:
        return [], problems
    sets, set_problems = beir.read_sets(args.evaluation_data_path, quiet=not launcher.is_first_on_machine())
    problems += [f"evaluation_data_path: {problem}" for problem in set_problems]
    config = None
    if not unknown & {"model_path", "model_revision"}:
        config, _ = read_config(args.model_path, args.model_revision)
    if hasattr(config, "hidden_size") and "evaluation_dims" not in unknown:
        problems += dims_problems(args, config.hidden_size, [retrieval_set.name for retrieval_set in sets], unknown)
    return sets, problems


def dims_problems(args: Args, width: int, sets: list[str], unknown: set[str]) -> list[str]:
    """What is wrong with evaluation_dims for a model of this width, and with best_metric, one line each."""
    asked, problem = best.parse_dims(args.evaluation_dims)
    problem = problem or best.dims_problem(asked, width)
    if problem:
        return [problem]
    if args.best_metric is None or not sets or "best_metric" in unknown:
        return []
    prefixes = list(matryoshka_weights(width)) if args.use_mrl else [width]
    _, problem = best.parse_choice(args.best_metric, sets, best.all_dims(asked, prefixes))
    return [problem] if problem else []


def read_settings(args: Args, unknown: set[str]) -> tuple[DatasetSettings, list[str]]:
    """The settings of single datasets, and what is wrong with them, but for what only the data can tell."""
    if "dataset_settings" in unknown or (args.dataset_settings is None and "train_data_path" in unknown):
        return DatasetSettings(), []
    path = dataset_settings.find(Path(args.train_data_path), args.dataset_settings)
    settings, problems = dataset_settings.read(path)
    if "max_seq_length" not in unknown:
        problems += too_long(settings, args.max_seq_length)
    return settings, problems


def output_problems(args: Args, unknown: set[str]) -> list[str]:
    """Why results cannot be written, one line each."""
    problems = []
    if not unknown & {"output_dir", "experiment_id", "resume"}:
        problems += folder_problems(run_folder(args), args.resume)
    if args.resume not in ("auto", "never") and not (Path(args.resume) / "state.json").exists():
        problems.append(f"resume: {args.resume!r} is neither auto, never, nor the folder of a state, state/step_N")
    if engine.deepspeed_is_wanted():
        problems += deepspeed_problems(args, unknown)
    if "report_to" not in unknown:
        problems += tracker_problems(args.trackers())
    return problems + hub_problems(args, unknown)


def deepspeed_problems(args: Args, unknown: set[str]) -> list[str]:
    """What does not go with DeepSpeed, which keeps weights and moments in a way of its own, one line each."""
    problems = []
    if args.max_tokens_per_forward:
        problems.append("max_tokens_per_forward: not under DeepSpeed; take configs/accelerate_config.yaml")
    folder = run_folder(args)
    if not unknown & {"output_dir", "experiment_id"} and (folder / "args.json").exists():
        problems.append(f"{folder}: already holds a run, and DeepSpeed's do not resume: choose another experiment_id")
    return problems


def hub_problems(args: Args, unknown: set[str]) -> list[str]:
    """What is wrong with the facts of the model card, and why it could not be pushed, one line each."""
    problems = [
        hub.licence_problem(None if "license" in unknown else args.license),
        hub.language_problem(None if "language" in unknown else args.language),
    ]
    is_main = int(os.environ.get("RANK", 0)) == 0  # which alone pushes
    if is_main and not unknown & {"push_to_hub", "hub_model_id"}:
        problems += hub.push_problems(args.push_to_hub, args.hub_model_id)
    if args.push_to_hub and args.use_lora and not unknown & {"model_path"} and Path(args.model_path).is_dir():
        problems.append(
            "push_to_hub: adapters name their base model by model_path, a folder that nobody else has: "
            "give model_path as a hub id, or merge and push afterwards"
        )
    return [problem for problem in problems if problem]


def folder_problems(folder: Path, resume: str) -> list[str]:
    """Why a run cannot write into its folder, one line, or nothing."""
    if not folder.exists():
        return []
    if folder.is_file():
        return [f"{folder}: holds something other than a run: choose another experiment_id"]
    own_traces = {".lock", "args.json.tmp"}  # of a run that was killed, or met a full disk, before its first file
    in_use = any(path.name not in own_traces for path in folder.iterdir())
    if in_use and not (folder / "args.json").exists():
        return [f"{folder}: holds something other than a run: choose another experiment_id"]
    if in_use and resume == "never":
        return [f"{folder}: already holds a run: choose another experiment_id, or --resume auto to continue"]
    return []


def machine_problems(args: Args, unknown: set[str]) -> list[str]:
    """What this machine cannot do, one line each."""
    has_gpu = torch.cuda.is_available()
    backend = "auto" if "attn_backend" in unknown else args.attn_backend
    problems = []
    precision = engine.precision_problem(os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower())
    if precision:
        problems.append(precision)
    if args.liger and not (has_gpu and find_spec("liger_kernel")):
        problems.append("liger: needs a GPU and its package (pip install liger-kernel): set it to false")
    if backend == "varlen" and not has_gpu:
        problems.append("attn_backend: varlen needs a GPU: set it to auto")
    if args.compile and backend != "auto" and not is_packed(backend):
        problems.append(f"compile: not with attn_backend {backend}: set that to auto")
    return problems


def check_models(
    args: Args, stores: list[TokenStore], settings: DatasetSettings, unknown: set[str]
) -> tuple[object, list[str]]:
    """The tokenizer, and what in model and teacher does not fit each other or the data, one line each."""
    if args.cache_only or unknown & {"model_path", "model_revision", "teacher_revision"}:
        return None, []
    largest_id = max((store.meta["max_token_id"] for store in stores), default=0)
    length = 0 if "max_seq_length" in unknown else args.max_seq_length
    lora_targets = args.lora_targets() if args.use_lora and "lora_target_modules" not in unknown else []
    config, problems = check_backbone(
        args.model_path, largest_id, length, args.attn_backend, lora_targets, args.model_revision
    )
    tokenizer = None
    if config:
        tokenizer, tokenizer_problems = fitting_tokenizer(args.model_path, stores, revision=args.model_revision)
        problems = problems + tokenizer_problems
    elif not Path(args.model_path).is_dir():
        problems = [f"{problem}; {DOWNLOAD}" for problem in problems]
    problems = [f"model_path: {problem}" for problem in problems]
    has_embeddings = args.teacher_embeddings is not None  # the other teacher is then not to be used
    if config and args.teacher_model_path and not has_embeddings and "teacher_model_path" not in unknown:
        problems += teacher_problems(args, config, stores, largest_id, length)
    if args.teacher_embeddings and "teacher_embeddings" not in unknown:
        width = config.hidden_size if config else 0
        problems += embedding_problems(args, stores, settings, length, width)
    return tokenizer, problems


def embedding_problems(
    args: Args, stores: list[TokenStore], settings: DatasetSettings, length: int, width: int
) -> list[str]:
    """What in a teacher's embeddings does not fit the run, one line each.

    Args:
        settings: of single datasets, which may cut texts elsewhere.
        length: max_seq_length; 0 = not known.
        width: of the student; 0 = not known.
    """
    folder = Path(args.teacher_embeddings)
    problems = []
    if args.teacher_model_path:
        problems.append(
            "given beside teacher_model_path: a run has one teacher: add --teacher_model_path null (or "
            "--teacher_embeddings null, for the live one)"
        )
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder; python -m tools.embed_store makes it")
    else:
        for store in stores:
            own_length = settings.of(store.name).max_length or length
            problems += embedding_store.find_problems(folder, store, own_length, width)
    return [f"teacher_embeddings: {problem}" for problem in problems]


def verify_embeddings(args: Args, stores: list[TokenStore]) -> list[str]:
    """What only the contents of a teacher's embeddings tell, one line each; they are read once."""
    folder = Path(args.teacher_embeddings)
    names = [store.name for store in stores]
    problems = embedding_store.other_teachers(folder, names)
    problems += embedding_store.verify(folder, names, Path(args.cache_dir))
    return [f"teacher_embeddings: {problem}" for problem in problems]


def teacher_problems(
    args: Args, student: PretrainedConfig, stores: list[TokenStore], largest_id: int, length: int
) -> list[str]:
    """What in a live teacher does not fit its student or the data, one line each.

    Args:
        largest_id: token id in the data.
        length: max_seq_length; 0 = not known.
    """
    path, revision = args.teacher_model_path, args.teacher_revision
    problems = check_teacher(path, student, largest_id, length, args.attn_backend, revision)
    if not problems:
        _, problems = fitting_tokenizer(path, stores, "take a teacher with the student's tokenizer", revision)
    return [f"teacher_model_path: {problem}" for problem in problems]
