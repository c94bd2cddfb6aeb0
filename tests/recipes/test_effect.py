"""The experiment's arms: what is added to a training script, and that nothing else changes."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from benchmarks import effect, effect_arm, effect_arms, effect_gain, effect_judge, effect_measures
from lpl_finetuning.data.scan import scan_folder
from lpl_finetuning.evaluation.features import features_of
from lpl_finetuning.evaluation.generation import GenerationSettings, generate
from lpl_finetuning.evaluation.models import find_source, load_pipeline
from lpl_finetuning.evaluation.networks import load_network
from lpl_finetuning.evaluation.picture_sets import read_pictures
from lpl_finetuning.evaluation.uncertainty import distance_differences
from lpl_finetuning.training import perceptual, reporter
from lpl_finetuning.training.objective import Objective
from lpl_utils import estimate_z0
from pretrain.emoji_images import in_domain
from tests.runs import ROOT
from tests.sdxl import run, train_sdxl_lpl
from tests.tiny_models import picture_folder


def test_results_name_no_folder_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(effect, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks/effect.py"), "--work", str(tmp_path / "work"), "judge"])
    effect.keep_result(tmp_path / "work", "x", 1.4, {"model": f"{tmp_path}/work/arms/none-0"})
    found = json.loads((tmp_path / "results/x.json").read_text())
    assert found["command"] == "python benchmarks/effect.py --work WORK judge" and found["seconds"] == 1
    assert found["model"] == "WORK/arms/none-0" and found["commit"] and found["date"]


def test_the_narrow_domain_has_smileys_people_and_hands(tmp_path):
    names = {"1f469-1f3fd.webp": "woman medium skin tone", "1f469.webp": "woman", "1f44b.webp": "waving hand",
             "1f469-200d-1f467.webp": "family woman girl", "1f44b-1f3ff.webp": "waving hand dark skin tone",
             "1f600.webp": "grinning face", "1f34e.webp": "red apple", "1f436.webp": "dog face",
             "1f3f4_e0067_e0062.webp": "flag England"}  # fmt: skip
    (tmp_path / "package" / "assets").mkdir(parents=True)
    for name in names:
        (tmp_path / "package" / "assets" / name).touch()
    captions = [names[name] for name in sorted(names)]
    chosen = in_domain(tmp_path, captions, "people")
    outside = {caption for caption, inside in zip(captions, chosen, strict=True) if not inside}
    assert outside == {"red apple", "dog face", "flag England"}
    assert in_domain(tmp_path, captions, "all").all()


def test_bins_end_at_the_gate():
    abar = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    ratios = ((1 - abar) / abar).sqrt().numpy()
    for edges in (effect_arm.bin_edges(abar), effect_arm.bin_edges()):
        assert len(edges) == 11 and (np.diff(edges) > 0).all() and edges[-1] == pytest.approx(3, abs=0.02)
    per_bin = np.histogram(ratios, effect_arm.bin_edges(abar))[0]
    assert np.ptp(per_bin) <= 1, "equally many timesteps"


def test_each_noise_level_has_the_weight_of_its_bin():
    weights = effect_arm.level_weights({"edges": [0, 1, 2, 3], "weights": [5.0, 6.0, 7.0]})
    sigma = torch.tensor([0.1, 0.9, 1.1, 1.9, 2.5, 2.99])
    assert weights(torch.ones(6), sigma).tolist() == [5, 5, 6, 6, 7, 7]


def test_an_arm_is_the_script_and_logs_gradients(flags, tmp_path, monkeypatch):
    """A profile of ones changes nothing but the log; one of threes triples the perceptual term."""
    flags = [*flags, "--use_lpl", "--lpl_sigma_threshold", 3, "--lpl_weight", 0.5, "--max_train_steps", 2]
    plain = run(*flags, "--output_dir", tmp_path / "plain")
    monkeypatch.setattr(train_sdxl_lpl, "training_step", train_sdxl_lpl.training_step)
    monkeypatch.setattr(Objective, "total", Objective.total)
    monkeypatch.setattr(reporter, "METRICS", reporter.METRICS)
    effect_arm.log_gradients(train_sdxl_lpl, {1})
    rows = {}
    for number in (1.0, 3.0):
        profile = {"edges": [0, 1, 3], "weights": [number, number]}
        monkeypatch.setattr(perceptual, "lpl_noise_scale", effect_arm.level_weights(profile))
        rows[number] = run(*flags, "--lpl_scale", "--output_dir", tmp_path / str(number))
    for row, same in zip(plain, rows[1.0], strict=True):
        logged = {key: value for key, value in same.items() if not key.startswith("gradient/")}
        assert logged.keys() == row.keys()
        assert all(logged[key] == value for key, value in row.items() if key != "samples_per_second")
    assert rows[3.0][0]["lpl/loss"] == pytest.approx(3 * plain[0]["lpl/loss"], rel=1e-5)
    last = rows[1.0][1]
    assert "gradient/lpl" not in rows[1.0][0] and last["gradient/lpl"] > 0
    low, high = (abs(last["gradient/diffusion"] + sign * last["gradient/lpl"]) for sign in (-1, 1))
    assert low < last["grad_norm"] < high, "the whole gradient is the sum of the two"


def test_arms_are_flags_of_the_scripts(flags, tmp_path, monkeypatch):
    """Each arm's flags are accepted, and each differs from the others. The networks are those of the tiny SDXL."""
    monkeypatch.chdir(ROOT)
    flags, seen = list(flags), set()
    flags[flags.index("--pretrained_model_name_or_path") + 1] = ROOT / "examples" / "tiny-sdxl"
    for arm in effect_arms.ALL.values():
        words = [*effect_arms.COMMON.split(), *arm.words("sdxl", 400), *["--lpl_scale"] * arm.profile]
        args = train_sdxl_lpl.parse_args([*map(str, flags), *words, "--output_dir", str(tmp_path)])
        values = {key: value for key, value in vars(args).items() if key not in ("base_model", "given")}
        seen.add(json.dumps({**values, "apart": arm.gain or arm.autoencoder}, default=str, sort_keys=True))
    assert len(seen) == len(effect_arms.ALL)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_gain_scales_the_estimate_and_nothing_else(kind):
    rng = torch.Generator().manual_seed(0)
    output, sample = torch.randn(2, 2, 4, 5, 5, generator=rng, dtype=torch.float64)
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    levels = alpha.repeat(2), sigma.repeat(2)
    before = estimate_z0(output, sample, *levels, kind)
    after = estimate_z0(effect_gain.scaled(output, sample, alpha, sigma, kind, 1.5), sample, *levels, kind)
    means = before.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(after, means + 1.5 * (before - means))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_gains_are_fitted_and_sampled_with(family, request, tmp_path, monkeypatch):
    """A model that halves the spread gets gains of 2 within the gate; gains of 1 change no picture, others do."""
    source = find_source(str(request.getfixturevalue(f"{family}_folder")))
    pipeline = load_pipeline(source, torch.float32, "cpu")
    images = scan_folder(picture_folder(tmp_path / "pictures", 3, size=64), cache_dir=tmp_path / "cache").images

    class Halving(effect_gain.PipelineEstimate):
        def __call__(self, noisy_latents, level, indices):
            z0 = torch.stack([self.held_out.latents[index] for index in indices])
            return z0 / 2 + 1

    with monkeypatch.context() as patch:
        patch.setattr(effect_gain, "PipelineEstimate", Halving)
        gains = effect_gain.fit_gains(pipeline, images, 5, batch_size=2)
    assert gains[0] == 1 and gains[-1] == pytest.approx(2) and set(np.round(gains, 6)) == {1, 2}
    settings, captions = GenerationSettings(steps=5, guidance=(1.0,), size=(64, 64)), {"a": "red", "b": "blue"}
    plain = generate(pipeline, captions, settings, tmp_path / "plain", bar=False)[1.0]
    found = {}
    for name, own in (("ones", [1.0] * 5), ("twos", gains)):
        found[name] = effect_gain.sample_with_gains(pipeline, captions, settings, tmp_path / name, "x", own)[1.0]
    pixels = {folder: read_pictures([folder / f"{stem}.png" for stem in captions])
              for folder in (plain, *found.values())}  # fmt: skip
    assert (pixels[plain] == pixels[found["ones"]]).all() and (pixels[plain] != pixels[found["twos"]]).any()
    assert "scaled_step" not in str(effect_gain.generation.sampling_scheduler(pipeline, "auto", 5).step)


