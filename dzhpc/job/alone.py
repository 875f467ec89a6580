"""The communicator of one rank without MPI: a serial verb, or a run of one process, needs no MPI that works."""


class Alone:
    """What this package asks of mpi4py's ``Comm``, under its names; with nobody else there is nothing to send or to wait for."""

    rank, size = 0, 1

    def bcast(self, value):
        """The root's value."""
        return value

    def scatter(self, values: list):
        """This rank's one of the root's values."""
        return values[0]

    def gather(self, value) -> list:
        """All ranks' values."""
        return [value]

    allgather = gather

    def allreduce(self, value, op=None):
        """The values of all ranks, reduced."""
        return value

    def Allreduce(self, send, receive, op=None) -> None:
        """The same in place: ``receive`` holds the result already."""

    def barrier(self) -> None:
        """All ranks are here."""

    def Ibarrier(self) -> "Alone":
        """A request that is complete, see :meth:`Test`."""
        return self

    def Test(self) -> bool:
        """Whether a request is complete."""
        return True

    def Iprobe(self, tag: int) -> bool:
        """Whether a message waits."""
        return False

    def improbe(self, tag: int) -> None:
        """The next message."""
