"""The cost of compressing each block alone."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from model.compression.statistics import groups_of
from model.config import ModelConfig
from model.layers import Stream
from model.transformer import select_outputs
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
    plain = list(samples)
    variants: dict[tuple[int, int], list[Stream]] = {}
    behind: list[Step] = []
    for step in walk(config, state, device):
        if step.blocks_before == config.total_blocks:
            behind.append(step)
            continue
        before = list(plain)
        for variant in (plain, *variants.values()):
            for number, sample in enumerate(variant):
                variant[number] = step(sample)
        for number, change in enumerate(changes) if step.block is not None else ():
            is_last = number == len(changes) - 1  # the block itself is no longer needed
            changed = step if is_last else dataclasses.replace(step, module=copy.deepcopy(step.module))
            for linear in (linear for group in groups_of(changed.module) for linear in group.linears):
                weight = changed.module.get_submodule(linear).weight
                weight.data = change(step.block, linear, weight.data)
            variants[step.block, number] = [changed(sample) for sample in before]
            del changed, weight
        del step, before
    sums, count = torch.zeros(config.total_blocks, len(changes), dtype=torch.float64, device=device), 0
    for number, sample in enumerate(plain):
        wanted = _logits(config, behind, sample)
        count += len(wanted)
        for place, variant in variants.items():
            sums[place] += _divergence(wanted, _logits(config, behind, variant[number]))
    return sums, count


def _logits(config: ModelConfig, behind: Sequence[Step], passed: Stream) -> Tensor:
    """Return the logits of tokens that are not padding or, if none are predicted, of classes.  -> [tokens, vocab] or [batch, classes]"""
    counted = passed.segments != 0
    for step in behind:
        passed = step(passed)
    said = select_outputs(config, passed)
    if isinstance(said, tuple):
        said = said[0] if config.token_head else said[1]
    return said[counted] if said.ndim == 3 else said


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the divergence summed over rows, a few at a time so that the logits are not copied.  [rows, choices] both -> []"""
    total = torch.zeros((), dtype=torch.float64, device=wanted.device)
    rows = max(1, _CHUNK_ENTRIES // wanted.shape[1])
    for old, new in zip(wanted.split(rows), found.split(rows), strict=True):
        old, new = old.float().log_softmax(dim=1), new.float().log_softmax(dim=1)
        total += (old.exp() * (old - new)).sum(dtype=torch.float64)
    return total
