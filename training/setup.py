"""A training run, put together: data, models, optimizer, objective, and where an earlier one stopped.

run.py calls `setup` once everything was checked, and hands what it makes to the loop. It takes the configuration whole.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from arguments import Args
from data import embedding_store
from data.feed import Feed, Prefetcher
from data.plan import Plan, split_sizes
from data.token_store import TokenStore
from export.model_folder import Facts
from losses import matryoshka_weights
from model import Embedder, FrozenEmbedder
from modeling.hub import at_revision
from runtime import engine, resume
from runtime.background import StateWriter
from training.activations import choose_activation_policy, count_cost
from training.advice import choose_query_instruction, large_output, unexpected
from training.identity import run_identity, what_old_states_stand_for
from training.loss_memory import LossShape, loss_bytes
from training.memory import Cost
from training.meter import Clock, Meter
from training.models import load_models, trained_share
from training.objective import LOSSES, Objective
from training.policy import find_usual_step
from training.recipes import Recipe, expected_losses
from training.records import Metrics, write_manifest
from training.schedule import Schedule
from utils import RunError, plural, write_json


@dataclass
class Run:
    """The objects that make up one training run."""

    args: Args
    accelerator: Accelerator
    tokenizer: object
    feed: Feed  # the data, as this process meets them
    batches: Prefetcher  # the feed's training batches, made one step ahead
    schedule: Schedule
    model: torch.nn.Module  # an Embedder, as accelerate prepared it
    teacher: FrozenEmbedder | None
    optimizer: torch.optim.Optimizer
    recipes: list[Recipe]  # how each dataset is trained
    objectives: list[Objective]  # what a step with each dataset minimises
    meter: Meter
    metrics: Metrics
    folder: Path
    lock: object  # on the folder, held by the main process as long as it lives
    identity: dict  # what a resume must find unchanged
    query_instruction: str  # of the saved folders' query prompt; "" for none
    resumable: bool
    states: StateWriter
    steps_done: int  # by this run, and by what it goes on from
    skipped: int  # updates left out in a row
    clock: Clock | None = None  # of the loop, while it runs

    @property
    def tasks(self) -> dict[str, str]:
        """Dataset name -> task, in the order of the datasets."""
        return {store.name: store.task for store in self.feed.stores}

    @property
    def expected_losses(self) -> list[tuple[str, str]]:
        """(task, loss) of everything that these data train with: each has its column on the console."""
        return expected_losses(self.recipes, distils=self.teacher is not None or bool(self.feed.embeddings))


def setup(args: Args, accelerator: Accelerator, stores: list[TokenStore], recipes: list[Recipe], tokenizer) -> Run:
    """Load the models, lay out the data, and write the run's first files.

    Raises:
        RunError: on every process: a problem that shows only once the processes or the model are there.
    """
    prepare_device(args, accelerator)
    args = record_processes(args, accelerator)
    plan, schedule = lay_out_steps(args, stores, recipes, accelerator.num_processes)
    model, teacher, attention = load_models(args, accelerator)
    known = embedding_store.open_all(args.teacher_embeddings, stores, model.hidden_size)
    announce(args, accelerator, plan, schedule, attention, model)
    query_instruction, line = choose_query_instruction(args.query_instruction, stores)
    accelerator.print(line)
    warnings = unexpected(args, plan, schedule, stores, recipes)
    for line in [*warnings, *large_output(args, accelerator, plan, schedule, model)]:
        accelerator.print(f"warning: {line}")
    objectives = make_objectives(args, recipes, model.hidden_size)
    optimizer = make_optimizer(args, model)
    folder = Path(args.output_dir) / args.experiment_id
    identity = run_identity(args, schedule, plan, stores, recipes, tokenizer, model) | embedding_store.identity(known)
    refuse_with_deepspeed(args, accelerator, folder)
    accelerator.wait_for_everyone()  # all have looked before anything is written
    lock = resume.lock_folder(folder) if accelerator.is_main_process else None
    unsaid = what_old_states_stand_for(identity)
    state_folder = folder / "state"
    steps_done, facts, tensors = resume.find(accelerator, args.resume, state_folder, identity, args.model_path, unsaid)
    if accelerator.is_main_process:
        write_first_files(args, accelerator, folder, stores, recipes, resumed=bool(facts))
    cost = count_cost(args, accelerator, model)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()  # of the trials; what is reserved in small pieces would count as taken
    model, optimizer = engine.prepare(accelerator, model, optimizer, args.train_batch_size, args.max_grad_norm)
    losses = loss_bytes(loss_shape(args, recipes, plan, objectives[0], teacher))
    feed = make_feed(args, accelerator, stores, recipes, plan, model, cost, losses)
    feed = replace(feed, embeddings=known)
    meter = Meter([store.name for store in stores], LOSSES, accelerator.device)
    if facts:
        earlier_sums = resume.restore(accelerator, model, optimizer, tensors)
        meter.load(earlier_sums.to(accelerator.device))
        accelerator.print(f"going on after step {steps_done} of {schedule.steps}")
    start_trackers(args, accelerator, steps_done)
    return Run(
        args=args,
        accelerator=accelerator,
        tokenizer=tokenizer,
        feed=feed,
        batches=Prefetcher(feed, pin=accelerator.device.type == "cuda"),
        schedule=schedule,
        model=model,
        teacher=teacher,
        optimizer=optimizer,
        recipes=recipes,
        objectives=objectives,
        meter=meter,
        metrics=Metrics(accelerator, folder, facts.get("sizes", {})),
        folder=folder,
        lock=lock,
        identity=identity,
        query_instruction=query_instruction,
        resumable=not engine.is_deepspeed(accelerator),
        states=StateWriter(accelerator, state_folder, args.save_total_limit),
        steps_done=steps_done,
        skipped=facts.get("skipped", 0),
    )


def prepare_device(args: Args, accelerator: Accelerator) -> None:
    """Before anything is computed: with how many threads, and whether in the same bits each time."""
    engine.set_threads(accelerator.device, args.threads)
    if args.deterministic:
        engine.compute_deterministically()


def record_processes(args: Args, accelerator: Accelerator) -> Args:
    """The configuration with the number of processes that run, which its file only records."""
    processes = accelerator.num_processes
    if args.num_processes not in (0, processes):
        accelerator.print(f"num_processes {args.num_processes} is only a record: `accelerate launch` starts processes")
    return replace(args, num_processes=processes)


def lay_out_steps(args: Args, stores: list[TokenStore], recipes: list[Recipe], processes: int) -> tuple[Plan, Schedule]:
    """The order of the data, and the learning rate over the steps that it makes."""
    sizes = tuple(split_sizes(len(store.tuples))[0] for store in stores)
    weights = tuple(recipe.sampling_weight for recipe in recipes)
    plan = Plan(sizes, args.train_batch_size * processes, args.seed, weights)
    steps = args.train_epochs * plan.steps_per_epoch
    if args.train_steps > 0:  # whichever comes first, as published
        steps = min(steps, args.train_steps)
    constant = args.scheduler_type == "constant_with_warmup"
    return plan, Schedule(args.learning_rate, args.min_lr, args.warmup_steps, steps, constant)


def announce(
    args: Args, accelerator: Accelerator, plan: Plan, schedule: Schedule, attention: str, model: Embedder
) -> None:
    """The start-up line: what is trained, for how long, on what."""
    facts = [
        plural(schedule.steps, "step"),
        f"{plan.steps_per_epoch:,} an epoch",
        f"global batch {plan.global_batch}",
        f"processes: {args.num_processes}",
        f"mixed precision: {accelerator.mixed_precision}",
        f"attention: {attention}",
    ]
    if accelerator.device.type == "cpu":
        facts.insert(5, f"threads: {torch.get_num_threads()}")
    if args.use_lora:
        facts.append(f"LoRA of rank {args.lora_r}: {trained_share(model):.2%} of the weights are trained")
    if args.use_mrl:
        dims = sorted(matryoshka_weights(model.hidden_size))
        facts.append(f"Matryoshka: {', '.join(map(str, dims))} dimensions")
    if args.teacher_embeddings:
        facts.append(f"teacher: its embeddings in {args.teacher_embeddings}")
    if args.teacher_model_path:
        facts.append(f"teacher: {at_revision(args.teacher_model_path, args.teacher_revision)}")
    accelerator.print(f"training {at_revision(args.model_path, args.model_revision)}: {', '.join(facts)}")
    if accelerator.mixed_precision == "no" and engine.gpu_with_bf16():
        accelerator.print(
            "warning: in fp32 on a GPU that has bf16: several times slower, and twice the activations; "
            "accelerate launch --mixed_precision bf16"
        )


def make_objectives(args: Args, recipes: list[Recipe], hidden_size: int) -> list[Objective]:
    """What a step minimises, by dataset."""
    prefixes = matryoshka_weights(hidden_size) if args.use_mrl else {hidden_size: 1.0}
    objectives = []
    for recipe in recipes:
        objectives.append(
            Objective(recipe.temperature, prefixes, args.gather_with_grad, args.kd_weight, args.mask_same_text)
        )
    return objectives


def make_optimizer(args: Args, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as published, over what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True
    )


def refuse_with_deepspeed(args: Args, accelerator: Accelerator, folder: Path) -> None:
    """Refuse what does not go with DeepSpeed, which keeps weights and moments in a way of its own.

    Raises:
        RunError: the step shall run in parts, or the folder holds a run.
    """
    if not engine.is_deepspeed(accelerator):
        return
    if args.max_tokens_per_forward:
        raise RunError("max_tokens_per_forward: not under DeepSpeed; take configs/accelerate_config.yaml")
    if (folder / "args.json").exists():
        raise RunError(f"{folder}: holds a run already, and DeepSpeed's do not resume: choose another experiment_id")
    accelerator.print("DeepSpeed: an interrupted run cannot go on; configs/accelerate_config.yaml can")


def write_first_files(
    args: Args, accelerator: Accelerator, folder: Path, stores: list[TokenStore], recipes: list[Recipe], resumed: bool
) -> None:
    """args.json, which runs again as a config; and where the run begins, the manifest."""
    write_json(folder / "args.json", asdict(args))
    if resumed:
        return
    checksums = {store.name: store.meta["sha256"] for store in stores}
    if args.teacher_embeddings:
        checksums = embedding_store.with_checksums(Path(args.teacher_embeddings), checksums)
    tasks = {store.name: store.task for store in stores}
    settings = {recipe.name: recipe.changes() for recipe in recipes if recipe.changed}
    write_manifest(folder / "manifest.json", accelerator, checksums, tasks, settings)


def loss_shape(
    args: Args, recipes: list[Recipe], plan: Plan, objective: Objective, teacher: FrozenEmbedder | None
) -> LossShape:
    """What the memory of this process's losses depends on, in the largest step."""
    teacher_width = teacher.hidden_size if teacher is not None else 0
    if args.teacher_embeddings:
        teacher_width = max(objective.prefixes)  # of an array only the columns that the student needs are read
    return LossShape(
        tuples=args.train_batch_size,
        global_batch=plan.global_batch,
        negatives=max(recipe.negatives for recipe in recipes),
        prefixes=tuple(objective.prefixes),
        width=max(objective.prefixes),
        retrieval=any(recipe.in_batch for recipe in recipes),
        teacher_width=teacher_width,
    )


