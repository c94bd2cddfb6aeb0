"""Mistakes that people make, each in a process of its own: one message in seconds, and torch is never imported.

A case names its mistake and three things that the message must hold: the flag or file, what was found, what to do.
"""

import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lpl_finetuning.flag_checks import is_for_cpus_only
from lpl_finetuning.training.checkpoint_folders import write_manifest
from tests import children

ROOT = Path(__file__).resolve().parents[2]
SDXL, SD3 = ROOT / "examples" / "tiny-sdxl", ROOT / "examples" / "tiny-sd3"
SCRIPTS = {"sdxl": "train_sdxl_lpl.py", "sd3": "train_sd3_lpl_flow.py"}
LIMIT = 5  # seconds from the start of a process to its end

# Written to a folder on PYTHONPATH: every Python process tells at its end whether torch was imported, and for how long
# it was ready to run while others had the processor (schedstat's second number, nanoseconds).
DETECTOR = """
import atexit, json, os, sys
def tell():
    waited = 0
    try:
        with open("/proc/self/schedstat") as file:
            waited = int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        pass
    with open(os.environ["PREFLIGHT_TOLD"], "w") as file:
        json.dump({"torch": "torch" in sys.modules, "waited": waited}, file)
atexit.register(tell)
"""


# ---------------------------------------------------------------------------------------------------------------------
# Wrong models, recipes and data, made once


