"""Advice in the plan against an independent sweep, the papers' formulas by hand, and the rows that users read."""

import dataclasses
from types import SimpleNamespace

import pytest

from data.sampling.batch_plan import BatchSettings
from launch.ranks.layout import Layout
from launch.training.advice import Facts, accumulation_rows, advice_rows, batch_band, epoch_rows, rate_band, timescale_band
from launch.training.estimates import parameters_in_blocks
from launch.training.settings import OptimizerSettings
from model.config import ModelConfig, count_parameters
from model.transformer import Transformer
from tests.launch.training.test_plan import PAIR, SETTINGS, TRAIN, data_of, rows

SWEEP = [
    (46006272, 127991808, 32768, 0.001953),
    (109051904, 127991808, 32768, 0.000977),
    (368050176, 127991808, 65536, 0.000691),
    (46006272, 255983616, 65536, 0.001953),
    (109051904, 255983616, 65536, 0.001381),
    (368050176, 255983616, 65536, 0.000977),
    (46006272, 511967232, 65536, 0.002762),
    (109051904, 511967232, 131072, 0.001953),
    (368050176, 511967232, 131072, 0.000977),
    (46006272, 1023934464, 131072, 0.003906),
    (109051904, 1023934464, 131072, 0.001953),
    (368050176, 1023934464, 131072, 0.000977),
    (872415232, 127991808, 65536, 0.000488),
    (872415232, 255983616, 65536, 0.000488),
    (872415232, 511967232, 131072, 0.000691),
    (872415232, 1023934464, 131072, 0.000691),
    (2944401408, 127991808, 32768, 0.000244),
    (2944401408, 255983616, 65536, 0.000345),
]
"""Best batch in tokens and rate of 1,800 runs by L. Lingle ("Scaling laws for optimal LR and batch size", part III, 2025): parameters
without embeddings, tokens, batch, rate. The batches are powers of 2, the rates powers of the root of 2."""


def facts(parameters: float, tokens: float, batch: int = 2**17, rate: float = 1e-3, decay: float = 0.1) -> Facts:
    return Facts(int(parameters), int(parameters), 6 * parameters, tokens, batch, rate, decay)


@pytest.mark.parametrize(("parameters", "tokens", "batch", "rate"), SWEEP, ids=str)
def test_bands_hold_the_optima_of_an_independent_sweep(parameters, tokens, batch, rate):
    """Within one step of the sweep's grid."""
    batches, rates = batch_band(facts(parameters, tokens)), rate_band(facts(parameters, tokens))
    assert batches.low / 2 <= batch <= batches.high * 2
    assert rates.low / 2**0.5 <= rate <= rates.high * 2**0.5


@pytest.mark.parametrize(
    ("parameters", "tokens", "step_law", "deepseek"),
    [
        (46e6, 128e6, (24_700, 1.90e-3), (75_600, 2.7e-3)),
        (109e6, 128e6, (24_700, 1.03e-3), (100_000, 2.4e-3)),
        (872e6, 1.02e9, (81_000, 4.4e-4), (391_000, 1.4e-3)),
    ],
)
def test_bands_by_hand(parameters, tokens, step_law, deepseek):
    assert batch_band(facts(parameters, tokens)) == pytest.approx((step_law[0], deepseek[0]), rel=0.02)
    assert rate_band(facts(parameters, tokens)) == pytest.approx(sorted((step_law[1], deepseek[1])), rel=0.04)


def test_timescale_is_counted_in_tokens_and_has_the_papers_value():
    """124 million parameters, 2.5 billion tokens, batches of half a million: rate x decay 8.98e-4 gives the best timescale, 0.2226."""
    run = facts(124e6, 2.5e9, 500_000, 8.98e-3, 0.1)
    low, high = timescale_band(run)
    assert run.timescale == pytest.approx(0.2226, rel=1e-3) and (low * high) ** 0.5 == pytest.approx(0.2226, rel=1e-3)
    assert dataclasses.replace(run, decay=0.0).timescale is None


def test_rate_of_a_small_model_is_clamped_and_called_extrapolated():
    small = facts(0.8e6, 20e6)
    assert rate_band(small).high == 5e-3
    assert "extrapolated to so small a model" in advice_rows(small, True)[0][1]
    assert "extrapolated" not in advice_rows(facts(20e6, 20e6), True)[0][1]


def test_rows_of_a_run_with_adamw_and_with_another_optimizer():
    run = facts(124e6, 2.5e9, 524_288, 6e-4)
    ratio = "20 tokens per parameter (about 20 is best for a given compute budget; arXiv 2203.15556)"
    assert advice_rows(run, True) == [
        ("advice", "batch 524,288 tokens (published: 130,000 to 280,000), rate 0.0006 (0.0016 to 0.0023); arXiv 2503.04715 and 2401.02954"),
        ("advice", f"decay timescale 3.5 of the run (published: 0.11 to 0.45; arXiv 2505.13738), {ratio}"),
    ]
    assert advice_rows(run, False) == [
        ("advice", "batch 524,288 tokens (published: 130,000 to 280,000); arXiv 2503.04715 and 2401.02954"),
        ("advice", ratio),
    ]


