"""What can go wrong, and the exit code that says so.

| code | meaning |
|---|---|
| 0 | finished, a limit in ``[stop]`` reached, a STOP file found, or nothing left to do |
| 1 | an exception nobody foresaw, the user's own code included |
| 2 | bad input, missing file or data |
| 3 | a checkpoint that is missing, damaged, of another model or with other frozen keys |
| 4 | bad launch: no MPI job, several ranks on one GPU, or a run folder that another job is using |
| 5 | numerical failure |
| 75 | stopped early with a checkpoint: submit the same command again |
"""

STOPPED_EARLY = 75


class DzhpcError(Exception):
    """An error with one line for the user and an exit code. The line names what was found, expected, and to do next."""

    exit_code = 1


class InputError(DzhpcError):
    """Bad input: a key, a file, a data set, or a model that cannot be used as asked."""

    exit_code = 2


class CheckpointError(DzhpcError):
    """A checkpoint cannot be read, written, or continued."""

    exit_code = 3


class LaunchError(DzhpcError):
    """The processes are no MPI job, share a GPU, or would work in a run folder that another job is using."""

    exit_code = 4


class NumericalError(DzhpcError):
    """NaN or infinity where a number was needed; names rank, coordinate and step."""

    exit_code = 5


class ReplicaError(NumericalError):
    """The replicated state differs between ranks, so no later number could be trusted."""
