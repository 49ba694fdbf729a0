"""What a run will do and need, worked out before anything starts."""

import dataclasses
import re
import time

import torch

from launch.ranks.layout import Layout, fewest_micro_batches, micro_batch_size
from launch.training.optimizers import optimizer_for
from launch.training.optimizers.base import WEIGHT_BYTES
from launch.training.settings import RunSettings
from model.config import ModelConfig, count_parameters, flops_per_token

# Dense bf16/fp16 tensor-core peaks of the data sheets, TFLOP/s (NVIDIA), by a part of the device's name.
_DATA_SHEET_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "RTX 4090": 165,
}


def peak_flops(settings: RunSettings, device: str) -> tuple[float, str]:
    """Floating-point operations a second of one device, and where the number is from."""
    if settings.peak_tflops is not None:
        return settings.peak_tflops * 1e12, "peak_tflops"
    if device == "cuda" and settings.precision != "float32":
        name = torch.cuda.get_device_name()
        for part, tflops in _DATA_SHEET_TFLOPS.items():
            if re.search(rf"{part}\b", name):  # an L40 is no L4
                return tflops * 1e12, f"data sheet of {part}"
    return measured_flops(settings.precision, device), "measured: a matrix product of 1024 x 1024 x 1024"


def measured_flops(precision: str, device: str) -> float:
    """Floating-point operations a second of the best of a few matrix products."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[precision]
    a = torch.randn(1024, 1024, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + 0.5  # so long that clocks and threads have settled
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def model_state_bytes(parameters: float, stage: int, data_parallel_size: int, precision: str, state_bytes: int) -> dict[str, float]:
    """Bytes per rank of weights, gradients and optimizer states.  Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054, section 3.

    Weights in the run's precision, gradients accumulated in float32 (fp16: in fp16), the optimizer's states of `state_bytes` per
    parameter and, below float32, master weights in float32. ZeRO-1 divides the optimizer states by the ranks, ZeRO-2 the gradients
    too, ZeRO-3 the weights too.
    """
    weight = 4 if precision == "float32" else 2
    gradient = 2 if precision == "fp16" else 4
    optimizer = state_bytes + (0 if precision == "float32" else WEIGHT_BYTES)
    share = lambda from_stage: data_parallel_size if stage >= from_stage else 1  # noqa: E731
    return {
        "weights": parameters * weight / share(3),
        "gradients": parameters * gradient / share(2),
        "optimizer": parameters * optimizer / share(1),
    }


def parameters_per_rank(model: ModelConfig, layout: Layout, schedule: str = "1f1b") -> float:
    """Mean over the stages. Tensor parallelism cuts the blocks alone; a tied embedding is in the first stage and in the last, which
    DualPipeV has on one rank, and that of an encoder-decoder also where its decoder begins.
    """
    outside = _outside_of_blocks(model)
    in_blocks = count_parameters(model) - outside
    if layout.pipeline_stages > 1:
        stages = {0} if model.architecture != "encoder_decoder" else {0, layout.pipeline_stages // 2}
        if model.tie_embeddings and model.token_head and schedule == "1f1b":
            stages.add(layout.pipeline_stages - 1)
        outside += (len(stages) - 1) * model.vocab_size * model.hidden_size
    return (in_blocks / layout.tensor_parallel_size + outside) / layout.pipeline_stages


def _outside_of_blocks(model: ModelConfig) -> int:
    """Parameters of a network of this shape without its blocks."""
    stacks = {"num_layers": model.num_layers} | ({"num_decoder_layers": model.num_decoder_layers} if model.num_decoder_layers else {})
    smallest = dataclasses.replace(model, **dict.fromkeys(stacks, 1))
    least = count_parameters(smallest)
    return least - sum(count_parameters(dataclasses.replace(smallest, **{stack: 2})) - least for stack in stacks)


def flops_per_counted_token(model: ModelConfig, target_length: int | None) -> float:
    """Of a token as BatchPlan counts them: of an encoder-decoder, of one of the source and its share of the target."""
    per_source = 1 + (target_length or 0) / model.sequence_length
    return flops_per_token(model, target_length=target_length) * per_source


def plan(settings: RunSettings, merged_json: dict, layout: Layout, device: str, data, initial=None, teacher=None) -> str:
    """The whole plan, as lines to print. `data` is the RunData, or None where it would be prepared first; `initial` the InitialWeights,
    `teacher` the Teacher.
    """
    model, batch = settings.model, settings.batch
    parameters = count_parameters(model)
    zero = merged_json["zero_optimization"]
    stage = zero.get("stage", 0)
    on_a_rank = parameters_per_rank(model, layout, merged_json.get("pipeline", {}).get("schedule", "1f1b"))
    states = model_state_bytes(on_a_rank, stage, layout.zero_size, settings.precision, optimizer_for(settings.optimizer).state_bytes)
    taught_by = count_parameters(teacher.config) * (4 if settings.precision == "float32" else 2) if teacher else 0
    hpz = int(zero.get("zero_hpz_partition_size", 1))
    if hpz > 1:
        states["weights again (hpZ)"] = states["weights"] * layout.zero_size / hpz
    accumulation = batch.accumulation_steps(layout.data_parallel_size)
    steps = settings.batch_plan.steps
    tokens = settings.batch_plan.tokens_before(steps)
    flops = flops_per_counted_token(model, data.sampling.target_length if data else None)
    offload = [
        f"{part.removeprefix('offload_')} on {zero[part]['device']}"
        for part in ("offload_optimizer", "offload_param")
        if (zero.get(part) or {}).get("device", "none") != "none"
    ]
    plus_plus = [f"weights whole within every {hpz} ranks (hpZ)"] if hpz > 1 else []
    plus_plus += ["weights gathered as INT8 (qwZ, lossy)"] if zero.get("zero_quantized_weights") else []
    plus_plus += ["gradients summed as INT4 (qgZ, lossy)"] if zero.get("zero_quantized_gradients") else []
    feed = f"{model.activation} {model.intermediate_size}"
    rows = [
        (
            "model",
            f"{parameters:,} parameters: {_stacks(model)}, hidden {model.hidden_size}, "
            f"{model.num_attention_heads} heads ({model.num_key_value_heads} key/value), {feed}, {model.norm} {model.norm_position}, "
            f"{model.positions} positions, vocabulary {model.vocab_size:,}, context {model.sequence_length:,}",
        ),
        *([("init", str(initial) + ("; its zeros are held" if settings.hold_zeros else ""))] if initial else []),
        *([("teacher", str(teacher))] if teacher else []),
        *_quantization_row(settings),
        ("work", f"{flops:,.0f} FLOPs a {_counted(model)}, forward and backward, {_attention(model)} counted; {flops * tokens:.3g} in all"),
        *(
            _data_rows(settings, data)
            if data
            else [("data", f"{', '.join(settings.data.path)} is not there: the embedded corpus would be prepared first")]
        ),
        ("batch", settings.batch_plan.describe(layout.data_parallel_size)),
        ("length", f"{steps:,} steps, {tokens:,} tokens" + (f", {_epochs(settings, data)} epochs" if data else "")),
        (
            "rate",
            f"{settings.optimizer.learning_rate:g}, {settings.schedule.kind}, warm-up {settings.schedule.warmup_steps} steps"
            + (f", down to {settings.schedule.min_learning_rate:g}" if settings.schedule.kind != "constant" else "")
            + f"; clipping {settings.optimizer.gradient_clipping:g}, "
            f"decay {settings.optimizer.weight_decay:g}",
        ),
        (
            "engine",
            ", ".join([f"ZeRO-{stage}, {settings.precision}, {layout} on {device}", *offload, *plus_plus]) + f"; {settings.deepspeed}",
        ),
        *_rows_of_one_node(zero, layout, device),
        *_pipeline_rows(settings, merged_json, layout, accumulation),
        (
            "memory",
            f"model states per rank {'(mean) ' if layout.pipeline_stages > 1 else ''}{_mib(sum(states.values()))}: "
            + ", ".join(f"{name} {_mib(size)}" for name, size in states.items())
            + (f"; the teacher{' on the last stage' if layout.pipeline_stages > 1 else ''} {_mib(taught_by)}" if teacher else "")
            + "; activations not counted",
        ),
        ("output", f"{settings.output}: checkpoints/, tb/ (TensorBoard), metrics.jsonl, log.txt, run.json"),
    ]
    return "\n".join(f"{name:>8}: {text}" for name, text in rows)


def _quantization_row(settings: RunSettings) -> list[tuple[str, str]]:
    chosen = settings.quantization
    if chosen.bits is None:
        return []
    shared = f"{chosen.shared_by} entries" if chosen.shared_by else "a row"
    text = f"the blocks compute with weights of {chosen.bits} bits, a scale for {shared}" + (
        "" if chosen.symmetric else " and a zero point"
    )
    text += f", and {chosen.activations} inputs" if chosen.activations != "none" else ""
    return [("rounding", text + "; what is trained and saved is not rounded")]


def _data_rows(settings: RunSettings, data) -> list[tuple[str, str]]:
    """A line for each source, how their documents become samples, and what of it is to be noted."""
    sampling, model = data.sampling, settings.model
    several, length = len(sampling.names) > 1, model.sequence_length
    epochs = sampling.epochs(settings.batch_plan.position(settings.batch_plan.steps))
    rows, warnings = [], []
    for path, share, (name, folder), samples in zip(
        settings.data.path, sampling.blend.shares, sampling.folders.items(), sampling.samples, strict=True
    ):
        train, held_out = folder.splits["train"], len(folder.splits["validation"])
        text = f"{path}: {len(train):,} training tokens in {train.num_documents:,} documents, "
        text += f"{held_out:,} held out" if held_out else "none held out: no validation"
        text += f"; {data.tokenizer_path.name}"
        if several:
            text += f"; {float(share):.3%} of the samples, which reads its {samples.num_samples:,} samples {epochs[name]:.2f} times"
        rows.append(("data", text))
        if len(train) < length:
            warnings.append(("warning", f"the {len(train):,} tokens of {path} do not fill one sample of {length:,}: it is mostly padding"))
    number = sum(samples.num_samples for samples in sampling.samples)
    target = f" and {sampling.target_length:,} target" if sampling.target_length else ""
    text = f"{number:,} of {length:,}{' source' if target else ''}{target} tokens: "
    text += sampling.objective.describe(sampling.samples, [float(share) for share in sampling.blend.shares])
    if cut := sum(samples.num_cut for samples in sampling.samples):
        warnings.append(("warning", f"{cut:,} documents are longer than a sample: what is behind its end is never read"))
    rows += [("samples", text), *warnings]
    if settings.data.packing == "best_fit" and not model.document_mask:
        rows.append(("note", "best-fit packing keeps documents whole, but without model.document_mask they see their neighbours"))
    return rows


def _stacks(model: ModelConfig) -> str:
    if model.architecture == "encoder_decoder":
        return f"encoder of {model.num_layers} blocks, decoder of {model.num_decoder_layers}"
    return f"{'encoder of ' if model.architecture == 'encoder' else ''}{model.num_layers} blocks"


def _counted(model: ModelConfig) -> str:
    return "source token with its share of the target" if model.architecture == "encoder_decoder" else "token"


def _attention(model: ModelConfig) -> str:
    return {"decoder": "causal attention", "encoder": "attention to both sides"}.get(model.architecture, "all attention")


def _epochs(settings: RunSettings, data) -> str:
    """How often the run reads its source, or the least and the most read of several."""
    epochs = data.sampling.epochs(settings.batch_plan.position(settings.batch_plan.steps)).values()
    return " to ".join(f"{end:.2f}" for end in sorted({min(epochs), max(epochs)}))


def _rows_of_one_node(zero: dict, layout: Layout, device: str) -> list[tuple[str, str]]:
    """What of ZeRO++ is for nothing where all ranks are on one node: of as many devices as are seen here, as DeepSpeed counts."""
    rows = []
    if int(zero.get("zero_hpz_partition_size", 1)) == layout.world_size > 1:
        rows.append(("note", "hpZ spares traffic between groups of ranks; with one group alone it costs memory for nothing"))
    if zero.get("zero_quantized_gradients") and device == "cuda" and layout.world_size // torch.cuda.device_count() < 2:
        rows.append(("note", "qgZ is for gradients between nodes; on one node it does nothing"))
    return rows


def _pipeline_rows(settings: RunSettings, merged_json: dict, layout: Layout, micro_batches: int) -> list[tuple[str, str]]:
    """The pipeline's shape and bubble; too few micro-batches get a warning with the size to use."""
    if layout.pipeline_stages == 1:
        return []
    section, stages = merged_json["pipeline"], layout.pipeline_stages
    bubble = f"bubble {layout.bubble(micro_batches):.1%} of a step under one forward, one backward"
    if section["schedule"] == "dualpipev":
        bubble += "; DualPipeV, which fills it from both ends, waits less"
    rows = [("pipeline", f"{stages} stages by {section['partition']}, {section['schedule']}, {micro_batches} micro-batches; {bubble}")]
    if micro_batches < fewest_micro_batches(stages):
        share = settings.batch.global_batch_size // layout.data_parallel_size
        size = micro_batch_size(share, stages)
        better = share // size
        advice = (
            f"batch.micro_batch_size {size} makes {better}: bubble {layout.bubble(better):.1%}"
            if better > micro_batches
            else f"a batch.global_batch_size of {fewest_micro_batches(stages) * layout.data_parallel_size} or more would make enough"
        )
        rows.append(("warning", f"{micro_batches} micro-batches are few for {stages} stages; {advice}"))
    return rows


def _mib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
