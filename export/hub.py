"""Push a model folder to the Hugging Face hub, where a run was asked to."""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from utils import first_line

_TEMPORARY = ["*.tmp", ".*"]  # of a file that is being replaced


def push_problems(push: bool, repo_id: str | None) -> list[str]:
    """Why a folder could not be pushed when it is there, one line each; asks nobody, and looks at no repository."""
    if not push:
        return []
    if repo_id is None:
        return ["hub_model_id: missing; push_to_hub needs the repository's id, as NAME/MODEL"]
    problems = id_problems(repo_id)
    if constants.HF_HUB_OFFLINE:
        problems.append("push_to_hub: HF_HUB_OFFLINE is set: unset it, or leave push_to_hub out")
    elif get_token() is None:
        problems.append("push_to_hub: there is no hub token here: `hf auth login` stores one, or set HF_TOKEN")
    return problems


def id_problems(repo_id: str) -> list[str]:
    """What is wrong with the id of a repository, as a list of at most one line."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return [f"hub_model_id: {first_line(error)}"]
    return []


def licence_problem(license: str | None) -> str | None:
    """Why a licence is not an identifier of the hub, None if it may be one. The hub alone knows them all."""
    if license is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        return None
    return f"license: {license!r} is not an identifier of the hub: write it as apache-2.0, mit, cc-by-4.0, other"


def language_problem(language: str | None) -> str | None:
    """Why a text holds no codes of languages, None if it may."""
    unlike = [code for code in languages(language) if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", code)]
    if not unlike:
        return None
    return f"language: {unlike[0]!r} is not a code of ISO 639: give some as en,de, or multilingual, or code"


def languages(language: str | None) -> list[str]:
    """The codes in a text that separates them by commas.

    >>> languages("en, de"), languages(None)
    (['en', 'de'], [])
    """
    return [] if language is None else [code.strip() for code in language.split(",")]


def push(folder: Path, repo_id: str, step: int) -> str:
    """Push a model folder; returns a line that says whether that succeeded.

    The repository is made where it is not there, private; one that is there keeps its visibility and its other files.
    What fails is said and raises nothing: the folder is on this disk.

    Args:
        step: of the training, for the commit's message.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=True, exist_ok=True).repo_id
        message = f"step {step} of training"
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=_TEMPORARY)
    except Exception as error:
        return (
            f"warning: not pushed to {repo_id}: {first_line(error)}. The run is finished all the same, its model is "
            f"{folder}: give the same command again, or `hf upload {repo_id} {folder}`"
        )
    return f"pushed {folder} to {repo_id}"
