"""Where models come from: no minute of retries without a network, and a remedy for what is not found.

python -m pytest tests/modeling/test_hub.py
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from modeling import hub
from modeling.merging import merge_problems
from utils import RunError

PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    for name in (*PROXIES, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub._hub_is_reachable.cache_clear()
    yield
    hub._hub_is_reachable.cache_clear()


@contextmanager
def server(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server on the loopback device that answers everything with a status: its address, and what it was asked.

    Status 0 stands for one that takes the connection and never answers.
    """
    asked = []
    let_go = threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            if status == 0:
                let_go.wait(60)
                return
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        let_go.set()
        http.shutdown()
        thread.join()
        http.server_close()


def is_asked() -> bool:
    return not hub.loading_options("Qwen/Qwen3-0.6B")["local_files_only"]


@pytest.mark.parametrize(("status", "expected"), [(200, True), (404, True), (407, False), (502, False), (0, False)])
def test_the_hub_is_asked_where_it_answers(monkeypatch, status, expected):
    monkeypatch.setattr(hub, "_SECONDS", 5 if status else 0.5)
    with server(status) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert is_asked() == expected
        assert is_asked() == expected
    assert len(asked) == 1  # once in a process


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_is_used_and_answers_for_the_hub(monkeypatch, variable):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    with server(200) as (address, asked):
        monkeypatch.setenv(variable, address)
        assert is_asked()
    assert asked[0].startswith("http://hub.invalid")


def test_a_proxy_that_cannot_be_asked_is_trusted(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert is_asked()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid", "no address"])
def test_where_nobody_answers_only_the_cache_is_read(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert not is_asked()


def test_a_folder_never_asks_the_hub_and_neither_does_offline_mode(tmp_path, monkeypatch):
    with server(200) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert hub.loading_options(str(tmp_path)) == {"trust_remote_code": False, "local_files_only": True}
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not is_asked()
    assert asked == []


def test_what_is_not_found_has_a_remedy(tmp_path):
    assert "no hub model of that name could be fetched (why)" in hub.not_found("owner/name", "why")
    assert hub.not_found("/no/such/folder", "why") == "'/no/such/folder': no such folder"
    assert "no readable model config (why)" in hub.not_found(str(tmp_path), "why")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "python -m tools.merge_adapter" in hub.not_found(str(tmp_path), "why")


def test_of_a_run_the_last_models_are_named(tmp_path):
    assert hub.models_below(tmp_path) == ""
    for name, config in (("state", "state.json"), ("step_9", "config.json"), ("step_10", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / config).write_text("{}")
    said = "; this is a run or another folder of models, name one: step_9, step_10"
    assert hub.not_found(str(tmp_path), "no config.json").endswith(f"(no config.json){said}")
    assert said in merge_problems([tmp_path, tmp_path], [1, 1])[0]
    for number in (100, 101):
        (tmp_path / f"step_{number}").mkdir()
        (tmp_path / f"step_{number}" / "config.json").write_text("{}")
    assert hub.models_below(tmp_path).endswith("name one of 4: step_10, step_100, step_101")
    (tmp_path / "modules.json").write_text("[]")
    assert hub.models_below(tmp_path) == ""  # a model without its config.json: what lies below are its modules


def test_a_model_is_a_folder_or_what_was_fetched_of_that_name(tmp_path, monkeypatch):
    fetched = tmp_path / "models--owner--name" / "snapshots" / ("1" * 40)
    fetched.mkdir(parents=True)
    (fetched / "config.json").write_text("{}")
    refs = fetched.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(fetched.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch("owner/name") == fetched
    assert hub.fetch(str(fetched)) == fetched
    with pytest.raises(RunError, match="no hub model of that name could be fetched"):
        hub.fetch("owner/other")
    with pytest.raises(RunError, match="no hub model of that name and revision 'v2'"):
        hub.fetch("owner/name", "v2")
