"""Everything a user may say to run.py: one dataclass, its checks, JSON plus --key value.

    python run.py --config configs/config.json --learning_rate 2e-5 --use_mrl true

A value on the command line wins over the JSON file, the file wins over the defaults below. A user's mistake
raises nothing here: `parse` returns every problem it found, one line each, for the caller to print at once.
"""

import difflib
import json
import os
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from utils import read_strictly

USAGE = "python run.py --config configs/config.json [--key value ...]"
# What people type who come from the Hugging Face Trainer, and what it is called here.
ALIASES = {
    "per_device_train_batch_size": "train_batch_size",
    "num_train_epochs": "train_epochs",
    "max_steps": "train_steps",
    "logging_steps": "log_interval",
    "save_steps": "checkpointing_steps",
    "eval_steps": "validation_steps",
    "lr_scheduler_type": "scheduler_type",
    "model_name_or_path": "model_path",
    "max_length": "max_seq_length",
    "attn_implementation": "attn_backend",
}
_MODEL, _DATA, _LOSS, _STEP, _LORA, _OUT = "Model", "Data", "Losses", "Optimizer and schedule", "LoRA", "Output"


def _key(group: str, unit: str, effect: str, default: Any = MISSING, low=None, above=None, choices=None) -> Any:
    """One knob: where it belongs, its unit, what it does (and what turns it off), its default and bounds."""
    facts = {"group": group, "unit": unit, "effect": effect, "low": low, "above": above, "choices": choices}
    return field(default=default, metadata=facts)


