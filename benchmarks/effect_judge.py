"""How far the samples of models are from pictures: Fréchet and kernel distances by two networks, to two references.

The first reference is the training pictures. The second is their reconstructions: the same pictures, encoded and
decoded again. A model of latents draws what its decoder can show, so a model with perfect latents has the distance of
the decoder to the first reference, and none to the second.
"""

import shutil

import numpy as np

NETWORKS = ("efficientnet-lite2", "efficientnet-lite0")
JUDGE = NETWORKS[0]  # the other one helped to train the autoencoders
MEASURES = ("frechet", "kernel")
SAMPLING_STEPS, SAMPLES = 25, 1536  # of the verdict: steps of the sampler, and pictures of an arm


def make_reconstructions(source, folder, autoencoder):
    """Fill a folder with the pictures of another one, encoded and decoded again, and with its captions."""
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    from benchmarks.effect_measures import reconstructions
    from lpl_finetuning.evaluation.onestep import to_bytes

    if (folder / "metadata.csv").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    vae, names = AutoencoderKL.from_pretrained(autoencoder).eval(), sorted(path.name for path in source.glob("*.png"))
    pictures = np.stack([np.asarray(Image.open(source / name).convert("RGB")) for name in names])
    decoded = torch.cat([to_bytes(decoded) for _, _, decoded in reconstructions(vae, pictures)])
    for name, picture in zip(names, decoded.numpy(), strict=True):
        Image.fromarray(picture).save(folder / name)
    shutil.copy(source / "metadata.csv", folder / "metadata.csv")  # last: a folder that was begun has none


def sample(model, images, count, guidance, folder, make=None, steps=SAMPLING_STEPS):
    """Sample a model; pictures that exist are not made again. Returns {guidance: folder of pictures}.

    Args:
        model: folder of a pipeline.
        images: (`CaptionedImage`) whose captions are taken, `count` of them, evenly spaced.
        guidance: scales of classifier-free guidance.
        folder: of the pictures.
        make: function with the arguments of `generate` that samples; by default `generate`.
        steps: of the sampler.
    """
    import torch

    from evaluate_models import evenly_spaced
    from lpl_finetuning.evaluation.generation import GenerationSettings, generate
    from lpl_finetuning.evaluation.models import find_source, load_pipeline
    from lpl_finetuning.evaluation.picture_sets import stems_of

    source, stems = find_source(str(model)), stems_of(images)
    captions = {stems[int(index)]: images[index].caption for index in evenly_spaced(len(images), count)}
    settings = GenerationSettings(steps=steps, guidance=tuple(guidance), size=(64, 64), batch_size=64)
    pipeline = load_pipeline(source, torch.float32, "cpu")
    return (make or generate)(pipeline, captions, settings, folder, source.weights)


def judge(models, references, store, twins, finalist):
    """Distances of models to references.

    Args:
        models: {name: folder of pictures}; the first one is the baseline, all have pictures of the same captions.
        references: {name: folder of pictures}.
        store: folder in which features are kept.
        twins: {model: another one that it is compared with too}.
        finalist: a model that all others are compared with too.

    Returns:
        ([{"model", REFERENCE: {NETWORK: {"frechet", "kernel"}}, "change": {REFERENCE: [value, low, high]}, ...}] with
        the differences by `JUDGE` and their 95 % intervals: "change" of the Fréchet distance from the baseline,
        "kernel_change" of the kernel distance, "twin_change" and "finalist_change" of the Fréchet distance from the
        twin and from the finalist,
        {REFERENCE: {NETWORK: Fréchet distance of one half to the other}}).
    """
    from lpl_finetuning.evaluation.distances import frechet_distance, kernel_distance
    from lpl_finetuning.evaluation.features import features_of
    from lpl_finetuning.evaluation.networks import load_network

    rows, floors = [{"model": name} for name in models], {name: {} for name in references}
    for network in NETWORKS:
        loaded = load_network(network)
        fakes, reals = ({name: features_of(folder, loaded, store, whose=name).values for name, folder in group.items()}
                        for group in (models, references))  # fmt: skip
        for reference, real in reals.items():
            halves = np.array_split(np.random.default_rng(0).permutation(len(real)), 2)
            floors[reference][network] = frechet_distance(*(real[half] for half in halves))
            for row, fake in zip(rows, fakes.values(), strict=True):
                row.setdefault(reference, {})[network] = {
                    "frechet": frechet_distance(real, fake), "kernel": kernel_distance(real, fake),
                }  # fmt: skip
        if network == JUDGE:
            add_changes(rows, reals, fakes, store, twins, finalist)
    return rows, floors


