"""The latent classifier: residual blocks on a VAE's latents, then an average over positions and a linear layer.

`train_latent_classifier.py` trains it, and `LatentPerceptualLoss` can compare its features: the network is an object
of `lpl_utils.FeatureStages`. Its stages have names: "block 1", "block 2", … for the residual stages, "pooled" for the
average over positions. The linear layer after "pooled" is the head that the loss does without.

Shapes: B samples, C latent channels, h w of a latent, K classes, D width of the last stage.
"""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional

from lpl_finetuning.base_model import read_object
from lpl_finetuning.errors import require
from lpl_utils import LatentSpace

GROUP = 8  # channels of a group of a group norm; widths are multiples of it


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))))))), with norms first; a stride halves height and width.

    The norms are group norms: an image's features do not depend on the batch, nor on train or eval mode, and a running
    average of the weights needs no running statistics.
    """

    def __init__(self, width_in, width, stride, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(width_in // GROUP, width_in), nn.GroupNorm(width // GROUP, width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.skip = nn.Conv2d(width_in, width, 1) if width != width_in else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # the block starts as its shortcut

    def forward(self, x):
        """(B, width, H / stride, W / stride) from (B, width_in, H, W)."""
        residual = self.conv1(functional.silu(self.norm1(x)))
        residual = self.conv2(self.dropout(functional.silu(self.norm2(residual))))
        return self.skip(self.pool(x)) + residual


class LatentClassifier(ModelMixin, ConfigMixin):
    """Residual stages, average over positions, linear layer: (B, K) logits from latents in model space (B, C, h, w).

    The first stage has the latents' size, each further stage half of the size before. The configuration holds what a
    user of the features must know: classes, latent space, autoencoder.

    Args:
        classes: names of the classes, in the order of the logits.
        latent_channels: C.
        block_widths: channels of each residual stage, multiples of 8.
        blocks_per_stage: residual blocks of a stage.
        dropout: share of the activations dropped in a block and before the linear layer.
        scaling_factor, shift_factor: of the autoencoder; model space is (z - shift_factor) * scaling_factor.
        pixels_per_latent: pixels of the image on a side of one latent.
        resolution: side in px of the squares that it was trained on, or had the area of; None where nobody said.
        vae, vae_fingerprint: name and fingerprint (`base_model.weights_fingerprint`) of the autoencoder.
        vae_encoder_sketch: what tells its latents from others', `encoder_sketch`; None where its files can't be read.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes positional arguments for defaults, and drops them from copies
        classes: tuple[str, ...],
        latent_channels: int = 4,
        block_widths: tuple[int, ...] = (64, 128, 256),
        blocks_per_stage: int = 2,
        dropout: float = 0.1,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        pixels_per_latent: int = 8,
        resolution: int | None = None,
        vae: str | None = None,
        vae_fingerprint: str | None = None,
        vae_encoder_sketch: tuple[tuple[float, float, float], ...] | None = None,
    ):
        super().__init__()
        self.stem = nn.Conv2d(latent_channels, block_widths[0], 3, padding=1)
        stages, width_in = [], block_widths[0]
        for number, width in enumerate(block_widths):
            blocks = []
            for block in range(blocks_per_stage):
                blocks.append(ResidualBlock(width_in, width, 2 if number and not block else 1, dropout))
                width_in = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.GroupNorm(width_in // GROUP, width_in)
        self.last_dropout = nn.Dropout(dropout)  # "dropout" is the configuration's
        self.head = nn.Linear(width_in, len(classes))

    # What `lpl_utils.FeatureStages` asks for

    @property
    def names(self):
        """One name per stage."""
        return (*(f"block {number + 1}" for number in range(len(self.stages))), "pooled")

    @property
    def upscaling(self):
        """Pixels of the image per latent, in each direction."""
        return self.config.pixels_per_latent

    @property
    def input_space(self):
        """Model space, in which the denoisers of the family work too."""
        return LatentSpace()

    def __len__(self):
        return len(self.stages) + 1

    def run(self, index, x):
        """The features of stage `index`: (B, D_i, H, W), or (B, D) of "pooled".

        Args:
            x: latents in model space for stage 0, else the output of the stage before.
        """
        if index == len(self.stages):
            return functional.silu(self.norm(x)).mean(dim=(2, 3))
        return self.stages[index](self.stem(x) if index == 0 else x)

    # The classifier

    def forward(self, latents):
        """Logits (B, K) of latents in model space (B, C, h, w)."""
        x = latents
        for index in range(len(self)):
            x = self.run(index, x)
        return self.head(self.last_dropout(x))


def load_latent_classifier(folder, dtype=torch.float32, device="cpu"):
    """The `LatentClassifier` that a run saved in a folder, frozen and in eval mode.

    Raises:
        UserError: the folder has no latent classifier.
    """
    config, advice = Path(folder) / "config.json", "name the output folder of train_latent_classifier.py"
    require(config.is_file(), f"{folder}: there is no config.json; {advice}")
    kind = read_object(config).get("_class_name")
    require(kind == LatentClassifier.__name__, f"{config} is of a {kind}; {advice}")
    network = LatentClassifier.from_pretrained(folder, use_safetensors=True, dtype=dtype)
    return network.requires_grad_(False).eval().to(device)