def test_the_one_step_table_is_paired():
    rng = np.random.default_rng(0)
    keys = ("latent_mse", "psnr", "high_frequency", "gain", "perceptual/efficientnet-lite2",
            "perceptual/efficientnet-lite0")  # fmt: skip
    base = {key: rng.normal(size=(10, 200)) for key in keys}
    other = {key: values - 0.1 + 1e-3 * rng.normal(size=values.shape) for key, values in base.items()}
    first, second = effect_measures.one_step_table({"none": base, "other": other})
    assert first == {"model": "none", **{key: pytest.approx(base[key].mean()) for key in keys}}
    for key in keys:
        value, low, high = second[f"{key}_change"]
        assert low < -0.1 < high and high - low < 1e-3 and value == pytest.approx(-0.1, abs=1e-3)


def test_a_lora_is_compared_with_the_same_without_lpl():
    """And every arm but the first with the finalist too."""
    values = {"none": 1.0, "decoder-full": 2.0, "rank-4": 4.0, "rank-4-full": 8.0}
    keys = (
        "latent_mse",
        "psnr",
        "high_frequency",
        "gain",
        f"perceptual/{effect_judge.JUDGE}",
        "perceptual/efficientnet-lite0",
    )
    results = {arm: {key: np.full((10, 5), value) for key in keys} for arm, value in values.items()}
    rows = effect_measures.one_step_table(results, effect_arms.BASELINES, effect_arms.FINALIST)
    assert [row.get("psnr_change") for row in rows] == [None, [1.0] * 3, [3.0] * 3, [4.0] * 3]
    assert [row.get("psnr_finalist_change") for row in rows] == [None, None, [2.0] * 3, [6.0] * 3]


