"""The look at the data: the sheet's pixels are the training set's, its texts are what the model gets."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file

import preview_data
from lpl_finetuning import errors, unpacking
from lpl_finetuning.data import contact_sheet, scan
from lpl_finetuning.data.contact_sheet import (
    UNKNOWN,
    SampleFacts,
    caption_shown,
    crop_shown,
    legible,
    shorten,
    small_font,
    wrap,
)
from lpl_finetuning.data.images import Crop, from_pixel_values, open_image, prepare_image
from lpl_finetuning.data.samples import SampleOrder, TrainingSet
from lpl_finetuning.data.tables import CaptionedImage
from lpl_finetuning.flags import caption_rules, data_source, framing_rules
from lpl_finetuning.training import objective
from tests import children
from tests.tiny_models import autoencoder

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(200, 180), (150, 300), (150, 330), (310, 150), (220, 200), (140, 290), (190, 190)]
BUCKETS = "128,128; 96,160; 160,96"  # drawn at 1:1


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures of noise in three shapes, in which every crop is unmistakable, with tags as captions."""
    folder, rng = tmp_path_factory.mktemp("preview") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number, shape in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"subject {number}, red, green, blue, large")
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A random autoencoder on disk."""
    folder = tmp_path_factory.mktemp("vae")
    autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture
def sheet_of(photos, tmp_path, cache_dir):
    """Function from flags to (args, sheet as an array), by the command itself."""

    def make(*flags, folder=photos):
        target = tmp_path / "sheet.png"
        flags = [*map(str, (folder, "--cache_dir", cache_dir, "--preview", target, *flags))]
        preview_data.main(flags)
        return preview_data.parse_args(flags), np.asarray(Image.open(target))

    return make


def training_set(args):
    """(the samples of a run with these flags, its images), built as the training scripts build them."""
    images = scan.find_images(data_source(args))[0].images
    cuts = framing_rules(args).framing(images)
    order = SampleOrder(args.seed, args.train_batch_size, cuts.buckets)
    return TrainingSet(images, order, cuts, caption_rules(args)), images


def places(sheet, pixels):
    """Every (top, left) where the sheet shows these pixels exactly."""
    height, width = pixels.shape[:2]
    corners = (sheet[: 1 - height or None, : 1 - width or None] == pixels[0, 0]).all(-1)
    return [
        (top, left)
        for top, left in np.argwhere(corners).tolist()
        if np.array_equal(sheet[top : top + height, left : left + width], pixels)
    ]


def pixels_of(sample):
    return from_pixel_values(sample["pixel_values"])


def facts_of(args):
    images = scan.find_images(data_source(args))[0].images
    return [facts for facts, _, _ in preview_data.training_samples(args, images, framing_rules(args).framing(images))]


def some_facts(**more):
    facts = {"number": 0, "epoch": 0, "name": "a.png", "caption": "a cat", "dropped": False, "flipped": False}
    return SampleFacts(**{**facts, "crop": Crop((200, 400), (0, 30), (100, 100)), **more})


@pytest.fixture
def texts(monkeypatch):
    """Every (text, colour) that is drawn from now on."""
    drawn, draw = [], ImageDraw.ImageDraw.text

    def text(self, place, words, fill=None, font=None, **more):
        drawn.append((words, fill))
        return draw(self, place, words, fill, font, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", ["", "--random_flip", "--center_crop --random_flip", "--cache_variants 3 --random_flip"]
)
@pytest.mark.parametrize("seed", [0, 5])
def test_the_sheet_shows_the_first_samples_of_training_in_their_order(sheet_of, more, seed):
    flags = ["--aspect_ratio_buckets", BUCKETS, "--train_batch_size", 2, "--preview_images", 9, "--seed", seed]
    args, sheet = sheet_of(*flags, *more.split())
    samples, _ = training_set(args)
    found = [places(sheet, pixels_of(samples[n])) for n in range(9)]
    together = sorted({place for few in found for place in few})  # as one reads; a crop may come twice
    assert len(together) == 9
    assert all(place in few for place, few in zip(together, found, strict=True))


def test_a_recipe_is_as_good_as_its_flags(sheet_of, photos, tmp_path, capsys):
    """What is not about the data is left out and told so; the folder on the command line wins over the recipe's."""
    _, wanted = sheet_of("--resolution", 64, "--center_crop", "--train_batch_size", 3, "--seed", 5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("resolution: 64\ncenter_crop: true\ntrain_batch_size: 2\nseed: 5\nlearning_rate: 1e-4\n"
                      "use_lpl: true\ntrain_data_dir: elsewhere\n")  # fmt: skip
    _, sheet = sheet_of("--config", recipe, "--train_batch_size", 3)
    assert np.array_equal(sheet, wanted) and not np.array_equal(sheet, sheet_of("--resolution", 64)[1])
    taken = "taken are resolution, center_crop, train_batch_size, seed, train_data_dir"
    assert f"--config {recipe}: {taken}; left out are learning_rate, use_lpl\n" in capsys.readouterr().out
    recipe.write_text(f"train_data_dir: {photos}\ncenter_crop: maybe\n")
    with pytest.raises(errors.UserError, match="center_crop is 'maybe'; it must be true or false"):
        preview_data.parse_args(["--config", str(recipe)])
    recipe.write_text(f"train_data_dir: {photos}\n")
    assert preview_data.parse_args(["--config", str(recipe)]).train_data_dir == str(photos)
    assert "taken are train_data_dir\n" in capsys.readouterr().out


def test_flips_are_shown_and_told_in_every_epoch(sheet_of, photos, texts):
    args, sheet = sheet_of("--resolution", 128, "--random_flip", "--center_crop", "--preview_images", 21)
    images = scan.find_images(data_source(args))[0].images
    told = set()
    for fact, pixels, _ in preview_data.training_samples(args, images, framing_rules(args).framing(images)):
        image = open_image((photos / fact.name).read_bytes(), fact.name)
        image = ImageOps.mirror(image) if fact.flipped else image
        assert np.array_equal(pixels, prepare_image(image, (128, 128), center_crop=True, flip=False)[0])
        assert places(sheet, pixels)
        assert ("flipped" in crop_shown(fact)) == fact.flipped
        told.add((fact.epoch, fact.flipped))
    assert len(told) == 6
    assert sum("flipped" in text for text, _ in texts if text != "flipped") > 3


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_shrunk(sheet_of):
    args, sheet = sheet_of("--resolution", 64, "--preview_images", 2)
    pixels = pixels_of(training_set(args)[0][1])
    assert places(sheet, pixels.repeat(3, axis=0).repeat(3, axis=1))
    args, sheet = sheet_of("--resolution", 512, "--preview_images", 2)
    pixels = pixels_of(training_set(args)[0][1])
    assert places(sheet, np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.LANCZOS)))


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (512, 512), (256, 1024), (1024, 256), (8, 4096), (4096, 8)])
def test_every_shape_fits_its_place(size):
    height, width = contact_sheet.shown_size(size)
    assert 0 < height <= contact_sheet.PICTURE and 0 < width <= contact_sheet.WIDE
    if min(height, width) > 20:
        assert height / width == pytest.approx(size[0] / size[1], rel=0.02)
    assert max(height, width) > 100


