"""The network that a run learns from with distillation.teacher, beside its targets."""

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
    """A model on disk whose word on the next token can be compared with this one's. Raises UserError where it cannot."""

    def __init__(self, path: str, config: ModelConfig):
        self.path = path
        self.opened: OpenedModel = opened(path)
        self.opened.refuse_quantized("a teacher is not")
        there, reason = self.opened.config, ""
        for name in ("architecture", "vocab_size", "token_types"):
            if getattr(there, name) != getattr(config, name):
                reason = f"has {name} {getattr(there, name)}; this run has model.{name} {getattr(config, name)}, and they must be the same"
        if there.sequence_length < config.sequence_length:
            reason = f"reads {there.sequence_length} tokens at most; model.sequence_length is {config.sequence_length}"
        if there.num_classes or config.num_classes or not there.token_head:
            reason = "can teach tokens alone: neither it nor this run may have classes (model.num_classes), and it needs a head for tokens"
        if reason:
            raise UserError(f"distillation.teacher {path} {reason}.")
        # What of the other documents of a sample it sees is the run's to say.
        of_run = {name: getattr(config, name) for name in ("document_mask", "prefix_attention")}
        self.config = dataclasses.replace(there, dropout=0.0, **of_run)

    def network(self, device: torch.device, dtype: torch.dtype) -> Transformer:
        """With its weights, read one after the other; it learns nothing."""
        return Transformer.from_state(self.config, self.opened.state, device, dtype).requires_grad_(False)

    @property
    def tokenizer(self) -> Path | None:
        return self.opened.tokenizer

    def __str__(self) -> str:
        step = f" (step {self.opened.step:,})" if self.opened.step is not None else ""
        return (
            f"{self.path}{step}: {count_parameters(self.config):,} parameters; its forward pass adds "
            f"{flops_per_token(self.config) / 3:,.0f} FLOPs a token, which the work does not count"
        )


def fingerprint(network: Transformer) -> str:
    """A hash of all weights."""
    sums = [
        (
            name,
            checksum(parameter.float().flatten(), ShardSlice.of_whole(name, parameter.shape)),
        )
        for name, parameter in network.named_parameters()
    ]
    return hashlib.sha256(repr(sums).encode()).hexdigest()
