"""The steps of a run: which data each of them trains on, and its learning rate."""

from arguments import Args
from data.plan import Plan, split_sizes
from data.token_store import TokenStore
from training.recipes import Recipe
from training.schedule import Schedule


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
