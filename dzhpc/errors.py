"""What can go wrong, and the exit code that says so.

| code | meaning |
|---|---|
| 0 | finished, a limit in ``[stop]`` reached, a STOP file found, or nothing left to do |
| 1 | an exception nobody foresaw, of the user's own network or data included |
| 2 | bad input, missing file or data, or sizes for which there is not the memory |
| 3 | a checkpoint that is missing, damaged, of another model or with other frozen keys |
| 4 | bad launch: no MPI job, several ranks on one GPU, unlike nodes, or a run folder that another job is using |
| 5 | numerical failure |
| 6 | the black box (a user's loss or classifier) failed, and again when asked again; what is known is kept in a checkpoint |
| 75 | stopped early with a checkpoint: submit the same command again |
"""

import traceback

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
    """The processes are no MPI job, share a GPU, would compute unlike bits, or work in a run folder that another job is using."""

    exit_code = 4


class NumericalError(DzhpcError):
    """NaN or infinity where a number was needed; names rank, coordinate and step."""

    exit_code = 5


class ReplicaError(NumericalError):
    """The replicated state differs between ranks, so no later number could be trusted."""


class BlackBoxError(DzhpcError):
    """The user's function or classifier raised, and did so again; the cause is chained."""

    exit_code = 6


def message_of(error: BaseException) -> str:
    """One line: the user's message, or type, text and place of an exception nobody foresaw."""
    if isinstance(error, DzhpcError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory: {' '.join(str(error).split()) or type(error).__name__}; ask for less, or give the job more"
    frames = traceback.extract_tb(error.__traceback__)
    place = f", at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def exit_code_of(error: BaseException) -> int:
    """The documented code of an error of ours, 1 for any other."""
    if is_out_of_memory(error):
        return InputError.exit_code
    return error.exit_code if isinstance(error, DzhpcError) else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or torch found no memory, on the host or on a GPU."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torchs)
