"""Text -> token ids and back, the same text that went in."""

import base64
import binascii
import io
import itertools
import json
import re
import string
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from data.command_line import UserError, nearest
from data.files import sha256_of

SPACE = "\u2581"  # what SentencePiece writes for a space; a real one in the text has to be spelt in bytes
_SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
_PAGE_CHARACTERS = 4000  # of one training sentence, so that a newline and what follows it can be one piece
_END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (_END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_SENTINEL = re.compile(r"<extra_id_\d+>")
_UNIGRAM_PAGES = 500
_FILE_NAMES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")
_CONFIGURATION = "tokenizer_config.json"
_LONGEST_LINE = 1000  # of a tiktoken vocabulary that is looked at to tell what it is


class Tokenizer:
    """Ids from 0 to vocab_size - 1, of which `end_of_text` ends each document. A special token written in a text stays text."""

    path: Path
    vocab_size: int
    end_of_text: int
    end_of_text_token: str
    special_tokens: dict[str, int]
    """Ids that no text is encoded to, by name."""
    settings: dict
    """What decides the ids and is not in the file `path`, as it stands in a tokenizer_config.json."""
    engine: str
    """The library that encodes, and its version."""

    def file_bytes(self) -> bytes:
        """What its file holds, or would hold where it was given as several."""
        return self.path.read_bytes()

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_documents(self, texts: Sequence[str], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int32]]:
        """The ids of all texts, each text's followed by end of text, and how many each has with it.  -> [tokens], [texts]"""
        return self._join([np.asarray(ids, dtype) for ids in self._encode_each(texts)], dtype)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; end of text has none, and bytes that are no UTF-8 become U+FFFD."""
        raise NotImplementedError

    def special_token_id(self, token: str) -> int:
        if token not in self.special_tokens:
            hint = nearest(token, list(self.special_tokens))
            raise UserError(f'{self.path} has no special token "{token}".{hint} It has: {", ".join(self.special_tokens) or "none"}.')
        return self.special_tokens[token]

    @property
    def special_names(self) -> dict[int, str]:
        """Of special tokens and what ends a document, by id."""
        return {token: name for name, token in self.special_tokens.items()} | {self.end_of_text: self.end_of_text_token}

    @property
    def sentinels(self) -> dict[str, int]:
        """T5's names of what was cut out of a text, <extra_id_0> and so on, as far as they are special tokens, by name."""
        return {name: token for name, token in self.special_tokens.items() if _SENTINEL.fullmatch(name)}

    def start_token_id(self, token: str | None) -> int:
        """Of what a decoder behind an encoder reads before its first target; None: of what ends a document."""
        return self.end_of_text if token is None else self.special_token_id(token)

    def word_edges(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which ids begin a word, and behind which another word begins whatever comes: at spaces and line ends.  -> [vocab], [vocab]

        A space alone belongs to what follows. Of WordPiece a word begins where ## does not stand. A script that is written without
        spaces has no words here.
        """
        spelt = self._spellings()
        begins, ends = ([text[place].isspace() for text in spelt] for place in (slice(1), slice(-1, None)))
        return np.array(begins), np.array(ends) & np.array([text.strip(" ") != "" for text in spelt])

    def _spellings(self) -> Sequence[str]:
        """What each id stands for, with a space at its beginning where a word begins there.  [vocab]"""
        raise NotImplementedError

    def _encode_each(self, texts: Sequence[str]) -> Iterable[Sequence[int] | NDArray]:
        return map(self.encode, texts)

    def _join(self, encoded: Sequence[NDArray], dtype: np.dtype) -> tuple[NDArray, NDArray[np.int32]]:
        assert self.vocab_size - 1 <= np.iinfo(dtype).max, f"{self.vocab_size} ids do not fit {dtype}"
        lengths = np.fromiter((len(ids) + 1 for ids in encoded), np.int32, len(encoded))
        tokens = np.full(lengths.sum(dtype=np.int64), self.end_of_text, dtype)
        if len(encoded):
            is_text = np.ones(len(tokens), dtype=bool)
            is_text[np.cumsum(lengths, dtype=np.int64) - 1] = False
            tokens[is_text] = np.concatenate(encoded)
        return tokens, lengths

    def _set_end(self, token: str, ids: Mapping[str, int]) -> None:
        if token not in ids:
            raise UserError(
                f'{self.path} has no token "{token}" to end a document with.{nearest(token, list(ids))} Set with --end_of_text.'
            )
        self.end_of_text_token, self.end_of_text = token, ids[token]

    def _known_end(self, ids: Mapping[str, int]) -> str:
        token = next((token for token in _KNOWN_ENDS if token in ids), None)
        if token is None:
            raise UserError(f"{self.path}: none of {', '.join(_KNOWN_ENDS)} is in it. Say with --end_of_text which token ends a document.")
        return token


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    engine = f"sentencepiece {sentencepiece.__version__}"

    def __init__(self, path: Path, end_of_text: str | None, threads: int = 1) -> None:
        self.path, self.settings, self._threads = path, {}, threads
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path} is no SentencePiece model.") from error
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.id_to_piece(token) for token in range(self.vocab_size)]
        if end_of_text is None and self._model.eos_id() < 0:
            raise UserError(f"{path} names no end-of-sentence piece. Say with --end_of_text which one ends a document.")
        self._set_end(end_of_text or pieces[self._model.eos_id()], {piece: token for token, piece in enumerate(pieces)})
        self.special_tokens = {piece: token for token, piece in enumerate(pieces) if self._model.is_control(token)}
        self._space = [pieces.index(byte) for byte in _SPACE_BYTES] if set(_SPACE_BYTES) <= set(pieces) else []
        # A model that puts a space before every text, such as Llama's, would put one after each spelt character too.
        self._spells_space = bool(self._space) and self.decode(self._spell_space(f"a{SPACE}b")) == f"a{SPACE}b"

    def encode(self, text: str) -> list[int]:
        return self._spell_space(text) if self._spells_space and SPACE in text else self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def _encode_each(self, texts: Sequence[str]) -> Iterable[list[int]]:
        if self._threads == 1:
            return map(self.encode, texts)
        encoded = self._model.encode(list(texts), num_threads=self._threads)
        return (self.encode(text) if SPACE in text else ids for text, ids in zip(texts, encoded, strict=True))

    def _spellings(self) -> list[str]:
        pieces = [self._model.id_to_piece(token).replace(SPACE, " ") for token in range(self.vocab_size)]
        return [
            bytes.fromhex(piece[3:5]).decode("ascii", "replace") if self._model.is_byte(token) else piece
            for token, piece in enumerate(pieces)
        ]

    def _spell_space(self, text: str) -> list[int]:
        first, *others = self._model.encode(text.split(SPACE), num_threads=1)
        return first + [token for part in others for token in self._space + part]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`."""

    engine = f"tokenizers {tokenizers.__version__}"

    def __init__(self, path: Path, end_of_text: str | None, threads: int = 1) -> None:
        self.path, self.settings, self._threads = path, {}, threads
        try:
            self._text = path.read_text(encoding="utf-8") if path.name == "tokenizer.json" or not _pair_of(path) else _join_pair(path)
            self._model = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # the library raises nothing more exact
            raise UserError(f"{path} is no tokenizer.json: {error}.") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # as text, that is
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_tokens = {token.content: number for number, token in self._model.get_added_tokens_decoder().items() if token.special}
        self._set_end(end_of_text or self._known_end(vocabulary), vocabulary)

    def file_bytes(self) -> bytes:
        return self._text.encode()

    def encode(self, text: str) -> list[int]:
        return self._encode_batch([text])[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    def _encode_each(self, texts: Sequence[str]) -> Iterable[list[int]]:
        if self._threads == 1:  # the library encodes the texts of a batch on as many threads as there are cores
            return map(self.encode, texts)
        return (encoding.ids for encoding in self._encode_batch(list(texts)))

    def _spellings(self) -> list[str]:
        names = [self._model.id_to_token(token) or "" for token in range(self.vocab_size)]
        if isinstance(self._model.model, tokenizers.models.WordPiece):
            prefix = self._model.model.continuing_subword_prefix
            return [name.removeprefix(prefix) if name.startswith(prefix) else f" {name}" for name in names]
        spell = self._model.decoder.decode if self._model.decoder else "".join
        return [spell(["a", name, "a"])[1:-1] for name in names]  # a decoder may take a space from the ends of a text

    def _encode_batch(self, texts: list[str]) -> list[tokenizers.Encoding]:
        try:
            return self._model.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more exact
            raise UserError(f"{self.path} cannot encode every text: {error}.") from error


class TiktokenTokenizer(Tokenizer):
    """A `.tiktoken` vocabulary: a line for each token, in base64, with its rank.

    How text is split before, and the special tokens, the file does not hold. They come from a tokenizer_config.json beside it:
    `pat_str`, as tiktoken calls the pattern, and `added_tokens_decoder`, {"ID": {"content": "TOKEN"}}, as Hugging Face's files
    for Llama 3 and Kimi have it. For the files that OpenAI publishes, known by name, they come from the library.
    """

    def __init__(self, path: Path, end_of_text: str | None) -> None:
        import tiktoken

        self.path, self.engine = path, f"tiktoken {tiktoken.__version__}"
        self.ranks = ranks = _read_ranks(path)
        configured = _read_configuration(path.parent)
        if "pat_str" in configured:
            pattern, self.special_tokens = configured["pat_str"], _added_tokens(configured)
        else:
            pattern, self.special_tokens = _definition_of_name(path, ranks)
        if doubled := [token for token, number in self.special_tokens.items() if number in ranks.values()]:
            raise UserError(f"{path.with_name(_CONFIGURATION)}: the id of {doubled[0]} is a token of {path.name} too.")
        try:
            self._model = tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens)
        except Exception as error:  # the library raises nothing more exact
            raise UserError(f"{path} cannot be loaded: {error}.") from error
        self.settings = {
            "pat_str": pattern,
            "added_tokens_decoder": {str(number): {"content": token, "special": True} for token, number in self.special_tokens.items()},
        }
        self.vocab_size = self._model.n_vocab
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._set_end(end_of_text or self._known_end(self.special_tokens), self.special_tokens)

    def encode(self, text: str) -> list[int]:
        return self._model.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(int(token), b"") for token in ids).decode("utf-8", errors="replace")

    def _spellings(self) -> list[str]:
        return [self._bytes.get(token, b"").decode("utf-8", "replace") for token in range(self.vocab_size)]

    def _encode_each(self, texts: Sequence[str]) -> Iterable[NDArray]:
        return (self._model.encode_to_numpy(text, disallowed_special=()) for text in texts)