@pytest.mark.parametrize("batch_size", [1, 2, 12])
def test_batches_are_labelled_and_never_wider_than_the_sheet(sheet_of, texts, batch_size):
    flags = ["--aspect_ratio_buckets", BUCKETS, "--train_batch_size", batch_size, "--preview_images", 30]
    args, sheet = sheet_of(*flags)
    facts, expected = facts_of(args), []
    for first in range(0, 30, batch_size):
        batch = facts[first : first + batch_size]
        [size] = {fact.crop.target_size for fact in batch}
        epochs = sorted({fact.epoch + 1 for fact in batch})
        when = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
        expected.append(f"batch {first // batch_size + 1}: {size[0]} x {size[1]}, {when}")
    assert [text for text, _ in texts if text.startswith("batch")] == expected
    assert sheet.shape[1] <= contact_sheet.WIDTH


def test_only_what_is_drawn_is_opened(photos, sheet_of, monkeypatch):
    args, _ = sheet_of("--resolution", 64, "--preview_images", 3)
    opened, read = [], CaptionedImage.read_bytes
    monkeypatch.setattr(CaptionedImage, "read_bytes", lambda image: opened.append(image.name) or read(image))
    sheet_of("--resolution", 64, "--preview_images", 3)
    samples, images = training_set(args)
    assert opened == [images[samples.order[n][1]].name for n in range(3)]


