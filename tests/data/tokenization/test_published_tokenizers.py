"""Tokenizers that others publish, from packages that are installed into a folder of their own."""

import subprocess
import sys

import pytest

from data.tokenization.huggingface_files import write_tokenizer
from data.tokenization.loading import load_tokenizer
from tests.data.tokenization.test_huggingface_files import HARD, their_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a function that installs a package without what it needs, and returns its folder; the test is skipped if that fails."""

    def _install(requirement):
        folder = tmp_path_factory.mktemp("packages")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip(f"pip cannot install {requirement}: {result.stderr.strip().splitlines()[-1]}")
        return folder

    return _install


@pytest.fixture(scope="module")
def mistral(installed):
    return installed("mistral-common==1.13.1") / "mistral_common" / "data"


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
