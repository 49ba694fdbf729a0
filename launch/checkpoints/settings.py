"""Settings of launch/convert.py. Nothing heavy is imported here."""

import dataclasses
from typing import Annotated

from annotated_types import Gt


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """Settings of launch/convert.py."""

    checkpoint: str
    """Run folder (its newest complete checkpoint is taken), or a checkpoint in one."""
    output: str
    """New run folder; it must not exist or be empty. The run resumes in it with its own settings, this --output and --resume, in any
    layout, and every other script reads it. TensorBoard curves and the log stay in the original folder."""
    file_gib: Annotated[float, Gt(0)] = 4.0
    """Maximum file size, GiB; a larger parameter gets a file of its own."""
