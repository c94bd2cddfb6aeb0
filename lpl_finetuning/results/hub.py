"""Publish a finished run on the Hugging Face Hub: its model card, an allow-list of files, one commit.

    python -m lpl_finetuning.publish my-lora --hub_model_id me/my-lora      # what a run whose upload failed asks for

The token comes from HF_TOKEN or from `hf auth login`. Before training, `check_access` tells whether it may write;
afterwards, `write_card` and `publish_or_exit`. Nothing here imports torch; the Hub client is imported on first use.
"""

import contextlib
import json
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from lpl_finetuning.base_model import Family, model_file, read_json
from lpl_finetuning.errors import UserError, require
from lpl_finetuning.files import row_of
from lpl_finetuning.flags import REPOSITORY, deviation_gradient, feature_fractions
from lpl_finetuning.lora_files import LORA_FILE, file_for_others, kind_of
from lpl_finetuning.results.metadata import base_source, trigger_of
from lpl_finetuning.sample_prompts import KEYS, entries_of
from lpl_finetuning.training.checkpoint_folders import output_name_of


def check_publishing(args):
    """What can be known about --push_to_hub without asking the Hub."""
    if args.push_to_hub:
        check_name(*name_and_source(args.hub_model_id, args.output_dir))
        find_token(args.hub_token)
        check_online()


def name_and_source(hub_model_id, folder):
    """(name on the Hub, what it comes from, for messages): --hub_model_id, else the name of the output folder."""
    if hub_model_id:
        return hub_model_id, f"--hub_model_id {hub_model_id}"
    name = Path(folder).resolve().name
    return name, f"the folder's name, {name}, can't be a name on the Hub; --hub_model_id"


def model_card(args, steps, images_per_step, images, gate, hub_name=None):
    """What the model card says of a run, once its result is written.

    Args:
        steps: that the weights have seen.
        images: number of images that they were trained on.
        gate: the `LPLGate`.
    """
    lora = lora_facts(Path(args.output_dir)) if args.use_lora else {}
    measures, measured_from = measures_of(Path(args.output_dir, args.logging_dir, "metrics.jsonl"))
    return Card(
        name=hub_name or args.hub_model_id or Path(args.output_dir).resolve().name,
        family=args.base_model.family,
        base_model=args.base_model.name,
        revision=args.base_model.revision,
        lora=lora.get("kind"),
        trigger=trigger_of(args),
        lpl=lpl_rows(args, gate) if args.use_lpl else {},
        training=training_rows(args, steps, images_per_step, lora),
        dataset=args.dataset_name,
        num_images=images,
        prompts=tuple(entry.prompt for entry in entries_of(args)),
        samples=tuple(entry.values() for entry in entries_of(args) if entry.place),
        images_per_prompt=args.num_validation_images,
        prediction_type=getattr(args, "prediction_type", None),
        base_file=single_file_of(args.base_model),
        schedule=schedule_of_base(args.base_model),
        measures=measures,
        measured_from=measured_from,
        networks=" and of ".join(NETWORKS[network] for network in feature_fractions(args)),
    )


NETWORKS = {  # of --lpl_features, in words
    "decoder": "the VAE's decoder", "rgb": "the VAE's decoder with the decoded picture",
    "tiny_decoder": "a tiny decoder", "classifier": "a classifier of latents", "latent": "the latents themselves",
}  # fmt: skip


def lpl_rows(args, gate):
    """{setting: value} of the loss, for the card. gate: the `LPLGate`."""
    threshold = "timesteps below" if gate.t_threshold is not None else "noise / signal up to"
    fractions, several = feature_fractions(args), isinstance(args.lpl_weight, list)
    auto = args.lpl_weight == "auto" and len(fractions) > 1
    stages = " ".join(args.lpl_classifier_stages or ["all that the normalization takes"])
    return {
        "weight": f"auto, {args.lpl_share:g} of the loss"
        if args.lpl_weight == "auto"
        else ", ".join(f"{weight:g}" for weight in args.lpl_weight)
        if several
        else args.lpl_weight,
        f"applied at {threshold}": gate.limit,
        "features": ", ".join(f"{network} {part:.3g}" if auto else network for network, part in fractions.items()),
        "decoder stages": 1 + args.lpl_num_blocks if fractions.keys() & {"decoder", "rgb"} else None,
        "tiny decoder": args.lpl_tiny_decoder if "tiny_decoder" in fractions else None,
        "tiny decoder stages at most": 1 + args.lpl_num_blocks if "tiny_decoder" in fractions else None,
        "classifier": args.lpl_classifier if "classifier" in fractions else None,
        "classifier stages": stages if "classifier" in fractions else None,
        "flipped, shifted and cut alike": args.lpl_augment or None,
        "normalization": args.lpl_norm_type,
        "gradient through its deviation": deviation_gradient(args) if args.lpl_norm_type == "standard" else None,
        "loss": args.lpl_loss_type,
        "depth weighting": args.lpl_pow_law,
        "outliers masked": args.lpl_remove_outliers,
        "mask's margin meant for (px)": args.lpl_outlier_reference_resolution or None,
        "noise scale": args.lpl_scale,
        "from step": args.lpl_start or None,
    }


