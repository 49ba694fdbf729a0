"""Which sample comes when: pure arithmetic, so that the state of the reader is one integer, the step."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def sample_numbers(step: int, global_batch_size: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """The samples of an optimizer step, counted from 0; each epoch has its own order.  -> [global_batch_size]

    A step may straddle epochs: the batches are cut from one endless row of epochs, and nothing is left out between them.
    """
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, num_samples)
    for epoch in np.unique(epochs):
        places[epochs == epoch] = permute(places[epochs == epoch], num_samples, seed, int(epoch))
    return places


def rank_share(samples: NDArray[np.int64], micro_batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """The part of a global batch that a rank computes.  [global_batch_size] -> [accumulation, micro_batch_size]

    The batch is dealt out a micro-batch at a time, to rank 0, 1, ... of the first accumulation step, then of the second.
    """
    assert len(samples) % (micro_batch_size * world) == 0, (len(samples), micro_batch_size, world)
    return samples.reshape(-1, world, micro_batch_size)[:, rank]


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each of the positions of [0, size) goes in the shuffle that (seed, epoch) picks; size up to 2**62.  [n] -> [n]

    A Feistel network on the next power of four, walked until it is back inside (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"): a permutation of any size in constant memory.
    """
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=64).digest(), dtype="<u8")
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    shuffled = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := shuffled >= size).any():
        shuffled[outside] = _feistel(shuffled[outside], half_bits, keys)
    return shuffled.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A round a key: the halves change places, one of them masked with a hash of the other.  [n] -> [n]"""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: every bit of the input moves every bit of the output (Steele et al. 2014).  [n] -> [n]"""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
