"""Data: addressed randomness, captions, framing, the order of samples, and the training set.

Metamorphic where possible: a relation that must hold (any order, any batch split, any number of ranks) rather than a
recorded number. The few recorded numbers tell when the meaning of a seed has changed.
"""

import hashlib
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lpl_finetuning.data import samples as samples_module
from lpl_finetuning.data.encoding import encode_missing
from lpl_finetuning.data.images import open_image, to_pixel_values
from lpl_finetuning.data.samples import (
    AddressedBatches,
    CaptionRules,
    Framing,
    SampleOrder,
    TrainingSet,
    View,
    addressed_normal,
    addressed_rng,
    addressed_uniform,
    collate,
    epoch_order,
)
from lpl_finetuning.data.store import TensorStore
from lpl_finetuning.data.tables import CaptionedImage
from lpl_finetuning.errors import DataError

# ---------------------------------------------------------------------------------------------------------------------
# Addressed randomness
# ---------------------------------------------------------------------------------------------------------------------


def test_addressed_numbers_do_not_depend_on_order_or_batch():
    numbers = [5, 0, 2**40, 17]
    together = addressed_normal(3, numbers, (2, 3), "noise")
    assert together.dtype == torch.float32 and together.shape == (4, 2, 3)
    assert torch.equal(together.flip(0), addressed_normal(3, numbers[::-1], (2, 3), "noise"))
    assert torch.equal(together, torch.cat([addressed_normal(3, [n], (2, 3), "noise") for n in numbers]))
    uniform = addressed_uniform(3, numbers, "timestep")
    assert uniform.dtype == np.float64 and uniform.shape == (4,)
    assert uniform.tolist() == [addressed_uniform(3, [n], "timestep")[0] for n in numbers]


def test_addresses_differ_in_every_bit_of_seed_and_number_and_in_stream():
    addresses = [(seed, n, "noise") for seed in (0, 1, 2**32, 2**63) for n in (0, 1, 2**32, 2**63, 2**32 + 1)]
    addresses += [(0, 0, stream) for stream in samples_module.STREAMS if stream != "noise"]
    draws = {tuple(addressed_rng(*address).random(8)) for address in addresses}
    assert len(draws) == len(addresses)
    # Neighbours must not overlap either: no value of one stream may turn up further along in another.
    values = np.concatenate([addressed_rng(*address).random(1000) for address in addresses])
    assert len(np.unique(values)) == len(values)


def test_addressed_numbers_are_distributed_as_they_should():
    uniform = addressed_uniform(0, range(4000), "timestep")
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.05
    normal = addressed_normal(0, range(4000), (), "noise")
    assert abs(normal.mean()) < 0.06 and abs(normal.std() - 1) < 0.05


def test_what_a_seed_means_is_fixed():
    assert addressed_uniform(42, [0, 7], "noise").tolist() == [0.443746921343274, 0.7153377995449304]
    assert samples_module.STREAMS["noise"] == 1 and samples_module.STREAMS["validation"] == 9
    assert len(set(samples_module.STREAMS.values())) == len(samples_module.STREAMS)


def test_unknown_streams_and_bad_seeds_are_refused():
    with pytest.raises(KeyError):
        addressed_rng(0, 0, "nosie")
    for seed in (-1, 2**64):
        with pytest.raises(DataError, match="--seed"):
            addressed_rng(seed, 0, "noise")
    with pytest.raises(ValueError, match="number"):
        addressed_rng(0, -1, "noise")


