"""A third family of models, for tests: an unconditional UNet that works on pixels, trained with LPL.

It has no autoencoder, no text encoders, one pixel per latent, and a loss on two stages of a network of its own.
"""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from lpl_finetuning import flags
from lpl_finetuning.base_model import Family, Part, check_base_model
from lpl_finetuning.data import encoding
from lpl_finetuning.data.images import to_pixel_values
from lpl_finetuning.data.scan import find_images
from lpl_finetuning.flag_checks import check_flags
from lpl_finetuning.lora_files import check_init_lora
from lpl_finetuning.results import export, hub
from lpl_finetuning.training import models, objective, optimization, perceptual, plan, reporter, run, validation
from lpl_finetuning.training.checkpoint_folders import check_resume
from lpl_finetuning.training.checkpoints import Checkpoints
from lpl_finetuning.training.signals import StopSignals
from lpl_finetuning.training.step_memory import Networks, RunCode
from lpl_finetuning.training.transfer import to_device
from lpl_utils import LatentSpace, estimate_z0, noise_to_signal

PIXELS = Family(
    name="pixels", title="Pixels", long_name="Pixel UNet", tag="pixels", pipeline="DDPM",
    denoiser=Part("unet", "UNet", "UNet2DModel", "pretrained_unet_model_name_or_path"),
    autoencoder=None, text_encoders=(), tokenizers=(), lora_layers=("to_k", "to_q"), pixels_per_latent=1,
    check=lambda args, base, configs: None,
)  # fmt: skip


def parse_args(argv=None):
    parser = flags.FlagParser(__doc__)
    flags.add_model_arguments(parser)
    flags.add_data_arguments(parser, resolution=20)
    flags.add_training_arguments(parser, train_batch_size=2, num_train_epochs=1, adam_weight_decay=1e-2)
    parser.add_argument("--pretrained_unet_model_name_or_path")
    flags.add_lpl_arguments(parser)
    flags.add_run_arguments(parser, validation_epochs=50)
    args = parser.parse(argv)
    check_flags(args, PIXELS)
    args = args.but(base_model=check_base_model(args, PIXELS))
    check_init_lora(args, PIXELS)
    check_resume(args)
    return args


class Schedule:
    weights_losses = False

    def __init__(self, args):
        abar = DDPMScheduler.from_pretrained(args.base_model.name, subfolder="scheduler").alphas_cumprod
        self.alphas, self.sigmas = abar.sqrt(), (1 - abar).sqrt()

    def draw_timesteps(self, uniform, resolution=None):
        return (uniform * len(self.alphas)).long()

    def held_out_timesteps(self, count):
        return self.draw_timesteps((torch.arange(count) + 0.5) / count)

    def levels(self, timesteps):
        return self.alphas[timesteps], self.sigmas[timesteps]

    def gated_share(self, gate):
        timesteps = torch.arange(len(self.alphas))
        return gate(timesteps, noise_to_signal(*self.levels(timesteps))).float().mean().item()

    def threshold_for(self, share, by_timestep):
        return f"--lpl_t_threshold {share * len(self.alphas):g}"

    def describe(self):
        return "pixels"


class Edges(torch.nn.Module):
    """Two stages: eight fixed random filters, then sixteen at half the size."""

    names, upscaling, input_space, dtype = ("fine edges", "coarse edges"), 1, LatentSpace(), torch.float32

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("first", torch.randn(8, 3, 3, 3, generator=generator))
        self.register_buffer("second", torch.randn(16, 8, 3, 3, generator=generator) / 8)

    def __len__(self):
        return 2

    def run(self, index, x):
        return torch.nn.functional.conv2d(x, self.second if index else self.first, stride=1 + index, padding=1).tanh()


