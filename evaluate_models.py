"""Which of several models makes the better pictures, and how sure is that: distances, a one-step test, a report.

    python evaluate_models.py --real my-pictures --model without-lpl --model with-lpl --output report
    python evaluate_models.py --real my-pictures --model BASE+lora-a --model BASE+lora-b --held_out held-out \\
        --output report
    python evaluate_models.py --real my-pictures --model folder-of-pictures --model BASE --output report

A model is the folder or Hub name of a pipeline, BASE+LORA, BASE+CHECKPOINT, or a folder of finished pictures that are
named like the real ones. The first model is the baseline. The result is report/report.html, which opens in any
browser, and report/metrics.json. The same command, started again, does only what is missing.

Top to bottom: the flags, what they name, making pictures, comparing pictures, the one-step test, the report. Pictures
are (height, width) in px; N pictures, D features of a network. Differences are b minus a.
"""

# ruff: noqa: E402  (flags, models and pictures are checked before the slow imports)
import argparse
import contextlib
import datetime
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lpl_finetuning.base_model import read_object
from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.data.tables import CaptionedImage, first_of, select
from lpl_finetuning.errors import UserError, counted, first_names, require
from lpl_finetuning.evaluation.models import SAMPLERS, EvaluatedModel, ModelSource, check_steps, find_source
from lpl_finetuning.evaluation.networks import DEFAULT_NETWORK, check_clip, check_network
from lpl_finetuning.evaluation.picture_sets import PictureSet, cut_pictures, short_labels, stems_of
from lpl_finetuning.files import digest, write_whole
from lpl_finetuning.flags import FlagParser, Flags, input_path, path
from lpl_finetuning.start import early, run_main