@dataclass
class Args:
    """The resolved configuration. Keys of the published scripts keep their names, meanings and defaults."""

    model_path: str = _key(_MODEL, "folder or hub id", "the decoder to start from")
    experiment_id: str = _key(_OUT, "name", "names this run's folders below output_dir and tb_dir")
    output_dir: str = _key(_OUT, "folder", "results go to output_dir/experiment_id")
    tb_dir: str = _key(_OUT, "folder", "TensorBoard logs go to tb_dir/experiment_id")
    cache_dir: str = _key(_DATA, "folder", "converted published data and verification marks; shared by runs")
    train_data_path: str = _key(_DATA, "folder", "token stores, or the published scripts' tokenised Parquet (v1 or v2)")

    train_batch_size: int = _key(
        _DATA, "tuples per process", "global batch = this times processes; more in-batch negatives", 8, low=1
    )
    max_seq_length: int = _key(_DATA, "tokens", "longer texts are cut here, EOS kept; shorter is cheaper", 2048, low=2)
    num_hard_neg: int = _key(
        _DATA, "per tuple", "hard negatives drawn each epoch; cost grows with 2 + this; 0 = none", 7, low=0
    )
    num_hard_neg_clustering: int | None = _key(
        _DATA, "per tuple", "the same for clustering data; null = as num_hard_neg (v1); v2 used 9", None, low=0
    )
    seed: int = _key(_DATA, "", "data order, negatives, LoRA initialisation, dropout", 0, low=0)

    attn_backend: str = _key(
        _MODEL, "", "how packed texts meet attention; all are exact", "auto",
        choices=("auto", "varlen", "segments", "buckets", "padded"),
    )  # fmt: skip
    max_tokens_per_forward: int | None = _key(
        _MODEL, "tokens",
        "a step with more runs part by part, exactly, for one more forward pass; 0 = no limit; null = what fits memory",
        None, low=0,
    )  # fmt: skip
    gradient_checkpointing: bool | int | None = _key(
        _MODEL, "",
        "recompute activations, far less memory for a quarter more work; k = in every k-th layer; true as published; "
        "null = as much as memory asks for",
        None, low=0,
    )  # fmt: skip
    compile: bool = _key(
        _MODEL, "", "torch.compile of the decoder's layers, a minute once; pays in long runs on a GPU", False
    )
    liger: bool = _key(_MODEL, "", "Liger's RMSNorm, RoPE and SwiGLU on a GPU; pip install liger-kernel", False)

    temperature: float = _key(_LOSS, "", "divides cosine similarities; lower is sharper", 0.05, above=0)
    gather_with_grad: bool = _key(
        _LOSS, "", "true: the report's equation; false: no in-batch gradient to positives, as published on GPUs", True
    )
    mask_same_text: bool = _key(
        _LOSS, "", "leave out in-batch negatives that are the query's own positive, shared with another query", False
    )
    use_mrl: bool = _key(_LOSS, "", "Matryoshka: losses on the prefixes 8, 16, 32, ... as well", False)
    teacher_model_path: str | None = _key(_LOSS, "folder or hub id", "distil from this model; null = off", None)
    kd_weight: float = _key(_LOSS, "", "weight of the distillation loss", 1.0, low=0)

    learning_rate: float = _key(_STEP, "", "peak of the schedule", 1e-4, above=0)
    min_lr: float = _key(_STEP, "", "floor of the schedule, warm-up included", 1e-6, low=0)
    scheduler_type: str = _key(_STEP, "", "after warm-up", "cosine", choices=("cosine", "constant_with_warmup"))
    warmup_steps: int = _key(_STEP, "optimizer updates", "linear rise from 0; 0 = none", 100, low=0)
    weight_decay: float = _key(_STEP, "", "AdamW, on all weights; 0 = off", 1e-2, low=0)
    max_grad_norm: float = _key(_STEP, "", "gradients are scaled down to this norm; 0 = off", 1.0, low=0)
    train_steps: int = _key(
        _STEP, "optimizer updates", "stop after these; wins over train_epochs; -1 = off", -1, low=-1
    )
    train_epochs: int = _key(_STEP, "passes over all data", "used when train_steps is -1", 5, low=1)

    use_lora: bool = _key(_LORA, "", "train adapters, freeze the rest", False)
    lora_r: int = _key(_LORA, "", "rank of the adapters", 8, low=1)
    lora_alpha: int = _key(_LORA, "", "adapters are scaled by lora_alpha / lora_r", 32, low=1)
    lora_dropout: float = _key(_LORA, "share", "dropout before the adapters", 0.1, low=0)
    lora_target_modules: str | list = _key(
        _LORA, "", "layers to adapt: a list, a comma-separated string, or all-linear", "q_proj,v_proj"
    )

    log_interval: int = _key(_OUT, "steps", "a log line each", 20, low=1)
    validation_steps: int = _key(
        _OUT, "steps", "validation on the held-out 1 %, and at each epoch's end; 0 = never", 100, low=0
    )
    checkpointing_steps: int = _key(
        _OUT, "steps", "a model folder step_N each; epoch_N and the last step always; 0 = only those", 100, low=0
    )
    save_dtype: str = _key(
        _OUT,
        "",
        "weights in model folders; auto = bfloat16 under bf16 training, else float32",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    query_instruction: str = _key(
        _OUT,
        "text",
        "goes into the saved folder's query prompt; train with the same one; empty = none",
        "Given a question, retrieve passages that can help answer the question.",
    )
    report_to: str = _key(
        _OUT, "", "comma-separated trackers: tensorboard, wandb, ...; none = only metrics.jsonl", "tensorboard"
    )
    cache_only: bool = _key(_DATA, "", "the warm-up run: build and verify the cache, say what it holds, exit", False)
    save_every_minutes: float = _key(
        _OUT, "minutes", "save what a resume needs by the clock as well; 0 = only with the model folders", 30.0, low=0
    )
    save_total_limit: int = _key(_OUT, "states", "how many of those are kept; the newest always", 2, low=1)
    resume: str = _key(
        _OUT, "folder", "auto: go on where the same run ended; never: refuse its folder; or a state's folder", "auto"
    )
    max_skipped_steps: int = _key(
        _STEP, "optimizer updates", "left out in a row for a gradient that is not finite, before the run ends", 3, low=0
    )
    process_timeout: float = _key(
        _OUT, "seconds", "a process without a sign of life for this long ends the run on all of them", 300.0, low=1
    )
    num_processes: int = _key(_OUT, "", "a record: filled in with the number of processes that ran", 0, low=0)

    def negatives_for(self, task: str) -> int:
        """Hard negatives a tuple of this task: 1 for classification, as published."""
        if task == "classification":
            return min(1, self.num_hard_neg)
        own = self.num_hard_neg_clustering if task == "clustering" else None
        return self.num_hard_neg if own is None else own

    def lora_targets(self) -> list[str] | str:
        """lora_target_modules as peft wants it."""
        if self.lora_target_modules == "all-linear":
            return "all-linear"
        names = self.lora_target_modules
        return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]

    def trackers(self) -> list[str]:
        """report_to as a list of names."""
        return [name.strip() for name in self.report_to.split(",") if name.strip() not in ("", "none")]

    def to_json(self) -> str:
        """The configuration as a JSON page that run.py accepts again."""
        return json.dumps(asdict(self), indent=2) + "\n"


