"""A denoiser D before a classifier f that may only be asked (Salman et al. 2020; DeepZero, Appendix G).

(A2): minimise E CE(f(D(x + delta)), f(x)) over D, delta ~ N(0, sigma^2), by queries; f(x) are the classifier's own soft answers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dzhpc import data
from dzhpc.config import Config
from dzhpc.config.tasks import first_order
from dzhpc.engines import make_engine
from dzhpc.engines.losses import mse
from dzhpc.errors import InputError
from dzhpc.method.first_order import SharedGradient
from dzhpc.method.seeds import generator
from dzhpc.tasks import fitting
from dzhpc.tasks.defense.classifier import Answers, ClassifierLoss, load_box, load_network, try_box
from dzhpc.tasks.defense.inference import Defense, as_pixels, build_denoiser, evaluation_noise, few
from dzhpc.tasks.defense.latent import QueriedLoss
from dzhpc.tasks.protocol import Cost, Task


class DefenseTask(Task):
    """See :class:`dzhpc.tasks.Task`. Raises InputError where data, denoiser, classifier and input do not fit each other.

    Fine-tuning (loss "classifier") leaves BatchNorm's running statistics as they are; pre-training (loss "mse") moves them.
    The noise of a training step is a function of (seed, step, position in the batch), the same for every query.
    """

    in_shards = True

    def __init__(self, config: Config, device: torch.device, data_set: data.DataSet):
        self.config = config.model_copy(deep=True)
        seed, task = config.run.seed, config.task
        self.data = as_pixels(data_set).to(device)
        self.data_bytes = data_set.bytes
        self.model, self._layout = build_denoiser(self.config, self.data, device)
        self.batches = data.Batches(self.data, config.data.batch_size, seed, config.data.augment)
        self.box = self._network = None
        if task.box:
            self.answers = Answers()
            self.box = load_box(config, data_set, device)
            if self._first_order:
                self._network = load_network(config, data_set, device)
        self.loss = loss = ClassifierLoss(self.box, self.answers, self._network) if task.loss == "classifier" else mse
        self.latent = self._latent_loss() if config.zo.estimator == "latent" else None
        self.steps_per_epoch = self.batches.steps_per_epoch
        if config.zo.estimator in ("autograd", "latent"):  # the engine only serves scores
            self.shared = SharedGradient(self.model, seed, self._shared_batch)
            self.engine = make_engine("full", self.model, loss)
        else:
            self.engine = fitting.engine_of(config, self.model, loss, self.steps_per_epoch)
        if config.data.batch_size == config.data.shards:
            self._set_mode()
            sample = self._laid_out(self.data.normalise(self.data.train.images[:1]))
            fitting.take_one(self.config, self.model, sample, fitting.one_in_a_shard(config.data))
        self.evaluation_parts = -(-len(self.data.test) // config.eval.batch_size)
        self.cost = self._cost()

    @property
    def _first_order(self) -> bool:
        """Whether (A2) is differentiated through a white-box copy of the classifier."""
        return self.config.task.loss == "classifier" and first_order(self.config)

    def _cost(self) -> Cost:
        batch, tests = self.config.data.batch_size, len(self.data.test)
        if self.config.task.loss == "mse":
            return Cost(evaluation=tests if self.box else 0)
        bind = batch * (1 if self.config.zo.estimator == "autograd" else 2)  # f(x), and at the base f(D(x + delta))
        bind += batch * (self._code_size() if self.latent else 0)
        return Cost(bind, batch, 2 * tests, self.config.task.box)

    @classmethod
    def read(cls, config: Config) -> data.DataSet:
        return data.load(config.data, config.run.seed)

    def examples(self) -> dict[str, Tensor]:
        network = self.box.network if self.box else None
        weights = {} if network is None else network.state_dict()
        return self.data.tensors() | {f"classifier/{name}": t for name, t in weights.items() if t.ndim}

    def bind(self, step: int, shard: int = 0) -> float:
        return self._bind(*self.batch(step), shard)

    def bind_for_scores(self, number: int, shard: int | None = None) -> float:
        clean, _ = self.batches.balanced(number)
        return self._bind(clean, self._noisy(clean, "score-noise", number), shard)

    def _bind(self, clean: Tensor, noisy: Tensor, shard: int | None) -> float:
        self._set_mode()
        part = data.shard(shard, self.config.data.shards, len(clean))
        return self.engine.bind(self._laid_out(noisy[part]), self.targets(clean[part]))

    def _shared_batch(self, step: int) -> tuple[int, Callable[[slice], Tensor]]:
        """What :class:`dzhpc.method.first_order.SharedGradient` asks for."""
        self._set_mode()
        clean, noisy = self.batch(step)

        def loss(positions: slice) -> Tensor:
            if self.latent:
                return self.latent(self.model.encode(noisy[positions]), self.targets(clean[positions]))
            return self.loss(self.model(noisy[positions]), self.targets(clean[positions]))

        return len(clean), loss

    @torch.no_grad()
    def evaluate(self, parts: Sequence[int], step: int) -> np.ndarray:
        self.model.eval()
        defense = Defense(self.config, self.data, self.model, self.box, self._layout)
        rows, size = np.zeros((len(parts), 3)), self.config.eval.batch_size
        for k, part in enumerate(parts):
            numbers = range(part * size, min((part + 1) * size, len(self.data.test)))
            images = self.data.normalise(self.data.test.images[numbers.start : numbers.stop])
            labels = self.data.test.labels[numbers.start : numbers.stop]
            denoised = defense.denoise(images + evaluation_noise(images, numbers, self.config))
            correct, loss = np.nan, ((denoised - images).double() ** 2).mean((1, 2, 3)).sum()
            if self.box is not None:
                answers = self.box(denoised)
                correct = int((answers.argmax(1) == labels).sum())
                if self.config.task.loss == "classifier":
                    loss = self.answers.cross_entropy(answers, self.targets(images)).sum()
            rows[k] = float(loss), correct, len(labels)
        return rows

    def try_box(self) -> None:
        try_box(self.box, self.config.task, few(self.data))

    def _latent_loss(self) -> QueriedLoss:
        if not hasattr(self.model, "encode") or not hasattr(self.model, "decode"):
            raise InputError(f'zo.estimator = "latent": model {self.config.model.name} has no encode and decode; use ae-ds')
        self._freeze_decoder()
        losses = lambda images, targets: self.answers.cross_entropy(self.box(images.clamp(0, 1)), targets)  # noqa: E731
        return QueriedLoss(self.model.decode, losses, self.config.zo.mu)

    def _freeze_decoder(self) -> None:
        """Queries of the code give no gradient of what lies behind it: the optimiser's weight decay alone would move that."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.enable_grad():
            code = self._code()
        if not code.requires_grad:
            raise InputError('zo.estimator = "latent": model.trainable leaves nothing to train in front of the code')
        for p, gradient in zip(parameters, torch.autograd.grad(code.sum(), parameters, allow_unused=True), strict=True):
            p.requires_grad_(gradient is not None)

    @torch.no_grad()
    def _code_size(self) -> int:
        return self._code().numel()

    def _code(self) -> Tensor:
        """Of an image."""
        self.model.eval()  # no running statistics move
        return self.model.encode(self._laid_out(self.data.normalise(self.data.train.images[:1])))

    def _set_mode(self) -> None:
        self.model.train(self.config.task.loss == "mse")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(x, x + delta) of a step."""
        clean, _ = self.batches.batch(step)
        return clean, self._noisy(clean, "noise", step)

    def _noisy(self, clean: Tensor, purpose: str, number: int) -> Tensor:
        noise = torch.randn(clean.shape, generator=generator(self.config.run.seed, purpose, number))
        return self._laid_out(clean + self.config.task.sigma * noise.to(clean.device))

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self._layout)

    @torch.no_grad()
    def targets(self, clean: Tensor) -> Tensor:
        """f(x) as probabilities [B, K], or x itself for pre-training."""
        if self.config.task.loss == "mse":
            return clean
        return self.answers.probabilities(self.box(clean.contiguous()))
