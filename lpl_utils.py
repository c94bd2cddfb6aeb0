"""The latent perceptual loss (LPL): distances between the features that a frozen VAE decoder makes of two latents.

Source: Berrada et al., "Boosting Latent Diffusion with Perceptual Objectives", ICLR 2025. This file imports torch only
and can be copied into any trainer:

    lpl = LatentPerceptualLoss(vae, LPLConfig())                             # a frozen diffusers AutoencoderKL
    z0_pred = estimate_z0(model_pred, noisy_latents, alpha, sigma, "epsilon")
    gated = (timesteps < 200).nonzero().flatten()                            # timesteps on the CPU: no waiting
    per_sample = lpl(z0_pred[gated], latents[gated]).per_sample
    loss = diffusion_loss + weight * per_sample.sum() / len(latents)         # by the batch, not by the gated samples

Spaces of latents: `z_model` as the denoiser sees them (scaled), `z_vae` as the decoder sees them.
Shapes: B batch, C channels, H W height and width of a feature map, h w of a latent, L decoder stages used.
Forward process: z_t = alpha * z_0 + sigma * eps.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from diffusers import AsymmetricAutoencoderKL, AutoencoderKL

EPS = 1e-6  # added to every norm and standard deviation that something is divided by
NORM_TYPES = ("standard", "shared", "default", "batch")
LOSS_TYPES = ("mse", "l1")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
CHECKPOINTING = ("none", "stage")


# ---------------------------------------------------------------------------------------------------------------------
# The forward process: from a model output to an estimate of the clean latents


def estimate_z0(model_output, noisy_latents, alpha, sigma, prediction_type):
    """The clean latents that a model output implies, in float32 (float64 when the noisy latents are).

    Args:
        model_output: (B, C, h, w), whatever the denoiser returned.
        noisy_latents: (B, C, h, w), z_t = alpha * z_0 + sigma * eps, *before* any rounding or perturbation.
        alpha, sigma: (B,) signal and noise level; sqrt(abar), sqrt(1 - abar) under DDPM, 1 - sigma, sigma under flow.
        prediction_type: "epsilon" (the output is eps), "v_prediction" (alpha eps - sigma z_0), "sample" (z_0) or
            "flow" (eps - z_0, the velocity of rectified flow).

    Where alpha is 0 (the last step of a zero-terminal-SNR schedule) epsilon says nothing about z_0; the estimate is
    then 0, finite and without gradient. Source: Table 1 of the paper.
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
    """sigma / alpha, (B,); infinite where alpha is 0. SNR = 1 / noise_to_signal**2."""
    return sigma / alpha


def lpl_noise_scale(alpha, sigma):
    """The weight that `lpl_scale` gives each sample: alpha^2 / (alpha^2 + sigma^2), (B,), in 0..1."""
    return alpha**2 / (alpha**2 + sigma**2)