def test_held_out_images_are_not_on_the_sheet(sheet_of):
    args, _ = sheet_of("--resolution", 64, "--validation_split", 3, "--train_batch_size", 1)
    held_out = {image.name for image in scan.find_images(data_source(args))[1]}
    names = {fact.name for fact in facts_of(args)}
    assert len(held_out) == 3 and len(names) == 4 and not names & held_out


def test_the_bars_are_as_long_as_the_buckets_are_full(sheet_of):
    _, sheet = sheet_of("--aspect_ratio_buckets", BUCKETS, "--preview_images", 1)
    panel = sheet[:, -contact_sheet.PANEL - contact_sheet.MARGIN :]
    bars = []
    for colour in contact_sheet.COLOURS[:4]:
        rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        bars.append(int((panel == rgb).all(-1).sum(axis=1).max()))
    assert bars == [109, 109, 37, 0]  # 3, 3 and 1 images: 108 px for the most, and the pixel that a line ends on


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------


def test_captions_are_those_that_the_model_gets(sheet_of, texts):
    flags = ["--resolution", 64, "--trigger_word", "sks", "--shuffle_tags", "--keep_tags", 1, "--preview_images", 20]
    args, _ = sheet_of(*flags)
    samples, _ = training_set(args)
    facts, expected = facts_of(args), [samples[n]["caption"] for n in range(20)]
    assert [fact.caption for fact in facts] == expected
    assert len(set(expected)) > 7  # the same image in another epoch has another order
    drawn = " ".join(text for text, colour in texts if colour == contact_sheet.INK)
    assert all(caption in drawn for caption in expected)
    assert all(caption.startswith("sks, subject") for caption in expected)


