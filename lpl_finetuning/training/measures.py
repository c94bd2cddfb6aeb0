"""Measures of a model in training, under --validation_metrics: the one-step test, and a KID of samples.

Both use the held-out images. Log keys:

- `validation/one_step/NAME/snr+2.5`: mean over the held-out images of a number of the one-step test at a log-SNR
  level; NAME as in `OneStepMeter`, with `_` for blanks. `validation/one_step/NAME`: the mean over the levels.
- `validation/kid`: kernel distance between samples of the held-out captions, at guidance 1, and the held-out images.

Targets and real images are decoded from their encodings, so that the autoencoder's own error does not count.
Shapes: B samples in a batch, C channels, h w of a latent, D features.
"""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from lpl_finetuning.data.samples import collate
from lpl_finetuning.evaluation.generation import start_noise
from lpl_finetuning.evaluation.models import sampling_scheduler
from lpl_finetuning.evaluation.networks import DEFAULT_NETWORK, load_network
from lpl_finetuning.evaluation.onestep import OneStepMeter, OneStepSettings, levels_of_schedule, noisy, to_bytes
from lpl_finetuning.training.objective import autocast
from lpl_finetuning.training.transfer import to_device
from lpl_utils import estimate_z0

SAMPLES_AT_ONCE = 1024**2  # pixels


@dataclass(frozen=True)
class MeasureSettings:
    """The flags about measures; each field has the name of its flag."""

    validation_metrics: bool
    validation_kid_every: int
    validation_kid_samples: int


class Measures:
    """The one-step test and the KID of a run."""

    def __init__(self, settings, objective, data, conditioning, denoise, vae):
        """
        Args:
            settings: the `MeasureSettings`; objective: the `Objective`; data: the `RunData`.
            conditioning, denoise: the script's functions.
            vae: the autoencoder that decodes.
        """
        self.settings, self.objective, self.data = settings, objective, data
        self.conditioning, self.denoise = conditioning, denoise
        self.network = feature_network(objective.device) if settings.validation_kid_every else None
        self.meter = OneStepMeter(vae, [self.network] if self.network else ())
        self.levels, self.one_step_settings = levels_of_schedule(objective.schedule), OneStepSettings()
        self.real = None  # features of the held-out images, (N, D), from the first KID on

    # -----------------------------------------------------------------------------------------------------------------
    # The one-step test

    def one_step_names(self):
        """The log keys of the one-step test at each level."""
        return [one_step_key(name, log_snr) for name in self.meter.names for log_snr in self.levels.log_snr]

    def one_step(self, denoiser, numbers):
        """Generator of (log key, values (B,)) of held-out images with these numbers, of one shape."""
        objective, levels = self.objective, self.levels
        batch = held_out_batch(self.data, numbers)
        z0 = objective.space.to_model(to_device(batch["mean"].float(), objective.device))
        target, conditions = self.meter.target(z0), self.conditioning(batch, objective, 0)
        for level, log_snr in enumerate(levels.log_snr):
            _, eps = noisy(z0, level, numbers, levels, self.one_step_settings)
            timesteps = levels.timesteps[level].repeat(len(numbers))
            with autocast(objective):
                _, out, z_t = self.denoise(denoiser, z0, eps, timesteps, conditions, objective)
            alpha_sigma = objective.schedule.levels(timesteps)
            z0_pred = estimate_z0(out, z_t, *alpha_sigma, objective.schedule.prediction_type)
            for name, values in self.meter.compare(z0_pred, target).items():
                yield one_step_key(name, log_snr), values

    # -----------------------------------------------------------------------------------------------------------------
    # The distance of samples

    def kid_due(self, number):
        """Whether validation `number`, from 0, measures the KID."""
        every = self.settings.validation_kid_every
        return bool(every) and number % every == 0

    def kid(self, pipeline, steps, prompt_arguments, decode, accelerator, stop):
        """The KID of the model, a number; None where `stop` broke it off. All ranks call it and share the work.

        Args:
            pipeline: a diffusers pipeline without text encoders; it gets a sampler of its own.
            steps: of that sampler.
            prompt_arguments: function prompts -> arguments of the pipeline.
            decode: function latents -> decoded images (B, 3, H, W).
            accelerator: of the run.
            stop: function that says whether to break off; with several ranks it must be the same on all.
        """
        pipeline.scheduler = sampling_scheduler(pipeline, steps=steps)
        pipeline.set_progress_bar_config(disable=True)
        count, space = self.settings.validation_kid_samples, self.objective.space

        def encoded(numbers):
            return space.to_model(to_device(held_out_batch(self.data, numbers)["mean"], self.objective.device))

        if self.real is None:
            self.real = self._features(len(self.data.held_out), encoded, decode, accelerator, stop)

        def sampled(numbers):
            size = self._size(numbers[0])
            noise = torch.cat([start_noise(pipeline, 0, f"kid {number}", size) for number in numbers])
            images = [self.data.held_out[number % len(self.data.held_out)] for number in numbers]
            prompts = [self.data.captions.text(image.caption) for image in images]
            with autocast(self.objective):
                return pipeline(
                    **prompt_arguments(prompts), latents=noise, num_inference_steps=steps, guidance_scale=1.0,
                    height=size[0], width=size[1], output_type="latent",
                ).images  # fmt: skip

        from lpl_finetuning.evaluation.distances import kernel_distance

        made = self._features(count, sampled, decode, accelerator, stop) if self.real is not None else None
        return None if made is None else float(kernel_distance(self.real, made))

    def _features(self, count, latents_of, decode, accelerator, stop):
        """Features of `count` pictures, float32 (count, D) on the CPU of every rank; None where broken off.

        latents_of: function numbers -> latents (B, C, h, w).
        """
        features = torch.zeros(count, self.network.dims, device=accelerator.device)
        batches = self._batches(count)
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        quiet = not accelerator.is_main_process
        for numbers in tqdm(mine, desc="pictures for KID", leave=False, disable=quiet):
            if stop():
                return None
            features[numbers] = self.network(to_bytes(decode(latents_of(numbers)))).to(features)
        return accelerator.reduce(features, "sum").cpu().numpy()

    def _size(self, number):
        """(height, width) in px of the held-out image that a picture number stands for; the numbers go round."""
        framing = self.data.held_out_framing
        return framing.sizes[framing.buckets[number % len(self.data.held_out)]]

    def _batches(self, count):
        """Lists of picture numbers below `count`, each of one size."""
        groups = {}
        for number in range(count):
            groups.setdefault(self._size(number), []).append(number)
        for (height, width), numbers in list(groups.items()):
            at_once = max(1, SAMPLES_AT_ONCE // (height * width))
            groups[height, width] = [numbers[first : first + at_once] for first in range(0, len(numbers), at_once)]
        return [numbers for batches in groups.values() for numbers in batches]


def feature_network(device):
    """The network of KID and of the perceptual distance; its packages are in requirements-eval.txt."""
    return load_network(DEFAULT_NETWORK, device)


def held_out_batch(data, numbers):
    """The batch of held-out images with these numbers, as training has it: {"mean", "number", the prompt, …}."""
    batch = collate([latent | prompt for latent, prompt in map(data.held_out_entry, numbers)])
    batch["number"] = numbers
    return batch


def one_step_key(name, log_snr):
    """The log key of a number of the one-step test at a level."""
    return f"validation/one_step/{name.replace(' ', '_')}/snr{log_snr:+g}"
