"""Mine hard negatives for raw tuples: query and passage get the columns negative_1 .. negative_24.

    python -m tools.mine_hard_negatives --input raw/x.parquet --output mined/x.parquet --model MODEL
    accelerate launch -m tools.mine_hard_negatives --input raw/x.parquet --output mined/x.parquet --model MODEL
    python -m tools.mine_hard_negatives --input raw/x.parquet --output mined/x.parquet --backend bm25

MODEL is a folder or a hub id: a decoder that training saved, or any model that Sentence Transformers loads. A report is
written beside the output, as x.report.json and x.report.png. After a kill or Ctrl-C the same command continues.
docs/mining.md explains every rule.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from runtime import launcher

if __name__ == "__main__":
    launcher.use_expandable_segments()

import torch
import transformers

from configuration.flag_parser import FlagParser
from configuration.flag_types import boolean, long_dtype, short_dtype
from data import raw_files
from data.raw_rows import RawError
from modeling import hub
from modeling.prompts import bare_instruction, query_prompt, split_prompt
from retrieval.encoders import prompts_of
from retrieval.faiss_index import KINDS, check_index
from runtime.computing import set_threads
from tuples.mining import report
from tuples.mining.inputs import check_size, declare_task, read_inputs
from tuples.mining.mine import Mining, Model, Plan, Share
from tuples.mining.output import write_output
from tuples.mining.rules import Rules, problems_with
from utils import RunError, refusal_of_file

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit status


def main(argv: list[str]) -> int:
    """Check everything, then mine.

    Returns:
        the exit status: 0; 1 where no row is left, or a file cannot be read or written; 2 for refused input;
        130 after Ctrl-C.
    """
    flags = parse(argv)
    share = Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    launcher.stop_when_launcher_ends()
    transformers.utils.logging.disable_progress_bar()  # its bars for loading weights tear the output apart
    try:
        return mine(flags, share)
    except KeyboardInterrupt:
        complain(share, ["interrupted; the same command continues"])
        return INTERRUPTED
    except (RunError, RawError) as error:
        complain(share, str(error).splitlines())
        return REFUSED
    except OSError as error:
        complain(share, [f"{refusal_of_file(error)}; the same command continues"], others_too=True)
        return FAILED


def complain(share: Share, lines: list[str], others_too: bool = False) -> None:
    """Print lines to standard error, under this tool's name.

    Args:
        others_too: every process prints, because the problem may be its own; otherwise only the first one does.
    """
    if share.is_first or others_too:
        lines = [f"mine_hard_negatives: {line}" for line in lines]
        launcher.say(lines)
        launcher.repeat_below_launcher(lines)


# ---------------------------------------------------------------------------------------------- flags


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Defaults are the published numbers."""
    parser = FlagParser(__doc__, prog="python -m tools.mine_hard_negatives")
    _add_files(parser.add_argument_group("files"))
    _add_model(parser.add_argument_group("model"))
    _add_search(parser.add_argument_group("search"))
    _add_rules(parser.add_argument_group("rules, as Sentence Transformers names them"))
    return parser.parse_args(argv)


def _add_files(group) -> None:
    add = group.add_argument
    add("--input", type=Path, required=True, help=f"raw tuples, one file: {raw_files.ENDINGS}")
    add("--output", type=Path, required=True, help="the .parquet file to write; replaced if it exists")
    add("--corpus", type=Path, nargs="+", default=[], help="files of further passages to take negatives from")
    add("--corpus_column", help="column of their texts (default passage, text, document, positive or contents)")
    add("--instruction", help="put before every query that has none, in the output too")
    add("--group_column", help="column of a class or the like: passages of a query's own group are never its negatives")
    _add_boolean(group, "--keep_negatives", True, "keep the input's own negatives, and fill up with mined ones")
    _add_boolean(group, "--skip_bad_rows", False, "leave out rows without query or passage, and continue")
    add("--cache_dir", type=Path, help="for vectors and unfinished work (default .NAME.mining beside the output)")
    _add_boolean(group, "--keep_cache", True, "keep that folder after the output is written")


