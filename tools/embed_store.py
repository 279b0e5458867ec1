"""Embed every text of token stores with a teacher, once: training then reads its embeddings instead of running it.

    python -m tools.embed_store --model TEACHER --stores training_data/tokenized --output training_data/teacher
    accelerate launch -m tools.embed_store --model TEACHER --stores ... --output ...       on many GPUs

Training takes the folder as `teacher_embeddings`. Each dataset becomes a folder of its own in it, with a row for each
distinct text: what the live teacher gives to these tokens, not normalised. Give --max_seq_length the value that
training will have. If it is interrupted, the same command continues; what is finished is left alone.

The precision is the launcher's (accelerate launch --mixed_precision bf16), as it is for a live teacher. Several
machines must share the disk of --output.
"""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from runtime import launcher

if __name__ == "__main__":
    launcher.use_expandable_segments()

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from tqdm import tqdm

from configuration.flag_parser import FlagParser
from configuration.flag_types import long_dtype
from data import embedding_writer
from data.batch import pack
from data.cache import open_unverified
from data.embedding_store import DTYPES, texts_of
from data.embedding_writer import RowWriter, TextBatches, longest_text
from data.token_store import TokenStore, deep_check
from model import FrozenEmbedder
from modeling.attention import head_shape, try_kernels
from modeling.backbone import check_backbone
from modeling.tokenizer import fitting_tokenizer
from runtime import computing, engine, processes
from runtime.verdict import refused_elsewhere
from training.identity import config_digest, weights_digest
from training.models import load_teacher
from utils import RunError, first_line, hide_bar_unless, is_disk_error, plural, refusal_of_file

COMMIT_SECONDS = 30  # between two moments at which everything done so far is made to survive a kill
SILENCE_SECONDS = 300.0  # without a sign of life a process counts as hanging


@dataclass(frozen=True)
class Asked:
    """The command line."""

    model: str
    model_revision: str | None
    stores: Path
    output: Path
    max_seq_length: int | None  # None: as long as the texts are
    dtype: str
    dimensions: int | None  # None: as wide as the teacher is
    max_tokens: int

    def max_length(self, store: TokenStore) -> int:
        """Where the texts of a store are cut, in tokens."""
        return self.max_seq_length or longest_text(store)


def main(argv: list[str]) -> int:
    """Check everything, then embed. Returns the exit status: 0; 2 for refused input; 1 for what could not continue."""
    asked = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        return check_and_embed(asked)
    except (Exception, KeyboardInterrupt) as error:
        message = message_of(error)
        if message is None:
            raise
    launcher.say([message])
    launcher.repeat_below_launcher([message])
    return processes.FAILED