def training_rows(args, steps, images_per_step, lora):
    """{setting: value} of the training, for the card. lora: the `lora_facts`; {} for a whole model."""
    return {
        "steps": steps,
        "images per step": images_per_step,
        "resolution": args.resolution,
        "learning rate": args.learning_rate * (images_per_step if args.scale_lr else 1),
        "schedule": args.lr_scheduler,
        "optimizer": "8-bit AdamW" if args.use_8bit_adam else args.optimizer,
        "precision": {"no": "float32", None: None}.get(args.mixed_precision, args.mixed_precision),
        "base model": source_in_words(args.base_model),
        "trained": lora.get("kind", "all weights") + (" with the text encoders" * args.train_text_encoder),
        "saved in": args.save_dtype or "float32",
        "file for other programs": file_for_others(args),
        "rank": lora.get("rank"),
        "alpha": lora.get("alpha"),
        "blocks": args.lora_blocks,
        "layers": args.lora_layers,
        "layers with settings of their own": "; ".join(args.lora_pattern or ()) or None,
        "continued from": args.init_lora,
        "EMA": args.use_ema,
        "seed": args.seed,
    }


def single_file_of(base):
    """The name of the single file that a base model is; None for a folder or a name on the Hub."""
    return base.unpacked[base.name].path.name if base.name in base.unpacked else None


def schedule_of_base(base):
    """Settings of the scheduler that a LoRA's user has to make: those of a single file, and those of the flags."""
    if not single_file_of(base):
        return dict(base.schedule)
    own = read_json(Path(base.name, "scheduler", "scheduler_config.json"))
    kept = {name: own[name] for name in ("prediction_type", "rescale_betas_zero_snr") if name in own}
    kept |= {"timestep_spacing": "trailing"} if kept.get("rescale_betas_zero_snr") else {}
    is_usual = kept in ({}, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False})
    return ({} if is_usual else kept) | base.schedule


def source_in_words(base):
    """The single file that a base model is, with the start of its sha256 by which sites find it; None without."""
    name, (_, sha256) = single_file_of(base), base_source(base)
    return f"{name}, sha256 {sha256[:10]}" if name and sha256 else name


def lora_facts(folder):
    """{"kind": LoRA, DoRA, LoHa or LoKr; "rank", "alpha"} of the LoRA file in a folder, from its metadata."""
    from safetensors import safe_open

    with safe_open(folder / LORA_FILE, "np") as file:
        config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))

    def values(field):
        found = {value for name, value in config.items() if name.rpartition(".")[2] == field}
        return ", ".join(f"{value:g}" for value in sorted(found)) or None

    parts = {name.partition(".")[0] for name in config}
    own = [{name.partition(".")[2]: value for name, value in config.items() if name.startswith(f"{part}.")}
           for part in parts]  # fmt: skip
    kinds = {kind_of(each) for each in own} | {"LoRA"}
    kind = next(kind for kind in ("LoKr", "LoHa", "DoRA", "LoRA") if kind in kinds)
    return {"kind": kind, "rank": values("r"), "alpha": values("lora_alpha") or values("alpha")}


MEASURES = {  # log keys of --validation_metrics -> their names on the card
    "validation/diffusion_loss": "diffusion loss",
    "validation/one_step/latent_mse": "squared error of the latents",
    "validation/one_step/psnr": "PSNR of the decoded estimate, dB",
    "validation/one_step/spread/middle_block": "spread of decoder features against the picture's (1 is right)",
    "validation/one_step/high_frequency": "log power of high frequencies against the picture's (0 is right)",
    "validation/one_step/perceptual/efficientnet-lite2": "distance of EfficientNet-Lite2 features",
    "validation/kid": "kernel distance (EfficientNet-Lite2) of samples",
}


