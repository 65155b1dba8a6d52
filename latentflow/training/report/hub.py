"""Putting a pipeline folder on the Hugging Face hub. The only module that writes to a network."""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path

import huggingface_hub

from ...errors import RunError, UserError
from .export import is_generated


def check_push(repository: str) -> None:
    """What can be known to fail before a long run: the name's form, and that there is a token. No network.

    Raises:
        UserError: either is wrong.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"'{repository}' is no name on the hub", "It has the form owner/name.")
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"there is no token to push to '{repository}' with", "Run `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, repository: str) -> str:
    """Upload a pipeline folder; its address. A new repository is private; a README.md of yours on the hub stays.

    Raises:
        UserError: the name is wrong, or there is no token.
        RunError: the hub refused or cannot be reached. The folder is whole.
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
    except (
        Exception
    ) as error:  # of huggingface_hub, of the HTTP library that it happens to use, of the network
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        again = shlex.join(["latentflow", "push", str(folder), repository])
        raise RunError(
            f"'{repository}' was not pushed: {reason}", f"The model is whole in {folder}. Later: {again}"
        ) from error
    return f"https://huggingface.co/{repository}"


def _has_own_card(hub: huggingface_hub.HfApi, repository: str) -> bool:
    """Whether the README.md on the hub is one that we did not write, or that was changed since."""
    if not hub.file_exists(repository, "README.md"):
        return False
    with tempfile.TemporaryDirectory() as place:  # not from the cache, which may be older
        file = hub.hf_hub_download(repository, "README.md", local_dir=place)
        return not is_generated(Path(file).read_text(encoding="utf-8", errors="replace"))
