"""The finished layers of a compression on disk."""

import shutil

import pytest
import torch

from data.command_line import UserError
from launch.compressing.layer_store import LayerStore


def test_layers_that_are_removed_during_the_work_are_reported(tmp_path):
    store = LayerStore(tmp_path / "output", {"model": "any"})
    store.open()
    store.write(0, {"0.weight": torch.ones(2)}, {"seconds": 1})
    assert store["0.weight"].tolist() == [1, 1] and store.read_report(0) == {"seconds": 1}
    shutil.rmtree(store.folder)
    for read in (lambda: store["0.weight"], lambda: store.read_report(0)):
        with pytest.raises(UserError, match=rf"^{store.folder} was removed or changed while it was used: "):
            read()
    with pytest.raises(UserError, match="could not be written"):
        store.write(1, {"1.weight": torch.ones(2)}, {})
    store.close()
