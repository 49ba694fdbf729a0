"""The plan of a run: memory, work and warnings before it starts."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.sampling.batch_plan import BatchSettings
from data.sampling.objectives.base import ModelShape
from data.sampling.objectives.causal import Causal
from data.sampling.objectives.table import OBJECTIVES
from data.sampling.order import Blend
from data.sampling.sources import Sampling
from launch import REPOSITORY
from launch.ranks.layout import Layout
from launch.training.estimates import flops_per_counted_token, model_state_bytes, parameters_per_rank
from launch.training.peak import peak_flops
from launch.training.plan import plan
from launch.training.planning.activations import block_bytes
from launch.training.planning.memory import CPU_BASE_BYTES
from launch.training.recipe import read_run_settings
from launch.training.settings import DataSettings, OptimizerSettings, RunSettings, ScheduleSettings, share_the_batch
from model.config import ModelConfig, count_parameters, flops_per_token
from model.transformer import Transformer, layers

# Bytes per parameter of weights, gradients and optimizer (with master weights), before they are divided among the ranks.
BYTES = {"float32": (4, 4, 12), "bf16": (2, 4, 12), "fp16": (2, 2, 12)}


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize(("stage", "divided"), [(0, (1, 1, 1)), (1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_model_state_bytes_by_hand_on_four_ranks(precision, stage, divided):
    weights, gradients, optimizer = (1000 * size / by for size, by in zip(BYTES[precision], divided, strict=True))
    if precision == "float32" and stage == 0:  # the optimizer updates the weights themselves
        optimizer -= 4000
    assert model_state_bytes(1000, stage, 4, precision, 8) == {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def test_model_state_bytes_match_the_example_of_the_zero_paper():
    """Figure 1 of arXiv 1910.02054: 7.5 billion parameters on 64 ranks, fp16 with Adam: 120, 31.4, 16.6 and 1.9 GB."""
    totals = [sum(model_state_bytes(7_500_000_000, stage, 64, "fp16", 8).values()) / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


SETTINGS = RunSettings(
    model=ModelConfig(vocab_size=1000, sequence_length=128, hidden_size=64, num_layers=2, num_attention_heads=4, intermediate_size=172),
    batch=BatchSettings(global_batch_size=64, micro_batch_size=4),
    train_steps=100,
)
FOUR = Layout(4)


def stream(tokens: int, documents: int):
    return type("Stream", (), {"__len__": lambda self: tokens, "num_documents": documents})()


TRAIN, HELD_OUT = stream(409_600, 1234), stream(5_000, 12)


class AnyTokens:
    """A tokenizer that has every special token, each with an id of its own."""

    vocab_size, end_of_text_token = 1000, "<end>"

    def __init__(self):
        self.special_tokens: dict[str, int] = {}
        self.sentinels = {f"<extra_id_{number}>": 900 + number for number in range(100)}

    def special_token_id(self, token: str) -> int:
        return self.special_tokens.setdefault(token, len(self.special_tokens) + 1)

    def start_token_id(self, token: str | None) -> int:
        return 999

    def word_edges(self) -> None:
        return None


def data_of(settings: RunSettings, weights: tuple[float, ...] = (), **streams_and_more) -> SimpleNamespace:
    """Return RunData of training streams by name; every other keyword is an attribute of their samples."""
    streams = {name: value for name, value in streams_and_more.items() if hasattr(value, "num_documents")}
    about = {"padding_share": 0.0, "filled_share": 0.0, "target_length": None, "num_cut": 0} | streams_and_more
    folders = {name: SimpleNamespace(splits={"train": train, "validation": HELD_OUT}) for name, train in streams.items()}
    samples = [SimpleNamespace(**about | {"num_samples": -(-len(train) // 128), "stream": train}) for train in streams.values()]
    blend = Blend([one.num_samples for one in samples], weights or None, seed=1)
    model = settings.model
    shape = ModelShape(model.sequence_length, model.document_mask, model.architecture, model.token_types)
    objective = OBJECTIVES[settings.data.objective or Causal.name](settings.data, shape, AnyTokens(), 0)
    sampling = Sampling(folders, samples, blend, None, objective)
    return SimpleNamespace(sampling=sampling, tokenizer_path=Path("tokenizer.model"), export_problem=None)


def lines(settings: RunSettings, zero: dict, layout: Layout = FOUR, device: str = "cpu", **more) -> dict[str, str]:
    """Return the rows of a plan by name; of several notes the last one."""
    accumulation = settings.batch.accumulation_steps(layout.data_parallel_size)
    merged = {"zero_optimization": zero, "gradient_accumulation_steps": accumulation} | more
    printed = plan(settings, merged, layout, device, settings.batch_plan, data_of(settings, prepared=TRAIN))
    return dict(line.strip().split(": ", 1) for line in printed.splitlines())


def test_plan_warns_of_a_tokenizer_that_cannot_be_exported():
    data = data_of(SETTINGS, prepared=TRAIN)
    data.export_problem = "own.model cannot be written as a tokenizer.json: it removes spaces."
    printed = plan(SETTINGS, {"zero_optimization": {"stage": 2}}, FOUR, "cpu", SETTINGS.batch_plan, data)
    assert f"warning: {data.export_problem} The model cannot be exported, quantized or pruned. Everything else works" in printed


def test_plan_shows_every_row_of_a_plain_run():
    shown = lines(SETTINGS, {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}})
    assert list(shown) == ["model", "work", "data", "samples", "batch", "length", "rate", "optimizer", "engine", "memory", "output"]
    parameters = count_parameters(SETTINGS.model)
    assert shown["model"].startswith(f"{parameters:,} parameters: 2 blocks, hidden 64, 4 heads (4 key/value), swiglu 172, rmsnorm pre, ")
    assert shown["model"].endswith("rotary positions, vocabulary 1,000, context 128")
    assert shown["data"] == "prepared: 409,600 training tokens in 1,234 documents, 5,000 held out; tokenizer.model"
    assert shown["samples"] == "3,200 of 128 tokens: documents joined and cut, seeing one another, 0.00% padding"
    assert shown["batch"] == "64 sequences = micro-batch 4 x accumulation 4 x data parallel 4; 8,192 tokens a step"
    assert shown["length"] == "100 steps, 819,200 tokens, 2.00 epochs"
    assert shown["rate"] == "0.0003, cosine, warm-up 10 steps, down to 0; clipping 1"
    assert shown["engine"] == f"ZeRO-2, bf16, 4 rank(s) on cpu, optimizer on cpu; {SETTINGS.deepspeed}"
    mib = parameters / 2**20
    activations, logits = 2 * block_bytes(SETTINGS.model, 4, 128, "cpu") / 2**20, 4 * 128 * 1000 * (2 + 2 + 3 * 4) / 2**20
    total = (6 + 8) * mib + activations + logits + CPU_BASE_BYTES / 2**20
    assert shown["memory"] == (
        f"model states per rank {6 * mib:.1f} MiB: weights {2 * mib:.1f} MiB, gradients {mib:.1f} MiB, optimizer {3 * mib:.1f} MiB; "
        f"activations {activations:.1f} MiB, logits {logits:.1f} MiB, buffers {8 * mib:.1f} MiB; with the process about {total:.1f} MiB"
    )
    assert shown["output"] == "runs/run: checkpoints/, tb/ (TensorBoard), metrics.jsonl, log.txt, run.json"


def rows(settings: RunSettings, data: SimpleNamespace, layout: Layout = FOUR, **more) -> list[str]:
    shown = plan(settings, {"zero_optimization": {}}, layout, "cpu", settings.batch_plan, data, **more)
    return [line.strip() for line in shown.splitlines()]


def test_plan_of_a_blend_has_a_line_for_each_source():
    """100 steps of 64 samples: 4,800 reads of the 3,200 samples of one source, 1,600 reads of the 640 of the other."""
    settings = dataclasses.replace(SETTINGS, data=DataSettings(path=("a/web", "b/code"), weights=(3, 1)))
    shown = rows(settings, data_of(settings, (3, 1), padding_share=0.25, web=TRAIN, code=stream(81_920, 77)))
    assert [row for row in shown if row.startswith("data: ")] == [
        "data: a/web: 409,600 training tokens in 1,234 documents, 5,000 held out; tokenizer.model; "
        "75.000% of the blend, 1.50 epochs of its 3,200 samples",
        "data: b/code: 81,920 training tokens in 77 documents, 5,000 held out; tokenizer.model; "
        "25.000% of the blend, 2.50 epochs of its 640 samples",
    ]
    assert "samples: 3,840 of 128 tokens: documents joined and cut, seeing one another, 25.00% padding" in shown
    assert "length: 100 steps, 819,200 tokens, 1.50 to 2.50 epochs" in shown


def test_plan_shows_packing_with_a_warning_and_a_note():
    def shown(mask: bool, **data) -> list[str]:
        settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, document_mask=mask), data=DataSettings(**data))
        return [
            row
            for row in rows(settings, data_of(settings, prepared=stream(100, 3), padding_share=28 / 128))
            if row.startswith(("sam", "note", "warn"))
        ]

    best_fit = "samples: 1 of 128 tokens: documents packed by best fit, not cut if they fit, "
    warning = "warning: the 100 tokens of prepared do not fill one sample of 128 tokens; the rest of it is padding"
    often = "warning: prepared is read 6,400.0 times; after 4 times, each repetition helps less (arXiv 2305.16264)"
    assert shown(True, packing="best_fit") == [best_fit + "separated by mask, 21.88% padding", warning, often]
    assert shown(False, packing="best_fit") == [
        best_fit + "seeing one another, 21.88% padding",
        warning,
        "note: best-fit packing keeps documents whole, but without model.document_mask they attend to other documents of their sample",
        often,
    ]


ENCODER = {"architecture": "encoder", "token_types": 2, "num_classes": 2}
PAIR = {"architecture": "encoder_decoder", "num_decoder_layers": 3}


@pytest.mark.parametrize(
    ("model", "data", "about", "blocks", "sample"),
    [
        (
            {"prefix_attention": True},
            {"objective": "prefix"},
            {},
            "2 blocks",
            "128 tokens: documents joined and cut, seeing one another, each after a given prefix, 0.00% padding",
        ),
        (
            ENCODER | {"num_classes": 0},
            {"objective": "masked", "mask_rate": 0.3, "whole_words": True},
            {},
            "encoder of 2 blocks",
            "128 tokens: documents joined and cut, seeing one another, 0.3 of the tokens masked by whole words, 0.00% padding",
        ),
        (
            ENCODER,
            {"objective": "masked", "next_sentence": True},
            {"padding_share": 0.015},
            "encoder of 2 blocks",
            "128 tokens: two pieces of documents, half of the second ones from another document, 0.15 of the tokens masked, 1.50% padding",
        ),
        (
            ENCODER | {"token_head": False},
            {"objective": "classification", "labels": ("good", "bad")},
            {"padding_share": 0.5},
            "encoder of 2 blocks",
            "128 tokens: a text and one of 2 labels, 50.00% padding",
        ),
        (
            PAIR,
            {"objective": "span_corruption"},
            {"target_length": 31},
            "encoder of 2 blocks, decoder of 3",
            "128 source and 31 target tokens: documents joined and cut, 0.15 of the tokens cut out in spans of 3 on average, 0.00% padding",
        ),
        (
            PAIR,
            {"objective": "pairs", "target_length": 64},
            {"target_length": 64},
            "encoder of 2 blocks, decoder of 3",
            "128 source and 64 target tokens: 7.5 pairs in a sample on average, separated by mask, 0.00% padding",
        ),
    ],
    ids=lambda value: value.get("objective", "") if isinstance(value, dict) else "",
)
def test_plan_describes_the_objective(model, data, about, blocks, sample):
    settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, **model), data=DataSettings(**data))
    shown = rows(settings, data_of(settings, prepared=stream(409_600, 24_000), **about))
    assert any(f" parameters: {blocks}, hidden 64, " in row for row in shown)
    assert f"samples: 3,200 of {sample}" in shown
    assert not any(row.startswith("warning") for row in shown)


def test_plan_counts_documents_that_are_cut():
    settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, **PAIR), data=DataSettings(objective="pairs"))
    shown = rows(settings, data_of(settings, target_length=128, num_cut=1017, prepared=TRAIN))
    assert "warning: 1,017 documents are longer than a sample; the rest of each is never read" in shown


def test_plan_shows_the_initial_weights():
    shown = plan(
        SETTINGS, {"zero_optimization": {}}, FOUR, "cpu", SETTINGS.batch_plan, None, "bert: 3 of 4 parameters; fresh: 9.classes.weight"
    )
    assert "    init: bert: 3 of 4 parameters; fresh: 9.classes.weight" in shown.splitlines()


def test_work_of_an_encoder_decoder_counts_source_and_target():
    model = dataclasses.replace(SETTINGS.model, **PAIR)
    assert flops_per_counted_token(model, 32) * 128 == pytest.approx(flops_per_token(model, target_length=32) * (128 + 32))
    assert flops_per_counted_token(SETTINGS.model, None) == flops_per_token(SETTINGS.model)


def test_plan_shows_the_share_of_fill_in_the_middle():
    settings = dataclasses.replace(SETTINGS, data=DataSettings(fim_rate=0.5))
    row = "samples: 3,200 of 128 tokens: documents joined and cut, seeing one another, 12.00% padding and special tokens; "
    data = data_of(settings, padding_share=0.12, filled_share=0.421, prepared=TRAIN)
    assert row + "42.1% of the pieces transformed by fill-in-the-middle" in rows(settings, data)


def test_plan_of_a_constant_rate_shows_no_end_rate():
    constant = dataclasses.replace(SETTINGS, schedule=ScheduleSettings(kind="constant"))
    assert lines(constant, {"stage": 1})["rate"] == "0.0003, constant, warm-up 10 steps; clipping 1"


def test_plan_names_the_recipe_also_where_nobody_gave_one():
    settings = read_run_settings(["--model.hidden_size=64", "--batch.micro_batch_size=8"])
    assert lines(settings, {"stage": 1})["recipe"] == str(REPOSITORY / "launch" / "recipes" / "demo.yaml")


def test_plan_notes_a_rate_that_was_set_for_another_optimizer():
    def note(*words: str) -> str | None:
        settings = read_run_settings(["--batch.micro_batch_size=8", "--train_steps=100", *words])
        return lines(settings, {"stage": 1}).get("note")

    of_demo, of_lion = "--optimizer.learning_rate=0.01", "--optimizer.name=lion"
    demo = REPOSITORY / "launch" / "recipes" / "demo.yaml"
    text = "was not chosen for optimizer.name lion (command line); each optimizer needs a rate of its own"
    assert note(of_lion) == f"optimizer.learning_rate 0.01 ({demo}) {text}"
    assert note("--size=gpt2-124m", of_lion).startswith("optimizer.learning_rate 0.0003 (default) was not")
    assert note() is note(of_lion, of_demo) is note("--size=gpt2-124m", "--optimizer.name=muon") is None


def test_plan_warns_of_a_decay_that_is_far_too_strong():
    def warning(**optimizer) -> str | None:
        settings = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(**optimizer))
        return lines(settings, {"stage": 1}).get("warning")

    strong = "a step at the peak rate decays each matrix by 0.1 of its value; lower optimizer.weight_decay"
    assert warning(decay="independent") == f"{strong}, which optimizer.decay independent does not multiply by the learning rate"
    assert warning(learning_rate=0.01, weight_decay=10.0, name="muon") == strong
    assert warning() is None and warning(decay="independent", weight_decay=1e-4) is None
    assert warning(name="lion", learning_rate=0.01, weight_decay=10.0) == warning(name="sgd", learning_rate=1.0) == strong
    assert warning(name="lars", learning_rate=10.0) is None, "its trust ratio scales the decay too"


PIPELINE = {"stages": 2, "partition": "parameters", "schedule": "1f1b"}


def test_plan_of_a_pipeline_shows_its_layout_and_bubble():
    settings = share_the_batch(dataclasses.replace(SETTINGS, batch=BatchSettings(64)), Layout(8, 2, 2))
    shown = lines(settings, {"stage": 1}, Layout(8, 2, 2), pipeline=PIPELINE)
    assert shown["batch"] == "64 sequences = micro-batch 4 x accumulation 8 x data parallel 2; 8,192 tokens a step"
    assert shown["engine"].startswith("ZeRO-1, bf16, 8 rank(s): 2 pipeline stages x tensor parallel 2 x data parallel 2 on cpu; ")
    assert shown["pipeline"] == ("2 stages by parameters, 1f1b, 8 micro-batches; bubble 11.1% of a step with one forward, one backward")
    assert shown["memory"].startswith("model states per rank (mean) ")
    assert "warning" not in shown
    shown = lines(settings, {"stage": 1}, Layout(8, 2, 2), pipeline=PIPELINE | {"schedule": "dualpipev"})
    assert shown["pipeline"].endswith("one backward; DualPipeV, which fills the pipeline from both ends, has a smaller one")


@pytest.mark.parametrize(
    ("global_batch_size", "micro_batch_size", "layout", "warning"),
    [
        (24, 4, Layout(2, 2), "6 micro-batches are too few for 2 stages; batch.micro_batch_size 3 gives 8: bubble 11.1%"),
        (48, 4, Layout(4, 2), "6 micro-batches are too few for 2 stages; batch.micro_batch_size 3 gives 8: bubble 11.1%"),
        (44, 11, Layout(2, 2), "4 micro-batches are too few for 2 stages; batch.micro_batch_size 4 gives 11: bubble 8.3%"),
        (8, 2, Layout(4, 4), "4 micro-batches are too few for 4 stages; batch.micro_batch_size 1 gives 8: bubble 27.3%"),
        (8, 1, Layout(8, 4), "4 micro-batches are too few for 4 stages; a batch.global_batch_size of 32 or more would give enough"),
        (7, None, Layout(2, 2), "7 micro-batches are too few for 2 stages; a batch.global_batch_size of 8 or more would give enough"),
    ],
    ids=str,
)
def test_too_few_micro_batches_get_a_warning_whose_advice_helps(global_batch_size, micro_batch_size, layout, warning):
    def shown(**changes) -> dict[str, str]:
        batch = BatchSettings(**{"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size} | changes)
        settings = share_the_batch(dataclasses.replace(SETTINGS, batch=batch), layout)
        return lines(settings, {"stage": 1}, layout, pipeline=PIPELINE | {"stages": layout.pipeline_stages})

    assert shown()["warning"] == warning
    if better := re.search(r"batch\.micro_batch_size (\d+) gives (\d+): (bubble [\d.]+%)", warning):
        size, micro_batches, bubble = better.groups()
        followed = shown(micro_batch_size=int(size))
        assert f", {micro_batches} micro-batches; {bubble} of a step" in followed["pipeline"]
        assert "warning" not in followed or "global_batch_size" in followed["warning"], (
            "the advice does not ask for a smaller micro-batch again"
        )
    else:
        enough = re.search(r"batch\.global_batch_size of (\d+)", warning)
        assert "warning" not in shown(global_batch_size=int(enough[1])), "this many are enough"
        assert "warning" in shown(global_batch_size=int(enough[1]) - layout.data_parallel_size), "fewer are not"


def test_too_few_micro_batches_of_a_ramp_name_its_smallest_size():
    settings = share_the_batch(dataclasses.replace(SETTINGS, batch=BatchSettings(8, 1, "0:4 2K:8")), Layout(2, 2))
    shown = lines(settings, {"stage": 1}, Layout(2, 2), pipeline=PIPELINE, gradient_accumulation_steps=4)
    assert shown["warning"] == "4 micro-batches are too few for 2 stages; a smallest size in batch.ramp of 8 or more would give enough"


@pytest.mark.parametrize(
    "model",
    [
        {"tie_embeddings": True},
        {"tie_embeddings": False, "positions": "learned", "biases": True},
        ENCODER,
        ENCODER | {"token_head": False},
        PAIR | {"tie_embeddings": True},
        PAIR | {"tie_embeddings": False, "positions": "relative"},
    ],
    ids=str,
)
def test_parameters_per_rank_match_the_built_layers(model):
    model = dataclasses.replace(SETTINGS.model, num_layers=4, **model)
    built = dict(Transformer(model).named_parameters())
    norms_and_biases = sum(parameter.numel() for parameter in built.values() if parameter.dim() == 1)
    cut = (".attention.", ".cross_attention.", ".feed_forward.")
    in_blocks = sum(parameter.numel() for name, parameter in built.items() if any(part in name for part in cut))
    assert parameters_per_rank(model, Layout(4)) == count_parameters(model) == sum(parameter.numel() for parameter in built.values())
    cut = parameters_per_rank(model, Layout(4, 1, 2))
    assert cut == pytest.approx(count_parameters(model) - in_blocks / 2, abs=norms_and_biases)
    uses = max(1, sum(layer.tied_key is not None for layer in layers(model)))
    embedding, in_the_middle = model.vocab_size * model.hidden_size, model.architecture == "encoder_decoder"
    again = lambda stages: (min(uses, stages) - 1) * embedding  # noqa: E731
    assert parameters_per_rank(model, Layout(4, 2)) == (count_parameters(model) + again(2)) / 2, "a tied embedding is in two stages"
    assert parameters_per_rank(model, Layout(4, 4)) == (count_parameters(model) + again(4)) / 4, "and where a decoder begins"
    on_both = in_the_middle * embedding
    assert parameters_per_rank(model, Layout(4, 2), "dualpipev") == (count_parameters(model) + on_both) / 2, "DualPipeV's ends are one rank"


def test_plan_warns_if_a_rank_has_less_memory_than_the_run_needs():
    def shown(memory_bytes: float) -> str:
        return plan(SETTINGS, {"zero_optimization": {}}, FOUR, "cpu", SETTINGS.batch_plan, None, memory_bytes=memory_bytes)

    warning = "warning: the run may not fit in memory; launch/plan.py shows layouts that fit"
    assert warning in shown(2**28) and warning not in shown(2**30) and " MiB of 1.00 GiB\n" in shown(2**30)


def test_plan_warns_of_odd_heads_on_a_gpu():
    odd = dataclasses.replace(SETTINGS, model=dataclasses.replace(SETTINGS.model, head_size=20))
    text = "model.head_size 20 is not a multiple of 8: published runs with such heads took 1.3 times as long. "
    assert lines(odd, {"stage": 1}, device="cuda")["warning"].startswith(text)
    assert "warning" not in lines(odd, {"stage": 1}) and "warning" not in lines(SETTINGS, {"stage": 1}, device="cuda")


PLUS_PLUS = {"stage": 3, "zero_hpz_partition_size": 8, "zero_quantized_weights": True, "zero_quantized_gradients": True}


def test_plan_shows_the_cost_and_loss_of_zero_plus_plus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    shown = lines(SETTINGS, PLUS_PLUS, Layout(16), "cuda")
    assert shown["engine"] == (
        "ZeRO-3, bf16, 16 rank(s) on cuda, whole weights within every 8 ranks (hpZ), weights gathered as INT8 (qwZ, lossy), "
        f"gradients summed as INT4 (qgZ, lossy); {SETTINGS.deepspeed}"
    )
    mib = count_parameters(SETTINGS.model) / 2**20
    assert shown["memory"].startswith(f"model states per rank {(2 + 4 + 12) / 16 * mib + 2 / 8 * mib:.1f} MiB: weights {mib / 8:.1f} MiB, ")
    assert f"second copy of the weights (hpZ) {mib / 4:.1f} MiB; " in shown["memory"]
    assert "note" not in shown


def test_plan_notes_useless_parts_of_zero_plus_plus_on_one_node(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    both = lines(SETTINGS, PLUS_PLUS | {"zero_quantized_gradients": False}, Layout(8), "cuda")
    assert both["note"] == "hpZ saves traffic between groups of ranks; with a single group it only costs memory"
    gradients = {"stage": 3, "zero_quantized_gradients": True}
    for ranks in (4, 8):
        assert lines(SETTINGS, gradients, Layout(ranks), "cuda")["note"] == (
            "qgZ compresses gradients between nodes; on one node it has no effect"
        )
    assert "note" not in lines(SETTINGS, gradients, Layout(16), "cuda")
    without_accumulation = dataclasses.replace(SETTINGS, batch=BatchSettings(64, 64))
    assert "note" not in lines(without_accumulation, {"stage": 3, "zero_hpz_partition_size": 1}, Layout(1))


def test_peak_tflops_setting_is_used():
    assert peak_flops(dataclasses.replace(SETTINGS, peak_tflops=312.5), "cuda") == (312.5e12, "peak_tflops")


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_known_device_has_the_peak_of_its_data_sheet(device, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    flops, origin = peak_flops(SETTINGS, "cuda")
    assert flops == tflops * 1e12 and origin.startswith("data sheet of ")


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A1000"])
def test_device_with_a_similar_name_is_measured(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    product = SimpleNamespace(asked=None)

    def measure(precision, where):
        product.asked = precision, where
        return 7e12

    monkeypatch.setattr("launch.training.peak.measured_flops", measure)
    assert peak_flops(SETTINGS, "cuda") == (7e12, "measured: a matrix product of 1024 x 1024 x 1024")
    assert product.asked == ("bf16", "cuda")


def test_peak_of_a_cpu_is_not_guessed():
    flops, reason = peak_flops(dataclasses.replace(SETTINGS, precision="float32"), "cpu")
    assert flops is None and "--peak_tflops" in reason
    assert peak_flops(dataclasses.replace(SETTINGS, peak_tflops=0.5), "cpu") == (0.5e12, "peak_tflops")
