"""The latent perceptual loss as terms of the objective: its networks, gate, weights and log values.

Each network of --lpl_features has a loss and a term of its own. Shapes: B samples in a micro-batch, b gated samples,
C channels, h w of a latent.
"""

import math
import sys

import numpy as np
import torch
from diffusers import AutoencoderTiny

from lpl_finetuning.data.encoding import encode_images
from lpl_finetuning.data.images import to_pixel_values
from lpl_finetuning.errors import DataError
from lpl_finetuning.flags import feature_fractions, feature_parts, framing_rules
from lpl_finetuning.networks.checks import check_encoder, chosen_stages
from lpl_finetuning.networks.latent_classifier import LatentClassifier
from lpl_finetuning.sample_prompts import entries_of
from lpl_finetuning.training.transfer import to_device
from lpl_utils import (
    AutoWeight,
    DecoderStages,
    IdentityStages,
    LatentPerceptualLoss,
    LPLConfig,
    LPLGate,
    SelectedStages,
    TinyDecoderStages,
    lpl_noise_scale,
)

CHECKED_PICTURES, ALIKE = 8, 0.6  # that a tiny decoder is checked with, and the least correlation

# ---------------------------------------------------------------------------------------------------------------------
# From flags


def lpl_config(args, network="decoder"):
    """The `LPLConfig` of the flags for a network. By default one image of 1024 px, or as many pixels, at a time.

    A network that keeps the latents' size takes as many more samples at a time as a latent stands for pixels.
    """
    by_default = "stage" if args.gradient_checkpointing else "none"
    pixels = 1024**2
    if network in ("classifier", "latent"):
        pixels *= args.base_model.family.pixels_per_latent**2
    return LPLConfig(
        norm_type=args.lpl_norm_type,
        norm_gradient=args.lpl_norm_gradient,
        loss_type=args.lpl_loss_type,
        pow_law=args.lpl_pow_law,
        remove_outliers=args.lpl_remove_outliers,
        outlier_reference_resolution=args.lpl_outlier_reference_resolution or None,
        checkpointing=args.lpl_checkpointing or by_default,
        batch_size=args.lpl_batch_size or max(1, round(pixels / math.prod(framing_rules(args).largest_size()))),
    )


def lpl_stages(args, vae, machine):
    """{network: `FeatureStages`} of --lpl_features.

    Args:
        vae: the autoencoder; None where no network needs it.
        machine: has the `device`, where "meta" takes no memory, and the `mixed_precision`.
    """
    dtype, stages = lpl_dtype(args, machine.mixed_precision), {}
    for network in feature_parts(args):
        if network == "latent":
            stages[network] = IdentityStages(args.base_model.family.pixels_per_latent)
        elif network == "tiny_decoder":
            tiny = load_feature_network(AutoencoderTiny, args.lpl_tiny_decoder, dtype, machine.device)
            tiny.encoder = None  # frees its memory
            blocks = len(tiny.config.num_decoder_blocks) - 1
            stages[network] = TinyDecoderStages(tiny, min(args.lpl_num_blocks, blocks))
        elif network == "classifier":
            classifier = load_feature_network(LatentClassifier, args.lpl_classifier, dtype, machine.device)
            if str(machine.device) != "meta":
                check_encoder(f"--lpl_classifier {args.lpl_classifier}", classifier.config, args.base_model, True)
            stages[network] = SelectedStages(classifier, chosen_stages(args, classifier.config))
        else:
            stages[network] = DecoderStages(vae, args.lpl_num_blocks, rgb=network == "rgb")
    return stages


def load_feature_network(cls, name, dtype, device):
    """A frozen network of a diffusers class, from a folder or the Hub; on the meta device without weights."""
    if str(device) == "meta":
        with torch.device("meta"):
            network = cls.from_config(cls.load_config(name))
    else:
        network = cls.from_pretrained(name, use_safetensors=True, dtype=dtype)
    network = network.requires_grad_(False).eval()
    return torch.nn.Module.to(network, device=device, dtype=dtype, memory_format=torch.channels_last)


