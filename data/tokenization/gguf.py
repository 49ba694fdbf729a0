"""A tokenizer as metadata of a GGUF file, from which llama.cpp builds a tokenizer with the same ids as ours."""

import json
from collections.abc import Callable
from unicodedata import is_normalized

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from data.command_line import UserError
from data.tokenization.companions import chat_templates, end_ids, published_configuration, role_tokens
from data.tokenization.conversion import convert
from data.tokenization.huggingface_files import padding
from data.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenization.probe_texts import texts_of_many_kinds
from data.tokenization.sentencepiece_tokenizer import PIECE, SPACE, SentencePieceTokenizer, read_model
from data.tokenization.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # GGUF's token types, equal to SentencePiece's

# Patterns that split text into words, by llama.cpp's names, as GPT-2, Llama 3, Qwen2 and GPT-4o publish them. With True (ignore_merges)
# a word that is a token stays whole.
_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_ENDINGS}|{_LETTERS}\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_PATTERNS = {
    "gpt-2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", False),
    "llama-bpe": (_LLAMA3, True),
    "smaug-bpe": (_LLAMA3, False),
    "qwen2": (rf"{_ENDINGS}|{_LETTERS}\p{{L}}+|\p{{N}}{_REST}", False),
    "gpt-4o": (
        rf"{_LETTERS}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_LETTERS}{_UPPER}+{_LOWER}*{_ENDINGS}?|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
}

# Names by which llama.cpp takes a token for a special token, whatever its type in the file (its src/llama-vocab.cpp).
_CONTROL_BY_NAME = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *(
        "<end_of_utterance>",
        "<|eom_id|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "</s>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
    ),
    *(f"<|fim_{part}|>" for part in ("prefix", "suffix", "middle", "pad", "repo")),
    *(f"<fim{sign}{part}>" for sign in "-_" for part in ("prefix", "suffix", "middle", "pad", "repo")),
    *(f"<|{code}{part}|>" for code in ("", "code_") for part in ("prefix", "suffix", "middle")),
    *("<PRE>", "<SUF>", "<MID>", "<PAD>", "[PAD]", "<REPO>", "<|repo_name|>", "<reponame>", "<|file_sep|>"),
}


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, str | bool | int | list]:
    """Return the file's metadata of a tokenizer, by key. Ids below `vocab_size` that the tokenizer lacks become unused tokens.

    Supported are SentencePiece's bpe with bytes for unknown characters, and byte-level BPE from a tokenizer.json or a tiktoken
    vocabulary whose pattern llama.cpp supports: the pattern with which Hugging Face's library gives our ids for texts of many kinds,
    except those of `texts_with_other_ids`. Anything else raises UserError. The begin-of-text token is put before a text if the tokenizer
    does so; a tokenizer without one names its end of text there. End of text ends generation, unless a published tokenizer names other
    tokens for that. Its chat templates go along.
    """
    entries = _sentencepiece_entries(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _byte_level_entries(tokenizer)
    tokens, kinds = entries["tokens"], entries["token_type"]
    unused = [number for number in range(vocab_size) if number >= len(tokens)]
    entries["tokens"] = tokens + [f"[PAD{number}]" for number in unused]
    entries["token_type"] = kinds + [_UNUSED] * len(unused)
    if "scores" in entries:
        entries["scores"] = entries["scores"] + [0.0] * len(unused)
    entries |= _special_ids(tokenizer, entries["tokens"])
    entries |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    if len(set(entries["tokens"])) < len(entries["tokens"]):
        raise UserError(f"{tokenizer.path} cannot be written as GGUF: two of its tokens have the same text.")
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()} | _chat_templates(tokenizer)


def _special_ids(tokenizer: Tokenizer, tokens: list[str]) -> dict[str, int]:
    """Return the ids of special tokens: those of a published tokenizer, and of others end of text for every role that has no token.

    `eot_token_id` ends a turn of a chat: the first token of those that end a generated text which the chat template names.
    """
    begin = tokenizer.end_of_text if tokenizer.begin_of_text is None else tokenizer.begin_of_text
    ids = {"bos_token_id": begin, "eos_token_id": tokenizer.end_of_text, "padding_token_id": padding(tokenizer)[1]}
    folder = tokenizer.path.parent
    if not published_configuration(folder):
        return ids
    numbers, roles = {token: number for number, token in enumerate(tokens)}, role_tokens(folder)
    for key, role in (("unknown", "unk_token"), ("padding", "pad_token"), ("mask", "mask_token")):
        if roles.get(role) in numbers:
            ids[f"{key}_token_id"] = numbers[roles[role]]
    template = chat_templates(folder).get("default", "")
    if "eos_token" in template or tokenizer.end_of_text_token in template:
        return ids | {"eot_token_id": tokenizer.end_of_text}
    ends = [end for end in end_ids(folder) if end < len(tokens) and tokens[end] in template]
    return ids | ({"eot_token_id": ends[0]} if ends else {})


def _chat_templates(tokenizer: Tokenizer) -> dict[str, str | list]:
    """Return the chat templates by their keys: the usual one, and others with the list of their names."""
    templates = chat_templates(tokenizer.path.parent)
    others = {name: template for name, template in templates.items() if name != "default"}
    entries: dict[str, str | list] = {f"tokenizer.chat_template.{name}": template for name, template in others.items()}
    if "default" in templates:
        entries["tokenizer.chat_template"] = templates["default"]
    return entries | ({"tokenizer.chat_templates": list(others)} if others else {})