NETWORKS = (DEFAULT_NETWORK, "efficientnet-lite0")
ONE_STEP_PICTURES = 256  # of the one-step test; its numbers are paired, so more would hardly sharpen them
FEW_PICTURES = 16  # below, no distance is worth its name
NO_CAPTIONS = {"default_caption": ""}  # options of a scan in which captions do not matter
MADE_ONLY = ("steps", "guidance", "sampler", "dtype")  # flags that only models need
CAPTIONED_ONLY = ("instance_prompt", "caption_from_folder")  # flags that models and CLIPScore need


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Several(argparse.Action):
    """A flag that is given once for each of its values."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Append the value."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), values])


def build_parser() -> FlagParser:
    """All flags of the command."""
    parser = FlagParser(__doc__.split("\n\nTop to bottom")[0])
    add = parser.add_argument_group("what is compared").add_argument
    add("--real", type=input_path, metavar="FOLDER", help="real pictures with captions, as for --train_data_dir")
    add("--model", action=Several, metavar="MODEL", help="a pipeline, BASE+LORA, BASE+CHECKPOINT, or a folder of "
        "pictures; once for each model, the baseline first")  # fmt: skip
    add("--output", type=path, metavar="FOLDER", help="where the report and everything it needs are kept")
    add("--held_out", type=input_path, metavar="FOLDER", help="captioned pictures that no model was trained on, for "
        "the one-step test and for telling copies")  # fmt: skip
    add("--max_pictures", type=int, help="use so many of the real pictures, evenly spaced (default: all)")
    add("--max_captions", type=int, help="make pictures for so many of their captions, evenly spaced; distances still "
        "compare with all of them (default: all)")  # fmt: skip
    add("--instance_prompt", help="caption of pictures without one")
    add("--caption_column", default="text", help="column of the captions in listings (default: %(default)s)")
    add("--caption_from_folder", action="store_true", help="a folder's name for pictures without a caption")
    add("--follow_links", action="store_true", help="use pictures outside the folders that links in them lead to")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="leave out unreadable pictures, or stop "
        "(default: %(default)s)")  # fmt: skip
    add = parser.add_argument_group("how pictures are made").add_argument
    add("--steps", type=int, default=25, help="of the sampler (default: %(default)s)")
    add("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="scales of classifier-free guidance; 1 is "
        "without (default: 1 3)")  # fmt: skip
    add("--size", type=int, help="width and height, px (default: what the models make by themselves)")
    add("--sampler", choices=SAMPLERS, default="auto", help="auto: ddim for epsilon and v, euler for flow; own: the "
        "pipeline's (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of pictures, noise and intervals (default: %(default)s)")
    add = parser.add_argument_group("how pictures are compared").add_argument
    add(
        "--network",
        action=Several,
        metavar="NETWORK",
        help="efficientnet-lite2, efficientnet-lite0, inception "
        "(FID), or the folder or Hub name of a transformers vision model; once for each (default: the first two)",
    )
    add("--clip_model", metavar="MODEL", help="folder or Hub name of a CLIP model, for CLIPScore (default: none)")
    add("--one_step", action="store_true", default=True, help="the one-step test (default: on)")
    add = parser.add_argument_group("run").add_argument
    add("--batch_size", type=int, help="pictures at a time (default: by their size)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the models; auto: "
        "bfloat16 on a GPU, else float32 (default: %(default)s)")  # fmt: skip
    add("--config_from", type=path, metavar="PIPELINE", help="folder or Hub name of a pipeline with what single files "
        "lack: text encoders, or configurations of other sizes")  # fmt: skip
    add("--cache_dir", type=path, help="cache of the scans and of unpacked single files (default: the user's cache)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Flags:
    """The flags, checked one by one and together.

    Raises:
        UserError: a flag is missing, unknown, out of range, or contradicts another flag.
    """
    args = build_parser().parse(argv)
    for name, what in (("real", "a folder of real pictures"), ("model", "a model"), ("output", "a folder")):
        require(getattr(args, name), f"--{name} is missing: name {what}")
    args = args.but(network=args.network or list(NETWORKS))
    for name in ("real", "held_out"):
        folder = getattr(args, name)
        require(folder is None or Path(folder).is_dir(), f"--{name} {folder}: there is no such folder")
    for name in ("steps", "size", "batch_size", "max_pictures", "max_captions"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} is {value}; it must be above 0")
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}; it must be 0 or more, and less than 2**63")
    require(all(1 <= value < math.inf for value in args.guidance),
            f"--guidance is {' '.join(map(str, args.guidance))}; each must be 1 or more")  # fmt: skip
    for name in ("model", "network", "guidance"):
        values = getattr(args, name)
        twice = next((value for value in values if values.count(value) > 1), None)
        require(twice is None, f"--{name} has {twice} twice: leave out one")
    require(
        not args.held_out or Path(args.held_out).resolve() != Path(args.real).resolve(),
        "--held_out is the folder of --real: name pictures that no model was trained on, or leave it out",
    )
    check_output(args)
    for name in args.network:
        check_network(name)
    if args.clip_model:
        check_clip(args.clip_model)
    return args


def check_output(args: Flags) -> None:
    """The output folder can be written to and holds nothing else."""
    output = Path(args.output).absolute()
    there = next(place for place in (output, *output.parents) if os.path.exists(place))
    require(there.is_dir(), f"--output {args.output}: {there} is a file; name a folder")
    require(os.access(there, os.W_OK | os.X_OK), f"--output {args.output}: no permission to write in {there}")
    for name in ("real", "held_out"):
        folder = getattr(args, name)
        inside = folder and output.resolve().is_relative_to(Path(folder).resolve())
        require(not inside, f"--output {args.output} lies in --{name} {folder}: its pictures would be taken for real; "
                "name a folder outside")  # fmt: skip
    for text in args.model:
        inside = Path(text).exists() and output.resolve().is_relative_to(Path(text).resolve())
        require(not inside, f"--output {args.output} lies in --model {text}; name a folder outside")


# ---------------------------------------------------------------------------------------------------------------------
# What the flags name
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A model that is compared.

    Attributes:
        name: short, unlike the others.
        source: what its text names.
        images: of a folder of pictures; None for a model that makes its own.
        paired: whether it has a picture for every caption that is used.
    """

    name: str
    source: ModelSource
    images: Sequence[CaptionedImage] | None = None
    paired: bool = True

    def folder(self, output: Path) -> Path:
        """Where its pictures are kept. The name follows from the weights, so other weights get another folder."""
        identity = digest(text=self.source.text, weights=self.source.weights)[:8]
        return output / "pictures" / f"{self.name.replace('/', '--')}-{identity}"


