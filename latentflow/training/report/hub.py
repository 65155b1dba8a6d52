"""Uploading a pipeline or an adapter to the Hugging Face hub. No other module writes to a network."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd

from ...errors import RunError, UserError, one_line, plural
from .export import is_generated, moved, relocated
from .origins import ADAPTER_FILE

# Beside the user's own card lies the newest one of ours, which is a draft.
_DRAFTS = re.compile(r"(README|sample)-step-\d+\.\w+")


def check_push(repository: str) -> None:
    """Check before a long run what needs no network: the form of the name, and that there is a token.

    Raises:
        UserError: the name is wrong, or there is no token.
    """
    check_name(repository)
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"there is no token to push to '{repository}' with", "Run `hf auth login`, or set HF_TOKEN."
        )


def check_name(repository: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        UserError: it is none.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"'{repository}' is no name on the hub", "It must have the form owner/name.")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds neither a pipeline nor an adapter.

    Raises:
        UserError: it does not; says what to give instead.
    """
    if any((folder / name).is_file() for name in ("model_index.json", ADAPTER_FILE)):
        return
    if not folder.exists():
        raise UserError(f"there is no folder '{folder}'", "Check the path: a run, a pipeline or an adapter.")
    raise UserError(
        f"'{folder}' holds neither a pipeline (model_index.json) nor an adapter ({ADAPTER_FILE})",
        "A run's pipeline is in RUN/pipeline, its adapter in RUN/adapter.",
    )


def push(folder: Path, repository: str) -> tuple[str, list[str]]:
    """Upload the folder of a pipeline or an adapter. A new repository is private; the user's README.md there stays.

    Returns:
        The repository's address, and what to know about the upload: lines.

    Raises:
        UserError: the name is wrong, there is no token, or the folder holds neither.
        RunError: the hub refused, or cannot be reached. The folder is unharmed.
    """
    check_push(repository)
    uploads, lines = contents(folder, repository), []
    hub = huggingface_hub.HfApi()
    try:
        if not hub.repo_exists(repository):
            hub.create_repo(repository, private=True, exist_ok=True)
            lines.append(f"{repository} is new, and private: make it public on the hub.")
        elif "README.md" in uploads and _has_own_card(hub, repository):
            del uploads["README.md"]
            lines.append(f"README.md of {repository} was written or changed by hand, and stays as it is.")
        hub.create_commit(
            repository,
            operations=[CommitOperationAdd(name, content) for name, content in uploads.items()],
            commit_message="Upload by latentflow",
        )
    except Exception as error:  # huggingface_hub's own, its HTTP library's, or the network's
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        command = shlex.join(["latentflow", "push", str(folder), repository])
        raise RunError(
            f"'{repository}' was not pushed: {reason}", f"The model is in {folder}. Try again: {command}"
        ) from error
    return f"https://huggingface.co/{repository}", lines


def contents(folder: Path, repository: str) -> dict[str, bytes | Path]:
    """Return what is uploaded of a folder: name in the repository -> file, or what is uploaded in its place.

    Hidden files stay at home. The card's lines load from the repository, and configs do not name the folders that
    their parts came from.

    Raises:
        UserError: the folder holds neither a pipeline nor an adapter.
    """
    check_folder(folder)
    found: dict[str, bytes | Path] = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if (
            not file.is_file()
            or any(part.startswith((".", "__")) for part in parts)
            or _DRAFTS.fullmatch(file.name)
        ):
            continue
        found["/".join(parts)] = _without_origin(file) if file.suffix == ".json" else file
    if isinstance(card := found.get("README.md"), Path):
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
        text = moved(text, repository) if is_generated(text) else relocated(text, repository, folder)
        found["README.md"] = text.encode("utf-8", errors="surrogateescape")
    return found


def content_lines(folder: Path, repository: str) -> list[str]:
    """Describe an upload: its size, and its files."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in contents(folder, repository).items()
    }
    lines = [f"{repository}: {plural(len(sizes), 'file')}, {sum(sizes.values()) / 1e6:.1f} MB, from {folder}"]
    lines += [f"  {one_line(name)}  {size / 1e6:.2f} MB" for name, size in sizes.items()]
    return lines if "README.md" in sizes else [*lines, "There is no README.md: the hub will show no card."]


def _without_origin(file: Path) -> bytes | Path:
    """Return a config without the place that it was loaded from, or its file where it names none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return file
    if not isinstance(config, dict) or config.pop("_name_or_path", None) is None:
        return file
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _has_own_card(hub: huggingface_hub.HfApi, repository: str) -> bool:
    """Return whether README.md on the hub was written or changed by the user."""
    if not hub.file_exists(repository, "README.md"):
        return False
    with tempfile.TemporaryDirectory() as folder:  # the cache may be older
        file = hub.hf_hub_download(repository, "README.md", local_dir=folder)
        return not is_generated(Path(file).read_text(encoding="utf-8", errors="replace"))
