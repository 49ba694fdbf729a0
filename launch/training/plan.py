"""The plan of a run: what it will do and need, as lines to print before anything starts."""

import torch

from data.command_line import COMMAND_LINE, DEFAULT, describe, origin_of, recipes_of
from data.sampling.batch_plan import BatchPlan, BatchSizes
from data.tokenization.comparison import beginnings_differ
from launch.checkpoints.initial import InitialWeights
from launch.ranks.layout import Layout, largest_micro_batch_size, min_micro_batches
from launch.training.advice import Facts, Rows, accumulation_rows, advice_rows, epoch_rows
from launch.training.data import RunData
from launch.training.estimates import flops_per_counted_token, parameters_in_blocks
from launch.training.optimizers import optimizer_for
from launch.training.planning.memory import run_memory
from launch.training.planning.step_time import odd_head_warnings
from launch.training.settings import RunSettings
from launch.training.teacher import Teacher
from model.config import ModelConfig, count_parameters, flops_per_token

MAX_DECAY = 0.02
"""Share of a matrix that may decay in a step without a warning. With more, updates count for fewer than 50 steps."""
MIN_LAST_STEPS = 50
"""Steps of the last size of a seesaw ramp below which the plan has a note. In a run of 1,500 steps of 8 sequences (cosine, one
seed) doublings up to 128 ended with 14 steps of that size and lost 0.021 nats a token. The sizes 8, 12, 16, 24 and 32 needed as many
steps, ended with 119 of the last size, and lost nothing."""


def plan(
    settings: RunSettings,
    merged_json: dict,
    layout: Layout,
    device: str,
    batches: BatchPlan,
    data: RunData | None,
    initial: InitialWeights | None = None,
    teacher: Teacher | None = None,
    memory_bytes: float | None = None,
) -> str:
    """Return the whole plan as lines to print. `data` is None if the embedded corpus would be prepared first.

    `batches` determines which samples each step reads, also those before a resume. `memory_bytes` is the memory that a rank has (None:
    not known).
    """
    rows = [
        ("model", describe_model(settings.model)),
        *([("init", str(initial) + ("; zero weights stay 0" if settings.hold_zeros else ""))] if initial else []),
        *([("teacher", str(teacher))] if teacher else []),
        *(_beginning_rows(data, initial, teacher) if data else []),
        *_quantization_rows(settings),
        ("work", _work(settings.model, batches, data)),
        *(
            _data_rows(settings, batches, data)
            if data
            else [("data", f"{', '.join(settings.data.path)} is missing: the embedded corpus is prepared first")]
        ),
        ("batch", batches.describe(layout.data_parallel_size)),
        *_noise_rows(settings, layout),
        *_ramp_rows(settings, batches),
        ("length", _length(settings, batches, data)),
        ("rate", _rate(settings, batches)),
        *_origin_rows(settings),
        *_decay_rows(settings),
        *([] if initial or teacher else _advice(settings, layout, batches, data)),
        ("optimizer", optimizer_for(settings.optimizer).describe()),
        ("engine", _engine(settings, merged_json["zero_optimization"], layout, device)),
        *_notes_on_one_node(merged_json["zero_optimization"], layout, device),
        *_pipeline_rows(settings, merged_json, layout),
        *(("warning", text) for text in (odd_head_warnings(settings.model) if device == "cuda" else [])),
        *_memory_rows(settings, merged_json, layout, device, teacher, memory_bytes),
        *(("recipe", path) for path in recipes_of(settings)),
        ("output", f"{settings.output}: checkpoints/, tb/ (TensorBoard), metrics.jsonl, log.txt, run.json"),
    ]
    return "\n".join(f"{name:>8}: {text}" for name, text in rows)


def describe_model(model: ModelConfig) -> str:
    """Return the size and shape of a model in one line."""
    return (
        f"{count_parameters(model):,} parameters: {_stacks(model)}, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads ({model.num_key_value_heads} key/value), {model.activation} {model.intermediate_size}, "
        f"{model.norm} {model.norm_position}, {model.positions} positions, vocabulary {model.vocab_size:,}, "
        f"context {model.sequence_length:,}"
    )


