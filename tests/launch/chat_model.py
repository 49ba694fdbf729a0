"""A tiny chat model as makers publish it: a tokenizer of its own, roles of special tokens, chat templates, sampling settings."""

import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import processors

from model import huggingface
from model.config import ModelConfig
from model.transformer import Transformer
from tests.data.tokenization.vocabularies import learnt_byte_level

SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n<think>{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "a parser adds"}, {"role": "assistant", "content": "an argument"}, {"role": "user", "content": "why?"}]
TEXTS = ["the parser adds an argument to the group of arguments", "why does a parser add it? because the user wants it"] * 20


def write_chat_model(folder: Path, as_files: bool = True) -> Path:
    """Write the model. Its chat templates are files, as transformers 5 writes them, or a list in tokenizer_config.json."""
    folder.mkdir(parents=True)
    model = learnt_byte_level(TEXTS, SPECIAL, 320)
    model.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    ids = {name: model.token_to_id(name) for name in [*SPECIAL, "<think>"]}
    model.post_processor = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A $B", [("<|begin|>", ids["<|begin|>"])])
    model.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    configuration = {
        "added_tokens_decoder": {str(ids[name]): {"content": name, "special": name in SPECIAL} | flags for name in ids},
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": True} | flags,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": None,
        "extra_special_tokens": ["<|im_start|>", "<|end|>"],
        "padding_side": "left",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast" if as_files else "ClassInTheCodeOfTheFolder",
    }
    if as_files:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "short.jinja").write_text(SHORT)
    else:
        configuration["chat_template"] = [{"name": "default", "template": TEMPLATE}, {"name": "short", "template": SHORT}]
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"})
    )
    (folder / "tokenization_own.py").write_text("raise RuntimeError('code of a folder was run')")
    config = ModelConfig(vocab_size=384, sequence_length=64, hidden_size=32, num_layers=1, num_attention_heads=2, intermediate_size=64)
    state = {name: weight.detach() * (5 if weight.ndim == 2 else 1) for name, weight in Transformer(config).named_parameters()}
    huggingface.export(config, state, folder / "weights")
    for path in (folder / "weights").iterdir():
        path.rename(folder / path.name)
    (folder / "weights").rmdir()
    config_json = json.loads((folder / "config.json").read_text())
    ends = [ids["<|end|>"], ids["<|im_end|>"]]
    own = {"bos_token_id": ids["<|begin|>"], "eos_token_id": ends, "pad_token_id": ids["<|pad|>"]}
    (folder / "config.json").write_text(json.dumps(config_json | own))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(own | sampling | {"transformers_version": "4.51.0"}))
    return folder


def facts(folder: Path, tokenizer_class: type = transformers.AutoTokenizer) -> dict:
    """Return what a user of a chat model sees of a folder through transformers."""
    tokenizer = tokenizer_class.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_model_config(config)
    if (folder / "generation_config.json").is_file():
        generation = transformers.GenerationConfig.from_pretrained(folder)
    text = "a <|im_start|> b<think> <|im_end|>"
    return {
        "chat": tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        "short": tokenizer.apply_chat_template(CHAT, chat_template="short", return_dict=False),
        "text": tokenizer(text)["input_ids"],
        "roles": {role: (token, tokenizer.convert_tokens_to_ids(token)) for role, token in tokenizer.special_tokens_map.items()},
        "padding_side": tokenizer.padding_side,
        "model_max_length": tokenizer.model_max_length,
        "sampling": [generation.do_sample, generation.temperature, generation.top_p, generation.top_k],
        "ids": [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id],
        "config": [config.bos_token_id, config.eos_token_id, config.pad_token_id],
    }
