"""Seconds of a step by hand."""

import dataclasses

import pytest

from launch.ranks.layout import Layout
from launch.training.planning import devices
from launch.training.planning.devices import DEVICES, NETWORKS
from launch.training.planning.step_time import Cluster, Work, has_odd_heads, step_time, utilisation, work_of
from model.config import ModelConfig, count_parameters, flops_per_token

MODEL = ModelConfig(vocab_size=1000, sequence_length=2048, hidden_size=128, num_layers=4, num_attention_heads=4, tie_embeddings=True)
H100 = DEVICES["h100"]
NODES = Cluster(H100, NETWORKS["infiniband-400"], 8)


def test_work_is_that_of_the_flop_count():
    work, tokens = work_of(MODEL, 2, False, Layout(1), 1), 2 * 2048
    assert (work.products + work.attention) / tokens == pytest.approx(flops_per_token(MODEL, causal=False), rel=1e-3)
    head = 6 * 1000 * 128
    again = work_of(MODEL, 2, True, Layout(1), 1)
    assert again.products / tokens - head == pytest.approx(4 / 3 * (work.products / tokens - head))
    assert again.attention == pytest.approx(4 / 3 * work.attention) and again.kept == pytest.approx(4 / 3 * work.kept)


def test_layouts_divide_the_work_but_for_the_head():
    tokens, head = 2048, 6 * 1000 * 128
    whole, half = (work_of(MODEL, 1, False, Layout(size, 1, size), 1) for size in (1, 2))
    assert half.products == pytest.approx((whole.products - tokens * head) / 2 + tokens * head)
    assert half.attention == whole.attention / 2 and half.kept == whole.kept / 2
    assert work_of(MODEL, 1, False, Layout(2, 2), 1).products == whole.products / 2
    assert work_of(MODEL, 1, False, Layout(2, 1, 1, 2), 1).products == whole.products / 2


def test_exchanged_bytes_by_hand():
    hidden, parameters = 2048 * 128 * 2, count_parameters(MODEL)
    tensor = work_of(MODEL, 1, False, Layout(4, 1, 4), 1)
    assert tensor.exchanged == 4 * 4 * 2 * 3 / 4 * hidden, "4 blocks, 4 sums each, all but a quarter twice"
    assert work_of(MODEL, 1, True, Layout(4, 1, 4), 1).exchanged == 1.5 * tensor.exchanged
    sequence = work_of(MODEL, 1, False, Layout(4, 1, 1, 4), 1)
    assert sequence.exchanged == 4 * 2 * 4 * 3 / 4 * hidden / 4, "queries, keys, values and result, forward and backward"
    stages = [work_of(MODEL, 1, False, Layout(4), stage) for stage in range(4)]
    per_parameter = [(one.gathered, one.reduced, one.gradients) for one in stages]
    assert [tuple(value / parameters / 0.75 for value in values) for values in per_parameter] == [
        (0, 0, 6),
        (0, 0, 6),
        (0, 4, 2),
        (6, 0, 0),
    ]


def test_a_step_is_micro_batches_bubble_and_gradients():
    peak = H100.tflops * 1e12
    work = Work(peak * H100.speeds.products, 0, 0, NODES.exchange_bandwidth(2), 0, 0, NODES.data_bandwidth(4, 2), 2.0)
    time = step_time(work, 10, Layout(32, 4, 2), NODES)
    assert (time.compute, time.exchange, time.bubble, time.gradients) == pytest.approx((20, 10, 9, 1))
    assert time.total == pytest.approx(40)


def test_bandwidths_inside_and_between_nodes():
    inside, outside = H100.link_bandwidth, NODES.network.bandwidth
    assert NODES.exchange_bandwidth(8) == devices.LINK_SHARE * inside and NODES.exchange_bandwidth(16) == devices.NETWORK_SHARE * outside
    assert NODES.data_bandwidth(8, 1) == devices.NETWORK_SHARE * inside
    assert (
        NODES.data_bandwidth(16, 1) == devices.NETWORK_SHARE * 8 * outside
        and NODES.data_bandwidth(16, 8) == devices.NETWORK_SHARE * outside
    )
    slow = dataclasses.replace(NODES, network=NETWORKS["omni-path"])
    assert slow.gather_bandwidth(8) == H100.speeds.gather_bytes and slow.gather_bandwidth(16) == H100.speeds.gather_bytes / 4


def test_heads_that_8_does_not_divide_are_slower():
    odd = dataclasses.replace(MODEL, head_size=36)
    assert has_odd_heads(odd) and not has_odd_heads(MODEL)
    assert work_of(odd, 1, False, Layout(1), 1).factor == devices.ODD_HEAD_FACTOR
    assert work_of(odd, 1, False, Layout(2, 1, 2), 1).factor == pytest.approx(devices.ODD_HEAD_FACTOR * (1 + devices.SMALL_BATCH))


def test_utilisation_is_work_over_peak():
    assert utilisation(MODEL, 16, 2.0, 4, H100) == flops_per_token(MODEL) * 16 * 2048 / (2 * 4 * 989e12)


def test_devices_and_networks_have_plausible_numbers_and_sources():
    for device in DEVICES.values():
        assert device.source and device.speeds.source and device.network in NETWORKS
        assert 0 < device.speeds.attention < device.speeds.products < 1
        assert 40e9 <= device.memory_bytes < 1e12 and 1e12 < device.memory_bandwidth < 1e13 and 100 < device.watts <= 1000
    assert all(network.source and 1e9 < network.bandwidth < 1e11 for network in NETWORKS.values())
