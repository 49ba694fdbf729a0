"""Layouts in which squared gradient norms are measured, and the same squares by brute force, on one process."""

import functools
import json

import torch

from launch.training.engine import labels_of
from launch.training.gradient_squares import PARTS
from model.loss import training_loss
from model.transformer import Transformer
from tests.launch.training.layout_cases import STAGES, TENSOR, case_of
from tests.launch.training.layouts_on_ranks import GLOBAL_BATCH, counts_of, global_batch, rate, run_settings

STEPS = 2
ON = ["--log.noise_scale=true"]
MICRO_BATCH = 1


def noisy_case(json_name: str, sizes: dict, family: str, **more) -> dict:
    return case_of(json_name, sizes, family, words=ON, micro_batch=MICRO_BATCH) | more


WITH_NOISE_SCALE = {
    f"noise scale, {ranks} {json_name} {sizes} {family}": (ranks, noisy_case(json_name, sizes, family, **more))
    for ranks, json_name, sizes, family, more in (
        (1, "zero1", {}, "gpt2", {}),
        *((2, f"zero{stage}", {}, "llama", {"recompute": stage == 2}) for stage in range(4)),
        (2, "zero2_offload", {}, "llama", {}),
        (2, "zero3", {}, "gpt2", {"zero": {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}}),
        *((2, f"zero{stage}", TENSOR, "llama", {}) for stage in range(4)),
        (2, "zero1", TENSOR, "gpt2", {}),
        *((2, json_name, STAGES, family, {}) for json_name in ("pipeline_zero1", "pipeline_dualpipev") for family in ("llama", "gpt2")),
        (2, "pipeline_zero1", STAGES, "transformer", {}),
        (2, "zero2", {}, "t5", {}),
        (4, "zero3", TENSOR, "llama", {}),
        (4, "pipeline_zero1", STAGES, "llama", {}),
        (4, "pipeline_zero1", STAGES | TENSOR, "llama", {}),
    )
}

MEASURED_OR_NOT = {f"noise scale {'on' if words else 'off'}": case_of("zero2", {}, "llama", words=words, hooks=True) for words in (ON, [])}
"""The same training with and without the noise scale; the second has no hooks at all."""


def part_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    if ".attention." in name or ".cross_attention." in name:
        return "attention"
    if ".feed_forward." in name:
        return "feed_forward"
    return "embedding" if name in ("0.weight", "tied_modules.embedding.weight") else "others"


def brute_force(case: dict) -> list[dict]:
    """Return the squares of each step: one process computes the gradient of each micro-batch by itself."""
    return _brute_force(json.dumps({key: case[key] for key in ("model", "loss", "words")} | {"json": ""}))


@functools.cache
def _brute_force(case_as_json: str) -> list[dict]:
    case = json.loads(case_as_json)
    settings = run_settings(case)
    model = Transformer(settings.model, settings.seed).train()
    named = dict(model.named_parameters())
    decayed, others = ([p for p in named.values() if (p.dim() >= 2) == matrices] for matrices in (True, False))
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95))
    squares = []
    for step in range(STEPS):
        batch, number = global_batch(step, settings.model), GLOBAL_BATCH // MICRO_BATCH
        gradients = []
        for start in range(0, GLOBAL_BATCH, MICRO_BATCH):
            part = batch.map(lambda whole, start=start: whole[start : start + MICRO_BATCH])
            divisors = [count / number for count in counts_of(batch)]
            loss = training_loss(model(*part.inputs), labels_of(part, divisors), **case["loss"])
            gradients.append([gradient.double() for gradient in torch.autograd.grad(loss, list(named.values()))])
        means = [torch.stack(same).mean(dim=0) for same in zip(*gradients, strict=True)]
        alone = [sum(float(gradient.square().sum()) for gradient in same) / number for same in zip(*gradients, strict=True)]
        together = [float(mean.square().sum()) for mean in means]
        squares.append({"micro_batch": dict(zip(named, alone, strict=True)), "mean": dict(zip(named, together, strict=True))})
        for parameter, mean in zip(named.values(), means, strict=True):
            parameter.grad = mean.float()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        optimizer.step()
    return squares


def assert_equals_brute_force(measured: list[dict], case: dict) -> None:
    expected = brute_force(case)
    assert len(measured) == STEPS
    for step, by_parameter in zip(measured, expected, strict=True):
        assert (step["num_micro_batches"], step["micro_batch_size"]) == (GLOBAL_BATCH // MICRO_BATCH, MICRO_BATCH)
        for kind in ("micro_batch", "mean"):
            kept = by_parameter[kind]
            if "pipeline_stages" in case["layout"]:  # no stage has the whole gradient of a tied embedding
                kept = {name: value for name, value in kept.items() if not name.startswith("tied_modules.")}
            for part in PARTS:
                total = sum(value for name, value in kept.items() if part_of(name) == part)
                assert abs(step[kind][part] - total) <= 1e-6 * total, (kind, part)
