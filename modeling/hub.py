"""Where models come from: a folder, or the hub, where one can be reached. No remote code, safetensors alone."""

import os
import re
import threading
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener, getproxies

from utils import RunError, first_line, read_json

DOWNLOAD = "download one first: hf download Qwen/Qwen3-0.6B --local-dir models/qwen3-0.6b"
_NAMED = 3  # models of a run that a line names
_SECONDS = 5  # that the hub is given to answer
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # name or owner/name
_NOT_FETCHED = ["*.bin", "*.pt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*"]  # of `fetch`


def loading_options(path: str, revision: str | None = None) -> dict:
    """The keyword arguments of every from_pretrained call for `path`, a folder or a hub id.

    Without a network the hub's client tries again for a minute, for every file; so without one only its cache is read.
    An adapter's folder names its base model, and where that is on the hub the revision of it.

    Args:
        revision: commit, tag or branch of a hub id; None = its main branch.
    """
    adapter = _adapter_config(Path(path))
    source = adapter.get("base_model_name_or_path") or path
    if revision is None:
        revision = adapter.get("revision")
    local = Path(source).is_dir() or not _hub_is_reachable()
    options = {"trust_remote_code": False, "local_files_only": local}
    if revision is not None:
        options["revision"] = revision
    return options


def fetch(path: str, revision: str | None = None) -> Path:
    """The folder of a model: `path` itself, or where the hub's client keeps what it fetched; nothing that is pickled.

    Raises:
        RunError: there is no such folder, and no such model could be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    local = loading_options(path, revision)["local_files_only"]
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=local, ignore_patterns=_NOT_FETCHED))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise RunError(not_found(path, first_line(error), revision)) from None


def _adapter_config(folder: Path) -> dict:
    """What a folder says about the LoRA adapter in it; nothing if there is none."""
    try:
        config = read_json(folder / "adapter_config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def at_revision(path: str, revision: str | None) -> str:
    """What names a model, for people."""
    return path if revision is None else f"{path} at revision {revision}"


def not_found(path: str, reason: str, revision: str | None = None) -> str:
    """A line about a model that cannot be read, with the remedy."""
    if Path(path).is_dir():
        line = f"{path!r}: the folder holds no readable model config ({reason})"
        if (Path(path) / "adapter_config.json").exists():
            line += "; it holds a LoRA adapter: make a model of it with python -m tools.merge_adapter"
        return line + models_below(Path(path))
    line = f"{path!r}: no such folder"
    if _ID.fullmatch(path):
        of_that_name = "of that name" if revision is None else f"of that name and revision {revision!r}"
        line += f", and no hub model {of_that_name} could be fetched ({reason})"
    return line


def models_below(folder: Path) -> str:
    """The end of a line about a folder without a model, as a run's is: the last models in it; "" if it has none."""
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json", "modules.json")):
        return ""  # a model of which something is missing; its 1_Pooling/ has a config.json too
    configs = [path for name in ("config.json", "adapter_config.json") for path in folder.glob(f"*/{name}")]
    names = sorted({path.parent.name for path in configs}, key=lambda name: (len(name), name))  # step_9, step_10
    if not names:
        return ""
    count = "" if len(names) <= _NAMED else f" of {len(names)}"
    return f"; this is a run or another folder of models, name one{count}: {', '.join(names[-_NAMED:])}"


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
    except (OSError, ValueError):  # no such host, no route, no time; or an HF_ENDPOINT that is not an address
        return False
