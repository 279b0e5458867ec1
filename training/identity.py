"""What makes a run the run that it is: what a resume must find unchanged."""

import json
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from arguments import Args, defaults, keys_that_may_change
from data.embedding_store import teacher_identity, texts_of
from data.plan import Plan
from data.token_store import TokenStore
from modeling.tokenizer import fingerprint
from modeling.versions import settings_of
from runtime.collectives import all_rows
from runtime.sharding import rows_here
from training.recipes import Recipe
from training.schedule import Schedule
from utils import short_digest

_SAMPLED = 64  # numbers of each weight
KNOWN_LATE = ("precision", "weights")  # parts of an identity: known when the model and its device are there
_WITHOUT_EFFECT = {  # keys of a config that change no embedding; the weights' sizes are in their digest
    "_name_or_path",
    "architectures",
    "attention_dropout",  # a teacher is never in training mode
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "matryoshka_dimensions",
    "pad_token_id",
    "pretraining_tp",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_size",
}


def run_identity(
    args: Args,
    plan: Plan,
    schedule: Schedule,
    stores: list[TokenStore],
    recipes: list[Recipe],
    tokenizer,
    model: nn.Module,
    precision: str,
) -> dict:
    """Name -> value of all that identifies a run. Of a sharded model a collective.

    Args:
        precision: in which the model computes, as accelerate calls it: "no" is fp32.
    """
    identity = described_identity(args, plan, schedule, stores, recipes, tokenizer, model)
    return identity | {"precision": precision, "weights": weights_digest(model)}


def key_identity(args: Args) -> dict:
    """Name -> value of the keys that change what is trained."""
    free_to_change = keys_that_may_change()
    return {key: value for key, value in asdict(args).items() if key not in free_to_change}


def described_identity(
    args: Args,
    plan: Plan,
    schedule: Schedule,
    stores: list[TokenStore],
    recipes: list[Recipe],
    tokenizer,
    model: nn.Module,
) -> dict:
    """Name -> value of the keys that change what is trained, and of data, steps, tokenizer, model and global batch.

    All that identifies a run but its weights: the model may be on the meta device. Of a dataset's settings only what
    they change counts: a setting that repeats the configuration does not.
    """
    identity = key_identity(args)
    for store in stores:
        identity[f"dataset {store.name}"] = store.meta["sha256"]["tuples"][:16]
        identity[f"texts of {store.name}"] = _texts_digest(store)
        identity[f"task of {store.name}"] = store.task
    for recipe in recipes:
        if recipe.changed:
            identity[f"settings of {recipe.name}"] = recipe.words()
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    identity["model"] = short_digest(json.dumps(shapes))
    identity["tokenizer"] = fingerprint(tokenizer)
    identity["global batch"] = plan.global_batch
    identity["steps"] = None if schedule.constant else schedule.steps  # a cosine depends on where it ends
    return identity | teacher_identity(args.teacher_embeddings, stores)


def _texts_digest(store: TokenStore) -> str:
    """Names the texts of a store by their checksums in meta.json: 16 hex digits.

    Beside the tuples, which are text numbers and stay the same when texts are tokenised with another instruction.
    """
    return short_digest(json.dumps(texts_of(store), sort_keys=True))


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Names the weights that training begins with, by 64 evenly spaced numbers of each: 16 hex digits.

    Needed under LoRA, whose states do not hold the base: another one of the same shapes would go unnoticed. Adapters
    are left out, since the seed makes them. A sharded model has the same digest as a whole one; for it this is a
    collective.
    """
    samples = [_sample(parameter) for name, parameter in model.named_parameters() if "lora_" not in name]
    bits = torch.cat(samples)  # [numbers of all weights]
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        bits = all_rows(bits, dist.get_world_size()).amax(0)  # of the process that holds each
    return short_digest(bits.cpu().numpy().astype(np.uint32).tobytes())


def _sample(weight: Tensor) -> Tensor:
    """Evenly spaced numbers of a weight, at most _SAMPLED: the bits of each in fp32, int64; -1 where it is not here."""
    count = weight.numel()
    places = torch.linspace(0, count - 1, min(_SAMPLED, count), dtype=torch.float64).long()
    here = weight.detach()
    if isinstance(weight, DTensor):
        first_row, _ = rows_here(weight)
        places -= first_row * (count // len(weight))
        here = here.to_local().to(weight.device_mesh.device_type)
    found = torch.full(places.shape, -1, device=here.device)
    is_here = (places >= 0) & (places < here.numel())
    numbers = here.reshape(-1)[places[is_here].to(here.device)].float()
    found[is_here.to(here.device)] = numbers.view(torch.int32).long() & 0xFFFFFFFF
    return found


def config_digest(config: PretrainedConfig) -> str:
    """Names what a decoder's config says of how its weights are used (rope, epsilon, windows, ...): 16 hex digits.

    What changes no embedding is left out, so a folder that was saved again, in another dtype or by another version of
    Transformers, has the same.
    """
    told = {name: value for name, value in settings_of(config).items() if name not in _WITHOUT_EFFECT}
    return short_digest(json.dumps(told, sort_keys=True, default=str))


def assumed_of_old_states(identity: dict) -> dict:
    """Name -> value to assume where a state lacks it, because it was written before there was such a key.

    For a key of the configuration that is the default. For weights, precision, texts and tasks, which cannot be known
    any more, it is what is there now, so that an old state is not refused for them.
    """
    assumed = {name: value for name, value in defaults().items() if name in identity}
    for name, value in identity.items():
        if name in KNOWN_LATE or name.startswith(("texts of ", "task of ")):
            assumed[name] = value
    return assumed