def test_dropped_captions_are_those_that_training_drops(sheet_of, texts):
    args, _ = sheet_of("--resolution", 64, "--proportion_empty_prompts", 0.3, "--preview_images", 60, "--seed", 2)
    settings = SimpleNamespace(
        settings=SimpleNamespace(seed=2, train_text_encoder=False), empty_prompt={"prompt_embeds": torch.zeros(1, 4)},
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    batch = {"number": np.arange(60), "prompt_embeds": torch.ones(60, 1, 4)}
    kept = objective.choose_prompts(batch, settings, 0.3)["prompt_embeds"].amax(dim=(1, 2)).bool().tolist()
    assert [not fact.dropped for fact in facts_of(args)] == kept
    assert 8 <= kept.count(False) <= 28
    assert texts.count(("(dropped)", contact_sheet.PALE)) == kept.count(False)
    assert f"{kept.count(False)}  ({kept.count(False) / 60:.0%})" in [text for text, _ in texts]


@pytest.mark.parametrize(("share", "dropped"), [(0, 0), (1, 7)])
def test_all_or_nothing_is_dropped(sheet_of, texts, share, dropped):
    sheet_of("--resolution", 64, "--proportion_empty_prompts", share, "--preview_images", 7)
    assert [text for text, _ in texts].count("(dropped)") == dropped


def test_the_word_in_place_of_a_caption():
    assert caption_shown(some_facts()) == ("a cat", True)
    assert caption_shown(some_facts(dropped=True)) == ("(dropped)", False)
    assert caption_shown(some_facts(caption=" ")) == ("(empty)", False)


def test_crops_are_told_as_the_model_is_told():
    assert crop_shown(some_facts()) == ["from 200 x 400", "crop top 0 left 30", "50% lost"]
    flipped = some_facts(flipped=True, crop=Crop((80, 80), (0, 0), (100, 100)))
    assert crop_shown(flipped) == ["from 80 x 80", "enlarged 1.25x", "not cropped", "flipped"]


def test_crops_told_are_the_time_ids(sheet_of):
    args, _ = sheet_of("--aspect_ratio_buckets", BUCKETS, "--random_flip", "--preview_images", 14)
    samples, images = training_set(args)
    for n, fact in enumerate(facts_of(args)):
        assert list(fact.crop.time_ids) == samples[n]["time_ids"].tolist()
        assert fact.crop.original_size == images[samples.order[n][1]].size
        assert fact.epoch == samples.order[n][0]


@pytest.mark.parametrize(
    "text", ["", "word", "one two three four five six seven eight nine ten", "x" * 400, "i " * 300]
)
@pytest.mark.parametrize("width", [5, 60, 200])
def test_wrapped_lines_fit_and_lose_nothing_but_the_end(text, width):
    font = small_font(14)
    lines = wrap(text.split(), font, width, 3)
    assert len(lines) <= 3 and all(font.getlength(line) <= width or len(line) <= 2 for line in lines)
    joined = "".join(lines).replace(" ", "")
    assert joined == text.replace(" ", "") or (joined[-1] == "…" and text.replace(" ", "").startswith(joined[:-1]))
    assert (joined[-1:] == "…") == (len(wrap(text.split(), font, width, 1000)) > 3)


def test_long_names_keep_their_end():
    font = small_font(12)
    assert shorten("a.png", font, 100) == "a.png"
    name = shorten("a/very/long/folder/" * 9 + "image-0001.png", font, 128)
    assert name.startswith("…") and name.endswith("image-0001.png") and font.getlength(name) <= 128


def test_letters_without_a_glyph_are_boxes():
    assert legible("a cat, 100% – “sweet”") == "a cat, 100% – “sweet”"
    assert legible("café, naïve, Köln, Ψ, Жук") == "café, naïve, Köln, Ψ, Жук"
    assert legible("cafe\u0301") == "café"
    assert legible("猫 cat") == f"{UNKNOWN} cat"
    assert legible("family \U0001f469\u200d\U0001f467 heart \u2764\ufe0f").count(UNKNOWN) == 2
    assert legible("a\nb\tc") == "a b c"
    assert legible("a\x00b\ud800c\ue000") == f"a{UNKNOWN}b{UNKNOWN}c{UNKNOWN}"


def test_any_caption_and_name_can_be_drawn(tmp_path, sheet_of, texts):
    captions = ["猫と犬", "\U0001f600" * 50, "a" * 5000, "שלום עולם", "ไทย é", "\u202eabc", "tag, " * 2000]
    for number, caption in enumerate(captions):
        Image.new("RGB", (64, 64), (9 * number, 0, 0)).save(tmp_path / f"猫{number}.png")
        (tmp_path / f"猫{number}.txt").write_text(caption, encoding="utf-8")
    (tmp_path / "out").mkdir()
    args = ["--preview", tmp_path.parent / f"{tmp_path.name}.png", "--resolution", 64, "--preview_images", 7]
    preview_data.main([str(tmp_path), *map(str, args)])
    drawn = [text for text, _ in texts]
    assert any(text.endswith("…") for text in drawn) and any(text.startswith(UNKNOWN) for text in drawn)
    assert any("no letter for" in " ".join(drawn[place : place + 3]) for place in range(len(drawn)))


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "pipeline"])
def test_reconstructions_are_of_the_latents_that_are_trained_on(sheet_of, vae_folder, tmp_path, texts, layout):
    vae, place = autoencoder(), vae_folder
    if layout == "pipeline":
        place = tmp_path / "pipeline"
        vae.save_pretrained(place / "vae")
    args, sheet = sheet_of("--resolution", 128, "--preview_images", 4, "--vae", place, "--seed", 7)
    samples, _ = training_set(args)
    settings = SimpleNamespace(
        settings=SimpleNamespace(seed=args.seed, noise_offset=0.0),
        device=torch.device("cpu"),
        dtype=torch.float32,
        encoder=vae,
        space=SimpleNamespace(to_model=lambda z: z),
        pixels=8,
    )
    for n in range(4):
        pixels = samples[n]["pixel_values"]
        with torch.no_grad():
            batch = objective.with_noise({"pixel_values": pixels[None], "number": np.array([n])}, settings)
            latents = objective.sample_latents(batch, settings)
            decoded = vae.decode(latents).sample[0]
        decoded, pixels = from_pixel_values(decoded), from_pixel_values(pixels)
        [(top, left)], [(top_2, left_2)] = places(sheet, pixels), places(sheet, decoded)
        assert top == top_2 and left_2 == left + 128 + contact_sheet.PAIR_GAP
        quality = 10 * np.log10(255**2 / np.mean((pixels.astype(float) - decoded.astype(float)) ** 2))
        assert (f"VAE, {quality:.1f} dB", contact_sheet.GREY) in texts