def load_tokenizer(path: str | Path, end_of_text: str | None = None, fast: bool = False, threads: int = 1) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds tokenizer.json, tokenizer.model or a .tiktoken file, or of GPT-2's two files,
    vocab.json and merges.txt (what stands before these names being the same), named by the first or by their folder.

    Which token ends a document: `end_of_text`, else `eos_token` of a tokenizer_config.json beside the file, else the file's own.
    `threads` is how many encode_documents may use, where the library leaves a choice: one, or more. `fast` has gigatoken encode,
    unchecked: for a tokenizer that `fastest` has found to give the same ids with it.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _FILE_NAMES if (path / name).is_file()] + sorted(path.glob("*.tiktoken"))
        found += [file for file in sorted(path.glob("*vocab.json")) if _pair_of(file)]
        if not found:
            raise UserError(f"{path} holds neither {' nor '.join(_FILE_NAMES)} nor a .tiktoken file, nor vocab.json with merges.txt.")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file. A tokenizer is a SentencePiece .model, a Hugging Face tokenizer.json or a .tiktoken file.")
    end_of_text = end_of_text or _configured_end(path.parent)
    if path.suffix == ".json":
        tokenizer: Tokenizer = HuggingFaceTokenizer(path, end_of_text, threads)
    elif _holds_ranks(path):
        tokenizer = TiktokenTokenizer(path, end_of_text)
    else:
        tokenizer = SentencePieceTokenizer(path, end_of_text, threads)
    if not fast:
        return tokenizer
    from data.tokenization.gigatoken import GigatokenTokenizer

    return GigatokenTokenizer(tokenizer)


