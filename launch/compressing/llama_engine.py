"""llama.cpp, if llama-cpp-python is installed: a second engine that reads GGUF files, writes its K-quants, and shows its speed.

It is not in requirements.txt, because it must be compiled, which takes seven minutes of one processor.
"""

import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.command_line import UserError
from data.tokenization.gguf import comparable_texts
from data.tokenization.tokenizer import Tokenizer
from model.compression import gguf_file
from model.config import ModelConfig
from model.loss import token_losses

INSTALL = 'CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36'
K_QUANTS = {"q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M", "q5_k_m": "LLAMA_FTYPE_MOSTLY_Q5_K_M", "q6_k": "LLAMA_FTYPE_MOSTLY_Q6_K"}
"""Types of GGUF files that only llama.cpp writes, with its names for them."""
_SAMPLES, _SAMPLE_TOKENS = 8, 256  # size of the text whose perplexity is compared
_ERROR = 4  # ggml_log_level


def is_installed() -> bool:
    """Return True if llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def refuse_missing(reason: str) -> None:
    """Raise UserError if llama-cpp-python is not installed; `reason` begins the message and names what needs it."""
    if not is_installed():
        raise UserError(f"{reason}, and llama-cpp-python is not installed. Install it: {INSTALL}")


def quantize(file: Path, kind: str, output: Path) -> None:
    """Write the GGUF file `output` as one of K_QUANTS from a file of floats. Raises UserError if llama-cpp-python is not installed."""
    library = _library()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = getattr(library, K_QUANTS[kind])
    parameters.nthread = torch.get_num_threads()
    if library.llama_model_quantize(str(file).encode(), str(output).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {output} from {file}.")


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, after begin of text if the file asks for it. Special tokens in the text are read as text."""
    model = _model(file, vocab_only=True)
    return [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]


def logits(file: Path, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the float32 logits of each row, computed with float32 keys and values.  [batch, seq] -> batch x [seq, vocab]"""
    length = tokens.shape[1]
    model = _model(file, n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, type_k=0, type_v=0)
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        yield torch.from_numpy(model.scores[:length].copy())


def perplexity(file: Path, tokens: Tensor) -> float:
    """Return the perplexity of all ids of each row except the first, predicted from those before them.  [batch, seq]"""
    losses = [token_losses(row_logits[None, :-1], row[None, 1:]) for row_logits, row in zip(logits(file, tokens), tokens, strict=True)]
    return torch.cat(losses).double().mean().exp().item()


def verify(file: Path, config: ModelConfig, tokenizer: Tokenizer, tolerance: float) -> float:
    """Compare llama.cpp with our network on texts of many kinds: the ids, and the perplexity with the weights of the file.

    The ids of some kinds of text are known to differ (`comparable_texts` leaves them out).
    Returns the relative difference of the perplexities. Raises RuntimeError if it is above `tolerance`, or if an id differs.
    """
    texts = comparable_texts(tokenizer)
    for text, theirs in zip(texts, tokenize(file, texts), strict=True):
        if theirs != tokenizer.encode_beginning(text):
            raise RuntimeError(f"{file}: llama.cpp gives other ids than {tokenizer.path} for {text[:80]!r}.")
    ids = tokenizer.encode_beginning("\n".join(texts))
    length = min(config.sequence_length, _SAMPLE_TOKENS)
    tokens = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:_SAMPLES]
    our_logits = gguf_file.logits(config, gguf_file.GGUFState(file, config), tokens)
    ours = token_losses(our_logits[:, :-1], tokens[:, 1:]).double().mean().exp().item()
    difference = abs(perplexity(file, tokens) / ours - 1)
    if not difference <= tolerance:
        raise RuntimeError(f"{file}: llama.cpp's perplexity differs from ours by {difference:.2%}; {tolerance:.2%} is allowed.")
    return difference


def start_generation(file: Path, new_tokens: int, prompt_tokens: int) -> Callable[[], None]:
    """Read a file and evaluate a prompt; return a function that evaluates one further token, with as many threads as torch uses."""
    threads = torch.get_num_threads()
    model = _model(file, n_ctx=prompt_tokens + new_tokens, n_threads=threads, n_threads_batch=threads)
    model.eval(list(range(prompt_tokens)))
    return lambda: model.eval([0])


@functools.cache
def _library() -> Any:
    """Return the package, which then prints only errors."""
    refuse_missing("This needs llama.cpp")
    library = importlib.import_module("llama_cpp")
    library.llama_log_set(_print_errors(library), ctypes.c_void_p(0))
    return library


@functools.cache  # llama.cpp keeps no reference to it
def _print_errors(library: Any) -> Any:
    return library.llama_log_callback(lambda level, text, _: sys.stderr.write(text.decode()) if level == _ERROR else None)


def _model(file: Path, **options: Any) -> Any:
    return _library().Llama(str(file), verbose=False, **options)