def measures_of(path):
    """({measure: "first -> last"}, when the first was measured) of a run with --validation_metrics, from its log.

    Without measures ({}, "").
    """
    rows = [row_of(line) for line in path.read_text(errors="replace").splitlines()] if path.is_file() else []
    if not any("validation/one_step/psnr" in row for row in rows):
        return {}, ""
    series = {key: [row[key] for row in rows if key in row] for key in MEASURES}
    step = next(row["step"] for row in rows if "validation/one_step/psnr" in row)
    found = {MEASURES[key]: f"{values[0]:.4g} -> {values[-1]:.4g}" for key, values in series.items() if values}
    return found, f"after {step} steps" if step else "before"


PATIENCE = 20  # seconds that a failing request is tried again
PAPER = "https://openreview.net/forum?id=y4DtzADzd1"

# The allow-list: names at the top of the folder, and names in the folders of a pipeline's parts.
RESULT_FILES = re.compile(
    r"README\.md|image_\d+\.png|model_index\.json|(pytorch_lora_weights(_kohya)?|model)\.safetensors"
    r"|config\.json|diffusion_pytorch_model\.safetensors"  # of a network that is no pipeline
)
PART_FILES = re.compile(
    r"(diffusion_pytorch_model|model)(\.\w+)?(-\d+-of-\d+)?\.safetensors"  # weights: variants, shards
    r"|(diffusion_pytorch_model|model)\.safetensors\.index(\.\w+)?\.json"
    r"|(\w+_)?config\.json"
    r"|tokenizer\.json|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|\w[\w.]*\.model"
    r"|chat_template\.jinja"
)


class PublishError(RuntimeError):
    """A failed upload; its message says what happened, where the result is and which command tries again."""


# ---------------------------------------------------------------------------------------------------------------------
# The Hub client, made to give up in time and to keep the token to itself


class Patience:
    """Limits how long the Hub client goes on with a request that fails.

    By itself it repeats one up to five times, waits in between for as long as the server asks, and has no timeout.
    Inside `with Patience(seconds):` a request is repeated for so many seconds after it first failed, and may be
    silent for 10 s longer.
    """

    def __init__(self, seconds):
        self.seconds = seconds
        self.failing_since = {}  # request -> time of its first failure, None while there is none

    def __enter__(self):
        from huggingface_hub import set_client_factory

        set_client_factory(self.client)
        return self

    def __exit__(self, *exception):
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        set_client_factory(default_client_factory)

    def client(self):
        """The client that huggingface_hub makes, with a timeout and our hooks after its own."""
        from huggingface_hub.utils._http import default_client_factory

        client = default_client_factory()
        client.timeout = self.seconds + 10
        ours = {"request": self.before, "response": self.after}
        client.event_hooks = {kind: [*client.event_hooks[kind], hook] for kind, hook in ours.items()}
        return client

    def elapsed(self, request):
        """Seconds since the request first failed, which it has."""
        key, now = (request.method, str(request.url)), time.monotonic()
        if self.failing_since.get(key) is None:
            self.failing_since[key] = now
        return now - self.failing_since[key]

    def before(self, request):
        """Called with every request: one that is seen again has failed."""
        key = (request.method, str(request.url))
        if key not in self.failing_since:
            self.failing_since[key] = None
        elif self.elapsed(request) > self.seconds:
            raise TimeoutError(f"no good answer from {request.url.host} for {self.seconds:g} s")

    def after(self, response):
        """Called with every answer: raises what the client would raise after its last try, when no time is left."""
        from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

        status, request = response.status_code, response.request
        if status < 400:
            self.failing_since.pop((request.method, str(request.url)), None)
        elif status in (408, 429) or status >= 500:
            limit = parse_ratelimit_headers(response.headers) if status == 429 else None
            asked = response.headers.get("Retry-After", "")
            wait = limit.reset_in_seconds if limit and not limit.remaining else int(asked) if asked.isdigit() else 1
            if self.elapsed(request) + wait > self.seconds:
                hf_raise_for_status(response)
        if status > 400 and request.url.path.endswith("/validate-yaml"):
            hf_raise_for_status(response)  # the client would read an error page as JSON before looking at the status


