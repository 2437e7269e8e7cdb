"""Who computes with several cores: the engine's thread, and nobody else in a server's process.

OpenMP (libgomp) gives every thread that runs a parallel operation workers of its own. Once there
are more of these than cores, waiting workers sleep instead of spinning, and each of the hundreds of
operations of a decode step has to wake one: such a step takes 43 ms instead of 25 (demonstration
model, two cores). One picture that is resized in a thread of its own is enough for that.
"""

import torch

NUM_CORES = torch.get_num_threads()  # OMP_NUM_THREADS, or those there are: as the process began


def take_all_cores() -> None:
    """For operations of the calling thread."""
    _take(NUM_CORES)


def take_one_core() -> None:
    """For operations of the calling thread, and of all threads that begin after this."""
    _take(1)


def _take(num: int) -> None:
    torch.set_num_threads(num)
    # A thread takes the number up at its first look: later, another thread may have set its own.
    torch.get_num_threads()
