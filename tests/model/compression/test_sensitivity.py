"""What each block costs alone, against whole networks of which one block was changed."""

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
def test_one_walk_says_what_a_network_for_each_block_says(tiny, network, options):
    config = tiny(**options)
    whole, inputs = network(config), random_inputs(config)
    changes = [lambda block, linear, weight, size=size: weight * size if linear.endswith("value") else weight for size in (0.5, 1.0)]
    samples = samples_of(inputs)
    sums, count = divergences(config, dict(whole.named_parameters()), samples, changes)
    only_classes = bool(config.num_classes) and not config.token_head
    counted = torch.ones(3, dtype=torch.bool) if only_classes else inputs[3 if config.architecture == "encoder_decoder" else 1] != 0
    assert count == counted.sum() and sums.shape == (config.total_blocks, 2)

    def said(network):
        with torch.no_grad():
            found = network(*inputs)
        found = found[1 if only_classes else 0] if isinstance(found, tuple) else found
        return found[counted].double().log_softmax(dim=-1)

    for number, block in enumerate(whole.blocks()):
        other = copy.deepcopy(whole)
        for name, parameter in other.blocks()[number].named_parameters():
            if name.endswith("value.weight"):
                parameter.data *= 0.5
        wanted = F.kl_div(said(other), said(whole), reduction="sum", log_target=True).item()
        assert sums[number, 0].item() == pytest.approx(wanted, rel=1e-3, abs=1e-6) and wanted > 0
        assert abs(sums[number, 1].item()) < 1e-4, block