def test_only_a_batch_far_above_the_band_is_warned_of():
    run = facts(124e6, 2.5e9)
    high = batch_band(run).high
    assert len(advice_rows(dataclasses.replace(run, batch_tokens=int(7.9 * high)), True)) == 2
    name, text = advice_rows(dataclasses.replace(run, batch_tokens=int(9 * high)), True)[-1]
    assert name == "warning" and " is 9 times the largest published one; " in text and "batch.global_batch_size" in text
    grown = dataclasses.replace(run, batch_tokens=32_768, sizes=(32_768, 65_536, int(9 * high)))
    assert advice_rows(grown, True)[0][1].startswith(f"batch 32,768 to {int(9 * high):,} tokens (published: ")
    assert advice_rows(grown, True)[-1][1].endswith("Lower batch.ramp and batch.global_batch_size")
    critical = facts(1e9, 608e9, 4096 * 4096)  # measured as still useful (arXiv 2505.23971)
    assert [name for name, _ in advice_rows(critical, True)] == ["advice", "advice"]


def test_trials_of_few_tokens_get_no_advice():
    assert advice_rows(facts(124e6, 999_999), True) == [] != advice_rows(facts(124e6, 1_000_000), True)


def test_accumulation_is_noted_only_without_replicas_and_pipeline():
    assert accumulation_rows(1, Layout(1)) == accumulation_rows(8, Layout(2)) == accumulation_rows(8, Layout(2, 2)) == []
    [(name, text)] = accumulation_rows(8, Layout(1))
    assert name == "note" and text.startswith("accumulation 8 without data parallelism saves little time; ") and "2507.07101" in text
    assert "; smaller sizes in batch.ramp, with" in accumulation_rows(8, Layout(1), has_ramp=True)[0][1]


def test_each_source_that_is_read_more_than_four_times_is_warned_of():
    [(name, text)] = epoch_rows(("a/web", "b/code"), {"web": 4.0, "code": 4.06})
    assert name == "warning" and text.startswith("b/code is read 4.1 times; ") and "2305.16264" in text


LONG = dataclasses.replace(SETTINGS, train_steps=200, batch=BatchSettings(64, 64), optimizer=OptimizerSettings(learning_rate=1e-3))


def advised(settings, layout=None, **more) -> list[str]:
    shown = rows(settings, data_of(settings, prepared=TRAIN), layout=layout or Layout(1), **more)
    return [row for row in shown if row.startswith(("advice", "warning", "note"))]


def test_plan_advises_language_models_from_scratch_alone():
    plain = advised(LONG)
    assert [row.split(":")[0] for row in plain] == ["advice", "advice"]
    assert plain[0].startswith("advice: batch 8,192 tokens (published: ") and "rate 0.001 (0.005)" in plain[0]
    other_model = SimpleNamespace(tokenizer=None, config=LONG.model)
    assert not advised(LONG, initial=other_model) and not advised(LONG, teacher=other_model)
    for model in ({"architecture": "encoder", "num_classes": 2, "token_head": False}, PAIR):
        data = {"objective": "pairs"} if model is PAIR else {"objective": "classification", "labels": ("good", "bad")}
        other = dataclasses.replace(LONG, model=dataclasses.replace(LONG.model, **model), data=dataclasses.replace(LONG.data, **data))
        assert not advised(other)


def test_plan_notes_accumulation_and_epochs():
    often = dataclasses.replace(LONG, train_steps=400, batch=BatchSettings(64, 16))
    note, warning = advised(often)[2:]
    assert note.startswith("note: accumulation 4 without data parallelism")
    assert warning.startswith("warning: prepared is read 8.0 times; ")
    assert not any(row.startswith("note") for row in advised(often, Layout(2)))


@pytest.mark.parametrize("model", [{}, {"tie_embeddings": False, "positions": "learned", "biases": True}], ids=str)
def test_parameters_in_blocks_are_those_of_the_built_blocks(model):
    config = ModelConfig(vocab_size=100, sequence_length=16, hidden_size=32, num_layers=3, num_attention_heads=2, **model)
    built = dict(Transformer(config).named_parameters())
    names = [name for name in built if any(part in name for part in (".attention", ".feed_forward"))]
    assert parameters_in_blocks(config) == sum(built[name].numel() for name in names), sorted(built)
    assert count_parameters(config) > parameters_in_blocks(config)