def add_changes(rows, reals, fakes, store, twins, finalist):
    """Put the differences of `judge` into its rows.

    Args:
        reals, fakes: {reference: features}, {model: features}, the baseline first.
        store: folder in which distances without groups of pictures are kept, since they take long.
        twins, finalist: see `judge`.
    """
    from lpl_finetuning.evaluation.comparison import Memory
    from lpl_finetuning.evaluation.uncertainty import jackknife_difference, without_groups

    memory, names = Memory(store / "numbers"), ("frechet", "kernel")

    def parts(real, fake):
        def compute():
            return {name: values.tolist() for name, values in without_groups(real, fake, names).items()}

        return {name: np.array(values) for name, values in memory.recall(compute, "groups", real, fake).items()}

    baseline = next(iter(fakes))
    for row in rows:
        row["change"] = {}
    for reference, real in reals.items():
        found = {name: parts(real, fake) for name, fake in fakes.items()}

        def change(one, other, name, found=found):
            return ends_of(jackknife_difference(found[one][name], found[other][name], paired=True))

        for row in rows:
            own = row["model"]
            if own != baseline:
                row["change"][reference] = change(own, baseline, "frechet")
                row.setdefault("kernel_change", {})[reference] = change(own, baseline, "kernel")
            if twins.get(own) in fakes:
                row.setdefault("twin_change", {})[reference] = change(own, twins[own], "frechet")
            if finalist in fakes and own != finalist:
                row.setdefault("finalist_change", {})[reference] = change(own, finalist, "frechet")


def ends_of(interval):
    """[value, low, high] of an `Interval`."""
    return [float(interval.value), float(interval.low), float(interval.high)]


def judge_copies(models, train, held_out, store):
    """How near samples are to pictures that the models were trained on, and to others.

    Args:
        models: {name: folder of pictures}; the first one is the baseline.
        train, held_out: folders of pictures.
        store: folder in which features are kept.

    Returns:
        [{"model", "kernel": kernel distance to the held-out pictures, "kernel_change": [value, low, high] against the
        baseline, "generated", "held_out": median distances to the nearest training picture, "nearer": [value, low,
        high] of the difference of the means}], by `JUDGE`.
    """
    from lpl_finetuning.evaluation.comparison import Memory, memorisation
    from lpl_finetuning.evaluation.distances import kernel_distance
    from lpl_finetuning.evaluation.features import features_of
    from lpl_finetuning.evaluation.networks import load_network
    from lpl_finetuning.evaluation.uncertainty import distance_differences

    network, rows = load_network(JUDGE), []
    real, hidden = (features_of(folder, network, store, whose=folder.name).values for folder in (train, held_out))
    fakes = {name: features_of(folder, network, store, whose=name).values for name, folder in models.items()}
    baseline = next(iter(fakes))
    for name, fake in fakes.items():
        row = {"model": name, "kernel": kernel_distance(hidden, fake)}
        if name != baseline:
            found = distance_differences(hidden, fake, fakes[baseline], names=("kernel",))
            row["kernel_change"] = ends_of(found["kernel"])
        found = memorisation(real, fake, hidden, 0, Memory(store / "numbers"))
        near = [found[key] for key in ("value", "low", "high")]
        rows.append(row | {"generated": found["generated"], "held_out": found["held_out"], "nearer": near})
    return rows