def texts_with_other_ids(tokenizer: Tokenizer) -> dict[str, Callable[[str], bool]]:
    """Return the kinds of texts to which llama.cpp gives other ids than the tokenizer: in words, with a function that recognises them."""
    kinds: dict[str, Callable[[str], bool]] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        # SentencePiece writes a space so; llama.cpp reads it back as one.
        kinds["text that contains the character U+2581"] = lambda text: SPACE in text
        model = read_model(tokenizer.path)
        kept = [piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type == PIECE.USER_DEFINED]
        if kept and model.normalizer_spec.add_dummy_prefix:  # llama.cpp puts the space before each part between them
            kinds[f"text that contains a user-defined piece ({_some(kept)})"] = lambda text: any(piece in text for piece in kept)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        if tokenizer.normalizers == {"NFC"}:
            unnormalised = "text that is not in Unicode's form NFC, because llama.cpp does not normalise text"
            kinds[unnormalised] = lambda text: not is_normalized("NFC", text)
        added = json.loads(tokenizer.file_bytes())["added_tokens"]
        if control := [token["content"] for token in added if not token["special"] and token["content"] in _CONTROL_BY_NAME]:
            kinds[f"text that contains {_some(control)}, which llama.cpp takes for special tokens"] = lambda text: any(
                name in text for name in control
            )
    return kinds


def comparable_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of many kinds to which llama.cpp must give the tokenizer's ids: all but those of `texts_with_other_ids`."""
    differing = texts_with_other_ids(tokenizer).values()
    return [text for text in texts_of_many_kinds(tokenizer) if not any(differs(text) for differs in differing)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _sentencepiece_entries(tokenizer: SentencePieceTokenizer) -> dict:
    """Return the metadata of a SentencePiece bpe model."""
    model = read_model(tokenizer.path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    complaints = {
        "is not bpe": trainer.model_type != trainer.BPE,
        "has no bytes for unknown characters (byte_fallback)": not any(piece.type == PIECE.BYTE for piece in model.pieces),
        f'normalises text ("{normalizer.name}")': bool(normalizer.precompiled_charsmap),
        "removes spaces": normalizer.remove_extra_whitespaces,
        "does not write spaces as \\u2581": not normalizer.escape_whitespaces,
        "puts the space after a word": trainer.treat_whitespace_as_suffix,
        "holds unused pieces": any(piece.type == PIECE.UNUSED for piece in model.pieces),
    }
    if found := [complaint for complaint, applies in complaints.items() if applies]:
        raise UserError(f"{tokenizer.path} cannot be written as GGUF: it {', '.join(found)}.")
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [int(piece.type) for piece in model.pieces],
        "add_space_prefix": normalizer.add_dummy_prefix,
        "unknown_token_id": next(number for number, piece in enumerate(model.pieces) if piece.type == PIECE.UNKNOWN),
    }


def _byte_level_entries(tokenizer: Tokenizer) -> dict:
    """Return the metadata of a byte-level BPE tokenizer."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        contents = json.loads(tokenizer.file_bytes())
    else:
        contents = json.loads(convert(tokenizer).to_str())
    model, added = contents["model"], {token["id"]: token for token in contents["added_tokens"]}
    merges: list[tuple[str, str]] = []
    for merge in model.get("merges", ()):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((first, second))
    if model["type"] != "BPE" or model.get("byte_fallback") or not _is_byte_level(model["vocab"]):
        raise UserError(
            f"{tokenizer.path} cannot be written as GGUF: it is {model['type']}, not byte-level BPE. "
            "For a SentencePiece model, give the tokenizer.model itself."
        )
    if others := sorted(tokenizer.normalizers - {"NFC"}) if isinstance(tokenizer, HuggingFaceTokenizer) else []:
        raise UserError(f"{tokenizer.path} cannot be written as GGUF: it normalises text ({', '.join(others)}), which llama.cpp does not.")
    if any(" " in token for token in model["vocab"]):
        raise UserError(f"{tokenizer.path} cannot be written as GGUF: it has tokens that contain a space.")
    names = {number: name for name, number in model["vocab"].items()} | {number: token["content"] for number, token in added.items()}
    kind = lambda number: _NORMAL if number not in added else _CONTROL if added[number]["special"] else _USER_DEFINED  # noqa: E731
    return {
        "model": "gpt2",
        "pre": _pattern(tokenizer, contents, merges),
        "tokens": [names.get(number, f"[PAD{number}]") for number in range(tokenizer.vocab_size)],
        "token_type": [kind(number) if number in names else _UNUSED for number in range(tokenizer.vocab_size)],
        "merges": [" ".join(merge) for merge in merges],
    }


def _is_byte_level(vocabulary: dict[str, int]) -> bool:
    """Return True if every byte has a token."""
    return set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)


def _pattern(tokenizer: Tokenizer, contents: dict, merges: list[tuple[str, str]]) -> str:
    """Return llama.cpp's name of a pattern with which texts of many kinds have our ids. Raises UserError if there is none.

    `contents` is the tokenizer.json. A pattern that it contains is tried first: others may differ only on rare texts.
    """
    own_steps, added = json.dumps(contents["pre_tokenizer"]), contents["added_tokens"]
    texts = comparable_texts(tokenizer)
    # Added tokens are in the vocabulary from the start, so that they keep their ids.
    vocabulary = contents["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    ours = [tokenizer.encode(text) for text in texts]
    for name, (pattern, ignores_merges) in sorted(_PATTERNS.items(), key=lambda item: json.dumps(item[1][0]) not in own_steps):
        theirs = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignores_merges))
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        theirs.add_tokens([token["content"] for token in added if not token["special"]])
        if all(theirs.encode(text, add_special_tokens=False).ids == ids for text, ids in zip(texts, ours, strict=True)):
            return name
    raise UserError(
        f"{tokenizer.path} cannot be written as GGUF: it does not split text into words like any of llama.cpp's patterns "
        f"{', '.join(_PATTERNS)}."
    )
