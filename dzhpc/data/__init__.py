"""Data sets, resident on the device as uint8; batches are functions of (seed, step)."""

from dzhpc.data.batches import Batches, Order, crop_and_flip, shard
from dzhpc.data.dataset import DataSet, Split, make_data_set
from dzhpc.data.sources import load, root_of

__all__ = ["Batches", "DataSet", "Order", "Split", "crop_and_flip", "load", "make_data_set", "root_of", "shard"]
