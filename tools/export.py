"""Turn a saved model into what a server wants: adapters merged, weights in another type, fewer dimensions, ONNX.

    python -m tools.export --model output/RUN/epoch_2 --output served --dtype bf16
    python -m tools.export --model output/RUN/epoch_2 --output short --dimension 256
    python -m tools.export --model output/RUN/epoch_2 --output onnx --format onnx

A LoRA adapter is merged into its base model in fp32. With --dimension every program that reads the folder gets
embeddings of that many dimensions, of length one. What is written is read back and compared with the source before the
folder gets its name. docs/serving.md says which server reads what.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configuration.flag_parser import FlagParser
from configuration.flag_types import short_dtype
from export import convert, onnx_file
from export.model_card import Facts
from utils import RunError, exit_status

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS = ("safetensors", "onnx", "gguf")


def main(argv: list[str]) -> int:
    """Export. Returns the exit status: 0; 2 for refused input; 1 if the disk is full or forbids it."""
    return exit_status(partial(check_and_export, parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__, prog="python -m tools.export")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a model or adapter folder that run.py saved")
    add("--output", type=Path, required=True, help="the folder to write; must not exist yet")
    add(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="onnx: fp32, with the pooling in the graph; gguf: safetensors, and the llama.cpp commands that convert "
        "them are printed (default %(default)s)",
    )
    add(
        "--dtype",
        type=short_dtype,
        choices=DTYPES,
        help="type of the weights (default the model's own; fp32 for an adapter)",
    )
    add("--dimension", type=int, help="cut embeddings to their first dimensions (default all)")
    return parser.parse_args(argv)


def check_and_export(flags: argparse.Namespace) -> None:
    """Find every problem that prevents it; or export, and say what was written.

    Raises:
        RunError: the model cannot be exported so, its folder is damaged, or what was written is another model.
    """
    problems = find_problems(flags)
    if problems:
        raise RunError("\n".join(problems))
    convert.keep_quiet()
    try:
        lines = export(flags)
    except ValueError as error:  # a damaged folder, or another model read back
        raise RunError(str(error)) from error
    print("\n".join(lines))


def find_problems(flags: argparse.Namespace) -> list[str]:
    """Why this cannot be exported, one line each. Loads no weights."""
    problems = convert.source_problems(flags.model)
    if (flags.model / "f2llm.json").is_file():
        problems += facts_problems(flags)
    if flags.output.exists():
        problems.append(f"--output {flags.output}: already exists")
    problems += [f"--output {flags.output}: {path} is a file" for path in flags.output.parents if path.is_file()]
    return problems + format_problems(flags.format, flags.dtype, onnx_file.missing_packages())


def facts_problems(flags: argparse.Namespace) -> list[str]:
    """What is wrong with the model's facts, and with the dimension that is asked of it."""
    try:
        facts = convert.read_facts(flags.model)
    except ValueError as error:
        return [str(error)]
    problems = convert.dimension_problems(facts, flags.dimension)
    if flags.format == "gguf" and convert.shortened(facts, flags.dimension).cut_to is not None:
        problems.append("--format gguf: llama.cpp cannot cut embeddings; export all dimensions, cut what it returns")
    return problems


def format_problems(form: str, dtype: str | None, missing: list[str]) -> list[str]:
    """Why a format cannot be written in this type of weights, or with the packages that are not installed."""
    if form != "onnx":
        return []
    problems = []
    if dtype not in (None, "fp32"):
        problems.append(f"--dtype {dtype}: ONNX is written in fp32; onnxruntime's own tools can make it smaller")
    if missing:
        problems.append(f"--format onnx: needs {', '.join(missing)}: pip install {' '.join(onnx_file.PACKAGES)}")
    return problems


def export(flags: argparse.Namespace) -> list[str]:
    """Write the folder; returns what to print.

    Raises:
        RunError, ValueError: the model cannot be read, or what was written is another one.
    """
    source = convert.read(flags.model)
    facts = convert.shortened(source.facts, flags.dimension)
    width = facts.cut_to or facts.hidden_size
    if flags.format == "onnx":
        distance = convert.write_onnx(source, flags.output, facts)
        return [f"{flags.output}: ONNX, {width} dimensions; onnxruntime's embeddings differ by {distance:.0e} at most"]
    dtype = source.dtype if flags.dtype is None else DTYPES[flags.dtype]
    convert.write(source, flags.output, facts, dtype)
    lines = [f"{flags.output}: {str(dtype).removeprefix('torch.')}, {width} dimensions, read back"]
    if flags.format == "gguf":
        lines += gguf_commands(flags.output, facts, dtype)
    return lines


def gguf_commands(folder: Path, facts: Facts, dtype: torch.dtype) -> list[str]:
    """The commands of llama.cpp that make a GGUF file of the folder and serve it; nothing here runs them."""
    file = f"{folder}.gguf"
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")
    return [
        "in a checkout of llama.cpp of April 2026 or later:",
        f"  python convert_hf_to_gguf.py {folder.resolve()} --outfile {file} --outtype {kind}",
        f"  llama-server -m {file} --embedding --pooling last --ctx-size {facts.max_seq_length}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
