"""The configuration: published keys keep their meaning, and every mistake is named with its remedy, all at once.

python -m pytest tests/test_arguments.py
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import arguments
from arguments import Args
from configuration.other_names import ALIASES, HINTS

ROOT = Path(__file__).parent.parent
REQUIRED = {
    "model_path": "m", "experiment_id": "e", "output_dir": "o", "tb_dir": "t", "cache_dir": "c", "train_data_path": ".",
}  # fmt: skip
SHIPPED = sorted(
    [
        *ROOT.glob("configs/**/config*.json"),
        *ROOT.glob("configs/v2/stage*.json"),
        *ROOT.glob("examples/**/config*.json"),
    ]
)
PUBLISHED = {
    "model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "train_data_path", "train_batch_size",
    "max_seq_length", "learning_rate", "min_lr", "weight_decay", "warmup_steps", "num_hard_neg",
    "train_steps", "train_epochs", "log_interval", "checkpointing_steps", "validation_steps", "num_processes",
    "use_mrl", "teacher_model_path", "kd_weight", "scheduler_type", "num_hard_neg_clustering", "use_lora",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
}  # fmt: skip


def parse(tmp_path, values: dict | str, *words: str) -> tuple[Args, list[str]]:
    path = tmp_path / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(REQUIRED | values))
    return arguments.parse(["--config", str(path), *words])[:2]


def test_all_published_keys_exist_with_their_published_defaults(tmp_path):
    assert {f.name for f in fields(Args)} >= PUBLISHED
    args, problems = parse(tmp_path, {})
    assert problems == []
    published = {
        "train_batch_size": 8, "max_seq_length": 2048, "learning_rate": 1e-4, "min_lr": 1e-6, "weight_decay": 0.01,
        "warmup_steps": 100, "num_hard_neg": 7, "train_steps": -1, "train_epochs": 5, "log_interval": 20,
        "checkpointing_steps": 100, "validation_steps": 100, "scheduler_type": "cosine", "kd_weight": 1.0,
        "temperature": 0.05, "max_grad_norm": 1.0, "seed": 0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    assert args.gradient_checkpointing is None  # published: always; here a difference, named in docs/differences.md


def test_the_command_line_wins_over_the_file(tmp_path):
    values = {"learning_rate": 1e-5, "use_mrl": True, "num_hard_neg_clustering": 9}
    args, _ = parse(tmp_path, values, "--learning_rate", "3e-4", "--use_mrl=False", "--num_hard_neg_clustering", "none")
    assert (args.learning_rate, args.use_mrl, args.num_hard_neg_clustering) == (3e-4, False, None)
    args, _ = parse(tmp_path, values, "--experiment_id", "123", "--train_steps", "-1")
    assert (args.experiment_id, args.train_steps, args.learning_rate) == ("123", -1, 1e-5)


@pytest.mark.parametrize("revision", ["1234567", "1.0", "12e4", "true", "main"])
def test_a_revision_that_looks_like_a_number_is_a_text(tmp_path, revision):
    args, problems = parse(tmp_path, {}, "--model_revision", revision)
    assert problems == []
    assert args.model_revision == revision
    args, problems = parse(tmp_path, {"model_revision": "v1"}, "--model_revision", "none")
    assert (args.model_revision, problems) == (None, [])


def test_a_resolved_configuration_runs_again(tmp_path):
    args, _ = parse(tmp_path, {"learning_rate": 1, "lora_target_modules": ["q_proj"]})
    again, problems = parse(tmp_path, json.dumps(asdict(args)))
    assert problems == []
    assert again == args
    assert isinstance(again.learning_rate, float)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "q_proj, v_proj", ["q_proj", "v_proj"]])
def test_lora_targets_as_string_or_list(tmp_path, targets):
    args, _ = parse(tmp_path, {"lora_target_modules": targets})
    assert args.lora_targets() == ["q_proj", "v_proj"]
    assert parse(tmp_path, {"lora_target_modules": "all-linear"})[0].lora_targets() == "all-linear"


def test_negatives_by_task():
    v1, v2 = Args(**REQUIRED), Args(**REQUIRED, num_hard_neg_clustering=9)
    tasks = ("retrieval", "clustering", "classification")
    assert [v1.negatives_for(task) for task in tasks] == [7, 7, 1]
    assert [v2.negatives_for(task) for task in tasks] == [7, 9, 1]
    assert [Args(**REQUIRED, num_hard_neg=0).negatives_for(task) for task in tasks] == [0, 0, 1]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"learning_rat": 1}, "learning_rat: no such key; did you mean learning_rate?"),
        ({"per_device_train_batch_size": 4}, "did you mean train_batch_size?"),
        ({"zzz": 1}, "zzz: no such key; python run.py --help lists them"),
        ({"gradient_accumulation_steps": 4}, "raise train_batch_size"),
        ({"bf16": True}, "bf16: no such key; precision is the launcher's: accelerate launch --mixed_precision bf16"),
        ({"fp16": True}, "fp16: no such key; not supported; train in bf16"),
        ({"fsdp": "full_shard"}, "fsdp: no such key; the engine is the launcher's"),
        ({"deepspeed": "x.json"}, "configs/accelerate_deepspeed.yaml"),
        ({"threads": -1}, "threads: -1 is below 0"),
        ({"train_batch_size": "8"}, 'train_batch_size: "8" is not a whole number; leave out the quotes'),
        ({"train_batch_size": 8.5}, "train_batch_size: 8.5 is not a whole number"),
        ({"train_batch_size": True}, "train_batch_size: true is not a whole number"),
        ({"train_batch_size": 0}, "train_batch_size: 0 is below 1"),
        ({"use_mrl": 1}, "use_mrl: 1 is not true or false"),
        ({"use_mrl": "true"}, 'use_mrl: "true" is not true or false; leave out the quotes'),
        ({"model_path": 3}, "model_path: 3 is not a text"),
        ({"model_path": ""}, "model_path: must not be empty"),
        ({"model_path": None}, "model_path: null is not a text"),
        ({"learning_rate": 0}, "learning_rate: 0 must be above 0"),
        ({"learning_rate": 1e-7}, "min_lr: 1e-06 is above learning_rate 1e-07"),
        ({"scheduler_type": "cosin"}, "did you mean cosine?"),
        ({"attn_backend": "flash"}, "attn_backend: \"flash\" is not one of auto, varlen, segments, buckets, padded"),
        ({"train_steps": 0}, "train_steps: 0 would train nothing"),
        ({"experiment_id": "../escape"}, "experiment_id: '../escape' becomes a folder"),
        ({"experiment_id": ".hidden"}, "becomes a folder"),
        ({"lora_target_modules": [1]}, "lora_target_modules: [1] is not a text or a list of texts"),
        ({"lora_target_modules": []}, "lora_target_modules: [] is not"),
        ({"lora_dropout": 1}, "lora_dropout: 1.0 must be below 1"),
        ({"train_data_path": "no/such/folder"}, "train_data_path: no/such/folder: no such folder"),
        ({"learning_rate": 10**400}, "is not a number"),
        ({"output_dir": "README.md/below"}, "README.md is a file"),
        ({"seed": 2**31}, "seed: 2147483648 must be below 2^31"),
        ({"model_revision": ""}, "model_revision: must not be empty"),
        (
            {"model_revision": "v1", "model_path": "."},
            "model_revision: 'v1' is given, but model_path is a folder: only a hub id has revisions",
        ),
        ({"teacher_revision": "v1"}, "teacher_revision: 'v1' is given, but teacher_model_path is not"),
        ({"teacher_revision": "v1", "teacher_model_path": "."}, "but teacher_model_path is a folder"),
    ],
)  # fmt: skip
def test_one_mistake(tmp_path, values, problem):
    _, problems = parse(tmp_path, values)
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "must be one object"),
        ('{"seed": 1, "seed": 2}', "seed: given twice"),
        ('{"learning_rate": NaN}', "NaN is not a number"),
        ('{"learning_rate": Infinity}', "Infinity is not a number"),
        ('{"learning_rate": 1e999}', "learning_rate"),
    ],
)
def test_hostile_json(tmp_path, text, problem):
    _, problems = parse(tmp_path, text)
    assert any(problem in line for line in problems)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--config", "nowhere.json"], "--config nowhere.json: No such file"),
        (["config.json"], "config.json: expected --key value"),
        (["--seed"], "--seed: a value must follow"),
        (["--seed", "--use_mrl", "true"], "--seed: a value must follow"),
        ([], "no --config, and these keys are missing: model_path, experiment_id, output_dir, tb_dir, cache_dir"),
    ],
)
def test_hostile_command_lines(words, problem):
    _, problems, _ = arguments.parse(words)
    assert any(problem in line for line in problems)


def test_a_hint_names_no_key_and_no_file_that_is_not_there():
    for name, hint in HINTS.items():
        assert name not in Args.__dataclass_fields__
        for word in hint.replace(":", " ").replace(",", " ").split():
            assert not word.startswith("configs/") or (ROOT / word).is_file()
    assert "max_tokens_per_forward" in Args.__dataclass_fields__
    assert set(ALIASES.values()) <= Args.__dataclass_fields__.keys()


def test_threads_may_change_when_a_run_goes_on():
    assert "threads" in arguments.keys_that_may_change()
    assert Args(**REQUIRED).threads == 0


def test_all_mistakes_are_said_at_once(tmp_path):
    values = {"sed": 1, "train_batch_size": "x", "temperature": -1, "use_lora": "yes"}
    values |= {"train_data_path": "no/such/folder", "min_lr": 1.0}
    _, problems = parse(tmp_path, values, "--log_interval", "0")
    assert len(problems) == 7  # what one key breaks does not hide what others do


def test_what_is_unknown_is_not_judged(tmp_path):
    _, problems, unknown = arguments.parse(["--train_data_path", "no/such", "--learning_rate", "x", "--min_lr", "5"])
    assert unknown == {"model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "learning_rate"}
    assert not any(line.startswith("min_lr") for line in problems)  # nothing to compare it with
    assert any(line.startswith("train_data_path: no/such: no such folder") for line in problems)
    (tmp_path / "config.json").write_text("{")
    _, problems, unknown = arguments.parse(["--config", str(tmp_path / "config.json"), "--seed", "1"])
    assert len(problems) == 1  # and not a word about keys that the file may hold
    assert "seed" not in unknown
    assert "model_path" in unknown


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_is_valid(path, tmp_path):
    values = json.loads(path.read_text())
    args, problems = parse(tmp_path, values | {"train_data_path": "."})
    assert problems == []
    assert args.train_epochs > 0


def test_shipped_configs_carry_the_published_recipe():
    config = json.loads((ROOT / "configs" / "config.json").read_text())
    recipe = {"learning_rate": 1e-5, "min_lr": 1e-7, "weight_decay": 0.01, "warmup_steps": 500, "train_epochs": 2,
              "max_seq_length": 1024, "num_hard_neg": 7, "checkpointing_steps": 5000,
              "train_batch_size": 32}  # fmt: skip
    assert {name: config[name] for name in recipe} == recipe
    lora = json.loads((ROOT / "configs" / "config_lora.json").read_text())
    published = {
        "use_lora": True,
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_target_modules": "q_proj,v_proj",
    }
    assert {name: lora[name] for name in published} == published


def test_help_names_every_key():
    text = arguments.help_text()
    assert all(f"--{f.name} " in text for f in fields(Args))
