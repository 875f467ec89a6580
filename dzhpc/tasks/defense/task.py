"""A denoiser D before a classifier f that may only be asked (Salman et al. 2020; DeepZero, Appendix G).

(A2): minimise E CE(f(D(x + delta)), f(x)) over D, delta ~ N(0, sigma^2), by queries; f(x) are the classifier's own soft answers.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dzhpc import config as configuration
from dzhpc import data
from dzhpc.config import Config
from dzhpc.engines import make_engine
from dzhpc.engines.blackbox import BlackBox
from dzhpc.engines.losses import mse
from dzhpc.errors import InputError
from dzhpc.files.runfolder import load_state
from dzhpc.method.first_order import Parts
from dzhpc.method.seeds import generator
from dzhpc.models import zoo as models
from dzhpc.tasks.defense.classifier import Answers, ClassifierLoss, load_box, load_network
from dzhpc.tasks.defense.latent import QueriedLoss

log = logging.getLogger("dzhpc")
AT_ONCE = 32  # images in one pass of the denoiser where no gradient is wanted: more would leave a core's cache
AT_ONCE_CUDA = 2048


class Defense:
    """Denoiser and black box of a run, for inference: see :func:`load_defense`."""

    def __init__(self, config: Config, data_set: data.DataSet, model: torch.nn.Module | None, box: BlackBox | None, bf16: bool):
        self.config, self.data, self.model, self.box, self._bf16 = config, data_set, model, box, bf16
        self.classes, self.seed = data_set.classes, config.run.seed

    @torch.no_grad()
    def denoise(self, noisy: Tensor) -> Tensor:
        """D(noisy), or noisy itself without denoiser, clamped to [0, 1]: float32 [N, C, H, W] -> same."""
        if self.model is not None:
            size = AT_ONCE_CUDA if noisy.is_cuda else AT_ONCE
            with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self._bf16):
                noisy = torch.cat([self.model(laid_out(part)).float() for part in noisy.split(size)])
        return noisy.clamp(0, 1).contiguous()

    def classify(self, noisy: Tensor) -> Tensor:
        """The class that f gives D(noisy): float32 [N, C, H, W] -> labels int64 [N]."""
        return self.box(self.denoise(noisy)).argmax(1)


def load_defense(source: str | Path, device: torch.device, without_denoiser: bool = False, precision: str = "fp32") -> Defense:
    """The defence of a run folder (newest valid checkpoint), of a checkpoint, or of an input file with its model.weights.

    without_denoiser: images go to the classifier as they are. precision: "bf16": the denoiser computes in bfloat16.
    The data set is whole, whatever data.train_limit and test_limit say. Raises InputError or CheckpointError.
    """
    path, state = Path(source), None
    if path.suffix == ".toml":
        config = configuration.load(path)
    else:
        file, state = load_state(path)
        config = models.config_of(state, file)
        config.model.weights = None
    if config.task.kind != "defense":
        raise InputError(f'{path}: task.kind = "{config.task.kind}", expected "defense"')
    config.data.train_limit = config.data.test_limit = None
    data_set = data.load(config.data, config.run.seed)
    model = None
    if not without_denoiser:
        models.fill_in(config.model, channels=data_set.train.images.shape[1], image_size=data_set.train.images.shape[-1])
        model = models.build(config.model, config.run.seed).to(device, memory_format=torch.channels_last).eval()
        if state is not None:
            models.assign(model, state.params, state.buffers)
    box = load_box(config, data_set, device) if config.task.classifier else None
    return Defense(config, as_pixels(data_set).to(device), model, box, precision == "bf16")


def as_pixels(data_set: data.DataSet) -> data.DataSet:
    """The same data set, its images in [0, 1] once ``normalise`` has made them float32.

    Raises InputError for floating-point images outside [0, 1]: neither noise nor classifier would fit them.
    """
    images = data_set.train.images
    if images.ndim != 4:
        raise InputError(f"the data set has images {list(images.shape)}; a denoiser takes [N, C, H, W]")
    if images.is_floating_point() and (images.min() < 0 or images.max() > 1):
        low, high = float(images.min()), float(images.max())
        raise InputError(f"the data set has images from {low:g} to {high:g}; a defence needs them in [0, 1], or uint8")
    zero = torch.zeros_like(data_set.mean)
    return data.DataSet(data_set.train, data_set.test, zero, zero + 1, data_set.classes)


def laid_out(images: Tensor) -> Tensor:
    """Channels-last, what convolutions like best."""
    return images.contiguous(memory_format=torch.channels_last)


class DefenseTask:
    """See :class:`dzhpc.tasks.Task`. Raises InputError where data, denoiser, classifier and input do not fit each other.

    Fine-tuning (loss "classifier") leaves BatchNorm's running statistics as they are; pre-training (loss "mse") moves them.
    The noise of a training step is a function of (seed, step, position in the batch), the same for every query.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config = config.model_copy(deep=True)
        seed, task = config.run.seed, config.task
        data_set = data.load(config.data, seed)
        self.data = as_pixels(data_set).to(device)
        models.fill_in(self.config.model, channels=data_set.train.images.shape[1], image_size=data_set.train.images.shape[-1])
        self.model = self._build(self.config, device)
        self.batches = data.Batches(self.data, config.data.batch_size, seed, config.data.augment)
        self._box = self._network = None
        if task.classifier:
            self._answers = Answers(task.classifier, len(data_set.classes))
            self._box = load_box(config, data_set, device)
            if self._first_order:
                self._network = load_network(config, data_set, device)
        loss = ClassifierLoss(self._box, self._answers, self._network) if task.loss == "classifier" else mse
        self.loss = loss
        self.parts = Parts(self.model, seed) if config.zo.estimator in ("autograd", "latent") else None
        self.latent = self._latent_loss() if config.zo.estimator == "latent" else None
        if self.parts:  # the engine only serves scores
            self.engine = make_engine("full", self.model, loss)
        else:
            self.engine = make_engine(config.zo.engine, self.model, loss, config.zo.precision, config.zo.memory_mb)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.evaluation_parts = -(-len(self.data.test) // config.eval.batch_size)
        self.query_cost = self.bind_cost = 1
        self.evaluation_queries = len(self.data.test) if self._box else 0
        self.box_key = ""
        if task.loss == "classifier":
            self.query_cost = config.data.batch_size
            self.bind_cost = self.query_cost * (1 if self._first_order else 2)  # f(x), and at the base f(D(x + delta))
            self.bind_cost += self.query_cost * (self._code_size() if self.latent else 0)
            self.evaluation_queries *= 2
            self.box_key = f"task.classifier = {task.classifier}"

    @property
    def _first_order(self) -> bool:
        """Whether (A2) is differentiated through a white-box copy of the classifier."""
        zo, sparsity = self.config.zo, self.config.sparsity
        scores = sparsity.scores == "fo-grasp" and sparsity.ratio > 0
        return self.config.task.loss == "classifier" and (zo.estimator == "autograd" or scores)

    def bind(self, step: int) -> float:
        self._set_mode()
        clean, noisy = self._batch(step)
        return self.engine.bind(noisy, self._targets(clean))

    def bind_for_scores(self, number: int) -> float:
        self._set_mode()
        clean, _ = self.batches.balanced(number)
        return self.engine.bind(self._noisy(clean, "score-noise", number), self._targets(clean))

    def gradient_rows(self, mine: range, step: int) -> np.ndarray:
        """What :meth:`dzhpc.method.first_order.Parts.rows` says, for the step's batch."""
        self._set_mode()
        clean, noisy = self._batch(step)

        def loss(positions: slice) -> Tensor:
            if self.latent:
                return self.latent(self.model.encode(noisy[positions]), self._targets(clean[positions]))
            return self.loss(self.model(noisy[positions]), self._targets(clean[positions]))

        return self.parts.rows(mine, len(clean), step, loss)

    @torch.no_grad()
    def evaluate(self, parts: range, step: int) -> np.ndarray:
        self.model.eval()
        defense = Defense(self.config, self.data, self.model, self._box, False)
        rows, size = np.zeros((len(parts), 3)), self.config.eval.batch_size
        for k, part in enumerate(parts):
            numbers = range(part * size, min((part + 1) * size, len(self.data.test)))
            images = self.data.normalise(self.data.test.images[numbers.start : numbers.stop])
            labels = self.data.test.labels[numbers.start : numbers.stop]
            denoised = defense.denoise(images + evaluation_noise(images, numbers, self.config))
            correct, loss = np.nan, ((denoised - images).double() ** 2).mean((1, 2, 3)).sum()
            if self._box is not None:
                answers = self._box(denoised)
                correct = int((answers.argmax(1) == labels).sum())
                if self.config.task.loss == "classifier":
                    loss = self._answers.cross_entropy(answers, self._targets(images)).sum()
            rows[k] = float(loss), correct, len(labels)
        return rows

    def _build(self, config: Config, device: torch.device) -> torch.nn.Module:
        """The denoiser, tried on two images."""
        model = models.build(config.model, config.run.seed).to(device, memory_format=torch.channels_last)
        sample = self.data.normalise(self.data.train.images[:2])
        try:
            with torch.no_grad():
                found = list(model.eval()(laid_out(sample)).shape)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            found = " ".join(str(error).split())
        if found != list(sample.shape):
            raise InputError(
                f"model {config.model.name} gives {found} for images {list(sample.shape)}; a denoiser keeps the shape"
            )
        return model

    def _latent_loss(self) -> QueriedLoss:
        if not hasattr(self.model, "encode") or not hasattr(self.model, "decode"):
            raise InputError(f'zo.estimator = "latent": model {self.config.model.name} has no encode and decode; use ae-ds')
        losses = lambda images, targets: self._answers.cross_entropy(self._box(images.clamp(0, 1)), targets)  # noqa: E731
        return QueriedLoss(self.model.decode, losses, self.config.zo.mu)

    @torch.no_grad()
    def _code_size(self) -> int:
        return self.model.encode(laid_out(self.data.normalise(self.data.train.images[:1]))).numel()

    def _set_mode(self) -> None:
        self.model.train(self.config.task.loss == "mse")

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(x, x + delta) of a step."""
        clean, _ = self.batches.batch(step)
        return clean, self._noisy(clean, "noise", step)

    def _noisy(self, clean: Tensor, purpose: str, number: int) -> Tensor:
        noise = torch.randn(clean.shape, generator=generator(self.config.run.seed, purpose, number))
        return laid_out(clean + self.config.task.sigma * noise.to(clean.device))

    @torch.no_grad()
    def _targets(self, clean: Tensor) -> Tensor:
        """f(x) as probabilities [B, K], or x itself for pre-training."""
        if self.config.task.loss == "mse":
            return clean
        return self._answers.probabilities(self._box(clean.contiguous()))


def evaluation_noise(images: Tensor, numbers: range, config: Config) -> Tensor:
    """sigma times standard normal noise for each image, a function of (seed, its number in the test set)."""
    seed, shape = config.run.seed, images.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator(seed, "eval-noise", k)) for k in numbers])
    return config.task.sigma * noise.to(images.device)
