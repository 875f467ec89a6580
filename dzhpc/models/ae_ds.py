"""ZO-AE-DS (Zhang et al., ICLR 2022): an autoencoder behind the denoiser, so that few numbers have to be perturbed.

The decoder joins the black box, the encoder the denoiser: the code z = Enc(D(x + delta)) of, say, 192 numbers is perturbed one
coordinate at a time, and the gradient with respect to z continues into encoder and denoiser by the chain rule.
"""

from torch import Tensor, nn

from dzhpc.models.dncnn import DnCNN


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