def find_everything(args: Flags) -> tuple[list[Contender], Sequence[CaptionedImage], Sequence[CaptionedImage] | None]:
    """(models, real images, held-out images), checked before torch is imported.

    Raises:
        UserError: a model is missing, damaged or of an unknown kind.
        DataError: pictures or captions can't be used.
    """
    sources = [find_source(text, args.config_from, args.cache_dir) for text in args.model]
    makes = any(source.pictures is None for source in sources)
    check_size(args, sources)
    for source in sources:
        if source.pictures is None:
            check_steps(source, args.sampler, args.steps)
    captioned = makes or bool(args.clip_model)
    for name in (*MADE_ONLY, *CAPTIONED_ONLY):
        changed = getattr(args, name) != args.defaults[name]
        works, more = (makes, "") if name in MADE_ONLY else (captioned, ", and there is no --clip_model")
        require(works or not changed, f"--{name} does nothing: all models are folders of finished pictures{more}")
    captions = {"default_caption": args.instance_prompt, "caption_from_folder": args.caption_from_folder}
    captions = captions if captioned else NO_CAPTIONS
    real = scan(args, "--real", args.real, captions)
    of_held_out = captions if makes else NO_CAPTIONS
    held_out = scan(args, "--held_out", args.held_out, of_held_out) if args.held_out else None
    check_held_out(args, real, held_out or ())
    real = select(real, evenly_spaced(len(real), args.max_pictures))
    require(len(real) >= FEW_PICTURES, f"--real {args.real}: {counted(len(real), 'picture')} are used, and no "
            f"distance means anything below {FEW_PICTURES}; 500 and more are better")  # fmt: skip
    stems = stems_of(real)
    stems = [stems[index] for index in evenly_spaced(len(real), args.max_captions)]
    require(len(stems) >= FEW_PICTURES, f"--max_captions is {len(stems)}; no distance means anything below "
            f"{FEW_PICTURES} pictures; 500 and more are better")  # fmt: skip
    contenders = [find_contender(args, *pair, stems)
                  for pair in zip(short_labels(args.model), sources, strict=True)]  # fmt: skip
    return contenders, real, held_out


def evenly_spaced(total: int, count: int | None) -> np.ndarray:
    """Indices of so many of `total` things, the first and the last among them; all where count is None or larger."""
    return np.linspace(0, total - 1, min(count or total, total)).round().astype(int)


def check_held_out(args: Flags, real: Sequence[CaptionedImage], held_out: Sequence[CaptionedImage]) -> None:
    """Refuse held-out pictures that are among the real ones too, under whatever name."""
    known = {image.content for image in real}
    both = [image.name for image in held_out if image.content in known]
    require(not both, f"--held_out {args.held_out}: {len(both)} of its {counted(len(held_out), 'picture')} are in "
            f"--real {args.real} too ({first_names(both)}); held-out pictures are those that no model was trained on: "
            "move them out of --real")  # fmt: skip


def scan(args: Flags, flag: str, folder: str, options: dict) -> Sequence[CaptionedImage]:
    """The usable images of a folder; remarks on them are printed."""
    found = scan_folder(folder, flag=flag, caption_column=args.caption_column, on_bad_image=args.on_bad_image,
                        cache_dir=args.cache_dir, follow_links=args.follow_links, **options)  # fmt: skip
    for remark in found.warnings:
        print(f"warning: {flag}: {remark}", file=sys.stderr)
    return found.images


