"""Everything a user may say to run.py: the keys, what is checked between them, JSON plus --key value.

    python run.py --config configs/config.json --learning_rate 2e-5 --use_mrl true

A value on the command line wins over the JSON file, the file wins over the defaults below. A user's mistake
raises nothing here: `parse` returns every problem it found, one line each, for the caller to print at once.
"""

import re
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path

from configuration.keys import free_key, key, normalised, show_default, value_problem
from configuration.other_names import what_it_may_be
from configuration.sources import missing_problems, read_command_line, read_config
from utils import unwritable

USAGE = "python run.py --config configs/config.json [--key value ...]"
_MODEL = "Model"
_DATA = "Data"
_LOSS = "Losses"
_STEP = "Optimizer and schedule"
_LORA = "LoRA"
_OUT = "Output"
_EVALUATION = "Evaluation"
GROUPS = (_MODEL, _DATA, _LOSS, _STEP, _LORA, _OUT, _EVALUATION)


@dataclass
class Args:
    """The resolved configuration. Keys of the published scripts keep their names, meanings and defaults.

    A key's line: its group, its unit, what it does, its default. A resumed run may change those declared as free_key.
    """

    model_path: str = free_key(_MODEL, "folder or hub id", "the decoder to start from")
    experiment_id: str = free_key(_OUT, "name", "names this run's folders below output_dir and tb_dir")
    output_dir: str = free_key(_OUT, "folder", "results go to output_dir/experiment_id")
    tb_dir: str = free_key(_OUT, "folder", "TensorBoard logs go to tb_dir/experiment_id")
    cache_dir: str = free_key(_DATA, "folder", "converted published data and verification marks; shared by runs")
    train_data_path: str = free_key(
        _DATA, "folder", "token stores, or the published scripts' tokenised Parquet (v1 or v2)"
    )

    train_batch_size: int = free_key(
        _DATA, "tuples per process", "global batch = this times processes; larger: more in-batch negatives", 8, low=1
    )
    max_seq_length: int = key(_DATA, "tokens", "longer texts are cut here, EOS kept; shorter is cheaper", 2048, low=2)
    dataset_settings: str | None = free_key(
        _DATA, "file", "settings of single datasets; null = dataset_settings.json beside the data, if it is there", None
    )
    num_hard_neg: int = key(
        _DATA, "per tuple", "hard negatives drawn each epoch, a step costs 2 + this texts a tuple; 0 = none", 7, low=0
    )
    num_hard_neg_clustering: int | None = key(
        _DATA, "per tuple", "num_hard_neg for clustering data; null = the same (v1); v2 used 9", None, low=0
    )
    seed: int = key(_DATA, "", "data order, negatives, LoRA initialisation, dropout", 0, low=0)

    model_revision: str | None = free_key(
        _MODEL, "commit, tag or branch", "which revision of model_path, a hub id; null = its main branch", None
    )
    attn_backend: str = free_key(
        _MODEL,
        "",
        "how attention is computed without padding; all are exact",
        "auto",
        choices=("auto", "varlen", "segments", "buckets", "padded"),
    )
    max_tokens_per_forward: int | None = free_key(
        _MODEL,
        "tokens",
        "a step with more runs in parts: same gradient, one more forward pass; 0 = no limit; null = what fits memory",
        None,
        low=0,
    )
    gradient_checkpointing: bool | int | None = free_key(
        _MODEL,
        "",
        "recompute activations: far less memory, up to a third more work; true = in all layers, as published; "
        "k = in every k-th layer; false = in none; null = in as many as memory asks for",
        None,
        low=0,
    )
    compile: bool = free_key(
        _MODEL, "", "torch.compile of the decoder's layers, a minute once; pays in long runs on a GPU", False
    )
    liger: bool = free_key(_MODEL, "", "Liger's RMSNorm, RoPE and SwiGLU on a GPU; pip install liger-kernel", False)

    temperature: float = key(_LOSS, "", "divides cosine similarities; lower is sharper", 0.05, above=0)
    gather_with_grad: bool = key(
        _LOSS, "", "true: the report's equation; false: no in-batch gradient to positives, as published on GPUs", True
    )
    mask_same_text: bool = key(
        _LOSS, "", "leave out in-batch negatives whose text equals the query's own positive", False
    )
    use_mrl: bool = key(_LOSS, "", "Matryoshka: losses on the prefixes 8, 16, 32, ... as well", False)
    teacher_model_path: str | None = key(_LOSS, "folder or hub id", "distil from this model; null = off", None)
    teacher_revision: str | None = key(
        _LOSS, "commit, tag or branch", "which revision of teacher_model_path, a hub id; null = its main branch", None
    )
    teacher_embeddings: str | None = free_key(
        _LOSS, "folder", "distil from the teacher's embeddings in it, made by tools.embed_store; null = off", None
    )
    kd_weight: float = key(_LOSS, "", "weight of the distillation loss", 1.0, low=0)

    learning_rate: float = key(_STEP, "", "peak of the schedule", 1e-4, above=0)
    min_lr: float = key(_STEP, "", "the least rate, warm-up included", 1e-6, low=0)
    scheduler_type: str = key(_STEP, "", "rate after warm-up", "cosine", choices=("cosine", "constant_with_warmup"))
    warmup_steps: int = key(_STEP, "optimizer updates", "linear rise from 0; 0 = none", 100, low=0)
    weight_decay: float = key(_STEP, "", "AdamW, on all weights; 0 = off", 1e-2, low=0)
    max_grad_norm: float = key(_STEP, "", "gradients are scaled down to this norm; 0 = off", 1.0, low=0)
    train_steps: int = free_key(
        _STEP,
        "optimizer updates",
        "stop after these, or after train_epochs, whichever comes first; -1 = off",
        -1,
        low=-1,
    )
    train_epochs: int = free_key(_STEP, "passes over all data", "stop after these, or after train_steps", 5, low=1)

    use_lora: bool = key(_LORA, "", "train adapters, freeze the rest", False)
    lora_r: int = key(_LORA, "", "rank of the adapters", 8, low=1)
    lora_alpha: int = key(_LORA, "", "adapters are scaled by lora_alpha / lora_r", 32, low=1)
    lora_dropout: float = key(_LORA, "share", "dropout before the adapters", 0.1, low=0)
    lora_target_modules: str | list[str] = key(
        _LORA, "", "layers to adapt: a list, a comma-separated string, or all-linear", "q_proj,v_proj"
    )

    log_interval: int = free_key(_OUT, "steps", "between two log lines", 20, low=1)
    validation_steps: int = free_key(
        _OUT, "steps", "between two validations on the held-out 1 %; also at each epoch's end; 0 = never", 100, low=0
    )
    evaluation_data_path: str | None = free_key(
        _EVALUATION, "folder", "of a retrieval set in BEIR's layout, or of several; or a list with commas", None
    )
    evaluation_steps: int = free_key(
        _EVALUATION, "steps", "between two searches in those sets; also after the last step; 0 = never", 500, low=0
    )
    evaluation_dims: int | str | list[int] | None = free_key(
        _EVALUATION,
        "dimensions",
        "evaluate embeddings cut to these too: a list, or with commas between; null = what use_mrl trains",
        None,
    )
    best_metric: str | None = free_key(
        _EVALUATION,
        "METRIC, SET/METRIC or SET/DIMENSIONS/METRIC",
        "keep the model with the highest in the folder best: nDCG@10, its mean over all sets, ...; null = off",
        None,
    )
    early_stopping_patience: int = free_key(
        _EVALUATION, "evaluations", "end the run after so many in a row without a better best_metric; 0 = off", 0, low=0
    )
    checkpointing_steps: int = free_key(
        _OUT, "steps", "between two model folders step_N; epoch_N and the last step always; 0 = only those", 100, low=0
    )
    model_folders_limit: int = free_key(
        _OUT, "folders", "keep so many model folders, the newest; 0 = all, as published", 0, low=0
    )
    save_dtype: str = free_key(
        _OUT,
        "",
        "weights in model folders; auto = bfloat16 under bf16 training, else float32",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    query_instruction: str | None = free_key(
        _OUT,
        "text",
        "instruction in the saved folder's query prompt; null = what most retrieval queries carry; empty = none",
        None,
    )
    license: str | None = free_key(_OUT, "", "of the model card, as the hub spells it: apache-2.0; null = none", None)
    language: str | None = free_key(_OUT, "codes", "of the model card: en, or en,de; null = none", None)
    push_to_hub: bool = free_key(_OUT, "", "at the end push the folder best, else the last one, to hub_model_id", False)
    hub_model_id: str | None = free_key(_OUT, "hub id", "NAME/MODEL; made private if it does not exist yet", None)
    report_to: str = free_key(
        _OUT, "", "comma-separated trackers: tensorboard, wandb, ...; none = only metrics.jsonl", "tensorboard"
    )
    cache_only: bool = free_key(
        _DATA, "", "the warm-up run: build and verify the cache, say what it holds, exit", False
    )
    save_every_minutes: float = free_key(
        _OUT, "minutes", "save a state, for a resume, at least this often; 0 = only with model folders", 30.0, low=0
    )
    save_total_limit: int = free_key(_OUT, "states", "keep so many states, the newest", 2, low=1)
    resume: str = free_key(
        _OUT, "folder", "auto: continue where the same run ended; never: refuse its folder; or a state's folder", "auto"
    )
    max_skipped_steps: int = free_key(
        _STEP, "optimizer updates", "end the run after more in a row with a gradient that is not finite", 3, low=0
    )
    process_timeout: float = free_key(
        _OUT, "seconds", "end the run on all processes when one gives no sign of life for so long", 300.0, low=1
    )
    deterministic: bool = free_key(
        _MODEL, "", "on a GPU too, the same run ends in the same bits, also after a resume; slower", False
    )
    threads: int = free_key(
        _MODEL,
        "per process",
        "threads on a CPU; 0 = OMP_NUM_THREADS if you set it, else a share of the cores",
        0,
        low=0,
    )
    num_processes: int = free_key(_OUT, "", "a record: filled in with the number of processes that ran", 0, low=0)

    def negatives_for(self, task: str) -> int:
        """Hard negatives per tuple of this task: always 1 for classification, as published."""
        if task == "classification":
            return 1
        if task == "clustering" and self.num_hard_neg_clustering is not None:
            return self.num_hard_neg_clustering
        return self.num_hard_neg

    def lora_targets(self) -> list[str] | str:
        """lora_target_modules as peft wants it."""
        if self.lora_target_modules == "all-linear":
            return "all-linear"
        names = self.lora_target_modules
        if isinstance(names, str):
            names = names.split(",")
        return [name.strip() for name in names]

    def trackers(self) -> list[str]:
        """report_to as a list of names."""
        return [name.strip() for name in self.report_to.split(",") if name.strip() not in ("", "none")]


def parse(argv: list[str]) -> tuple[Args, list[str], set[str]]:
    """Read `--config file.json --key value ...`.

    Returns:
        args: always, so that what can be checked is checked.
        problems: all of them, each naming the key, the value, the rule and the remedy.
        unknown: keys whose value is not what the user meant (missing or refused); they hold a default or "".
    """
    keys = {f.name: f for f in fields(Args)}
    values, config, problems = read_command_line(argv, keys)
    unknown = set()
    if config is not None:
        from_file, file_problems = read_config(config)
        problems += file_problems
        if from_file is None:  # it may have given any key
            unknown = set(keys) - set(values)
        else:
            values = from_file | values
    good, wrong = _check_values(values, keys)
    problems += wrong
    required = [f.name for f in keys.values() if f.default is MISSING]
    missing = [name for name in required if name not in values and name not in unknown]
    problems += missing_problems(missing, config)
    unknown |= set(missing)
    unknown |= {name for name in values if name in keys and name not in good}
    args = Args(**dict.fromkeys(required, "") | good)
    return args, problems + _problems_between_keys(args, unknown), unknown


def _check_values(values: dict, keys: dict[str, Field]) -> tuple[dict, list[str]]:
    """(the values that are good, what is wrong with the others, one line each)."""
    good = {}
    unheard_of = []
    refused = []
    for name, value in values.items():
        if name not in keys:
            unheard_of.append(f"{name}: no such key{what_it_may_be(name, keys)}")
            continue
        problem = value_problem(keys[name], value)
        if problem:
            refused.append(f"{name}: {problem}")
        else:
            good[name] = normalised(keys[name], value)
    return good, unheard_of + refused


def _problems_between_keys(args: Args, unknown: set[str]) -> list[str]:
    """What is wrong between keys or with the world, one line each; nothing is said of what is unknown."""
    problems = []

    def refuse(line: str, *because_of: str) -> None:
        if not unknown & set(because_of):
            problems.append(line)

    if not re.fullmatch(r"[A-Za-z0-9_+#-][A-Za-z0-9._+#-]{0,127}", args.experiment_id):
        rule = "becomes a folder: use up to 128 of A-Z a-z 0-9 . _ + # -, no leading dot"
        refuse(f"experiment_id: {args.experiment_id!r} {rule}", "experiment_id")
    if args.min_lr > args.learning_rate:
        refuse(f"min_lr: {args.min_lr} is above learning_rate {args.learning_rate}", "min_lr", "learning_rate")
    if args.train_steps == 0:
        refuse("train_steps: 0 would train nothing; -1 leaves it to train_epochs", "train_steps")
    if args.lora_dropout >= 1:
        refuse(f"lora_dropout: {args.lora_dropout} must be below 1", "lora_dropout")
    if args.seed >= 2**31:
        refuse(f"seed: {args.seed} must be below 2^31", "seed")
    if not Path(args.train_data_path).is_dir():
        line = f"train_data_path: {args.train_data_path}: no such folder; tokenize_data_qwen.py makes it"
        refuse(line, "train_data_path")
    return problems + _revision_problems(args, unknown) + _folder_problems(args, unknown)


def _revision_problems(args: Args, unknown: set[str]) -> list[str]:
    problems = []
    for name, path_key in (("model_revision", "model_path"), ("teacher_revision", "teacher_model_path")):
        revision, path = getattr(args, name), getattr(args, path_key)
        if revision is None or unknown & {name, path_key}:
            continue
        if path is None:
            problems.append(f"{name}: {revision!r} is given, but {path_key} is not: leave {name} out")
        elif Path(path).is_dir():
            problems.append(f"{name}: {revision!r} is given, but {path_key} is a folder: only a hub id has revisions")
    return problems


def _folder_problems(args: Args, unknown: set[str]) -> list[str]:
    problems = []
    for name in ("output_dir", "tb_dir", "cache_dir"):
        folder = getattr(args, name)
        reason = unwritable(folder)
        if reason and name not in unknown:
            problems.append(f"{name}: {folder}: {reason}")
    return problems


def keys_that_may_change() -> set[str]:
    """Keys whose values a resumed run may change: they alter nothing that is trained."""
    return {f.name for f in fields(Args) if f.metadata["may_change"]}


def help_text() -> str:
    """What `run.py --help` prints: every key with unit, default and effect, by group."""
    lines = [f"usage: {USAGE}", "", "Keys go into the JSON file or on the command line, which wins."]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        for f in fields(Args):
            if f.metadata["group"] == group:
                lines += _help_of(f)
    return "\n".join(lines)


def _help_of(f: Field) -> list[str]:
    unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
    choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
    return [f"  --{f.name} {show_default(f)}{unit}", f"        {f.metadata['effect']}{choices}"]


def defaults() -> dict:
    """Key -> default, of the keys that have one."""
    return {f.name: f.default for f in fields(Args) if f.default is not MISSING}
