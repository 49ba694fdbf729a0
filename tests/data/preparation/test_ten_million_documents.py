"""Opening a large corpus costs neither time nor memory: the index is mapped, not read into objects."""

import json
import subprocess
import sys

import numpy as np

from data.shards import MAGIC, VERSION
from tests.ranks import REPOSITORY

DOCUMENTS = 10_000_000

OPEN = r"""
import json, re, sys, time
from data.shards import PreparedData
start = time.perf_counter()
stream = PreparedData(sys.argv[1]).splits["train"]
last = stream.read(len(stream) - 5, 5).tolist()
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1)) * 1024  # getrusage would count the parent's
print(json.dumps([stream.num_documents, last, seconds, peak]))
"""


def test_ten_million_documents_open_in_2_seconds_and_1_gib(tmp_path):
    (tmp_path / "train").mkdir()
    np.tile(np.array([7, 1], "<u2"), DOCUMENTS).tofile(tmp_path / "train" / "00000.bin")
    with open(tmp_path / "train" / "00000.idx", "wb") as file:
        file.write(MAGIC + np.array([VERSION], "<u8").tobytes() + b"\x08" + np.array([DOCUMENTS, DOCUMENTS + 1], "<u8").tobytes())
        np.full(DOCUMENTS, 2, "<i4").tofile(file)
        (np.arange(DOCUMENTS, dtype="<i8") * 4).tofile(file)
        np.arange(DOCUMENTS + 1, dtype="<i8").tofile(file)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    shard = {"prefix": "train/00000", "documents": DOCUMENTS, "tokens": 2 * DOCUMENTS, "bytes": DOCUMENTS, "sources": [], "sha256": {}}
    split = {"documents": DOCUMENTS, "tokens": 2 * DOCUMENTS, "bytes": DOCUMENTS, "shards": [shard]}
    tokenizer = {"file": "tokenizer.model", "sha256": "", "vocab_size": 8, "end_of_text": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "tokenizer": tokenizer, "splits": {"train": split}}))
    answer = subprocess.run([sys.executable, "-c", OPEN, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    documents, last, seconds, peak_bytes = json.loads(answer)
    assert (documents, last) == (DOCUMENTS, [1, 7, 1, 7, 1])
    assert seconds < 2, seconds
    assert peak_bytes < 2**30, peak_bytes
