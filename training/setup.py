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
from data.plan import Plan
from data.token_store import TokenStore
from losses import matryoshka_weights
from model import FrozenEmbedder
from retrieval.beir import RetrievalSet
from runtime import computing, engine, resume
from runtime.background import StateWriter
from training import best
from training.activations import choose_activation_policy, count_cost
from training.advice import announce, choose_query_instruction, warn
from training.best import Evaluations
from training.continuing import refuse_changes, run_folder
from training.folders import BEST, steps_of
from training.identity import run_identity
from training.loss_memory import LossShape, loss_bytes
from training.memory import Cost
from training.meter import Clock, Meter
from training.models import load_models
from training.objective import LOSSES, Objective
from training.policy import find_usual_step
from training.recipes import Recipe, expected_losses
from training.records import Metrics, write_manifest
from training.schedule import Schedule
from training.steps import lay_out_steps
from training.trackers import start_trackers
from utils import put_back, write_json


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
    steps_done: int  # by this run, and by what it continues from
    skipped: int  # updates left out in a row
    evaluations: Evaluations
    clock: Clock | None = None  # of the loop, while it runs

    @property
    def is_finished(self) -> bool:
        """Whether all was trained that this run is to train."""
        return self.steps_done >= self.schedule.steps or self.evaluations.is_over

    @property
    def tasks(self) -> dict[str, str]:
        """Dataset name -> task, in the order of the datasets."""
        return {store.name: store.task for store in self.feed.stores}

    @property
    def expected_losses(self) -> list[tuple[str, str]]:
        """(task, loss) of everything that these data train with: each has its column on the console."""
        return expected_losses(self.recipes, distils=self.teacher is not None or bool(self.feed.embeddings))


def setup(args: Args, accelerator: Accelerator, stores: list, recipes: list, tokenizer, sets: list = ()) -> Run:
    """Load the models, lay out the data, and write the run's first files.

    Args:
        stores: each a TokenStore, the data.
        recipes: each a Recipe, how they are trained.
        sets: each a RetrievalSet, to evaluate in.

    Raises:
        RunError: on every process: a problem that shows only once the processes or the model are there.
    """
    # what is trained, and in which order
    prepare_device(args, accelerator)
    args = record_processes(args, accelerator)
    plan, schedule = lay_out_steps(args, stores, recipes, accelerator.num_processes)
    model, teacher, attention = load_models(args, accelerator)
    known = embedding_store.open_all(args.teacher_embeddings, stores, model.hidden_size)
    objectives = make_objectives(args, recipes, model.hidden_size)
    optimizer = make_optimizer(args, model)

    # what a person should know before it begins
    announce(args, accelerator, plan, schedule, attention, model)
    query_instruction, line = choose_query_instruction(args.query_instruction, stores)
    accelerator.print(line)
    warn(args, accelerator, plan, schedule, stores, recipes, model)

    # whether the folder holds an earlier part of this run
    folder = run_folder(args)
    identity = run_identity(args, plan, schedule, stores, recipes, tokenizer, model, accelerator.mixed_precision)
    if engine.is_deepspeed(accelerator):
        accelerator.print("DeepSpeed: an interrupted run cannot continue; with configs/accelerate_config.yaml it can")
    lock = resume.lock_folder(folder) if accelerator.is_main_process else None
    state_folder = folder / "state"
    steps_done, facts, tensors = resume.find(accelerator, args.resume, state_folder)
    refuse_changes(args, identity, facts)
    write_first_files(args, accelerator, folder, stores, recipes, resumed=bool(facts))

    # onto the device, in steps that fit its memory
    cost = count_cost(args, accelerator, model)
    torch.cuda.empty_cache()  # of the trials on a GPU; what is reserved in small pieces would count as taken
    model, optimizer = engine.prepare(accelerator, model, optimizer, args.train_batch_size, args.max_grad_norm)
    losses = loss_bytes(loss_shape(args, recipes, plan, objectives[0], teacher))
    max_tokens_per_forward = fit_into_memory(args, accelerator, stores, recipes, plan, model, cost, losses)
    feed = make_feed(accelerator, stores, recipes, plan, max_tokens_per_forward, known)

    # what is counted, written and evaluated
    meter = Meter([store.name for store in stores], LOSSES, accelerator.device)
    if facts:
        meter.load(resume.restore(accelerator, model, optimizer, tensors))
        accelerator.print(f"continuing after step {steps_done} of {schedule.steps}")
    start_trackers(accelerator, args.trackers(), args.experiment_id, folder, asdict(args), steps_done)
    metrics = Metrics(accelerator, folder, facts.get("sizes", {}))
    evaluations = make_evaluations(args, accelerator, sets, objectives[0], metrics, steps_done, facts.get("best"))

    run = Run(
        args=args,
        accelerator=accelerator,
        tokenizer=tokenizer,
        feed=feed,
        batches=Prefetcher(feed, accelerator.device.type == "cuda", computing.first_in_thread(accelerator.device)),
        schedule=schedule,
        model=model,
        teacher=teacher,
        optimizer=optimizer,
        recipes=recipes,
        objectives=objectives,
        meter=meter,
        metrics=metrics,
        folder=folder,
        lock=lock,
        identity=identity,
        query_instruction=query_instruction,
        resumable=not engine.is_deepspeed(accelerator),
        states=StateWriter(accelerator, state_folder, args.save_total_limit),
        steps_done=steps_done,
        skipped=facts.get("skipped", 0),
        evaluations=evaluations,
    )
    get_room_for_states(run)
    return run