def _work(model: ModelConfig, batches: BatchPlan, data: RunData | None) -> str:
    flops = flops_per_counted_token(model, data.sampling.target_length if data else None)
    total = flops * batches.tokens_before(batches.steps)
    return f"{flops:,.0f} FLOPs per {_counted(model)}, forward and backward, {_attention(model)} counted; {total:.3g} in all"


def _length(settings: RunSettings, batches: BatchPlan, data: RunData | None) -> str:
    text = f"{batches.steps:,} steps, {batches.tokens_before(batches.steps):,} tokens"
    text += f", {_epochs(batches, data)} epochs" if data else ""
    pause = settings.pause_step(batches)
    return text + (f"; this start ends after step {pause:,} ({describe(settings, 'pause_tokens')})" if pause < batches.steps else "")


def _ramp_rows(settings: RunSettings, batches: BatchPlan) -> Rows:
    """Describe what follows the size of the batch, with a warning if the run ends before it has the last size."""
    batch, optimizer = settings.batch, settings.optimizer
    if batch.ramp is None:
        return []
    taken = [one for one in batches.segments if one.first_step < batches.steps]
    sizes = ", then ".join(f"{one.size} (rate x {batch.rate_factor(one.size):.3g})" for one in taken)
    text = f"{batch.ramp} gives steps of {sizes}"
    if batch.is_seesaw:
        plain = batches.position(batches.steps) // batch.global_batch_size
        text += f"; {batches.steps:,} steps, where a batch of {batch.global_batch_size} would need {plain:,}"
    if batch.beta2_rule != "fixed":
        text += "; beta2 " + ", then ".join(f"{batch.beta2(one.size, optimizer.beta2):.4g}" for one in taken)
    rows = [("ramp", text)]
    if batch.is_seesaw:
        rows += _seesaw_rows(batch, taken[-1].size, len(taken), batches.steps - taken[-1].first_step)
        return rows
    unused = [int(word.rpartition(":")[2]) for word in batch.ramp.split()]
    for one in batches.segments:
        unused.remove(one.size)
    if unused:
        text = f"no step reads {' or '.join(map(str, unused))} sequences, because a step goes beyond the next threshold of batch.ramp"
        rows.append(("note", text))
    if len(taken) < len(batches.segments):
        rows.append(
            ("warning", f"the run ends before its batch has {batches.segments[len(taken)].size} sequences, which batch.ramp asks for")
        )
    return rows


def _noise_rows(settings: RunSettings, layout: Layout) -> Rows:
    """Return a note if one rank accumulates micro-batches only because the noise scale compares them."""
    is_set = origin_of(settings, "batch.micro_batch_size") not in (None, DEFAULT)
    if not settings.log.noise_scale or is_set or layout.data_parallel_size > 1 or layout.pipeline_stages > 1:
        return []
    text = "log.noise_scale compares the micro-batches of a step, so a step has two or more; batch.micro_batch_size sets their size"
    return [("note", text)]


def _seesaw_rows(batch: BatchSizes, last: int, sizes: int, steps: int) -> Rows:
    """Return a warning if the largest size is not reached, and a note if it has few steps. `last` is the last size, with `steps` steps."""
    assert batch.ramp is not None
    rows, wanted = [], batch.seesaw_sizes[-1]
    if sizes == 1:
        rows.append(
            ("warning", f"batch.ramp {batch.ramp} has no effect: the schedule's learning rate falls too little before the run ends")
        )
    elif last < wanted and ":" in batch.ramp:
        text = f"the batch ends with {last} sequences and not with {wanted}, because the schedule's learning rate falls too little"
        rows.append(("warning", text))
    if sizes > 1 and steps < MIN_LAST_STEPS:
        text = f"only {steps} steps read" if steps > 1 else "only 1 step reads"
        text += f" {last} sequences, too few for the optimizer's running means to settle; end with a smaller SIZE"
        rows.append(("note", text + ("" if batch.seesaw_step else "; batch.ramp seesaw:SIZE:STEP then saves as many steps")))
    return rows


