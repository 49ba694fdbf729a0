"""Conversion of our networks to and from Hugging Face checkpoints, which transformers loads without any code of ours.

GPT-2, Llama and Qwen3 are decoders, BERT is an encoder, Marian and T5 are encoder-decoders. A folder contains config.json,
generation_config.json and safetensors files (https://github.com/huggingface/safetensors#format).
"""

from model.huggingface.architecture import Counterpart, SpecialTokens
from model.huggingface.choice import architecture, auto_class, counterparts, from_huggingface, model_type, to_huggingface
from model.huggingface.folder import State, decoder_start, export, load, quantization_config
from model.huggingface.verification import perplexity_by_transformers, verify, verify_source

__all__ = [
    "Counterpart",
    "SpecialTokens",
    "State",
    "architecture",
    "auto_class",
    "counterparts",
    "decoder_start",
    "export",
    "from_huggingface",
    "load",
    "model_type",
    "perplexity_by_transformers",
    "quantization_config",
    "to_huggingface",
    "verify",
    "verify_source",
]
