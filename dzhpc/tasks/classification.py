"""Image classification: a network on labelled images, cross entropy, accuracy."""

import logging

import numpy as np
import torch
import torch.nn.functional as F

from dzhpc import data
from dzhpc.config import Config
from dzhpc.engines import make_engine
from dzhpc.errors import DzhpcError, InputError
from dzhpc.models import zoo

log = logging.getLogger("dzhpc")


class Classification:
    """See :class:`dzhpc.tasks.Task`. Raises InputError where data, model and input do not fit each other."""

    parts = None
    query_cost = bind_cost = 1
    box_key = ""

    def __init__(self, config: Config, device: torch.device):
        self.config = config.model_copy(deep=True)
        data_set = data.load(config.data, config.run.seed)
        self._fill_in_model(data_set)
        self.model = zoo.build(self.config.model, config.run.seed).to(device)
        self.data = data_set.to(device)
        self.batches = data.Batches(self.data, config.data.batch_size, config.run.seed, config.data.augment)
        self._choose_layout()
        self.engine = make_engine(config.zo.engine, self.model, "cross_entropy", config.zo.precision, config.zo.memory_mb)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.evaluation_queries = 0  # the test set belongs to us, not to the black box
        self.evaluation_parts = -(-len(self.data.test) // config.eval.batch_size)

    def bind(self, step: int) -> float:
        self.model.train()
        inputs, labels = self.batches.batch(step)
        return self.engine.bind(self._laid_out(inputs), labels)

    def bind_for_scores(self, number: int) -> float:
        self.model.train()
        inputs, labels = self.batches.balanced(number)
        return self.engine.bind(self._laid_out(inputs), labels)

    @torch.no_grad()
    def evaluate(self, parts: range, step: int) -> np.ndarray:
        self.model.eval()
        rows, size = np.zeros((len(parts), 3)), self.config.eval.batch_size
        for k, part in enumerate(parts):
            images, labels = (t[part * size : (part + 1) * size] for t in (self.data.test.images, self.data.test.labels))
            outputs = self.model(self._laid_out(self.data.normalise(images)))
            loss = F.cross_entropy(outputs.double(), labels, reduction="sum")
            rows[k] = float(loss), int((outputs.argmax(1) == labels).sum()), len(labels)
        return rows

    def _fill_in_model(self, data_set: data.DataSet) -> None:
        """``classes`` and ``in_channels`` follow from the data, where the model takes them; a contradiction is an error."""
        section, known = self.config.model, zoo.accepted(self.config.model)
        for key, value in (("classes", len(data_set.classes)), ("in_channels", data_set.train.images.shape[1])):
            given = section.fields.get(key, value)
            if given != value:
                raise InputError(f"model.{key} = {given}: the data set {self.config.data.name} has {value}; leave the key out")
            if known is None or key in known:
                section.__pydantic_extra__[key] = value

    def _choose_layout(self) -> None:
        """Channels-last is 2 to 4 times faster, but a network that calls ``view`` may refuse it; try a small batch first."""
        sample, classes = self.data.normalise(self.data.train.images[:2]), len(self.data.classes)
        channels_last = torch.channels_last if sample.ndim == 4 else torch.contiguous_format
        self.model.eval()
        for self._layout in (channels_last, torch.contiguous_format):
            self.model.to(memory_format=self._layout)
            try:
                with torch.no_grad():
                    outputs = self.model(self._laid_out(sample))
                break
            except DzhpcError:
                raise
            except Exception as error:  # the user's forward may raise anything
                if self._layout is torch.contiguous_format:
                    shape = list(sample.shape[1:])
                    raise InputError(
                        f"model {self.config.model.name} cannot take images {shape}: {' '.join(str(error).split())}"
                    ) from None
                log.info("model %s cannot run in channels-last layout; using the slower contiguous one", self.config.model.name)
        if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or outputs.shape[1] != classes:
            found = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise InputError(
                f"model {self.config.model.name} gives {found} for 2 images; expected [2, {classes}], a logit per class"
            )

    def _laid_out(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.contiguous(memory_format=self._layout)
