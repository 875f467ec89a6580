"""HDF5 files and the run folder."""