def _rate(settings: RunSettings, batches: BatchPlan) -> str:
    schedule, optimizer = settings.schedule, settings.optimizer
    end = f", down to {schedule.min_learning_rate:g}" if schedule.kind != "constant" else ""
    size = f" at {settings.batch.global_batch_size} sequences" if settings.batch.ramp else ""
    return (
        f"{optimizer.learning_rate:g}{size}, {schedule.kind}, warm-up {settings.warmup_steps_in(batches)} steps{end}; "
        f"clipping {optimizer.gradient_clipping:g}"
    )


def _origin_rows(settings: RunSettings) -> Rows:
    """Return a note if the learning rate was not set where the optimizer was chosen, and may be another optimizer's."""
    chosen, rate = (origin_of(settings, f"optimizer.{name}") for name in ("name", "learning_rate"))
    if chosen in (None, DEFAULT) or rate in (chosen, COMMAND_LINE):
        return []
    if rate == DEFAULT and optimizer_for(settings.optimizer).has_adamw_rates:
        return []
    text = f"{describe(settings, 'optimizer.learning_rate')} was not chosen for {describe(settings, 'optimizer.name')}"
    return [("note", f"{text}; each optimizer needs a rate of its own")]


def _decay_rows(settings: RunSettings) -> Rows:
    """Return a warning if a step decays so much of each matrix that hardly any step has an effect for long."""
    optimizer = settings.optimizer
    share = optimizer.learning_rate * optimizer.decay_coefficient
    if share <= MAX_DECAY or optimizer.has_trust_ratio:
        return []
    text = f"a step at the peak rate decays each matrix by {share:.2g} of its value; lower optimizer.weight_decay"
    independent = ", which optimizer.decay independent does not multiply by the learning rate"
    return [("warning", text + (independent if optimizer.decay == "independent" else ""))]


def _advice(settings: RunSettings, layout: Layout, batches: BatchPlan, data: RunData | None) -> Rows:
    """Return advice for a language model that is trained from scratch on its data alone; the published laws are about no others."""
    model, optimizer = settings.model, settings.optimizer
    if model.architecture != "decoder":
        return []
    facts = Facts(
        parameters=count_parameters(model),
        parameters_in_blocks=parameters_in_blocks(model),
        block_flops=flops_per_token(model) - 6 * model.vocab_size * model.hidden_size,
        tokens=batches.tokens_before(batches.steps),
        batch_tokens=settings.batch.global_batch_size * model.sequence_length,
        learning_rate=optimizer.learning_rate,
        decay=optimizer.decay_coefficient,
        sizes=tuple(size * model.sequence_length for size in batches.sizes_from(0)) if settings.batch.ramp else (),
    )
    accumulation = settings.batch.accumulation_steps(layout.data_parallel_size, size=batches.size(batches.steps - 1))
    return [
        *advice_rows(facts, optimizer_for(optimizer).has_adamw_rates),
        *([] if _noise_rows(settings, layout) else accumulation_rows(accumulation, layout, settings.batch.ramp is not None)),
        *(epoch_rows(settings.data.path, data.sampling.epochs(batches.position(batches.steps))) if data else []),
    ]


def _engine(settings: RunSettings, zero: dict, layout: Layout, device: str) -> str:
    parts = [f"ZeRO-{zero.get('stage', 0)}, {settings.precision}, {layout} on {device}"]
    parts += [
        f"{part.removeprefix('offload_')} on {zero[part]['device']}"
        for part in ("offload_optimizer", "offload_param")
        if (zero.get(part) or {}).get("device", "none") != "none"
    ]
    group = int(zero.get("zero_hpz_partition_size", 1))
    parts += [f"whole weights within every {group} ranks (hpZ)"] if group > 1 else []
    parts += ["weights gathered as INT8 (qwZ, lossy)"] if zero.get("zero_quantized_weights") else []
    parts += ["gradients summed as INT4 (qgZ, lossy)"] if zero.get("zero_quantized_gradients") else []
    return f"{', '.join(parts)}; {settings.deepspeed}"