def edit(path, **changes):
    """Change entries of a JSON file, or with None remove them."""
    content = {**json.loads(path.read_text()), **changes}
    path.unlink()
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def put(path, content):
    """Write a file in the place of a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def safetensors(*names, **shapes):
    """The bytes of a safetensors file of tensors of one number each, and of layer "lora_unet_a" with these shapes."""
    shapes = {name: [1] for name in names} | {f"lora_unet_a.{end.replace('__', '.')}": x for end, x in shapes.items()}
    entries, size = {}, 0
    for name, shape in shapes.items():
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [size, size + math.prod(shape)]}
        size += math.prod(shape)
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


class Places:
    """A folder of wrong things; each is a name in the cases' command lines."""

    def __init__(self, root):
        self.root, self.paths = (
            root,
            {"sdxl": SDXL, "sd3": SD3, "root": root},
        )

    def model(self, name, base=SDXL):
        """A copy of a pipeline, of links."""
        self.paths[name] = self.root / name
        shutil.copytree(base, self.root / name, copy_function=os.symlink)
        return self.root / name

    def file(self, name, content):
        """A file; its name in the cases is that before the dot."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, content)
        self.paths[Path(name).stem] = path
        return path

    def folder(self, name, **files):
        """A folder with files; __ in a name stands for a dot."""
        folder = self.paths[name] = self.root / name
        folder.mkdir()
        for file, content in files.items():
            put(folder / file.replace("__", "."), content)
        return folder


def make_models(places):
    """Base models that are none, not whole, or of parts that do not fit."""
    for name, kind in {"sd15": "StableDiffusionPipeline", "flux": "FluxPipeline", "nameless": None}.items():
        edit(places.model(name) / "model_index.json", _class_name=kind)
    refiner = places.model("refiner")
    edit(refiner / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])
    for name, kind, channels in (("inpaint", "Inpaint", 9), ("pix2pix", "InstructPix2Pix", 8)):
        edit(places.model(name) / "model_index.json", _class_name=f"StableDiffusionXL{kind}Pipeline")
        edit(places.paths[name] / "unet" / "config.json", in_channels=channels)
    for name, content in {"emptyindex": "{}", "blankindex": "", "textindex": "hello", "listindex": "[]",
                          "binaryindex": b"\xff\xfe\x00"}.items():  # fmt: skip
        put(places.model(name) / "model_index.json", content)
    shutil.rmtree(places.model("gutted") / "text_encoder_2")
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    whole = (SDXL / weights).read_bytes()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name, content in {"zerobytes": b"", "truncated": whole[:-1000], "header": whole[:100], "html": "<html>" * 99,
                          "lfs": pointer}.items():  # fmt: skip
        put(places.model(name) / weights, content)
    (places.model("noweights") / weights).unlink()
    (places.model("noconfig") / "vae" / "config.json").unlink()
    put(places.model("badconfig") / "unet" / "config.json", "{'single': 'quotes'}")
    (places.model("noscheduler") / "scheduler" / "scheduler_config.json").unlink()
    (places.model("notokenizer") / "tokenizer_2" / "tokenizer.json").unlink()
    sharded = places.model("sharded")
    (sharded / weights).unlink()
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    put(sharded / "unet" / names[0], safetensors("a"))
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    put(sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json", json.dumps(index))
    half = places.model("halfprecision")
    for part, stem in {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
                       "text_encoder_2": "model"}.items():  # fmt: skip
        (half / part / f"{stem}.safetensors").rename(half / part / f"{stem}.fp16.safetensors")
    edit(places.model("widths") / "unet" / "config.json", cross_attention_dim=768)
    edit(places.model("micro") / "unet" / "config.json", projection_class_embeddings_input_dim=224)
    edit(places.model("sd15unet") / "unet" / "config.json", addition_embed_type=None)
    edit(places.model("edm") / "scheduler" / "scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler")
    edit(places.model("tinyvae") / "vae" / "config.json", _class_name="AutoencoderTiny")
    edit(places.model("vae16") / "vae" / "config.json", latent_channels=16)
    edit(places.model("overflows") / "vae" / "config.json", force_upcast=True)
    edit(places.model("vae4x") / "vae" / "config.json", block_out_channels=[8, 8, 8])
    places.folder("onefolderdown")
    shutil.copytree(SDXL, places.root / "onefolderdown" / "model", copy_function=os.symlink)
    places.folder("civitai", dreamy__safetensors=b"")
    places.folder("nothing")
    lora = "unet.mid_block.attentions.0.to_q.lora_A.weight"
    places.folder("lora", pytorch_lora_weights__safetensors=safetensors(lora))
    places.file("single.safetensors", whole)
    edit(places.model("sd3euler", SD3) / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    edit(places.model("sd3widths", SD3) / "transformer" / "config.json", joint_attention_dim=100)
    edit(places.model("sd3pooled", SD3) / "transformer" / "config.json", pooled_projection_dim=100)
    edit(places.model("sd3channels", SD3) / "transformer" / "config.json", in_channels=33)
    shutil.rmtree(places.model("sd3not5", SD3) / "text_encoder_3")
    (places.model("sd3noweights", SD3) / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    places.file("lokr.safetensors", safetensors("lora_unet_a.lokr_w1"))
    layer = {"lora_down__weight": [4, 8], "lora_up__weight": [6, 4]}
    places.file("kohya.safetensors", safetensors(**layer, alpha=[1]))
    for name, start in {"ofunet": "lora_unet_down_blocks_1_x", "ofmmdit": "lora_unet_joint_blocks_0_x",
                        "offlux": "lora_unet_double_blocks_0_x"}.items():  # fmt: skip
        places.file(f"{name}.safetensors", safetensors(f"{start}.lora_down.weight", f"{start}.lora_up.weight"))
    places.file("halflora.safetensors", safetensors(lora_down__weight=[4, 8], alpha=[1]))
    places.file("rows.safetensors", safetensors(**layer, dora_scale=[1, 8]))
    places.file("dora.safetensors", safetensors(**layer, dora_scale=[6, 1]))
    places.folder("twoloras", a__safetensors=safetensors(**layer), b__safetensors=safetensors(**layer))
    places.file("notlora.safetensors", safetensors("model.diffusion_model.out.0.bias"))
    places.file("cutlora.safetensors", safetensors(lora)[:-1])
    places.file("old.ckpt", b"PK")
    for name, content in {"q_text": "load_in_4bit: true", "q_list": "[]", "q_none": "{}", "q_kind":
                          '{"load_in_4bit": true, "bnb_4bit_quant_type": "int4"}', "q_both":
                          '{"load_in_4bit": true, "load_in_8bit": true}', "q_typo":
                          '{"load_in_4bit": true, "quant_type": "nf4"}', "quantized":
                          '{"load_in_4bit": true}'}.items():  # fmt: skip
        places.file(f"{name}.json", content)


def make_recipes_and_data(places):
    """Recipe files and folders of pictures with one mistake each."""
    for name, content in {
        "r_typo": "learning_rat: 1", "r_yaml": "a: [1", "r_list": "- 1\n- 2", "r_text": "just words",
        "r_tab": "a:\t- b",
        "r_bool": "use_lora: maybe", "r_none": "resolution:", "r_several": "resolution: [512, 768]",
        "r_number": "learning_rate: fast", "r_choice": "lr_scheduler: cosinee", "r_kohya": "network_dim: 8",
        "r_nested": "resolution:\n  height: 512",
    }.items():  # fmt: skip
        places.file(f"{name}.yaml", content + "\n")
    places.file("r_binary.yaml", b"\x89PNG\xff\xfe")
    png = (ROOT / "docs" / "images" / "data-preview.png").read_bytes()
    places.folder("uncaptioned", a__png=png)
    places.folder("words", a__txt="a dog")
    places.folder("captionless", a__png=png, metadata__jsonl='{"file_name": "a.png", "caption": "a dog"}\n')
    places.folder("badlisting", a__png=png, metadata__jsonl="{'file_name': 'a.png'}\n")
    places.folder("missing", metadata__jsonl='{"file_name": "b.png", "text": "a dog"}\n')
    places.folder("damaged", a__png=png[:1000], a__txt="a dog")
    places.folder("blank", a__png=png, a__txt="")
    places.folder("latin", a__png=png, a__txt="caf\xe9".encode("latin-1"))
    places.folder("heic", a__heic=b"x", a__txt="a dog")
    places.file("pictures.zip", b"PK")
    places.paths |= {"pictures": ROOT / "examples" / "fluent-emoji", "zip": places.root / "pictures.zip"}
    places.folder("out", config__yaml="")
    shutil.copytree(SDXL, places.root / "out" / "model", copy_function=os.symlink)
    places.folder("another")
    checkpoint = places.folder("another/checkpoint-4", training_state__json='{"step": 4, "identity": {"seed": 7}}')
    write_manifest(checkpoint, 4)
    places.paths["checkpoint"] = checkpoint
    places.folder("sd3run")
    state = '{"step": 4, "identity": {"recipe": "SD3"}}'
    write_manifest(places.folder("sd3run/checkpoint-4", training_state__json=state), 4)


class Hub(BaseHTTPRequestHandler):
    """A Hub with one model, that of examples/tiny-sdxl with weights in half precision only, and with refusals."""

    def log_message(self, *words):
        pass

    def answer(self, status=200, body=b"", **headers):
        """An answer with a body, which HEAD leaves out."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        """Whatever is asked for."""
        path, commit = self.path.split("?")[0], "0" * 40
        if path.startswith("/gated/"):
            self.answer(403, X_Error_Code="GatedRepo")
        elif path.startswith("/api/models/our/half"):
            files = [file.relative_to(SDXL).as_posix() for file in SDXL.rglob("*") if file.is_file()]
            names = [name.replace(".safetensors", ".fp16.safetensors") for name in files]
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
            self.answer(body=json.dumps(tree).encode())
        elif path.startswith("/our/half/resolve/main/"):
            file = SDXL / path.removeprefix("/our/half/resolve/main/")
            if file.is_file():
                self.answer(body=file.read_bytes(), ETag=f'"{file.stat().st_size}"', X_Repo_Commit=commit)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")
        elif path.startswith("/our/half/"):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif path == "/":
            self.answer()
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name in the cases: path}"""
    root = tmp_path_factory.mktemp("wrong")
    places = Places(root)
    make_models(places)
    make_recipes_and_data(places)
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(DETECTOR)
    return places.paths


