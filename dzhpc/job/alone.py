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

    def Free(self) -> None:
        """It is not used again."""

    def bcast(self, value):
        """The root's value."""
        return value

    def scatter(self, values: list):
        """This rank's one of the root's values."""
        return values[0]

    def alltoall(self, values: list) -> list:
        """This rank's one of all ranks' values."""
        return values

    def gather(self, value) -> list:
        """All ranks' values."""
        return [value]

    allgather = gather

    def allreduce(self, value, op):
        """The values of all ranks, reduced."""
        return value

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