def parse(argv: list[str]) -> tuple[Args, list[str], set[str]]:
    """Read `--config file.json --key value ...`.

    Returns:
        args: always, so that what can be checked is checked.
        problems: all of them, each naming the key, the value, the rule and the remedy.
        unknown: keys whose value is not what the user meant (missing or refused); they hold a default or "".
    """
    overrides, config, problems = _command_line(argv)
    values, unread = _read_json(config) if config else ({}, [])
    known = {f.name: f for f in fields(Args)}
    lost = set() if values is not None else set(known) - set(overrides)  # what an unreadable file may have said
    values = (values or {}) | overrides
    problems += unread + [f"{name}: no such key{_did_you_mean(name, known)}" for name in values if name not in known]
    values = {name: value for name, value in values.items() if name in known}
    wrong = {name: why for name, value in values.items() if (why := _value_problem(known[name], value))}
    problems += [f"{name}: {why}" for name, why in wrong.items()]
    required = {f.name for f in known.values() if f.default is MISSING}
    missing = [name for name in known if name in required - set(values) - lost]
    problems += [f"{name}: missing; give it in the config file or as --{name}" for name in missing]
    sound = {name: _coerced(known[name], value) for name, value in values.items() if name not in wrong}
    args = Args(**dict.fromkeys(required, "") | sound)
    unknown = lost | set(missing) | set(wrong)
    return args, problems + [line for keys, line in _rules(args) if not keys & unknown], unknown


def help_text() -> str:
    """What `run.py --help` prints: every key with unit, default and effect, by group."""
    lines = [f"usage: {USAGE}", "", "Keys go into the JSON file or on the command line, which wins."]
    for group in (_MODEL, _DATA, _LOSS, _STEP, _LORA, _OUT):
        lines += ["", f"{group}:"]
        for f in fields(Args):
            if f.metadata["group"] == group:
                unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
                choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
                lines.append(f"  --{f.name} {show_default(f)}{unit}\n        {f.metadata['effect']}{choices}")
    return "\n".join(lines)


def show_default(f) -> str:
    """A key's default as JSON."""
    return "*required*" if f.default is MISSING else json.dumps(f.default)


def _command_line(argv: list[str]) -> tuple[dict, str | None, list[str]]:
    """--key value and --key=value pairs as (values, config path, problems)."""
    values, config, problems = {}, None, []
    words = [
        part for word in argv for part in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])
    ]
    kinds = {f.name: f.type for f in fields(Args)}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word}: expected --key value")
        elif not words or words[0].startswith("--"):
            problems.append(f"{word}: a value must follow")
        elif word == "--config":
            config = words.pop(0)
        else:
            values[word[2:]] = _from_text(kinds.get(word[2:]), words.pop(0))
    return values, config, problems