def _add_model(group) -> None:
    add = group.add_argument
    add("--model", help="folder or hub id of an embedding model; only --backend bm25 works without one")
    add("--model_revision", help="commit, tag or branch of the hub id")
    add("--max_length", type=int, help="cut texts to this many tokens (default what the model reads, at most 1024)")
    words = "of the model (default bf16 on a GPU that has it, else fp32)"
    add("--precision", type=short_dtype, choices=("fp32", "bf16"), help=words)
    add("--query_prompt", help="put before queries without an instruction, not in the output (default the model's own)")
    add("--corpus_prompt", help="put before passages, not in the output (default the model's own)")
    words = "hide instructions from the model, for models that were trained without any"
    _add_boolean(group, "--strip_instruction", False, words)
    words = "type on the disk (default %(default)s)"
    add("--vectors", type=long_dtype, choices=("float32", "float16"), default="float32", help=words)
    add("--cross_encoder", help="folder or hub id of a cross-encoder, whose scores the rules then use")


def _add_search(group) -> None:
    add = group.add_argument
    add("--backend", choices=("exact", "faiss", "bm25"), default="exact", help="how to search (default %(default)s)")
    add("--faiss_index", choices=KINDS, default="flat", help="kind of index (default %(default)s)")
    add("--faiss_lists", type=int, default=0, help="lists of an IVF index; 0 = by the number of passages (default)")
    add("--faiss_probes", type=int, default=0, help="lists searched for a query; 0 = an eighth of them (default)")
    add("--faiss_code_bytes", type=int, default=0, help="bytes of a vector in IVF-PQ; 0 = by its width (default)")


def _add_rules(group) -> None:
    add = group.add_argument
    usual = Rules()
    add("--range_min", type=int, default=usual.range_min, help="skip this many of the best ranks (default %(default)s)")
    add("--range_max", type=int, default=usual.range_max, help="skip all ranks after this one (default %(default)s)")
    add("--max_score", type=_number, default=usual.max_score, help="keep scores below this; none = off (%(default)s)")
    add("--min_score", type=_number, default=usual.min_score, help="keep scores of at least this (default none)")
    add("--absolute_margin", type=_number, help="keep scores below the positive's minus this (default none)")
    add(
        "--relative_margin",
        type=_number,
        default=usual.relative_margin,
        help="keep scores below the positive's minus this share of it; none = off (default %(default)s)",
    )
    add("--num_negatives", type=int, default=usual.num_negatives, help="negatives of each row (default %(default)s)")
    add(
        "--sampling_strategy",
        choices=("top", "random"),
        default=usual.sampling_strategy,
        help="take the best passages that pass the rules, or draw among them (default %(default)s)",
    )
    add(
        "--ranks",
        choices=("kept", "found"),
        default=usual.ranks,
        help="range_min and range_max count the passages that pass the score rules, or all found (default %(default)s)",
    )
    add(
        "--too_few",
        choices=("drop", "fewer", "random"),
        default="drop",
        help="rows with fewer negatives: drop them, keep them with nulls, or add random ones (default %(default)s)",
    )
    add("--seed", type=int, default=usual.seed, help="of all random draws (default %(default)s)")


def _add_boolean(group, name: str, default: bool, words: str) -> None:
    shown = str(default).lower()
    group.add_argument(name, type=boolean, default=default, metavar="true|false", help=f"{words} (default {shown})")