def message_of(error: BaseException) -> str | None:
    """What a person should read of an error; None if its traceback tells more."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues from what is there"
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the memory of the GPU is full ({first_line(error)}): the same command continues from what is there, "
            "with a lower --max_tokens, or with the teacher shared out over more GPUs (configs/accelerate_config.yaml)"
        )
    if is_disk_error(error):
        return f"{refusal_of_file(error)}; the same command continues from what is there"
    return None


def parse(argv: list[str]) -> Asked:
    """The command line."""
    parser = FlagParser(__doc__, prog="python -m tools.embed_store")
    add = parser.add_argument
    add("--model", required=True, help="the teacher: a model folder or hub id")
    add("--model_revision", help="commit, tag or branch of a hub id (default: its main branch)")
    add("--stores", type=Path, required=True, help="folder of token stores, as train_data_path has it")
    add("--output", type=Path, required=True, help="folder to write to, a folder for each dataset")
    add("--max_seq_length", type=int, help="tokens of a text at most, as in training (default: whole texts)")
    words = "float16 takes half the disk (default %(default)s)"
    add("--dtype", type=long_dtype, choices=sorted(DTYPES), default="float32", help=words)
    add("--dimensions", type=int, help="keep only the first, as many as the widest student has (default: all)")
    add("--max_tokens", type=int, default=16384, help="tokens of a forward pass at most (default %(default)s)")
    given = parser.parse_args(argv)
    for name, least in (("max_seq_length", 2), ("dimensions", 1), ("max_tokens", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    return Asked(**vars(given))


def check_and_embed(asked: Asked) -> int:
    """Print every problem that can be found before; if there is none, embed. Returns the exit status."""
    try:
        stores, problems = find_problems(asked)
    except Exception:
        refused_elsewhere(problems=1)  # the others must not wait for this process
        raise
    elsewhere = refused_elsewhere(len(problems))
    if elsewhere:
        problems = [elsewhere]
    if not problems:
        with processes.process_group([], str(asked.output), SILENCE_SECONDS, message_of) as accelerator:
            problems = embed_stores(asked, stores, accelerator)
    if not problems:
        return launcher.FINISHED
    lines = [*problems, f"{plural(len(problems), 'problem')}, nothing was written"]
    if launcher.is_first_on_machine():
        launcher.say(lines)
    launcher.repeat_below_launcher(lines)
    return launcher.REFUSED


def find_problems(asked: Asked) -> tuple[list[TokenStore], list[str]]:
    """The stores, and every problem that can be found without loading a weight, one line each."""
    if not asked.stores.is_dir():
        return [], [f"--stores {asked.stores}: no such folder; tokenize_data_qwen.py makes it"]
    stores, problems = open_unverified(asked.stores)
    if not stores and not problems:
        problems.append(
            f"--stores {asked.stores}: no token store in it. Of tokenised Parquet in the published layouts "
            "`python run.py --config ... --cache_only true` makes some, in the folder stores below cache_dir"
        )
    lengths = [min(asked.max_length(store), longest_text(store)) for store in stores]
    largest_id = max((store.meta["max_token_id"] for store in stores), default=0)
    config, model_problems = check_backbone(
        asked.model, largest_id, max(lengths, default=0), "auto", revision=asked.model_revision
    )
    if config is not None:
        remedy = "take a teacher with the student's tokenizer"
        _, tokenizer_problems = fitting_tokenizer(asked.model, stores, remedy, asked.model_revision)
        model_problems = model_problems + tokenizer_problems
        if (asked.dimensions or 0) > config.hidden_size:
            problems.append(f"--dimensions {asked.dimensions}: the teacher has {config.hidden_size}")
    problems += [f"--model: {problem}" for problem in model_problems]
    if not problems and launcher.is_first_on_machine():
        for store in tqdm(stores, desc="verifying", unit="dataset", disable=None, delay=1, leave=False):
            problems += deep_check(store)
    return stores, problems


def embed_stores(asked: Asked, stores: list[TokenStore], accelerator: Accelerator) -> list[str]:
    """Embed what is not there yet; a collective.

    Returns:
        Problems, one line each, the same on every process; where there are some, nothing was written.

    Raises:
        RunError: an embedding is not finite.
    """
    computing.set_threads(accelerator.device, 0)
    teacher = load(asked, accelerator)
    facts = facts_of(asked, stores, teacher, accelerator.mixed_precision)
    missing, problems = find_missing(asked, stores, facts)
    accelerator.wait_for_everyone()  # all have looked before anything is written
    if problems:
        return problems
    accelerator.print(
        f"{asked.model}: {plural(teacher.hidden_size, 'dimension')}, attention {teacher.backend}, precision "
        f"{accelerator.mixed_precision}, processes: {accelerator.num_processes}"
    )
    for store in stores:
        folder = asked.output / store.name
        if store not in missing:
            accelerator.print(f"{folder}: finished before")
            continue
        embed_store(asked, store, facts[store.name], teacher, accelerator)
        size = (folder / "embeddings.npy").stat().st_size
        accelerator.print(f"{folder}: {plural(len(store.offsets) - 1, 'text')}, {size / 1e6:,.1f} MB")
    accelerator.print(f"train with --teacher_embeddings {asked.output}")
    return []


def load(asked: Asked, accelerator: Accelerator) -> FrozenEmbedder:
    """The teacher as training loads it."""
    config, _ = check_backbone(asked.model, 0, 0, "auto", revision=asked.model_revision)
    on_gpu = accelerator.device.type != "cpu"
    if on_gpu and accelerator.mixed_precision == "bf16":
        for line in try_kernels(accelerator.device, [head_shape(config)]):
            accelerator.print(f"warning: attention kernel left out: {line}")
    return load_teacher(asked.model, accelerator, "auto", asked.model_revision)


def facts_of(asked: Asked, stores: list[TokenStore], teacher: FrozenEmbedder, precision: str) -> dict[str, dict]:
    """Dataset name -> what its meta.json will say; of a sharded teacher a collective."""
    named = {"weights": weights_digest(teacher), "pooling": teacher.pooling}
    facts = {}
    for store in stores:
        facts[store.name] = {
            "name": store.name,
            "model": asked.model,
            "teacher": named,
            "teacher_config": config_digest(teacher.decoder().config),
            "precision": precision,
            "store": texts_of(store),
            "max_seq_length": asked.max_length(store),
            "longest_text": longest_text(store),
            "texts": len(store.offsets) - 1,
            "width": asked.dimensions or teacher.hidden_size,
            "dtype": asked.dtype,
        }
    return facts


def find_missing(asked: Asked, stores: list[TokenStore], facts: dict[str, dict]) -> tuple[list[TokenStore], list[str]]:
    """The stores whose embeddings must still be made, and what stands in the way, one line each."""
    missing = []
    problems = []
    needed = 0  # bytes
    for store in stores:
        done, found = embedding_writer.is_done(asked.output / store.name, facts[store.name])
        problems += found
        if not done:
            missing.append(store)
            needed += embedding_writer.bytes_to_come(asked.output / store.name, facts[store.name])
    nearest = next(path for path in (asked.output, *asked.output.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        problems.append(f"--output {asked.output}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")
    return missing, problems


def embed_store(
    asked: Asked, store: TokenStore, facts: dict, teacher: FrozenEmbedder, accelerator: Accelerator
) -> None:
    """Write the embeddings of one dataset: each process its share of the batches; a collective.

    Raises:
        RunError: an embedding is not finite.
    """
    folder = asked.output / store.name
    batches = TextBatches(store, facts["max_seq_length"], asked.max_tokens)
    if accelerator.is_main_process:
        done = embedding_writer.begin(folder, facts, len(batches), asked.max_tokens)
        if done:
            accelerator.print(f"{folder}: continuing after batch {done:,} of {len(batches):,}")
    accelerator.wait_for_everyone()
    rows = RowWriter(folder, facts["dtype"], facts["width"])
    remaining = rows.remaining()  # the same on every process: nobody has written yet
    accelerator.wait_for_everyone()
    write_share(store, facts, batches, remaining, rows, teacher, accelerator)
    rows.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        embedding_writer.finish(folder, facts)
    accelerator.wait_for_everyone()


def write_share(
    store: TokenStore,
    facts: dict,
    batches: TextBatches,
    remaining: np.ndarray,
    rows: RowWriter,
    teacher: FrozenEmbedder,
    accelerator: Accelerator,
) -> None:
    """Embed and write this process's share of the `remaining` batches, int64 [m]."""
    own = remaining[accelerator.process_index :: accelerator.num_processes].tolist()
    rounds = len(own)
    if engine.is_sharded(accelerator):  # a forward pass is a collective: one without a batch runs an empty text
        rounds = len(range(0, len(remaining), accelerator.num_processes))
    hidden = hide_bar_unless(accelerator.is_main_process)
    committed = time.monotonic()
    for number in tqdm(range(rounds), desc=f"embedding {store.name}", unit="batch", disable=hidden):
        texts = batches.numbers(own[number]) if number < len(own) else remaining[:0]
        embeddings = embed(store, texts, facts["max_seq_length"], teacher, accelerator)  # [n, D]
        if number < len(own):
            try:
                rows.write(own[number], texts, embeddings[:, : facts["width"]])
            except ValueError as error:
                raise RunError(f"{store.folder}: {error}") from None
        if time.monotonic() - committed > COMMIT_SECONDS:
            rows.commit()
            committed = time.monotonic()


@torch.no_grad()
def embed(
    store: TokenStore, texts: np.ndarray, max_length: int, teacher: FrozenEmbedder, accelerator: Accelerator
) -> np.ndarray:
    """The teacher's embeddings of these text numbers [n], as in a training step: float32 [n, D], not normalised."""
    tokens, cu_seqlens = pack(store, texts, max_length)  # [T], [n + 1]; of no texts one that is only EOS
    lengths = np.diff(cu_seqlens)
    tokens = torch.from_numpy(tokens).to(accelerator.device)
    cu_seqlens = torch.from_numpy(cu_seqlens).to(accelerator.device)
    with accelerator.autocast():
        states = teacher(tokens, cu_seqlens, lengths)  # [n, D]
    return states.float().cpu().numpy()


if __name__ == "__main__":
    launcher.stop_when_launcher_ends()
    sys.exit(main(sys.argv[1:]))
