"""The latent perceptual loss (LPL): compares two latents by the features that a frozen network computes from them.

Source: Berrada et al., "Boosting Latent Diffusion with Perceptual Objectives", ICLR 2025. The network is the VAE's
decoder, as in the paper, or any other (`FeatureStages`). This file imports torch only; copy it into any trainer:

    lpl = LatentPerceptualLoss(vae, LPLConfig())                             # a frozen diffusers AutoencoderKL
    z0_pred = estimate_z0(model_pred, noisy_latents, alpha, sigma, "epsilon")
    gated = (timesteps < 200).nonzero().flatten()                            # timesteps on the CPU: nothing waits
    per_sample = lpl(z0_pred[gated], latents[gated]).per_sample
    loss = diffusion_loss + weight * per_sample.sum() / len(latents)         # divided by the whole batch size

Spaces of latents: `z_model` as the denoiser sees them (scaled), `z_vae` as the decoder sees them.
Shapes: B batch, C channels, H W height and width of a feature map, h w of a latent, L stages, b samples of a chunk.
Names: x features of the target z_0, xh features of the estimate.
Forward process: z_t = alpha * z_0 + sigma * eps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny

EPS = 1e-6  # added to every norm and standard deviation that something is divided by
NORM_TYPES = ("standard", "shared", "default", "batch", "target", "none")
OVER_POSITIONS = ("standard", "target", "batch")  # norm types with a deviation over positions: 0 over a single one
OVER_CHANNELS = ("shared", "default")  # norm types with a norm over channels
NORM_GRADIENTS = ("none", "half", "full")
LOSS_TYPES = ("mse", "l1")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
CHECKPOINTING = ("none", "stage")
NORM_BLOCK = 2**24  # elements of a group norm whose gradient is computed at a time


# ---------------------------------------------------------------------------------------------------------------------
# 1. The forward process: from a model output to an estimate of the clean latents


def estimate_z0(model_output, noisy_latents, alpha, sigma, prediction_type):
    """Returns the clean latents that a model output implies, in float32 (float64 for float64 noisy latents).

    Where alpha is 0 (the last step of a zero-terminal-SNR schedule), eps says nothing about z_0. The estimate from an
    epsilon prediction is 0 there and has no gradient. Source: Table 1 of the paper.

    Args:
        model_output: (B, C, h, w), the output of the denoiser.
        noisy_latents: (B, C, h, w), z_t = alpha * z_0 + sigma * eps, before any rounding or perturbation.
        alpha, sigma: (B,) signal and noise level; sqrt(abar), sqrt(1 - abar) under DDPM, 1 - sigma, sigma under flow.
        prediction_type: meaning of the output: "epsilon" (eps), "v_prediction" (alpha eps - sigma z_0), "sample"
            (z_0) or "flow" (eps - z_0, the velocity of rectified flow).
    """
    dtype = torch.promote_types(noisy_latents.dtype, torch.float32)
    out, z_t = model_output.to(dtype), noisy_latents.to(dtype)
    alpha, sigma = (_per_sample(level, z_t) for level in (alpha, sigma))
    if prediction_type == "epsilon":
        known = alpha > 0
        return torch.where(known, (z_t - sigma * out) / torch.where(known, alpha, 1), 0)
    if prediction_type == "v_prediction":
        return alpha * z_t - sigma * out
    if prediction_type == "sample":
        return out
    if prediction_type == "flow":
        return z_t - sigma * out
    raise ValueError(f"prediction_type is {prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")


def noise_to_signal(alpha, sigma):
    """Returns sigma / alpha, (B,); infinite where alpha is 0. SNR = 1 / noise_to_signal**2."""
    return sigma / alpha


def lpl_noise_scale(alpha, sigma):
    """Returns the weight of each sample under `lpl_scale`: alpha^2 / (alpha^2 + sigma^2), (B,), in 0..1."""
    return alpha**2 / (alpha**2 + sigma**2)


def _per_sample(values, like):
    """Reshapes (B,) values so that they multiply (B, C, h, w)."""
    values = torch.as_tensor(values, device=like.device).to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))


# ---------------------------------------------------------------------------------------------------------------------
# 2. The features: a frozen network as a chain of stages


@dataclass(frozen=True)
class LatentSpace:
    """A space of latents z, with z_model = (z - shift_factor) * scaling_factor; by default model space itself."""

    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @classmethod
    def of(cls, vae):
        """Returns VAE space: the latents that the VAE's encoder returns and its decoder takes."""
        return cls(vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0)

    def from_model(self, z_model):
        """Returns z = z_model / scaling_factor + shift_factor, in float32 or better."""
        z_model = z_model.to(torch.promote_types(z_model.dtype, torch.float32))
        return z_model / self.scaling_factor + self.shift_factor

    def to_model(self, z):
        """Returns z_model = (z - shift_factor) * scaling_factor, in float32 or better."""
        return (z.to(torch.promote_types(z.dtype, torch.float32)) - self.shift_factor) * self.scaling_factor