def _number(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


# --------------------------------------------------------------------------------------------- checks


def find_problems(flags: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the flags themselves, one line each."""
    problems = problems_with(rules_of(flags))
    if flags.output.suffix != ".parquet":
        problems.append(f"--output {flags.output}: must end in .parquet")
    if flags.output.absolute() in [path.absolute() for path in (flags.input, *flags.corpus)]:
        problems.append(f"--output {flags.output}: is an input too: write to another file")
    if flags.model is None and flags.backend != "bm25":
        problems.append(f"--backend {flags.backend} needs --model; only --backend bm25 works without one")
    if flags.group_column and flags.backend == "faiss":
        problems.append("--group_column: does not work with --backend faiss: use --backend exact")
    needed = {"bm25": "bm25s", "faiss": "faiss"}.get(flags.backend)
    if needed and not find_spec(needed):
        package = needed.replace("faiss", "faiss-cpu")
        problems.append(f"--backend {flags.backend} needs a package: pip install {package}")
    if flags.instruction is not None:
        instruction = bare_instruction(flags.instruction)
        if not instruction or split_prompt(query_prompt(instruction))[0] != instruction:
            problems.append(f"--instruction {flags.instruction!r}: must be one, such as 'Find its answer.'")
    if flags.max_length is not None and flags.max_length < 2:
        problems.append(f"--max_length must be at least 2, not {flags.max_length}")
    return problems


# --------------------------------------------------------------------------------------------- mining


def rules_of(flags: argparse.Namespace) -> Rules:
    """The rules of the command line."""
    return Rules(
        flags.range_min,
        flags.range_max,
        flags.max_score,
        flags.min_score,
        flags.absolute_margin,
        flags.relative_margin,
        flags.num_negatives,
        flags.sampling_strategy,
        flags.ranks,
        flags.seed,
    )


def plan_of(flags: argparse.Namespace, device: str) -> Plan:
    """The models and settings to mine with; fetches models that are given by a hub id.

    Raises:
        RunError: a model is not there, or cannot be fetched.
    """
    model = None
    if flags.model is not None:
        folder = hub.fetch(flags.model, flags.model_revision)
        query_prompt_of_model, corpus_prompt_of_model = prompts_of(folder)
        model = Model(
            folder,
            flags.max_length,
            bf16=is_bf16(flags.precision, device),
            query_prompt=query_prompt_of_model if flags.query_prompt is None else flags.query_prompt,
            corpus_prompt=corpus_prompt_of_model if flags.corpus_prompt is None else flags.corpus_prompt,
            strip_instruction=flags.strip_instruction,
            dtype=flags.vectors,
        )
    rules = rules_of(flags)
    if model is None and not flags.cross_encoder:  # BM25 alone has no scores for these rules
        rules = replace(rules, max_score=None, min_score=None, absolute_margin=None, relative_margin=None)
    return Plan(
        flags.backend,
        rules,
        model,
        hub.fetch(flags.cross_encoder) if flags.cross_encoder else None,
        flags.too_few == "random",
        flags.faiss_index,
        flags.faiss_lists,
        flags.faiss_code_bytes,
        flags.faiss_probes,
    )


def is_bf16(precision: str | None, device: str) -> bool:
    """Whether models compute in bf16: as asked, as the launcher says, or where a GPU has it."""
    if precision is not None:
        return precision == "bf16"
    if device == "cpu":
        return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return not device.startswith("cuda") or torch.cuda.is_bf16_supported()


def device_here() -> str:
    """The accelerator of this process, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return "cpu"
    return f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"


def open_mining(flags: argparse.Namespace, share: Share) -> Mining:
    """Check the flags and the input, and read the input.

    Raises:
        RunError, RawError: something is wrong with them; a line for each problem.
    """
    problems = find_problems(flags)
    if problems:
        raise RunError("\n".join(problems))
    inputs = read_inputs(
        flags.input,
        flags.corpus,
        flags.corpus_column,
        flags.instruction,
        flags.group_column,
        flags.keep_negatives,
        flags.skip_bad_rows,
    )
    device = device_here()
    set_threads(torch.device(device), wanted=0)
    plan = plan_of(flags, device)
    work = flags.cache_dir or flags.output.with_name(f".{flags.output.stem}.mining")
    mining = Mining(work, inputs, plan, share, device, say=lambda line: print(line, flush=True))
    check_size(len(mining.texts.passages), flags.num_negatives, flags.too_few == "fewer")
    if flags.backend == "faiss":
        check_index(flags.faiss_index, len(mining.texts.passages))
    return mining


def mine(flags: argparse.Namespace, share: Share) -> int:
    """Check, mine, write and report. Returns the exit status."""
    begin = time.perf_counter()
    mining = open_mining(flags, share)
    mining.say("\n".join(report.opening_lines(mining)))
    try:
        mining.encode()
        mining.index()
        mining.mine()
    except RunError as error:
        complain(share, str(error).splitlines(), others_too=True)
        return REFUSED
    if not share.is_first:
        return DONE
    written = write_results(mining, flags)
    mining.say("\n".join([*report.closing_lines(written), f"{time.perf_counter() - begin:.1f} s"]))
    if not written["counts"]["rows_written"]:
        complain(share, [f"{flags.output}: not written, because no row has {flags.num_negatives} negatives"])
        return FAILED
    declare_task(flags.input, flags.output)
    if not flags.keep_cache:
        mining.forget()
    return DONE


def write_results(mining: Mining, flags: argparse.Namespace) -> dict:
    """Write the mined tuples and the report beside them. Returns the report."""
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    rows = write_output(flags.output, mining.inputs, mining.texts, mining.blocks, flags.too_few, flags.num_negatives)
    names = {"input": flags.input.name, "output": flags.output.name, "too_few": flags.too_few}
    return report.write(flags.output.with_suffix(""), mining, names, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