def prepare_device(args: Args, accelerator: Accelerator) -> None:
    """Before anything is computed: with how many threads, and whether in the same bits each time."""
    computing.set_threads(accelerator.device, args.threads)
    if args.deterministic:
        computing.compute_deterministically()


def record_processes(args: Args, accelerator: Accelerator) -> Args:
    """The configuration with the number of processes that run, which its file only records."""
    processes = accelerator.num_processes
    if args.num_processes not in (0, processes):
        accelerator.print(f"num_processes {args.num_processes} is only a record: `accelerate launch` starts processes")
    return replace(args, num_processes=processes)


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


def write_first_files(
    args: Args, accelerator: Accelerator, folder: Path, stores: list[TokenStore], recipes: list[Recipe], resumed: bool
) -> None:
    """args.json, which runs again as a config; and where the run begins, the manifest. By the main process."""
    if not accelerator.is_main_process:
        return
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


def fit_into_memory(
    args: Args,
    accelerator: Accelerator,
    stores: list[TokenStore],
    recipes: list[Recipe],
    plan: Plan,
    model: torch.nn.Module,
    cost: Cost | None,
    losses: int,
) -> int:
    """Set what the model recomputes and keeps gathered. Returns the tokens of a forward pass at most, 0 = any number.

    Args:
        model: as the engine holds it.
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
    return policy.max_tokens_per_forward


def make_feed(
    accelerator: Accelerator,
    stores: list,
    recipes: list[Recipe],
    plan: Plan,
    max_tokens_per_forward: int,
    embeddings: list,
) -> Feed:
    """This process's part of every batch, cut into parts of at most `max_tokens_per_forward` tokens."""
    negatives = [recipe.negatives for recipe in recipes]
    max_lengths = [recipe.max_length for recipe in recipes]
    rank = accelerator.process_index
    world = accelerator.num_processes
    return Feed(stores, negatives, plan, max_lengths, rank, world, max_tokens_per_forward, embeddings)


def get_room_for_states(run: Run) -> None:
    """Begin to get the memory for the first state, where the run will write one."""
    if run.resumable and not run.is_finished:
        run.states.make_room(resume.like_part(run.accelerator, run.model, run.states.number, run.states.count))


def make_evaluations(
    args: Args,
    accelerator: Accelerator,
    sets: list[RetrievalSet],
    objective: Objective,
    metrics: Metrics,
    steps_done: int,
    best_of_state: int | None,
) -> Evaluations:
    """What the run evaluates, with the evaluations up to the step that it continues from; printed.

    Args:
        best_of_state: the step of the best model, by the state that the run continues from; None if it names none.
    """
    asked, _ = best.parse_dims(args.evaluation_dims)
    dims = best.all_dims(asked, list(objective.prefixes))
    names = [retrieval_set.name for retrieval_set in sets]
    choice = None
    if args.best_metric is not None:
        choice, _ = best.parse_choice(args.best_metric, names, dims)
    evaluations = Evaluations(sets, dims, args.evaluation_steps, choice, args.early_stopping_patience)
    for line in evaluations.lines():
        accelerator.print(line)
    for line in resume.from_main(accelerator, metrics.lines("evaluation")):
        evaluations.note(line["step"], line["sets"])
    best_folder = run_folder(args) / BEST
    kept = None
    if accelerator.is_main_process:
        put_back(best_folder)
        kept = steps_of(best_folder)
    # Before anybody asks whether the run is finished: patience counts from the model that was kept.
    evaluations.forget_lost_models(resume.from_main(accelerator, kept), steps_done, best_of_state)
    return evaluations
