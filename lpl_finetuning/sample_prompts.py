"""What validation samples: prompts with their settings, read from flags and files, and their samplers. No torch.

`--validation_prompts_file` is a YAML list, or a text file with the lines of sd-scripts' `--sample_prompts`.
"""

import math
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from lpl_finetuning.errors import UserError, brief, near_name, require
from lpl_finetuning.yaml_texts import YamlTexts

PROMPTS_FILE = "validation_prompts.yaml"  # the entries of a run's file, in its output folder
MOST_STEPS = 1000  # of a sampler: the noise levels that the models are trained on
MOST_PIXELS = 8192  # of a side


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt and how its pictures are sampled; None stands for the run's default.

    Attributes:
        negative: the prompt that guidance leads away from; "" for the unconditional prompt.
        width, height: of the pictures, px.
        guidance: the scale of classifier-free guidance; up to 1 is without.
        seed: of the first picture; the following pictures have the following seeds.
        sampler: a name of `SAMPLERS`.
        place: the file and the line or number of the entry, for messages; None for a prompt of a flag.
    """

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    sampler: str | None = None
    place: str | None = field(default=None, compare=False, repr=False)

    def size(self, resolution):
        """(height, width) of the pictures, px; a side that is not given is `resolution`."""
        return self.height or resolution, self.width or resolution

    def values(self):
        """{key: value} of what is given, without the place."""
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "place"}
        return {name: value for name, value in given.items() if value not in (None, "")}

    def settings(self):
        """The settings that the entry gives, in words; "" where it gives the prompt alone."""
        size = f"{self.width or 'resolution'} x {self.height or 'resolution'}" if self.width or self.height else ""
        words = [
            size,
            f"{self.steps} steps" if self.steps else "",
            f"guidance {self.guidance:g}" if self.guidance is not None else "",
            f"seed {self.seed}" if self.seed is not None else "",
            self.sampler or "",
            f"without: {self.negative}" if self.negative else "",
        ]
        return ", ".join(word for word in words if word)

    def label(self):
        """The caption over the pictures in a grid: the prompt, and on a second line what the entry sets."""
        return "\n".join(line for line in (self.prompt, self.settings()) if line) or " "


def entries_of(args):
    """The `SamplePrompt`s of a run: the prompts of --validation_prompt, then those of --validation_prompts_file."""
    from_file = args.prompts if args.validation_prompts_file else ()
    return (*(SamplePrompt(prompt) for prompt in args.validation_prompt or ()), *from_file)


def pictures_at_once(height, width):
    """How many pictures of a size, in px, are decoded at once: as many as one of 1024 px has room for."""
    return max(1, (1024 // math.isqrt(height * width)) ** 2)


def prompt_texts(args):
    """The texts that the validation prompts need encoded: prompts and negative prompts, each once."""
    texts = (text for entry in entries_of(args) for text in (entry.prompt, entry.negative))
    return tuple(dict.fromkeys(text for text in texts if text))


def plan_lines(args):
    """Lines of the plan: each entry of --validation_prompts_file with its settings."""
    return [f"            {brief(entry.prompt)}: {entry.settings() or 'the defaults of the run'}"
            for entry in entries_of(args) if entry.place]  # fmt: skip


def entries_text(entries):
    """Entries as YAML that --validation_prompts_file reads."""
    return yaml.safe_dump([entry.values() for entry in entries], sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers

KARRAS = "_karras"  # ends the name of a sampler with Karras' noise levels
SAMPLERS = {  # name -> (diffusers' class, settings)
    "ddim": ("DDIMScheduler", {"clip_sample": False, "thresholding": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
WITHOUT_KARRAS = ("ddim", "pndm", "euler_a")
FLOW_SAMPLERS = {  # of rectified flow
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
PREDICT_SAMPLE = ("ddim", "euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc")  # can take prediction "sample"
REACH_ZERO_SNR = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc")  # can begin at pure noise
OTHER_NAMES = {  # names in other programs
    "plms": "pndm", "euler_ancestral": "euler_a", "dpm2": "dpm_2", "dpm2_a": "dpm_2_a", "dpm_2_ancestral": "dpm_2_a",
    "dpmsolverpp": "dpmpp_2m", "dpmsingle": "dpmpp_2s", "uni_pc": "unipc",
}  # fmt: skip


def sampler_named(text):
    """The name of `SAMPLERS`, maybe with `KARRAS`, that a text means; None where it means none.

    Names of A1111 ("DPM++ 2M Karras"), ComfyUI and sd-scripts ("k_euler_a") are known too.
    """
    name = re.sub(r"[\s.-]+", "_", text.strip().lower().replace("++", "pp")).removeprefix("k_")
    karras = KARRAS if name.endswith(KARRAS) else ""
    name = name.removesuffix(KARRAS)
    name = OTHER_NAMES.get(name, name)
    return name + karras if name in SAMPLERS and not (karras and name in WITHOUT_KARRAS) else None


def all_samplers():
    """All names of samplers."""
    return [*SAMPLERS, *(name + KARRAS for name in SAMPLERS if name not in WITHOUT_KARRAS)]


def scheduler_of(sampler, own):
    """The diffusers scheduler of a sampler, with the noise levels and the prediction of the pipeline's own scheduler.

    Args:
        sampler: a name that `check_samplers` passed; None for the pipeline's own scheduler.
        own: the pipeline's own scheduler.
    """
    if sampler is None:
        return own
    import diffusers

    flow, name = type(own).__name__.startswith("FlowMatch"), sampler.removesuffix(KARRAS)
    class_name, settings = (FLOW_SAMPLERS if flow else SAMPLERS)[name]
    if not flow and name not in WITHOUT_KARRAS:
        settings = settings | {"use_karras_sigmas": sampler.endswith(KARRAS)}
    return getattr(diffusers, class_name).from_config(own.config, **settings)


def check_samplers(entries, flow, title, prediction_type=None):
    """Refuse samplers that can't sample the run's model.

    Args:
        entries: `SamplePrompt`s.
        flow: whether the models of the family are rectified flows.
        title: the family's name, for messages.
        prediction_type: --prediction_type, if it is given.
    """
    for entry in entries:
        sampler = (entry.sampler or "euler").removesuffix(KARRAS)
        known = sampler in FLOW_SAMPLERS and not (entry.sampler or "").endswith(KARRAS)
        require(not flow or known, f"{entry.place}: the sampler {entry.sampler} is not for {title}, which is a "
                f"rectified flow: give {' or '.join(FLOW_SAMPLERS)}, or leave it out")  # fmt: skip
        require(prediction_type != "sample" or sampler in PREDICT_SAMPLE, f"{entry.place}: the sampler "
                f"{entry.sampler} can't follow --prediction_type sample: give one of {', '.join(PREDICT_SAMPLE)}, or "
                "leave it out")  # fmt: skip


def check_zero_snr(entries, zero_snr):
    """Refuse samplers that know no zero terminal SNR. zero_snr: whether the base model's scheduler asks for it."""
    for entry in entries:
        known = not entry.sampler or entry.sampler.removesuffix(KARRAS) in REACH_ZERO_SNR
        require(not zero_snr or known, f"{entry.place}: the sampler {entry.sampler} knows no zero terminal SNR, which "
                f"the base model has: give one of {', '.join(REACH_ZERO_SNR)}, or leave it out")  # fmt: skip


