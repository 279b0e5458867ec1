"""What a run tells a model folder about itself, the facts of its card; and the folder's way to the hub."""

from pathlib import Path

from export import hub
from export.model_folder import Facts
from training.folders import BEST, folder_name, steps_of
from training.records import Metrics, task_means
from training.setup import Run

_TOLD = (
    "learning_rate", "min_lr", "scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "temperature",
    "num_hard_neg", "seed", "use_mrl", "use_lora", "teacher_model_path",
)  # fmt: skip
_TOLD_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_TOLD_IF_GIVEN = ("num_hard_neg_clustering", "model_revision", "teacher_revision", "teacher_embeddings")


def model_facts(run: Run, step: int) -> Facts:
    """What a model folder says about its training. The results are those that metrics.jsonl has up to now."""
    args = run.args
    prefixes = run.objectives[0].prefixes
    return Facts(
        hidden_size=max(prefixes),
        max_seq_length=args.max_seq_length,
        query_instruction=run.query_instruction,
        base_model=args.model_path,
        matryoshka_dims=sorted(prefixes) if args.use_mrl else [],
        training=hyper_parameters(run, step),
        datasets=dict(zip(run.tasks, run.feed.plan.sizes, strict=True)),
        tasks=run.tasks,
        results=results(run.metrics, run.tasks),
        license=args.license,
        languages=hub.languages(args.language),
        hub_model_id=args.hub_model_id,
        base_on_hub=not Path(args.model_path).is_dir(),
    )


def hyper_parameters(run: Run, step: int) -> dict:
    """Key -> value of what the card says of the training."""
    args = run.args
    told = {"steps": step, "global_batch": run.feed.plan.global_batch, "precision": run.accelerator.mixed_precision}
    names = [*_TOLD, *(name for name in _TOLD_IF_GIVEN if getattr(args, name) is not None)]
    if args.use_lora:
        names += _TOLD_OF_LORA
    told |= {name: getattr(args, name) for name in names}
    if run.feed.embeddings:
        told["teacher_model_path"] = run.feed.embeddings[0].meta["model"]
    if told["teacher_model_path"] is not None:
        told["kd_weight"] = args.kd_weight
    for recipe in run.recipes:
        if recipe.changed:
            told[f"settings of {recipe.name}"] = recipe.words()
    return told


def results(metrics: Metrics, tasks: dict[str, str]) -> dict:
    """The figures of a card, as export/card_results.py has them: the last ones that metrics.jsonl has.

    Args:
        tasks: dataset -> task.
    """
    found = {}
    validations = [line for line in metrics.lines("validation") if line["measures"]]
    if validations:
        by_task: dict[str, dict[str, float]] = {}
        for (task, measure), value in task_means(validations[-1]["measures"], tasks).items():
            by_task.setdefault(task, {})[measure] = value
        found["held_out"] = {"step": validations[-1]["step"], "measures": by_task}
    evaluations = metrics.lines("evaluation")
    if evaluations:
        found["in_training"] = {"step": evaluations[-1]["step"], "sets": evaluations[-1]["sets"]}
    return found


def push(run: Run) -> None:
    """Push a finished run's model to the hub, where it was asked to; on the main process, once the others may go.

    Uploading takes minutes, and other processes that wait for it in a collective would give up.
    """
    if not (run.args.push_to_hub and run.is_finished and run.accelerator.is_main_process):
        return
    name = BEST
    if run.evaluations.best is None or not (run.folder / BEST).is_dir():
        last = run.steps_done
        name = folder_name(last, run.args.checkpointing_steps, last, run.feed.plan.steps_per_epoch)
        if run.args.best_metric is not None:
            chosen = f"there is no model that {run.args.best_metric} chose"
            print(f"{run.folder / BEST}: {chosen}: the last one, {name}, is pushed", flush=True)
    folder = run.folder / name
    print(hub.push(folder, run.args.hub_model_id, steps_of(folder)), flush=True)
