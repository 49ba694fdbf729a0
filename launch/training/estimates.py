"""Estimates of what a run needs: bytes of model states on a rank, and floating-point operations."""

import dataclasses

from launch.ranks.layout import Layout
from launch.training.optimizers.base import WEIGHT_BYTES
from model.config import ModelConfig, count_parameters, flops_per_token


def model_state_bytes(parameters: float, stage: int, data_parallel_size: int, precision: str, state_bytes: int) -> dict[str, float]:
    """Return bytes per rank of weights, gradients and optimizer states (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054).

    Weights have the run's precision. Gradients are accumulated in float32 (fp16: in fp16). The optimizer has states of
    `state_bytes` per parameter and master weights in float32, which DeepSpeed keeps apart from the weights under ZeRO-1 to -3 in every
    precision. ZeRO-1 divides these among the ranks, ZeRO-2 also the gradients, ZeRO-3 also the weights (section 3 of the paper).
    """
    weight = 4 if precision == "float32" else 2
    gradient = 2 if precision == "fp16" else 4
    optimizer = state_bytes + (0 if precision == "float32" and stage == 0 else WEIGHT_BYTES)
    share = lambda from_stage: data_parallel_size if stage >= from_stage else 1  # noqa: E731
    return {
        "weights": parameters * weight / share(3),
        "gradients": parameters * gradient / share(2),
        "optimizer": parameters * optimizer / share(1),
    }


def parameters_per_rank(model: ModelConfig, layout: Layout, schedule: str = "1f1b") -> float:
    """Return the mean number of parameters on a rank, over the pipeline stages.

    Tensor parallelism divides the blocks only. A tied embedding is in the first and in the last stage, which DualPipeV has on one
    rank; the embedding of an encoder-decoder is also in the stage where its decoder begins.
    """
    in_blocks = parameters_in_blocks(model)
    outside = count_parameters(model) - in_blocks
    if layout.pipeline_stages > 1:
        stages = {0} if model.architecture != "encoder_decoder" else {0, layout.pipeline_stages // 2}
        if model.tie_embeddings and model.token_head and schedule == "1f1b":
            stages.add(layout.pipeline_stages - 1)
        outside += (len(stages) - 1) * model.vocab_size * model.hidden_size
    return (in_blocks / layout.tensor_parallel_size + outside) / layout.pipeline_stages


def parameters_in_blocks(model: ModelConfig) -> int:
    """Return the number of parameters of this model in its blocks."""
    has_decoder = bool(model.num_decoder_layers)
    smallest = dataclasses.replace(model, num_layers=1, num_decoder_layers=1 if has_decoder else model.num_decoder_layers)
    total = count_parameters(smallest)
    block = count_parameters(dataclasses.replace(smallest, num_layers=2)) - total
    if not has_decoder:
        return model.num_layers * block
    decoder_block = count_parameters(dataclasses.replace(smallest, num_decoder_layers=2)) - total
    return model.num_layers * block + (model.num_decoder_layers or 0) * decoder_block


def flops_per_counted_token(model: ModelConfig, target_length: int | None) -> float:
    """Return the training FLOPs of a token that BatchPlan counts; of an encoder-decoder, of a source token and its share of the target."""
    per_source = 1 + (target_length or 0) / model.sequence_length
    return flops_per_token(model, target_length=target_length) * per_source
