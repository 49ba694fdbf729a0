"""The grid of ranks, and the micro-batches of a pipeline."""

import itertools

import pytest
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given
from hypothesis import strategies as st

from data.command_line import UserError
from launch.ranks.layout import Layout, largest_micro_batch_size, min_micro_batches

LAYOUTS = [
    Layout(stages * tensor * sequence * data, stages, tensor, sequence)
    for stages, tensor, sequence, data in itertools.product(range(1, 17), repeat=4)
    if stages * tensor * sequence * data <= 16
]
FACTORS = st.tuples(*[st.integers(1, 5)] * 4)


def stage(layout: Layout, rank: int) -> int:
    """Pipeline stage of a rank: each stage has the same number of consecutive ranks."""
    return rank // (layout.world_size // layout.pipeline_stages)


def test_every_place_of_the_grid_belongs_to_one_rank():
    for layout in LAYOUTS:
        places = [
            (stage(layout, rank), layout.data_rank(rank), layout.sequence_rank(rank), layout.tensor_rank(rank))
            for rank in range(layout.world_size)
        ]
        sizes = layout.pipeline_stages, layout.data_parallel_size, layout.sequence_parallel_size, layout.tensor_parallel_size
        assert places == list(itertools.product(*map(range, sizes))), layout  # the last index changes fastest


@given(FACTORS)
def test_rank_is_computed_from_its_place_in_the_grid(sizes):
    stages, data, sequence, tensor = sizes
    layout = Layout(stages * data * sequence * tensor, stages, tensor, sequence)
    assert (layout.data_parallel_size, layout.zero_size) == (data, data * sequence)
    assert (layout.num_replicas, layout.model_parallel_size) == (stages * tensor, stages * tensor * sequence)
    for rank in range(layout.world_size):
        place = (stage(layout, rank) * data + layout.data_rank(rank)) * sequence + layout.sequence_rank(rank)
        assert rank == place * tensor + layout.tensor_rank(rank)


def test_grid_equals_deepspeeds_pipeline_topology():
    """DeepSpeed has three axes: the parts of a sequence count as data parallel."""
    for layout in LAYOUTS:
        topology = PipeModelDataParallelTopology(layout.pipeline_stages, layout.tensor_parallel_size, layout.zero_size)
        for rank in range(layout.world_size):
            coordinates = topology.get_coord(rank)
            assert coordinates.pipe == stage(layout, rank), layout
            assert coordinates.data == layout.data_rank(rank) * layout.sequence_parallel_size + layout.sequence_rank(rank), layout
            assert coordinates.model == layout.tensor_rank(rank), layout


def test_ranks_of_a_sequence_group_differ_only_in_their_part():
    for layout in LAYOUTS:
        groups = layout.sequence_groups()
        assert sorted(itertools.chain(*groups)) == list(range(layout.world_size)), layout
        for group in groups:
            assert [layout.sequence_rank(rank) for rank in group] == list(range(layout.sequence_parallel_size)), layout
            assert len({(stage(layout, rank), layout.data_rank(rank), layout.tensor_rank(rank)) for rank in group}) == 1, layout


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 2), "The number of ranks, 3, is not a multiple of pipeline_stages 2. Nearest: 2 or 4 ranks."),
        ((1, 4), "The number of ranks, 1, is not a multiple of pipeline_stages 4. Nearest: 4 ranks."),
        (
            (10, 2, 2, 2),
            "The number of ranks, 10, is not a multiple of pipeline_stages 2 x tensor_parallel_size 2 x sequence_parallel_size 2. "
            "Nearest: 8 or 16 ranks.",
        ),
        ((2, 1, 0), "tensor_parallel_size is 0; it must be at least 1."),
        ((2, -1, 1, 0), "pipeline_stages is -1; it must be at least 1.\nsequence_parallel_size is 0; it must be at least 1."),
    ],
)
def test_invalid_number_of_ranks_is_refused_with_the_nearest_valid_one(sizes, message):
    with pytest.raises(UserError) as refusal:
        Layout(*sizes)
    assert str(refusal.value) == message


@given(st.integers(1, 100), FACTORS)
def test_suggested_numbers_of_ranks_are_valid(world_size, sizes):
    stages, tensor, sequence, _ = sizes
    try:
        Layout(world_size, stages, tensor, sequence)
    except UserError as refusal:
        nearest = str(refusal).partition("Nearest: ")[2].removesuffix(" ranks.").split(" or ")
        for number in map(int, nearest):
            assert abs(Layout(number, stages, tensor, sequence).world_size - world_size) < stages * tensor * sequence


def test_text_of_a_layout_lists_its_parallel_sizes():
    assert str(Layout(1)) == "1 rank(s)"
    assert str(Layout(4)) == "4 rank(s)"
    assert str(Layout(2, 2)) == "2 rank(s): 2 pipeline stages"
    assert str(Layout(16, 2, 2, 2)) == "16 rank(s): 2 pipeline stages x tensor parallel 2 x sequence parallel 2 x data parallel 2"


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 5, 16])
def test_bubble_is_the_share_of_idle_slots_in_deepspeeds_schedule(stages, num_micro_batches):
    """Each slot of the schedule has one forward pass, one backward pass or nothing."""
    for place in range(stages):
        slots = [
            sum(isinstance(instruction, schedule.ForwardPass | schedule.BackwardPass) for instruction in slot)
            for slot in schedule.TrainSchedule(num_micro_batches, stages, place)
        ]
        assert (slots.count(1), set(slots) - {0, 1}) == (2 * num_micro_batches, set())
        assert Layout(stages, stages).bubble(num_micro_batches) == pytest.approx(slots.count(0) / len(slots))


@pytest.mark.parametrize("stages", range(2, 65))
def test_bubble_with_min_micro_batches_is_below_a_fifth(stages):
    assert Layout(stages, stages).bubble(min_micro_batches(stages)) < 1 / 5


@given(st.integers(1, 3000), st.integers(1, 20))
def test_micro_batch_is_the_largest_with_enough_micro_batches(share, stages):
    enough = min(share, 4 * stages) if stages > 1 else 1
    sizes = [size for size in range(1, share + 1) if share % size == 0 and share // size >= enough]
    assert largest_micro_batch_size(share, stages) == max(sizes)


def test_micro_batch_without_pipeline_is_the_whole_share():
    assert [largest_micro_batch_size(share, 1) for share in (1, 7, 96)] == [1, 7, 96]
    assert [largest_micro_batch_size(share, 2) for share in (1, 7, 8, 16, 96)] == [1, 1, 1, 2, 12]
