"""Image classification: a network on labelled images, cross entropy or squared error, accuracy."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from dzhpc import data
from dzhpc.config import Config
from dzhpc.engines import make_engine
from dzhpc.errors import InputError
from dzhpc.method.first_order import SharedGradient
from dzhpc.method.forward_gradient import local_forward_gradient
from dzhpc.models.mixer import LocalMixer
from dzhpc.tasks import fitting
from dzhpc.tasks.protocol import Task


class Classification(Task):
    """See :class:`dzhpc.tasks.Task`. Raises InputError where data, model and input do not fit each other."""

    in_shards = True

    def __init__(self, config: Config, device: torch.device, data_set: data.DataSet):
        self.config = config.model_copy(deep=True)
        sizes = {"classes": len(data_set.classes), "in_channels": data_set.train.images.shape[1]}
        self._check_sizes(sizes)
        self.model = fitting.build(self.config, device, **sizes)
        self.data = data_set.to(device)
        self.data_bytes = data_set.bytes
        whole = config.data.batch_size == len(self.data.train)  # a search compares losses of one batch; order moves last bits
        shuffled = not (whole and config.zo.estimator == "pattern")
        self.batches = data.Batches(self.data, config.data.batch_size, config.run.seed, config.data.augment, shuffled)
        self._layout = fitting.lay_out(self.model, self._try_out, images=self.data.train.images.ndim == 4)
        self.steps_per_epoch = self.batches.steps_per_epoch
        if config.zo.estimator == "lg-fg-a":  # the engine only serves scores
            self._check_local()
            self.shared = SharedGradient(self.model, config.run.seed, self._shared_batch)
            self.engine = make_engine("full", self.model, config.task.loss)
        else:
            self.engine = fitting.engine_of(config, self.model, config.task.loss, self.steps_per_epoch)
        self.evaluation_parts = -(-len(self.data.test) // config.eval.batch_size)
        self._check_parts()

    @classmethod
    def read(cls, config: Config) -> data.DataSet:
        return data.load(config.data, config.run.seed)

    def examples(self) -> dict[str, torch.Tensor]:
        return self.data.tensors() | {"mean": self.data.mean, "std": self.data.std}

    def bind(self, step: int, shard: int = 0) -> float:
        return self._bind(*self.batches.batch(step), shard)

    def bind_for_scores(self, number: int, shard: int | None = None) -> float:
        return self._bind(*self.batches.balanced(number), shard)

    def _bind(self, inputs: torch.Tensor, labels: torch.Tensor, shard: int | None) -> float:
        self.model.train()
        part = data.shard(shard, self.config.data.shards, len(inputs))
        return self.engine.bind(self._laid_out(inputs[part]), self._targets(labels[part]))

    def _shared_batch(self, step: int) -> tuple[int, Callable[[slice], tuple]]:
        """What :class:`dzhpc.method.first_order.SharedGradient` asks for."""
        self.model.train()
        inputs, labels = self.batches.batch(step)
        inputs, targets = self._laid_out(inputs), self._targets(labels)

        def estimate(positions: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = lambda logits: self.engine.loss(logits, targets[positions])  # noqa: E731
            return local_forward_gradient(self.model, inputs[positions], loss, self.config.zo.q or 1)

        return len(labels), estimate

    def _check_local(self) -> None:
        """Raise InputError for a network without local losses, and one that couples the images whose parts ranks share."""
        name = self.config.model.name
        if not isinstance(self.model, LocalMixer):
            raise InputError(f'zo.estimator = "lg-fg-a": model {name} has no blocks with heads; use model.name = "local-mixer"')
        for key, module in self.model.named_modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                raise InputError(
                    f'zo.estimator = "lg-fg-a": {key} of model {name} couples images, of which each rank sees a part'
                )

    @torch.no_grad()
    def evaluate(self, parts: Sequence[int], step: int) -> np.ndarray:
        self.model.eval()
        rows, size = np.zeros((len(parts), 3)), self.config.eval.batch_size
        for k, part in enumerate(parts):
            images, labels = (t[part * size : (part + 1) * size] for t in (self.data.test.images, self.data.test.labels))
            outputs = self.model(self._laid_out(self.data.normalise(images)))
            rows[k] = self._summed(outputs.double(), labels), int((outputs.argmax(1) == labels).sum()), len(labels)
        return rows

    def _targets(self, labels: torch.Tensor) -> torch.Tensor:
        """What outputs are compared with: labels [B], or for squared errors [B, K]."""
        if self.config.task.loss == "cross_entropy":
            return labels
        count = len(self.data.classes)
        return F.one_hot(labels, count).float() - 1 / count

    def _summed(self, outputs: torch.Tensor, labels: torch.Tensor) -> float:
        """The loss, summed over images."""
        if self.config.task.loss == "cross_entropy":
            return float(F.cross_entropy(outputs, labels, reduction="sum"))
        return float((outputs - self._targets(labels)).square().mean(1).sum())

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        """Raise InputError for a model that the input makes for other data."""
        for key, value in sizes.items():
            given = self.config.model.fields.get(key, value)
            if given != value:
                raise InputError(f"model.{key} = {given}: the data set {self.config.data.name} has {value}; leave the key out")

    def _check_parts(self) -> None:
        """Raise InputError where one image is left in a shard, or for the last pass of an evaluation, and cannot be taken."""
        section, count, size = self.config.data, len(self.data.test), self.config.eval.batch_size
        sample = self._laid_out(self.data.normalise(self.data.train.images[:1]))
        if section.batch_size == section.shards:
            fitting.take_one(self.config, self.model.train(), sample, fitting.one_in_a_shard(section))
        if count % size == 1:
            which = f"eval.batch_size = {size}: leaves one of {count} test images for the last pass"
            fitting.take_one(self.config, self.model.eval(), sample, which)

    def _try_out(self, layout: torch.memory_format) -> torch.memory_format:
        sample = self.data.normalise(self.data.train.images[:2]).contiguous(memory_format=layout)
        fitting.try_out(self.model, sample, [len(sample), len(self.data.classes)], "a logit per class", self.config.model.name)
        return layout

    def _laid_out(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.contiguous(memory_format=self._layout)