@contextlib.contextmanager
def brisk_xet(patience):
    """Inside, an upload to Xet storage that fails is given up within half a minute, not ten; the user's settings win.

    That upload is not made by the HTTP client: it has retries of its own, read from the environment by each session.
    """
    from huggingface_hub.utils._xet import abort_xet_session

    settings = {
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
        "HF_XET_CLIENT_CONNECT_TIMEOUT": f"{patience + 10:.0f}s",  # not READ_TIMEOUT: a slow line needs its time
    }
    ours = settings.keys() - os.environ.keys()
    os.environ.update({name: settings[name] for name in ours})
    abort_xet_session()  # the one that downloaded the base model: the next use makes another
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        abort_xet_session()


def find_token(token=None):
    """The token given, else that of HF_TOKEN or `hf auth login`; UserError when there is none, or no proper one."""
    from huggingface_hub import get_token

    token = (token or get_token() or "").strip()
    require(token, "no token for the Hub: create one with write permission at https://huggingface.co/settings/tokens "
                   "and set HF_TOKEN, or run `hf auth login`")  # fmt: skip
    require(re.fullmatch(r"[!-~]+", token),
            "the token (of --hub_token, HF_TOKEN or `hf auth login`) has blanks or other characters that no token "
            "has; copy it again")  # fmt: skip
    return token


def check_name(repo_id, source=None):
    """UserError unless it is a name that a repository can have. source: what it comes from, for the message."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{source or f'--hub_model_id {repo_id}'}: give owner/name or name ({error})") from None


def check_online():
    """UserError where the environment forbids requests to the Hub."""
    from huggingface_hub import is_offline_mode

    require(not is_offline_mode(), "--push_to_hub needs the network, but HF_HUB_OFFLINE is set: unset one of them")


def in_a_line(error, token):
    """What went wrong, from an exception of the Hub client, without the token."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError | TransportError):
        error = error.__cause__
    if isinstance(error, KeyboardInterrupt | TimeoutError):
        line = str(error) or "interrupted"
    elif isinstance(error, TransportError):
        line = f"the Hub cannot be reached or closed the connection ({type(error).__name__}: {error})"
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hints = {
            401: "it does not accept the token",
            403: "the token has no permission to write there",
            404: "there is no such repository, or the token may not see it",
            429: "too many requests: wait some minutes",
        }
        line = f"the Hub answered {status}, {hints.get(status, error.response.reason_phrase)}"
        line += f" ({error.server_message})" if error.server_message else ""
    else:
        line = f"{type(error).__name__}: {error}"
    return " ".join(line.replace(token, "***").split())[:500]