def _read_json(path: str) -> tuple[dict | None, list[str]]:
    """A config file as (values, problems): one flat object, no key twice, no NaN. None where it is none at all."""
    try:
        values, problems = read_strictly(Path(path))
    except OSError as error:
        return None, [f"--config {path}: {error.strerror}"]
    except ValueError as error:
        return None, [f"--config {path}: not JSON ({error})"]
    if not isinstance(values, dict):
        return None, [f"--config {path}: must be one object of keys and values"]
    return values, problems


def _did_you_mean(name: str, known: dict) -> str:
    close = [ALIASES[name]] if name in ALIASES else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; python run.py --help lists them"


def _rules(args: Args) -> list[tuple[set[str], str]]:
    """What is wrong between keys or with the world: (the keys that it follows from, a line)."""
    name_rule = "becomes a folder: use up to 128 of A-Z a-z 0-9 . _ + # -, no leading dot"
    named = re.fullmatch(r"[A-Za-z0-9_+#-][A-Za-z0-9._+#-]{0,127}", args.experiment_id)
    ordered = args.min_lr <= args.learning_rate
    folders = [(key, getattr(args, key)) for key in ("output_dir", "tb_dir", "cache_dir")]
    rules = [
        ({"experiment_id"}, f"experiment_id: {args.experiment_id!r} {name_rule}", named),
        ({"min_lr", "learning_rate"}, f"min_lr: {args.min_lr} is above learning_rate {args.learning_rate}", ordered),
        ({"train_steps"}, "train_steps: 0 would train nothing; -1 leaves it to train_epochs", args.train_steps != 0),
        ({"lora_dropout"}, f"lora_dropout: {args.lora_dropout} must be below 1", args.lora_dropout < 1),
        ({"seed"}, f"seed: {args.seed} must be below 2^31", args.seed < 2**31),
        ({"train_data_path"},
         f"train_data_path: {args.train_data_path}: no such folder; tokenize_data_qwen.py makes it",
         Path(args.train_data_path).is_dir()),
        *(({key}, f"{key}: {path}: {why}", why is None) for key, path in folders for why in [_unwritable(path)]),
    ]  # fmt: skip
    return [(keys, line) for keys, line, holds in rules if not holds]


# ----------------------------------------------------------------------------------- one value


def _from_text(kind: Any, text: str) -> Any:
    """A word of the command line as the JSON value it stands for; texts stay texts."""
    if kind is str:
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none", "null") else text)
    except ValueError:
        return None if text.lower() == "none" else text


def _value_problem(f, value: Any) -> str | None:
    """Why `value` cannot be the value of field `f`, or None."""
    shown, kinds = json.dumps(value), get_args(f.type) or (f.type,)
    if not any(_is_a(kind, value) for kind in kinds):
        names = " or ".join(
            {
                str: "a text",
                int: "a whole number",
                float: "a number",
                bool: "true or false",
                list: "a list of texts",
                type(None): "null",
            }[kind]
            for kind in kinds
        )
        hint = "; leave out the quotes" if isinstance(value, str) and _is_a(kinds[0], _from_text(None, value)) else ""
        return f"{shown} is not {names}{hint}"
    low, above, choices = f.metadata["low"], f.metadata["above"], f.metadata["choices"]
    if value is None:
        return None
    if low is not None and value < low:
        return f"{shown} is below {low}"
    if above is not None and value <= above:
        return f"{shown} must be above {above}"
    if choices and value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        return f"{shown} is none of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    return "must not be empty" if value == "" and f.metadata["unit"] != "text" else None


def _coerced(f, value: Any) -> Any:
    """1 as 1.0 and ~ as the home folder, so that args.json does not depend on how it was written."""
    if f.metadata["unit"].startswith("folder") and isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    return float(value) if f.type is float else value


def _unwritable(folder: str) -> str | None:
    """Why nothing can be written below a folder that may not exist yet, or None."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK) else f"{nearest} may not be written to"


def _is_a(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e300  # also not NaN
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