def find_contender(args: Flags, name: str, source: ModelSource, stems: list[str]) -> Contender:
    """The `Contender` of a source. stems: names of the real pictures that models make a picture for."""
    if source.pictures is None:
        return Contender(name, source)
    images = scan(args, f"--model {source.text}", str(source.pictures), NO_CAPTIONS)
    own = dict(zip(stems_of(images), images, strict=True))
    missing = [stem for stem in stems if stem not in own]
    if missing:
        print(f"--model {source.text}: no picture is named like the real picture {missing[0]} ({len(missing)} of "
              f"{len(stems)} are missing), so it is compared unpaired, by distances and spectra only.")  # fmt: skip
        return Contender(name, source, images, paired=False)
    return Contender(name, source, [own[stem] for stem in stems])


def picture_size(args: Flags, contenders: Sequence[Contender]) -> tuple[int, int]:
    """(height, width) of all pictures: --size, or what the models make by themselves.

    Raises:
        UserError: the models make pictures of different sizes.
    """
    if args.size:
        return args.size, args.size
    sides = {}
    for contender in contenders:
        if contender.images is not None:
            continue
        denoiser, pixels = denoiser_and_pixels(contender.source.base)
        sides[contender.name] = denoiser["sample_size"] * pixels
    if not sides:
        sides = {each.name: min(each.images[0].size) for each in contenders}
    found = ", ".join(f"{name} {side} px" for name, side in sides.items())
    for contender in contenders:
        trained = trained_resolution(contender.source)
        if trained and contender.images is None and sides[contender.name] != trained:
            made = sides[contender.name]
            print(f"warning: {contender.name} was trained at {trained} px, and pictures are made at {made} px; "
                  f"--size {trained} compares what it learnt", file=sys.stderr)  # fmt: skip
    require(len(set(sides.values())) == 1, f"--size is missing: the models' pictures have different sizes ({found})")
    side = next(iter(sides.values()))
    return side, side


def denoiser_and_pixels(base: EvaluatedModel) -> tuple[dict, int]:
    """(configuration of the denoiser, side in px of what one latent stands for) of a pipeline."""
    denoiser, vae = (read_object(base.file("config.json", part)) for part in (base.family.denoiser.name, "vae"))
    return denoiser, 2 ** (len(vae["block_out_channels"]) - 1)


def trained_resolution(source: ModelSource) -> int | None:
    """The --resolution of the run of a training script that made a model; None where it is not known."""
    if source.pictures:
        return None
    folder = Path(source.lora or source.base.denoiser or source.text)
    for parent in (folder, folder.parent):
        with contextlib.suppress(OSError):
            found = re.search(r"^resolution: (\d+)$", (parent / "config.yaml").read_text(), re.MULTILINE)
            return int(found[1]) if found else None
    return None