def check_tiny_decoder(stages, data, space, encoder=None):
    """Warn where the tiny decoder does not paint the run's pictures: then it belongs to another autoencoder.

    Nothing in its files says to which one, and a wrong one of as many channels trains without a sign. Painted and true
    deviations from a picture's mean colour are correlated: so contrast and brightness do not count.

    Args:
        stages: {network: `FeatureStages`}; data: the `RunData`; space: the `LatentSpace` of the stored latents.
        encoder: the autoencoder of a run without stored latents.
    """
    images = data.images
    if "tiny_decoder" not in stages or not len(images):
        return
    tiny, sums = stages["tiny_decoder"], np.zeros(3)
    for number in np.unique(np.linspace(0, len(images) - 1, CHECKED_PICTURES).astype(int)).tolist():
        view = data.framing.views(number, images[number])[0]
        try:
            picture = data.framing.cut(images[number], view)
        except DataError:  # to be said where the picture is needed
            continue
        key = view.key(images[number].pixels)
        mean = (data.latents.get(key) if data.cached else encode_images([picture], encoder)[0])["mean"]
        z = tiny.input_space.from_model(space.to_model(mean))[None]
        with torch.no_grad():
            painted = tiny.vae.decoder(to_device(z, tiny.network[0].weight.device).to(tiny.dtype))[0]
        found, true = (pixels.double().cpu() - pixels.double().cpu().mean(dim=(1, 2), keepdim=True)
                       for pixels in (painted, to_pixel_values(picture[0])))  # fmt: skip
        sums += [(found * true).sum().item(), found.square().sum().item(), true.square().sum().item()]
    both, painted, true = sums
    if true > 0 and not both > ALIKE * math.sqrt(painted * true):  # so that NaN is told too
        print("warning: --lpl_tiny_decoder does not paint the training pictures: the correlation is "
              f"{both / math.sqrt(painted * true or 1):.2f}, and the right one's is near 1. Is it that of another "
              "autoencoder?", file=sys.stderr)  # fmt: skip


def needs_decoder(args, measured):
    """Whether a run decodes latents. measured: whether it uses or measures the perceptual loss."""
    features = measured and bool(feature_parts(args).keys() & {"decoder", "rgb"})
    return features or bool(entries_of(args)) or args.validation_metrics


def gate_from_flags(args, **by_default):
    """The `LPLGate` of the flags; by_default: the threshold where no flag gives one."""
    if args.lpl_t_threshold is None and args.lpl_sigma_threshold is None:
        return LPLGate(**by_default, resolution=args.resolution)
    return LPLGate(args.lpl_t_threshold, args.lpl_sigma_threshold, args.lpl_threshold_resolution, args.resolution)


def lpl_dtype(args, mixed_precision):
    """The dtype of the decoder in the loss: --lpl_vae_dtype, else bfloat16 under bf16 and float32 otherwise."""
    name = args.lpl_vae_dtype or ("bfloat16" if mixed_precision == "bf16" else "float32")
    return getattr(torch, name)


def build_perceptual_term(args, stages, gate, device):
    """The `PerceptualTerm` of a run.

    Args:
        stages: {network: `FeatureStages`}; gate: the `LPLGate`.
    """
    losses = {network: LatentPerceptualLoss(each, lpl_config(args, network)) for network, each in stages.items()}
    fractions = feature_fractions(args)
    loss = LossOfNetworks(losses, [fractions.get(network, 1 / len(losses)) for network in losses])
    weights = args.lpl_weight if isinstance(args.lpl_weight, list) else [args.lpl_weight] * len(losses)
    if args.lpl_weight == "auto":
        weights = [AutoWeight(args.lpl_share, fraction=fraction).to(device) for fraction in loss.fractions]
    if not args.use_lpl:
        weights = [0.0] * len(losses)
    start = args.lpl_start if args.use_lpl else None
    return PerceptualTerm(loss, gate, weights, start, args.lpl_scale, args.lpl_augment)


# ---------------------------------------------------------------------------------------------------------------------
# The term


class OutputOfNetworks:
    """The `LPLOutput` of each network for the same samples.

    Attributes:
        outputs: {network: `LPLOutput`}.
        fractions: parts of the networks of the loss, which add up to 1.
    """

    def __init__(self, outputs, fractions):
        self.outputs, self.fractions = outputs, fractions

    @property
    def per_layer(self):
        """[(b,)] losses of all stages of all networks, unweighted, detached."""
        return [values for output in self.outputs.values() for values in output.per_layer]

    @property
    def per_sample(self):
        """(b,) losses: of several networks the weighted geometric mean, in which no network's scale counts."""
        losses = [output.per_sample for output in self.outputs.values()]
        if len(losses) == 1:
            return losses[0]
        return math.prod(loss**fraction for loss, fraction in zip(losses, self.fractions, strict=True))


