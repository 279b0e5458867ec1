"""Saved folders behind a server with OpenAI's interface, asked through OpenAI's own client.

    make test-serving

The server is infinity (infinity-emb), in the environment .venv-serving, which that command makes; without it these
tests are skipped. The other kinds of readers: tests/export/test_round_trip.py.
"""

import os
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import pytest
import torch
import torch.nn.functional as F
from model_folders import TEXTS, facts, make_adapted, training_vectors
from openai import BadRequestError, DefaultHttpxClient, OpenAI

from export import model_folder
from modeling.backbone import load_backbone
from modeling.prompts import query_prompt
from tools import export

SERVER = Path(__file__).parents[2] / ".venv-serving" / "bin" / "infinity_emb"
PATIENCE = 300.0  # seconds until the server must answer; it takes some ten
KINDS = ("full", "merged", "cut")
CUT = 8

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not SERVER.exists(), reason="no .venv-serving here: make test-serving makes it"),
]


@pytest.fixture(scope="module")
def folders(toy_world, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """A whole model, a merged adapter and a model cut to eight dimensions."""
    root = tmp_path_factory.mktemp("served")
    backbone = load_backbone(str(toy_world.backbone), torch.float32).eval()
    dims = facts(matryoshka_dims=[8, 16, 32])
    model_folder.save(root / "full", backbone, tokenizer, dims, torch.float32)
    model_folder.save(root / "adapter", make_adapted(toy_world.backbone), tokenizer, dims, torch.float32)
    assert export.main(["--model", str(root / "adapter"), "--output", str(root / "merged")]) == 0
    assert export.main(["--model", str(root / "full"), "--output", str(root / "cut"), "--dimension", str(CUT)]) == 0
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def client(folders, tmp_path_factory):
    """A client of a server of these folders, which ends with the last test."""
    port = harness.free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    models = [word for kind in KINDS for word in ("--model-id", folders[kind], "--served-model-name", kind)]
    command = [
        SERVER,
        "v2",
        *models,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--device",
        "cpu",
        "--no-bettertransformer",
    ]
    command += ["--no-compile", "--dtype", "float32", "--no-model-warmup"]
    environment = os.environ | {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen([str(word) for word in command], stdout=output, stderr=output, env=environment)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
        with DefaultHttpxClient(trust_env=False) as http:  # no proxy stands before this host
            yield OpenAI(base_url=f"http://127.0.0.1:{port}", api_key="none", http_client=http)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    """Ask until the server answers; fail with what it printed when it ends or takes too long."""
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        try:
            ask(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    pytest.fail(f"the server is not ready (exit status {server.poll()}):\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def expected(toy_world, tokenizer):
    """A function (kind, texts) -> [n, d]: what the training forward makes of them."""
    backbone = load_backbone(str(toy_world.backbone), torch.float32).eval()
    models = {"full": backbone, "merged": make_adapted(toy_world.backbone), "cut": backbone}

    def vectors(kind: str, texts: list[str]) -> torch.Tensor:
        width = CUT if kind == "cut" else None
        return F.normalize(training_vectors(models[kind], tokenizer, texts)[:, :width], dim=-1)

    return vectors


def ask(client: OpenAI, kind: str, texts: list[str], **more) -> torch.Tensor:
    """[n, d], in the order of the texts."""
    answer = client.embeddings.create(model=kind, input=texts, **more)
    return torch.tensor([item.embedding for item in sorted(answer.data, key=lambda item: item.index)])


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (wanted @ wanted.T).min() < 0.9  # not all alike
    assert F.cosine_similarity(found, wanted).min() >= 0.9999
    assert (found.norm(dim=-1) - 1).abs().max() < 1e-5


def test_the_client_sees_the_models(client):
    assert {model.id for model in client.models.list()} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_prompted_queries_are_the_trainings_vectors(client, expected, kind):
    """The prompt is the client's business: this server reads none from the folder."""
    assert_same(ask(client, kind, TEXTS), expected(kind, TEXTS))
    questions = [text for text in TEXTS if text]
    queries = [query_prompt("Find it.") + text for text in questions]
    assert_same(ask(client, kind, queries), expected(kind, queries))
    assert F.cosine_similarity(ask(client, kind, queries), expected(kind, questions)).min() < 0.9


def test_floats_of_json_are_as_good_as_base64(client):
    """The client asks for base64 by itself."""
    assert torch.equal(ask(client, "full", TEXTS), ask(client, "full", TEXTS, encoding_format="float"))


def test_shorter_vectors_are_cut_by_the_server_and_normalised_by_the_client(client, expected):
    found = ask(client, "full", TEXTS, dimensions=CUT)
    assert found.norm(dim=-1).max() < 0.99  # this server leaves them as they are; a cut folder needs no care
    assert_same(F.normalize(found, dim=-1), expected("cut", TEXTS))
    with pytest.raises(BadRequestError):
        ask(client, "cut", TEXTS, dimensions=CUT + 1)


def test_many_texts_of_all_lengths_at_once_keep_their_order(client, expected):
    texts = [f"number {number}" + " one two three" * (number % 9) for number in range(60)]
    wanted = expected("full", texts)
    assert_same(ask(client, "full", texts), wanted)
    parts = [texts[begin : begin + 7] for begin in range(0, len(texts), 7)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda part: ask(client, "full", part), parts))
    assert_same(torch.cat(answers), wanted)


def test_white_space_around_a_text_is_lost(client, expected):
    """The Sentence Transformers of this server strips texts; training and newer ones do not (docs/serving.md)."""
    assert_same(ask(client, "full", [" a\n", "b "]), expected("full", ["a", "b"]))
    assert F.cosine_similarity(expected("full", ["b "]), expected("full", ["b"])).item() < 0.99


def test_an_adapter_is_nothing_that_this_server_reads(folders):
    """This cell of the matrix has no meaning: the server knows no PEFT, and finds no weights; it is merged first."""
    adapter = folders["full"].parent / "adapter"
    assert not list(adapter.glob("model*.safetensors"))
    assert not list(SERVER.parents[1].glob("lib/python*/site-packages/peft"))
