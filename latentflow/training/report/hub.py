"""Uploading a pipeline folder to the Hugging Face hub. No other module writes to a network."""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path

import huggingface_hub

from ...errors import RunError, UserError
from .export import is_generated


def check_push(repository: str) -> None:
    """Check before a long run what needs no network: the form of the name, and that there is a token.

    Raises:
        UserError: the name is wrong, or there is no token.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"'{repository}' is no name on the hub", "It must have the form owner/name.")
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"there is no token to push to '{repository}' with", "Run `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, repository: str) -> str:
    """Upload a pipeline folder, and return its address. A new repository is private; the user's README.md there stays.

    Raises:
        UserError: the name is wrong, or there is no token.
        RunError: the hub refused, or cannot be reached. The folder is unharmed.
    """
    check_push(repository)
    hub = huggingface_hub.HfApi()
    try:
        if not hub.repo_exists(repository):
            hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload by latentflow",
            ignore_patterns=["README.md"] if _has_own_card(hub, repository) else [],
        )
    except Exception as error:  # huggingface_hub's own, its HTTP library's, or the network's
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        command = shlex.join(["latentflow", "push", str(folder), repository])
        raise RunError(
            f"'{repository}' was not pushed: {reason}", f"The model is in {folder}. Try again: {command}"
        ) from error
    return f"https://huggingface.co/{repository}"


def _has_own_card(hub: huggingface_hub.HfApi, repository: str) -> bool:
    """Return whether README.md on the hub was written or changed by the user."""
    if not hub.file_exists(repository, "README.md"):
        return False
    with tempfile.TemporaryDirectory() as folder:  # the cache may be older
        file = hub.hf_hub_download(repository, "README.md", local_dir=folder)
        return not is_generated(Path(file).read_text(encoding="utf-8", errors="replace"))
