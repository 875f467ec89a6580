"""Denoiser and black box of a run, for inference; and the pixels and the noise that it is made for."""

from pathlib import Path

import torch
from torch import Tensor

from dzhpc import config as configuration
from dzhpc import data
from dzhpc.config import Config
from dzhpc.config.paths import shown
from dzhpc.engines.blackbox import BlackBox, check_company
from dzhpc.errors import InputError
from dzhpc.files.checkpoint import State
from dzhpc.files.runfolder import load_state
from dzhpc.method.seeds import generator
from dzhpc.models import zoo
from dzhpc.tasks import fitting
from dzhpc.tasks.defense.classifier import ROUNDING, load_box, try_box

AT_ONCE = 32  # images in one pass of the denoiser where no gradient is wanted: more would leave a core's cache
AT_ONCE_CUDA = 2048


class Defense:
    """Denoiser and black box of a run, for inference: see :func:`load_defense`.

    layout: in which the denoiser takes images. bf16: it computes in bfloat16.
    """

    def __init__(
        self,
        config: Config,
        data_set: data.DataSet,
        model: torch.nn.Module | None,
        box: BlackBox | None,
        layout: torch.memory_format,
        bf16: bool = False,
    ):
        self.config, self.data, self.model, self.box, self._layout, self._bf16 = config, data_set, model, box, layout, bf16
        self.classes, self.seed = data_set.classes, config.run.seed

    @torch.no_grad()
    def denoise(self, noisy: Tensor) -> Tensor:
        """D(noisy), or noisy itself without denoiser, clamped to [0, 1]: float32 [N, C, H, W] -> same."""
        if self.model is not None:
            size = AT_ONCE_CUDA if noisy.is_cuda else AT_ONCE
            with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self._bf16):
                parts = (part.contiguous(memory_format=self._layout) for part in noisy.split(size))
                noisy = torch.cat([self.model(part).float() for part in parts])
        return noisy.clamp(0, 1).contiguous()

    def try_out(self) -> None:
        """Raise InputError where a denoised image, or an answer, depends on what else is in a call: samples are not independent.

        Asked are a few images; that is not counted.
        """
        images = few(self.data)
        if self.model is not None:
            denoiser = lambda x: self.model(x.contiguous(memory_format=self._layout))  # noqa: E731
            check_company(BlackBox(denoiser, name=f"model.name = {self.config.model.name}"), images, most=ROUNDING)
        try_box(self.box, self.config.task, images)

    def classify(self, noisy: Tensor) -> Tensor:
        """The class that f gives D(noisy): float32 [N, C, H, W] -> labels int64 [N]."""
        return self.box(self.denoise(noisy)).argmax(1)


def load_defense(source: str | Path, device: torch.device, without_denoiser: bool = False, precision: str = "fp32") -> Defense:
    """The defence of a run folder (newest valid checkpoint), of a checkpoint, or of an input file with its model.weights.

    without_denoiser: images go to the classifier as they are. precision: "bf16": the denoiser computes in bfloat16.
    The data set is whole, whatever data.train_limit and test_limit say. Raises InputError or CheckpointError.
    """
    return make_defense(*read_defense(source), device, without_denoiser, precision)


def read_defense(source: str | Path) -> tuple[Config, State | None, data.DataSet]:
    """(input, the state of a checkpoint, the data set) of a source, see :func:`load_defense`: all that is read from files."""
    path, state = Path(source), None
    if path.suffix == ".toml":
        config = configuration.load(path)
    else:
        file, state = load_state(path)
        config = zoo.config_of(state, file)
        config.model.weights = None
    if config.task.kind != "defense":
        raise InputError(f'{shown(path)}: task.kind = "{config.task.kind}", expected "defense"')
    config.data.train_limit = config.data.test_limit = None
    return config, state, data.load(config.data, config.run.seed)


def make_defense(
    config: Config, state: State | None, data_set: data.DataSet, device: torch.device, without_denoiser: bool, precision: str
) -> Defense:
    """The defence of what :func:`read_defense` gave."""
    pixels, model, layout = as_pixels(data_set).to(device), None, torch.channels_last
    if not without_denoiser:
        model, layout = build_denoiser(config, pixels, device)
        if state is not None:
            zoo.assign(model, state.params, state.buffers)
        model.eval()
    box = load_box(config, data_set, device) if config.task.box else None
    return Defense(config, pixels, model, box, layout, precision == "bf16")


def build_denoiser(config: Config, pixels: data.DataSet, device: torch.device) -> tuple[torch.nn.Module, torch.memory_format]:
    """The denoiser of ``config.model``, where sizes are filled in, and the layout in which it takes images.

    Raises InputError for a model that does not keep the shape of an image.
    """
    sample, name = pixels.normalise(pixels.train.images[:2]), config.model.name
    model = fitting.build(config, device, channels=sample.shape[1], image_size=sample.shape[-1])

    def trial(layout: torch.memory_format) -> torch.memory_format:
        inputs = sample.contiguous(memory_format=layout)
        fitting.try_out(model, inputs, list(sample.shape), "as a denoiser keeps the shape", name)
        return layout

    return model, fitting.lay_out(model, trial)


def as_pixels(data_set: data.DataSet) -> data.DataSet:
    """The same data set, its images in [0, 1] once ``normalise`` has made them float32.

    Raises InputError for floating-point images outside [0, 1]: neither noise nor classifier would fit them.
    """
    images = data_set.train.images
    if images.ndim != 4:
        raise InputError(f"the data set has images {list(images.shape)}; a denoiser takes [N, C, H, W]")
    if images.is_floating_point():
        ends = [(float(part.images.min()), float(part.images.max())) for part in (data_set.train, data_set.test)]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        if low < 0 or high > 1:
            raise InputError(f"the data set has images from {low:g} to {high:g}; a defence needs them in [0, 1], or uint8")
    zero = torch.zeros_like(data_set.mean)
    return data.DataSet(data_set.train, data_set.test, zero, zero + 1, data_set.classes)


def few(pixels: data.DataSet) -> Tensor:
    """Up to eight training images in [0, 1], spread over the set."""
    images = pixels.train.images
    return pixels.normalise(images[torch.arange(min(8, len(images))) * len(images) // min(8, len(images))]).contiguous()


def evaluation_noise(images: Tensor, numbers: range, config: Config) -> Tensor:
    """sigma times standard normal noise for each image, a function of (seed, its number in the test set)."""
    seed, shape = config.run.seed, images.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator(seed, "eval-noise", k)) for k in numbers])
    return config.task.sigma * noise.to(images.device)