def check_sizes(entries, unit, resolution):
    """Refuse sizes of pictures that the latents can't have. unit: px of a latent; resolution: --resolution."""
    for entry in entries:
        for side in entry.size(resolution) if entry.place else ():
            near = max(1, round(side / unit)) * unit
            require(side % unit == 0, f"{entry.place}: a side of {side} px; it must be a multiple of {unit}, the "
                    f"pixels of a latent: give {near}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Files

KEYS = ("prompt", "negative", "width", "height", "steps", "guidance", "seed", "sampler")
OTHER_KEYS = {  # keys of sd-scripts' JSON files and of diffusers' pipelines
    "negative_prompt": "negative", "sample_steps": "steps", "num_inference_steps": "steps", "scale": "guidance",
    "guidance_scale": "guidance", "cfg_scale": "guidance", "cfg": "guidance", "sample_sampler": "sampler",
}  # fmt: skip
SWITCHES = {"n": "negative", "w": "width", "h": "height", "s": "steps", "l": "guidance", "d": "seed", "ss": "sampler"}
LEFT_OUT = {  # switches of sd-scripts for other models, without effect on SDXL and SD3 there too
    "g": "Flux' embedded guidance", "ctr": "Lumina's share of guided steps", "rcfg": "Lumina's renormed guidance",
}  # fmt: skip
NOT_HERE = {  # switches of sd-scripts that change the pictures and are not there
    "cn": "a picture for a ControlNet", "fs": "a flow shift of its own", "f": "a number of frames",
    "am": "a strength of the LoRA",
}  # fmt: skip
WEIGHTED = re.compile(r"\([^()]+:\s*[\d.]+\s*\)")  # (word:1.2)


def read_prompts_file(path):
    """The `SamplePrompt`s of --validation_prompts_file, in order; what is left out is told on standard error.

    Raises:
        UserError: the file can't be read, or an entry can't be followed.
    """
    flag, path = f"--validation_prompts_file {path}", Path(path)
    require(path.is_file(), f"{flag}: there is no such file; name a .yaml or .txt file")
    kind = path.suffix.lower()
    require(kind in (".yaml", ".yml", ".json", ".txt"), f"{flag}: files that end in {kind or 'nothing'} are not read: "
            "name a YAML list .yaml, or lines of prompts .txt")  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: can't be read as text ({error}); save it as UTF-8") from None
    rows = lines_of(flag, text) if kind == ".txt" else yaml_entries(flag, text)
    require(rows, f"{flag}: there is no prompt in it; write one a line, or leave the flag out")
    remarks = [remark for _, _, left in rows for remark in left]
    entries = tuple(entry_of(place, values) for place, values, _ in rows)
    weighted = [entry for entry in entries if WEIGHTED.search(f"{entry.prompt} {entry.negative}")]
    remarks += [f"{entry.place}: weights such as (word:1.2) are read as plain text" for entry in weighted]
    if os.environ.get("RANK", "0") == "0":
        for remark in remarks:
            print(f"warning: {remark}", file=sys.stderr)
    return entries


def lines_of(flag, text):
    """[(place, {key: text}, remarks)] of sd-scripts' lines: a prompt, then switches; # begins a comment."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        line, place = line.strip(), f"{flag}, line {number}"
        if not line or line.startswith("#"):
            continue
        require(not line.startswith("--"), f"{place} begins with {line.split()[0]}: write the prompt first")
        prompt, *switches = re.split(r"\s+--(?=[A-Za-z])", line)
        values, remarks = {"prompt": prompt}, []
        for switch in switches:
            name, _, value = switch.partition(" ")
            key, other = SWITCHES.get(name.lower()), NOT_HERE.get(name.lower())
            if name.lower() in LEFT_OUT:
                remarks.append(f"{place}: --{name}, {LEFT_OUT[name.lower()]}, is left out")
                continue
            require(not other, f"{place}: --{name}, {other}, is not there for sample pictures: remove it")
            require(key, f"{place}: unknown --{name}; there are {', '.join(f'--{each}' for each in SWITCHES)}")
            require(key not in values, f"{place}: --{name} comes twice; give one")
            require(value.strip(), f"{place}: no value follows --{name}; give one, or leave it out")
            values[key] = value.strip()
        rows.append((place, values, remarks))
    return rows


def yaml_entries(flag, text):
    """[(place, {key: text}, [])] of a YAML list of prompts and of mappings."""
    try:
        content = yaml.load(text, YamlTexts)
    except yaml.YAMLError as error:
        raise UserError(f"{flag}: not valid YAML: {' '.join(str(error).split())}; write a list of entries such as "
                        "`- prompt: a red apple`") from None  # fmt: skip
    require(not content or isinstance(content, list), f"{flag}: found a {type(content).__name__}; expected a list of "
            "entries such as `- prompt: a red apple`")  # fmt: skip
    rows = []
    for number, entry in enumerate(content or (), start=1):
        place, values = f"{flag}, entry {number}", {}
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        require(isinstance(entry, dict), f"{place} is a {type(entry).__name__}; expected a prompt, or keys such as "
                "prompt and seed")  # fmt: skip
        for key, value in entry.items():
            name = OTHER_KEYS.get(key, key)
            near = near_name(key, (*KEYS, *OTHER_KEYS))
            advice = f"did you mean {near}?" if near else f"there are {', '.join(KEYS)}"
            require(name in KEYS, f"{place}: unknown key {key}; {advice}")
            require(name not in values, f"{place}: {name} comes twice; give one")
            require(isinstance(value, str), f"{place}: {key} is {brief(value)}; it takes one value")
            values[name] = value
        rows.append((place, {name: value for name, value in values.items() if value or name == "prompt"}, []))
    return rows


def entry_of(place, values):
    """The `SamplePrompt` of {key: text}; UserError names the place and the key."""
    prompt = " ".join(values.get("prompt", "").split())
    require(prompt, f"{place} has no prompt; give one")
    sampler = values.get("sampler")
    name = sampler_named(sampler) if sampler else None
    near = near_name(sampler, all_samplers()) if sampler else None
    meant = f"did you mean {near}? " if near else ""
    require(name or not sampler, f"{place}: no sampler is called {sampler!r}; {meant}choose from "
            f"{', '.join(all_samplers())}")  # fmt: skip
    return SamplePrompt(
        prompt=prompt,
        negative=" ".join(values.get("negative", "").split()),
        width=whole_number(place, values, "width", 1, MOST_PIXELS),
        height=whole_number(place, values, "height", 1, MOST_PIXELS),
        steps=whole_number(place, values, "steps", 1, MOST_STEPS),
        guidance=guidance_of(place, values.get("guidance")),
        seed=whole_number(place, values, "seed", 0, 2**63 - 1),
        sampler=name,
        place=place,
    )


def whole_number(place, values, key, least, most):
    """The number of a key, None without it; UserError for anything but a whole number from `least` to `most`."""
    if key not in values:
        return None
    text = values[key]
    number = int(text) if re.fullmatch(r"[+-]?\d{1,20}", text) else None
    hint = "; pictures keep their seed at every validation" if key == "seed" else ""
    require(number is not None and least <= number <= most,
            f"{place}: {key} is {text!r}; it must be a whole number from {least} to {most}{hint}")  # fmt: skip
    return number


def guidance_of(place, text):
    """The number of a text, None for None; UserError for anything but a number from 0 up."""
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    require(math.isfinite(number) and number >= 0, f"{place}: guidance is {text!r}; it must be a number, 0 or more")
    return number
