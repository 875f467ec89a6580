"""Batches of a data set as functions of (seed, step)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dzhpc.data.dataset import DataSet
from dzhpc.errors import InputError
from dzhpc.method.seeds import generator

PAD = 4  # pixels of zero padding before the random crop


def shard(number: int | None, count: int, size: int) -> slice:
    """Which examples of a batch of ``size`` are those of a shard; None: all. Raises InputError where a shard would be empty."""
    if size < count:
        raise InputError(f"data.shards = {count}: a batch has {size} examples; choose fewer shards")
    return slice(None) if number is None else slice(number, None, count)


class Order:
    """Which of ``count`` training examples belong to a step, all shuffled anew each epoch: a function of (seed, step).

    The remainder of an epoch is left out, another one each epoch. shuffled: if not, the order is that of the data.
    """

    def __init__(self, count: int, batch_size: int, seed: int, device: torch.device, shuffled: bool = True):
        self._count, self._batch_size, self._seed, self._device = count, batch_size, seed, device
        self._shuffled = shuffled
        self.steps_per_epoch = count // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def chosen(self, step: int) -> Tensor:
        """int64 [batch_size]."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            draw = generator(self._seed, "shuffle", epoch)
            order = torch.randperm(self._count, generator=draw) if self._shuffled else torch.arange(self._count)
            self._epoch, self._order = epoch, order.to(self._device)
        return self._order[k * self._batch_size : (k + 1) * self._batch_size]


class Batches:
    """Training batches of a data set: shuffling, crop and flip as batched tensor code on the data's device."""

    def __init__(self, data: DataSet, batch_size: int, seed: int, augment: bool, shuffled: bool = True):
        self.data, self.batch_size, self.seed, self.augment = data, batch_size, seed, augment
        if batch_size > len(data.train):
            raise InputError(
                f"data.batch_size = {batch_size}: the training set has {len(data.train)} images; choose a smaller batch"
            )
        if augment and data.train.images.ndim != 4:
            shape = list(data.train.images.shape)
            raise InputError(f"data.augment: crops images [N, C, H, W], the data set has {shape}; set data.augment = false")
        self._order = Order(len(data.train), batch_size, seed, data.train.labels.device, shuffled)
        self.steps_per_epoch = self._order.steps_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs float32 [B, C, H, W], labels [B]) of a step."""
        chosen = self._order.chosen(step)
        images = self.data.train.images[chosen]
        if self.augment:
            images = crop_and_flip(images, generator(self.seed, "augment", step))
        return self.data.normalise(images), self.data.train.labels[chosen]

    def balanced(self, number: int) -> tuple[Tensor, Tensor]:
        """The ``number``-th class-balanced batch for pruning scores, without augmentation: equally many images a class."""
        labels = self.data.train.labels.cpu()
        present = labels.unique()
        share = min(max(1, self.batch_size // len(present)), int(labels.bincount()[present].min()))
        draw = generator(self.seed, "balanced", number)
        chosen = []
        for label in present:
            members = (labels == label).nonzero()[:, 0]
            chosen.append(members[torch.randperm(len(members), generator=draw)[:share]])
        picked = torch.cat(chosen).to(self.data.train.labels.device)
        return self.data.normalise(self.data.train.images[picked]), self.data.train.labels[picked]


def crop_and_flip(images: Tensor, draw: torch.Generator) -> Tensor:
    """Random crop after zero padding by PAD pixels, and random horizontal flip: [B, C, H, W] -> same, any dtype."""
    b, c, h, w = images.shape
    shift = torch.randint(0, 2 * PAD + 1, (2, b), generator=draw).to(images.device)
    flip = torch.randint(0, 2, (b,), generator=draw).bool().to(images.device)
    rows = shift[0][:, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    columns = shift[1][:, None] + torch.where(flip[:, None], columns.flip(0), columns)
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    k = torch.arange(b, device=images.device)
    return padded[
        k[:, None, None, None],
        torch.arange(c, device=images.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
