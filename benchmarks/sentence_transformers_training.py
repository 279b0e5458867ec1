"""One training by Sentence Transformers' trainer, with everything set as run.py has it; benchmarks.quality calls it.

    python -m benchmarks.sentence_transformers_training TRAINING.json

The file holds a benchmarks.training_commands.Training and the name of a loss. The model folders go beside it as
checkpoint-N, and the training seconds after each step into seconds.json.
"""

import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
from sentence_transformers import SentenceTransformerTrainingArguments as TrainingArguments
from transformers import TrainerCallback

from benchmarks.training_commands import ADAM_BETAS, Training
from export import model_folder
from export.model_card import Facts
from modeling.backbone import load_backbone
from modeling.tokenizer import load_tokenizer
from utils import read_json, write_json

TEXTS_AT_ONCE = 32  # of a forward pass of the cached loss, its default


def main(path: Path) -> None:
    """Train as the file says."""
    content = read_json(path)
    loss_name = content.pop("loss")
    training = Training(**content)
    torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)
    folder = Path(training.folder)
    model = make_model(training, folder / "start")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=ADAM_BETAS, weight_decay=training.weight_decay, fused=True
    )
    clock = TrainingClock()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments_of(training),
        train_dataset=Dataset.from_parquet(training.raw, cache_dir=str(folder / "datasets")),
        loss=LOSSES[loss_name](model, 1 / training.temperature),
        callbacks=[clock],
        optimizers=(optimizer, None),  # the trainer makes the schedule
    )
    trainer.train()
    write_json(folder / "seconds.json", clock.seconds)


def make_model(training: Training, folder: Path) -> SentenceTransformer:
    """The backbone, pooled by the last token, with a tokenizer that appends EOS, from a folder as run.py saves it."""
    tokenizer, problems = load_tokenizer(training.model)
    if problems:
        raise ValueError(problems[0])
    backbone = load_backbone(training.model, torch.float32)
    facts = Facts(
        hidden_size=backbone.config.hidden_size,
        max_seq_length=training.max_seq_length,
        query_instruction="",  # it stands in the texts
        base_model=training.model,
        matryoshka_dims=[],
        training={},
        datasets={},
    )
    model_folder.save(folder, backbone, tokenizer, facts, torch.float32)
    return SentenceTransformer(str(folder), device="cpu")


def arguments_of(training: Training) -> TrainingArguments:
    """What the trainer is told: precision, schedule, clipping and batch as run.py has them."""
    return TrainingArguments(
        output_dir=training.folder,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch,
        dataloader_drop_last=True,
        dataloader_num_workers=0,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup_steps,
        max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        use_cpu=True,
        seed=training.seed,
        data_seed=training.seed,
        save_strategy="steps",
        save_steps=training.steps_per_save,
        save_only_model=True,
        logging_strategy="steps",  # loss and gradient norm of each step, as run.py is told to write
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


def in_batch_loss(model: SentenceTransformer, scale: float) -> torch.nn.Module:
    """Every document of the batch but the positive is a negative."""
    return losses.MultipleNegativesRankingLoss(model, scale=scale)


def cached_loss(model: SentenceTransformer, scale: float) -> torch.nn.Module:
    """The same loss with GradCache."""
    return losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=TEXTS_AT_ONCE)


LOSSES = {"st_in_batch": in_batch_loss, "st_cached": cached_loss}


class TrainingClock(TrainerCallback):
    """Training seconds after each step. It stands still while the trainer saves."""

    def __init__(self):
        self.seconds = []
        self.began = 0.0
        self.stopped = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The first step's batch is made from here on."""
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """The weights are updated; a save may follow."""
        self.stopped = time.perf_counter()
        self.seconds.append(self.stopped - self.began)

    def on_save(self, args, state, control, **kwargs) -> None:
        """The time since the step ended was not training."""
        self.began += time.perf_counter() - self.stopped


if __name__ == "__main__":
    main(Path(sys.argv[1]))