@pytest.fixture(scope="module")
def hub():
    """The address of a `Hub`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def environment_of(places, variables):
    """The environment of a command: that of the tests, without the user's settings of the Hub."""
    root = places["root"]
    left_out = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    path = os.pathsep.join(filter(None, (str(root / "hook"), environment.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "PREFLIGHT_TOLD": str(root / "told.json"), "HF_HOME": str(root / "hf"),
                    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment |= {key: value for key, value in variables.items() if value is not None}
    for key in (key for key, value in variables.items() if value is None):
        environment.pop(key, None)
    return environment


def fork(words, places, **variables):
    """The result of a command in a fork of a process without torch: its exit status is 99 if it imports torch."""
    environment = environment_of(places, variables)
    return children.run(
        [sys.executable, *words], light=True, cwd=places["root"], env=environment, text=True, timeout=60
    )


def start(words, places, **variables):
    """Run a command from nothing; (its result, seconds it took, whether torch was imported).

    On a loaded machine the time that the process was ready and did not run is not counted: what is left is its own
    work and its own waiting, for the network for instance.
    """
    root, environment = places["root"], environment_of(places, variables)
    (root / "told.json").unlink(missing_ok=True)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads((root / "told.json").read_text())
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, max(busy, wall - told["waited"]), told["torch"]


def split(text, places):
    """The words of a command line, in which {name} is a path and ^ a blank."""
    return [word.format(**places).replace("^", " ") for word in text.split()]


def refusal(script, mistake, places, timed=False, **variables):
    """The message of a script that is started with a mistake, once everything else about the start is checked.

    timed: start from nothing and look at the clock; else a fork, which takes a tenth of the time.
    """
    words = split(mistake, places)
    given = {word.split("=")[0] for word in words}
    model = {"sdxl": SDXL, "sd3": SD3}[script]
    usual = {"--pretrained_model_name_or_path": model, "--train_data_dir": places["pictures"], "--resolution": 64,
             "--output_dir": "runs/out", "--cache_dir": "cache", "--report_to": "none"}  # fmt: skip
    if given & {"--dataset_name", "--instance_data_dir", "NODATA"}:
        usual.pop("--train_data_dir")
    if "--config" in given:
        usual.pop("--resolution")
    more = [str(word) for flag, value in usual.items() if flag not in given for word in (flag, value)]
    words = [word for word in words if word != "NODATA"]
    words = [str(ROOT / SCRIPTS[script]), *more, *words]
    if timed:
        result, seconds, torch = start(words, places, **variables)
        assert not torch, "torch was imported to tell a mistake"
        assert seconds < LIMIT, f"{seconds:.1f} s"
    else:
        result = fork(words, places, **variables)
    assert result.returncode == 2, (
        f"status {result.returncode}; 99: torch was imported\n{result.stderr}{result.stdout}"
    )
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1, result.stderr
    assert not (places["root"] / "runs" / "out").exists(), "nothing is made for a run that can't begin"
    return result.stderr.removeprefix("error: ")


# ---------------------------------------------------------------------------------------------------------------------
# The cases: command line | flag or file | what was found | what to do

BASE = "--pretrained_model_name_or_path"
VAE, UNET = "--pretrained_vae_model_name_or_path", "--pretrained_unet_model_name_or_path"
TRANSFORMER = "--pretrained_transformer_model_name_or_path"
QUANTIZED = "--use_lora --bnb_quantization_config_path"

MODELS = f"""
{BASE} {{sd15}} | {BASE} | is a StableDiffusionPipeline | give one of those
{BASE} {{flux}} | {BASE} | is a FluxPipeline | this script trains StableDiffusionXL
{BASE} {{sd3}} | {BASE} | is a StableDiffusion3Pipeline | use train_sd3_lpl_flow.py
{BASE} {{nameless}} | {BASE} | pipeline without a class name | give one of those
{BASE} {{refiner}} | model_index.json has no text_encoder | the refiner can't be trained | give the base model
{BASE} {{inpaint}} | unet takes 9 channels | made for inpainting | give a plain text-to-image model
{BASE} {{pix2pix}} | unet takes 8 channels | made for InstructPix2Pix | give a plain text-to-image model
{BASE} {{single}} | {BASE} | is a UNet in diffusers' layout | put it into a folder
{BASE} {{gutted}} | {BASE} | the folder text_encoder_2/ | download the model again
{BASE} {{emptyindex}} | {BASE} | without a class name | give one of those
{BASE} {{blankindex}} | model_index.json | not valid JSON | download the model again
{BASE} {{textindex}} | model_index.json | not valid JSON | repair it
{BASE} {{listindex}} | model_index.json | found a JSON list | download the model again
{BASE} {{binaryindex}} | model_index.json | not valid JSON | download the model again
{BASE} {{zerobytes}} | unet/diffusion_pytorch_model.safetensors | is empty (0 bytes) | download the model again
{BASE} {{truncated}} | unet/diffusion_pytorch_model.safetensors | is cut short | download the model again
{BASE} {{header}} | unet/diffusion_pytorch_model.safetensors | longer than the file | download the model again
{BASE} {{html}} | unet/diffusion_pytorch_model.safetensors | can't be read as safetensors | download the model again
{BASE} {{lfs}} | unet/diffusion_pytorch_model.safetensors | a pointer of Git LFS | git lfs pull
{BASE} {{noweights}} | unet/ | has no weights without a variant | download the model again
{BASE} {{noconfig}} | vae/config.json | is missing | download the model again
{BASE} {{badconfig}} | unet/config.json | not valid JSON | repair it
{BASE} {{noscheduler}} | scheduler/scheduler_config.json | is missing | download the model again
{BASE} {{notokenizer}} | tokenizer_2/ | has neither tokenizer.json | download the model again
{BASE} {{sharded}} | index.json names 2 files | diffusion_pytorch_model-00002-of-00002.safetensors | download
{BASE} {{halfprecision}} | vae/ | has no weights without a variant | it has those of --variant fp16
{BASE} {{sdxl}} --variant fp16 | no weights of --variant fp16 | it has others | leave --variant out
{BASE} {{widths}} | the base model's unet takes text of width 768 | the text encoders give 64 + 64 | belong together
{BASE} {{micro}} | micro-conditioning | 160 numbers | give a base model's UNet
{BASE} {{sd15unet}} | the base model's unet is not SDXL's | addition_embed_type is None | give an SDXL UNet
{BASE} {{edm}} | {BASE} | EDMDPMSolverMultistepScheduler | give another base model
{BASE} {{tinyvae}} | vae/config.json | is of a AutoencoderTiny | give one as {VAE}
{BASE} {{vae16}} | unet takes 4 channels | the autoencoder makes 16 | give a plain text-to-image model
{BASE} {{vae4x}} | the base model's autoencoder | 4 times smaller | give another {VAE}
{BASE} {{overflows}} --use_lpl --lpl_vae_dtype float16 | --lpl_vae_dtype float16 | overflows | use bfloat16 or float32
{BASE} {{lora}} | {BASE} | it is a LoRA | the LoRA as --init_lora
{BASE} {{onefolderdown}} | {BASE} | further down | give {{onefolderdown}}/model
{BASE} {{civitai}} | {BASE} | single files (dreamy.safetensors) | give one of them, such as
{BASE} {{nothing}} | {BASE} | it is empty | no model_index.json
{BASE} {{sdxl}}/unet | {BASE} | one part of a pipeline | give the whole pipeline's folder
{BASE} ./nowhere | {BASE} ./nowhere | there is no such folder | the form owner/name
{BASE} C:\\models\\sdxl | {BASE} C:\\models\\sdxl | there is no such folder | the form owner/name
{BASE} https://huggingface.co/stabilityai/sdxl-turbo/tree/main | {BASE} | is an address | alone: stabilityai/sdxl-turbo
{BASE}= | {BASE} | is missing | give the base model's folder
{BASE} no-one/nothing | {BASE} no-one/nothing | HF_HUB_OFFLINE is set | give a folder
{VAE} {{tinyvae}}/vae | {VAE} | found AutoencoderTiny | expected AutoencoderKL
{VAE} {{vae16}}/vae | unet takes 4 channels | makes 16 | give another {VAE}
{VAE} {{sd3}} | unet takes 4 channels | makes 16 | give another {VAE}
{VAE} {{single}} | {VAE} | has no autoencoder | give an AutoencoderKL as .safetensors
{UNET} {{sd3}}/transformer | {UNET} | found SD3Transformer2DModel | expected UNet2DConditionModel
{UNET} {{widths}}/unet | {UNET} | takes text of width 768 | belong together
{UNET} {{truncated}} | {UNET} | is cut short | download the model again
{UNET} {{single}} | {UNET} | is a single file | python -m lpl_finetuning.convert
{UNET} ./nowhere | {UNET} ./nowhere | there is no such folder | the form owner/name
--use_lora --init_lora {{notlora}} | --init_lora | holds model.diffusion_model.out.0.bias | {BASE}
--use_lora --init_lora {{lokr}} | --init_lora | 1 layer without all the matrices of a LoKr | download the file again
--use_lora --init_lora {{ofmmdit}} | --init_lora | 2 of its 2 tensors are of a transformer | made for
--use_lora --init_lora {{offlux}} | --init_lora | of a Flux transformer | made for
--use_lora --init_lora {{halflora}} | --init_lora | 1 layer without one of the two matrices | download the file again
--use_lora --init_lora {{rows}} | --init_lora | 1 of the 1 layers | a magnitude per input
--use_lora --init_lora {{twoloras}} | --init_lora | 2 .safetensors files there (a.safetensors, | give the file
--use_lora --init_lora {{cutlora}} | --init_lora | is cut short | download
--use_lora --init_lora {{old}} | --init_lora | .ckpt is not read | save the LoRA in that format
--use_lora --init_lora {{words}} | --init_lora | no .safetensors there, only a.txt | give the folder or file of a LoRA
--use_lora --init_lora ./nowhere | --init_lora ./nowhere | there is no such file | the form owner/name
--use_lora --init_lora {{lora}} --rank 8 | --init_lora brings | its own --rank | leave that out
{QUANTIZED} {{q_text}} | q_text.json | not valid JSON | repair it
{QUANTIZED} {{q_list}} | q_list.json | found list | expected {{{{"load_in_4bit": true
{QUANTIZED} {{q_none}} | q_none.json | neither of load_in_4bit | expected {{{{"load_in_4bit": true
{QUANTIZED} {{q_both}} | q_both.json | both of load_in_4bit | expected {{{{"load_in_4bit": true
{QUANTIZED} {{q_kind}} | q_kind.json | is 'int4' | must be nf4 or fp4
{QUANTIZED} {{q_typo}} | q_typo.json | unknown quant_type | expected {{{{"load_in_4bit": true
{QUANTIZED} nowhere.json | nowhere.json | there is no such file | write a JSON file
"""

MODELS_SD3 = f"""
{BASE} {{sdxl}} | {BASE} | is a StableDiffusionXLPipeline | use train_sdxl_lpl.py
{BASE} {{sd15}} | {BASE} | is a StableDiffusionPipeline | give one of those
{BASE} {{flux}} | {BASE} | is a FluxPipeline | this script trains StableDiffusion3
{BASE} {{sd3euler}} | {BASE} | EulerDiscreteScheduler | give another base model
{BASE} {{sd3widths}} | the base model's transformer | takes text of width 100 | belong together
{BASE} {{sd3pooled}} | the base model's transformer | pooled prompt of 100 numbers | belong together
{BASE} {{sd3channels}} | transformer takes 33 channels | made for inpainting | give a plain text-to-image model
{BASE} {{sd3not5}} | text_encoder_3/config.json | is missing | download the model again
{BASE} {{sd3noweights}} | transformer/ | has no weights | download the model again
{BASE} {{sd3}} --variant fp16 | --variant fp16 | it has others | leave --variant out
{BASE} {{lora}} | {BASE} | it is a LoRA | the LoRA as --init_lora
{VAE} {{sdxl}}/vae | transformer takes 16 channels | the autoencoder makes 4 | give another {VAE}
{TRANSFORMER} {{sdxl}}/unet | {TRANSFORMER} | found UNet2DConditionModel | expected SD3Transformer2DModel
--use_lora --lora_blocks 0,9 | --lora_blocks 0,9 | the transformer has | blocks 0 to 2
--use_lora --lora_blocks one | --lora_blocks one | expected numbers | 0,1,12
--lora_blocks 1 | --lora_blocks | does nothing | without --use_lora
--resolution 72 | --resolution | is 72 | must be a multiple of 16
--resolution 2048 | --resolution | is 2048 | knows positions up to 128 px
--timestep_shift much | --timestep_shift | is 'much' | it must be auto or a number above 0
--timestep_shift 0 | --timestep_shift | is '0' | it must be auto or a number above 0
--weighting_scheme logitnormal | --weighting_scheme | is 'logitnormal' | did you mean logit_normal?
--weighting_scheme mode --mode_scale 9 | --mode_scale | is 9 | between -1 and 1.752
--logit_std 0 | --logit_std | is 0.0 | must be above 0
--max_sequence_length 0 | --max_sequence_length | is 0 | must lie between 1 and 512
--precondition_outputs 2 | --precondition_outputs | is '2' | choose from 0, 1
--snr_gamma 5 | unknown flag | --snr_gamma | rectified flow has --weighting_scheme
--num_processes 2 | unknown flag | --num_processes | before the script's name
--use_lora --init_lora {{lokr}} | --init_lora | 1 layer without all the matrices of a LoKr | download the file again
--use_lora --init_lora {{ofunet}} | --init_lora | 2 of its 2 tensors are of a unet | made for
--config {{r_none}} | r_none.yaml | resolution has no value | remove the line
NODATA | no data | no data | give --train_data_dir FOLDER
--use_lora --lora_layers attn.to_q,attn.to_x | --lora_layers | the transformer has no layer called attn.to_x | such
"""

FLAGS = """
--resolution 100 | --resolution | is 100 | must be a multiple of 8
--resolution -8 | --resolution | is -8 | e.g. 16
--train_batch_size 0 | --train_batch_size | is 0 | must be above 0
--max_train_steps 0 | --max_train_steps | is 0 | must be above 0
--max_train_steps 1.5 | --max_train_steps | is '1.5' | must be a whole number
--learning_rate -1 | --learning_rate | is -1.0 | must be 0 or more
--learning_rate -1e-4 | --learning_rate | no value follows it | give one
--learning_rate 1,5 | --learning_rate | is '1,5' | must be a number
--learning_rate inf | --learning_rate | is inf | must be a finite number
--max_grad_norm nan | --max_grad_norm | is nan | must be a finite number
--adam_beta1 1 | --adam_beta1 | is 1.0 | below 1
--adam_epsilon 0 | --adam_epsilon | is 0.0 | must be above 0
--seed -1 | --seed | is -1 | must be 0 or more
--seed 18446744073709551616 | --seed | is 18446744073709551616 | less than 2**64
--proportion_empty_prompts 2 | --proportion_empty_prompts | is 2.0 | between 0 and 1
--use_ema --ema_decay 1 | --ema_decay | is 1.0 | must be below 1
--ema_decay 0.99 | --ema_decay | does nothing | without --use_ema
--offload_ema | --offload_ema | does nothing | without --use_ema
--checkpoints_total_limit 0 | --checkpoints_total_limit | is 0 | must be above 0
--checkpointing_steps 0 | --checkpointing_steps | is 0 | must be above 0
--dataloader_num_workers -1 | --dataloader_num_workers | is -1 | must be 0 or more
--use_lora --rank 0 | --rank | is 0 | must be above 0
--use_lora --lora_dropout 1 | --lora_dropout | is 1.0 | must be below 1
--use_dora | --use_dora | does nothing | without --use_lora
--rank 8 | --rank | does nothing | without --use_lora
--train_text_encoder | --train_text_encoder | does nothing | without --use_lora
--use_lora --text_encoder_lr 1e-5 | --text_encoder_lr | does nothing | without --train_text_encoder
--use_lora --use_dora --lora_type lokr | --use_dora and --lora_type lokr | exclude each other | give one
--use_lora --lora_type lokr --lora_dropout 0.1 | --lora_dropout is for lora and dora | with --lora_type lokr | leave
--use_lora --lora_pattern down_blokcs=rank:8 | --lora_pattern down_blokcs=rank:8 | none of the | did you mean down_b
--use_lora --lora_blocks layout | --lora_blocks layout | the unet has no block | layout stands for
--use_lora --lora_pattern attn2=lr:1 --optimizer prodigy | --optimizer prodigy | one step size for all | leave lr out
--use_lora --single_file | --single_file | is for whole models | --output_kohya_format
--use_lpl --lpl_t_threshold 100 --lpl_sigma_threshold 3 | --lpl_t_threshold and | --lpl_sigma_threshold | give one
--use_lpl --lpl_t_threshold 2000 | --lpl_t_threshold | is 2000 | up to 1000
--use_lpl --lpl_weight much | --lpl_weight | is 'much' | auto or a number
--use_lpl --lpl_weight -1 | --lpl_weight | is '-1' | auto or a number, 0 or more
--use_lpl --lpl_share 1.5 | --lpl_share | is 1.5 | between 0 and 1
--use_lpl --lpl_num_blocks 7 | --lpl_num_blocks | is 7 | give 4 or less
--use_lpl --lpl_start 100 --max_train_steps 50 | --lpl_start | is 100 | give a lower --lpl_start
--lpl_weight 3 | --lpl_weight | does nothing | without --use_lpl
--snr_gamma 0 | --snr_gamma | is 0.0 | must be above 0
--timestep_bias_strategy range --timestep_bias_begin 5 --timestep_bias_end 1 | --timestep_bias_begin | 5 and 1 | 1000
--timestep_bias_strategy later --timestep_bias_portion 0 | --timestep_bias_portion | is 0.0 | above 0 and at most 1
--timestep_bias_strategy later --timestep_bias_multiplier -2 | --timestep_bias_multiplier | is -2.0 | must be above 0
--optimizer sgd | --optimizer | is 'sgd' | choose from adamw, prodigy, adafactor
--optimizer prodigy --use_8bit_adam | --use_8bit_adam | --optimizer prodigy | exclude each other
--optimizer prodigy --learning_rate 0 | --optimizer prodigy | --learning_rate | above 0
--lr_scheduler cosinus | --lr_scheduler | is 'cosinus' | did you mean cosine?
--mixed_precision fp8 | --mixed_precision | is 'fp8' | choose from no, fp16, bf16
--aspect_ratio_buckets 512x512 | --aspect_ratio_buckets | '512x512' is no size | "h,w;h,w"
--center_crop --cache_variants 2 | --cache_variants | are random crops | --center_crop out
--keep_tags 2 | --keep_tags | does nothing | without --shuffle_tags
--validation_compare | --validation_compare | needs a | --validation_prompt
--validation_split 2 --validation_data_dir {pictures} | --validation_split and | --validation_data_dir | give one
--push_to_hub | no token for the Hub | no token | set HF_TOKEN
--push_to_hub --hub_model_id a/b/c | --hub_model_id a/b/c | Repo id must | give owner/name
--push_to_hub --hub_token a^b | --hub_token | has blanks | copy it again
--hub_model_id me/my-lora | --hub_model_id | does nothing | without --push_to_hub
--report_to wandb | --report_to wandb | wandb is not installed | pip install wandb
--report_to paper | --report_to | is 'paper' | choose from tensorboard
--enable_xformers_memory_efficient_attention | --enable_ | xformers is not installed | requirements-xformers.txt
--resume_from_checkpoint checkpoint-12 | --resume_from_checkpoint checkpoint-12 | no checkpoint there | or latest
--resume_from_checkpoint {checkpoint} | --resume_from_checkpoint | of another run (recipe was None | give its flags
--output_dir {another} --resume_from_checkpoint latest | checkpoint-4 | seed was 7, is 0 | start without
--use_lora --lora_layers to_q,to_x | --lora_layers | the unet has no layer called to_x | such as to_q,to_v
--output_dir {sd3run} --resume_from_checkpoint latest | checkpoint-4 | recipe was SD3, is SDXL | start without
--use_lora --lora_layers norm1 | --lora_layers | the unet has no layer called norm1 | such as to_q,to_v
--use_lora --lora_layers attn1 | --lora_layers | the unet has no layer called attn1 | such as to_q,to_v
--output_dir {q_none} | --output_dir | is a file | name a folder
--output_dir {pictures}/out | --output_dir | lies in --train_data_dir | name a folder outside
--output_dir {another} --logging_dir checkpoint-4/manifest.json | --logging_dir | is a file | name a folder
--max_train_steps 99999999999999999999999 | --max_train_steps | is 99999999999999999999999 | 1000000000 at most
--resolution 8000000 | --resolution | is 8000000 | 16384 at most
--dataloader_num_workers 100000 | --dataloader_num_workers | is 100000 | 256 at most
--cache_dir {q_none}/cache | --cache_dir | is a file | name a folder
--output_dir {out} --pretrained_model_name_or_path {out}/model | lies in --output_dir | {out}/model | name another
--lpl_wieght 1 | unknown flag | --lpl_wieght | did you mean --lpl_weight?
--learning-rate 1e-4 | unknown flag | --learning-rate | did you mean --learning_rate?
--class_prompt dog | unknown flag | --class_prompt | prior preservation is not in these scripts
--network_dim 16 | unknown flag | --network_dim | use --rank
--num_processes 2 | unknown flag | --num_processes | before the script's name
--use_lora=true | --use_lora | found 'true' | write --use_lora alone
--use_lora true | unknown argument | true | take no value
--instance_prompt a photo of a dog | unknown argument | photo | a value with blanks needs quotes
--use_lora ^ | unknown argument | ' ' | must be its last character
--validation_prompt | --validation_prompt | no value follows it | give one
--train_data_dir {pictures} --dataset_name someone/something | --train_data_dir and | --dataset_name | give one
"""

RECIPES_AND_DATA = """
--config {r_typo} | r_typo.yaml | unknown key learning_rat | did you mean learning_rate?
--config {r_kohya} | r_kohya.yaml | unknown key network_dim | use --rank
--config {r_yaml} | r_yaml.yaml | not valid YAML | write lines such as
--config {r_tab} | r_tab.yaml | not valid YAML | write lines such as
--config {r_list} | r_list.yaml | found a list | expected lines such as
--config {r_text} | r_text.yaml | found a str | expected lines such as
--config {r_binary} | r_binary.yaml | can't be read as text | name a YAML file
--config {r_bool} | r_bool.yaml | use_lora is 'maybe' | must be true or false
--config {r_none} | r_none.yaml | resolution has no value | remove the line
--config {r_several} | r_several.yaml | resolution is [512, 768] | it takes one value
--config {r_nested} | r_nested.yaml | resolution is {{'height': 512}} | it takes one value
--config {r_number} | r_number.yaml | learning_rate is 'fast' | must be a number
--config {r_choice} | r_choice.yaml | lr_scheduler is 'cosinee' | did you mean cosine?
--config {root} | --config | is a folder | name a YAML file
--config nowhere.yaml | --config nowhere.yaml | there is no such file | configs/recipes
NODATA | no data | no data | give --train_data_dir FOLDER
--train_data_dir nowhere | --train_data_dir nowhere | there is no such folder | --dataset_name
--train_data_dir {zip} | --train_data_dir | is not a folder | Unpack it, and name the folder
--train_data_dir {nothing} | --train_data_dir | no images | .png
--train_data_dir {words} | --train_data_dir | no images | .png
--train_data_dir {heic} | --train_data_dir | no images | .png
--train_data_dir {uncaptioned} | 1 of 1 images | a.png | --instance_prompt
--train_data_dir {captionless} | metadata.jsonl | no column 'text' | --caption_column
--train_data_dir {badlisting} | metadata.jsonl | not JSON | must be one object
--train_data_dir {missing} | metadata.jsonl | b.png | orrect
--train_data_dir {damaged} | a.png | image file is truncated | Replace or remove
--train_data_dir {blank} | a.txt | is empty | Write a caption
--train_data_dir {latin} | a.txt | not UTF-8 | Save the file as UTF-8
--validation_split 96 --max_validation_samples 96 | --validation_split | 96 of 96 images | leaves 0
--validation_data_dir nowhere | --validation_data_dir nowhere | no such folder | spelling
--dataset_name ./nowhere | --dataset_name ./nowhere | there is no such folder | --train_data_dir
--dataset_name a/b/c | --dataset_name a/b/c | there is no such folder | the form owner/name
--dataset_name no-one/nothing | --dataset_name no-one/nothing | can't be loaded | Check its name and the network
--dataset_config_name x | --dataset_config_name | does nothing | without --dataset_name
"""


def table(text, script):
    """[(script, command line, [three parts of the message])]"""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [[word.strip() for word in line.split(" | ")] for line in lines]
    assert all(len(row) == 4 for row in rows), [row for row in rows if len(row) != 4]
    return [(script, mistake, parts) for mistake, *parts in rows]


CASES = [*table(MODELS, "sdxl"), *table(MODELS_SD3, "sd3"), *table(FLAGS, "sdxl"), *table(RECIPES_AND_DATA, "sdxl")]


def assert_told(message, parts, places):
    """Assert that a message holds its three parts, with the cases' names replaced by paths."""
    for part in parts:
        assert part.format(**places) in message, (part, message)


@pytest.mark.parametrize(("script", "mistake", "parts"), CASES, ids=[f"{case[0]} {case[1][:70]}" for case in CASES])
def test_a_mistake_is_answered_without_torch(script, mistake, parts, places):
    assert_told(refusal(script, mistake, places), parts, places)


@pytest.mark.parametrize(("script", "mistake", "parts"), CASES[::40], ids=[case[1][:70] for case in CASES[::40]])
def test_a_mistake_is_answered_in_seconds(script, mistake, parts, places):
    assert_told(refusal(script, mistake, places, timed=True), parts, places)


ON_CPUS = """
--mixed_precision fp16 | --mixed_precision fp16 | PyTorch is installed here for CPUs only | use bf16 or no
--use_lora --bnb_quantization_config_path {quantized} | --bnb_quantization_config_path | needs a GPU | leave it out
"""


@pytest.mark.skipif(not is_for_cpus_only(), reason="PyTorch is installed for GPUs too")
@pytest.mark.parametrize(("script", "mistake", "parts"), table(ON_CPUS, "sdxl"))
def test_what_pytorch_for_cpus_cannot_do_is_told_without_it(script, mistake, parts, places):
    assert_told(refusal(script, mistake, places), parts, places)


HUB_CASES = {
    "gated/model": ("is gated", "accept its licence", "hf auth login"),
    "no-one/nothing": ("no model on the Hub", "no folder here", "check the name"),
    "our/half": ("vae/ has no weights", "without a variant", "it has those of --variant fp16"),
    "our/half --revision old": ("no such --revision", "its revisions are at", "tree/main"),
}


@pytest.mark.parametrize("name", HUB_CASES)
def test_what_the_hub_refuses(name, places, hub):
    """Models that may not be read, are not there, or have other weights than those asked for."""
    variables = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": None}
    assert_told(refusal("sdxl", f"{BASE} {name}", places, **variables), (BASE, *HUB_CASES[name]), places)


@pytest.mark.parametrize("flag", [BASE, VAE, "--dataset_name", "--use_lora --init_lora"])
def test_without_a_network_nobody_waits(flag, places):
    """The Hub's client would try for half a minute; an address that refuses stands for a missing network."""
    mistake = f"{flag} no-one/nothing"
    message = refusal("sdxl", mistake, places, timed=True, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE=None)
    advice = "Check its name and the network" if "dataset" in flag else "or connect"
    assert_told(message, (mistake.removeprefix("--use_lora "), "reach", advice), places)


def test_what_may_not_be_read(capsys):
    """As root nothing is forbidden, so the error is raised here."""
    from lpl_finetuning.errors import errors_for_people

    with pytest.raises(SystemExit) as stopped, errors_for_people(False):
        raise PermissionError(13, "Permission denied", "/root/model")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: /root/model: Permission denied; give one that you may use\n"


def test_ctrl_c_before_the_run_is_no_traceback(capsys):
    from lpl_finetuning.errors import errors_for_people

    with pytest.raises(SystemExit) as stopped, errors_for_people(False):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


def test_the_detectors_detect(places):
    """A command that imports torch is found out, started or forked; one that does not is not."""
    for line, expected in {"import torch": True, "import numpy, yaml, PIL.Image, huggingface_hub": False}.items():
        result, _, torch = start(["-c", line], places)
        assert result.returncode == 0 and torch == expected, line
        assert fork(["-c", line], places).returncode == (99 if expected else 0), line


def test_there_are_enough_cases():
    assert len(CASES) + len(HUB_CASES) >= 60 and {case[0] for case in CASES} == set(SCRIPTS)
