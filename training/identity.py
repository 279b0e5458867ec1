"""What makes a run the run that it is: what a resume must find unchanged."""

import hashlib
import json
from dataclasses import asdict

import torch
from torch import nn

from arguments import Args, defaults, keys_that_may_change
from data.plan import Plan
from data.token_store import TokenStore
from modeling.tokenizer import fingerprint
from training.schedule import Schedule

_SAMPLED = 64  # numbers of each weight


def run_identity(
    args: Args, schedule: Schedule, plan: Plan, stores: list[TokenStore], tokenizer, model: nn.Module
) -> dict:
    """Name -> value of the keys that change what is trained, and of data, tokenizer, model and global batch."""
    free_to_change = keys_that_may_change()
    identity = {key: value for key, value in asdict(args).items() if key not in free_to_change}
    for store in stores:
        identity[f"dataset {store.name}"] = store.meta["sha256"]["tuples"][:16]
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    identity["weights"] = weights_digest(model)
    identity["model"] = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    identity["tokenizer"] = fingerprint(tokenizer)
    identity["global batch"] = plan.global_batch
    identity["steps"] = None if schedule.constant else schedule.steps  # a cosine depends on where it ends
    return identity


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Names the weights that training begins with, by 64 evenly spaced numbers of each: 16 hex digits.

    Under LoRA the base is in no state, so another base of the same shapes would go unnoticed. Adapters are left out:
    the seed makes them.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), device=flat.device, dtype=torch.float64)
        digest.update(flat[places.long()].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def what_old_states_stand_for(identity: dict) -> dict:
    """Name -> what a state that says nothing of it stands for: it was written before there was such a key."""
    stands_for = defaults() | {"weights": identity["weights"]}
    return {name: value for name, value in stands_for.items() if name in identity}
