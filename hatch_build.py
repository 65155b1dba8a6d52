"""A wheel carries the programs and the shipped checkpoints as files under ``latentflow/programs/``.

An editable install needs no copies, since `latentflow` then finds them in the repository.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("train", "pipelines", "checkpoints")


class ProgramsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds whatever of ``SHIPPED`` exists to a standard wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":
            return
        for name in SHIPPED:
            for file in sorted(Path(self.root, name).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    inside = file.relative_to(self.root).as_posix()
                    build_data["force_include"][str(file)] = f"latentflow/programs/{inside}"
