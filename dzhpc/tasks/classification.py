"""Image classification: a network on labelled images, cross entropy, accuracy."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from dzhpc import data
from dzhpc.config import Config
from dzhpc.errors import InputError
from dzhpc.tasks import fitting
from dzhpc.tasks.protocol import Task


class Classification(Task):
    """See :class:`dzhpc.tasks.Task`. Raises InputError where data, model and input do not fit each other."""

    in_shards = True

    def __init__(self, config: Config, device: torch.device):
        self.config = config.model_copy(deep=True)
        data_set = data.load(config.data, config.run.seed)
        sizes = {"classes": len(data_set.classes), "in_channels": data_set.train.images.shape[1]}
        self._check_sizes(sizes)
        self.model = fitting.build(self.config, device, **sizes)
        self.data = data_set.to(device)
        self.batches = data.Batches(self.data, config.data.batch_size, config.run.seed, config.data.augment)
        self._layout = fitting.lay_out(self.model, self._try_out, images=self.data.train.images.ndim == 4)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.engine = fitting.engine_of(config, self.model, "cross_entropy", self.steps_per_epoch)
        self.evaluation_parts = -(-len(self.data.test) // config.eval.batch_size)

    def made(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return {f"data.name = {self.config.data.name}": self.data.tensors(), **super().made()}

    def bind(self, step: int, shard: int = 0) -> float:
        return self._bind(*self.batches.batch(step), shard)

    def bind_for_scores(self, number: int, shard: int | None = None) -> float:
        return self._bind(*self.batches.balanced(number), shard)

    def _bind(self, inputs: torch.Tensor, labels: torch.Tensor, shard: int | None) -> float:
        self.model.train()
        part = data.shard(shard, self.config.data.shards, len(inputs))
        return self.engine.bind(self._laid_out(inputs[part]), labels[part])

    @torch.no_grad()
    def evaluate(self, parts: Sequence[int], step: int) -> np.ndarray:
        self.model.eval()
        rows, size = np.zeros((len(parts), 3)), self.config.eval.batch_size
        for k, part in enumerate(parts):
            images, labels = (t[part * size : (part + 1) * size] for t in (self.data.test.images, self.data.test.labels))
            outputs = self.model(self._laid_out(self.data.normalise(images)))
            loss = F.cross_entropy(outputs.double(), labels, reduction="sum")
            rows[k] = float(loss), int((outputs.argmax(1) == labels).sum()), len(labels)
        return rows

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        """Raise InputError for a model that the input makes for other data."""
        for key, value in sizes.items():
            given = self.config.model.fields.get(key, value)
            if given != value:
                raise InputError(f"model.{key} = {given}: the data set {self.config.data.name} has {value}; leave the key out")

    def _try_out(self, layout: torch.memory_format) -> torch.memory_format:
        sample = self.data.normalise(self.data.train.images[:2]).contiguous(memory_format=layout)
        fitting.try_out(self.model, sample, [len(sample), len(self.data.classes)], "a logit per class", self.config.model.name)
        return layout

    def _laid_out(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.contiguous(memory_format=self._layout)
