"""One rank that trains a tiny model with Muon in several layouts, and counts what a step orthogonalises and sends."""

import gc
import json
import sys

import torch

from launch.ranks.processes import Process, find_process
from launch.training.optimizers import muon
from tests.launch.training.layouts_on_ranks import build_engine, is_of_a_linear, micro_batches, rate
from tests.ranks import answer

STEPS = 3


def train(case: dict, process: Process) -> dict:
    """Return the losses, and per step the matrices that this rank orthogonalised and the bytes that it sent."""
    orthogonalise, counted = muon.newton_schulz, []

    def counting(matrices: torch.Tensor) -> torch.Tensor:
        counted.append(len(matrices))
        return orthogonalise(matrices)

    muon.newton_schulz = counting
    engine, settings = build_engine(case, process)
    losses = []
    for step in range(STEPS):
        batches = micro_batches(step, settings.model, engine.layout, process.rank, settings.batch.micro_batch_size, case)
        losses.append(engine.train_step(batches, rate(step, settings), step).loss)
    muon.newton_schulz, pieces = orthogonalise, engine.pieces
    shapes = [shape for name, shape in pieces.shapes.items() if is_of_a_linear(name)]
    return {
        "losses": losses,
        "orthogonalised": sum(counted) / STEPS,
        "sent": pieces.bytes_exchanged / STEPS,
        "places": pieces.num_places,
        "matrices": len(shapes),
        "values": sum(rows * columns for rows, columns in shapes),
    }


def main() -> None:
    from deepspeed.utils import groups

    from launch.ranks.rendezvous import connect
    from launch.training.communication import initialize_communication

    torch.set_num_threads(1)
    process = find_process()
    initialize_communication(process, connect(process, 30, sys.argv), 600)
    gc.freeze()
    results = []
    for case in json.loads(sys.argv[1]):
        results.append(train(case, process))
        groups._release_process_group_references()
    answer(results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
