"""Muon gives the steps of torch.optim.Muon, and whole matrices reach one rank each, however they were divided."""

import json
import queue
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from launch.checkpoints.state import ShardSlice
from launch.training.optimizers import optimizer_for
from launch.training.optimizers.base import Update, scalars_of
from launch.training.optimizers.matrix_exchange import MatrixExchange, owners
from launch.training.optimizers.muon import MuonStep
from launch.training.optimizers.pieces import Piece
from launch.training.settings import OptimizerSettings
from model.config import ModelConfig
from model.transformer import Transformer
from tests.launch.training.layout_cases import LLAMA, STAGES, TENSOR, case_of
from tests.launch.training.layouts_on_ranks import is_of_a_linear
from tests.launch.training.optimizer_references import attach_whole
from tests.ranks import answers_of_ranks

MODEL = ModelConfig(vocab_size=64, sequence_length=16, hidden_size=64, num_layers=2, num_attention_heads=4, num_key_value_heads=2)
RATES = (0.02, 0.01, 0.03)


def muon_of(model: nn.Module, **chosen) -> MuonStep:
    """Return Muon for a model that one process trains."""
    optimizer = optimizer_for(OptimizerSettings(name="muon", **chosen))
    built = optimizer.build(model)
    attach_whole(optimizer, built, model)
    return built


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], scale: float = 1.0) -> None:
    """Take a step for each of RATES, with gradients that depend on the step only, times `scale`."""
    for step, rate in enumerate(RATES):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def trained(scale: float = 1.0, **chosen) -> dict[str, torch.Tensor]:
    model = Transformer(MODEL)
    train(model, [muon_of(model, **chosen)], scale)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_steps_in_bf16_have_the_bits_of_torchs_muon_and_the_rest_is_adamw():
    reference = Transformer(MODEL)
    matrices = [one for name, one in reference.named_parameters() if is_of_a_linear(name)]
    decayed = [one for name, one in reference.named_parameters() if one.dim() == 2 and not is_of_a_linear(name)]
    vectors = [one for one in reference.parameters() if one.dim() == 1]
    muon = torch.optim.Muon(matrices, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    train(reference, [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)])
    ours = trained(muon_precision="bf16", momentum=0.9, weight_decay=0.3)
    assert len(matrices) == 14
    for name, theirs in reference.named_parameters():
        if is_of_a_linear(name):
            assert torch.equal(ours[name], theirs), name
        else:
            assert float((ours[name] - theirs).abs().max()) < 1e-6, name


def test_float32_is_the_default_on_a_cpu():
    exact, rounded, default = trained(muon_precision="float32"), trained(muon_precision="bf16"), trained()
    assert all(torch.equal(exact[name], default[name]) for name in exact)
    assert any(not torch.equal(exact[name], rounded[name]) for name in exact)


def test_gradients_times_a_trillionth_give_the_same_steps():
    usual, tiny = trained(), trained(scale=1e-12)
    assert all(float((usual[name] - tiny[name]).abs().max()) < 1e-6 for name in usual if is_of_a_linear(name))