def _memory_rows(
    settings: RunSettings, merged_json: dict, layout: Layout, device: str, teacher: Teacher | None, memory_bytes: float | None
) -> Rows:
    """Return the estimated memory of a rank by part, with a warning if it is more than `memory_bytes`."""
    memory = run_memory(settings, merged_json, layout, "cuda" if device == "cuda" else "cpu", teacher.config if teacher else None)
    kept = {name: memory.parts[name] for name in ("activations", "logits", "buffers")}
    states = {name: size for name, size in memory.parts.items() if name not in {"teacher", *kept}}
    text = f"model states per rank {'(mean) ' if layout.pipeline_stages > 1 else ''}{_mib(sum(states.values()))}: "
    text += ", ".join(f"{name} {_mib(size)}" for name, size in states.items())
    if teacher:
        text += f"; the teacher{' on the last stage' if layout.pipeline_stages > 1 else ''} {_mib(memory.parts['teacher'])}"
    text += "; " + ", ".join(f"{name} {_mib(size)}" for name, size in kept.items()) + f"; with the process about {_mib(memory.total)}"
    rows = [("memory", text + (f" of {_mib(memory_bytes)}" if memory_bytes else ""))]
    if memory_bytes and memory.total > memory_bytes:
        rows.append(("warning", "the run may not fit in memory; launch/plan.py shows layouts that fit"))
    return rows


def _quantization_rows(settings: RunSettings) -> Rows:
    chosen = settings.quantization
    if chosen.bits is None:
        return []
    shared = f"{chosen.entries_per_scale} entries" if chosen.entries_per_scale else "row"
    text = f"the blocks compute with {chosen.bits}-bit weights, one scale{'' if chosen.symmetric else ' and zero point'} per {shared}"
    text += f", and {chosen.activations} inputs" if chosen.activations != "none" else ""
    return [("rounding", text + "; the weights that are trained and saved are not rounded")]


def _beginning_rows(data: RunData, initial: InitialWeights | None, teacher: Teacher | None) -> Rows:
    """Return a warning for each other model whose tokenizer begins texts as the data does not."""
    first = next(iter(data.sampling.folders.values()))
    others = [model for model in (initial, teacher) if model and model.tokenizer and model.opened.config.architecture == "decoder"]
    sentences = [beginnings_differ(first, model.tokenizer, str(model.path)) for model in others if model.tokenizer]
    return [("warning", sentence.removesuffix(".")) for sentence in sentences if sentence]


def _data_rows(settings: RunSettings, batches: BatchPlan, data: RunData) -> Rows:
    """Return a line for each source, one for how documents become samples, and warnings."""
    sampling, model = data.sampling, settings.model
    several, length = len(sampling.names) > 1, model.sequence_length
    epochs = sampling.epochs(batches.position(batches.steps))
    rows: Rows = []
    warnings: Rows = []
    for path, share, (name, folder), samples in zip(
        settings.data.path, sampling.blend.shares, sampling.folders.items(), sampling.samples, strict=True
    ):
        train, held_out = folder.splits["train"], len(folder.splits["validation"])
        text = f"{path}: {len(train):,} training tokens in {train.num_documents:,} documents, "
        text += f"{held_out:,} held out" if held_out else "none held out: no validation"
        text += f"; {data.tokenizer_path.name}"
        if several:
            text += f"; {float(share):.3%} of the blend, {epochs[name]:.2f} epochs of its {samples.num_samples:,} samples"
        rows.append(("data", text))
        if len(train) < length:
            warnings.append(
                ("warning", f"the {len(train):,} tokens of {path} do not fill one sample of {length:,} tokens; the rest of it is padding")
            )
    number = sum(samples.num_samples for samples in sampling.samples)
    target = f" and {sampling.target_length:,} target" if sampling.target_length else ""
    text = f"{number:,} of {length:,}{' source' if target else ''}{target} tokens: "
    text += sampling.objective.describe(sampling.samples, [float(share) for share in sampling.blend.shares])
    if cut := sum(samples.num_cut for samples in sampling.samples):
        warnings.append(("warning", f"{cut:,} documents are longer than a sample; the rest of each is never read"))
    if problem := data.export_problem:
        problem = f"{problem} The model cannot be exported, quantized or pruned. Everything else works"
        warnings.append(("warning", problem))
    rows += [("samples", text), *warnings]
    if settings.data.packing == "best_fit" and not model.document_mask:
        rows.append(
            (
                "note",
                "best-fit packing keeps documents whole, but without model.document_mask they attend to other documents of their sample",
            )
        )
    return rows