def check_size(args: Flags, sources: Sequence[ModelSource]) -> None:
    """Refuse a --size that a model can't make."""
    for source in sources if args.size else ():
        if source.base is not None:
            denoiser, pixels = denoiser_and_pixels(source.base)
            unit = pixels * denoiser.get("patch_size", 1)
            near = max(1, args.size // unit) * unit
            require(
                args.size % unit == 0,
                f"--size is {args.size}; for --model {source.text} it must be a multiple of {unit}, e.g. {near}",
            )


RUN = early(__name__, parse_args, find_everything)

import torch
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from lpl_finetuning.evaluation import comparison
from lpl_finetuning.evaluation.comparison import Memory, pairs_to_compare
from lpl_finetuning.evaluation.features import features_of
from lpl_finetuning.evaluation.generation import GenerationSettings, generate, guidance_folder, picture_path
from lpl_finetuning.evaluation.models import load_pipeline, prediction_kind
from lpl_finetuning.evaluation.networks import FeatureNetwork, load_clip, load_network
from lpl_finetuning.evaluation.onestep import OneStepSettings, one_step_of
from lpl_finetuning.evaluation.report import duration, write_report
from lpl_finetuning.evaluation.uncertainty import enough_pictures
from lpl_finetuning.evaluation.verdict import network_title, verdict_sentences

# ---------------------------------------------------------------------------------------------------------------------
# Making pictures
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What every stage needs.

    Attributes:
        args: the flags.
        output: folder of the report.
        size: (height, width) of all pictures.
        device, dtype: of the models.
        real: the real pictures, cut.
        captions: {stem: caption} that pictures are made for, of all or some of the real pictures.
        tested: images of the one-step test; empty without the test.
        networks: that judge.
        memory: numbers of earlier starts.
    """

    args: Flags
    output: Path
    size: tuple[int, int]
    device: str
    dtype: torch.dtype
    real: PictureSet
    captions: dict[str, str]
    tested: Sequence[CaptionedImage]
    networks: Sequence[FeatureNetwork]
    memory: Memory


@dataclass(frozen=True)
class Made:
    """What a model has made.

    Attributes:
        contender: the model.
        sets: its pictures by guidance; by None for finished pictures.
        one_step: {measure: (L, N)} of the one-step test; None without.
        facts: "prediction" and "sampler".
    """

    contender: Contender
    sets: dict[float | None, PictureSet]
    one_step: dict[str, np.ndarray] | None
    facts: dict[str, str]

    def at(self, guidance: float | None) -> PictureSet:
        """Its pictures for a guidance; finished pictures stand for every guidance."""
        return self.sets.get(guidance) or self.sets[None]


def make(task: Task, contender: Contender, stages: "Stages") -> Made:
    """The pictures and one-step numbers of a model. What is on disk already is not made again."""
    args, folder = task.args, contender.folder(task.output)
    if contender.images is not None:
        with stages("finished pictures"):
            return Made(contender, {None: cut_pictures(contender.images, folder, task.size)}, None, {})
    settings = GenerationSettings(
        args.steps, tuple(args.guidance), task.size, args.sampler, args.batch_size, args.seed
    )
    folders = {guidance: guidance_folder(folder, guidance) for guidance in settings.guidance}
    sets = {guidance: PictureSet({stem: picture_path(place, stem) for stem in task.captions})
            for guidance, place in folders.items()}  # fmt: skip
    numbers = one_step_file(task, contender)
    facts = memory_of(folder)
    whole = facts and all(file.is_file() for pictures in sets.values() for file in pictures.files)
    if not whole or (task.tested and not numbers.is_file()) or facts["key"] != key_of(task, settings):
        print(f"\n{contender.name}", flush=True)
        disable_progress_bar()
        with stages("loading models"):
            pipeline = load_pipeline(contender.source, task.dtype, task.device)
        with stages("making pictures"):
            generate(pipeline, task.captions, settings, folder, contender.source.weights)
        facts = {"key": key_of(task, settings), "prediction": prediction_kind(pipeline),
                 "sampler": type(pipeline.scheduler).__name__.removesuffix("Scheduler")}  # fmt: skip
        write_whole(folder / "made.json", json.dumps(facts).encode())
        if task.tested and not numbers.is_file():
            with stages("one-step test"):
                test = OneStepSettings(args.seed, batch_size=args.batch_size)
                result = one_step_of(pipeline, task.tested, task.size[0], test, task.networks)
                comparison.save_arrays(numbers, result.metrics)
    return Made(contender, sets, comparison.load_arrays(numbers) if task.tested else None, facts)


def key_of(task: Task, settings: GenerationSettings) -> str:
    """Digest of what the pictures of a model follow from, besides its weights."""
    return digest(settings=asdict(settings), captions=task.captions, dtype=str(task.dtype))


def memory_of(folder: Path) -> dict[str, str]:
    """What was written when the pictures of a folder were whole; empty before."""
    file = folder / "made.json"
    return read_object(file) if file.is_file() else {}


def one_step_file(task: Task, contender: Contender) -> Path:
    """Where the numbers of a model's one-step test are kept."""
    what = {"weights": contender.source.weights, "size": task.size, "seed": task.args.seed, "dtype": str(task.dtype),
            "pictures": [(image.content, image.caption) for image in task.tested],
            "networks": [network.name for network in task.networks]}  # fmt: skip
    return task.output / "one_step" / f"{digest(**what)[:32]}.npz"


# ---------------------------------------------------------------------------------------------------------------------
# Comparing pictures
# ---------------------------------------------------------------------------------------------------------------------


def compare(task: Task, made: Sequence[Made], held_out: PictureSet | None, stages: "Stages") -> dict:
    """The parts "networks", "distances", "differences" and "pairs" of the metrics."""
    networks, distances, differences, pairs = [], [], [], []
    for network in task.networks:

        def features(pictures: PictureSet, whose: str, network: FeatureNetwork = network) -> np.ndarray:
            store, at_once = task.output / "features", task.args.batch_size
            return features_of(pictures.files, network, store, at_once, whose=whose).values

        with stages("features"):
            real = features(task.real, "the real pictures")
            theirs = {(each.contender.name, guidance): features(pictures, each.contender.name)
                      for each in made for guidance, pictures in each.sets.items()}  # fmt: skip
            unseen = features(held_out, "held-out pictures") if held_out else None
        with stages("distances"):
            floor = comparison.floor(real, task.args.seed, task.memory)
            fewest = min(map(len, (real, *theirs.values())))
            warning = enough_pictures(network.dims, fewest, network_title(network.label))
            networks.append({"name": network.name, "label": network.label, "dims": network.dims,
                             "independent": network.independent, "floor": floor, "warning": warning,
                             "decides": "kernel" if fewest <= network.dims else "frechet"})  # fmt: skip
            for (name, guidance), own in theirs.items():
                row = {"model": name, "guidance": guidance, "network": network.name, "memorisation": None}
                if unseen is not None:
                    row["memorisation"] = comparison.memorisation(real, own, unseen, task.args.seed, task.memory)
                distances.append(row | comparison.all_distances(real, own, task.memory))
            differences += differences_by(task, network, made, real, theirs)
        if network is task.networks[0]:
            pairs = rows_of_pairs(task, made, theirs)
    return {"networks": networks, "distances": distances, "differences": differences, "pairs": pairs}


def scales(task: Task, made: Sequence[Made]) -> list[float | None]:
    """The scales of guidance at which models are compared; [None] for finished pictures alone."""
    return [None] if all(each.contender.images is not None for each in made) else list(task.args.guidance)


def differences_by(
    task: Task, network: FeatureNetwork, made: Sequence[Made], real: np.ndarray, theirs: dict
) -> list[dict]:
    """Differences of all distances by a network. theirs: features by (model, guidance)."""
    by_name = {each.contender.name: each for each in made}
    work = [(a, b, guidance) for guidance in scales(task, made) for a, b in pairs_to_compare(list(by_name))]
    rows = []
    for a, b, guidance in tqdm(work, f"intervals ({network.name})", unit=" pairs", delay=2, leave=False):
        ours = [theirs.get((name, guidance), theirs.get((name, None))) for name in (a, b)]
        paired = by_name[a].contender.paired and by_name[b].contender.paired
        found = comparison.difference_rows(real, *ours, paired, task.args.seed, task.memory)
        rows += [{"a": a, "b": b, "guidance": guidance, "network": network.name, **row} for row in found]
    return rows


def rows_of_pairs(task: Task, made: Sequence[Made], theirs: dict) -> list[dict]:
    """The paired pictures at each guidance, those first where the models differ most."""
    rows = []
    for guidance in scales(task, made):
        paired = [each for each in made if each.contender.paired]
        if not paired:
            continue
        names = [each.contender.name for each in paired]
        own = [theirs.get((name, guidance), theirs.get((name, None))) for name in names]
        order, stems = comparison.most_different(own), list(task.captions)
        files = [each.at(guidance).files for each in paired]
        for number in np.argsort(-order, kind="stable"):
            pictures = {name: relative(task, files[place][number]) for place, name in enumerate(names)}
            stem = stems[number]
            rows.append({"stem": stem, "caption": task.captions[stem], "guidance": guidance,
                         "real": relative(task, task.real.paths[stem]), "pictures": pictures,
                         "difference": float(order[number])})  # fmt: skip
    return rows


def relative(task: Task, file: Path) -> str:
    """A path as `metrics.json` has it."""
    return os.path.relpath(file, task.output)


def spectra(task: Task, made: Sequence[Made], stages: "Stages") -> dict:
    """The part "spectrum": mean log power over frequencies, its error, and sharpness."""
    with stages("power spectrum"):
        frequencies, real, sharp = comparison.mean_spectrum(task.real.files, task.args.seed)
        rows = []
        for each in made:
            for guidance, pictures in each.sets.items():
                _, power, own = comparison.mean_spectrum(pictures.files, task.args.seed)
                rows.append({"model": each.contender.name, "guidance": guidance, "log_power": power.tolist(),
                             "error": (power - real).tolist(), "sharpness": own})  # fmt: skip
    return {"frequencies": frequencies.tolist(), "real": real.tolist(), "real_sharpness": sharp, "models": rows}


def caption_scores(task: Task, made: Sequence[Made], stages: "Stages") -> dict:
    """The parts "clip_score" and "clip_differences"; empty without --clip_model."""
    scores, rows, differences = {}, [], []
    if not task.args.clip_model:
        return {"clip_score": rows, "clip_differences": differences}
    with stages("CLIPScore"):
        score = load_clip(task.args.clip_model, task.device)
        for each in made:
            for guidance, pictures in each.sets.items() if each.contender.paired else ():
                own = scores[each.contender.name, guidance] = comparison.score_all(score, pictures, task.captions)
                rows.append({"model": each.contender.name, "guidance": guidance,
                             **comparison.mean_row(own, task.args.seed)})  # fmt: skip
    names = [each.contender.name for each in made if each.contender.paired]
    for guidance in scales(task, made):
        for a, b in pairs_to_compare(names):
            own = [scores.get((name, guidance), scores.get((name, None))) for name in (a, b)]
            row = comparison.paired_row(*own, "higher", task.args.seed)
            differences.append({"a": a, "b": b, "guidance": guidance, **row})
    return {"clip_score": rows, "clip_differences": differences}


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


class Stages:
    """Says what is being done, and keeps the seconds that each stage took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Context manager of a stage; stages of the same name are added up."""
        begun = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun


def main(args: Flags, contenders: Sequence[Contender], real: Sequence[CaptionedImage],
         held_out: Sequence[CaptionedImage] | None) -> None:  # fmt: skip
    """The command. After Ctrl-C it says how to go on."""
    try:
        evaluate(args, contenders, real, held_out)
    except KeyboardInterrupt:
        print("\nThe same command goes on from here: what is made or measured is kept.", file=sys.stderr)
        raise


def evaluate(args: Flags, contenders: Sequence[Contender], real: Sequence[CaptionedImage],
             held_out: Sequence[CaptionedImage] | None) -> None:  # fmt: skip
    """Make pictures, compare them, write the report."""
    stages, output = Stages(), Path(args.output)
    size = picture_size(args, contenders)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    automatic = torch.bfloat16 if device.startswith("cuda") else torch.float32
    dtype = automatic if args.dtype == "auto" else getattr(torch, args.dtype)
    with stages("real pictures"):
        cut = cut_pictures(real, output / "pictures" / f"real-{size[0]}", size)
        unseen = cut_pictures(held_out, output / "pictures" / f"held-out-{size[0]}", size) if held_out else None
    with stages("loading models"):
        networks = [load_network(name, device) for name in args.network]
    chosen = evenly_spaced(len(real), args.max_captions)
    stems = cut.stems
    captions = {stems[index]: real[int(index)].caption for index in chosen}
    tested = first_of(held_out or real, ONE_STEP_PICTURES) if args.one_step else ()
    task = Task(args, output, size, device, dtype, cut, captions, tested, networks, Memory(output / "numbers"))
    print_work(task, contenders)
    made = [make(task, contender, stages) for contender in contenders]
    metrics = describe(task, made, real) | compare(task, made, unseen, stages)
    metrics |= {"one_step": one_step(task, made, stages), "spectrum": spectra(task, made, stages)}
    metrics |= caption_scores(task, made, stages)
    metrics |= {"seconds": stages.seconds, "verdict": verdict_sentences(metrics)}
    page = write_report(metrics, output)
    print("\n" + "\n".join(metrics["verdict"]) + "\n")
    print("Time:", ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.seconds.items()))
    print(f"Report: {page}")


