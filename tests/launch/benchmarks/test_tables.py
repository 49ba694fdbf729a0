"""Every name that a benchmark offers has a function that measures it."""

from launch.benchmarks import compression_parts, pruning_and_quantization, training_step, training_step_contenders


def test_every_named_contender_has_a_function():
    assert list(training_step_contenders.TABLE) == list(training_step.CONTENDERS)


def test_every_named_part_has_a_function():
    assert list(compression_parts.TABLE) == list(pruning_and_quantization.PARTS)
