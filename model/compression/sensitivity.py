"""What each block costs when it alone is compressed."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from model.compression.statistics import groups_of
from model.config import ModelConfig
from model.layers import Passed
from model.transformer import outputs_of
from model.walk import Step, walk

Change = Callable[[int, str, Tensor], Tensor]
"""(number of a block, name of a linear layer in it, its weight [out, in]) -> what it would be"""


def divergences(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    samples: Sequence[Passed],
    changes: Sequence[Change],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Kullback-Leibler divergence from the network as it is, of the network with one block changed, summed over tokens.

    -> [blocks, changes], nats, float64. One walk: behind each block further variants are under way, so it costs the forward passes of
    some changes x blocks^2 / 2 blocks, and keeps the samples' hidden states once for each variant.
    """
    plain = list(samples)
    variants: dict[tuple[int, int], list[Passed]] = {}
    behind: list[Step] = []
    for step in walk(config, state, device):
        if step.blocks_before == config.total_blocks:
            behind.append(step)
            continue
        begun = {}
        for number, change in enumerate(changes) if step.block is not None else ():
            changed = copy.deepcopy(step.module)
            for linear in (linear for group in groups_of(changed) for linear in group.linears):
                weight = changed.get_submodule(linear).weight
                weight.data = change(step.block, linear, weight.data)
            with torch.no_grad():
                begun[step.block, number] = [changed(sample) for sample in plain]
        for variant in (plain, *variants.values()):
            for number, sample in enumerate(variant):
                variant[number] = step(sample)
        variants |= begun
    sums = torch.zeros(config.total_blocks, len(changes), dtype=torch.float64)
    for number, sample in enumerate(plain):
        wanted, counted = _log_probabilities(config, behind, sample), sample[1] != 0
        for place, variant in variants.items():
            found = _log_probabilities(config, behind, variant[number])
            sums[place] += (wanted.exp() * (wanted - found)).sum(dim=-1)[counted if found.ndim == 3 else ...].double().sum().cpu()
    return sums


def _log_probabilities(config: ModelConfig, behind: Sequence[Step], passed: Passed) -> Tensor:
    """Of tokens, or, where none are predicted, of classes.  -> [batch, seq, vocab] or [batch, classes]"""
    for step in behind:
        passed = step(passed)
    said = outputs_of(config, passed)
    if isinstance(said, tuple):
        said = said[0] if config.token_head else said[1]
    return said.float().log_softmax(dim=-1)