class LossOfNetworks:
    """The latent perceptual loss through one network or several: `loss(z0_pred, z0) -> OutputOfNetworks`.

    Attributes:
        losses: {network: `LatentPerceptualLoss`}.
        fractions: parts of the networks of the loss, which add up to 1.
    """

    def __init__(self, losses, fractions):
        self.losses, self.fractions = losses, fractions

    def __call__(self, z0_pred, z0):
        """Compare estimates with their targets, (b, C, h, w) each, in model space."""
        return OutputOfNetworks({name: loss(z0_pred, z0) for name, loss in self.losses.items()}, self.fractions)

    @property
    def stage_names(self):
        """Names of all stages, with the network's before them where there are several."""
        several = len(self.losses) > 1
        return tuple(f"{network}: {name}" if several else name
                     for network, loss in self.losses.items() for name in loss.stages.names)  # fmt: skip


class PerceptualTerm:
    """The perceptual terms of the objective, one for each network: their gate, weights and log values.

    Attributes:
        loss: the `LossOfNetworks`.
        gate: the `LPLGate`.
        auto_weight: the state of the automatic weights, a module; None where --lpl_weight is a number.
        start: first step (from 0) with the terms; None where the loss is measured on held-out images only.
        augments: whether estimate and target are augmented alike.
    """

    def __init__(self, loss, gate, weights=(), start=None, noise_scale=False, augments=False):
        """
        Args:
            weights: of the networks, each a number or an `AutoWeight`.
            noise_scale: whether each sample is weighted by alpha^2 / (alpha^2 + sigma^2).
        """
        self.loss, self.gate, self.start, self.noise_scale, self.augments = loss, gate, start, noise_scale, augments
        self._weights, self.auto_weight = weights, None
        if weights and isinstance(weights[0], AutoWeight):
            several = len(weights) > 1
            self.auto_weight = torch.nn.ModuleDict(zip(loss.losses, weights, strict=True)) if several else weights[0]

    def applies(self, step):
        """Whether the objective has the terms at a step, counted from 0."""
        return self.start is not None and step >= self.start

    def weights(self):
        """The weight of each network's term: numbers, or scalar tensors on the device."""
        return [weight() if self.auto_weight is not None else float(weight) for weight in self._weights]

    def update_weight(self, step, terms, micro_batches, accelerator):
        """Take a step into the automatic weights.

        Args:
            terms: (2 + networks,) diffusion loss, LPL terms and number of gated samples of the average micro-batch of
                this rank.
            micro_batches: of the step, on all ranks together.
        """
        if self.auto_weight is not None and self.applies(step):
            diffusion, *lpl_terms, gated = accelerator.reduce(terms, "mean")
            for weight, lpl_term in zip(self._weights, lpl_terms, strict=True):
                weight.update(diffusion, lpl_term, gated * micro_batches)

    def key(self, network, what):
        """The log key of a network's loss, weight or weighted loss; without its name where it is the only one."""
        return f"lpl/{network}/{what}" if len(self.loss.losses) > 1 else f"lpl/{what}"

    def nothing(self, latents, metrics):
        """The terms of a micro-step without gated samples: a scalar 0 for each network. metrics: takes the zeros."""
        for network in self.loss.losses:
            metrics.add(self.key(network, "loss"), 0.0)
        return [latents.new_zeros(())] * len(self.loss.losses)

    def totals(self, output, gated, levels, batch_size, metrics):
        """[(1 / B) * sum over gated samples of s_b * LPL_b] of the networks: scalars, divided by the batch size B.

        Args:
            output: `OutputOfNetworks` of the gated samples, in their order.
            gated: (b,) their indices in the batch.
            levels: alpha, sigma of the gated samples, (b,) each, on the CPU.
            metrics: takes the terms, and the loss and the share of outliers of every stage.
        """
        terms, layer = [], 0
        for network, each in output.outputs.items():
            for values, inliers in zip(each.per_layer, each.inlier_fraction, strict=True):
                metrics.add(f"lpl/features/layer_{layer}/loss", values.sum(), len(gated))
                metrics.add(f"lpl/features/layer_{layer}/outlier_ratio", (1 - inliers) * len(gated), len(gated))
                layer += 1
            per_sample = each.per_sample
            if self.noise_scale:
                per_sample = to_device(lpl_noise_scale(*levels), per_sample.device) * per_sample
            terms.append(per_sample.sum() / batch_size)
            metrics.add(self.key(network, "loss"), terms[-1])
        return terms

    def weighted(self, terms, metrics):
        """The sum over networks of weight * term, a scalar. metrics: takes weights and weighted terms."""
        products = []
        for network, weight, term in zip(self.loss.losses, self.weights(), terms, strict=True):
            products.append(weight * term)
            metrics.add(self.key(network, "weight"), weight)
            metrics.add(self.key(network, "weighted_loss"), products[-1])
        total = sum(products[1:], products[0])
        if len(products) > 1:
            metrics.add("lpl/weighted_loss", total)
        return total