def _per_sample(values, like):
    """(B,) values, shaped to multiply (B, C, h, w)."""
    values = torch.as_tensor(values, device=like.device).to(like.dtype)
    return values.reshape(-1, *[1] * (like.ndim - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Which samples it applies to, and how much it weighs


@dataclass(frozen=True)
class LPLGate:
    """Which samples of a batch get the loss: those with little noise, by one of two thresholds.

    t_threshold: applies where timestep < t_threshold, on the scheduler's 0..1000 scale (1000 * sigma for flow).
    sigma_threshold: applies where sigma / alpha <= sigma_threshold, as in the paper (best range there: 3 to 6).
    threshold_resolution: the resolution that `sigma_threshold` is meant for; at another one it is multiplied by
        resolution / threshold_resolution, so that the uncertainty per patch stays the same (paper, section 4.1).
    resolution: of the images in px, sqrt(height * width) when they are not square.
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
        """The threshold in use, after scaling with the resolution."""
        if self.t_threshold is not None:
            return self.t_threshold
        return self.sigma_threshold * (self.resolution / self.threshold_resolution if self.threshold_resolution else 1)

    def at(self, resolution):
        """The gate for images of another resolution in px."""
        return replace(self, resolution=resolution) if self.threshold_resolution else self

    def __call__(self, timesteps, noise_to_signal):
        """Bool (B,): whether the loss applies. Both arguments (B,); keep them on the CPU, so that nothing waits."""
        return timesteps < self.limit if self.t_threshold is not None else noise_to_signal <= self.limit


class AutoWeight(torch.nn.Module):
    """The weight that keeps LPL at a share of the whole loss (the paper finds its best where LPL is about a fifth).

    w = share / (1 - share) * mean(diffusion) / mean(LPL term, zeros included), from running means of detached values.
    The means live on the device as buffers and are saved with `state_dict`. `update` is called once per optimizer
    step, with sums over its micro-steps and ranks; the weight is used from the next step on, and 0 until then.
    """

    def __init__(self, share=0.2, decay=0.99):
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; it must lie between 0 and 1, ends excluded")
        self.share, self.decay = share, decay
        self.register_buffer("means", torch.zeros(2, dtype=torch.float64))  # diffusion, LPL term; not yet unbiased
        self.register_buffer("mass", torch.zeros((), dtype=torch.float64))  # 1 - decay**updates: removes the bias

    @torch.no_grad()
    def update(self, diffusion, lpl):
        """Take in the detached diffusion loss and LPL term (each a scalar tensor) of one optimizer step.

        Values that are not finite leave the means as they are.
        """
        values = torch.stack([diffusion, lpl]).to(self.means)
        values = torch.where(values.isfinite().all(), values, self.unbiased_means)
        self.means.lerp_(values, 1 - self.decay)
        self.mass.lerp_(torch.ones_like(self.mass), 1 - self.decay)

    @property
    def unbiased_means(self):
        """(2,) the bias-corrected running means of the diffusion loss and of the LPL term; 0 before any update."""
        return self.means / torch.where(self.mass > 0, self.mass, 1)

    def forward(self):
        """The weight, a float32 scalar tensor on the device."""
        diffusion, lpl = self.means
        ratio = torch.where(lpl > 0, diffusion / torch.where(lpl > 0, lpl, 1), 0)
        return (self.share / (1 - self.share) * ratio).float()


# ---------------------------------------------------------------------------------------------------------------------
# One layer: outlier mask, normalization, distance


def order_statistics(values, quantile):
    """The k-th smallest of each row of (..., N) for k = max(1, floor(q N)) and k = max(1, floor((1 - q) N)); exact."""
    n = values.shape[-1]
    low, high = max(1, int(quantile * n)), max(1, int((1 - quantile) * n))
    return kth_extreme(values, low, largest=False), kth_extreme(values, n - high + 1, largest=True)


def kth_extreme(values, k, largest, segments=8):
    """The k-th smallest (or largest) of each row of (..., N), exact: what kthvalue gives, faster (docs/lab-notes.md).

    The row is cut into segments of 8 values. The k segments with the smallest minima hold every value below the k-th
    smallest minimum, and at least k values up to it: so the k-th smallest of all is the k-th smallest of theirs.
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
    """Kernel sizes (dilation, erosion) of the outlier mask for a feature map; None where no mask is used.

    size_ratio: feature size / image size; 1 and 1/2 have a mask. image_size: (height, width) of the image in px.
    reference_resolution: when given, the kernels cover the same share of any image, as in the paper (section 4.1).
    """
    kernels = {1.0: (3, 5), 0.5: (1, 3)}.get(size_ratio)
    if kernels is None or reference_resolution is None:
        return kernels
    scale = (image_size[0] * image_size[1]) ** 0.5 / reference_resolution
    return tuple(2 * int((kernel - 1) / 2 * scale + 0.5) + 1 for kernel in kernels)


def dilate(mask, kernel):
    """Dilation of a bool map (B, C, H, W) by a square of `kernel` px (odd); outside the map counts as False.

    Shifts of the bool map, first along one axis and then along the other: many times faster than max pooling.
    """
    for dim in (2, 3):
        source, size = mask, mask.shape[dim]
        mask = source.clone()
        for shift in range(1, min(kernel // 2, size - 1) + 1):
            mask.narrow(dim, shift, size - shift).logical_or_(source.narrow(dim, 0, size - shift))
            mask.narrow(dim, 0, size - shift).logical_or_(source.narrow(dim, shift, size - shift))
    return mask


def inlier_mask(features, kernels, quantile=0.02):
    """Bool (B, C, H, W): False on the few activations of huge magnitude that decoders have.

    An inlier lies between the outer quantiles of its sample and channel, widened by two standard deviations; the map
    of inliers is then dilated and eroded with square kernels of `kernels` = (dilation, erosion) px. Outside the map
    counts as an outlier for the dilation and as an inlier for the erosion.
    """
    rows = features.flatten(2)
    low, high = order_statistics(rows, quantile)
    centred = rows - rows.mean(dim=-1, keepdim=True)
    margin = 2 * (centred.square().sum(dim=-1) / max(1, rows.shape[-1] - 1)).sqrt()
    low, high = ((low - margin)[..., None, None], (high + margin)[..., None, None])
    inlier = (features > low) & (features < high)
    dilation, erosion = kernels
    return ~dilate(~dilate(inlier, dilation), erosion)


def channel_norm(features, mask):
    """Norm over the channels of the inliers at each position, (B, 1, H, W), plus EPS; its gradient at 0 is 0."""
    squares = (features if mask is None else features * mask).square().sum(dim=1, keepdim=True)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0) + EPS


def inlier_std(features, mask, dims):
    """Standard deviation over the inliers along `dims` (kept), divided by their number, plus EPS."""
    if mask is None:
        return features.var(dim=dims, correction=0, keepdim=True).sqrt() + EPS
    count = mask.sum(dim=dims, keepdim=True, dtype=features.dtype).clamp_min(1)
    mean = (features * mask).sum(dim=dims, keepdim=True) / count
    variance = ((features - mean) * mask).square().sum(dim=dims, keepdim=True) / count
    return variance.sqrt() + EPS


def normalized_difference(target, estimate, mask, norm_type):
    """Difference of the normalised features, (B, C, H, W). Means cancel wherever both sides share their statistics.

    "standard": both by the estimate's standard deviation per sample and channel, detached (the paper's).
    "batch": both by the target's standard deviation per channel over batch and space.
    "shared": both by the target's norm over channels at each position (as LPIPS does, on one side).
    "default": each by its own norm over channels.
    """
    if norm_type == "standard":
        return (estimate - target) / inlier_std(estimate.detach(), mask, (2, 3))
    if norm_type == "batch":
        return (estimate - target) / inlier_std(target, mask, (0, 2, 3))
    if norm_type == "shared":
        return (estimate - target) / channel_norm(target, mask)
    return estimate / channel_norm(estimate, mask) - target / channel_norm(target, mask)


def block_loss(target, estimate, mask, count, norm_type, loss_type):
    """Sum over a block's channels and positions of the distance, each channel's divided by its `count`; (B,).

    A block holds whole channels for "standard" and "batch" (whose statistics run over positions), whole positions for
    "shared" and "default" (whose norms run over channels). target, estimate: (B, c, h, w), differentiable in
    `estimate`; mask: bool (B, c, h, w) or None for all; count: (B, c) inliers per channel of the whole map.
    """
    difference = normalized_difference(target, estimate, mask, norm_type)
    if mask is not None:
        difference = difference * mask
    distance = difference.square() if loss_type == "mse" else difference.abs()
    return (distance.sum(dim=(2, 3)) / count).sum(dim=1)


def layer_loss(target, estimate, mask, norm_type, loss_type):
    """The loss of one layer, (B,): mean over channels of the mean distance over the channel's inliers.

    target, estimate: (B, C, H, W); mask: bool (B, C, H, W) or None for all. Differentiable in `estimate`.
    """
    count = inlier_count(target, mask, target.dtype)
    return block_loss(target, estimate, mask, count, norm_type, loss_type) / target.shape[1]


def inlier_count(features, mask, dtype):
    """(B, C) the number of inliers per sample and channel, at least 1, as `dtype`; of all where mask is None."""
    if mask is None:
        return features.new_full(features.shape[:2], max(1, features.shape[2] * features.shape[3]), dtype=dtype)
    return mask.sum(dim=(2, 3), dtype=dtype).clamp_min(1)


# ---------------------------------------------------------------------------------------------------------------------
# The frozen decoder: its stages, and a backward pass that computes and keeps only what the input gradient needs


class _FrozenConv2d(torch.autograd.Function):
    """Convolution with constant weights. Autograd would keep the input, for a weight gradient that nobody wants."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.arguments = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        if stride in (1, (1, 1)):  # PyTorch's general function fills a stand-in for the input that it then ignores
            return F.conv_transpose2d(grad, weight, None, stride, padding, 0, groups, dilation), *[None] * 6
        return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.arguments), *[None] * 6


class _FrozenLinear(torch.autograd.Function):
    """Linear layer with constant weights, which keeps no input."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None, None


class _FrozenGroupNorm(torch.autograd.Function):
    """Group normalization with constant weights, optionally followed by SiLU, which keeps its input and nothing else.

    Normalises again in the backward pass, through PyTorch's public function: the kernels beneath it (native_group_norm
    and its backward) expect memory layouts that only that function sees to, and give wrong numbers otherwise.
    """

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, normed=None):
        """`normed`: the norm's result where it is known; then the output is silu(normed)."""
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, normed is not None
        return F.group_norm(x, groups, weight, bias, eps) if normed is None else F.silu(normed)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = (None if t is None else t.detach() for t in ctx.saved_tensors)
        with torch.enable_grad():
            normed = F.group_norm(x.requires_grad_(), ctx.groups, weight, bias, ctx.eps)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, normed.detach())
        return torch.autograd.grad(normed, x, grad)[0], *[None] * 5


class InputGradientOnly(TorchFunctionMode):
    """Inside this context the layers of a network are differentiated with respect to their input alone.

    It replaces convolutions, linear layers and group norms (with the SiLU behind them) by functions with the same
    values and the same input gradients that keep no more than they need. The network itself is left as it is.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if function is F.conv2d:
                conv = _conv2d_arguments(*args, **kwargs)
                if isinstance(conv[4], (int, tuple)) and conv[0].ndim == 4:
                    return _FrozenConv2d.apply(*conv)
            if function is F.linear:
                return _FrozenLinear.apply(*_linear_arguments(*args, **kwargs))
            if function is F.group_norm:
                return self._group_norm(*args, **kwargs)
            if function is F.silu:
                normed = args[0] if args else kwargs["input"]
                frozen, version = getattr(normed, "_frozen_norm", (None, None))
                if frozen is not None and normed._version == version:
                    return _FrozenGroupNorm.apply(*frozen, normed.detach())
        return function(*args, **kwargs)

    @staticmethod
    def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
        arguments = (input, num_groups, weight, bias, eps)
        normed = _FrozenGroupNorm.apply(*arguments)
        normed._frozen_norm = arguments, normed._version
        return normed


def _conv2d_arguments(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv2d's arguments in order, however they were passed."""
    return input, weight, bias, stride, padding, dilation, groups


def _linear_arguments(input, weight, bias=None):
    """F.linear's arguments in order."""
    return input, weight, bias


class DecoderStages:
    """The stages of a diffusers decoder, walked one by one: what `vae.decode` does, cut where features are taken.

    Stage 0 takes latents as the denoiser sees them through scaling, `post_quant_conv` (where the autoencoder has one),
    `conv_in` and `mid_block`; stage i is `up_blocks[i - 1]`. Holds the autoencoder by reference and changes nothing.

    Raises TypeError for a decoder of another build, naming its class.
    """

    def __init__(self, vae: AutoencoderKL | AsymmetricAutoencoderKL):
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
            )
        self.vae, self.decoder = vae, decoder

    def __len__(self):
        return 1 + len(self.decoder.up_blocks)

    @property
    def dtype(self):
        """The dtype that the decoder runs in."""
        return self.decoder.conv_in.weight.dtype

    @property
    def upscaling(self):
        """How many pixels of the image a latent's pixel becomes, in each direction; 8 for SDXL and SD3."""
        return 2 ** sum(bool(getattr(block, "upsamplers", None)) for block in self.decoder.up_blocks)

    def to_vae_space(self, z_model):
        """z_vae = z_model / scaling_factor + shift_factor, in the decoder's dtype."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        z_model = z_model.to(torch.promote_types(z_model.dtype, torch.float32))
        return (z_model / self.vae.config.scaling_factor + shift).to(self.dtype)

    def to_model_space(self, z_vae):
        """The inverse of `to_vae_space`: z_model = (z_vae - shift_factor) * scaling_factor, in float32 or better."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (z_vae.to(torch.promote_types(z_vae.dtype, torch.float32)) - shift) * self.vae.config.scaling_factor

    def run(self, index, x):
        """Output of stage `index` (B, C, H, W); x is `z_model` for stage 0, else the previous stage's output."""
        if index > 0:
            return self.decoder.up_blocks[index - 1](x)
        x = self.to_vae_space(x)
        if getattr(self.vae, "post_quant_conv", None) is not None:
            x = self.vae.post_quant_conv(x)
        return self.decoder.mid_block(self.decoder.conv_in(x))

    def finish(self, x):
        """The image (B, 3, H, W) from the last stage's output: norm, activation and last convolution."""
        return self.decoder.conv_out(self.decoder.conv_act(self.decoder.conv_norm_out(x)))


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@dataclass(frozen=True)
class LPLConfig:
    """Options of the loss. A bad value raises ValueError naming the field.

    num_blocks: up blocks of the decoder that are used, 0 to 4 for SDXL and SD3; L = 1 + num_blocks layers.
    norm_type: "standard" (the paper's), "shared" (LPIPS-like, smaller by about the number of channels), "default" or
        "batch"; see `normalized_difference`. "batch" is the only one where a sample's loss depends on the others.
    loss_type: "mse" or "l1".
    pow_law: weight each layer by the inverse of its upscaling relative to the first: 1, 1/2, 1/4, 1/8, 1/8 for SDXL.
    remove_outliers: leave out activations of huge magnitude; see `inlier_mask`.
    outlier_quantile: share of activations at either end that the outlier limits start from, above 0, below 0.5.
    outlier_reference_resolution: when given, the mask's kernels scale with sqrt(height * width) / this, in px.
    checkpointing: "none", or "stage": keep only the stages' inputs and compute each stage again for its gradient.
    batch_size: at most so many samples are in the decoder at a time; None: all. Ignored under "batch".
    """

    num_blocks: int = 4
    norm_type: Literal["standard", "shared", "default", "batch"] = "standard"
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
        check("loss_type", self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}")
        check("outlier_quantile", 0 < self.outlier_quantile < 0.5, "above 0 and below 0.5")
        reference = self.outlier_reference_resolution
        check("outlier_reference_resolution", reference is None or reference > 0, "a resolution in px, or None")
        check("checkpointing", self.checkpointing in CHECKPOINTING, f"one of {', '.join(CHECKPOINTING)}")
        good = self.batch_size is None or (isinstance(self.batch_size, int) and self.batch_size >= 1)
        check("batch_size", good, "1 or more, or None")