def check_device(device: str) -> None:
    """Refuse a --device that is not here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {device}: it can't be used here ({reason}); give another, or leave it out"
        ) from None


def print_work(task: Task, contenders: Sequence[Contender]) -> None:
    """Print what is going to be made."""
    args, makers = task.args, [each for each in contenders if each.images is None]
    print(f"{counted(len(task.real.files), 'real picture')} of {args.real}, {task.size[0]} x {task.size[1]} px; "
          f"models: {', '.join(each.name for each in contenders)}")  # fmt: skip
    stems, each = list(task.captions), len(task.captions) * len(args.guidance)
    missing = sum(not picture_path(guidance_folder(maker.folder(task.output), guidance), stem).is_file()
                  for maker in makers for guidance in args.guidance for stem in stems)  # fmt: skip
    if missing:
        print(f"To make: {missing:,} pictures of {each * len(makers):,}, {args.steps} steps each. The bar of the "
              "first model tells the time.")  # fmt: skip


def one_step(task: Task, made: Sequence[Made], stages: Stages) -> dict | None:
    """The part "one_step"; None without the test."""
    results = {each.contender.name: each.one_step for each in made if each.one_step is not None}
    if not results:
        return None
    with stages("one-step test"):
        found = comparison.one_step_rows(results, OneStepSettings().levels, task.args.seed)
    return found | {"held_out": bool(task.args.held_out)}


def describe(task: Task, made: Sequence[Made], real: Sequence[CaptionedImage]) -> dict:
    """What was compared and how: the first parts of the metrics."""
    args, folders = task.args, {}
    for each in made:
        folders[each.contender.name] = {
            "" if guidance is None else f"{guidance:g}": relative(task, pictures.files[0].parent)
            for guidance, pictures in each.sets.items()
        }
    makes = any(each.contender.images is None for each in made)
    settings = {"samples_per_caption": 1, "steps": args.steps, "guidance": args.guidance, "sampler": args.sampler,
                "dtype": str(task.dtype).removeprefix("torch.")}  # fmt: skip
    settings = settings if makes else {"guidance": []}
    settings |= {"captions": len(task.captions), "size": task.size[0], "seed": args.seed, "networks": args.network,
                 "clip_model": args.clip_model, "held_out": args.held_out,
                 "one_step_pictures": len(task.tested) or None}  # fmt: skip
    models = [{"name": each.contender.name, "text": each.contender.source.text, "kind": each.contender.source.kind,
               "family": getattr(getattr(each.contender.source.base, "family", None), "name", None),
               "prediction": each.facts.get("prediction"), "sampler": each.facts.get("sampler"),
               "paired": each.contender.paired, "pictures_folder": folders[each.contender.name]}
              for each in made]  # fmt: skip
    return {
        "version": 1, "command": shlex.join(["python", *sys.argv]), "date": datetime.date.today().isoformat(),
        "device": task.device, "settings": settings, "models": models,
        "real": {"folder": args.real, "pictures": len(real),
                 "with_captions": sum(bool(image.caption.strip()) for image in real)},
    }  # fmt: skip


run_main(main, RUN)