def fastest(tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[Tokenizer, str]:
    """The tokenizer with gigatoken in front, where that gives the same ids on the sample and on hard texts, else as it was given.

    Of the sample so much is tried as takes a moment. The sentence with it says for the user which it is, and why.
    """
    from data.tokenization.gigatoken import GigatokenTokenizer, texts_to_compare

    try:
        fast = GigatokenTokenizer(tokenizer)
    except UserError as error:
        return tokenizer, f"Tokenizing with {tokenizer.engine}: {error}"
    tried = 0
    for text in texts_to_compare(tokenizer, sample):
        if fast.encode(text) != tokenizer.encode(text):
            return tokenizer, f"Tokenizing with {tokenizer.engine}: gigatoken gives other ids, for {text[:60]!r} among others."
        tried += 1
    return fast, f"Tokenizing with {fast.engine}, whose ids for {tried} texts were those of {tokenizer.engine}."


def copy_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Put a tokenizer's file into a folder under a name that load_tokenizer looks for, with what the file does not hold beside it."""
    suffix = tokenizer.path.suffix
    name = (
        "tokenizer.json" if suffix == ".json" else f"{tokenizer.path.stem}.tiktoken" if _holds_ranks(tokenizer.path) else "tokenizer.model"
    )
    copy = Path(folder) / name
    if not copy.exists() or not copy.samefile(tokenizer.path):
        copy.write_bytes(tokenizer.file_bytes())
    settings = {"eos_token": tokenizer.end_of_text_token} | tokenizer.settings
    (Path(folder) / _CONFIGURATION).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
    return copy


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    kind: str = "bpe",
    special_tokens: Sequence[str] = (),
    within_words: bool = False,
) -> None:
    """Learn a vocabulary from texts and write it to `path`; kind is "bpe" or "unigram".

    `special_tokens` are among its ids, behind end of text, and no text is encoded to them.

    Whatever is no piece is spelt in bytes, and nothing is normalised, so every text comes back as it was. Pieces may hold
    spaces and newlines ("return self.", a line's end with the next one's indentation): a token of source code is then 4.2
    bytes long instead of 3.5 at 4,096 pieces (cf. SuperBPE, Liu et al. 2025, arXiv 2503.13423). With `within_words` none goes on
    behind a space, or from a letter to a digit or another sign.
    """
    pages = _pages(texts, num_characters=(vocab_size - 258) // 2)
    if kind == "unigram":  # what it takes grows faster than the text: ten seconds for these, five minutes for ten times as many
        pages = pages[:: len(pages) // _UNIGRAM_PAGES + 1]
    model = io.BytesIO()
    if refused := [token for token in special_tokens if not token or token == _END_OF_TEXT or special_tokens.count(token) > 1]:
        raise UserError(f"special_tokens holds {refused[0]!r}; each must be a name of its own.")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pages),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=within_words,
            split_by_unicode_script=within_words,
            max_sentencepiece_length=32,
            max_sentence_length=4 * _PAGE_CHARACTERS,
            required_chars=string.ascii_letters + string.digits + string.punctuation,  # else a rare capital is in no piece
            unk_id=0,
            eos_id=1,
            eos_piece=_END_OF_TEXT,
            control_symbols=list(special_tokens),
            bos_id=-1,
            pad_id=-1,
            num_threads=8,  # fixed, because the sums of "unigram" depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_why_not(error, vocab_size)) from error
    Path(path).write_bytes(model.getvalue())


def _pages(texts: Iterable[str], num_characters: int) -> list[str]:
    """Texts by the page, in which only the commonest characters stand for themselves.

    The others, of which Chinese has more than a small vocabulary can hold, become tabs, which SentencePiece puts into no piece.
    """
    pages = [text[start : start + _PAGE_CHARACTERS] for text in texts for start in range(0, len(text), _PAGE_CHARACTERS)]
    counts = Counter(itertools.chain.from_iterable(pages))
    rare = {ord(character): "\t" for character, _ in counts.most_common()[num_characters:]}
    return [page.translate(rare) for page in pages] if rare else pages


def _why_not(error: RuntimeError, vocab_size: int) -> str:
    """SentencePiece's sentence, without the place in its source, in the words of our settings."""
    if most := re.search(r"Please set it to a value <= (\d+)", str(error)):
        return f"This text is too short to learn {vocab_size} pieces from it; vocab_size can be {most[1]} at most. Or give a tokenizer."
    return f"No vocabulary of {vocab_size} pieces can be learnt from this text: {str(error).rpartition('] ')[2] or 'it is empty.'}"


def _configured_end(folder: Path) -> str | None:
    """`eos_token` as Hugging Face writes it: a string, or an added token with its content."""
    token = _read_configuration(folder).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def _read_configuration(folder: Path) -> dict:
    path = folder / _CONFIGURATION
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not JSON with a name and value for each setting: {error}.") from error


def _added_tokens(configuration: dict) -> dict[str, int]:
    return {entry["content"]: int(number) for number, entry in configuration.get("added_tokens_decoder", {}).items()}


def _pair_of(vocabulary: Path) -> Path | None:
    """The merges that belong to a vocabulary, where its name says that it is one of two files."""
    merges = vocabulary.with_name(vocabulary.name.removesuffix("vocab.json") + "merges.txt")
    return merges if vocabulary.name.endswith("vocab.json") and merges.is_file() else None


def _join_pair(vocabulary: Path) -> str:
    """GPT-2's vocab.json and merges.txt as one tokenizer.json: byte-level BPE, its end of text special."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(_pair_of(vocabulary))))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([token for token in _KNOWN_ENDS if model.token_to_id(token) is not None])
    return model.to_str()


def _holds_ranks(path: Path) -> bool:
    """Whether a file is a tiktoken vocabulary, which Llama 3 calls tokenizer.model and Kimi tiktoken.model."""
    with open(path, "rb") as file:
        return path.suffix == ".tiktoken" or re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(_LONGEST_LINE)) is not None


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}, line {number}: a line of a tiktoken vocabulary is a token in base64 and its rank.") from error
    if missing := {bytes([byte]) for byte in range(256)} - set(ranks):
        raise UserError(f"{path} is no whole tiktoken vocabulary: {len(missing)} of the 256 bytes are not in it.")
    return ranks


def published_pattern(name: str) -> str | None:
    """How text is split in the vocabulary of this name that OpenAI publishes; None where it publishes none."""
    definition = _published_definition(name, lambda url, expected_hash: {})
    return definition["pat_str"] if definition else None


def _definition_of_name(path: Path, ranks: dict[bytes, int]) -> tuple[str, dict[str, int]]:
    """Pattern and special tokens of a vocabulary that OpenAI publishes."""

    def load(url: str, expected_hash: str) -> dict[bytes, int]:
        if sha256_of(path) != expected_hash:
            raise UserError(f"{path} is not the file of this name that OpenAI publishes: its sha256 is not {expected_hash}.")
        return ranks

    definition = _published_definition(path.stem, load)
    if definition is None:
        raise UserError(
            f"{path} does not say how text is split into words, and it bears no name that the tiktoken library knows. "
            f'Put "pat_str" and "added_tokens_decoder" into {path.with_name(_CONFIGURATION)}.'
        )
    return definition["pat_str"], definition["special_tokens"]


def _published_definition(name: str, load: Callable[[str, str], dict[bytes, int]]) -> dict | None:
    """What the tiktoken library says of a vocabulary, with `load` for what would read its file from the network."""
    from tiktoken_ext import openai_public

    constructor = openai_public.ENCODING_CONSTRUCTORS.get(name)
    if constructor is None or "load_tiktoken_bpe" not in constructor.__code__.co_names:
        return None
    # The library's own function, in which one name means another function.
    return types.FunctionType(constructor.__code__, constructor.__globals__ | {"load_tiktoken_bpe": load})()