def test_a_step_that_is_reported_measures_the_change_of_each_matrix():
    model = Transformer(MODEL)
    optimizer, built = optimizer_for(OptimizerSettings(name="muon")), muon_of(model, weight_decay=0.5, cautious_decay=True)
    train(model, [built])
    assert set(optimizer.report(built).values()) == {Update(0.0, 0.0)}, "no step was to be reported"
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    built.pieces.is_reported = True
    built.step()
    updates = optimizer.report(built)
    assert updates.keys() == before.keys()
    for name, update in updates.items():
        change = model.get_parameter(name).detach() - before[name]
        assert update.weight_norm == pytest.approx(float(before[name].norm()), rel=1e-6)
        assert update.change_norm == pytest.approx(float(change.norm()), rel=1e-6) and update.change_norm > 0
    whole = [
        torch.cat([one.flatten() for one in some]).norm()
        for some in ([model.get_parameter(n).detach() - w for n, w in before.items()], before.values())
    ]
    assert scalars_of(updates) == {"optimizer/relative_update": pytest.approx(float(whole[0] / whole[1]), rel=1e-6)}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_held_zeros_stay_zero_and_other_weights_move(precision):
    model = Transformer(MODEL)
    matrices = [one for name, one in model.named_parameters() if is_of_a_linear(name)]
    zero = [torch.rand(one.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for one in matrices]
    for matrix, where in zip(matrices, zero, strict=True):
        matrix.data[where] = 0
        matrix.register_post_accumulate_grad_hook(lambda one, where=where: one.grad.masked_fill_(where, 0))
    built = muon_of(model, muon_precision=precision)
    for group in built.param_groups:
        group["hold_zeros"] = True
    train(model, [built])
    for matrix, where in zip(matrices, zero, strict=True):
        assert not matrix[where].any() and matrix[~where].all()


def test_the_heaviest_matrix_is_given_first_and_ties_go_by_name():
    shapes = {"d": (8, 8), "c": (8, 8), "b": (8, 8), "a": (16, 8), "e": (8, 24)}
    assert owners(shapes, 2) == {"e": 0, "a": 1, "b": 1, "c": 0, "d": 1}
    assert owners(dict(reversed(shapes.items())), 2) == owners(shapes, 2)
    assert set(owners(shapes, 1).values()) == {0}


class Place:
    """The Pieces of one of several threads, which take the part of ranks."""

    def __init__(self, pieces: list[Piece], place: int, mail: list[list[queue.Queue]]):
        self.all, self.place, self.num_places, self._mail = pieces, place, len(mail), mail
        self.shapes = {piece.shard_slice.name: piece.shard_slice.shape for piece in pieces}
        self.sent = 0

    def exchange(self, sent: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        for place, values in enumerate(sent):
            self._mail[self.place][place].put(values)
            self.sent += len(values) * (place != self.place)
        received = [self._mail[place][self.place].get(timeout=10) for place in range(self.num_places)]
        assert [len(values) for values in received] == counts
        return received


@st.composite
def divided(draw) -> tuple[int, dict[str, tuple[int, int]], list[Piece]]:
    """Matrices that are cut into columns or rows, and each part into consecutive values for any of the places, or whole on all."""
    places = draw(st.integers(1, 4))
    shapes = {name: (draw(st.integers(1, 5)), draw(st.integers(1, 5))) for name in "abc"[: draw(st.integers(0, 3))]}
    pieces = []
    for name, shape in shapes.items():
        if draw(st.booleans()):
            pieces += [Piece(ShardSlice.of_whole(name, shape), 0, 0, place, place > 0) for place in range(places)]
            continue
        parts = draw(st.integers(1, 2))
        dimension, group = draw(st.integers(0, 1)), places // parts
        cut = draw(st.integers(0, shape[dimension])) if parts == 2 and group else shape[dimension]
        for part, (first, end) in enumerate([(0, cut), (cut, shape[dimension])] if parts == 2 and group else [(0, cut)]):
            region = tuple((first, end) if at == dimension else (0, size) for at, size in enumerate(shape))
            members = [place for place in range(places) if parts == 1 or not group or place % 2 == part]
            values = (end - first) * shape[1 - dimension]
            ends = sorted(draw(st.lists(st.integers(0, values), min_size=len(members) - 1, max_size=len(members) - 1)))
            for place, start, stop in zip(members, [0, *ends], [*ends, values], strict=True):
                if stop > start:
                    pieces.append(Piece(ShardSlice(name, shape, region, start, stop - start), 0, 0, place, False))
    return places, shapes, sorted(pieces, key=lambda piece: piece.place)


def on_threads(places: int, pieces: list[Piece], whole: dict[str, torch.Tensor]) -> tuple[list[dict], list[dict], list[int]]:
    """Bring matrices to their owners, double them and return them. Return by place: the matrices owned, slices returned, values sent."""
    mail = [[queue.Queue() for _ in range(places)] for _ in range(places)]
    every = [Place(pieces, place, mail) for place in range(places)]
    owned: list = [None] * places
    returned: list = [None] * places

    def run(place: int) -> None:
        exchange = MatrixExchange(every[place], whole)
        slices = {
            piece.shard_slice.name: piece.shard_slice.take_from(whole[piece.shard_slice.name]) for piece in pieces if piece.place == place
        }
        stacks = exchange.gather(slices, torch.empty(0))
        owned[place] = {name: matrix for names, matrices in stacks for name, matrix in zip(names, matrices, strict=True)}
        returned[place] = exchange.scatter([(names, 2 * matrices) for names, matrices in stacks], torch.empty(0))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return owned, returned, [one.sent for one in every]


@settings(max_examples=60, deadline=None)
@given(divided())
def test_slices_reach_their_owner_and_return_however_matrices_are_divided(drawn):
    places, shapes, pieces = drawn
    whole = {name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) for name, shape in shapes.items()}
    owned, returned, _ = on_threads(places, pieces, whole)
    assert sorted(name for one in owned for name in one) == sorted(shapes)
    assert all(torch.equal(matrix, whole[name]) for one in owned for name, matrix in one.items())
    assert [sorted(one) for one in returned] == [
        sorted(piece.shard_slice.name for piece in pieces if piece.place == place) for place in range(places)
    ]
    for piece in pieces:
        name = piece.shard_slice.name
        assert torch.equal(returned[piece.place][name], 2 * piece.shard_slice.take_from(whole[name]))


def pieces_of(shapes: dict[str, tuple[int, int]], data_ranks: int, tensor_ranks: int, divides: bool) -> list[Piece]:
    """Return the pieces of matrices whose columns tensor parallelism divides; ZeRO divides each part if `divides`."""
    pieces = []
    for place in range(data_ranks * tensor_ranks):
        data, tensor = divmod(place, tensor_ranks)
        for name, (rows, columns) in shapes.items():
            width = columns // tensor_ranks
            region = ((0, rows), (tensor * width, (tensor + 1) * width))
            count = rows * width // (data_ranks if divides else 1)
            one = ShardSlice(name, (rows, columns), region, data * count if divides else 0, count)
            pieces.append(Piece(one, 0, 0, place, not divides and data > 0))
    return pieces


@pytest.mark.parametrize(("data_ranks", "tensor_ranks"), [(2, 1), (4, 1), (8, 1), (1, 4), (2, 2), (4, 2)])
def test_a_rank_sends_the_share_of_the_matrices_that_its_layout_needs(data_ranks, tensor_ranks):
    shapes = {f"{layer}.{name}": (16, 8 * width) for layer in range(8) for name, width in (("a", 1), ("b", 2), ("c", 2))}
    whole = {name: torch.ones(shape) for name, shape in shapes.items()}
    values, places = sum(matrix.numel() for matrix in whole.values()), data_ranks * tensor_ranks
    for divides, share, bound in (
        (True, 2 * (places - 1) / places**2, 2 / places),
        (False, (places + tensor_ranks - 2) / (places * tensor_ranks), 1 / tensor_ranks + 1 / places),
    ):
        *_, sent = on_threads(places, pieces_of(shapes, data_ranks, tensor_ranks, divides), whole)
        assert sum(sent) / places == share * values < bound * values


ON_TWO_RANKS = {
    "zero0": case_of("zero0", {}, "llama", optimizer="muon"),
    "zero1": case_of("zero1", {}, "llama", optimizer="muon"),
    "zero2": case_of("zero2", {}, "gpt2", optimizer="muon"),
    "zero3": case_of("zero3", {}, "gpt2", optimizer="muon"),
    "zero3 in sub-groups": case_of(
        "zero3", {}, "llama", optimizer="muon", zero={"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
    ),
    "tensor parallel": case_of("zero1", TENSOR, "llama", optimizer="muon"),
    "pipeline": case_of("pipeline_zero1", STAGES, "llama", optimizer="muon"),
    "bf16": case_of("zero1", {}, "llama", optimizer="muon", words=["--optimizer.muon_precision=bf16"]),
    "never clipped": case_of("zero1", {}, "llama", optimizer="muon", clipping=0.0),
    "clipped above the gradient": case_of("zero1", {}, "llama", optimizer="muon", clipping=2.0),
}


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, list[dict]]:
    answers = answers_of_ranks(2, Path(__file__).with_name("muon_on_ranks.py"), json.dumps(list(ON_TWO_RANKS.values())))
    return {name: list(ranks) for name, ranks in zip(ON_TWO_RANKS, zip(*answers, strict=True), strict=True)}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_each_matrix_is_orthogonalised_once_a_step_and_little_is_sent(name, on_two_ranks):
    ranks = on_two_ranks[name]
    stages = ranks if name == "pipeline" else ranks[:1]
    blocks = 2 * (7 if ON_TWO_RANKS[name]["model"] is LLAMA else 6)
    assert sum(stage["matrices"] for stage in stages) == blocks == sum(rank["orthogonalised"] for rank in ranks)
    values, places = ranks[0]["values"], ranks[0]["places"]
    mean = sum(rank["sent"] for rank in ranks) / len(ranks)
    most = values * ((places - 1) / places if name == "zero0" else 2 / places)
    assert mean <= (2 if name == "bf16" else 4) * most <= 8 * values / places
    assert (mean > 0) == (places > 1)


def test_a_clipping_above_the_gradient_changes_nothing(on_two_ranks):
    """The gradients' norms are about 1, and those of the orthogonalised updates, which DeepSpeed's Muon clips (#8439), about 17."""
    assert on_two_ranks["never clipped"][0]["losses"] == on_two_ranks["clipped above the gradient"][0]["losses"]
