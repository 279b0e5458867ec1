"""Mine hard negatives for raw tuples: query and passage become query, passage, negative_1 .. negative_24.

    python -m tools.mine_hard_negatives --input raw/x.parquet --output mined/x.parquet --model MODEL
    accelerate launch -m tools.mine_hard_negatives --input raw/x.parquet --output mined/x.parquet --model MODEL
    python -m tools.mine_hard_negatives --input raw/x.parquet --output mined/x.parquet --backend bm25

MODEL is a folder or a hub id: a decoder as training saves it, or whatever Sentence Transformers loads. Beside the
output stand x.report.json and x.report.png. Killed or interrupted, the same command continues; docs/mining.md says
what every rule does.
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

from configuration.flag_types import boolean
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
from utils import RunError, refusal_of_disk

DONE, NOTHING_LEFT, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit status


def main(argv: list[str]) -> int:
    """Check everything, then mine.

    Returns:
        the exit status: 0; 1 where no row is left or the disk refuses; 2 for refused input; 130 after Ctrl-C.
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
        complain(share, [f"{refusal_of_disk(error)}; the same command continues"], others_too=True)
        return NOTHING_LEFT


def complain(share: Share, lines: list[str], others_too: bool = False) -> None:
    """Print lines to standard error, under this tool's name.

    Args:
        others_too: what is wrong may be wrong in this process alone; else the first process speaks for all.
    """
    if share.is_first or others_too:
        lines = [f"mine_hard_negatives: {line}" for line in lines]
        launcher.say(lines)
        launcher.repeat_below_launcher(lines)


# ---------------------------------------------------------------------------------------------- flags


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Defaults are the published numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mine_hard_negatives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(parser.add_argument_group("files"))
    _add_model(parser.add_argument_group("model"))
    _add_search(parser.add_argument_group("search"))
    _add_rules(parser.add_argument_group("rules, as Sentence Transformers names them"))
    return parser.parse_args(argv)


def _add_files(group) -> None:
    add = group.add_argument
    add("--input", type=Path, required=True, help=f"raw tuples, one file: {raw_files.ENDINGS}")
    add("--output", type=Path, required=True, help="the file to write, .parquet; replaced when it is there")
    add("--corpus", type=Path, nargs="+", default=[], help="files of further passages to find negatives among")
    add("--corpus_column", help="the column of their texts (default passage, text, document, positive or contents)")
    add("--instruction", help="put before every query that carries none, in the output too")
    add("--group_column", help="of input and corpus: passages of a query's own group, as its class, are no negatives")
    _add_boolean(group, "--keep_negatives", True, "negatives that the input has come first, mined ones fill up")
    _add_boolean(group, "--skip_bad_rows", False, "leave out rows without query or passage")
    add("--cache_dir", type=Path, help="for vectors and what is half done (default .NAME.mining beside the output)")
    _add_boolean(group, "--keep_cache", True, "keep it when all is done")


def _add_model(group) -> None:
    add = group.add_argument
    add("--model", help="folder or hub id of an embedding model; only --backend bm25 can do without")
    add("--model_revision", help="commit, tag or branch of a hub id")
    add("--max_length", type=int, help="tokens of a text at most (default what the model reads, at most 1024)")
    add("--precision", choices=("fp32", "bf16"), help="of the model (default bf16 on a GPU that has it, else fp32)")
    add("--query_prompt", help="before queries without an instruction, for the model alone (default the model's own)")
    add("--corpus_prompt", help="before passages, for the model alone (default the model's own)")
    words = "show queries without their instruction to a model that never saw any"
    _add_boolean(group, "--strip_instruction", False, words)
    add("--vectors", choices=("float32", "float16"), default="float32", help="on the disk (default %(default)s)")
    add("--cross_encoder", help="folder or hub id; the rules then look at its scores")


def _add_search(group) -> None:
    add = group.add_argument
    add("--backend", choices=("exact", "faiss", "bm25"), default="exact", help="how to search (default %(default)s)")
    add("--faiss_index", choices=KINDS, default="flat", help="(default %(default)s)")
    add("--faiss_lists", type=int, default=0, help="of IVF; 0 = by the number of passages (default)")
    add("--faiss_probes", type=int, default=0, help="lists that a query looks into; 0 = an eighth (default)")
    add("--faiss_code_bytes", type=int, default=0, help="of a vector in IVF-PQ; 0 = by its width (default)")


