"""The cost of compressing each block alone."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from model.compression.statistics import groups_of
from model.config import ModelConfig
from model.layers import Stream
from model.transformer import Block, select_outputs
from model.walk import Step, walk

Change = Callable[[int, str, Tensor], Tensor]
"""(index of a block, name of a linear layer in it, its weight [out, in]) -> the changed weight"""

_CHUNK_ENTRIES = 1 << 20


def divergences(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    samples: Sequence[Stream],
    changes: Sequence[Change],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """Return the KL divergence from the unchanged network to the network with one block changed, and the number of predictions.

    The divergence is summed over tokens that are not padding or, if no tokens are predicted, over samples.  -> [blocks, changes], nats,
    float64. It takes one walk, which carries one more variant per change after each block: the cost is that of about
    changes x blocks^2 / 2 blocks' forward passes, and the hidden states of the samples are kept once per variant.
    """
    reference = list(samples)
    variants: dict[tuple[int, int], list[Stream]] = {}
    last_steps: list[Step] = []
    for step in walk(config, state, device):
        if step.blocks_before == config.total_blocks:
            last_steps.append(step)
            continue
        before = list(reference)
        for variant in (reference, *variants.values()):
            for number, sample in enumerate(variant):
                variant[number] = step(sample)
        if step.block is not None:
            for number, change in enumerate(changes):
                is_last = number == len(changes) - 1  # then the unchanged block is no longer needed
                changed = step if is_last else dataclasses.replace(step, module=copy.deepcopy(step.module))
                _change_block(changed.module, step.block, change)
                variants[step.block, number] = [changed(sample) for sample in before]
                del changed
        del step, before
    sums, count = torch.zeros(config.total_blocks, len(changes), dtype=torch.float64, device=device), 0
    for number, sample in enumerate(reference):
        logits = _logits(config, last_steps, sample)
        count += len(logits)
        for block_and_change, variant in variants.items():
            sums[block_and_change] += _divergence(logits, _logits(config, last_steps, variant[number]))
    return sums, count


def _change_block(block: nn.Module, index: int, change: Change) -> None:
    """Change the weights of all linear layers of a block in place."""
    assert isinstance(block, Block)
    for linear in (linear for group in groups_of(block) for linear in group.linears):
        weight = block.get_parameter(f"{linear}.weight")
        weight.data = change(index, linear, weight.data)


def _logits(config: ModelConfig, last_steps: Sequence[Step], stream: Stream) -> Tensor:
    """Return the logits of tokens that are not padding or, if none are predicted, of classes.  -> [tokens, vocab] or [batch, classes]"""
    counted = stream.segments != 0
    for step in last_steps:
        stream = step(stream)
    output = select_outputs(config, stream)
    if isinstance(output, tuple):
        output = output[0] if config.token_head else output[1]
    return output[counted] if output.ndim == 3 else output


def _divergence(reference: Tensor, changed: Tensor) -> Tensor:
    """Return the divergence summed over rows, a few at a time so that the logits are not copied.  [rows, choices] both -> []"""
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    rows = max(1, _CHUNK_ENTRIES // reference.shape[1])
    for old, new in zip(reference.split(rows), changed.split(rows), strict=True):
        old, new = old.float().log_softmax(dim=1), new.float().log_softmax(dim=1)
        total += (old.exp() * (old - new)).sum(dtype=torch.float64)
    return total
