"""The network that a run learns from with distillation.teacher, in addition to its targets."""

import dataclasses
import hashlib
from pathlib import Path

import torch

from data.command_line import UserError
from launch.checkpoints.initial import opened
from launch.checkpoints.opening import OpenedModel
from launch.checkpoints.state import ShardSlice, checksum
from model.config import ModelConfig, count_parameters, flops_per_token
from model.transformer import Transformer


class Teacher:
    """A model on disk whose distribution over the next token is comparable with that of the model in training."""

    def __init__(self, path: str, config: ModelConfig):
        """Open the model at `path` for a run with `config`. Raises UserError if it cannot teach that run."""
        self.path = path
        self.opened: OpenedModel = opened(path)
        self.opened.refuse_quantized("a teacher must not be")
        its_config, reason = self.opened.config, ""
        for name in ("architecture", "vocab_size", "token_types"):
            if getattr(its_config, name) != getattr(config, name):
                reason = (
                    f"has {name} {getattr(its_config, name)}; this run has model.{name} {getattr(config, name)}, and they must be the same"
                )
        if its_config.sequence_length < config.sequence_length:
            reason = f"reads at most {its_config.sequence_length} tokens; model.sequence_length is {config.sequence_length}"
        if its_config.num_classes or config.num_classes or not its_config.token_head:
            reason = "can teach only tokens: neither it nor this run may have classes (model.num_classes), and it must have a token head"
        if reason:
            raise UserError(f"distillation.teacher {path} {reason}.")
        # The run decides which other documents of a sample the teacher sees.
        of_run = {name: getattr(config, name) for name in ("document_mask", "prefix_attention")}
        self.config = dataclasses.replace(its_config, dropout=0.0, **of_run)

    def network(self, device: torch.device, dtype: torch.dtype) -> Transformer:
        """Return the network with its weights, read one after the other. It is not trained."""
        return Transformer.from_state(self.config, self.opened.state, device, dtype).requires_grad_(False)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file next to the model."""
        return self.opened.tokenizer

    def __str__(self) -> str:
        step = f" (step {self.opened.step:,})" if self.opened.step is not None else ""
        return (
            f"{self.path}{step}: {count_parameters(self.config):,} parameters; its forward pass adds "
            f"{flops_per_token(self.config) / 3:,.0f} FLOPs per token, which are not counted as work"
        )


def fingerprint(network: Transformer) -> str:
    """Return a hash of all weights of a network."""
    sums = [
        (
            name,
            checksum(parameter.float().flatten(), ShardSlice.of_whole(name, parameter.shape)),
        )
        for name, parameter in network.named_parameters()
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()