def make_feed(
    args: Args,
    accelerator: Accelerator,
    stores: list[TokenStore],
    recipes: list[Recipe],
    plan: Plan,
    model: torch.nn.Module,
    cost: Cost | None,
    losses: int,
) -> Feed:
    """This process's part of every batch, cut into parts that fit its memory.

    Args:
        model: as the engine holds it; what it recomputes and keeps gathered is set here too.
        cost: from `count_cost`.
        losses: bytes that they need.
    """
    negatives = [recipe.negatives for recipe in recipes]
    max_lengths = [recipe.max_length for recipe in recipes]
    usual = find_usual_step(stores, negatives, plan, max_lengths, accelerator.num_processes)
    policy = choose_activation_policy(args, accelerator, model, cost, usual, max(max_lengths), losses)
    accelerator.unwrap_model(model).recompute(policy.recompute_every)
    if policy.keep_gathered:
        engine.keep_gathered(accelerator, model)
    return Feed(
        stores,
        negatives,
        plan,
        max_lengths,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        budget=policy.token_limit,
    )


def start_trackers(args: Args, accelerator: Accelerator, steps_done: int) -> None:
    """TensorBoard and others; a resumed run draws no second curve over its first."""
    if not args.trackers():
        return
    options = {}
    if steps_done and "tensorboard" in args.trackers():
        options["tensorboard"] = {"purge_step": steps_done + 1}
    accelerator.init_trackers(args.experiment_id, init_kwargs=options)


def model_facts(run: Run, step: int) -> Facts:
    """What a model folder says about its training."""
    args = run.args
    training = {"steps": step, "global_batch": run.feed.plan.global_batch}
    for key in ("learning_rate", "temperature", "num_hard_neg", "seed", "use_mrl", "use_lora", "teacher_model_path"):
        training[key] = getattr(args, key)
    for key in ("model_revision", "teacher_revision", "teacher_embeddings"):
        if getattr(args, key) is not None:
            training[key] = getattr(args, key)
    if run.feed.embeddings:
        training["teacher_model_path"] = run.feed.embeddings[0].meta["model"]
    for recipe in run.recipes:
        if recipe.changed:
            training[f"settings of {recipe.name}"] = recipe.words()
    prefixes = run.objectives[0].prefixes
    return Facts(
        hidden_size=max(prefixes),
        max_seq_length=args.max_seq_length,
        query_instruction=run.query_instruction,
        base_model=args.model_path,
        matryoshka_dims=sorted(prefixes) if args.use_mrl else [],
        training=training,
        datasets=dict(zip(run.tasks, run.feed.plan.sizes, strict=True)),
    )