def test_arms_take_turns_when_their_time_is_measured(tmp_path):
    turns = []

    def train(arm, steps, number):
        turns.append((arm, number))
        speed = {"none": 8.0, "decoder": 4.0}[arm]
        rows = [{"step": step, "samples_per_second": speed if step > steps // 2 else 1e-3} for step in range(steps)]
        (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / "log"

    found = effect_measures.step_seconds(train, ["none", "decoder"], steps=4, rounds=2)
    assert found == {"none": 0.125, "decoder": 0.25}
    assert turns == [("none", 0), ("decoder", 0), ("none", 1), ("decoder", 1)]


def test_a_model_is_judged_by_two_references(sdxl_folder, tmp_path):
    """A reference is at distance zero of itself; samples are kept; a change of reference is beyond its interval."""
    source = picture_folder(tmp_path / "train", 12, size=64)
    rows = [f"{path.name},picture {path.stem}" for path in sorted(source.glob("*.png"))]
    (source / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    for path in source.glob("*.txt"):
        path.unlink()
    shown = tmp_path / "reconstructions"
    effect_judge.make_reconstructions(source, shown, sdxl_folder / "vae")
    images = scan_folder(source, cache_dir=tmp_path / "cache").images
    folder = effect_judge.sample(sdxl_folder, images, 12, [1.0], tmp_path / "samples")[1.0]
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert made.keys() == {path.name for path in source.glob("*.png")}
    effect_judge.sample(sdxl_folder, images, 12, [1.0], tmp_path / "samples")
    assert made == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    models = {"itself": source, "shown": shown, "samples": folder}
    references = {"pictures": source, "reconstructions": shown}
    twins = {"samples": "shown", "shown": "none"}
    rows, floors = effect_judge.judge(models, references, tmp_path / "features", twins, "shown")
    by_name = {row["model"]: row for row in rows}
    for network in effect_judge.NETWORKS:
        found = {name: [row[reference][network]["frechet"] for reference in ("pictures", "reconstructions")]
                 for name, row in by_name.items()}  # fmt: skip
        assert found["itself"][0] == pytest.approx(0, abs=1e-3) == found["shown"][1]
        assert found["itself"][1] == pytest.approx(found["shown"][0], rel=1e-4) and found["itself"][1] > 1
        assert min(found["samples"]) > 1 and floors["pictures"][network] > 1
    assert by_name["itself"]["change"] == {}, "the baseline"
    changes = by_name["shown"]["change"]
    assert changes["pictures"][1] > 0 > changes["reconstructions"][2], "farther from one, nearer to the other"
    real, base, own = (features_of(place, load_network(effect_judge.JUDGE), tmp_path / "features").values
                       for place in (shown, source, folder))  # fmt: skip
    told = distance_differences(real, own, base, names=("frechet",))["frechet"]
    assert by_name["samples"]["change"]["reconstructions"] == pytest.approx([told.value, told.low, told.high])
    assert "twin_change" not in by_name["shown"], "its twin was not judged"
    for reference in references:
        first, second = (by_name[name][reference][effect_judge.JUDGE] for name in ("samples", "shown"))
        against = by_name["samples"]["twin_change"][reference][0]
        assert against == pytest.approx(first["frechet"] - second["frechet"], rel=0.05)
        assert by_name["samples"]["finalist_change"][reference][0] == against, "its twin is the finalist here"
        back, there = by_name["itself"]["finalist_change"], by_name["shown"]["change"]
        assert back[reference][0] == pytest.approx(-there[reference][0]) and "finalist_change" not in by_name["shown"]
        own, none = (by_name[name][reference][effect_judge.JUDGE]["kernel"] for name in ("samples", "itself"))
        assert by_name["samples"]["kernel_change"][reference][0] == pytest.approx(own - none, rel=1e-3)


def test_copies_lie_at_no_distance_from_the_training_pictures(tmp_path):
    """Pictures that the model was trained on do; held-out ones lie where held-out ones lie."""
    train, held_out = (picture_folder(tmp_path / name, 12, size=64, seed=place)
                       for place, name in enumerate(("train", "held_out")))  # fmt: skip
    models = {"copies": train, "new": held_out}
    copies, new = effect_judge.judge_copies(models, train, held_out, tmp_path / "features")
    assert copies["generated"] == pytest.approx(0, abs=0.05) and "kernel_change" not in copies, "the baseline"
    assert new["generated"] == pytest.approx(new["held_out"]) and new["held_out"] == copies["held_out"] > 1
    assert copies["nearer"][2] < 0 == pytest.approx(new["nearer"][0])
    assert new["kernel_change"][0] == pytest.approx(new["kernel"] - copies["kernel"], rel=1e-3) and new["kernel"] < 0


@pytest.mark.parametrize("base", ["epsilon", "flow"])
def test_arms_start_from_the_pipeline_in_examples_where_no_base_was_trained(base, tmp_path):
    """In float32, with its tokenizers."""
    effect.make_pipelines(tmp_path, base)
    made, example = effect.pipeline_of(tmp_path, f"{base}-009000"), effect.KEPT[base]
    for file in sorted(example.rglob("*.safetensors")):
        ours, theirs = load_file(made / file.relative_to(example)), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value.half(), theirs[name].half())
                   for name, value in ours.items())  # fmt: skip
    for file in sorted(example.rglob("tokenizer.json")):
        vocabularies = [json.loads((folder / file.relative_to(example)).read_text())["model"]["vocab"]
                        for folder in (made, example)]  # fmt: skip
        assert vocabularies[0] == vocabularies[1]
    assert base == "epsilon" or not torch.equal(*(
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["pos_embed.pos_embed"].float()
        for folder in (made, example)
    ))  # fmt: skip
    (tmp_path / base / "average-003000.safetensors").touch()
    (tmp_path / base / "pipelines" / "003000").mkdir()
    (tmp_path / base / "pipelines" / "003000" / "model_index.json").touch()
    shutil.rmtree(made)
    effect.make_pipelines(tmp_path, base)
    assert [*effect.averages_of(tmp_path, base)] == ["003000"] and made.is_dir(), "the training had not ended"


def test_an_average_that_is_kept_here_stands_in_for_a_missing_one(tmp_path, monkeypatch):
    """One of the work folder goes before."""
    monkeypatch.setattr(effect, "KEPT_AVERAGES", tmp_path / "kept")
    for file in ("kept/epsilon/average-003000", "kept/epsilon/average-009000", "work/epsilon/average-009000"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{file}.safetensors").touch()
    found = effect.averages_of(tmp_path / "work", "epsilon")
    assert {steps: path.parent.parent.name for steps, path in found.items()} == {"003000": "kept", "009000": "work"}


def test_the_average_of_the_v_base_has_the_networks_of_the_tiny_sdxl():
    """`make_pipelines` puts it into a pipeline of that shape; one of other shapes could not start an arm."""
    (average,) = effect.averages_of(ROOT / "nowhere", "v_prediction").values()
    shapes = {name: value.shape for name, value in load_file(average).items()}
    example = effect.KEPT["epsilon"]
    for part in {name.split(".")[0] for name in shapes}:
        (file,) = (example / part).glob("*.safetensors")
        theirs = {f"{part}.{name}": value.shape for name, value in load_file(file).items()}
        assert {name: shape for name, shape in shapes.items() if name.startswith(f"{part}.")} == theirs
    assert any(name.startswith("unet.") for name in shapes)


def test_a_base_that_was_never_trained_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(effect, "KEPT_AVERAGES", tmp_path)
    with pytest.raises(SystemExit, match="v_prediction has no average"):
        effect.make_pipelines(tmp_path, "v_prediction")


def test_a_longer_run_begins_where_a_shorter_one_of_the_same_arm_ended(tmp_path):
    """The latest of its seed; a checkpoint of its own goes before."""
    arms = tmp_path / "arms" / "epsilon-009000"
    for folder in ("none-1/checkpoint-1000", "none-1-1230-steps/checkpoint-1200", "none-1-1500-steps/checkpoint-750",
                   "none-1-3000-steps/checkpoint-3000", "none-2-1400-steps/checkpoint-1400",
                   "none-1-1230-steps/checkpoint-1201-kept", "none-1-old/checkpoint-1300",
                   "none-1-2500-steps/copy"):  # fmt: skip
        (arms / folder).mkdir(parents=True)
        (arms / folder / "state").write_text(folder)
    (arms / "none-1-2500-steps/copy/begun").touch()
    effect.take_shorter_run(tmp_path, "epsilon-009000", "none", 1, 2500)
    own = arms / "none-1-2500-steps"
    assert [path.name for path in own.iterdir()] == ["checkpoint-1200"]
    assert [path.read_text() for path in (own / "checkpoint-1200").iterdir()] == ["none-1-1230-steps/checkpoint-1200"]
    (own / "checkpoint-1200").rename(own / "checkpoint-2000")
    effect.take_shorter_run(tmp_path, "epsilon-009000", "none", 1, 2500)
    assert [path.name for path in own.iterdir()] == ["checkpoint-2000"]
    effect.take_shorter_run(tmp_path, "epsilon-009000", "none", 1, 500)
    assert not (arms / "none-1-500-steps").exists()


@pytest.mark.parametrize("path", sorted(effect.RESULTS.glob("effect-arm-[!e]*.json")) + sorted(
    effect.RESULTS.glob("effect-arm-epsilon-*.json")), ids=lambda path: path.stem[11:])  # fmt: skip
def test_an_arm_means_what_it_meant(path):
    """Its flags of today are those of its result, whatever the scripts' defaults were then."""
    found = json.loads(path.read_text())
    assert effect.meant(found["flags"]) == effect.meant(effect.flags_of(found["arm"], found["start"], found["steps"]))


def test_flags_mean_their_last_value():
    meant = effect.meant("--use_lpl --a 1 2 --lpl_share 0.2 --a 3 --lpl_norm_gradient none")
    assert meant == {"--use_lpl": [], "--a": ["3"]} and effect.meant("--lpl_share 0.3") == {"--lpl_share": ["0.3"]}


def test_copies_are_looked_for_as_the_decoder_shows_pictures(tmp_path, monkeypatch):
    """Samples of every arm of a seed and length, against training and held-out pictures of the base's family."""
    seen = {}
    monkeypatch.setattr(effect, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(effect, "make_reconstructions", lambda source, folder, vae: seen.update({folder.name: source}))
    monkeypatch.setattr(effect, "sampled", lambda work, models, samples, guidance: {
        arm: {1.0: work / "samples" / folder} for arm, folder in models.items()
    })  # fmt: skip
    monkeypatch.setattr(effect, "judge_copies", lambda folders, train, held_out, store: [
        {"model": arm, "of": str(folder.relative_to(tmp_path)), "train": train.name, "held_out": held_out.name}
        for arm, folder in folders.items()
    ])  # fmt: skip
    effect.main(["--work", str(tmp_path), "copies", "--base", "flow", "--seed", "2", "--arm", "none", "decoder-full",
                 "--steps", "400"])  # fmt: skip
    found = json.loads((tmp_path / "results" / "effect-copies-flow-009000-2-400-steps.json").read_text())
    assert (found["seed"], found["steps"]) == (2, 400)
    assert [row["of"] for row in found["rows"]] == [
        f"samples/arms/flow-009000/{arm}-2-400-steps" for arm in ("none", "decoder-full")
    ]
    assert {(row["train"], row["held_out"]) for row in found["rows"]} == {("sd3", "sd3-held-out")}
    assert seen == {"sd3": tmp_path / "train", "sd3-held-out": tmp_path / "held_out"}


def test_a_longer_run_takes_none_of_other_flags(tmp_path, monkeypatch):
    """As the shorter run's result tells them."""
    monkeypatch.setattr(effect, "RESULTS", tmp_path)
    arms = tmp_path / "arms" / "epsilon-009000"
    (arms / "decoder-1" / "checkpoint-1000").mkdir(parents=True)
    result = tmp_path / "effect-arm-epsilon-009000-decoder-1.json"
    result.write_text(json.dumps({"flags": "--use_lpl --lpl_share 0.7"}))
    with pytest.raises(SystemExit, match=r"decoder-1 was trained with other flags: --use_lpl --lpl_share 0\.7"):
        effect.take_shorter_run(tmp_path, "epsilon-009000", "decoder", 1, 2500)
    result.write_text(json.dumps({"flags": effect.flags_of("decoder", "epsilon-009000", 1000)}))
    effect.take_shorter_run(tmp_path, "epsilon-009000", "decoder", 1, 2500)
    assert (arms / "decoder-1-2500-steps" / "checkpoint-1000").is_dir()


@pytest.mark.parametrize(("arm", "resumes"), [("none", True), ("second-half", False)])
def test_an_arm_is_resumed_from_its_shorter_run(arm, resumes, tmp_path, monkeypatch):
    """Unless a flag of it depends on the number of steps."""
    started = []
    monkeypatch.setattr(effect, "run", lambda words, log: started.append(words))
    monkeypatch.setattr(effect, "keep_arm", lambda *about: None)
    monkeypatch.setattr(effect, "pipeline_of", lambda work, start: "base")
    (tmp_path / "arms" / "epsilon-009000" / f"{arm}-1" / "checkpoint-1000").mkdir(parents=True)
    own = effect.train_arm(tmp_path, "epsilon-009000", arm, 1, 1500)
    assert (own / "checkpoint-1000").is_dir() == resumes == ("--resume_from_checkpoint" in started[0])