def _add_rules(group) -> None:
    add = group.add_argument
    usual = Rules()
    add("--range_min", type=int, default=usual.range_min, help="ranks left out from the best on (default %(default)s)")
    add("--range_max", type=int, default=usual.range_max, help="the last rank looked at (default %(default)s)")
    add("--max_score", type=_number, default=usual.max_score, help="scores stay below; none = off (%(default)s)")
    add("--min_score", type=_number, default=usual.min_score, help="scores are at least (default none)")
    add("--absolute_margin", type=_number, help="scores stay so far below the positive's (default none)")
    add(
        "--relative_margin",
        type=_number,
        default=usual.relative_margin,
        help="scores stay below the positive's by this share of it; none = off (default %(default)s)",
    )
    add("--num_negatives", type=int, default=usual.num_negatives, help="of each row (default %(default)s)")
    add("--sampling_strategy", choices=("top", "random"), default=usual.sampling_strategy, help="(default %(default)s)")
    add(
        "--ranks",
        choices=("kept", "found"),
        default=usual.ranks,
        help="what range_min and range_max count: passages that the scores left, or all found (default %(default)s)",
    )
    add(
        "--too_few",
        choices=("drop", "fewer", "random"),
        default="drop",
        help="rows with fewer negatives: dropped, kept with null, or filled up at random (default %(default)s)",
    )
    add("--seed", type=int, default=usual.seed, help="of what is drawn at random (default %(default)s)")


def _add_boolean(group, name: str, default: bool, words: str) -> None:
    group.add_argument(name, type=boolean, default=default, help=f"{words} (default {str(default).lower()})")


def _number(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor none") from None


# --------------------------------------------------------------------------------------------- checks


def find_problems(flags: argparse.Namespace) -> list[str]:
    """Every problem with the flags themselves, one line each."""
    problems = problems_with(rules_of(flags))
    if flags.output.suffix != ".parquet":
        problems.append(f"--output {flags.output}: must end in .parquet")
    if flags.output.absolute() in [path.absolute() for path in (flags.input, *flags.corpus)]:
        problems.append(f"--output {flags.output}: is read as well: write to another file")
    if flags.model is None and flags.backend != "bm25":
        problems.append(f"--backend {flags.backend} needs --model; --backend bm25 does without")
    if flags.group_column and flags.backend == "faiss":
        problems.append("--group_column: an index of FAISS knows no groups: take --backend exact")
    needed = {"bm25": "bm25s", "faiss": "faiss"}.get(flags.backend)
    if needed and not find_spec(needed):
        package = needed.replace("faiss", "faiss-cpu")
        problems.append(f"--backend {flags.backend} needs a package: pip install {package}")
    if flags.instruction is not None:
        instruction = bare_instruction(flags.instruction)
        if not instruction or split_prompt(query_prompt(instruction))[0] != instruction:
            problems.append(f"--instruction {flags.instruction!r}: give one, as 'Given a question, find its answer.'")
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
    """Everything that is mined with; fetches what has a hub id.

    Raises:
        RunError: a model cannot be had.
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
    if model is None and not flags.cross_encoder:  # there are no scores that they could look at
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


def mine(flags: argparse.Namespace, share: Share) -> int:
    """Check, mine, write and report. Returns the exit status."""
    begin = time.perf_counter()
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
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    rows = write_output(flags.output, inputs, mining.texts, mining.blocks, flags.too_few, flags.num_negatives)
    names = {"input": flags.input.name, "output": flags.output.name, "too_few": flags.too_few}
    found = report.write(flags.output.with_suffix(""), mining, names, rows)
    mining.say("\n".join([*report.closing_lines(found), f"{time.perf_counter() - begin:.1f} s"]))
    if not rows["rows_written"]:
        complain(share, [f"{flags.output}: not written, as no row has {flags.num_negatives} negatives"])
        return NOTHING_LEFT
    declare_task(flags.input, flags.output)
    if not flags.keep_cache:
        mining.forget()
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
