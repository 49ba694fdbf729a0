"""Tests of the statistics of a block's inputs, compared with those of all inputs at once, and of the groups that share an input."""

import pytest
import torch

from model.compression.statistics import Gatherer, groups_of, matrices, output_error
from model.transformer import Block, Transformer
from model.walk import walk
from tests.model.both_sides import BERT, GPT2, MARIAN, T5, random_inputs, samples_of

FAMILIES = {"llama": {"num_key_value_heads": 2}, "gpt2": GPT2, "bert": BERT, "marian": MARIAN, "t5": T5}


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_sums_over_samples_equal_those_of_all_inputs_without_padding(tiny, network, options):
    config = tiny(**options)
    whole, inputs = network(config), random_inputs(config)
    inputs_by_name: dict[str, list[torch.Tensor]] = {}
    for name, matrix in matrices(config).items():
        module = whole.get_submodule(name.removesuffix(".weight"))
        assert tuple(module.weight.shape) == matrix.shape
        module.register_forward_pre_hook(lambda module, given, name=str(matrix): inputs_by_name.setdefault(name, []).append(given[0]))
    with torch.no_grad():
        whole(*inputs)
    streams = samples_of(inputs)
    for step in walk(config, dict(whole.named_parameters())):
        if step.block is not None:
            with Gatherer(step.module) as gatherer:
                for sample in streams:
                    gatherer.counted = sample.segments != 0
                    gatherer.counted_in_source = None if sample.source_segments is None else sample.source_segments != 0
                    step(sample)
            segments = torch.cat([sample.segments for sample in streams])
            source = segments if streams[0].source_segments is None else torch.cat([sample.source_segments for sample in streams])
            for group, sums in gatherer.sums():
                for linear in group.linears:
                    (x,) = inputs_by_name[f"{step.block}.{linear}"]
                    rows = x[(source if linear in ("cross_attention.key", "cross_attention.value") else segments) != 0].double()
                    computed = sums.statistics()
                    assert computed.tokens == len(rows)
                    torch.testing.assert_close(computed.second_moment, (rows.T @ rows).float(), rtol=1e-4, atol=1e-3)
                    torch.testing.assert_close(computed.magnitude, rows.abs().mean(dim=0).float(), rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(computed.largest, rows.abs().amax(dim=0).float(), rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(computed.norms, rows.norm(dim=0).float(), rtol=1e-4, atol=1e-4)
                    change, weight = torch.ones(3, rows.shape[1]), torch.randn(3, rows.shape[1])
                    expected = (rows @ change.double().T).norm() / (rows @ weight.double().T).norm()
                    assert output_error(change, weight, computed) == pytest.approx(expected.item(), rel=1e-3)
        if step.blocks_before < config.total_blocks:
            streams = [step(sample) for sample in streams]


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_scales_can_move_from_a_producer_into_its_group(tiny, network, options):
    config, inputs = tiny(**options), random_inputs(tiny(**options))
    whole, generator = network(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = whole(*inputs)
        moved = 0
        for block in (module for module in whole.modules() if isinstance(module, Block)):
            for group in groups_of(block):
                if group.producer is None:
                    continue
                weights = [block.get_submodule(linear).weight for linear in group.linears]
                scales = torch.rand(weights[0].shape[1], generator=generator) + 0.5
                for parameter in block.get_submodule(group.producer).parameters():
                    parameter.div_(scales if parameter.ndim == 1 else scales[:, None])
                for weight in weights:
                    weight.mul_(scales)
                moved += 1
        assert moved >= config.total_blocks
        torch.testing.assert_close(whole(*inputs), before, rtol=1e-3, atol=1e-4)


def test_scaled_statistics_equal_those_of_scaled_inputs(tiny):
    block = Block(tiny(), 0, 0)
    x, scales = torch.randn(1, 9, 32), torch.rand(32) + 0.5
    plain_and_scaled = []
    for inputs in (x, x / scales):
        with Gatherer(block) as gatherer:
            block.attention.query(inputs)
        plain_and_scaled.append(next(sums for group, sums in gatherer.sums() if "attention.query" in group.linears).statistics())
    scaled = plain_and_scaled[0].divided_by(scales)
    for name in ("second_moment", "magnitude", "largest"):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain_and_scaled[1], name), rtol=1e-4, atol=1e-5)


def test_rank_without_samples_adds_nothing(tiny):
    block = Block(tiny(), 0, 0)
    with Gatherer(block) as gatherer:
        pass
    sums = {group.linears: one for group, one in gatherer.sums()}
    assert len(sums) == len(groups_of(block)) and all(one.tokens == 0 and not one.second_moment.any() for one in sums.values())
    assert sums["feed_forward.down",].second_moment.shape == (tiny().intermediate_size,) * 2


def test_matrices_are_the_linear_layers_of_blocks(tiny):
    config = tiny(**MARIAN)
    by_name = matrices(config)
    assert {matrix.block for matrix in by_name.values()} == set(range(4)) and set(by_name) <= {
        n for n, _ in Transformer(config).named_parameters()
    }
    assert len(by_name) == 2 * 6 + 2 * 10
