"""What launch/prune.py and launch/quantize.py are both asked."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    model: str
    """Run folder, a checkpoint in one, or a Hugging Face folder."""
    output: str
    """New folder: safetensors, config.json, tokenizer, report.md with its pictures, report.json."""
    average: int = 1
    """Mean of the weights of the newest so many checkpoints."""
    data: str | None = None
    """Folder that data/prepare.py wrote: its training split calibrates, its validation split measures (default: the run's own)."""
    calibration_data: str | None = None
    """Another such folder, whose training split calibrates."""
    calibration_samples: int = 128
    """Samples that calibrate, evenly spread; 0: none, for methods that look at weights alone."""
    sequence_length: int | None = None
    """Tokens of a sample (default: the model's context)."""
    test_samples: int = 256
    """Samples of the validation split on which the model is measured before and after; 0: none."""
    sensitivity_samples: int = 8
    """Calibration samples on which each block is measured compressed alone; 0: none. Their hidden states are kept once a block."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Type of what is written and not quantized, and of scales."""
    ignore: tuple[str, ...] = ()
    """Matrices that stay as they are: names such as 3.feed_forward.down (of block 3, from 0), or patterns such as 0.* and *.value."""
    max_shard_gib: float = 4.0
    """Largest safetensors file, GiB."""
    max_perplexity_ratio: float | None = None
    """Status 3 where perplexity after / before is above this; the folder is kept (default: no limit)."""
    strict: bool = False
    """Status 1 where a matrix went otherwise than asked, such as rounded because its statistics could not be inverted."""
    force: bool = False
    """Compress what is compressed already, and measure on text that calibrated."""
    dry_run: bool = False
    """Print the plan, with memory and time, and stop."""
