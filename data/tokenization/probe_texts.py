"""Texts on which two tokenizers are compared."""

import random
from collections.abc import Iterator

from data.tokenization.tokenizer import Tokenizer

_TEXTS = (
    "",
    " ",
    "Hello, world!  Two  spaces,   three; and a trailing one ",
    "def f(x):\n    if x:\n        return [1, 2.5e-3]\n\treturn None\r\n\n\n",
    "\t\ttabs\t and \v\f others \x00\x07\x7f\u00a0\u2003\u3000\u200b\ufeff",
    "naïve café Ångström ﬁ ½ ２ e\u0301 \u0130 ß",
    "汉字かなカナ한글 עברית العربية ไทย हिन्दी Ελληνικά Русский",
    "😀👩‍👩‍👧‍👦🇪🇺 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff\ue000",
    "▁ literal ▁▁ marks▁",
    "<unk> <s> </s> <pad> <|endoftext|> <|end_of_text|> <0x0A> <0xE2> [CLS] [MASK] <extra_id_0>",
    "http://example.org/a_b?c=d&e=%20#f  {'k': \"v\\n\"} /* x */ // y ## z --- === ... !!!!",
    "aaaaaaaaaaaaaaaaaaaaaaaaa" + 37 * " " + 21 * "\n" + 13 * "\t" + 50 * "=" + 33 * "-" + 17 * "ab" + 11 * "\r\n",
)


def texts_of_many_kinds(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts that tokenizers have got wrong, the names of the special tokens, and pieces of the vocabulary in random order."""
    yield from _TEXTS
    yield from tokenizer.special_tokens
    yield " ".join(["", *tokenizer.special_tokens, "".join(tokenizer.special_tokens)])
    draw = random.Random(0)
    for _ in range(500):
        yield tokenizer.decode([draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 60))])