def test_psnr_in_numbers():
    black = np.zeros((4, 4, 3), np.uint8)
    assert preview_data.psnr(black, black) == float("inf")
    assert preview_data.psnr(black, black + 255) == pytest.approx(0)
    assert preview_data.psnr(black + 200, black + 201) == pytest.approx(48.13, abs=0.01)


def test_a_vae_that_the_resolution_does_not_fit():
    with pytest.raises(errors.UserError, match="--vae makes 64 x 64 px of 68 x 64"):
        preview_data.reconstruct(autoencoder(), torch.zeros(3, 68, 64), 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def command(*flags):
    return children.run([sys.executable, str(ROOT / "preview_data.py"), *map(str, flags)], text=True)


def test_the_command_as_a_process(photos, tmp_path, cache_dir):
    result = command(photos, "--preview", tmp_path / "a.png", "--report", tmp_path / "a.json", "--resolution", 64,
                     "--cache_dir", cache_dir, "--preview_images", 5)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "64 x 64" in result.stdout and str(tmp_path / "a.png") in result.stdout
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 7
    assert Image.open(tmp_path / "a.png").width > 600
    result = command(photos, "--previw=x.png")
    assert result.returncode == 2 and result.stderr == "error: unknown flag --previw: did you mean --preview?\n"


def test_the_report_needs_no_torch(photos, tmp_path, cache_dir):
    code = (
        f"import sys, preview_data; preview_data.main([{str(photos)!r}, '--cache_dir', {str(cache_dir)!r}]); "
        "print([name for name in ('torch', 'diffusers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
    assert "images        7, held out: 0" in result.stdout


def test_the_sheet_alone_needs_no_diffusers(photos, tmp_path, cache_dir):
    flags = [str(photos), "--cache_dir", str(cache_dir), "--preview", str(tmp_path / "a.png"), "--resolution", "64"]
    code = f"import sys, preview_data; preview_data.main({flags!r}); print('diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "False", result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no data: give a FOLDER"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["PHOTOS", "--train_data_dir", "PHOTOS"], "name one source of images"),
        (["PHOTOS", "--preview", "a.jpg"], "--preview a.jpg: the file's name must end in .png"),
        (["PHOTOS", "--preview", "nowhere/a.png"], "--preview nowhere/a.png: there is no folder nowhere"),
        (["PHOTOS", "--preview", "PHOTOS/a.png"], "among the images: name another"),
        (["PHOTOS", "--preview", "TMP/folder.png"], "is a folder; name a file"),
        (["PHOTOS", "--report", "nowhere/a.json"], "--report nowhere/a.json: there is no folder nowhere"),
        (["PHOTOS", "--report", "PHOTOS/metadata.jsonl"], "must end in .json"),
        (["PHOTOS", "--vae", "x"], "--vae does nothing without --preview"),
        (["PHOTOS", "--preview", "TMP/a.png", "--vae", "PHOTOS"], "--vae PHOTOS: no config.json nor vae/config.json"),
        (["PHOTOS", "--preview_images", "5"], "--preview_images does nothing without --preview"),
        (["PHOTOS", "--preview", "TMP/a.png", "--preview_images", "0"], "--preview_images is 0; it must be above 0"),
        (["PHOTOS", "--preview", "TMP/a.png", "--preview_images", "1001"], "at most 1000"),
        (["PHOTOS", "--resolution", "100"], "--resolution is 100; it must be a multiple of 8, e.g. 96"),
        (["PHOTOS", "--seed", "-1"], "--seed is -1"),
        (["PHOTOS", "--proportion_empty_prompts", "2"], "--proportion_empty_prompts is 2.0"),
        (["PHOTOS", "--keep_tags", "1"], "--keep_tags does nothing without --shuffle_tags"),
        (["PHOTOS", "--wrong"], "unknown flag --wrong"),
        (["PHOTOS", "--strict", "--resolution", "1024"], "--strict: the report on the data remarks"),
    ],
)
def test_mistakes_are_answered_in_a_line(photos, tmp_path, cache_dir, capsys, flags, message):
    (tmp_path / "folder.png").mkdir()
    flags = [flag.replace("PHOTOS", str(photos)).replace("TMP", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        preview_data.main([*flags, "--cache_dir", str(cache_dir)])
    error = capsys.readouterr().err.replace(str(photos), "PHOTOS")
    assert caught.value.code == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1 or "--strict" in message


def test_a_file_that_can_not_be_written(photos, cache_dir, capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as caught:
        preview_data.main([str(photos), "--preview", str(tmp_path / "a.png"), "--resolution", "64",
                            "--cache_dir", str(cache_dir)])  # fmt: skip
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.endswith("a.png: can't be written: No space left on device\n")


def test_a_damaged_vae_is_answered_in_a_line(photos, cache_dir, capsys, vae_folder, tmp_path):
    config = json.loads((vae_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        preview_data.main([str(photos), "--preview", str(tmp_path / "a.png"), "--resolution", "64", "--vae",
                            str(tmp_path), "--cache_dir", str(cache_dir)])  # fmt: skip
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and error[-1].startswith(f"error: --vae {tmp_path}: the autoencoder can't be loaded")


def test_help_is_the_scripts_own():
    result = command("--help")
    assert result.returncode == 0 and "python preview_data.py FOLDER --preview preview.png" in result.stdout
    assert "--random_flip" in result.stdout and "--dataloader_num_workers" not in result.stdout


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_vae_in_a_single_file(family, singles, tmp_path, monkeypatch):
    """In the layout of diffusers or in a whole model; the configuration follows from the channels of its latents."""
    example = ROOT / "examples" / f"tiny-{family}" / "vae"
    monkeypatch.setattr(unpacking, "packaged_files", lambda folder: {
        "vae/config.json": (ROOT / "examples" / f"tiny-{folder}" / "vae" / "config.json").read_bytes()})  # fmt: skip
    own = load_file(example / "diffusion_pytorch_model.safetensors")
    for file in (example / "diffusion_pytorch_model.safetensors", singles[family]):
        vae = preview_data.load_vae(str(file), tmp_path / "cache")
        found = vae.state_dict()
        assert found.keys() == own.keys() and vae.config.latent_channels == {"sdxl": 4, "sd3": 16}[family]
        assert all(torch.equal(found[name], value.half().float()) for name, value in own.items())


def test_a_single_file_without_a_vae_that_fits_is_refused(singles, tmp_path):
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    tensors = {"decoder.conv_in.weight": torch.zeros(8, 32, 3, 3), "decoder.up_blocks.0.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "other.safetensors")
    files = {"lora.safetensors": "is a LoRA", "other.safetensors": "latents of 32 channels; those of SDXL have 4"}
    for name, said in files.items():
        with pytest.raises(errors.UserError, match=f"--vae .*{name} .*{said}"):
            unpacking.lone_vae(f"--vae {tmp_path / name}", tmp_path / name)
    with pytest.raises(errors.UserError, match="give an AutoencoderKL of SDXL's or SD3's sizes"):
        unpacking.lone_vae("--vae tiny", singles["sdxl"])