class FeatureStages(Protocol):
    """A frozen network as a chain of stages. The loss compares the output of every stage.

    Any object with these members will do; nothing has to be inherited. The network must be in eval mode and must not
    use gradient checkpointing of its own. Its parameters get no gradient, whether or not they require one.

    Attributes:
        names: one name per stage, for plots, plans and messages.
        upscaling: pixels of the image per pixel of the latent, in each direction: 8 for SDXL and SD3, 1 for a
            pixel-space model. The size of each stage's features relative to the image follows from it.
        input_space: space of stage 0's input; `LatentSpace()` for model space, `LatentSpace.of(vae)` for VAE space.
        dtype: the dtype of stage 0's input, in which the network runs.
    """

    names: Sequence[str]
    upscaling: float
    input_space: LatentSpace
    dtype: torch.dtype

    def __len__(self) -> int:
        """Returns the number of stages."""

    def run(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Returns the features of stage `index`, (B, C, H, W), or (B, C) without positions.

        x: latents in the input space for stage 0, else the output of the previous stage. Not to be changed in place.
        """


def first_input(stages, z_model):
    """Returns the input of stage 0, (B, C, h, w): latents in the stages' input space and dtype."""
    return stages.input_space.from_model(z_model).to(stages.dtype)


def stage_features(stages, z_model):
    """Yields the features of each stage for latents in model space, (B, C, h, w)."""
    x = first_input(stages, z_model)
    for index in range(len(stages)):
        x = stages.run(index, x)
        yield x


class IdentityStages:
    """A single stage, the latent itself: with it the loss is a distance of latents, the control of an experiment."""

    names = ("latent",)

    def __init__(self, upscaling=8, dtype=torch.float32, input_space=LatentSpace()):
        self.upscaling, self.dtype, self.input_space = upscaling, dtype, input_space

    def __len__(self):
        return 1

    def run(self, index, x):
        """Returns the latents."""
        return x


class DecoderStages:
    """The stages of a diffusers decoder: the computation of `vae.decode`, cut where features are compared.

    Stage 0 is `post_quant_conv` (if the VAE has one), `conv_in` and `mid_block`. Stage i is `up_blocks[i - 1]`. The
    optional last stage computes the picture. The VAE is held by reference and stays as it is.

    Args:
        vae: an autoencoder with a decoder like AutoencoderKL's.
        num_blocks: up blocks whose features are compared, 0 to 4 for SDXL and SD3; None for all.
        rgb: whether the decoded picture is the last stage.

    Raises:
        TypeError: the decoder is built otherwise; names its class.
        ValueError: the decoder has fewer up blocks than num_blocks.
    """

    def __init__(self, vae: AutoencoderKL | AsymmetricAutoencoderKL, num_blocks: int | None = None, rgb: bool = False):
        decoder = getattr(vae, "decoder", None)
        parts = ("conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
        missing = [part for part in parts if not hasattr(decoder, part)]
        video = not missing and any(isinstance(module, torch.nn.Conv3d) for module in decoder.modules())
        if missing or video or hasattr(vae, "quantize"):
            raise TypeError(
                f"LPL needs a decoder built like AutoencoderKL's ({', '.join(parts)}); "
                f"{type(vae).__name__} has a {type(decoder).__name__}"
                + (f" without {', '.join(missing)}" if missing else "")
                + ("; pass the autoencoder, not its decoder" if decoder is None and hasattr(vae, "up_blocks") else "")
                + ("; give TinyDecoderStages of it" if hasattr(decoder, "layers") else "")
            )
        there = len(decoder.up_blocks)
        num_blocks = there if num_blocks is None else num_blocks
        if not 0 <= num_blocks <= there:
            raise ValueError(f"num_blocks is {num_blocks}; this decoder has {there} up blocks")
        self.vae, self.decoder, self.num_blocks, self.rgb = vae, decoder, num_blocks, rgb

    @property
    def names(self):
        """One name per stage."""
        return decoder_stage_names(self.num_blocks, self.rgb)

    def __len__(self):
        return len(self.names)

    @property
    def dtype(self):
        """The dtype that the decoder runs in."""
        return self.decoder.conv_in.weight.dtype

    @property
    def upscaling(self):
        """Pixels of the image per pixel of the latent, in each direction; 8 for SDXL and SD3."""
        return 2 ** sum(bool(getattr(block, "upsamplers", None)) for block in self.decoder.up_blocks)

    @property
    def input_space(self):
        """VAE space."""
        return LatentSpace.of(self.vae)

    def to_vae_space(self, z_model):
        """Returns z_vae = z_model / scaling_factor + shift_factor, in the decoder's dtype."""
        return first_input(self, z_model)

    def to_model_space(self, z_vae):
        """Returns z_model = (z_vae - shift_factor) * scaling_factor, in float32 or better."""
        return self.input_space.to_model(z_vae)

    def run(self, index, x):
        """Returns the output of stage `index`, (B, C, H, W); x: `z_vae` for stage 0, else the previous output."""
        with _own_checkpointing_off(self.decoder):
            if index == 0:
                if getattr(self.vae, "post_quant_conv", None) is not None:
                    x = self.vae.post_quant_conv(x)
                return self.decoder.mid_block(self.decoder.conv_in(x))
            if index <= self.num_blocks:
                return self.decoder.up_blocks[index - 1](x)
            for block in self.decoder.up_blocks[self.num_blocks :]:
                x = block(x)
            return self.finish(x)

    def pieces(self, index):
        """Returns functions that compute stage `index` one after the other: `run` in smaller steps."""
        block = self.decoder.up_blocks[index - 1] if 0 < index <= self.num_blocks else None
        if type(block).__name__ != "UpDecoderBlock2D":
            return [functools.partial(self.run, index)]
        resnets = (
            ResnetPiece(resnet) if ResnetPiece.suits(resnet) else functools.partial(resnet, temb=None)
            for resnet in block.resnets
        )
        return [*resnets, *(block.upsamplers or ())]

    def finish(self, x):
        """Returns the picture (B, 3, H, W) from the last up block's output: norm, activation, last convolution."""
        return self.decoder.conv_out(self.decoder.conv_act(self.decoder.conv_norm_out(x)))


class ResnetPiece:
    """A frozen residual block of diffusers, x + conv(silu(norm(conv(silu(norm(x)))))), whose backward pass is lighter.

    It computes again all but the last convolution, since no gradient follows from that one's values.

    Args:
        block: a ResnetBlock2D that `suits`.
    """

    def __init__(self, block):
        self.block = block

    @staticmethod
    def suits(block):
        """Returns whether a block computes exactly that: no other scale, size, activation or padding, no dropout."""
        return (
            type(block).__name__ == "ResnetBlock2D"
            and block.output_scale_factor == 1
            and block.upsample is None
            and block.downsample is None
            and block.time_emb_proj is None
            and block.time_embedding_norm in ("default", "group")  # neither has an effect without a time embedding
            and type(block.nonlinearity) is torch.nn.SiLU
            and (block.dropout.p == 0 or not block.training)
            and type(block.norm1) is type(block.norm2) is torch.nn.GroupNorm
            and all(
                type(conv) is torch.nn.Conv2d
                and conv.stride == (1, 1)
                and (conv.padding_mode, type(conv.padding)) == ("zeros", tuple)
                for conv in (block.conv1, block.conv2, block.conv_shortcut)
                if conv is not None
            )
        )

    def __call__(self, x):
        """Returns the output of the block, (B, D, H, W) from (B, C, H, W)."""
        shortcut = self.block.conv_shortcut
        output = self.block.conv2(self._before_last(x))
        return output.add_(x if shortcut is None else shortcut(x))

    def _before_last(self, x):
        """Returns the input of the last convolution, (B, D, H, W)."""
        return norm_silu(self.block.norm2, self.block.conv1(norm_silu(self.block.norm1, x)))

    def input_gradient(self, x, held):
        """Returns d loss / d x.

        Args:
            x: (B, C, H, W) the input, a leaf.
            held: list with d loss / d output, (B, D, H, W), which is taken out: the list shall be its only holder.
        """
        with torch.enable_grad(), InputGradientOnly():
            end = _Held.apply(self._before_last(x.requires_grad_()), through := [])
        gradient = held.pop()
        through.append(_conv_gradient(gradient, self.block.conv2))
        through[0].held_by_norm = True  # see `_FrozenConv2d`
        if self.block.conv_shortcut is not None:
            gradient = _conv_gradient(gradient, self.block.conv_shortcut)
        return torch.autograd.grad(end, x)[0].add_(gradient)


def decoder_stage_names(num_blocks, rgb=False):
    """Returns the names of a decoder's stages, as many as `DecoderStages` with these arguments has."""
    return ("middle block", *(f"up block {number}" for number in range(1, num_blocks + 1)), *["rgb"] * rgb)


@contextlib.contextmanager
def _own_checkpointing_off(decoder):
    """Context manager: diffusers' gradient checkpointing of this decoder is off inside.

    It would compute blocks a second time in the backward pass, outside `InputGradientOnly`.
    """
    on = [module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


class TinyDecoderStages:
    """The stages of diffusers' `AutoencoderTiny` decoder: a small copy of a decoder, such as taesdxl and taesd3.

    Stage 0 is the clamp, 3 tanh(z / 3), and the layers before the first upsampling. Each further stage starts with an
    upsampling. The last convolution, to the picture, is left out. The gradient is the network's own, clamp included:
    the gradient of a latent is multiplied by 1 - tanh^2(z / 3), which is 0.90 at 1, 0.42 at 3 and 0.13 at 5. The
    network was trained behind that clamp and knows no other input: beyond the clamp its features hardly change.

    Args:
        vae: an `AutoencoderTiny`. It is held by reference and stays as it is.
        num_blocks: upsamplings whose features are compared, 0 to 3 for taesdxl and taesd3; None for all.

    Raises:
        TypeError: the decoder is built otherwise; names its class.
        ValueError: the decoder has fewer upsamplings than num_blocks.
    """

    def __init__(self, vae: AutoencoderTiny, num_blocks: int | None = None):
        decoder = getattr(vae, "decoder", None)
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, torch.nn.Sequential):
            raise TypeError(f"TinyDecoderStages needs an AutoencoderTiny; {type(vae).__name__} has a "
                            f"{type(decoder).__name__} without a Sequential called layers")  # fmt: skip
        starts = [index for index, layer in enumerate(layers) if isinstance(layer, torch.nn.Upsample)]
        num_blocks = len(starts) if num_blocks is None else num_blocks
        if not 0 <= num_blocks <= len(starts):
            raise ValueError(f"num_blocks is {num_blocks}; this decoder has {len(starts)} upsamplings")
        self.upscaling = math.prod(int(layers[start].scale_factor) for start in starts)
        self.vae, self.num_blocks, self.network = vae, num_blocks, layers
        ends = [*starts, len(layers) - 1]
        self._parts = [layers[start:end] for start, end in zip([0, *starts], ends, strict=True)][: num_blocks + 1]

    @property
    def names(self):
        """One name per stage."""
        return tuple(f"tiny block {number}" for number in range(1, self.num_blocks + 2))

    def __len__(self):
        return self.num_blocks + 1

    @property
    def dtype(self):
        """The dtype that the decoder runs in."""
        return self.network[0].weight.dtype

    @property
    def input_space(self):
        """Model space, where scaling_factor and shift_factor in the config are 1 and 0, as of taesdxl and taesd3."""
        return LatentSpace.of(self.vae)

    def run(self, index, x):
        """Returns the output of stage `index`, (B, C, H, W)."""
        return self._parts[index](self._clamped(index, x))

    def pieces(self, index):
        """Returns functions that compute stage `index` one after the other: `run` in smaller steps."""
        first, *blocks = _before_blocks(self._parts[index])
        return [lambda x: first(self._clamped(index, x)), *blocks]

    def _clamped(self, index, x):
        return torch.tanh(x / 3) * 3 if index == 0 else x


def _before_blocks(part):
    """Returns the layers of a part of a tiny decoder: the first two as one module, then its residual blocks."""
    return [part[:2], *part[2:]]


class SelectedStages:
    """Some stages of a network: the others up to the last of them are computed, but not compared.

    Args:
        network: `FeatureStages`.
        chosen: numbers of the stages, from 0, in ascending order.
    """

    def __init__(self, network: FeatureStages, chosen: Sequence[int]):
        if not chosen or list(chosen) != sorted({*chosen} & {*range(len(network))}):
            raise ValueError(f"chosen is {list(chosen)}; it must be ascending numbers of stages, 0 to "
                             f"{len(network) - 1}")  # fmt: skip
        self.network, self.chosen = network, tuple(chosen)
        self.names = tuple(network.names[index] for index in chosen)
        self.upscaling, self.input_space = network.upscaling, network.input_space

    def __len__(self):
        return len(self.chosen)

    @property
    def dtype(self):
        """The dtype that the network runs in."""
        return self.network.dtype

    def run(self, index, x):
        """Returns the features of the chosen stage `index`; x: latents, or the previous chosen stage's features."""
        first = self.chosen[index - 1] + 1 if index else 0
        for stage in range(first, self.chosen[index] + 1):
            x = self.network.run(stage, x)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# 3. One layer: outlier mask, normalization, distance


def order_statistics(values, quantile):
    """Returns two order statistics of each row of (..., N), exact.

    They are the k-th smallest value for k = max(1, floor(q N)) and for k = max(1, floor((1 - q) N)).
    """
    n = values.shape[-1]
    low, high = max(1, int(quantile * n)), max(1, int((1 - quantile) * n))
    return kth_extreme(values, low, largest=False), kth_extreme(values, n - high + 1, largest=True)


def kth_extreme(values, k, largest, segments=8):
    """Returns the k-th smallest (or largest) of each row of (..., N), as kthvalue but faster (docs/lab-notes.md).

    The row is cut into segments of 8 values. The k segments with the smallest minima hold every value below the k-th
    smallest minimum, and at least k values up to it. So their k-th smallest value is the row's.
    """
    n = values.shape[-1]
    if n % segments == 0 and 2 * k * segments <= n:
        cut = values.unflatten(-1, (segments, n // segments))  # a segment is a column
        extremes = cut.amax(dim=-2) if largest else cut.amin(dim=-2)
        chosen = extremes.topk(k, dim=-1, largest=largest, sorted=False).indices
        chosen = chosen.unsqueeze(-2).expand(*chosen.shape[:-1], segments, k)
        values = cut.gather(-1, chosen).flatten(-2)
    found = values.topk(k, dim=-1, largest=largest, sorted=False).values
    return found.amin(dim=-1) if largest else found.amax(dim=-1)


def morphology_kernels(size_ratio, image_size, reference_resolution=None):
    """Returns the kernel sizes (dilation, erosion) of the outlier mask, or None for a feature map without a mask.

    Args:
        size_ratio: feature size / image size; only maps of at least half the image's size have a mask.
        image_size: (height, width) of the image in px.
        reference_resolution: resolution in px for which the kernels are meant. With it they cover the same share of
            an image of any size, as in the paper (section 4.1). None: the kernels are fixed.
    """
    if size_ratio < 0.5:
        return None
    kernels = (3, 5) if size_ratio >= 1 else (1, 3)
    if reference_resolution is None:
        return kernels
    scale = (image_size[0] * image_size[1]) ** 0.5 / reference_resolution
    return tuple(2 * int((kernel - 1) / 2 * scale + 0.5) + 1 for kernel in kernels)


def dilate(mask, kernel):
    """Returns the dilation of a bool map (B, C, H, W) by a square of `kernel` px (odd); False outside the map.

    Shifts the bool map along one axis and then along the other, which is many times faster than max pooling.
    """
    for dim in (2, 3):
        source, size = mask, mask.shape[dim]
        mask = source.clone()
        for shift in range(1, min(kernel // 2, size - 1) + 1):
            mask.narrow(dim, shift, size - shift).logical_or_(source.narrow(dim, 0, size - shift))
            mask.narrow(dim, 0, size - shift).logical_or_(source.narrow(dim, shift, size - shift))
    return mask


def inlier_mask(features, kernels, quantile=0.02):
    """Returns a bool map (B, C, H, W): False on the few activations of huge magnitude that decoders have.

    An inlier lies between the outer quantiles of its sample and channel, widened by two standard deviations. The map
    of inliers is then dilated and eroded by squares of `kernels` = (dilation, erosion) px. Positions outside the map
    count as outliers for the dilation and as inliers for the erosion.
    """
    rows = features.flatten(2)
    low, high = order_statistics(rows, quantile)
    centred = rows - rows.mean(dim=-1, keepdim=True)
    margin = 2 * (centred.square().sum(dim=-1) / max(1, rows.shape[-1] - 1)).sqrt()
    low, high = ((low - margin)[..., None, None], (high + margin)[..., None, None])
    inlier = (features > low) & (features < high)
    dilation, erosion = kernels
    return ~dilate(~dilate(inlier, dilation), erosion)


def safe_sqrt(values):
    """Returns the square root, with the gradient 0 at 0 (autograd's is infinite, and NaN after a product with 0)."""
    zero = values == 0
    return torch.where(zero, 0, torch.where(zero, 1, values).sqrt())


def channel_norm(features, mask):
    """Returns the norm over the inlying channels at each position, (B, 1, H, W), plus EPS; its gradient at 0 is 0."""
    squares = (features if mask is None else features * mask).square().sum(dim=1, keepdim=True)
    return safe_sqrt(squares) + EPS


def inlier_std(features, mask, dims):
    """Returns the standard deviation over the inliers along `dims` (kept), plus EPS; its gradient at 0 is 0.

    The sum of squared deviations is divided by the number of inliers, not by one less.
    """
    if mask is None:
        return safe_sqrt(features.var(dim=dims, correction=0, keepdim=True)) + EPS
    count = mask.sum(dim=dims, keepdim=True, dtype=features.dtype).clamp_min(1)
    mean = (features * mask).sum(dim=dims, keepdim=True) / count
    variance = ((features - mean) * mask).square().sum(dim=dims, keepdim=True) / count
    return safe_sqrt(variance) + EPS


def estimate_std(estimate, mask, norm_gradient):
    """Returns the standard deviation s of the estimate's features per sample and channel, (B, C, 1, 1).

    The value is always s. Its gradient is 0 under "none", half the gradient of s under "half", and the gradient of s
    under "full". With sg = stop-gradient, a squared difference divided by the result's square is divided by sg(s)^2,
    sg(s) * s or s^2.
    """
    if norm_gradient == "none":
        return inlier_std(estimate.detach(), mask, (2, 3))
    std = inlier_std(estimate, mask, (2, 3))
    return std if norm_gradient == "full" else (std.detach() + std) / 2


def normalized_difference(target, estimate, mask, norm_type, norm_gradient):
    """Returns the difference of the normalised features, (B, C, H, W).

    Both sides are divided by the same statistic, except under "default". Subtracting a common mean first would change
    nothing.

    Args:
        norm_type: the divisor.
            "standard": the estimate's standard deviation per sample and channel (the paper's).
            "target": the target's standard deviation per sample and channel.
            "batch": the target's standard deviation per channel over batch and positions.
            "shared": the target's norm over channels at each position (as in LPIPS, where each side has its own).
            "default": each side's own norm over channels.
            "none": 1.
        norm_gradient: the gradient of "standard" through its divisor; see `estimate_std`.
    """
    if norm_type == "standard":
        return (estimate - target) / estimate_std(estimate, mask, norm_gradient)
    if norm_type == "target":
        return (estimate - target) / inlier_std(target, mask, (2, 3))
    if norm_type == "batch":
        return (estimate - target) / inlier_std(target, mask, (0, 2, 3))
    if norm_type == "shared":
        return (estimate - target) / channel_norm(target, mask)
    if norm_type == "default":
        return estimate / channel_norm(estimate, mask) - target / channel_norm(target, mask)
    return estimate - target


def block_loss(target, estimate, mask, count, norm_type, loss_type, norm_gradient):
    """Returns the sum over a block's channels and positions of distance / `count` of the channel, (B,).

    A block has whole channels for statistics over positions ("standard", "target", "batch") and whole positions for
    norms over channels ("shared", "default"). Differentiable with respect to the estimate.

    Args:
        target, estimate: (B, c, h, w) features.
        mask: bool (B, c, h, w), True on inliers; None: all are inliers.
        count: (B, c) inliers per channel of the whole map.
    """
    difference = normalized_difference(target, estimate, mask, norm_type, norm_gradient)
    if mask is not None:
        difference = difference * mask
    distance = difference.square() if loss_type == "mse" else difference.abs()
    return (distance.sum(dim=(2, 3)) / count).sum(dim=1)


def layer_loss(target, estimate, mask, norm_type, loss_type, norm_gradient):
    """Returns the loss of one layer, (B,): mean over channels of the mean distance over the channel's inliers.

    Differentiable with respect to the estimate.

    Args:
        target, estimate: (B, C, H, W) features.
        mask: bool (B, C, H, W), True on inliers; None: all are inliers.
    """
    count = inlier_count(target, mask, target.dtype)
    return block_loss(target, estimate, mask, count, norm_type, loss_type, norm_gradient) / target.shape[1]


def inlier_count(features, mask, dtype):
    """Returns the number of inliers per sample and channel, at least 1, (B, C) of `dtype`; all if mask is None."""
    if mask is None:
        return features.new_full(features.shape[:2], max(1, features.shape[2] * features.shape[3]), dtype=dtype)
    return mask.sum(dim=(2, 3), dtype=dtype).clamp_min(1)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The loss


@dataclass(frozen=True)
class LPLConfig:
    """Options of the loss. A bad value raises ValueError naming the field.

    Attributes:
        num_blocks: up blocks used of a VAE's decoder, 0 to 4 for SDXL and SD3. Only for a loss that is given a VAE;
            other stages know their number.
        norm_type: "standard" (the paper's), "target", "shared" (LPIPS-like, smaller by about the number of channels),
            "default", "batch" or "none"; see `normalized_difference`. Under "batch" a sample's loss depends on the
            other samples of the batch; under no other does it.
        norm_gradient: gradient through the deviation that "standard" divides by: "none" (detached), "half" or "full".
            None: "full", and nothing under another `norm_type`.
        loss_type: "mse" or "l1".
        pow_law: whether a layer's weight is the inverse of its upscaling relative to the first layer: 1, 1/2, 1/4,
            1/8, 1/8 for SDXL, and 1 for layers smaller than the first. False: 1 for all.
        remove_outliers: whether activations of huge magnitude are left out; see `inlier_mask`.
        outlier_quantile: share of activations at either end where the outlier limits start, above 0, below 0.5.
        outlier_reference_resolution: resolution in px; the mask's kernels scale with sqrt(height * width) / this.
            None: fixed kernels.
        checkpointing: "none", or "stage": keep only each stage's input and compute the stage again for its gradient.
        batch_size: maximum of samples that are in the network at a time; None: all. Ignored under "batch".
    """

    num_blocks: int = 4
    norm_type: Literal["standard", "shared", "default", "batch", "target", "none"] = "standard"
    norm_gradient: Literal["none", "half", "full"] | None = None
    loss_type: Literal["mse", "l1"] = "mse"
    pow_law: bool = True
    remove_outliers: bool = True
    outlier_quantile: float = 0.02
    outlier_reference_resolution: float | None = None
    checkpointing: Literal["none", "stage"] = "none"
    batch_size: int | None = None

    def __post_init__(self):
        def check(field, good, wanted):
            if not good:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be {wanted}")

        check("num_blocks", isinstance(self.num_blocks, int) and self.num_blocks >= 0, "a whole number, 0 or more")
        check("norm_type", self.norm_type in NORM_TYPES, f"one of {', '.join(NORM_TYPES)}")
        good = self.norm_gradient is None or self.norm_gradient in NORM_GRADIENTS
        check("norm_gradient", good, f"one of {', '.join(NORM_GRADIENTS)}, or None")
        suits = self.norm_gradient in (None, "none") or self.norm_type == "standard"
        check("norm_gradient", suits, f"None with norm_type {self.norm_type!r}: it is for 'standard' only")
        check("loss_type", self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}")
        check("outlier_quantile", 0 < self.outlier_quantile < 0.5, "above 0 and below 0.5")
        reference = self.outlier_reference_resolution
        check("outlier_reference_resolution", reference is None or reference > 0, "a resolution in px, or None")
        check("checkpointing", self.checkpointing in CHECKPOINTING, f"one of {', '.join(CHECKPOINTING)}")
        good = self.batch_size is None or (isinstance(self.batch_size, int) and self.batch_size >= 1)
        check("batch_size", good, "1 or more, or None")

    @property
    def deviation_gradient(self):
        """`norm_gradient`, or what None stands for."""
        return self.norm_gradient or ("full" if self.norm_type == "standard" else "none")


@dataclass
class LPLOutput:
    """The result of the loss: tensors on the device, in float32 (float64 for a float64 network).

    Attributes:
        per_sample: (B,) mean over layers of weight * layer loss; carries the gradient to the estimate.
        per_layer: (L, B) layer losses without their weights, detached.
        inlier_fraction: (L,) share of activations that were compared, detached; 1 for a layer without a mask.
    """

    per_sample: torch.Tensor
    per_layer: torch.Tensor
    inlier_fraction: torch.Tensor


class LatentPerceptualLoss(torch.nn.Module):
    """LPL through a frozen network: `loss(z0_pred, z0) -> LPLOutput`.

    Target and estimate go through the network in lockstep, stage by stage. A stage's part of the loss and its gradient
    are computed at once, so no list of features is ever held. If a gradient is wanted, the call itself runs the
    network's backward pass down to the estimate, in chunks of `config.batch_size` samples. Only that gradient, of a
    latent's size, stays for the denoiser's backward pass.

    The network is held by reference: nothing is registered, moved, copied or changed, no parameter of it gets a
    gradient, and several losses can share it. It runs in its own dtype, with autocast off.

    Args:
        stages: the network, as `FeatureStages`; or a diffusers autoencoder, whose decoder is then used up to
            `config.num_blocks` up blocks.

    Raises:
        TypeError: the network is neither.
        ValueError: the decoder has fewer up blocks than num_blocks; num_blocks is given with stages; or a decoder that
            overflows in float16 (`force_upcast` in its config) is in float16.
    """

    def __init__(
        self, stages: FeatureStages | AutoencoderKL | AsymmetricAutoencoderKL, config: LPLConfig | None = None
    ):
        super().__init__()
        self.config = config or LPLConfig()
        if hasattr(stages, "run"):
            _check_stages(stages, self.config)
        else:
            stages = DecoderStages(stages, self.config.num_blocks)
        if isinstance(stages, DecoderStages):
            _check_overflow(stages)
        self._stages = (stages,)  # in a tuple, so that a network that is an nn.Module does not become a submodule

    @property
    def stages(self):
        """The network's `FeatureStages`."""
        return self._stages[0]

    def forward(self, z0_pred, z0):
        """Compares an estimate with its target, both (B, C, h, w) in model space.

        Raises:
            ValueError: the shapes differ; or a stage's features do not suit the norm type.
        """
        if z0_pred.shape != z0.shape:  # it would broadcast, e.g. after gating only one of them
            raise ValueError(f"z0_pred is {tuple(z0_pred.shape)} and z0 {tuple(z0.shape)}; they must have one shape")
        if len(z0) == 0:  # no sample is gated: no losses, but a graph
            nothing = z0_pred.flatten(1).sum(dim=1).to(torch.promote_types(self.stages.dtype, torch.float32))
            return LPLOutput(nothing, nothing.new_zeros(len(self.stages), 0), nothing.new_ones(len(self.stages)))
        with _without_autocast(z0.device.type):
            size = len(z0) if self.config.norm_type == "batch" else self.config.batch_size or len(z0)
            needs_gradient = torch.is_grad_enabled() and z0_pred.requires_grad
            pairs = zip(z0_pred.detach().split(size), z0.detach().split(size), strict=True)
            chunks = [self._chunk(estimate, target, needs_gradient) for estimate, target in pairs]
        per_sample, per_layer, inliers, gradients = (list(column) for column in zip(*chunks, strict=True))
        per_sample = torch.cat(per_sample)
        if needs_gradient:
            per_sample = _WithGradient.apply(z0_pred, per_sample, torch.cat(gradients))
        counts = [len(chunk) / len(z0) for chunk in z0.split(size)]
        fraction = sum(share * count for share, count in zip(inliers, counts, strict=True))
        return LPLOutput(per_sample, torch.cat(per_layer, dim=1), fraction)

    def _chunk(self, estimate, target, needs_gradient):
        """Returns losses (b,), layer losses (L, b), inlier shares (L,) and d losses / d estimate of some samples."""
        image_size = [side * self.stages.upscaling for side in target.shape[2:]]
        tape = []  # per stage: its input, its output with the graph between (or None), d loss / d output
        losses, shares, weights = [], [], []
        first_height = None
        x, xh = target, estimate
        for index in range(len(self.stages)):
            with torch.no_grad():  # the target first: its temporaries come while the estimate keeps less
                for piece in self._pieces(index):
                    x = piece(x)
            xh, sources, output = self._estimate(index, xh, needs_gradient)
            height = self._as_map(index, x).shape[2]
            first_height = first_height or height
            weight = min(1.0, first_height / height) if self.config.pow_law else 1.0
            weights.append(weight / len(self.stages))
            loss, share, gradient = self._compare(index, x, xh, image_size, weights[-1], needs_gradient)
            losses.append(loss)
            shares.append(share)
            if needs_gradient:
                tape.append((sources, output, gradient))
        del x, xh, sources, output, gradient  # the backward pass is where memory peaks
        per_layer = torch.stack(losses)
        per_sample = sum(weight * loss for weight, loss in zip(weights, per_layer, strict=True))
        gradient = self._backward(tape) / self._gradient_scale(image_size) if needs_gradient else None
        return per_sample, per_layer, torch.stack(shares), gradient

    def _stage(self, index, x):
        """Returns the output of stage `index`; x: `z_model` for stage 0, else the previous output."""
        return self.stages.run(index, first_input(self.stages, x) if index == 0 else x)

    def _estimate(self, index, source, needs_gradient):
        """Returns a stage's output on the estimate's side, and what its backward pass needs.

        Returns:
            (output without graph; inputs of the stage's pieces; output with graph, or None with checkpointing)
        """
        if needs_gradient and self.config.checkpointing == "none":
            output = self._with_graph(index, functools.partial(self._stage, index), source)
            return output.detach(), [source], output
        sources, x = [], source
        with torch.no_grad():
            for piece in self._pieces(index):
                sources.append(x)
                x = piece(x)
        return x, sources if needs_gradient else None, None

    def _pieces(self, index):
        """Returns the functions that compute a stage: with checkpointing several for the last, where memory peaks."""
        last = index and index == len(self.stages) - 1
        if last and self.config.checkpointing == "stage" and hasattr(self.stages, "pieces"):
            return self.stages.pieces(index)
        return [functools.partial(self._stage, index)]

    def _with_graph(self, index, piece, source):
        """Returns the output of a stage or a piece of it; `source` is the leaf of its graph."""
        with torch.enable_grad(), InputGradientOnly():
            output = piece(source.requires_grad_())
        if not output.requires_grad:
            raise ValueError(
                f"stage {self.stages.names[index]!r} cuts the gradient: run it without torch.no_grad or detach"
            )
        return output

    def _gradient_scale(self, image_size):
        """Returns a power of two that keeps a float16 network's gradients, which shrink with the area, off zero."""
        return 2.0 ** round(math.log2(image_size[0] * image_size[1])) if self.stages.dtype == torch.float16 else 1.0

    def _as_map(self, index, features):
        """Returns features as (b, C, H, W); (b, C) become one position. Raises ValueError if they do not suit."""
        name, shape = self.stages.names[index], tuple(features.shape)
        if len(shape) not in (2, 4):
            raise ValueError(f"stage {name!r} has features of shape {shape}; they must be (B, C, H, W) or (B, C)")
        norm_type = self.config.norm_type
        if math.prod(shape[2:]) == 1 and norm_type in OVER_POSITIONS:
            raise ValueError(
                f"stage {name!r} has features of shape {shape}: a single position. norm_type {norm_type!r} divides by "
                "a deviation over positions, which is 0 there: use 'shared', 'default' or 'none'"
            )
        return features if len(shape) == 4 else features[:, :, None, None]

    def _compare(self, index, x, xh, image_size, weight, needs_gradient):
        """Returns a layer's loss (b,), share of inliers (a scalar) and weight * d loss / d xh, scaled, in xh's dtype.

        Works through the map block by block, so that the comparison's temporaries in float32 stay small and in cache.
        """
        config, kernels, mask, shape = self.config, None, None, xh.shape
        x, xh = self._as_map(index, x), self._as_map(index, xh)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if config.remove_outliers:
            ratio = x.shape[2] / image_size[0]
            kernels = morphology_kernels(ratio, image_size, config.outlier_reference_resolution)
        by_channels = config.norm_type not in OVER_CHANNELS  # else by rows of positions, which need the whole mask
        if kernels is not None and not by_channels:
            mask = self._mask(x, kernels, dtype)
        count = None if by_channels else inlier_count(x, mask, dtype)
        loss, inliers = x.new_zeros(len(x), dtype=dtype), x.new_zeros((), dtype=dtype)
        reuse = len(self._pieces(index)) > 1  # a decoder's last features
        gradient = (xh if reuse else torch.empty_like(xh)) if needs_gradient else None
        factor = loss.new_full(loss.shape, weight * self._gradient_scale(image_size) / x.shape[1])
        for block in blocks_of(x, 1 if by_channels else 2):
            target = x[block].to(dtype, memory_format=torch.contiguous_format)
            estimate = xh[block].to(dtype, copy=True, memory_format=torch.contiguous_format)
            inlier = None if mask is None else mask[block]
            if kernels is not None and by_channels:
                inlier = inlier_mask(target, kernels, config.outlier_quantile)
            inliers += target.numel() if inlier is None else inlier.sum(dtype=dtype)
            with torch.set_grad_enabled(needs_gradient):
                estimate.requires_grad_(needs_gradient)
                counts = inlier_count(target, inlier, dtype) if by_channels else count
                options = (config.norm_type, config.loss_type, config.deviation_gradient)
                part = block_loss(target, estimate, inlier, counts, *options)
            loss += part.detach()
            if needs_gradient:
                gradient[block] = torch.autograd.grad(part, estimate, factor)[0]
        return loss / x.shape[1], inliers / x.numel(), gradient.view(shape) if needs_gradient else None

    def _mask(self, x, kernels, dtype):
        """Returns the layer's inliers, bool (b, C, H, W)."""
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for block in blocks_of(x, 1):
            features = x[block].to(dtype, memory_format=torch.contiguous_format)
            mask[block] = inlier_mask(features, kernels, self.config.outlier_quantile)
        return mask

    def _backward(self, tape):
        """Returns d losses / d estimate from the layers' gradients: the backward pass, the last stage first."""
        gradient = 0
        while tape:
            sources, output, layer_gradient = tape.pop()
            index, held = len(tape), [layer_gradient.add_(gradient)]
            pieces = self._pieces(index) if output is None else [None]
            del layer_gradient, gradient
            while sources:
                source, piece = sources.pop(), pieces.pop()
                if hasattr(piece, "input_gradient"):
                    held.append(piece.input_gradient(source, held))
                    continue
                if output is None:
                    output = self._with_graph(index, piece, source)
                end, output = _Held.apply(output, held), None
                held.extend(torch.autograd.grad(end, source))
                del source, end  # the end holds the list
            (gradient,) = held
        return gradient


def _check_stages(stages, config):
    """Raises TypeError or ValueError for stages that do not follow `FeatureStages`, or a num_blocks beside them."""
    wanted = ("__len__", "names", "upscaling", "input_space", "dtype")
    missing = [name for name in wanted if not hasattr(stages, name)]
    if missing:
        raise TypeError(f"{type(stages).__name__} lacks {', '.join(missing)}; FeatureStages says what stages need")
    if not 0 < len(stages) == len(stages.names):
        raise ValueError(f"{type(stages).__name__} has {len(stages)} stages and {len(stages.names)} names; each stage "
                         "needs a name, and one stage is needed")  # fmt: skip
    if config.num_blocks != LPLConfig.num_blocks:
        raise ValueError(
            f"num_blocks is {config.num_blocks}; it is for a loss that is given a VAE: leave it out of the config and "
            "give DecoderStages(vae, num_blocks) or stages of the length that you want"
        )


def _check_overflow(stages):
    """Raises ValueError for a float16 decoder that overflows."""
    config = stages.vae.config
    if stages.dtype == torch.float16 and getattr(config, "force_upcast", False):
        raise ValueError(
            "this autoencoder's decoder overflows in float16 (force_upcast in its config): use bfloat16 or float32"
            + (", or load madebyollin/sdxl-vae-fp16-fix" if config.latent_channels == 4 else "")
        )


def _without_autocast(device_type):
    """Context manager: autocast is off inside, on devices that have it (the meta device has not)."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def blocks_of(features, dim):
    """Yields indices that cut (B, C, H, W) features along `dim` into blocks of about 2^21 elements (2^23 on a GPU)."""
    size = 2**21 if features.device.type == "cpu" else 2**23
    length = features.shape[dim]
    step = max(1, size * length // max(1, features.numel()))
    for start in range(0, length, step):
        piece = slice(start, min(start + step, length))
        yield (slice(None), piece) if dim == 1 else (slice(None), slice(None), piece)


class _Held(torch.autograd.Function):
    """A scalar at the end of a graph, whose backward pass starts with a gradient that nothing else holds.

    A tensor given to `torch.autograd.grad` lives until it returns, and so does the output. Both are as large as a
    feature map. Here the output is free before the backward pass, and the gradient as soon as it is used.
    """

    @staticmethod
    def forward(ctx, output, held):
        """held: list with the gradient of the output, which the backward pass takes out."""
        ctx.held = held
        return output.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.held.pop(), None


class _WithGradient(torch.autograd.Function):
    """Values (B,) whose gradient (B, C, h, w) with respect to z0_pred is already known."""

    @staticmethod
    def forward(ctx, z0_pred, values, gradient):
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    @once_differentiable  # the gradient's own derivative is not known
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return _per_sample(grad, gradient) * gradient, None, None


# ---------------------------------------------------------------------------------------------------------------------
# 5. Which samples it applies to, and its weight


@dataclass(frozen=True)
class LPLGate:
    """Selects the samples of a batch that get the loss: those with little noise, by one of two thresholds.

    Attributes:
        t_threshold: the loss applies where timestep < t_threshold, on the scheduler's 0..1000 scale (1000 * sigma for
            flow).
        sigma_threshold: the loss applies where sigma / alpha <= sigma_threshold, as in the paper (best range 3 to 6).
        threshold_resolution: resolution in px that `sigma_threshold` is meant for. At another one the threshold is
            multiplied by resolution / threshold_resolution, which keeps the uncertainty per patch (section 4.1).
        resolution: resolution of the images in px; sqrt(height * width) if they are not square.
    """

    t_threshold: float | None = None
    sigma_threshold: float | None = None
    threshold_resolution: float | None = None
    resolution: float | None = None

    def __post_init__(self):
        if (self.t_threshold is None) == (self.sigma_threshold is None):
            raise ValueError(
                "exactly one of t_threshold and sigma_threshold must be given, found "
                f"t_threshold={self.t_threshold} and sigma_threshold={self.sigma_threshold}"
            )
        if self.threshold_resolution is not None and (self.sigma_threshold is None or self.resolution is None):
            raise ValueError("threshold_resolution scales sigma_threshold: give sigma_threshold and resolution too")

    @property
    def limit(self):
        """The threshold in use, scaled with the resolution."""
        if self.t_threshold is not None:
            return self.t_threshold
        return self.sigma_threshold * (self.resolution / self.threshold_resolution if self.threshold_resolution else 1)

    def at(self, resolution):
        """Returns the gate for images of another resolution in px."""
        return replace(self, resolution=resolution) if self.threshold_resolution else self

    def __call__(self, timesteps, noise_to_signal):
        """Returns whether the loss applies, bool (B,). Keep both arguments, (B,), on the CPU: then nothing waits."""
        return timesteps < self.limit if self.t_threshold is not None else noise_to_signal <= self.limit


class AutoWeight(torch.nn.Module):
    """The weight that keeps LPL at a share of the whole loss (the paper's best weight makes it about a fifth).

    w = min(1, n / ramp) * fraction * share / (1 - share) * mean(diffusion) / mean(LPL term, zeros included)

    With several networks each has a weight of its own, since their losses have different scales. All have the same
    `share`; the `fraction` of each is its part of the LPL term, and the fractions add up to 1.

    n is the number of gated samples so far. The means weight all steps alike at first; a step counts for 1 / e of a
    new one after `window` more gated samples. Both are counted in gated samples because LPL's mean is as sure as their
    number: LPL of a sample with hardly any noise is tiny, so the mean of the first few may be far too small.

    The sums are buffers on the device and part of `state_dict`. Call `update` once per optimizer step, with means over
    its micro-steps and ranks. The weight is used from the next step on; it is 0 until a sample was gated.
    """

    def __init__(self, share=0.2, window=500, ramp=32, fraction=1.0):
        """
        Args:
            share: of the LPL term in the whole loss, between 0 and 1.
            window: gated samples that the means remember.
            ramp: gated samples until the weight is whole.
            fraction: of the LPL term that is this network's, above 0 and at most 1.
        """
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; it must lie between 0 and 1, ends excluded")
        if window <= 0 or ramp <= 0:
            raise ValueError(f"window is {window} and ramp is {ramp}; both must be numbers above 0")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1")
        self.share, self.window, self.ramp, self.fraction = share, window, ramp, fraction
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # diffusion, LPL term, steps; discounted
        self.register_buffer("gated", torch.zeros((), dtype=torch.float64))  # gated samples so far

    @torch.no_grad()
    def update(self, diffusion, lpl, gated):
        """Adds the diffusion loss, the LPL term and the number of gated samples of one optimizer step.

        Losses are scalar tensors; the number may be one too. A step with a value that is not finite changes nothing.
        """
        gated = gated if isinstance(gated, torch.Tensor) else torch.full_like(lpl, gated)
        diffusion, lpl, gated = torch.stack([diffusion, lpl, gated]).to(self.sums)
        sums = self.sums * torch.exp(-gated / self.window) + torch.stack([diffusion, lpl, torch.ones_like(lpl)])
        finite = sums.isfinite().all()
        self.sums.copy_(torch.where(finite, sums, self.sums))
        self.gated.add_(torch.where(finite, gated, 0))

    @property
    def means(self):
        """(2,) running means of the diffusion loss and of the LPL term; 0 before any update."""
        return self.sums[:2] / self.sums[2].clamp_min(1e-12)

    def forward(self):
        """Returns the weight, a float32 scalar tensor on the device."""
        diffusion, lpl, _ = self.sums
        ratio = torch.where(lpl > 0, diffusion / torch.where(lpl > 0, lpl, 1), 0)
        ramped = (self.gated / self.ramp).clamp_max(1)
        return (ramped * self.share / (1 - self.share) * ratio * self.fraction).float()


# ---------------------------------------------------------------------------------------------------------------------
# 6. The frozen network: a backward pass that computes and keeps only what the input gradient needs


class _FrozenConv2d(torch.autograd.Function):
    """Convolution with constant weights. Autograd would keep the input, for a weight gradient that is not needed.

    Where the input comes from a `_FrozenGroupNorm`, that function's backward pass is the only holder of the gradient
    that is made here. It is told so, and may write its own result into it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.to_norm = isinstance(x.grad_fn, _FrozenGroupNorm._backward_cls)
        ctx.save_for_backward(weight)
        ctx.shape, ctx.arguments = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        if stride in (1, (1, 1)):  # PyTorch's general function fills a stand-in for the input and ignores it
            result = F.conv_transpose2d(grad, weight, None, stride, padding, 0, groups, dilation)
            result.held_by_norm = ctx.to_norm
            return result, *[None] * 6
        return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.arguments), *[None] * 6


def _conv_gradient(grad, conv):
    """Returns the gradient of the input of a Conv2d whose stride is 1 and whose padding is zeros."""
    return F.conv_transpose2d(grad, conv.weight, None, 1, conv.padding, 0, conv.groups, conv.dilation)


class _FrozenLinear(torch.autograd.Function):
    """Linear layer with constant weights; keeps no input."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None, None


class _FrozenReLU(torch.autograd.Function):
    """ReLU that keeps one byte per element: autograd would keep the output, which no frozen layer behind it needs."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y > 0)
        return y

    @staticmethod
    def backward(ctx, grad):
        (positive,) = ctx.saved_tensors
        return torch.where(positive, grad, 0)


class _FrozenGroupNorm(torch.autograd.Function):
    """Group normalization with constant weights, optionally followed by SiLU; keeps its input and nothing else.

    The backward pass normalises again through PyTorch's public function. The kernels beneath it (native_group_norm and
    its backward) expect memory layouts that only the public function ensures, and give wrong numbers for others.
    """

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu_of=None):
        """silu_of: (the norm's result, whether SiLU is to write over it) for SiLU behind the norm; None: without."""
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu_of is not None
        if silu_of is None:
            return _group_norm(x, groups, weight, bias, eps)
        normed, inplace = silu_of
        return F.silu(normed, inplace=inplace)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = (None if t is None else t.detach() for t in ctx.saved_tensors)
        blocks = _blocks_of_groups(x, ctx.groups)
        if len(blocks) == 1:
            return _group_norm_gradient(x, grad, ctx.groups, weight, bias, ctx.eps, ctx.silu), *[None] * 5
        sole = getattr(grad, "held_by_norm", False) and grad.dtype == x.dtype
        result = grad if sole else torch.empty_like(x)
        for groups, part in blocks:
            own = (None if t is None else t[part] for t in (weight, bias))
            result[:, part] = _group_norm_gradient(x[:, part], grad[:, part], groups, *own, ctx.eps, ctx.silu)
        return result, *[None] * 5


def _blocks_of_groups(x, groups):
    """Returns [(number of groups, slice of channels)]: the groups of a norm, cut where x (B, C, H, W) is large."""
    step, width = max(1, groups * NORM_BLOCK // max(1, x.numel())), x.shape[1] // groups
    return [
        (min(step, groups - start), slice(start * width, min(start + step, groups) * width))
        for start in range(0, groups, step)
    ]


def _group_norm(x, groups, weight, bias, eps):
    """Returns F.group_norm, for a large x block by block and in x's memory layout.

    On a GPU PyTorch would copy all of a channels-last x, and the convolution behind the norm would copy it back.
    """
    blocks = _blocks_of_groups(x, groups)
    if len(blocks) == 1 or x.is_contiguous():
        return F.group_norm(x, groups, weight, bias, eps)
    result = torch.empty_like(x)
    for count, part in blocks:
        own = (None if t is None else t[part] for t in (weight, bias))
        result[:, part] = F.group_norm(x[:, part], count, *own, eps)
    return result


def _group_norm_gradient(x, grad, groups, weight, bias, eps, silu):
    """Returns the gradient of x from that of its group norm, with SiLU behind it or not."""
    with torch.enable_grad():
        normed = F.group_norm(x.requires_grad_(), groups, weight, bias, eps)
    if silu:
        values = normed.detach()
        grad = torch.ops.aten.silu_backward.grad_input(grad, values, grad_input=values)  # in the place of the values
    return torch.autograd.grad(normed, x, grad)[0]


def norm_silu(norm, x):
    """Returns silu(norm(x)) of a frozen GroupNorm, (B, C, H, W), differentiable in x, with one tensor for both."""
    arguments = x, norm.num_groups, norm.weight, norm.bias, norm.eps
    with torch.no_grad():
        normed = _group_norm(*arguments)
    return _FrozenGroupNorm.apply(*arguments, (normed, True))


class InputGradientOnly(TorchFunctionMode):
    """Context manager: inside, a network's layers are differentiated with respect to their input alone.

    It replaces convolutions, linear layers, ReLUs and group norms (with the SiLU behind them) by functions with the
    same values and the same input gradients that keep no more than they need. It leaves out divisions by 1. Layers
    whose weights are computed inside the network keep PyTorch's functions, since the gradient may run through those
    weights. The network stays as it is.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if function is F.conv2d:
                conv = _conv2d_arguments(*args, **kwargs)
                if isinstance(conv[4], (int, tuple)) and conv[0].ndim == 4 and _constant(*conv[1:3]):
                    return _FrozenConv2d.apply(*conv)
            if function is F.linear:
                linear = _linear_arguments(*args, **kwargs)
                if _constant(*linear[1:]):
                    return _FrozenLinear.apply(*linear)
            if function is F.relu and not (args[1:] or kwargs.get("inplace")) and args:
                return _FrozenReLU.apply(args[0])
            if function is F.group_norm:
                norm = _group_norm_arguments(*args, **kwargs)
                if _constant(*norm[2:4]):
                    normed = _FrozenGroupNorm.apply(*norm)
                    normed._frozen_norm = norm, normed._version
                    return normed
            if function is F.silu:
                normed = args[0] if args else kwargs["input"]
                frozen, version = getattr(normed, "_frozen_norm", (None, None))
                if frozen is not None and normed._version == version:
                    return _FrozenGroupNorm.apply(*frozen, (normed.detach(), False))
            by_float = function is torch.Tensor.div and len(args) == 2 and type(args[1]) is float and not kwargs
            if by_float and args[1] == 1 and args[0].requires_grad:  # integers would become floats
                return args[0]  # diffusers divides the output of each residual block by its scale, which is 1
        return function(*args, **kwargs)


def _constant(*weights):
    """Returns whether no gradient towards the network's input runs through these weights (tensors or None)."""
    return all(
        isinstance(weight, torch.nn.Parameter) or weight is None or not weight.requires_grad for weight in weights
    )


def _conv2d_arguments(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Returns F.conv2d's arguments in order, however they were passed."""
    return input, weight, bias, stride, padding, dilation, groups


def _linear_arguments(input, weight, bias=None):
    """Returns F.linear's arguments in order."""
    return input, weight, bias


def _group_norm_arguments(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Returns F.group_norm's arguments in order."""
    return input, num_groups, weight, bias, eps
