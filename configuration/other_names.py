"""What people type who come from other trainers, and what it is called here, or where it is instead of a key."""

from configuration.keys import did_you_mean

# Of the Hugging Face Trainer.
ALIASES = {
    "per_device_train_batch_size": "train_batch_size",
    "num_train_epochs": "train_epochs",
    "max_steps": "train_steps",
    "lr": "learning_rate",
    "resume_from_checkpoint": "resume",
    "logging_steps": "log_interval",
    "save_steps": "checkpointing_steps",
    "eval_steps": "validation_steps",
    "metric_for_best_model": "best_metric",
    "lr_scheduler_type": "scheduler_type",
    "model_name_or_path": "model_path",
    "max_length": "max_seq_length",
    "attn_implementation": "attn_backend",
}
# What people look for that is not a key here, and where to find it instead.
HINTS = {
    "gradient_accumulation_steps": "a batch of any size runs in parts by itself, with all its in-batch negatives: "
    "raise train_batch_size (max_tokens_per_forward limits a part)",
    "bf16": "precision is the launcher's: accelerate launch --mixed_precision bf16, or mixed_precision in its config",
    "instruction": "it belongs to tokenize_data_qwen.py: --instruction TEXT",
    "sampling_weight": "it is a setting of a dataset, in dataset_settings.json beside the data",
    "task": "it belongs to tokenize_data_qwen.py: --task TASK",
    "fp16": "not supported; train in bf16: accelerate launch --mixed_precision bf16",
    "load_best_model_at_end": "best_metric keeps the best model in the folder best, beside the last one",
    "fsdp": "the engine is the launcher's: accelerate launch --config_file configs/accelerate_config.yaml",
    "deepspeed": "the engine is the launcher's: accelerate launch --config_file configs/accelerate_deepspeed.yaml",
}


def what_it_may_be(name: str, known) -> str:
    """Words for the end of a line about an unknown key `name`: what it is called here, or where to look."""
    if name in HINTS:
        return f"; {HINTS[name]}"
    if name in ALIASES:
        return f"; did you mean {ALIASES[name]}?"
    return did_you_mean(name, known) or "; python run.py --help lists them"
