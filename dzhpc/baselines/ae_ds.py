"""ZO-AE-DS (Zhang et al., ICLR 2022): an autoencoder behind the denoiser, so that few numbers have to be perturbed.

The decoder joins the black box, the encoder the denoiser: the code z = Enc(D(x + delta)) of, say, 192 numbers is perturbed one
coordinate at a time, and the gradient with respect to z continues into encoder and denoiser by the chain rule.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dzhpc.models.dncnn import DnCNN

AT_ONCE = 8  # coordinates of the code in one call


class DenoisedAutoencoder(nn.Module):
    """Images [B, channels, H, W] -> images: Dec(Enc(D(x))), D a DnCNN; H and W divisible by 8.

    latent: numbers in a code, a multiple of H W / 64, H = W = image_size. Raises ValueError if it is not.
    """

    def __init__(
        self, latent: int = 192, image_size: int = 32, depth: int = 20, width: int = 64, channels: int = 3, hidden: int = 64
    ):
        super().__init__()
        places = (image_size // 8) ** 2
        if image_size % 8 or latent % places:
            raise ValueError(
                f"latent = {latent}, image_size = {image_size}: expected a multiple of 8, and of {places} for latent"
            )
        self.denoiser = DnCNN(depth, width, channels)
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential()
        for k, (a, b) in enumerate([(channels, hidden), (hidden, hidden), (hidden, latent // places)]):
            self.encoder.extend([nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()][: 2 if k < 2 else 1])
        for k, (a, b) in enumerate([(latent // places, hidden), (hidden, hidden), (hidden, channels)]):
            self.decoder.extend([nn.ConvTranspose2d(a, b, 4, 2, 1), nn.ReLU()][: 2 if k < 2 else 1])

    def encode(self, x: Tensor) -> Tensor:
        """The code of the denoised images."""
        return self.encoder(self.denoiser(x))

    def decode(self, code: Tensor) -> Tensor:
        """Images of codes."""
        return self.decoder(code)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class QueriedLoss:
    """The mean of ``losses(decode(z))``, known by queries alone, as a value that autograd can continue from.

    losses: (images [N, ...], targets [N, ...]) -> [N], not differentiated. Each sample has its own difference, so that one query
    for each coordinate of the code and sample is enough: dL_i/dz_ik = [l_i(z_i + mu e_k) - l_i(z_i)] / mu.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], losses: Callable[[Tensor, Tensor], Tensor], mu: float):
        self._decode, self._losses, self._mu = decode, losses, mu

    def __call__(self, code: Tensor, targets: Tensor) -> Tensor:
        """code [B, ...], targets [B, ...] -> scalar float64, with the gradient by CGE behind it."""
        base, slopes = self._slopes(code.detach(), targets)
        return _Known.apply(code, base.mean(), slopes / len(code))

    @torch.no_grad()
    def _slopes(self, code: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        base, flat = self._losses(self._decode(code), targets), code.flatten(1)
        columns = []
        for part in torch.eye(flat.shape[1], dtype=code.dtype, device=code.device).split(AT_ONCE):
            moved = (flat + self._mu * part[:, None]).reshape(-1, *code.shape[1:])
            losses = self._losses(self._decode(moved), targets.repeat(len(part), *[1] * (targets.ndim - 1)))
            columns.append((losses.view(len(part), -1) - base) / self._mu)
        return base, torch.cat(columns).T.reshape(code.shape)


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(context, code: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        context.save_for_backward(gradient.to(code.dtype))
        return value.clone()

    @staticmethod
    def backward(context, outer: Tensor):
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None
