"""Putting a pipeline folder on the Hugging Face hub. The only module that writes to a network."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ..errors import UserError


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
    """Upload a pipeline folder; its address. A new repository is private; a README.md on the hub stays as it is.

    Raises:
        UserError: the name is wrong, there is no token, or the hub refused or cannot be reached. The folder is whole.
    """
    check_push(repository)
    hub = huggingface_hub.HfApi()
    try:
        if not hub.repo_exists(repository):
            hub.create_repo(repository, private=True, exist_ok=True)
        kept = ["README.md"] if hub.file_exists(repository, "README.md") else []
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload by latentflow",
            ignore_patterns=kept,
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"'{repository}' was not pushed: {str(error).strip().splitlines()[0]}",
            f"The model is whole in {folder}. Later: latentflow push {folder} {repository}",
        ) from error
    return f"https://huggingface.co/{repository}"