def check_access(repo_id, token=None, private=False, patience=PATIENCE, create=True):
    """Before training: create the repository if need be, check that the token may write, return the id owner/name.

    With create=False nothing is created: a repository that is not there must be one that the token's owner can make.

    Without a usable answer from the Hub (no network, a server error) it prints a warning and returns `repo_id`.

    Raises UserError for a missing or refused token, a name that cannot be used, and offline mode.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_name(repo_id)
    token = find_token(token)
    check_online()
    try:
        with Patience(patience):
            api = HfApi(token=token)
            if create:
                repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
            else:
                repo_id = check_owner(api, repo_id)
                if not api.repo_exists(repo_id):
                    return repo_id
            api.auth_check(repo_id, write=True)  # creating one that exists succeeds with a read-only token
    except UserError:
        raise
    except Exception as error:
        line = in_a_line(error, token)
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if 400 <= status < 500 and status not in (408, 429):
            raise UserError(
                f"--push_to_hub: {line}; give a token with write permission for {repo_id} in HF_TOKEN (or "
                "--hub_token), or another --hub_model_id"
            ) from None
        print(f"warning: could not check access to {repo_id} on the Hub ({line}); publishing is tried after training")
    return repo_id


def check_owner(api, repo_id):
    """owner/name of a name, from the token; UserError where its owner is another, and there is no such repository."""
    user = api.whoami()
    owner, _, name = repo_id.rpartition("/")
    owner, repo_id = owner or user["name"], f"{owner or user['name']}/{name}"
    owners = {user["name"], *(group["name"] for group in user.get("orgs", ()))}
    require(owner in owners or api.repo_exists(repo_id), f"--push_to_hub: there is no {repo_id}, and the token of "
            f"{user['name']} can't create it; give a token of {owner}, or another --hub_model_id")  # fmt: skip
    return repo_id


# ---------------------------------------------------------------------------------------------------------------------
# The model card


@dataclass(frozen=True)
class Card:
    """What the model card says. `lpl` and `training` are {setting: value} for its tables; `lpl` is empty without LPL.
    `measures` is {measure: value}, empty without --validation_metrics, from the moment `measured_from` on.

    name: owner/name on the Hub, or only a name; base_model, dataset: as given to the run, a name on the Hub or a path
    (paths are never shown); lora: LoRA or DoRA, None for a whole model; trigger: the words that call what was learnt;
    prediction_type: when the run was given one, so that a LoRA's snippet sets it; base_file: name of the single file
    that the base model is; schedule: further settings of the scheduler for that snippet; samples: {key: value} of each
    prompt of --validation_prompts_file. Image number n of prompt p is `image_{p * images_per_prompt + n}.png`.
    """

    name: str
    family: Family
    base_model: str
    lora: str | None
    lpl: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    revision: str | None = None
    dataset: str | None = None
    num_images: int | None = None
    prompts: tuple[str, ...] = ()
    images_per_prompt: int = 0
    prediction_type: str | None = None
    base_file: str | None = None
    schedule: dict = field(default_factory=dict)
    measures: dict = field(default_factory=dict)
    measured_from: str = "before"
    trigger: str | None = None
    samples: tuple[dict, ...] = ()
    networks: str = "the VAE's decoder"  # whose features the loss compares


def write_card(folder, card):
    """Write `folder/README.md`: metadata, gallery of the validation images that are there, snippet, settings."""
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    base, dataset = hub_name(card.base_model), hub_name(card.dataset)
    licence = base_licence(card.base_model, card.revision)
    if not licence:
        print(f"note: found no licence in the base model's card; you may want to add one to {folder / 'README.md'}")
    tags, pictures = [card.family.tag, "text-to-image", "diffusers", "diffusers-training"], gallery(folder, card)
    data = ModelCardData(
        base_model=base,
        datasets=[dataset] if dataset else None,
        **licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags + ["lora"] * bool(card.lora) + ["lpl"] * bool(card.lpl),
        instance_prompt=card.trigger,
        widget=pictures or ([{"text": card.trigger}] if card.trigger else None),
    )
    parts = [
        f"# {card.name.split('/')[-1]}",
        "<Gallery />" if pictures else "",
        description(card, base, dataset),
        f"## Trigger words\n\nPut {in_code(card.trigger)} into the prompt." if card.trigger else "",
        f"## Use\n\n```python\n{snippet(card, base)}\n```",
        f"## Latent perceptual loss\n\n{table(card.lpl)}" if card.lpl else "",
        f"## Training\n\n{table(card.training)}" if card.training else "",
        f"## Held-out images, {card.measured_from} -> after training\n\n{table(card.measures)}"
        if card.measures
        else "",
        f"## Validation pictures\n\n{sample_table(card.samples)}" if card.samples else "",
    ]
    text = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def base_licence(base_model, revision=None):
    """{license, license_name, license_link}, as far as the base model's own card has and can be read for them."""
    from huggingface_hub import metadata_load

    try:
        with Patience(5):
            path = model_file(base_model, "README.md", revision)
        metadata = (metadata_load(path) if path else None) or {}
    except Exception:  # no network, no access, damaged YAML: all the same to a card
        return {}
    if not metadata.get("license"):
        return {}
    licence = {key: metadata[key] for key in ("license", "license_name", "license_link") if metadata.get(key)}
    if "://" not in str(licence.get("license_link", "://")):  # a file of the base model's repository
        file = licence.pop("license_link")
        if hub_name(base_model):
            licence["license_link"] = f"https://huggingface.co/{base_model}/blob/{revision or 'main'}/{file}"
    return licence


def gallery(folder, card):
    """The widget of the metadata: each validation image that is there, with its prompt."""
    numbered = enumerate(prompt for prompt in card.prompts for _ in range(card.images_per_prompt))
    return [
        {"text": prompt or " ", "output": {"url": f"image_{number}.png"}}
        for number, prompt in numbered
        if (folder / f"image_{number}.png").is_file()
    ]


