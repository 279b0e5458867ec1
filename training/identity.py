"""What makes a run the run that it is: what a resume must find unchanged."""

import hashlib
import json
from dataclasses import asdict

from torch import nn

from arguments import Args, keys_that_may_change
from data.plan import Plan
from data.token_store import TokenStore
from modeling.tokenizer import fingerprint
from training.schedule import Schedule


def run_identity(
    args: Args, schedule: Schedule, plan: Plan, stores: list[TokenStore], tokenizer, model: nn.Module
) -> dict:
    """Name -> value of the keys that change what is trained, and of data, tokenizer, model and global batch."""
    free_to_change = keys_that_may_change()
    identity = {key: value for key, value in asdict(args).items() if key not in free_to_change}
    for store in stores:
        identity[f"dataset {store.name}"] = store.meta["sha256"]["tuples"][:16]
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    identity["model"] = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    identity["tokenizer"] = fingerprint(tokenizer)
    identity["global batch"] = plan.global_batch
    identity["steps"] = None if schedule.constant else schedule.steps  # a cosine depends on where it ends
    return identity
