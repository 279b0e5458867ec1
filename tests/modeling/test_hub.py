"""Where models come from: no minute of retries without a network, and a remedy for what is not found.

python -m pytest tests/modeling/test_hub.py
"""

import socket

import pytest

from modeling import hub


@pytest.fixture
def reachable(monkeypatch):
    """A function (environment, whether names resolve) -> whether the hub is asked."""

    def ask(environment: dict, resolves: bool) -> bool:
        for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def resolve(*_):
            if not resolves:
                raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        hub._hub_is_reachable.cache_clear()
        return not hub.where("Qwen/Qwen3-0.6B")["local_files_only"]

    yield ask
    hub._hub_is_reachable.cache_clear()


@pytest.mark.parametrize(("environment", "resolves", "asked"), [
    ({}, True, True), ({}, False, False), ({"HF_HUB_OFFLINE": "1"}, True, False), ({"HTTPS_PROXY": "p:1"}, False, True),
])  # fmt: skip
def test_the_hub_is_asked_only_where_it_can_answer(reachable, environment, resolves, asked):
    assert reachable(environment, resolves) == asked


def test_a_folder_never_asks_the_hub(tmp_path, reachable):
    assert reachable({}, True)
    assert hub.where(str(tmp_path)) == {"trust_remote_code": False, "local_files_only": True}


def test_what_is_not_found_has_a_remedy(tmp_path):
    assert "no hub model of that name could be fetched (why)" in hub.not_found("owner/name", "why")
    assert hub.not_found("/no/such/folder", "why").startswith("'/no/such/folder': no such folder; download one first")
    assert "no readable model config (why)" in hub.not_found(str(tmp_path), "why")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "python -m tools.merge_adapter" in hub.not_found(str(tmp_path), "why")
