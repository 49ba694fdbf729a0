"""Tokenizers that others publish, from packages that are installed into a folder of their own."""

import json
import shutil

import pytest
import tokenizers

from data.tokenization.conversion import convert
from data.tokenization.gguf import gguf_tokenizer, texts_with_other_ids
from data.tokenization.huggingface_folder import write_tokenizer
from data.tokenization.loading import load_tokenizer
from data.tokenization.probe_texts import texts_of_many_kinds
from launch.compressing import llama_engine
from model.compression import gguf_file
from model.config import ModelConfig
from model.transformer import Transformer
from tests.data.tokenization.test_huggingface_files import HARD, their_tokenizer
from tests.data.tokenization.vocabularies import QWEN, QWEN3_ADDED, QWEN3_SPECIAL, as_qwen3
from tests.packages import package_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return package_files(tmp_path_factory.mktemp("mistral"), "mistral-common==1.13.1") / "mistral_common" / "data"


MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


@pytest.mark.parametrize("version", MISTRAL)
def test_mistrals_tokenizers_are_written_with_their_ids(mistral, version, tmp_path):
    write_tokenizer(mistral / MISTRAL[version], tmp_path, model_max_length=77)
    ours, theirs = load_tokenizer(mistral / MISTRAL[version]), their_tokenizer(tmp_path, "mistral")
    runs = [f"{start}{length * ' '}{end}" for length in range(80) for start in ("", "a", "\n") for end in ("", "b", "\n", "[REF]")]
    for text in [*HARD, *runs, "a[REFERENCE_DOC_3] b[REFERENCE_DOC_13][/REF]</s>", "[REF]<s>", "[REFERENCE_DOC_19]<0x0A>[INST]"]:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), text


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Qwen3's tokenizer.json: its vocabulary as a package carries it, with the added tokens, pattern and form that Qwen publishes."""
    folder = tmp_path_factory.mktemp("qwen3")
    ranks = package_files(tmp_path_factory.mktemp("dashscope"), "dashscope==2.0.2") / "dashscope" / "resources" / "qwen.tiktoken"
    shutil.copy(ranks, folder)
    added = {str(QWEN3_IDS[name]): {"content": name} for name in QWEN3_SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps({"pat_str": QWEN, "added_tokens_decoder": added}))
    converted = convert(load_tokenizer(folder))
    published = tokenizers.Tokenizer(converted.model)
    as_qwen3(published).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    return folder / "tokenizer.json"


QWEN3_IDS = {name: 151_643 + number for number, name in enumerate([*QWEN3_SPECIAL, *QWEN3_ADDED])}


def test_qwen3s_tokenizer_is_written_as_gguf_with_its_ids(qwen3):
    tokenizer = load_tokenizer(qwen3)
    assert tokenizer.encode("<think>\n\nHello 2026") == [QWEN3_IDS["<think>"], 271, 9707, 220, 17, 15, 17, 21]
    entries = gguf_tokenizer(tokenizer, 151_936)
    assert entries["tokenizer.ggml.pre"] == "qwen2" and len(entries["tokenizer.ggml.tokens"]) == 151_936
    assert all(entries["tokenizer.ggml.tokens"][number] == name for name, number in QWEN3_IDS.items())


@pytest.mark.skipif(not llama_engine.is_installed(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", ["qwen3", *MISTRAL])
def test_llama_cpp_gives_the_ids_of_published_tokenizers(name, request, tmp_path):
    path = request.getfixturevalue("qwen3") if name == "qwen3" else request.getfixturevalue("mistral") / MISTRAL[name]
    tokenizer = load_tokenizer(path)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, sequence_length=64, hidden_size=8, num_attention_heads=1, num_layers=1)
    state = {name: weight.detach() for name, weight in Transformer(config).named_parameters()}
    gguf_file.write(config, state, gguf_tokenizer(tokenizer, tokenizer.vocab_size), tmp_path / "model.gguf", "f32")
    differing = texts_with_other_ids(tokenizer).values()
    texts = [*texts_of_many_kinds(tokenizer), *(f"a{length * ' '}b{length * ' '}" for length in range(80)), "<think> a</think>"]
    texts = [text for text in texts if not any(differs(text) for differs in differing)]
    assert len(texts) > 400
    for text, theirs in zip(texts, llama_engine.tokenize(tmp_path / "model.gguf", texts), strict=True):
        assert theirs == tokenizer.encode(text), text