def description(card, base, dataset):
    """What it is, in a sentence or two."""
    what = f"A {card.lora} for" if card.lora else "A fine-tuned version of"
    model = f"[{base}](https://huggingface.co/{base})" if base else f"a local {card.family.long_name} model"
    model += f" ({in_code(card.base_file)})" if card.base_file else ""
    images = f"{card.num_images} images" if card.num_images else "images"
    data = (
        f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else f"a private collection of {images}"
    )
    loss = (
        f"with the [latent perceptual loss]({PAPER}) (LPL), which compares features of {card.networks} for the "
        "predicted and the true latents"
        if card.lpl
        else "without the latent perceptual loss"
    )
    return f"{what} {model}, trained on {data} {loss}."


def snippet(card, base):
    """Python that loads the result and draws the first prompt."""
    pipeline = card.family.pipeline_class
    loaded, how = (base or "path/to/the/base/model") if card.lora else card.name, "from_pretrained"
    if card.lora and card.base_file:
        loaded, how = f"path/to/{card.base_file}", "from_single_file"
    merged = card.lora in ("LoHa", "LoKr")  # diffusers does not read these
    lines = [
        f"# once, in a shell: python -m lpl_finetuning.merge {loaded} {card.name} merged",
        "",
    ] * merged
    loaded, how = ("merged", "from_pretrained") if merged else (loaded, how)
    lines += [
        "import torch",
        f"from diffusers import {pipeline}",
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f'pipe = {pipeline}.{how}("{loaded}", dtype=torch.float16).to(device)',
    ]
    if card.lora and not merged:
        lines.append(f'pipe.load_lora_weights("{card.name}")')
    settings = card.schedule | ({"prediction_type": card.prediction_type} if card.prediction_type else {})
    if card.lora and settings:
        given = [json.dumps(value) if isinstance(value, str) else str(value) for value in settings.values()]
        config = ", ".join(f"{name}={value}" for name, value in zip(settings, given, strict=True))
        lines.append(f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, {config})")
    prompt = card.prompts[0] if card.prompts else card.trigger or "a photo of a red apple"
    if card.trigger and card.trigger.lower() not in prompt.lower():
        prompt = f"{card.trigger}, {prompt}"
    return "\n".join([*lines, f"image = pipe({prompt!r}).images[0]"])


def in_code(text):
    """A text as Markdown code on one line."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def table(settings):
    """A Markdown table of {setting: value}; unset ones are left out, and so are paths."""

    def shown(value):
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:g}"
        text = str(value)
        if re.search(r"(?<![\w:/])(/|~/|\.\.?/)\w", text) or os.path.exists(text):
            return "a local file"
        return " ".join(text.replace("|", "\\|").split())

    rows = [f"| {name} | {shown(value)} |" for name, value in settings.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def sample_table(samples):
    """A Markdown table of prompts with their settings; a column that no prompt has is left out."""

    def shown(value):
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return " ".join(text.replace("|", "\\|").split())

    columns = [key for key in KEYS if any(key in sample for sample in samples)]
    rows = [[shown(sample.get(key, "")) for key in columns] for sample in samples]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


# ---------------------------------------------------------------------------------------------------------------------
# What is published


def publishable_files(folder):
    """The files of a result that the allow-list names, sorted; links are never among them.

    Raises UserError when there is no result, or a pipeline of which a part or its weights are missing.
    """
    root = Path(folder).resolve()
    require(root.is_dir(), f"{folder}: there is no such folder; name the output folder of a run")
    files, name = allowed(root, RESULT_FILES), output_name_of(root)
    files += allowed(root, re.compile(re.escape(f"{name}.safetensors"))) if name else []
    files = list(dict.fromkeys(files))
    if root / "model_index.json" in files:
        for part in pipeline_parts(root):
            found = allowed(root / part, PART_FILES)
            names = {path.name for path in found}
            # a part with a config.json is a model; tokenizers and schedulers call theirs otherwise
            weights = any(name.endswith(".safetensors") for name in names) or "config.json" not in names
            require(
                names and weights,
                f"{folder}: {part}/, named in model_index.json, is not all there; let the run finish",
            )
            files += found
    require(any(path.suffix == ".safetensors" for path in files),
            f"{folder}: nothing to publish: it has no pytorch_lora_weights.safetensors, no model.safetensors and no "
            "pipeline with a model_index.json; links to files elsewhere do not count")  # fmt: skip
    return sorted(files)


def allowed(folder, names):
    """The plain files of a folder whose names match; none when the folder itself is a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [
        path for path in folder.iterdir() if names.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    ]


