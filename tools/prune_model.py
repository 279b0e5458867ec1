"""Make a smaller decoder from a larger one: fewer layers, a narrower residual stream, narrower MLPs.

    python -m tools.prune_model --input qwen3-0.6b --output small --num_layers 8 --hidden_size 320 \\
        --intermediate_size 2048 --calibration texts.jsonl

Kept are the first layers, and the units whose activations have the largest norm on the calibration texts (F2LLM-v2,
section 3.3). Depth is cut first, so that units are judged by the layers that stay. The report says neither which norm
nor which texts; l2 weighs a unit by the energy that it carries. Texts should be like those that the model will read:
each line of the file is a JSON string, an object with "text", or a raw tuple in any column style that training data
may have, of which all texts are read.

The result is a decoder to train from. A model folder of this project keeps its pooling, prompts and card, and one of
Sentence Transformers its pooling and prompts. An adapter is merged first (python -m tools.merge_adapter).
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configuration.flag_parser import FlagParser
from data import raw_columns
from data.raw_formats import PARQUET, format_of
from export import model_folder
from modeling.backbone import load_backbone, read_config
from modeling.pooling import pooling_of
from modeling.pruning import NORMS, at_their_places, first_layers, importance, keep_units, pruned_config, strongest
from modeling.tokenizer import load_tokenizer, make_encoder, save_tokenizer
from modeling.versions import dtype_of
from utils import RunError, aside_of, exit_status, first_line, let_others_read, plural, publish, read_json, remove

UNIT_ORDERS = ("places", "ascending")
LINE_RULE = (
    "give a JSON string, an object with text, or a raw tuple: query and passage, anchor and positive, query and pos"
)
FILE_RULE = "not a file of JSON lines: give one with a JSON value a line (docs/recipes/distil.md makes one of raw data)"
LEAST = {"calibration_texts": 1, "max_seq_length": 2}  # a text of one token is EOS alone
SIZES = {"hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_layers": "num_hidden_layers"}


def main(argv: list[str]) -> int:
    """Prune. Returns the exit status: 0; 2 for refused input; 1 if the disk is full or forbids it."""
    return exit_status(partial(check_and_prune, parse(argv)))


def check_and_prune(flags: argparse.Namespace) -> None:
    """Find every problem that prevents it; or prune, and print the result. Raises RunError with all problems."""
    config, problems = read_config(flags.input)
    tokenizer, tokenizer_problems = load_tokenizer(flags.input)
    problems += tokenizer_problems
    problems += model_folder.modules_to_cut(Path(flags.input))
    if config is not None:
        problems += size_problems(flags, config)
    for name, least in LEAST.items():
        if getattr(flags, name) < least:
            problems.append(f"--{name} {getattr(flags, name)}: must be at least {least}")
    if Path(flags.output).exists():
        problems.append(f"--output {flags.output}: already exists")
    texts, text_problems = calibration_texts(flags)
    problems += text_problems
    if problems:
        raise RunError("\n".join(problems))
    transformers.utils.logging.disable_progress_bar()  # its bars tear the output apart
    try:
        model = load_backbone(flags.input, torch.float32)
        small = prune(model, tokenizer, texts, flags)
    except (ValueError, RunError) as error:
        raise RunError(first_line(error)) from error
    write(small, tokenizer, flags, dtype_of(config) or torch.float32)
    print(summary(model, small, texts))
    print(flags.output)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__, prog="python -m tools.prune_model")
    add = parser.add_argument
    add("--input", required=True, help="model folder or hub id")
    add("--output", type=Path, required=True, help="the folder to write; must not exist yet")
    add("--hidden_size", type=int, help="residual units to keep (default all)")
    add("--intermediate_size", type=int, help="units of each MLP to keep (default all)")
    add("--num_layers", type=int, help="layers to keep, from the first on (default all)")
    add("--calibration", type=Path, help="texts that rank the units; needed for --hidden_size, --intermediate_size")
    add("--calibration_texts", type=int, default=256, help="texts to draw from that file (default %(default)s)")
    add("--max_seq_length", type=int, default=512, help="cut these texts to this many tokens (default %(default)s)")
    add("--norm", choices=NORMS, default="l2", help="norm of the activations that ranks a unit (default %(default)s)")
    add("--unit_order", choices=UNIT_ORDERS, default="places",
        help="places: a residual unit keeps its number where that is possible, so that a student's units stand where "
        "its teacher's do; ascending: in the order of the old numbers (default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draw of texts (default %(default)s)")
    return parser.parse_args(argv)


def size_problems(flags: argparse.Namespace, config: PretrainedConfig) -> list[str]:
    """Sizes that the decoder cannot be cut to, one line each."""
    problems = []
    for flag, key in SIZES.items():
        wanted = getattr(flags, flag)
        largest = getattr(config, key, None)
        if largest is None:
            problems.append(f"{flags.input}: config.json has no {key}: only Qwen3 and Llama decoders are pruned")
        elif wanted is not None and not 1 <= wanted <= largest:
            problems.append(f"--{flag} {wanted}: must be between 1 and {largest}, the model's {key}")
    if all(getattr(flags, flag) is None for flag in SIZES):
        problems.append("nothing to prune: give --num_layers, --hidden_size or --intermediate_size")
    if not problems:
        problems += refused_by_transformers(flags, config)
    return problems


def refused_by_transformers(flags: argparse.Namespace, config: PretrainedConfig) -> list[str]:
    """What Transformers has against a decoder of these sizes: a Llama's hidden size is a multiple of its heads."""
    sizes = {flag: getattr(flags, flag) for flag in SIZES}
    try:
        pruned_config(config, **sizes)
    except Exception as error:  # a class of huggingface_hub's own, around the ValueError that says why
        return [f"Transformers refuses these sizes: {first_line(error.__cause__ or error)}"]
    return []


