"""A model's bits per byte next to those of general compressors."""

import gzip
import lzma

from data.shards import PreparedData
from data.tokenization.loading import load_tokenizer
from launch.evaluation.evaluating import evaluate
from launch.evaluation.settings import EvaluateSettings


def print_against_compressors(model: str, data: str) -> bool:
    """Print bits per byte on the validation split for gzip, xz and the model; return True if the model is better than xz."""
    print(f"\n=== Held-out files: python launch/evaluate.py {model}", flush=True)
    result = evaluate(EvaluateSettings(model, data))
    prepared = PreparedData(data)
    validation = prepared.splits["validation"]
    text = load_tokenizer(prepared.tokenizer_path).decode(validation.read(0, len(validation)).tolist()).encode()
    assert len(text) == result.bytes, "the text is not the one that was evaluated"
    rows = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "this model": result.bits_per_byte,
    }
    print(f"Bits per byte on {len(text):,} bytes of held-out source text (perplexity per token: {result.perplexity:.2f}):")
    for name, bits in rows.items():
        print(f"  {name:<12}{bits:6.3f}  {'#' * round(20 * bits)}")
    return rows["this model"] < rows["xz -9"]