def pipeline_parts(folder):
    """Names of the parts that a pipeline's model_index.json says it has."""
    index = read_json(folder / "model_index.json")
    require(
        isinstance(index, dict),
        f"{folder / 'model_index.json'}: not the index of a pipeline; let the run finish",
    )
    return [
        name
        for name, value in index.items()
        if re.fullmatch(r"[a-z]\w*", name) and isinstance(value, list) and value and value[0]
    ]


def hub_name(name_or_path):
    """The name of a model or data set on the Hub; None for a folder or file here, and for what cannot be a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not name_or_path or os.path.exists(name_or_path):
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def forget_local_paths(files):
    """Empty the `_name_or_path` of JSON files where it is a path: save_pretrained writes where each part came from."""

    def forget(match):
        return match[0] if hub_name(match[2]) else f'{match[1]}""'

    for path in files:
        if path.suffix == ".json" and "name_or_path" in (text := path.read_text(encoding="utf-8")):
            cleaned = re.sub(r'("_?name_or_path"\s*:\s*)"((?:[^"\\]|\\.)*)"', forget, text)
            if cleaned != text:
                temporary = path.with_name(f".{path.name}.tmp")
                temporary.write_text(cleaned, encoding="utf-8")
                os.replace(temporary, path)


def publish(folder, repo_id, token=None, private=False, patience=PATIENCE):
    """Upload a result in one commit, all of it or nothing, and return the address of its page.

    Local paths in the pipeline's configuration are emptied first. The repository is created if need be.

    Raises UserError when there is nothing to publish, no token or no possible name; PublishError for every failure
    after that, whatever its kind.
    """
    check_name(repo_id)
    token = find_token(token)
    root = Path(folder).resolve()
    files = publishable_files(folder)
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        forget_local_paths(files)
        with Patience(patience), brisk_xet(patience):
            api = HfApi(token=token)
            repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
            operations = [CommitOperationAdd(path.relative_to(root).as_posix(), path) for path in files]
            api.create_commit(repository.repo_id, operations, commit_message="Upload weights and model card")
            return str(repository)
    except (Exception, KeyboardInterrupt) as error:
        raise PublishError(
            f"{repo_id} was not published: {in_a_line(error, token)}\n"
            f"The result is safe in {folder}. To try again:\n"
            f"    {retry_command(folder, repo_id, private)}"
        ) from None


def retry_command(folder, repo_id, private):
    """The command line that publishes a folder; its paths are relative where they lie below the current folder.

    Where Python does not find the package from the current folder, the command goes to the repository first.
    """
    places = [".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = any(Path(place, "lpl_finetuning").is_dir() for place in places) or is_distributed("lpl-finetuning")

    def short(path):
        if not found:
            return os.path.abspath(path)
        relative = os.path.relpath(path)
        return os.path.abspath(path) if relative.startswith((os.pardir, "-")) else relative

    words = ["python", "-m", "lpl_finetuning.publish", short(folder), "--hub_model_id", repo_id]
    command = shlex.join(words + ["--hub_private_repo"] * private)
    return command if found else f"cd {shlex.quote(str(REPOSITORY))} && {command}"


def is_distributed(name):
    """Whether a distribution is installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.distribution(name))
    return False


def publish_or_exit(folder, repo_id, token=None, private=False, patience=PATIENCE):
    """Publish and print the page's address; a failed upload is told and ends the process with status 3."""
    try:
        print(f"Published: {publish(folder, repo_id, token, private, patience)}")
    except PublishError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)


def publish_result(args, repo_id, stopped):
    """Publish a run's output folder; where the run was asked to stop, tell how to publish it instead."""
    if stopped:
        tell_how_to_publish(args.output_dir, repo_id, args.hub_private_repo)
    else:
        publish_or_exit(args.output_dir, repo_id, args.hub_token, args.hub_private_repo)


def tell_how_to_publish(folder, repo_id, private=False):
    """Instead of publishing, where the run was asked to stop."""
    print(f"Not published, since the run was asked to stop. This publishes it:\n    "
          f"{retry_command(folder, repo_id, private)}")  # fmt: skip