def needs_texts(flags: argparse.Namespace) -> bool:
    """Whether units are chosen, not layers alone."""
    return flags.hidden_size is not None or flags.intermediate_size is not None


def calibration_texts(flags: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The texts that rank the units, drawn from the file; and what is wrong with the file, at most a few lines."""
    if not needs_texts(flags):
        return [], []
    if flags.calibration is None:
        return [], ["--calibration: needed to choose units: a file of texts, one JSON value a line"]
    texts = []
    problems = []
    if flags.calibration.is_dir() or format_of(flags.calibration) == PARQUET:
        return [], [f"--calibration {flags.calibration}: {FILE_RULE}"]
    try:
        lines = flags.calibration.read_text(encoding="utf-8").split("\n")  # a JSON string may hold other line ends
    except UnicodeDecodeError:
        return [], [f"--calibration {flags.calibration}: {FILE_RULE}"]
    except OSError as error:
        return [], [f"--calibration {flags.calibration}: cannot be read ({first_line(error)})"]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found = texts_of_line(line)
            texts += found
            if not found:
                problems.append(f"{flags.calibration}, line {number}: {LINE_RULE}")
    if not texts and not problems:
        problems.append(f"--calibration {flags.calibration}: no text in it: on each line, {LINE_RULE}")
    count = min(len(texts), max(1, flags.calibration_texts))
    return random.Random(flags.seed).sample(texts, count), problems[:5]


def texts_of_line(line: str) -> list[str]:
    """The texts in one line of the file; an empty list where it has none of the forms, or only blank texts."""
    try:
        value = json.loads(line)
    except ValueError:
        return []
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, dict):
        return raw_columns.texts_of_row(value)
    return [value] if isinstance(value, str) and value.strip() else []


def prune(model: PreTrainedModel, tokenizer, texts: list[str], flags: argparse.Namespace) -> PreTrainedModel:
    """The smaller decoder, in fp32.

    Raises:
        ValueError: its weights are named otherwise than Qwen3's and Llama's.
    """
    if flags.num_layers is not None:
        model = first_layers(model, flags.num_layers)
    if not needs_texts(flags):
        return model
    encode = make_encoder(tokenizer, flags.max_seq_length)
    tokens = (torch.from_numpy(encode([text])[0]).long() for text in tqdm(texts, desc="calibrating", disable=None))
    found = importance(model, tokens, flags.norm)
    hidden = strongest(found.hidden, flags.hidden_size or model.config.hidden_size)
    if flags.unit_order == "places":
        hidden = at_their_places(hidden)
    mlp = [strongest(of_layer, flags.intermediate_size or model.config.intermediate_size) for of_layer in found.mlp]
    return keep_units(model, hidden, mlp)


def write(model: PreTrainedModel, tokenizer, flags: argparse.Namespace, dtype: torch.dtype) -> None:
    """Write the folder.

    For a model of this project it has pooling, prompts and card; otherwise decoder and tokenizer, and the pooling and
    prompts where the source is a Sentence Transformers folder.
    """
    source = Path(flags.input)
    if (source / "f2llm.json").is_file():
        facts = model_folder.Facts(**read_json(source / "f2llm.json"))
        dims = [dim for dim in facts.matryoshka_dims if dim < model.config.hidden_size]
        if facts.matryoshka_dims:
            dims.append(model.config.hidden_size)
        facts = replace(
            facts,
            hidden_size=model.config.hidden_size,
            matryoshka_dims=dims,
            base_model=str(source),
            base_on_hub=False,
            hub_model_id=None,
            cut_to=None,
            results={},  # they are the larger model's
        )
        model_folder.save(flags.output, model, tokenizer, facts, dtype, pooling=pooling_of(source))
        return
    aside = aside_of(flags.output)
    remove(aside)
    aside.mkdir(parents=True)
    prefixes = getattr(model.config, "matryoshka_dimensions", None) or []  # those that are left
    model_folder.save_weights(aside, model, model.state_dict(), dtype, prefixes)
    save_tokenizer(tokenizer, aside, model.config.max_position_embeddings)
    if (source / "modules.json").is_file():
        model_folder.copy_sentence_transformers_files(source, aside, model.config.hidden_size)
    let_others_read(aside)
    publish(flags.output)


def summary(model: PreTrainedModel, small: PreTrainedModel, texts: list[str]) -> str:
    """Sizes and parameters, before and after; and how many texts ranked the units, if any did."""
    lines = [f"{plural(len(texts), 'text')} ranked the units"] if texts else []
    for key in SIZES.values():
        lines.append(f"{key:20}{getattr(model.config, key):>14,} -> {getattr(small.config, key):,}")
    before = sum(weight.numel() for weight in model.parameters())
    after = sum(weight.numel() for weight in small.parameters())
    return "\n".join([*lines, f"{'parameters':20}{before:>14,} -> {after:,} ({after / before:.0%})"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