def _stacks(model: ModelConfig) -> str:
    if model.architecture == "encoder_decoder":
        return f"encoder of {model.num_layers} blocks, decoder of {model.num_decoder_layers}"
    return f"{'encoder of ' if model.architecture == 'encoder' else ''}{model.num_layers} blocks"


def _counted(model: ModelConfig) -> str:
    return "source token with its share of the target" if model.architecture == "encoder_decoder" else "token"


def _attention(model: ModelConfig) -> str:
    return {"decoder": "causal attention", "encoder": "bidirectional attention"}.get(model.architecture, "all attention")


def _epochs(batches: BatchPlan, data: RunData) -> str:
    """Return the epochs of the one source, or of the least and the most read of several."""
    epochs = data.sampling.epochs(batches.position(batches.steps)).values()
    return " to ".join(f"{end:.2f}" for end in sorted({min(epochs), max(epochs)}))


def _notes_on_one_node(zero: dict, layout: Layout, device: str) -> Rows:
    """Name the parts of ZeRO++ that have no use if all ranks are on one node, which has as many ranks as this machine has GPUs."""
    rows = []
    if int(zero.get("zero_hpz_partition_size", 1)) == layout.world_size > 1:
        rows.append(("note", "hpZ saves traffic between groups of ranks; with a single group it only costs memory"))
    if zero.get("zero_quantized_gradients") and device == "cuda" and layout.world_size // torch.cuda.device_count() < 2:
        rows.append(("note", "qgZ compresses gradients between nodes; on one node it has no effect"))
    return rows


def _pipeline_rows(settings: RunSettings, merged_json: dict, layout: Layout) -> Rows:
    """Describe the pipeline and its bubble, with a warning and better sizes if there are too few micro-batches."""
    if layout.pipeline_stages == 1:
        return []
    section, stages = merged_json["pipeline"], layout.pipeline_stages
    micro_batches = merged_json["gradient_accumulation_steps"]  # of the smallest size that is still to come
    bubble = f"bubble {layout.bubble(micro_batches):.1%} of a step with one forward, one backward"
    if section["schedule"] == "dualpipev":
        bubble += "; DualPipeV, which fills the pipeline from both ends, has a smaller one"
    rows = [("pipeline", f"{stages} stages by {section['partition']}, {section['schedule']}, {micro_batches} micro-batches; {bubble}")]
    if micro_batches < min_micro_batches(stages):
        share = micro_batches * (settings.batch.micro_batch_size or 1)
        size = largest_micro_batch_size(share, stages)
        better = share // size
        smallest = "a smallest size in batch.ramp" if settings.batch.ramp and not settings.batch.is_seesaw else "a batch.global_batch_size"
        advice = (
            f"batch.micro_batch_size {size} gives {better}: bubble {layout.bubble(better):.1%}"
            if better > micro_batches
            else f"{smallest} of {min_micro_batches(stages) * layout.data_parallel_size} or more would give enough"
        )
        rows.append(("warning", f"{micro_batches} micro-batches are too few for {stages} stages; {advice}"))
    return rows


def _mib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
