"""Where models come from: a folder, or the hub, where one can be reached. No remote code, safetensors alone."""

import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlparse

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
    """Whether the hub may answer: it is not switched off, and its name is known to a name server."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        socket.getaddrinfo(urlparse(endpoint).hostname, 443)
    except OSError:
        return False
    return True
