"""Where models come from: a folder, or the hub, where one can be reached. No remote code, safetensors alone."""

import os
import re
import threading
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener, getproxies

_SECONDS = 5  # that the hub is given to answer
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # name or owner/name


def where(path: str) -> dict:
    """The keyword arguments of every from_pretrained call for `path`, a folder or a hub id.

    Without a network the hub's client tries again for a minute, for every file; so without one only its cache is read.
    """
    local = Path(path).is_dir() or not _hub_is_reachable()
    return {"trust_remote_code": False, "local_files_only": local}


def not_found(path: str, reason: str) -> str:
    """A line about a model that cannot be read, with the remedy."""
    if Path(path).is_dir():
        line = f"{path!r}: the folder holds no readable model config ({reason})"
        if (Path(path) / "adapter_config.json").exists():
            line += "; it holds a LoRA adapter: make a model of it with python -m tools.merge_adapter"
        return line
    line = f"{path!r}: no such folder"
    if _ID.fullmatch(path):
        line += f", and no hub model of that name could be fetched ({reason})"
    return f"{line}; download one first: hf download Qwen/Qwen3-0.6B --local-dir models/qwen3-0.6b"


@lru_cache
def _hub_is_reachable() -> bool:
    """Whether the hub answers over HTTP within a few seconds; not asked where it is switched off.

    That its name is known says little: behind many firewalls it is, and every file is then tried for a minute.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    proxies = getproxies()
    if any(proxy.startswith("socks") for proxy in proxies.values()):
        return True  # Python's library does not speak with one; the hub's client may
    answers: list[bool] = []
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    # In a thread, since a name server that is silent holds up the call for longer than its timeout.
    asking = threading.Thread(target=lambda: answers.append(_answers(endpoint, proxies)), daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return bool(answers) and answers[0]


def _answers(url: str, proxies: dict[str, str]) -> bool:
    """Whether a server answers, through a proxy where there is one. An error page is an answer, but not that of a
    proxy which lets nobody through.

    Args:
        proxies: scheme -> address, from the environment; "all" stands for every scheme that has none.
    """
    if "all" in proxies:
        proxies = dict.fromkeys(("http", "https"), proxies["all"]) | proxies
    opener = build_opener(ProxyHandler(proxies))
    try:
        with opener.open(Request(url, method="HEAD"), timeout=_SECONDS):
            return True
    except HTTPError as error:
        return error.code < 500 and error.code != HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
    except (OSError, ValueError):  # no such host, no route, no time; or an HF_ENDPOINT that is no address
        return False