def test_every_epoch_goes_through_all_images_in_another_order():
    orders = [epoch_order(1, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_two_ranks_work_on_what_one_rank_with_twice_the_accumulation_does():
    one = list(AddressedBatches(3, 6, 4, accumulation=2))
    two = [list(AddressedBatches(3, 6, 4, world_size=2, rank=rank)) for rank in (0, 1)]
    assert one == [batch for pair in zip(*two, strict=True) for batch in pair]
    numbers = [n for batch in one for n in batch]
    assert numbers == list(range(3 * 8, 6 * 8))


def test_a_resumed_run_goes_on_with_the_same_batches():
    whole = AddressedBatches(0, 5, 3, accumulation=2, world_size=3, rank=1)
    parts = [AddressedBatches(first, last, 3, 2, 3, 1) for first, last in ((0, 2), (2, 5))]
    assert list(whole) == [batch for part in parts for batch in part]
    assert len(whole) == len(list(whole)) == 10 and len(AddressedBatches(5, 5, 3)) == 0
    with pytest.raises(ValueError, match="rank=2"):
        AddressedBatches(0, 1, 1, world_size=2, rank=2)


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def test_a_trigger_word_comes_first_and_once():
    rules = CaptionRules("sks dog")
    assert rules.text("on a beach") == "sks dog, on a beach"
    assert rules.text("Sks dog on a beach") == "Sks dog on a beach", "it is there already"
    assert rules.text("") == "sks dog"
    assert CaptionRules().text(" as it is ,x") == " as it is ,x"


@pytest.mark.parametrize(
    "caption, text",
    [
        ("toyota on a road", "toy, toyota on a road"),
        ("toy2 on a road", "toy, toy2 on a road"),
        ("toyé", "toy, toyé"),
        ("Toy on a road", "Toy on a road"),
        ("toy, red", "toy, red"),
        ("toy's box", "toy's box"),
        ("toy", "toy"),
        ("toy_box", "toy_box"),
        ("toy-box on a road", "toy-box on a road"),
        ("red, Toy , dog", "toy, red, dog"),
        ("red ,a toy", "toy, red ,a toy"),
    ],
)
def test_a_trigger_word_is_found_as_a_whole_word_only(caption, text):
    assert CaptionRules("toy").text(caption) == text


@pytest.mark.parametrize("keep_tags", [0, 1, 2])
@pytest.mark.parametrize("caption", ["ohwx, red, dog", "red, ohwx, dog", "red, dog, OHWX"])
def test_a_trigger_word_among_shuffled_tags_is_not_doubled(caption, keep_tags):
    texts = CaptionRules("ohwx", shuffle_tags=True, keep_tags=keep_tags).texts([caption])
    assert set(texts) <= {"ohwx, red, dog", "ohwx, dog, red"}
    assert len(texts) == (1 if keep_tags == 2 or (keep_tags and caption[0] == "r") else 2), "the others still move"


def test_a_first_tag_that_begins_with_the_trigger_word_stays_in_front():
    texts = CaptionRules("ohwx", shuffle_tags=True).texts(["ohwx dog on a beach, red, blue"])
    assert set(texts) == {"ohwx dog on a beach, red, blue", "ohwx dog on a beach, blue, red"}
    assert CaptionRules("a, b", shuffle_tags=True).texts(["B, a, c"]) == ["a, b, c"], "a trigger of two tags"


def test_shuffled_tags_are_the_same_tags_with_the_first_in_their_place():
    caption = "1girl, solo , red hair,, blue eyes, smile, outdoors, tree"
    tags = ["1girl", "solo", "red hair", "blue eyes", "smile", "outdoors", "tree"]
    rules = CaptionRules("sks", shuffle_tags=True, keep_tags=2, tag_shuffles=6)
    texts = rules.texts([caption])
    assert len(texts) == 6, "so many orders differ"
    for text in texts:
        assert text.split(", ")[:3] == ["sks", "1girl", "solo"] and sorted(text.split(", ")[1:]) == sorted(tags)
    assert texts == rules.texts([caption]) == [rules.text(caption, order) for order in range(6)]
    drawn = Counter(rules.draw([caption], 0, address) for address in range(600))
    assert set(drawn) == set(texts) and min(drawn.values()) > 60
    assert CaptionRules(shuffle_tags=True, keep_tags=9).texts([caption]) == [", ".join(tags)]


def test_one_of_several_captions_is_drawn_in_each_epoch():
    captions, rules = ("a cat", "a kitten", "an animal"), CaptionRules("sks")
    drawn = [rules.draw(captions, 5, address) for address in range(900)]
    assert {text: count // 100 for text, count in Counter(drawn).items()}.keys() == set(rules.texts(captions))
    assert min(Counter(drawn).values()) > 240
    assert drawn == [rules.draw(captions, 5, address) for address in range(900)], "from the address alone"
    assert drawn != [rules.draw(captions, 6, address) for address in range(900)]


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------

BUCKETS = np.array([0] * 7 + [2] * 12 + [3] * 1 + [5] * 20)


def samples_of(order, count):
    """[(epoch, index)] of the first samples, in batches."""
    return [[order[batch * order.batch_size + row] for row in range(order.batch_size)] for batch in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16, 64])
def test_every_batch_is_of_one_bucket_and_every_image_comes_once_in_each_epoch(batch_size):
    order = SampleOrder(3, batch_size, BUCKETS)
    batches = samples_of(order, 2000 // batch_size)
    for batch in batches:
        assert len({BUCKETS[index] for _, index in batch}) == 1
    seen = Counter(sample for batch in batches for sample in batch)
    assert max(seen.values()) == 1, "no image twice in an epoch"
    last = {bucket: max(epoch for epoch, index in seen if BUCKETS[index] == bucket) for bucket in set(BUCKETS)}
    assert min(last.values()) > 2000 // len(BUCKETS) - 2 - batch_size
    for index, bucket in enumerate(BUCKETS):
        assert all((epoch, index) in seen for epoch in range(last[bucket])), "and none left out"


def test_buckets_come_in_their_proportion_all_along():
    """After any number of batches, no bucket is far ahead of another in epochs."""
    order = SampleOrder(0, 4, BUCKETS)
    used = Counter()
    for count, batch in enumerate(samples_of(order, 1000), start=1):
        used.update(int(BUCKETS[index]) for _, index in batch)
        for bucket, size in Counter(BUCKETS.tolist()).items():
            assert abs(used[bucket] / size - count * 4 / len(BUCKETS)) < 1 + 4 / size + 1e-9


def test_the_first_epoch_is_like_the_others_over_many_seeds():
    """A lonely image does not begin every run with a batch of its own."""
    buckets, seeds = np.array([0] * 95 + [1]), 400
    for first in (0, 6 * 3):  # six batches are an epoch
        used = np.zeros(96)
        for seed in range(seeds):
            order = SampleOrder(seed, 16, buckets)
            for n in range(first * 16, (first + 6) * 16):
                used[order[n][1]] += 1
        assert abs(used[95] / seeds - 1) < 0.6 and abs(used[:95].mean() / seeds - 1) < 0.01
    order = SampleOrder(0, 16, buckets)
    assert sum(order[n][1] == 95 for n in range(96 * 160)) == 160, "exact over a long run"


def test_buckets_are_mixed_and_every_epoch_is_another():
    order = SampleOrder(0, 4, BUCKETS)
    buckets = [int(BUCKETS[batch[0][1]]) for batch in samples_of(order, 400)]
    changes = sum(a != b for a, b in pairwise(buckets))
    assert changes > 200, "not one bucket after the other"
    epochs = [tuple(buckets[first : first + 10]) for first in range(0, 400, 10)]
    assert len(set(epochs)) > 30
    assert buckets != [int(BUCKETS[batch[0][1]]) for batch in samples_of(SampleOrder(1, 4, BUCKETS), 400)]


def test_the_order_depends_on_no_history():
    """Asked backwards, in another process, or from the middle on, it is the same."""
    forward = [SampleOrder(9, 4, BUCKETS)[n] for n in range(0, 3000, 7)]
    order = SampleOrder(9, 4, BUCKETS)
    assert [order[n] for n in range(0, 3000, 7)][::-1] == [order[n] for n in reversed(range(0, 3000, 7))]
    again = pickle.loads(pickle.dumps(order))
    assert [again[n] for n in range(0, 3000, 7)] == forward


def test_one_bucket_is_the_plain_stream():
    """Without buckets, epoch after epoch; batches go on over the seam."""
    order = SampleOrder(7, 4, np.zeros(10, np.int16))
    for n in range(100):
        epoch, place = divmod(n, 10)
        assert order[n] == (epoch, int(epoch_order(7, epoch, 10)[place]))


def test_a_million_images_are_ordered_in_little_time_and_memory():
    buckets = np.random.default_rng(0).integers(0, 9, 10**6).astype(np.int16)
    order = SampleOrder(0, 16, buckets)
    epoch, index = order[5 * 10**8]
    assert epoch in range(495, 505) and buckets[order[5 * 10**8 + 1][1]] == buckets[index]
    assert order._members(epoch).nbytes == 4 * 10**6


def test_numbers_that_are_none():
    with pytest.raises(ValueError, match="no sample -1"):
        SampleOrder(0, 4, BUCKETS)[-1]
    with pytest.raises(ValueError, match="at least one image"):
        SampleOrder(0, 4, BUCKETS[:0])


# ---------------------------------------------------------------------------------------------------------------------
# Framing and the training set
# ---------------------------------------------------------------------------------------------------------------------

SIZES = ((32, 32), (24, 40))


def image_set(folder, count=5, size=(40, 32)):
    """Random pictures, all of one size (width, height)."""
    images = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = folder / f"{index}.png"
        Image.fromarray(pixels).save(path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        images.append(CaptionedImage(path.name, (f"picture {index}",), content, (size[1], size[0]), path))
    return images


def training_set(images, seed=7, batch_size=4, latents=None, prompts=None, prompt_key=None, buckets=False, **framing):
    """A training set of squares of 32 px, or of both sizes in turn."""
    which = np.arange(len(images)) % 2 if buckets else np.zeros(len(images), np.int16)
    framing = Framing(SIZES if buckets else SIZES[:1], which, **framing)
    order = SampleOrder(seed, batch_size, which)
    return TrainingSet(images, order, framing, CaptionRules(), latents, prompts, prompt_key)


def encode(item):
    """A stand-in for the autoencoder: every 8th pixel, in bfloat16."""
    image, view, framing = item
    pixels, crop = framing.cut(image, view)
    mean = to_pixel_values(pixels)[:, ::8, ::8]
    return {"mean": mean.bfloat16(), "std": torch.full_like(mean, 0.1), "time_ids": torch.tensor(crop.time_ids)}


def latent_store(folder, samples):
    """A store with all that the training set may ask for."""
    store, framing = TensorStore(folder), samples.framing
    items = [(view.key(image.content), (image, view, framing))
             for index, image in enumerate(samples.images) for view in framing.views(index, image)]  # fmt: skip
    count = encode_missing(store, items, lambda batch: [encode(item) for item in batch], 4, "",
                           group=lambda item: item[1].size, show=False)  # fmt: skip
    assert count == len(items) == len(store)
    return store


def equal_samples(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) if isinstance(one[name], torch.Tensor) else one[name] == two[name]
        for name in one
    )


def test_a_sample_follows_from_its_number_alone(tmp_path):
    images = image_set(tmp_path)
    one, two = (training_set(images, random_flip=True) for _ in range(2))
    forward = [one[n] for n in range(15)]
    backward = [two[n] for n in reversed(range(15))][::-1]
    assert all(equal_samples(a, b) for a, b in zip(forward, backward, strict=True))
    assert [sample["number"] for sample in forward] == list(range(15))
    assert [sample["index"] for sample in forward] == [one.order[n][1] for n in range(15)]
    assert all(sample["caption"] == f"picture {sample['index']}" for sample in forward)
    assert forward[0]["pixel_values"].shape == (3, 32, 32) and forward[0]["time_ids"].dtype == torch.float32
    # Augmentation changes from epoch to epoch.
    of_one_image = {sample["pixel_values"].numpy().tobytes() for sample in forward if sample["index"] == 0}
    assert len(of_one_image) > 1
    assert not equal_samples(training_set(images, seed=8)[0], one[0])


def test_half_of_the_samples_are_flipped_and_the_crop_does_not_change(tmp_path):
    images = image_set(tmp_path, count=1)
    flipped, plain = (training_set(images, 0, random_flip=flip) for flip in (True, False))
    pixels = np.asarray(open_image(images[0].read_bytes(), "it"))
    count = 0
    for n in range(60):
        sample = flipped[n]
        assert torch.equal(sample["time_ids"], plain[n]["time_ids"])
        top, left = sample["time_ids"][2:4].int().tolist()
        sides = [to_pixel_values(side[top : top + 32, left : left + 32]) for side in (pixels, pixels[:, ::-1])]
        assert torch.equal(plain[n]["pixel_values"], sides[0])
        count += torch.equal(sample["pixel_values"], sides[1])
        assert any(torch.equal(sample["pixel_values"], side) for side in sides)
    assert 18 <= count <= 42


def test_views_have_names_of_their_own():
    views = [View(size, flip, crop) for size in SIZES for flip in (False, True) for crop in (None, 0, 1)]
    assert len({view.key("content") for view in views}) == len(views)


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("framing", [{}, {"random_flip": True}, {"crops": 3, "random_flip": True}])
def test_cached_samples_agree_with_those_encoded_on_the_fly(tmp_path, framing, buckets):
    """Whatever is drawn is in the cache, and is what the image cut in that moment would have given."""
    images = image_set(tmp_path, size=(90, 36))
    framing = {"center_crop": "crops" not in framing, **framing}
    direct = training_set(images, buckets=buckets, **framing)
    store = latent_store(tmp_path / "latents", direct)
    prompts = TensorStore(tmp_path / "prompts")
    prompts.put(
        {f"key of {image.caption}": {"embeds": torch.full((2, 2), float(i))} for i, image in enumerate(images)}
    )
    cached = training_set(
        images, latents=store, prompts=prompts, prompt_key="key of {}".format, buckets=buckets, **framing
    )
    seen = set()
    for n in range(100):
        sample, expected = cached[n], direct[n]
        assert torch.equal(sample["mean"], expected["pixel_values"][:, ::8, ::8].bfloat16().float())
        assert all(sample[name].dtype == torch.float32 for name in ("mean", "std", "time_ids"))
        assert torch.equal(sample["time_ids"], expected["time_ids"]) and "pixel_values" not in sample
        assert (sample["embeds"] == sample["index"]).all() and sample["index"] == expected["index"]
        assert sample["time_ids"][4:].tolist() == list(SIZES[sample["index"] % 2 if buckets else 0])
        seen.add((sample["index"], sample["mean"].numpy().tobytes()))
    views = len(direct.framing.views(0, images[0]))
    assert len(seen) == 5 * views, "every view turned up"
    (tmp_path / "0.png").unlink()  # the image is not needed any more
    assert len([cached[n] for n in range(5)]) == 5


def test_numbered_crops_do_not_depend_on_the_seed_and_differ(tmp_path):
    images = image_set(tmp_path, count=1, size=(90, 40))
    framings = [training_set(images, seed=seed, crops=4).framing for seed in (0, 99)]
    tops, again = (
        [framing.cut(images[0], view)[1].crop_top_left for view in framing.views(0, images[0])] for framing in framings
    )
    assert len(set(tops)) > 1 and tops == again


def test_what_can_be_cached(tmp_path):
    wide, square = image_set(tmp_path, 2), image_set(tmp_path, 2, (32, 32))
    for images, framing, cached in [
        (wide, {}, False), (square, {}, True), (wide[:1] + square[:1], {}, False), (wide, {"center_crop": True}, True),
        (wide, {"crops": 2}, True), (wide, {"buckets": True}, False),
    ]:  # fmt: skip
        assert training_set(images, **framing).framing.can_be_cached(images) == cached, framing


def test_what_is_not_in_the_cache_is_named(tmp_path):
    images = image_set(tmp_path, count=1)
    with pytest.raises(KeyError, match=r"0.png is not in the cache"):
        training_set(images, latents=TensorStore(tmp_path / "none"))[0]


def test_an_image_that_has_changed_is_named(tmp_path):
    samples = training_set(image_set(tmp_path, count=1))
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png"):
        samples[0]


@pytest.mark.parametrize("workers, context", [(0, None), (2, "fork"), (1, "spawn")])
def test_the_loader_gives_the_numbered_samples(tmp_path, workers, context):
    images = image_set(tmp_path)
    plain = training_set(images, center_crop=True, random_flip=True, batch_size=2, buckets=True)
    store = latent_store(tmp_path / "latents", plain)
    samples = training_set(images, center_crop=True, random_flip=True, batch_size=2, buckets=True, latents=store)
    samples[0]  # opens a handle in this process that the workers must not use
    batches = AddressedBatches(1, 4, 2, accumulation=2)
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=context,
    )
    seen = list(loader)
    assert len(seen) == len(loader) == len(batches)
    for numbers, batch in zip(batches, seen, strict=True):
        expected = [samples[n] for n in numbers]
        assert batch["number"].tolist() == numbers and batch["number"].dtype == np.int64
        assert batch["index"].tolist() == [sample["index"] for sample in expected]
        assert batch["caption"] == [sample["caption"] for sample in expected]
        assert batch["time_ids"].shape == (2, 6) and batch["time_ids"].dtype == torch.float32
        assert torch.equal(batch["mean"], torch.stack([sample["mean"] for sample in expected]))