@dataclass
class LPLOutput:
    """What the loss returns; tensors on the device, in float32 (float64 for a float64 decoder).

    per_sample: (B,) mean over layers of weight * layer loss; carries the gradient to the estimate.
    per_layer: (L, B) the layers' losses without their weights, detached.
    inlier_fraction: (L,) share of activations that were compared, detached; 1 where no mask is used.
    """

    per_sample: torch.Tensor
    per_layer: torch.Tensor
    inlier_fraction: torch.Tensor


class LatentPerceptualLoss(torch.nn.Module):
    """LPL through a frozen diffusers autoencoder: `loss(z0_pred, z0) -> LPLOutput`.

    Target and estimate go through the decoder in lockstep, one stage at a time; a stage's part of the loss and its
    gradient are taken at once, so that no list of features is ever held. With gradients wanted the call itself runs
    the decoder's backward pass, down to the estimate, chunk by chunk of `config.batch_size` samples, and only that
    gradient, of a latent's size, stays for the denoiser's backward.

    Holds the autoencoder by reference: nothing is registered, moved, copied or changed, no parameter of it gets a
    gradient, and several losses can share one. It runs in the decoder's own dtype, with autocast off.

    Raises TypeError for another kind of decoder, ValueError when num_blocks exceeds the decoder's or when a decoder
    that overflows in float16 (`force_upcast` in its config) is given in float16.
    """

    def __init__(self, vae: AutoencoderKL | AsymmetricAutoencoderKL, config: LPLConfig | None = None):
        super().__init__()
        self.config = config or LPLConfig()
        stages = DecoderStages(vae)
        if self.config.num_blocks > len(stages) - 1:
            raise ValueError(f"num_blocks is {self.config.num_blocks}; this decoder has {len(stages) - 1} up blocks")
        if stages.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            raise ValueError(
                "this autoencoder's decoder overflows in float16 (force_upcast in its config): use bfloat16 or float32"
                + (", or load madebyollin/sdxl-vae-fp16-fix" if vae.config.latent_channels == 4 else "")
            )
        self._stages = (stages,)  # in a tuple, so that the autoencoder does not become a submodule

    @property
    def stages(self):
        """The decoder's stages."""
        return self._stages[0]

    def forward(self, z0_pred, z0):
        """Compare an estimate with its target, both in model space, (B, C, h, w). Raises ValueError for two shapes."""
        if (
            z0_pred.shape != z0.shape
        ):  # it would broadcast, e.g. when only one of them was reduced to the gated samples
            raise ValueError(f"z0_pred is {tuple(z0_pred.shape)} and z0 {tuple(z0.shape)}; they must have one shape")
        if len(z0) == 0:  # nothing was gated: no losses, with a graph all the same
            nothing = z0_pred.flatten(1).sum(dim=1).to(torch.promote_types(self.stages.dtype, torch.float32))
            layers = 1 + self.config.num_blocks
            return LPLOutput(nothing, nothing.new_zeros(layers, 0), nothing.new_ones(layers))
        with _without_autocast(z0.device.type), _own_checkpointing_off(self.stages.decoder):
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
        """Losses (b,), layer losses (L, b), inlier shares (L,) and d losses / d estimate of some samples."""
        image_size = [side * self.stages.upscaling for side in target.shape[2:]]
        tape = []  # per stage: its input, its output with the graph between (or None), d loss / d output
        losses, shares, weights = [], [], []
        first_height = None
        x, xh = target, estimate
        for index in range(1 + self.config.num_blocks):
            with torch.no_grad():  # the target first: its temporaries come while the estimate keeps less
                x = self.stages.run(index, x)
            source = xh
            output = self._run(index, source, keep_graph=needs_gradient and self.config.checkpointing == "none")
            xh = output.detach()
            first_height = first_height or x.shape[2]
            weight = first_height / x.shape[2] if self.config.pow_law else 1.0
            weights.append(weight / (1 + self.config.num_blocks))
            loss, share, gradient = self._compare(x, xh, image_size, weights[-1], needs_gradient)
            losses.append(loss)
            shares.append(share)
            if needs_gradient:
                tape.append((source, output if self.config.checkpointing == "none" else None, gradient))
        del x, xh, source, output, gradient  # the backward pass is where memory peaks
        per_layer = torch.stack(losses)
        per_sample = sum(weight * loss for weight, loss in zip(weights, per_layer, strict=True))
        gradient = self._backward(tape) / self._gradient_scale(image_size) if needs_gradient else None
        return per_sample, per_layer, torch.stack(shares), gradient

    def _run(self, index, source, keep_graph):
        """A stage of the estimate's walk; with its graph (`source` becomes its leaf) or without."""
        if not keep_graph:
            with torch.no_grad():
                return self.stages.run(index, source)
        with torch.enable_grad(), InputGradientOnly():
            return self.stages.run(index, source.requires_grad_())

    def _gradient_scale(self, image_size):
        """A power of two that keeps a float16 decoder's gradients, which shrink with the area, away from zero."""
        return 2.0 ** round(math.log2(image_size[0] * image_size[1])) if self.stages.dtype == torch.float16 else 1.0

    def _compare(self, x, xh, image_size, weight, needs_gradient):
        """One layer: its loss (b,), share of inliers (a scalar), weight * d loss / d xh, scaled, in xh's dtype.

        Works through the map block by block, so that the comparison's temporaries in float32 stay small and in cache.
        """
        config, kernels, mask = self.config, None, None
        dtype = torch.promote_types(x.dtype, torch.float32)
        if config.remove_outliers:
            ratio = x.shape[2] / image_size[0]
            kernels = morphology_kernels(ratio, image_size, config.outlier_reference_resolution)
        by_channels = config.norm_type in ("standard", "batch")  # else by rows of positions, which need the whole mask
        if kernels is not None and not by_channels:
            mask = self._mask(x, kernels, dtype)
        count = None if by_channels else inlier_count(x, mask, dtype)
        loss, inliers = x.new_zeros(len(x), dtype=dtype), x.new_zeros((), dtype=dtype)
        gradient = torch.empty_like(xh) if needs_gradient else None
        factor = loss.new_full(loss.shape, weight * self._gradient_scale(image_size) / x.shape[1])
        for block in _blocks(x, 1 if by_channels else 2):
            target = x[block].to(dtype, memory_format=torch.contiguous_format)
            estimate = xh[block].to(dtype, copy=True, memory_format=torch.contiguous_format)
            inlier = None if mask is None else mask[block]
            if kernels is not None and by_channels:
                inlier = inlier_mask(target, kernels, config.outlier_quantile)
            inliers += target.numel() if inlier is None else inlier.sum(dtype=dtype)
            with torch.set_grad_enabled(needs_gradient):
                estimate.requires_grad_(needs_gradient)
                counts = inlier_count(target, inlier, dtype) if by_channels else count
                part = block_loss(target, estimate, inlier, counts, config.norm_type, config.loss_type)
            loss += part.detach()
            if needs_gradient:
                gradient[block] = torch.autograd.grad(part, estimate, factor)[0]
        return loss / x.shape[1], inliers / x.numel(), gradient

    def _mask(self, x, kernels, dtype):
        """The layer's inliers, bool (b, C, H, W)."""
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for block in _blocks(x, 1):
            features = x[block].to(dtype, memory_format=torch.contiguous_format)
            mask[block] = inlier_mask(features, kernels, self.config.outlier_quantile)
        return mask

    def _backward(self, tape):
        """From the layers' gradients to the estimate's: the decoder's backward pass, the last stage first."""
        gradient = 0
        while tape:
            source, output, layer_gradient = tape.pop()
            if output is None:
                output = self._run(len(tape), source, keep_graph=True)
            gradient = layer_gradient.add_(gradient)
            (gradient,) = torch.autograd.grad(output, source, gradient)
        return gradient


@contextlib.contextmanager
def _own_checkpointing_off(decoder):
    """Inside, diffusers' checkpointing of this decoder is off: it would compute stages again outside our context."""
    on = [module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


def _without_autocast(device_type):
    """Context with autocast off, on devices that have it (the meta device has not)."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def _blocks(features, dim):
    """Indices that cut (B, C, H, W) features along `dim` into pieces of about two million elements (33 on a GPU)."""
    size = 2**21 if features.device.type == "cpu" else 2**25
    length = features.shape[dim]
    step = max(1, size * length // max(1, features.numel()))
    for start in range(0, length, step):
        piece = slice(start, min(start + step, length))
        yield (slice(None), piece) if dim == 1 else (slice(None), slice(None), piece)


class _WithGradient(torch.autograd.Function):
    """Values (B,) with a gradient (B, C, h, w) towards z0_pred that is known already."""

    @staticmethod
    def forward(ctx, z0_pred, values, gradient):
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    @once_differentiable  # the gradient is given, its own derivative is not
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return _per_sample(grad, gradient) * gradient, None, None