class Denoiser(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def models(self):
        return {"unet": self.unet}

    def forward(self, noisy_latents, timesteps, prompt):
        return self.unet(noisy_latents, timesteps).sample


def build_denoiser(args, dtype, device):
    denoiser = Denoiser(models.load_denoiser(args, UNet2DModel, dtype, device))
    return models.prepare_for_training(args, denoiser, DDPMPipeline, PIXELS.lora_layers, device)


def encode(cuts):
    pixels = torch.stack([to_pixel_values(array) for array, _ in cuts]).float()
    return encoding.rows_of({"mean": pixels, "std": torch.zeros_like(pixels), "time_ids": torch.zeros(len(cuts), 6)})


def encode_nothing(captions):
    return encoding.rows_of({"nothing": torch.zeros(len(captions), 1)})


def denoise(denoiser, latents, noise, timesteps, goal):
    levels = to_device(torch.stack(goal.schedule.levels(timesteps)), goal.device)
    alpha, sigma = levels.view(2, -1, 1, 1, 1)
    noisy_latents = alpha * latents + sigma * noise
    model_pred = denoiser(noisy_latents, to_device(timesteps, goal.device), {})
    return (model_pred - noise).square().mean(dim=(1, 2, 3)), model_pred, noisy_latents


def perceptual_loss(model_pred, noisy_latents, latents, timesteps, goal):
    alpha, sigma = to_device(torch.stack(goal.schedule.levels(timesteps)), goal.device)
    z0_pred = estimate_z0(model_pred, noisy_latents, alpha, sigma, "epsilon")
    return goal.perceptual.loss(z0_pred, latents)


def training_step(batch, denoiser, goal, step, metrics):
    latents = objective.sample_latents(batch, goal)
    noise = to_device(batch["noise"], goal.device)
    timesteps = objective.sample_timesteps(batch["number"], latents, goal)
    errors, *tensors = denoise(denoiser, latents, noise, timesteps, goal)
    goal.guard.watch("diffusion loss", errors, batch["index"])
    diffusion_loss, lpl_terms, gated = errors.mean(), (), 0
    if goal.lpl_applies(step):
        tensors = (*tensors, latents)
        lpl_terms, gated = goal.perceptual_terms(perceptual_loss, tensors, timesteps, batch, metrics)
    loss = goal.total(diffusion_loss, lpl_terms, step, metrics)
    return loss, torch.stack([diffusion_loss, *lpl_terms, torch.full_like(diffusion_loss, gated)]).detach()


def held_out_step(conditions, latents, noise, timesteps, with_lpl, denoiser, goal):
    errors, *tensors = denoise(denoiser, latents, noise, timesteps, goal)
    return errors, perceptual_loss(*tensors, latents, timesteps, goal).per_sample if with_lpl else None


def example_batch(denoiser, args, size, dtype):
    numbers, pixels = torch.arange(args.train_batch_size).numpy(), torch.zeros(args.train_batch_size, 3, *size)
    return {"number": numbers, "index": numbers, "mean": pixels, "std": pixels}


def networks(args, machine):
    return Networks(None, {"edges": Edges().to(machine.device)}, None, LatentSpace())


def main(args, scan, held_out=()):
    accelerator, gate = run.start_accelerator(args), perceptual.gate_from_flags(args, t_threshold=500)
    settled = plan.plan_run(args, accelerator, Schedule(args), len(scan.images))
    report = plan.check_data(args, scan, held_out, [], accelerator)
    code = RunCode(build_denoiser, training_step, example_batch, networks)
    plan.print_plan(args, report, accelerator, settled, gate, code)
    output_dir = run.open_output_dir(args, accelerator, settled.resume_from, report, hub.check_access)
    with output_dir, StopSignals(accelerator) as signals:
        train(args, scan.images, held_out, settled, accelerator, signals, gate)
    run.end(accelerator)


def train(args, images, held_out, settled, accelerator, signals, gate):
    store = {"kind": "none"}, 4, 3, encode_nothing, encode
    data = encoding.fill_caches(flags.encoding_settings(args), images, held_out, accelerator, *store)
    parts = LatentSpace(), {"edges": Edges()}, None, data.prompt(""), False, gate
    goal = objective.build_objective(args, accelerator, settled, data, *parts)
    denoiser = build_denoiser(args, settled.dtype, accelerator.device)
    settings = optimization.optimizer_settings(args, settled.batch_size)
    trainee = optimization.Trainee(settings, accelerator, denoiser, settled.total_steps, goal.guard)
    checkpoints = Checkpoints(
        args, accelerator, trainee, goal, signals,
        save_weights=lambda folder, denoiser: models.save_weights(folder, denoiser, DDPMPipeline, args.use_lora),
        load_weights=lambda folder, denoiser: models.load_weights(folder, denoiser, args.use_lora),
    )  # fmt: skip
    subject = reporter.fine_tuning(args, goal.stage_names)
    said = reporter.Reporter(args, accelerator, subject, settled.first_step, settled.total_steps)
    validate = validation.Validation(args, accelerator, trainee, goal, data, said, signals, (None, None, 0),
                                     (lambda batch, goal, dropout: (), held_out_step, denoise))  # fmt: skip
    done = checkpoints.resume(settled.resume_from, settled.total_steps)
    with run.open_batches(args, data, accelerator, goal, done, settled.total_steps) as micro_batches:
        for step in said.steps():
            for batch in trainee.micro_steps(micro_batches):
                trainee.backward(*training_step(batch, trainee.denoiser, goal, step, said.metrics))
            done = step + 1
            outcome = trainee.step(done, (signals.requested is not None, checkpoints.late()), said.metrics)
            goal.update_lpl_weight(step, trainee.terms, accelerator)
            said.step(done, outcome, settled.batch_size, trainee.log_values())
            if checkpoints.due(done, outcome, settled.total_steps):
                checkpoints.save(done)
    trainee.release()
    validate.run(done)
    if accelerator.is_main_process:
        export.save_result(args, denoiser, DDPMPipeline, lambda unet: DDPMPipeline(unet, DDPMScheduler()), images,
                           settled, done)  # fmt: skip
    said.finish()


if __name__ == "__main__":
    ARGS = parse_args()
    main(ARGS, *find_images(flags.data_source(ARGS)))
