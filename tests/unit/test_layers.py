"""The layers of the code, read from its imports: no circle, no import upward, no private name of another file."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train_sdxl_lpl", "train_sd3_lpl_flow", "train_latent_classifier", "preview_data", "evaluate_models")
FLOORS = (  # from the ground up: a file imports from floors below its own only
    ("errors", "lpl_utils", "other_flags", "stages", "yaml_texts", "architectures"),
    ("files", "sample_prompts", "original_names"),
    ("base_model", "kohya_files"),
    ("lora_files", "tensor_files", "single_file", "networks.latent_classifier", "data.conventions", "data.formats",
     "data.png_files", "data.tables", "data.store", "networks.encoder_sketch"),
    ("adapters", "data.colours", "data.near_names", "unpacking"),
    ("data.images",),
    ("data.samples", "data.findings"),
    ("data.rows",),
    ("data.walk", "data.wrong_source"),
    ("data.folders", "data.packed"),
    ("data.scan",),
    ("data.report", "data.encoding", "data.contact_sheet", "data.labels"),
    ("flags", "evaluation.networks"),
    ("networks.checks",),
    ("flag_checks", "families", "start"),
    ("training.checkpoint_folders", "training.sharding", "training.guard", "training.signals",
     "training.live_memory", "training.machine", "training.transfer", "evaluation.models"),
    ("evaluation.verdict", "evaluation.charts", "evaluation.picture_sets", "evaluation.distances",
     "evaluation.spectrum"),
    ("evaluation.generation", "evaluation.onestep", "evaluation.report", "evaluation.uncertainty",
     "evaluation.features"),
    ("training.models", "training.reporter", "training.augmentation", "training.perceptual"),
    ("training.objective", "training.optimization", "training.checkpoints"),
    ("training.measures", "training.step_memory"),
    ("training.validation", "training.run", "training.estimates", "training.out_of_memory"),
    ("training.plan", "training.classification"),
    ("results.metadata", "results.merging"),
    ("results.export", "results.hub", "evaluation.comparison"),
    ("results.classifier_card",),
    ("publish", "convert", "merge", *SCRIPTS),
)  # fmt: skip
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
TORCH_FREE = ("errors", "other_flags", "stages", "yaml_texts", "files", "sample_prompts",
               "architectures", "original_names", "single_file", "unpacking",
               "base_model", "kohya_files", "lora_files", "adapters", "families", "start", "flags",
               "flag_checks", "networks.checks", "networks.encoder_sketch",
              "evaluation.models", "evaluation.verdict", "evaluation.charts", "evaluation.picture_sets",
              "evaluation.report", "evaluation.networks", "evaluation.distances", "evaluation.spectrum",
              "evaluation.uncertainty",
              "training.checkpoint_folders", "results.metadata",
              "data.colours", "data.conventions", "data.formats", "data.png_files", "data.near_names", "data.images",
              "data.tables", "data.store", "data.samples",
              "data.findings", "data.rows", "data.walk", "data.wrong_source", "data.folders", "data.packed",
              "data.scan",
              "data.report", "data.encoding", "data.contact_sheet", "data.labels")  # fmt: skip


def path_of(name):
    """The file of a module of `FLOORS`."""
    at_the_top = name in SCRIPTS or name == "lpl_utils"
    return ROOT / (f"{name}.py" if at_the_top else f"lpl_finetuning/{name.replace('.', '/')}.py")


@cache
def imports_of(name):
    """[(module, names)] of all imports in a file, those inside functions too; ours without the package's name."""
    found = []
    for node in ast.walk(ast.parse(path_of(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name.removeprefix("lpl_finetuning."), ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            inside = f"{node.module}.".removeprefix("lpl_finetuning.")
            modules = [each for each in names if node.module.startswith("lpl_finetuning") and inside + each in FLOOR]
            found += [(inside + each, ()) for each in modules]
            if len(modules) < len(names):
                found.append((inside.rstrip("."), tuple(each for each in names if each not in modules)))
    return found


def test_every_file_has_a_floor():
    package = {str(path.relative_to(ROOT / "lpl_finetuning").with_suffix("")).replace("/", ".")
               for path in (ROOT / "lpl_finetuning").rglob("*.py") if path.name != "__init__.py"}  # fmt: skip
    top = {path.stem for path in ROOT.glob("*.py")}
    assert package | top == FLOOR.keys()


@pytest.mark.parametrize("name", FLOOR)
def test_imports_point_downward(name):
    for module, names in imports_of(name):
        if module in FLOOR:
            assert FLOOR[module] < FLOOR[name], f"{name} imports {module}, which is not below it"
            private = [each for each in names if each.startswith("_")]
            assert not private, f"{name} imports {private} from {module}"


def test_packages_import_nothing():
    for path in (ROOT / "lpl_finetuning").rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], path


def test_the_loss_imports_torch_only():
    imported = {module.split(".")[0] for module, _ in imports_of("lpl_utils")}
    assert imported - sys.stdlib_module_names <= {"torch", "diffusers"}  # diffusers for type checkers


@pytest.mark.parametrize("name", ["train_sdxl_lpl", "train_sd3_lpl_flow", "train_latent_classifier"])
def test_a_script_can_be_read_from_top_to_bottom(name):
    """600 lines: whoever adds to a script takes something out."""
    assert len(path_of(name).read_text(encoding="utf-8").splitlines()) <= 600


@pytest.mark.parametrize("name", FLOOR)
def test_no_function_is_longer_than_a_screen(name):
    long = {
        node.name: lines
        for node in ast.walk(ast.parse(path_of(name).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > 60
    }
    assert not long, f"{name}: lines of functions"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_runs_before_the_slow_imports_imports_no_torch(name):
    slow = {"torch", "diffusers", "transformers", "accelerate", "peft"}
    tree = ast.parse(path_of(name).read_text(encoding="utf-8"))
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & slow
    for module, _ in imports_of(name):
        assert module not in FLOOR or module == "lpl_utils" or module in TORCH_FREE, module
