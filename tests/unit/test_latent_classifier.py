"""The latent classifier's network, its augmentation, its counts and its labels."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from lpl_finetuning.data.labels import Classes, in_words_of_labels
from lpl_finetuning.data.samples import addressed_rng
from lpl_finetuning.errors import DataError, UserError
from lpl_finetuning.networks.latent_classifier import LatentClassifier, ResidualBlock, load_latent_classifier
from lpl_finetuning.results.classifier_card import accuracy_table, save_classifier
from lpl_finetuning.training.augmentation import SMALLEST_AREA, erase, rectangle, shift
from lpl_finetuning.training.classification import Counts, balanced_accuracy
from lpl_utils import LatentPerceptualLoss, LPLConfig, stage_features
from pretrain import emoji_images


@pytest.fixture
def network():
    """A classifier of three stages whose every weight matters."""
    torch.manual_seed(0)
    network = LatentClassifier(classes=("a", "b", "c"), block_widths=(8, 16, 24), blocks_per_stage=2, dropout=0.5)
    with torch.no_grad():
        for parameter in network.parameters():  # a new block is its shortcut, and norms are trivial
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The network


def test_a_batch_is_its_samples_one_by_one(network):
    latents = torch.randn(5, 4, 8, 8)
    alone = torch.cat([network(latent[None]) for latent in latents])
    torch.testing.assert_close(network(latents), alone, rtol=1e-5, atol=1e-6)


def test_float32_agrees_with_float64(network):
    latents = torch.randn(3, 4, 9, 7)
    expected = list(stage_features(network, latents))
    logits = network(latents)
    precise = network.double()
    torch.testing.assert_close(logits.double(), precise(latents.double()), rtol=1e-5, atol=1e-6)
    x = latents.double()
    for index, features in enumerate(expected):
        x = precise.run(index, x)
        torch.testing.assert_close(features.double(), x, rtol=1e-4, atol=1e-6)


def test_stages_have_names_shapes_and_end_in_the_head(network):
    """What a loss compares is what the logits are made of."""
    latents = torch.randn(2, 4, 8, 8)
    features = dict(zip(network.names, stage_features(network, latents), strict=True))
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "block 1": (2, 8, 8, 8), "block 2": (2, 16, 4, 4), "block 3": (2, 24, 2, 2), "pooled": (2, 24),
    }  # fmt: skip
    torch.testing.assert_close(network.head(features["pooled"]), network(latents))
    assert (network.upscaling, network.dtype, network.input_space.scaling_factor) == (8, torch.float32, 1.0)


def test_the_network_serves_the_perceptual_loss(network):
    """Zero at equality, gradient into the estimate and no parameter. "standard" refuses the pooled stage."""
    loss = LatentPerceptualLoss(network, LPLConfig(norm_type="shared"))
    clean, estimate = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8, requires_grad=True)
    assert loss(clean, clean).per_sample.abs().max() == 0
    output = loss(estimate, clean)
    output.per_sample.sum().backward()
    assert len(output.per_layer) == 4 and all((layer > 0).all() for layer in output.per_layer)
    assert estimate.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in network.parameters())


def test_dropout_works_in_training_only(network):
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(network(latents), network(latents))
    network.train()
    assert not torch.equal(network(latents), network(latents))


def test_a_new_block_is_its_shortcut():
    block = ResidualBlock(8, 16, stride=2, dropout=0.1).eval()
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(x), block.skip(block.pool(x)) + block.conv2.bias[:, None, None])
    assert block(torch.randn(1, 8, 5, 7)).shape == (1, 16, 3, 4), "odd sizes are rounded up"


def test_a_saved_network_is_the_same_in_half_the_bytes(network, tmp_path):
    save_classifier(tmp_path, network, torch.float16)
    again, latents = load_latent_classifier(tmp_path), torch.randn(4, 4, 8, 8)
    torch.testing.assert_close(again(latents), network(latents), rtol=0, atol=2e-2)
    assert again.dtype == torch.float32 and not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert list(again.config.classes) == ["a", "b", "c"] and network.dtype == torch.float32
    size = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 2.2 * sum(parameter.numel() for parameter in network.parameters()) + 10_000


def test_another_folder_is_no_classifier(network, tmp_path):
    with pytest.raises(UserError, match=r"there is no config.json; name the output folder of train_latent_classifier"):
        load_latent_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="is of a AutoencoderKL"):
        load_latent_classifier(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


def test_a_shift_pads_with_the_edge_and_cuts_back():
    """Each crop is one of torch's own padding, many places come up, and a sample's follows from its number."""
    latents = torch.randn(1, 3, 5, 6).repeat(60, 1, 1, 1)
    padded = torch.nn.functional.pad(latents[:1], (2, 2, 2, 2), mode="replicate")[0]
    crops = {(top, left): padded[:, top : top + 5, left : left + 6] for top in range(5) for left in range(5)}
    moved = shift(latents, range(60), 2, seed=3)
    places = [next(place for place, crop in crops.items() if torch.equal(crop, sample)) for sample in moved]
    assert len(Counter(places)) > 15
    assert torch.equal(moved[7:9], shift(latents[:2], [7, 8], 2, seed=3))
    assert not torch.equal(moved, shift(latents, range(60), 2, seed=4))
    assert torch.equal(shift(latents, range(60), 0, seed=3), latents)


def test_the_default_shift_is_a_sixteenth():
    for size, pad in ((8, 1), (32, 2), (128, 8)):
        latents = torch.randn(1, 1, size, size).repeat(40, 1, 1, 1)
        assert torch.equal(shift(latents, range(40), None, 0), shift(latents, range(40), pad, 0))


def test_erasing_replaces_one_rectangle_by_noise():
    latents = torch.full((400, 2, 8, 8), 7.0)
    erased = erase(latents, range(400), probability=0.5, area=0.25, seed=1)
    changed = (erased != 7).all(dim=1)
    assert torch.equal(changed, (erased != 7).any(dim=1)), "all channels of a place"
    some = changed.flatten(1).any(dim=1)
    assert 0.4 < some.float().mean() < 0.6
    for mask in changed[some]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert mask.sum() == rows.sum() * columns.sum(), "a rectangle"
        assert mask.sum() <= 0.25 * 64 * 1.5, "sides are rounded to whole latents"
    noise = erased[changed[:, None].expand_as(erased)]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(erased[10:12], erase(latents[:2], [10, 11], 0.5, 0.25, seed=1))
    assert erase(latents, range(400), 0.0, 0.25, seed=1) is latents


def test_the_area_of_the_rectangle_is_uniform():
    shares = [rectangle(addressed_rng(0, number, "erasing_place"), (64, 64), 1.0, 0.4).mean() for number in range(300)]
    assert np.mean(shares) == pytest.approx((SMALLEST_AREA + 0.4) / 2, abs=0.02) and max(shares) < 0.43


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def test_counts_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 40)
    labels[labels == 4] = 0  # no image of one class
    logits = torch.from_numpy(rng.normal(size=(40, 7)))
    counts = Counts(7, "cpu")
    for first in (0, 16, 32):
        part = slice(first, first + 16)
        counts.add(logits[part], torch.from_numpy(labels[part]), torch.ones(len(labels[part])))
    values, confusion = counts.read(Accelerator(cpu=True))
    order = (-logits).argsort(dim=1).numpy()
    assert values["validation/accuracy"] == pytest.approx((order[:, 0] == labels).mean())
    assert values["validation/top5_accuracy"] == pytest.approx(
        np.mean([label in row[:5] for label, row in zip(labels, order, strict=True)]))  # fmt: skip
    shares = [(order[labels == label, 0] == label).mean() for label in np.unique(labels)]
    assert values["validation/balanced_accuracy"] == pytest.approx(np.mean(shares)) and len(shares) == 5
    assert values["validation/loss"] == 1
    expected = np.zeros((7, 7), dtype=int)
    np.add.at(expected, (labels, order[:, 0]), 1)
    assert (confusion == expected).all()


def test_naming_the_most_frequent_class_is_worth_little():
    images, found = np.array([90.0, 10, 0]), np.array([90.0, 0, 0])
    assert balanced_accuracy(images, found) == 0.5 and found.sum() / images.sum() == 0.9
    classes = Classes(("a", "b", "c"), (5, 5, 5), (90, 10, 0))
    assert classes.majority == 0.9 and classes.remarks() == [
        "No held-out image is of these classes, which no accuracy counts: c."]  # fmt: skip
    table = accuracy_table(classes, {"validation/accuracy": 0.9, "validation/balanced_accuracy": 0.5})
    assert "| accuracy | 90.0 % | 90.0 % |" in table and "(mean over classes) | 50.0 % | 50.0 % |" in table


def test_class_weights_leave_the_mean_at_one():
    classes = Classes(("a", "b"), (400, 100), (1, 1))
    for power, ratio in ((0.0, 1), (0.5, 2), (1.0, 4)):
        rare, frequent = classes.weights(power)[1], classes.weights(power)[0]
        assert rare / frequent == pytest.approx(ratio)
        assert (400 * frequent + 100 * rare) / 500 == pytest.approx(1)


def test_messages_about_captions_speak_of_labels():
    with pytest.raises(DataError) as caught, in_words_of_labels():
        raise DataError("x: 2 images have no caption.", "Name a column with --caption_column, or give one caption for "
                        "all with --instance_prompt.")  # fmt: skip
    assert str(caught.value) == "x: 2 images have no label. Name a column with --label_column."


# ---------------------------------------------------------------------------------------------------------------------
# Groups of the emoji


def test_groups_of_emoji_do_not_depend_on_the_skin_tone(tmp_path):
    """A pair of two skin tones, which the package does not list, has the group of its first person."""
    groups = tmp_path / "groups" / "package"
    groups.mkdir(parents=True)
    listed = {"\U0001f44b": "People", "\u2764\ufe0f": "Smileys", "\U0001faf1": "People"}
    (groups / "data-by-emoji.json").write_text(json.dumps({key: {"group": group} for key, group in listed.items()}))
    assets = tmp_path / "package" / "assets"
    assets.mkdir(parents=True)
    names = ["1f44b", "1f44b-1f3fd", "1faf1-1f3fb-200d-1faf2-1f3fd", "2764-fe0f"]
    for name in names:
        (assets / f"{name}.webp").touch()
    assert emoji_images.emoji_groups(tmp_path) == ["People", "People", "People", "Smileys"]
