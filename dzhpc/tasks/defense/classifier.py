"""The classifier that a defence stands in front of: how it is loaded, asked, and how its answers are compared (A2)."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dzhpc import data
from dzhpc.config import Config, Model, is_function, path_of
from dzhpc.config.tasks import DefenseKeys
from dzhpc.engines.batch import changed
from dzhpc.engines.blackbox import BlackBox, BlackBoxLoss, check_company
from dzhpc.engines.curvature import CrossEntropy, Curvature
from dzhpc.errors import InputError, NumericalError
from dzhpc.files.checkpoint import config_of
from dzhpc.files.runfolder import load_state
from dzhpc.models import zoo
from dzhpc.models.frozen import Frozen
from dzhpc.models.weights import is_ours
from dzhpc.tasks.command import Program, function_of

log = logging.getLogger("dzhpc")
SMALLEST = 1e-12  # a probability that a quantised classifier calls 0
ROUNDING = 0.02  # of the answers' spread: what company may change, since half precision rounds, too


class Classifier(BlackBox):
    """A black box whose answers are a logit or probability for each class [N, K]; -inf is the logit of an excluded one.

    network: of a classifier from a file. Raises as BlackBox does; InputError for answers that are not [N, classes].
    """

    def __init__(self, function: Callable, classes: int, limit: int, numpy: bool, retries: int, name: str):
        super().__init__(function, limit, numpy, retries, name)
        self._classes, self.network = classes, function if isinstance(function, Frozen) else None

    def check(self, answers: Tensor, count: int) -> None:
        """Raise InputError or NumericalError for answers to ``count`` images that cannot be right."""
        if list(answers.shape) != [count, self._classes]:
            raise InputError(
                f"{self.name}: gave {list(answers.shape)} for {count} images; expected [{count}, {self._classes}], a logit or "
                "probability for each class of the data set"
            )
        if not (torch.isfinite(answers) | torch.isneginf(answers)).all() or torch.isneginf(answers).all(1).any():
            raise NumericalError(f"{self.name} gave answers that are not finite")


def load_box(config: Config, data_set: data.DataSet, device: torch.device) -> BlackBox:
    """``task.classifier``, or ``task.command``, as a function that can only be asked: images [N, C, H, W] in [0, 1] -> [N, K].

    Raises InputError for a function, a program or a file that cannot be used.
    """
    task, classes, name = config.task, len(data_set.classes), config.task.box
    if task.command:
        shape = data_set.train.images.shape[1:]
        program = Program(task, {"image": shape}, ["image"])
        ask = lambda images: program.arrays("image", images, (classes,))  # noqa: E731
        return Classifier(ask, classes, program.limit, True, task.retries, name)
    if is_function(task.classifier):
        function = function_of(task, task.classifier, "task.classifier", config.run.threads)
        if not callable(function):
            raise InputError(f"{name}: is no function of images [N, C, H, W]")
        return Classifier(function, classes, task.batch_limit, True, task.retries, name)
    return Classifier(load_network(config, data_set, device), classes, task.batch_limit, False, 0, name)


def load_network(config: Config, data_set: data.DataSet, device: torch.device) -> Frozen:
    """The network of ``task.classifier``, a file, normalisation included. Raises InputError for what does not fit."""
    task, path, file = config.task, config.task.classifier, path_of(config, "task.classifier")
    mean, std = data_set.mean, data_set.std
    if _is_ours(file, path):
        file, state = load_state(file)
        own, model = config_of(state, file), zoo.load_model(file)
        given = (own.data.mean or task.classifier_mean) and (own.data.std or task.classifier_std)
        if not given and (own.data.name, own.data.path) != (config.data.name, config.data.path):
            log.warning(
                "task.classifier = %s: was trained on data.name = %s, and is given pixels by the mean and std of %s; set "
                "task.classifier_mean and task.classifier_std", path, own.data.name, config.data.name,
            )  # fmt: skip
        mean, std = own.data.mean or mean, own.data.std or std
    else:
        if not task.classifier_model:
            raise InputError(f"task.classifier = {path}: a torch file knows no network; name it in task.classifier_model")
        section = Model(name=task.classifier_model, weights=path)
        try:
            zoo.fill_in(section, classes=len(data_set.classes), in_channels=data_set.train.images.shape[1])
            model = zoo.build(section, 0)
        except InputError as error:
            text = str(error).replace("model.weights", "task.classifier").replace("model.name", "task.classifier_model")
            raise InputError(text) from None
    mean, std = (torch.as_tensor(v, dtype=torch.float32) for v in (task.classifier_mean or mean, task.classifier_std or std))
    shape = data_set.train.images.shape[1:]
    channels = shape[0]
    if len(mean) != channels or len(std) != channels:
        raise InputError(f"task.classifier_mean, classifier_std: expected {channels} numbers each, one a channel")
    return Frozen(model, mean.cpu(), std.cpu(), shape).to(device)


def _is_ours(file: Path, name: str) -> bool:
    try:
        return is_ours(file)
    except OSError as error:
        raise InputError(f"task.classifier = {name}: cannot be read ({error.strerror or error})") from None


def try_box(box: BlackBox | None, task: DefenseKeys, images: Tensor) -> None:
    """See :func:`dzhpc.engines.blackbox.check_company`; a program that gets each image by itself knows no company."""
    if box is not None and (task.batched or not task.command):
        check_company(box, images, most=ROUNDING)


class Answers:
    """Makes probabilities of a classifier's answers [N, K]; the first ones show whether they are that already, or logits.

    A quantised classifier's probabilities add up to 1 only roughly, so they are divided by their sum.
    """

    def __init__(self):
        self.are_logits: bool | None = None  # None before the first answers

    def log_probabilities(self, answers: Tensor) -> Tensor:
        """log p [N, K] in float64."""
        answers = answers.double()
        if self.are_logits is None:
            self.are_logits = bool((answers < 0).any()) or bool(((answers.sum(1) - 1).abs() > 0.1).any())
            log.info("task.classifier gives %s", "logits" if self.are_logits else "probabilities")
            if self.are_logits and answers.min() >= 0 and answers.max() <= 1:
                log.warning(
                    "task.classifier: its answers lie between 0 and 1 and do not add up to 1, but to %.3g: they are taken for "
                    "logits; if they are probabilities, give those of all classes",
                    float(answers.sum(1)[0]),
                )
        if self.are_logits:
            return F.log_softmax(answers, 1)
        p = answers.clamp_min(SMALLEST)
        return (p / p.sum(1, keepdim=True)).log()

    def probabilities(self, answers: Tensor) -> Tensor:
        """p [N, K] in float64."""
        return self.log_probabilities(answers).exp()

    def cross_entropy(self, answers: Tensor, targets: Tensor) -> Tensor:
        """-sum_k t_k log p_k of answers [N, K] and probabilities t [N, K] -> [N] float64; where t_k = 0, log p_k may be -inf."""
        return -torch.where(targets > 0, targets * self.log_probabilities(answers), 0).sum(1)


class AnsweredCrossEntropy(CrossEntropy):
    """Cross entropy of answers [N, K], logits or probabilities, against probabilities [N, K]."""

    def __init__(self, answers: Answers, base: Tensor, targets: Tensor, dtype: torch.dtype):
        self._answers, self._base, self._log_p, self._dtype = answers, base.double(), answers.log_probabilities(base), dtype
        super().__init__(self._log_p, targets, dtype)

    def slopes(self, changes: Tensor) -> Tensor:
        return super().slopes(self._logits(changes))

    def roots(self, changes: Tensor) -> Tensor:
        return super().roots(self._logits(changes))

    def _logits(self, changes: Tensor) -> Tensor:
        """Changes of log p [P, N, K] from those of the answers."""
        moved = self._answers.log_probabilities((self._base + changes).flatten(0, 1)).view(changes.shape)
        return changed(moved, self._log_p).to(self._dtype)


class ClassifierLoss(BlackBoxLoss):
    """mean CE(f(clamp(outputs)), targets): the last factor of (A2); images leave [0, 1] no further than the denoiser.

    Under autograd the network itself is differentiated, if there is one (``network``); otherwise ``box`` is asked.
    """

    def __init__(self, box: BlackBox, answers: Answers, network: Frozen | None = None):
        super().__init__(lambda images: box(images.clamp(0, 1)), answers.cross_entropy)
        self._answers, self._network = answers, network

    def curvature(self, answers: Tensor, targets: Tensor, dtype: torch.dtype) -> Curvature:
        """That of (A2) as a function of answers [N, K], by way of their log-probabilities."""
        return AnsweredCrossEntropy(self._answers, answers, targets, dtype)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of outputs [B, C, H, W] against probabilities [B, K] -> scalar float64."""
        if self._network is not None and torch.is_grad_enabled():
            return self._answers.cross_entropy(self._network(outputs.clamp(0, 1)), targets).mean()
        return super().__call__(outputs, targets)
