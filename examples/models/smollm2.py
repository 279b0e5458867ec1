"""SmolLM2-135M-Instruct as a plain model folder, from the GGUF file that a Python package carries.

    python -m examples.models.smollm2 FOLDER [--layers 8] [--gguf FILE]

The folder is like one from the hub: config.json, model.safetensors, tokenizer.json. Its EOS is <|im_end|> and pads as
well, so a mask made by comparing ids with the pad would hide the EOS, whose state is the embedding. `--layers n` keeps
the first n of the 30 layers and the final norm, as F2LLM-v2 prunes depth (section 3.3).
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from modeling.tokenizer import save_tokenizer
from modeling.versions import in_dtype
from utils import RunError, aside_of, file_digest, first_line, publish, read_json, remove, write_json

from . import weights

SOURCE = "source.json"  # what a folder was made from
# Keys that Transformers writes into the config of a model from GGUF, and that are not true of a plain folder.
GGUF_KEYS = ("quantization_config", "_name_or_path", "_model_name_or_path")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 when the folder cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to write")
    parser.add_argument("--layers", type=int, help="how many to keep, from the first on (default all)")
    parser.add_argument("--gguf", type=Path, help="a GGUF file (default that of the package)")
    flags = parser.parse_args(argv)
    try:
        make_backbone(flags.folder, flags.layers, flags.gguf)
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    print(flags.folder)
    return 0


def make_backbone(folder: Path, layers: int | None = None, gguf: Path | None = None) -> None:
    """Write the folder, unless it is already there, made from the same file with as many layers.

    Args:
        layers: the first so many are kept; None = all.
        gguf: a decoder as GGUF, with its tokenizer; None = that of the package.

    Raises:
        RunError: the package is missing or damaged, the file is not a decoder in GGUF, or has fewer layers; or the
            folder exists and was not made here.
    """
    gguf = find_gguf(gguf, layers)
    if folder.exists() and not (folder / SOURCE).exists():
        raise RunError(f"{folder}: exists and was not made by this command: give another folder")
    source = {"file": gguf.name, "sha256": file_digest(gguf), "layers": layers}
    if is_made_from(folder, source):
        return
    model, tokenizer = read_gguf(gguf)
    tokenizer.pad_token = tokenizer.eos_token
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    first_layers(model, layers or model.config.num_hidden_layers).save_pretrained(aside)
    save_tokenizer(tokenizer, aside, model.config.max_position_embeddings)
    write_json(aside / SOURCE, source)
    publish(folder)


def find_gguf(path: Path | None, layers: int | None) -> Path:
    """The file to read, after a look at its header: `path`, or that of the package.

    Raises:
        RunError: there is no such file, it is not GGUF, or it has fewer layers.
    """
    if path is None:
        path = weights.locate(weights.SMOLLM2)
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    try:
        import gguf
    except ImportError:
        raise RunError("reading GGUF needs the package gguf: pip install -r requirements-dev.txt") from None
    try:
        fields = gguf.GGUFReader(path).fields
        (depth,) = [field.contents() for name, field in fields.items() if name.endswith(".block_count")]
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise RunError(f"{path}: cannot be read as a decoder in GGUF ({first_line(error)})") from None
    if layers is not None and not 1 <= layers <= depth:
        raise RunError(f"layers: {layers} is not between 1 and {depth}, the layers of {path}")
    return path


def is_made_from(folder: Path, source: dict) -> bool:
    """Whether the folder was made of this source. It has its name only when it is whole."""
    try:
        return read_json(folder / SOURCE) == source
    except (OSError, ValueError):
        return False


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The decoder of a GGUF file in fp32, without its language-model head, and its tokenizer.

    Raises:
        RunError: Transformers cannot read the file, or weights are missing in it.
    """
    try:
        model, found = AutoModel.from_pretrained(
            path.parent, gguf_file=path.name, output_loading_info=True, **in_dtype(torch.float32)
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError, TypeError, NotImplementedError) as error:
        raise RunError(f"{path}: cannot be read as a decoder in GGUF ({first_line(error)})") from None
    if found["missing_keys"]:  # Transformers would start them at random
        raise RunError(f"{path}: it lacks {', '.join(sorted(found['missing_keys']))}")
    if model.config.eos_token_id is None:
        raise RunError(f"{path}: its tokenizer has no EOS")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)  # Transformers 4.51 puts BOS here
    return model, tokenizer


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A plain model of the first layers, with embeddings and final norm, of which a folder can be written.

    The model that Transformers reads from GGUF refuses to be saved: its config says that it is quantised.
    """
    settings = model.config.to_dict()
    for key in GGUF_KEYS:
        settings.pop(key, None)
    settings["num_hidden_layers"] = layers
    settings["pad_token_id"] = settings["eos_token_id"]
    config = type(model.config).from_dict(settings)
    plain = AutoModel.from_config(config, **in_dtype(torch.float32))
    wanted = plain.state_dict()
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in wanted})
    return plain


if __name__ == "__main__":
    sys.exit(main())
