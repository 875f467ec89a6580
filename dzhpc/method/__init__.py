"""The mathematics: no files, no MPI, no tasks."""
