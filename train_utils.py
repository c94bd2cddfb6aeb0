"""What the recipes share and nobody would edit: checkpoints, optimizers, metrics, pictures, estimates.

Checkpoints hold safetensors and JSON, never pickle. They are written to a temporary folder and renamed, so that a
folder called checkpoint-N is always complete.
"""

import contextlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cli_utils import SECRETS, UserError
from data_utils import sync_to_disk

CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def optimizer_to_tensors(optimizer):
    """An optimizer's state as (tensors by path, JSON-able rest); bitsandbytes nests its entries in dictionaries."""
    state = optimizer.state_dict()
    tensors, rest, storages = {}, {"param_groups": state["param_groups"], "values": {}}, set()

    def flatten(path, value):
        if isinstance(value, dict):
            for name, entry in value.items():
                flatten(f"{path}/{name}", entry)
        elif isinstance(value, torch.Tensor):
            shared = value.untyped_storage().data_ptr() in storages  # safetensors refuses tensors that share memory
            storages.add(value.untyped_storage().data_ptr())
            tensors[path] = value.clone() if shared else value.contiguous()
        else:
            rest["values"][path] = value

    for index, entries in state["state"].items():
        flatten(str(index), entries)
    return tensors, rest


def load_optimizer(optimizer, tensors, rest):
    """Put back what `optimizer_to_tensors` took."""
    state = {}
    for path, value in {**tensors, **rest["values"]}.items():
        index, *names, last = path.split("/")
        entries = state.setdefault(int(index), {})
        for name in names:
            entries = entries.setdefault(name, {})
        entries[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def list_checkpoints(output_dir):
    """[(step, folder)] of the complete checkpoints of a run, oldest first."""
    found = [(CHECKPOINT.match(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and (path / "training_state.json").is_file())


def save_checkpoint(output_dir, step, state, save_model, limit=None):
    """Write checkpoint-`step`, and only then remove the oldest beyond `limit`.

    state: a TrainingState; save_model: called with the folder, writes the trained weights in their usual layout.
    """
    output_dir = Path(output_dir)
    temporary = output_dir / f".tmp-checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(temporary)
    state.save(temporary, step)
    for path in [*temporary.rglob("*"), temporary]:
        sync_to_disk(path)
    final = output_dir / f"checkpoint-{step}"
    if final.exists():  # an older run's: it stays complete until the new one is
        os.replace(final, output_dir / f".old-checkpoint-{step}")
    os.replace(temporary, final)
    sync_to_disk(output_dir)
    shutil.rmtree(output_dir / f".old-checkpoint-{step}", ignore_errors=True)
    for _, folder in list_checkpoints(output_dir)[:-limit] if limit else []:
        shutil.rmtree(folder)
    return final


class TrainingState:
    """All of a run that is not weights: optimizer, LR schedule, scaler, EMA, LPL's running means, position.

    Noise, timesteps and data order follow from the seed and the step, so no generator has a state to save.
    """

    def __init__(self, optimizer, lr_scheduler, scaler=None, ema=None, auto_weight=None, identity=None):
        self.optimizer, self.lr_scheduler, self.scaler = optimizer, lr_scheduler, scaler
        self.ema, self.auto_weight, self.identity = ema, auto_weight, identity or {}

    def save(self, folder, step):
        """Write training_state.safetensors and training_state.json into a folder."""
        tensors, rest = optimizer_to_tensors(self.optimizer)
        tensors = {f"optimizer/{name}": value for name, value in tensors.items()}
        if self.ema is not None:
            tensors |= {f"ema/{index}": value.contiguous() for index, value in enumerate(self.ema.shadow_params)}
        if self.auto_weight is not None:
            tensors |= {f"auto_weight/{name}": value for name, value in self.auto_weight.state_dict().items()}
        schedule = {name: value for name, value in self.lr_scheduler.state_dict().items() if is_plain(value)}
        info = {
            "step": step,
            "optimizer": rest,
            "lr_scheduler": schedule,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema_step": self.ema.optimization_step if self.ema is not None else None,
            "identity": self.identity,
        }
        save_file(tensors, Path(folder) / "training_state.safetensors")
        (Path(folder) / "training_state.json").write_text(json.dumps(info, indent=1))

    def load(self, folder):
        """Restore from a checkpoint's folder; returns its step."""
        info = json.loads((Path(folder) / "training_state.json").read_text())
        tensors = load_file(Path(folder) / "training_state.safetensors")
        part = {}
        for name, value in tensors.items():
            kind, rest = name.split("/", 1)
            part.setdefault(kind, {})[rest] = value
        load_optimizer(self.optimizer, part.get("optimizer", {}), info["optimizer"])
        self.lr_scheduler.load_state_dict(info["lr_scheduler"])
        if self.scaler and info["scaler"]:
            self.scaler.load_state_dict(info["scaler"])
        if self.ema is not None:
            for index, shadow in enumerate(self.ema.shadow_params):
                shadow.copy_(part["ema"][str(index)])
            self.ema.optimization_step = info["ema_step"]
        if self.auto_weight is not None and "auto_weight" in part:
            self.auto_weight.load_state_dict(part["auto_weight"])
        return info["step"]


def is_plain(value):
    """Whether JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return isinstance(value, (int, float, str, bool, type(None)))


def checkpoint_to_resume(args):
    """The folder to resume from, or None for a fresh start. Raises UserError for none, or another run's."""
    folder = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if folder is not None:
        found, wanted = json.loads((folder / "training_state.json").read_text())["identity"], run_identity(args)
        different = [
            f"{key} was {found.get(key)}, is {value}" for key, value in wanted.items() if found.get(key) != value
        ]
        if different:
            flag = f"--resume_from_checkpoint {args.resume_from_checkpoint}"
            raise UserError(f"{flag}: {folder} is of another run ({', '.join(different)})")
    return folder


def find_checkpoint(resume_from_checkpoint, output_dir):
    """The folder that --resume_from_checkpoint means, or None."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            print(f"--resume_from_checkpoint latest: no checkpoint in {output_dir} yet, starting fresh")
        return found[-1][1] if found else None
    # the diffusers scripts look for the name inside the output folder
    for folder in (Path(resume_from_checkpoint), Path(output_dir) / Path(resume_from_checkpoint).name):
        if (folder / "training_state.json").is_file():
            return folder
    raise UserError(f"--resume_from_checkpoint {resume_from_checkpoint}: no checkpoint there, nor in {output_dir}")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def build_optimizer(args, parameters):
    """AdamW, or bitsandbytes' 8-bit AdamW."""
    settings = dict(
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)


def build_lr_scheduler(args, optimizer, max_train_steps):
    """The schedule, in optimizer steps: stepped once for each, whatever the accumulation and the number of ranks."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class Metrics:
    """Means of detached values that stay where they are until they are read, in one transfer.

    `add(name, value, count)` takes a scalar tensor (or a number of the host's) that is a sum over `count` items.
    """

    def __init__(self, device):
        self.device = device
        self.clear()

    def clear(self):
        """Start the next interval."""
        self.sums, self.counts = {}, {}

    def add(self, name, value, count=1):
        """Take in the sum of `count` items."""
        if isinstance(value, torch.Tensor):
            value = value.detach().to(torch.float32)
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    def read(self, accelerator, names):
        """{name: mean} over ranks and the interval, of those `names` that have any item; then start anew."""
        sums = [self.sums.get(name, 0.0) for name in names]
        host = [0.0 if isinstance(value, torch.Tensor) else value for value in sums] + [
            float(self.counts.get(name, 0)) for name in names
        ]
        packed = torch.tensor(host, device=self.device)
        for index, value in enumerate(sums):
            if isinstance(value, torch.Tensor):
                packed[index] = value
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
        values = packed.tolist()
        self.clear()
        pairs = zip(names, values[: len(names)], values[len(names) :], strict=True)
        return {name: total / count for name, total, count in pairs if count}


def to_device(tensor, device, dtype=None):
    """A CPU tensor on the device, by way of pinned memory where that keeps the host from waiting."""
    if torch.device(device).type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


class History:
    """The rows of log values of a run, in a file of JSON lines that a resumed run goes on with."""

    def __init__(self, path, first_step):
        self.path = Path(path)
        self.rows = []
        if first_step and self.path.is_file():
            rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            self.rows = [row for row in rows if row["step"] <= first_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, step, values):
        """Add a row."""
        self.rows.append({"step": step, **values})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def series(self, key):
        """(steps, values) of the rows that have the key."""
        rows = [row for row in self.rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]


class Reporter:
    """Everything a run says while it goes: progress bar, metrics file, trackers, `run.png`."""

    def __init__(self, args, accelerator, project, names, first_step):
        self.args, self.accelerator, self.names = args, accelerator, names
        self.metrics = Metrics(accelerator.device)
        self.output_dir = Path(args.output_dir)
        self.main = accelerator.is_main_process
        if self.main:
            self.history = History(self.output_dir / args.logging_dir / "metrics.jsonl", first_step)
            public = {key: value for key, value in vars(args).items() if key not in SECRETS}
            kinds = (int, float, str, bool)
            config = {key: value if isinstance(value, kinds) else str(value) for key, value in public.items()}
            accelerator.init_trackers(project, config)
        self.samples, self.since, self.warned = 0, time.perf_counter(), False

    def step(self, step, batch_size, lr, bar, last=False):
        """After an optimizer step: every --logging_steps read the metrics, in one transfer, and pass them on."""
        self.samples += batch_size
        if step % self.args.logging_steps and not last:
            return
        values = self.metrics.read(self.accelerator, self.names)
        now = time.perf_counter()
        values |= {"lr": lr, "samples_per_second": self.samples / (now - self.since)}
        self.samples, self.since = 0, now
        if not math.isfinite(values["train_loss"]):
            raise UserError(
                f"the loss became {values['train_loss']} before step {step} (diffusion {values['diffusion_loss']}, "
                f"LPL {values.get('lpl/loss')}); lower --learning_rate and go on with --resume_from_checkpoint latest"
            )
        if "lpl/weighted_loss" in values:
            values["lpl/share"] = values["lpl/weighted_loss"] / max(values["train_loss"], 1e-12)
        if self.main:
            self._pass_on(step, values, bar)

    def _pass_on(self, step, values, bar):
        self.history.append(step, values)
        self.accelerator.log(values, step=step)
        shown = {"diffusion": f"{values['diffusion_loss']:.4f}", "lr": f"{values['lr']:.1e}"}
        if "lpl/loss" in values:
            shown |= {"LPL": f"{values['lpl/loss']:.4f}", "share": f"{100 * values.get('lpl/share', 0):.0f} %"}
        bar.set_postfix(shown)
        if self.args.use_lpl and not self.warned and step >= 100 and self.args.lpl_weight != "auto":
            shares = self.history.series("lpl/share")[1]
            if shares and sum(shares) / len(shares) < 0.01:
                self.warned = True
                print("warning: LPL is under 1 % of the loss and hardly matters; raise --lpl_weight, or use auto")

    def log_images(self, rows, step):
        """Validation pictures, [(prompt, [images])], to the trackers."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                for number, (_, images) in enumerate(rows):
                    stacked = np.stack([np.asarray(image) for image in images])
                    tracker.writer.add_images(f"validation/{number}", stacked, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({prompt: images for prompt, images in rows}, step=step)
        self.since = time.perf_counter()  # drawing is not training
        for number, image in enumerate(image for _, images in rows for image in images):
            image.save(self.output_dir / f"image_{number}.png")

    def finish(self, title):
        """Draw `run.png` and say what there is to look at."""
        plot_run(self.history, self.output_dir / "run.png", title)
        grids = sorted((self.output_dir / "validation").glob("step-*.png"), key=lambda path: int(path.stem[5:]))
        print(f"\nDone. Results in {self.output_dir}; the run at a glance: {self.output_dir / 'run.png'}")
        if grids:
            print(f"Pictures before and after: {grids[0]} and {grids[-1]}")


@contextlib.contextmanager
def averaged_weights(ema, parameters):
    """Inside, the parameters hold EMA's average (when there is one); afterwards their own values again."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def sync_gradients(accelerator, model, last):
    """Context of a micro-step: ranks exchange gradients on the last one only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def validation_schedule(args, images, batch_size):
    """Function step -> whether a validation is due: every --validation_steps, else every --validation_epochs."""
    if args.validation_steps:
        return lambda step: step % args.validation_steps == 0
    every = args.validation_epochs * images  # samples
    return lambda step: step * batch_size // every > (step - 1) * batch_size // every


def run_identity(args):
    """What must be the same for a checkpoint to be resumed."""
    identity = {"use_lora": args.use_lora, "seed": args.seed, "use_ema": args.use_ema, "optimizer": args.use_8bit_adam}
    return identity | ({"rank": args.rank, "lora_layers": args.lora_layers} if args.use_lora else {})


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def image_grid(images, columns, gap=2):
    """PIL images of one size, pasted row by row on white."""
    from PIL import Image

    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return grid


def labelled_rows(rows, gap=2):
    """A grid with a caption over each row: rows is [(caption, [images])]; small images are enlarged to be seen."""
    from PIL import Image, ImageDraw, ImageFont

    size = rows[0][1][0].width
    factor = max(1, 160 // size)
    grids = []
    for caption, images in rows:
        images = [
            image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS) for image in images
        ]
        grids.append((caption, image_grid(images, len(images), gap)))
    font = ImageFont.load_default(size=max(13, grids[0][1].height // 28))
    band = int(font.size * 1.6)
    sheet = Image.new(
        "RGB", (max(grid.width for _, grid in grids), sum(grid.height + band for _, grid in grids)), "white"
    )
    top = 0
    for caption, grid in grids:
        ImageDraw.Draw(sheet).text((gap + 2, top + band * 0.15), caption[:200], fill="black", font=font)
        sheet.paste(grid, (0, top + band))
        top += band + grid.height
    return sheet


def plot_run(history, path, title):
    """Draw a run: losses, the loss per decoder layer, learning rate, throughput."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
    losses, layers, rate, speed = axes.flat
    for key, label in [
        ("train_loss", "total"),
        ("diffusion_loss", "diffusion"),
        ("lpl/weighted_loss", "weight × LPL"),
    ]:
        draw_curve(losses, *history.series(key), label)
    losses.set_title("losses")
    layer = 0
    while (series := history.series(f"lpl/features/layer_{layer}/loss"))[0]:
        draw_curve(layers, *series, "middle block" if layer == 0 else f"up block {layer}", plt.cm.viridis(layer / 5))
        layer += 1
    if layer:
        layers.set_yscale("log")
    else:
        layers.text(0.5, 0.5, "trained without LPL", ha="center", va="center", transform=layers.transAxes)
    layers.set_title("LPL per decoder layer, unweighted")
    draw_curve(rate, *history.series("lr"), None, smooth=False)
    rate.set_title("learning rate")
    rate.set_ylim(bottom=0)
    draw_curve(speed, *history.series("samples_per_second"), None, smooth=False)
    speed.set_title("samples per second")
    speed.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curve(axis, steps, values, label, color=None, smooth=True):
    """A thin line of values and a thick one of their running mean (over a tenth of the run)."""
    if not steps:
        return
    if not smooth or len(values) < 10:
        axis.plot(steps, values, label=label, color=color)
        return
    (thin,) = axis.plot(steps, values, alpha=0.25, linewidth=0.8, color=color)
    window = max(3, len(values) // 10)
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
    axis.plot(steps, means, label=label, color=thin.get_color())


# ---------------------------------------------------------------------------------------------------------------------
# Estimates before training


class SavedBytes:
    """Context that counts the bytes autograd keeps for the backward pass; on meta tensors it costs nothing.

    Leaves (parameters, inputs) are not counted: they are there anyway.
    """

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def _pack(self, tensor):
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = (
                storage,
                storage.nbytes(),
            )  # the storage itself: its id must not be reused
        return tensor

    @property
    def total(self):
        """Bytes."""
        return sum(size for _, size in self.storages.values())


def parameter_bytes(parameters):
    """Bytes of a collection of parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def gigabytes(count):
    """1234567890 -> "1.23 GB"; small ones in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
