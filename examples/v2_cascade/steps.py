"""The steps of the cascade. Each leaves a file or a folder behind, and is not done again where that stands."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoTokenizer, set_seed

from examples.code_search import corpus, job, tuples
from examples.code_search.corpus import Function
from examples.models import smollm2
from modeling.tokenizer import save_tokenizer
from utils import aside_of, publish, remove, write_json

from .plan import RANDOM, Cascade, Sizes, Student

CONFIG = Path("examples/v2_cascade/teacher.json")  # students have its settings but for what `train` says
CALIBRATION_TEXTS = 512  # queries and passages that units are judged by


def data(cascade: Cascade) -> list[Function]:
    """Raw tuples, calibration texts and token stores; returns the held-out functions."""
    held_out = cascade.folder / "held_out.json"
    if not held_out.exists():
        job.title("raw tuples from the Python functions on this machine")
        library = corpus.distinct(corpus.standard_library_functions(cascade.one_file_in))
        functions = corpus.distinct(corpus.installed_functions(cascade.one_file_in), library)
        print(f"{len(functions):,} functions to train on, {len(library):,} held out", flush=True)
        tuples.write_tuples(functions, cascade.folder / "training_data", cascade.rows, cascade.others)
        write_calibration(cascade.folder / "calibration.jsonl", functions)
        write_json(held_out, [asdict(function) for function in library])
    return [Function(**fields) for fields in json.loads(held_out.read_text(encoding="utf-8"))]


def write_calibration(path: Path, functions: list[Function]) -> None:
    """Texts as training reads them, one JSON string a line, taken at equal distances."""
    step = max(1, 2 * len(functions) // CALIBRATION_TEXTS)
    lines = []
    for function in functions[::step]:
        lines.append(json.dumps(tuples.instruct(tuples.SEARCH, function.query)))
        lines.append(json.dumps(function.passage))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def foundation(cascade: Cascade) -> Path:
    """The decoder that the teacher starts from, and the stores that its tokenizer gives."""
    folder = cascade.folder / "models" / "foundation"
    smollm2.make_backbone(folder, cascade.layers, cascade.gguf)
    stores = cascade.folder / "data_tokenized_qwen"
    if not stores.exists():
        folders = f"--tokenizer_path {folder} --input_dir {cascade.folder}/training_data --output_dir {stores}"
        job.run(f"python tokenize_data_qwen.py {folders} --max_seq_length 512")
    return folder


def teacher(cascade: Cascade, overrides: list[str]) -> Path:
    """The trained teacher's folder."""
    if cascade.teacher is not None:
        return cascade.teacher
    return train(cascade, "teacher", foundation(cascade), cascade.teacher_steps, overrides)


def student(cascade: Cascade, student: Student, seed: int, teacher: Path, steps: int, overrides: list[str]) -> Path:
    """A trained student's folder."""
    start = cut(cascade, student.sizes, teacher)
    if student.origin == RANDOM:
        start = random_weights(start, seed)
    words = ["--seed", str(seed), *overrides]
    if student.distillation:
        words += ["--teacher_model_path", str(teacher), "--kd_weight", str(student.distillation)]
    return train(cascade, student.experiment(seed), start, steps, words)


def cut(cascade: Cascade, sizes: Sizes, teacher: Path) -> Path:
    """The teacher pruned to these sizes, by the command of a user."""
    folder = cascade.folder / "models" / f"pruned-{sizes.layers}x{sizes.hidden_size}x{sizes.intermediate_size}"
    if not folder.exists():
        wanted = f"--num_layers {sizes.layers} --hidden_size {sizes.hidden_size}"
        wanted += f" --intermediate_size {sizes.intermediate_size} --calibration {cascade.folder}/calibration.jsonl"
        job.run(f"python -m tools.prune_model --input {teacher} --output {folder} {wanted}")
    return folder


def random_weights(like: Path, seed: int) -> Path:
    """A decoder as that of a folder, with random weights."""
    folder = like.with_name(f"{like.name}-random-{seed}")
    if folder.exists():
        return folder
    set_seed(seed)
    config = AutoConfig.from_pretrained(like)
    tokenizer = AutoTokenizer.from_pretrained(like)
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    AutoModel.from_config(config).save_pretrained(aside)
    save_tokenizer(tokenizer, aside, config.max_position_embeddings)
    publish(folder)
    return folder


def train(cascade: Cascade, experiment: str, start: Path, steps: int, overrides: list[str]) -> Path:
    """Train with the command of a user; an interrupted run continues. Returns the model folder.

    Args:
        overrides: further words for run.py.
    """
    settings = json.loads(CONFIG.read_text(encoding="utf-8"))
    run_folder = cascade.folder / "output" / experiment
    trained = run_folder / f"step_{steps}"
    if trained.exists():
        return trained
    processes = job.processes_to_train_on()
    launch = f"accelerate launch --config_file configs/accelerate_cpu.yaml --num_processes {processes}"
    if job.multiplies_in_bf16():
        launch += " --mixed_precision bf16"
    batch = settings["train_batch_size"] // processes
    folders = f"--train_data_path {cascade.folder}/data_tokenized_qwen --output_dir {cascade.folder}/output"
    folders += f" --tb_dir {cascade.folder}/output/tb --cache_dir {cascade.folder}/cache"
    command = f"{launch} run.py --config {CONFIG} --model_path {start} --experiment_id {experiment} {folders}"
    words = shlex.join(["--train_steps", str(steps), "--train_batch_size", str(batch), *overrides])
    job.run(f"{command} {words}", {"ACCELERATE_USE_CPU": "true"})
    return trained
