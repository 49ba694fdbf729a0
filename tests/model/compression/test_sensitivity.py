"""Tests of the cost of compressing each block alone, compared with whole networks in which one block is changed."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model.compression.sensitivity import divergences
from tests.model.both_sides import BERT, MARIAN, random_inputs, samples_of

FAMILIES = {
    "decoder": {},
    "encoder with classes": BERT | {"num_classes": 3},
    "classifier": BERT | {"num_classes": 3, "token_head": False},
    "pair": MARIAN,
}


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_one_walk_equals_one_changed_network_per_block(tiny, network, options):
    config = tiny(**options)
    whole, inputs = network(config), random_inputs(config)
    changes = [lambda block, linear, weight, size=size: weight * size if linear.endswith("value") else weight for size in (0.5, 1.0)]
    samples = samples_of(inputs)
    sums, count = divergences(config, dict(whole.named_parameters()), samples, changes)
    only_classes = bool(config.num_classes) and not config.token_head
    counted = torch.ones(3, dtype=torch.bool) if only_classes else inputs[3 if config.architecture == "encoder_decoder" else 1] != 0
    assert count == counted.sum() and sums.shape == (config.total_blocks, 2)

    def log_probabilities(network):
        with torch.no_grad():
            output = network(*inputs)
        output = output[1 if only_classes else 0] if isinstance(output, tuple) else output
        return output[counted].double().log_softmax(dim=-1)

    for number, block in enumerate(whole.blocks()):
        changed = copy.deepcopy(whole)
        for name, parameter in changed.blocks()[number].named_parameters():
            if name.endswith("value.weight"):
                parameter.data *= 0.5
        expected = F.kl_div(log_probabilities(changed), log_probabilities(whole), reduction="sum", log_target=True).item()
        assert sums[number, 0].item() == pytest.approx(expected, rel=1e-3, abs=1e-6) and expected > 0
        assert abs(sums[number, 1].item()) < 1e-4, block
