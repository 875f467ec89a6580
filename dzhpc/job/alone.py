"""What this package asks of the module ``mpi4py.MPI``, for one rank without MPI: there is nobody else to wait for."""

IN_PLACE = SUM = MAX = MIN = COMM_TYPE_SHARED = None


def Get_library_version() -> str:
    """The MPI in use."""
    return "none (one process without a launcher)"


class Comm:
    """The communicator of one rank, under mpi4py's names."""

    rank, size = 0, 1

    def Dup(self) -> "Comm":
        """Another one of the same ranks."""
        return self

    def Split_type(self, kind) -> "Comm":
        """The ranks of this node."""
        return self

    def bcast(self, value):
        """The root's value."""
        return value

    def gather(self, value) -> list:
        """All ranks' values."""
        return [value]

    allgather = gather

    def Bcast(self, values) -> None:
        """``values`` hold the root's already."""

    def Scatter(self, sent, received) -> None:
        """This rank's one of the root's numbers."""
        received[:] = sent

    def Scatterv(self, sent, received) -> None:
        """This rank's of the root's numbers; sent: (numbers, (how many for each, where they begin))."""
        received[:] = sent[0]

    def Gatherv(self, sent, received) -> None:
        """The root gets all ranks' numbers; received: (numbers, (how many of each, where they begin))."""
        received[0][:] = sent.ravel()

    def Alltoallv(self, sent, received) -> None:
        """This rank gets all ranks' numbers for it; both as in :meth:`Gatherv`."""
        received[0][:] = sent[0]

    def Allreduce(self, send, receive, op) -> None:
        """The same in place: ``receive`` holds the result already."""

    def Ibarrier(self) -> "Comm":
        """A request that is complete, see :meth:`Test`."""
        return self

    def Test(self) -> bool:
        """Whether a request is complete."""
        return True

    def improbe(self, tag: int) -> None:
        """The next message: none."""


COMM_WORLD = Comm()
