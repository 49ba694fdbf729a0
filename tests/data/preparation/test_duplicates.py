"""Exact duplicates are those that a set finds; near-duplicates follow the Jaccard similarity of their shingles."""

import hashlib
import lzma
import random
import re
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.preparation.duplicates
from data.command_line import UserError
from data.preparation.duplicates import (
    DIGEST,
    bands_for,
    digest_of,
    exact_duplicates,
    near_duplicates,
    signatures,
    sorted_digests,
)

CORPORA = Path(__file__).parents[4] / "shared/corpora"
ONE_FIXTURE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None, "max_examples": 40}
DIGESTS = st.tuples(st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.sampled_from([0, 5, 2**64 - 1]))


@pytest.fixture
def little_memory(monkeypatch):
    """Every step needs many ranges, slices and pieces."""
    monkeypatch.setattr(data.preparation.duplicates, "BYTES_AT_ONCE", 4096)


def digests(rows):
    return np.array(list(rows), DIGEST)


def cut(values, sizes):
    """Cut values into parts of these sizes; the last part is the rest."""
    return [values[start:end] for start, end in pairwise([0, *np.cumsum(sizes), len(values)])]


def some_texts(count, num_words=60, seed=0):
    """Return unrelated texts of random words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    return [" ".join(draw.choices(words, k=num_words)) for _ in range(count)]


def changed(text, num_words, seed=0):
    """Return a text with a few of its words reindexed."""
    words = text.split(" ")
    for place in random.Random(seed).sample(range(len(words)), num_words):
        words[place] = f"other{place}"
    return " ".join(words)


def shingles(text):
    words = [word for word in re.findall(r"[一-鿿]|[^\W_一-鿿]+", text.lower())]
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def jaccard(one, other):
    return len(one & other) / len(one | other)


def dropped_of(texts, which, held_out=(), similarity=0.8, dropped=()):
    """Return the indices of the texts that are dropped; all texts are in one part."""
    flags = [np.isin(np.arange(len(texts)), list(places)) for places in (dropped, held_out)]
    (drop,) = near_duplicates([signatures(texts)], [flags[0]], [flags[1]], similarity, which)
    return np.flatnonzero(drop).tolist()


def test_digest_is_blake2b_of_the_utf8_text():
    both = digest_of("Märchen") + digest_of("")
    assert both[:16] == hashlib.blake2b("Märchen".encode(), digest_size=16).digest()
    assert np.frombuffer(both, DIGEST)["low"][1] == int.from_bytes(digest_of("")[8:], "little")


@given(rows=st.lists(DIGESTS, max_size=30))
def test_sorted_digests_keep_their_indices(rows):
    unsorted = digests(rows)
    indexed = sorted_digests(unsorted)
    assert indexed.tolist() == sorted((high, low, place) for place, (high, low) in enumerate(rows))
    assert np.array_equal(unsorted[indexed["index"]], indexed[["high", "low"]].astype(DIGEST))


@given(rows=st.lists(DIGESTS, max_size=60), sizes=st.lists(st.integers(0, 20), max_size=4))
@settings(**ONE_FIXTURE)
def test_exact_duplicates_match_a_set(little_memory, rows, sizes):
    parts = cut(rows, sizes)
    seen = set()
    expected = []
    for part in parts:
        expected.append([row in seen or seen.add(row) is not None for row in part])
    found = exact_duplicates([sorted_digests(digests(part)) for part in parts])
    assert [flags.tolist() for flags in found] == expected


def test_exact_duplicates_of_memory_maps_need_little_memory(tmp_path, monkeypatch):
    """One text is half of the corpus, and no range can divide it."""
    draw = np.random.default_rng(0)
    parts = []
    for number in range(3):
        rows = draw.integers(0, 2**64, (100_000, 2), np.uint64).view(DIGEST)[:, 0]
        rows[50_000:] = (7, 7)
        sorted_digests(rows).tofile(tmp_path / str(number))
        parts.append(np.memmap(tmp_path / str(number), data.preparation.duplicates.INDEXED_DIGEST, "r"))
    monkeypatch.setattr(data.preparation.duplicates, "BYTES_AT_ONCE", 2**20)
    tracemalloc.start()
    found = exact_duplicates(parts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [int(flags.sum()) for flags in found] == [49_999, 50_000, 50_000]
    assert not found[0][:50_001].any()
    assert peak < 300_000 + 2**20


def test_equal_entries_estimate_jaccard_similarity():
    base = some_texts(1, num_words=200)[0]
    texts = [base, *(changed(base, number, number) for number in (1, 2, 4, 8, 16, 32)), *some_texts(3, seed=9)]
    entries = signatures(texts)
    assert entries.shape == (len(texts), 128) and entries.dtype == np.uint32
    for one in range(len(texts)):
        for other in range(len(texts)):
            true = jaccard(shingles(texts[one]), shingles(texts[other]))
            spread = (true * (1 - true) / 128) ** 0.5
            assert abs((entries[one] == entries[other]).mean() - true) <= 4 * spread + 1e-9, "4 standard deviations, for 45 pairs"


def test_jaccard_estimate_for_chinese_uses_characters():
    base = "秦川雄帝宅，函谷壯皇居。綺殿千尋起，離宮百雉餘。連甍遙接漢，飛觀迥凌虛。雲日隱層闕，風煙出綺疎。"
    other = base.replace("雲日", "雲月")
    true = jaccard(shingles(base), shingles(other))
    one, two = signatures([base, other])
    assert 0.6 < true < 0.9
    assert abs((one == two).mean() - true) < 0.15  # four standard deviations


def test_signatures_ignore_case_and_punctuation():
    entries = signatures(["Über den, Wolken!", "über den wolken", "über den", "...", "!!!", ""])
    assert np.array_equal(entries[0], entries[1])
    assert all((entries[one] == entries[other]).mean() < 0.05 for one in range(2, 6) for other in range(one))


def test_signature_depends_only_on_its_text():
    texts = ["", "a", *some_texts(6), "?", "b c d e f"]
    together = signatures(texts)
    assert np.array_equal(together, np.concatenate([signatures(texts[:3]), signatures([]), signatures(texts[3:4]), signatures(texts[4:])]))


def test_signatures_are_the_same_on_every_machine():
    """If this fails, the library or a hash has changed, and partly prepared folders cannot be resumed."""
    assert hashlib.sha256(signatures(["to be or not to be, that is the question", "雲日隱層闕"]).astype("<u4").tobytes()).hexdigest() == (
        "542d456f2dcf88dedd3bcb26105f91d4a49e1493b98eafbd792a5abffa6f4908"
    )


@given(similarity=st.floats(0.06, 1.0))
def test_bands_are_the_longest_that_find_999_of_1000_pairs(similarity):
    bands, rows = bands_for(similarity)

    def chance(rows):
        return 1 - (1 - similarity**rows) ** (128 // rows)

    assert bands * rows <= 128
    assert chance(rows) >= 0.999
    assert rows == 128 or all(chance(longer) < 0.999 for longer in range(rows + 1, 129))


def test_bands_of_common_similarities():
    assert [bands_for(similarity) for similarity in (0.7, 0.8, 1.0)] == [(32, 4), (25, 5), (1, 128)]


@pytest.mark.parametrize("similarity", [0.0, 0.01, -1.0, 1.01, float("nan"), float("inf")])
def test_similarity_out_of_range_is_refused(similarity):
    with pytest.raises(UserError, match=r"must be from 0\.06 to 1"):
        bands_for(similarity)


def test_drop_keeps_the_first_training_document_of_a_cluster():
    a, b, c = some_texts(3)
    texts = [a, b, changed(a, 1), c, changed(b, 1), changed(a, 1, seed=1)]
    assert dropped_of(texts, "drop") == [2, 4, 5]
    assert dropped_of(texts, "drop", held_out=[0]) == [0, 4, 5]
    assert dropped_of(texts, "drop", held_out=[0, 2, 5]) == [2, 4, 5]
    assert dropped_of(texts, "drop", dropped=[0]) == [4], "without the first, its two copies are not similar enough"


def test_held_out_drops_only_held_out_copies_of_training_documents():
    a, b, c = some_texts(3)
    texts = [a, changed(a, 1), b, changed(b, 1), c, changed(c, 1)]
    assert dropped_of(texts, "held_out", held_out=[0, 2, 3]) == [0]
    assert dropped_of(texts, "held_out", held_out=[0, 2, 3], dropped=[1]) == []
    assert dropped_of(texts, "held_out") == []


def test_held_out_document_is_dropped_through_its_cluster():
    """Each text is similar to the next; the last is not similar to the first, which is the only training document."""
    chain = some_texts(1, num_words=120)
    for number in range(6):
        words = chain[-1].split(" ")
        chain.append(" ".join(words[:3] + [f"new{number}"] * 3 + words[3:]))
    assert jaccard(shingles(chain[0]), shingles(chain[-1])) < 0.85 < jaccard(shingles(chain[0]), shingles(chain[1]))
    assert dropped_of(chain, "held_out", held_out=range(1, 7), similarity=0.85) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("which", ["drop", "held_out"])
def test_near_duplicates_do_not_depend_on_parts_and_memory(monkeypatch, which):
    texts = some_texts(60)
    texts += [changed(text, number % 4, number) for number, text in enumerate(texts[:40])] + [texts[3]] * 30
    random.Random(1).shuffle(texts)
    entries, dropped, held_out = signatures(texts), np.arange(len(texts)) % 11 == 0, np.arange(len(texts)) % 3 == 0
    (whole,) = near_duplicates([entries], [dropped], [held_out], 0.8, which)
    assert 5 < whole.sum() < 70
    monkeypatch.setattr(data.preparation.duplicates, "BYTES_AT_ONCE", 4096)
    in_parts = near_duplicates(*(cut(each, [1, 0, 50, 7]) for each in (entries, dropped, held_out)), 0.8, which)
    assert [len(part) for part in in_parts] == [1, 0, 50, 7, len(texts) - 58]
    assert np.array_equal(np.concatenate(in_parts), whole)


def test_empty_input_has_no_duplicates():
    assert exact_duplicates([]) == near_duplicates([], [], [], 0.8, "drop") == []
    nothing = np.zeros(0, np.bool_)
    assert len(near_duplicates([signatures([])], [nothing], [nothing], 0.8, "held_out")[0]) == 0


def test_frequent_text_takes_linear_time():
    """All pairs would be 1.8 billion comparisons of half a kilobyte."""
    entries = np.repeat(
        signatures(["Alle Rechte vorbehalten. Impressum und Datenschutz finden Sie unten auf jeder Seite."]), 60_000, axis=0
    )
    none = np.zeros(len(entries), np.bool_)
    (drop,) = near_duplicates([entries], [none], [none], 0.8, "drop")
    assert not drop[0] and drop[1:].all()


@pytest.mark.parametrize("num_documents", [2_000, 10_000, 40_000])
def test_near_duplicates_need_27_bytes_per_document(monkeypatch, num_documents):
    entries = np.random.default_rng(0).integers(0, 2**32, (num_documents, 128), np.uint32)
    none, last = np.zeros(len(entries), np.bool_), np.arange(len(entries)) == len(entries) - 1
    entries[-1] = entries[0]
    monkeypatch.setattr(data.preparation.duplicates, "BYTES_AT_ONCE", 2**20)
    tracemalloc.start()
    (drop,) = near_duplicates([entries], [none], [last], 0.9, "held_out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(drop, last)
    assert peak < 2**20 + 27 * len(entries)


def real_documents(corpus):
    if not CORPORA.is_dir():
        pytest.skip(f"{CORPORA} is not here")
    if corpus == "poems":
        text = lzma.decompress((CORPORA / "chinese-poetry-tang/tang.txt.xz").read_bytes()).decode()
        return [poem for poem in text.split("\n\n") if len(poem) > 40][:1500]
    return [line for line in (CORPORA / "wikitext-2/valid.txt").read_text(encoding="utf-8").split("\n") if len(line) > 200][:1500]


@pytest.mark.parametrize("corpus", ["articles", "poems"])
def test_near_duplicates_in_real_text_match_brute_force(corpus):
    """Compare all pairs: no pair 0.1 above the limit is kept, and each dropped document has a similar training document."""
    texts = real_documents(corpus)
    draw = random.Random(0)
    for text in draw.sample(texts, 150):
        characters = list(text)
        for place in draw.sample(range(len(characters)), draw.choice([1, 2, 4])):
            characters[place] = draw.choice("春江花月夜" if corpus == "poems" else "abcde")
        texts.append("".join(characters))
    held_out = [place for place in range(len(texts)) if draw.random() < 0.2]
    dropped = set(dropped_of(texts, "held_out", held_out, similarity=0.7))
    sets = [shingles(text) for text in texts]
    training = sorted(set(range(len(texts))) - set(held_out))
    holders = {}
    for place in training:
        for shingle in sets[place]:
            holders.setdefault(shingle, set()).add(place)

    def most_similar(place):
        others = set().union(*(holders.get(shingle, ()) for shingle in sets[place]))
        return max((jaccard(sets[place], sets[other]) for other in others), default=0.0)

    best = {place: most_similar(place) for place in held_out}
    assert sum(similarity >= 0.8 for similarity in best.values()) > 10, "otherwise nothing is tested"
    assert all(place in dropped for place, similarity in best.items() if similarity >= 0.8)
    assert all(best[place] >= 0.55 for place in dropped), "0.15 below the limit is four standard deviations"


def test_texts_without_words_have_different_signatures():
    texts = ["★★★★★", "★☆☆☆☆", "😀😁😂🤣😃", "！！！！！", "!!!!!", "?????", "     "]
    signed = signatures(texts)
    equal = (signed[:, None] == signed[None]).mean(axis=2)
    assert (equal[~np.eye(len(texts), dtype=bool)] < 0.5).all()
    assert (signatures([texts[0]]) == signed[0]).all()
