"""Publishing, end to end: the real client, in processes of its own, against a Hub on the loopback interface."""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import ModelCard, metadata_load
from PIL import Image
from safetensors.numpy import save_file

from lpl_finetuning.errors import UserError
from lpl_finetuning.families import SD3, SDXL
from lpl_finetuning.results import hub as hub_module
from lpl_finetuning.results.hub import Card, publishable_files, write_card
from tests.children import start
from tests.hub_server import Fault, HubServer, Repository

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_SentinelOfAliceNeverShown"
TOKENS = {SECRET: "alice", "hf_bob": "bob"}
UPLOAD = ["create", "yaml", "preupload", "batch", "put", "verify", "commit"]  # the kinds of requests of a publication

# One process that imports the client once and calls what it is told to, a JSON line each way.
CHILD = """
import contextlib, io, json, os, sys
from lpl_finetuning import publish
from lpl_finetuning.results import hub
functions = vars(hub) | {"main": publish.main}
for line in sys.stdin:
    function, arguments, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    said, status, value = io.StringIO(), 0, None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            value = functions[function](*arguments)
        except SystemExit as stop:
            status = stop.code
        except (hub.UserError, hub.PublishError) as error:
            status, value = type(error).__name__, str(error)
    print(json.dumps([status, value, said.getvalue()]), flush=True)
"""


def environment(hub, home, **more):
    """Variables of a child process that knows no Hub but this one, and no token but those given."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {name: value for name, value in own.items() if not name.lower().endswith("_proxy")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    own |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PATH": path}
    return own | {"PYTHONPATH": str(ROOT)} | more


class Child:
    """The process above; `call` returns (exit status or kind of error, value, all that was printed)."""

    def __init__(self, hub, home):
        home.mkdir()
        self.log = home / "stderr.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment(hub, home), cwd=ROOT,
            )  # fmt: skip

    def call(self, function, *arguments, token=SECRET):
        self.process.stdin.write(
            json.dumps([function, [str(a) if isinstance(a, Path) else a for a in arguments], token]) + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        assert SECRET not in answer, "the token was printed"
        return json.loads(answer)

    def publish(self, folder, name, *more):
        """(exit status, printed) of the command line; failing requests are tried again for half a second."""
        words = [str(folder), "--hub_model_id", name, "--patience", "0.5", *more]
        status, _, said = self.call("main", words)
        return status, said


@pytest.fixture(scope="module")
def server():
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture
def hub(server):
    return server.empty()


@pytest.fixture(scope="module")
def child(server, tmp_path_factory):
    child = Child(server, tmp_path_factory.mktemp("child") / "home")
    yield child
    child.process.stdin.close()
    assert child.process.wait(30) == 0
    assert SECRET not in child.log.read_text(), "the token was logged"


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def weights(path, seed=0):
    """A small real safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.random.default_rng(seed).standard_normal((30, 40), dtype=np.float32)}, path)


def text(path, content="{}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def add_decoys(folder):
    """What a run leaves behind and nobody else should see, under names as near to the allowed ones as they get."""
    secret = f"hub_token: {SECRET}x\n"
    for name in ["config.yaml", "training_state.json", "logs/metrics.jsonl", ".hidden", "notes.txt", ".README.md",
                 "unet/notes.txt", "unet/.config.json", "unet/optimizer.json", "unet/deeper/config.json",
                 "README.md.bak", "image_0.png.bak", "image_final.png", "unet/config.json.bak", "cache/config.json",
                 "checkpoint-3/model_index.json"]:  # fmt: skip
        text(folder / name, secret)
    for name in ["checkpoint-3/unet/diffusion_pytorch_model.safetensors", "training_state.safetensors",
                 "checkpoint-3/pytorch_lora_weights.safetensors", "unet/training_state.safetensors"]:  # fmt: skip
        weights(folder / name)
    for name in ["validation/step-3.png", "validation/image_0.png", "run.png"]:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "image_9.png").symlink_to("/etc/hostname")
    (folder / "pytorch_lora_weights_kohya.safetensors").unlink(missing_ok=True)
    (folder / "pytorch_lora_weights_kohya.safetensors").symlink_to(folder / "config.yaml")
    (folder / "unet" / "tokenizer.json").symlink_to("/etc/hostname")
    (folder / "linked").symlink_to(folder / "checkpoint-3" / "unet")


def lora_folder(folder):
    """A LoRA run's output: (folder, the allowed names)."""
    weights(folder / "pytorch_lora_weights.safetensors")
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"image_{number}.png")
    text(folder / "README.md", "---\nlicense: mit\n---\n# A LoRA\n")
    return folder, ["README.md", "image_0.png", "image_1.png", "pytorch_lora_weights.safetensors"]


def pipeline_folder(folder):
    """A full run's output, with shards, variants and two kinds of tokenizers: (folder, the allowed names)."""
    parts = {"unet": "UNet", "vae": "VAE", "text_encoder": "CLIP", "text_encoder_3": "T5", "tokenizer": "Tokenizer",
             "tokenizer_3": "T5Tokenizer", "scheduler": "Scheduler", "linked": "Link"}  # fmt: skip
    index = {name: ["diffusers", kind] for name, kind in parts.items() if name != "linked"}
    index |= {"_class_name": "StableDiffusionXLPipeline", "image_encoder": [None, None], "force_zeros": True}
    text(folder / "model_index.json", json.dumps(index, indent=2))
    names = ["README.md", "model_index.json", "model.safetensors", "image_10.png"]
    names += [f"unet/diffusion_pytorch_model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]
    names += ["unet/diffusion_pytorch_model.safetensors.index.json", "unet/config.json", "vae/config.json",
              "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/config.json", "text_encoder_3/config.json",
              "text_encoder/model.safetensors", "text_encoder_3/model.safetensors", "scheduler/scheduler_config.json",
              "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
              "tokenizer/special_tokens_map.json", "tokenizer_3/spiece.model",
              "tokenizer_3/tokenizer.json"]  # fmt: skip
    for seed, name in enumerate(names):
        if name.endswith(".safetensors"):
            weights(folder / name, 0 if "text_encoder" in name else seed)  # two files with the same content
        elif name.endswith(".png"):
            Image.new("RGB", (8, 8), "blue").save(folder / name)
        elif name != "model_index.json":
            text(folder / name, "---\nlicense: mit\n---\n" if name == "README.md" else json.dumps({"seed": seed}))
    return folder, sorted(names)


def content(folder):
    """{path: bytes} of all that a folder holds; of links, where they lead."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
    }


@pytest.fixture
def lora(tmp_path):
    """A LoRA run's output, decoys included."""
    folder, names = lora_folder(tmp_path / "out")
    add_decoys(folder)
    return folder, names


@pytest.fixture
def pipeline(tmp_path):
    """A full run's output, decoys included."""
    folder, names = pipeline_folder(tmp_path / "out")
    add_decoys(folder)
    return folder, names


def printed_command(said):
    """The command that a failed upload asks for, as one line."""
    [line] = [line.strip() for line in said.splitlines() if line.startswith("    python ")]
    return line


# ---------------------------------------------------------------------------------------------------------------------
# What is published


@pytest.mark.parametrize("kind", ["lora", "pipeline"])
def test_one_commit_with_exactly_the_allow_list(kind, request, hub, child):
    folder, names = request.getfixturevalue(kind)
    before = content(folder)
    status, said = child.publish(folder, "alice/run")
    assert status == 0 and f"Published: {hub.url}/alice/run" in said
    repository = hub.repositories["alice/run"]
    assert repository.commits == [names] and hub.requests.count("commit") == 1
    assert repository.files == {name: before[name] for name in names}, "what arrives is what was there"
    assert repository.lfs == {name for name in names if name.endswith(".safetensors")}
    assert content(folder) == before
    assert not repository.private and set(UPLOAD) <= set(hub.requests)


def test_publishing_again_commits_what_changed(lora, hub, child):
    folder, names = lora
    child.publish(folder, "alice/run")
    assert child.publish(folder, "alice/run")[0] == 0
    assert hub.repositories["alice/run"].commits == [names], "nothing changed, so there is nothing to commit"
    text(folder / "README.md", "---\nlicense: mit\n---\n# Better\n")
    assert child.publish(folder, "alice/run")[0] == 0
    assert hub.repositories["alice/run"].commits == [names, ["README.md"]]


def test_the_kohya_file_and_links_to_the_folder_are_published(tmp_path):
    """The folder itself may be a link, as scratch disks often are; what is in it may not."""
    folder, names = lora_folder(tmp_path / "out")
    weights(folder / "pytorch_lora_weights_kohya.safetensors")
    (tmp_path / "link").symlink_to(folder)
    found = [path.name for path in publishable_files(tmp_path / "link")]
    assert found == sorted([*names, "pytorch_lora_weights_kohya.safetensors"])


def test_what_is_no_result_is_refused(tmp_path):
    """Each way in which a folder has nothing to publish, or half of a pipeline."""
    empty, card_only, half = tmp_path / "empty", tmp_path / "card", tmp_path / "half"
    empty.mkdir()
    text(card_only / "README.md")
    text(card_only / "checkpoint-3" / "model_index.json")
    whole, _ = pipeline_folder(tmp_path / "whole")
    for folder, said in [
        (empty, "nothing to publish"),
        (card_only, "nothing to publish"),
        (tmp_path / "no", "no such"),
    ]:
        with pytest.raises(UserError, match=said):
            publishable_files(folder)
    vae = half / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    damages = [
        lambda: vae.unlink(),
        lambda: shutil.rmtree(half / "tokenizer"),
        lambda: (vae.unlink(), vae.symlink_to("/etc/hostname")),
        lambda: (shutil.move(vae.parent, tmp_path / "moved"), vae.parent.symlink_to(tmp_path / "moved")),
    ]
    for damage in damages:
        shutil.copytree(whole, half)
        publishable_files(half)
        damage()
        with pytest.raises(UserError, match=r"named in model_index\.json, is not all there"):
            publishable_files(half)
        shutil.rmtree(half)
    text(whole / "model_index.json", "[]")
    with pytest.raises(UserError, match=r"model_index\.json"):
        publishable_files(whole)


def test_an_index_names_no_other_folders(tmp_path):
    """A model_index.json that reaches elsewhere gets nothing from there."""
    weights(tmp_path / "elsewhere" / "model.safetensors")
    folder, names = lora_folder(tmp_path / "out")
    index = {"../elsewhere": ["a", "b"], str(tmp_path / "elsewhere"): ["a", "b"], "..": ["a", "b"]}
    text(folder / "model_index.json", json.dumps(index))
    assert [path.name for path in publishable_files(folder)] == sorted([*names, "model_index.json"])


def test_local_paths_in_configurations_are_emptied(hub, child, tmp_path):
    """diffusers writes where each part was loaded from, home folder and all; names on the Hub stay."""
    folder, _ = pipeline_folder(tmp_path / "out")
    given = {"unet/config.json": "/home/alice/models/x/unet", "vae/config.json": "owner/vae", "model_index.json": "",
             "text_encoder/config.json": str(tmp_path),
             "tokenizer/tokenizer_config.json": 'C:\\alice\\"x"'}  # fmt: skip
    for name, origin in given.items():
        key = "name_or_path" if "tokenizer" in name else "_name_or_path"
        old = json.loads((folder / name).read_text())
        text(folder / name, json.dumps({"a": "ü", key: origin, **old}, indent=2))
    before = content(folder)
    assert child.publish(folder, "alice/run")[0] == 0
    files = hub.repositories["alice/run"].files
    assert b"alice" not in b"".join(files.values()) and str(tmp_path).encode() not in b"".join(files.values())
    assert files == content(folder), "the folder is what was published"
    for name in given:
        left = {key: value for key, value in json.loads(files[name]).items() if "name_or_path" not in key}
        assert left == {key: value for key, value in json.loads(before[name]).items() if "name_or_path" not in key}
    assert json.loads(files["vae/config.json"])["_name_or_path"] == "owner/vae"
    assert files["vae/config.json"] == before["vae/config.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize("what", [401, 403, 429, 503, "drop"])
def test_a_fault_at_any_request_loses_nothing(what, lora, hub, child):
    """Exit status 3, the folder as it was, nothing half-published; the printed command completes it."""
    folder, names = lora
    weights(folder / "model.safetensors", 1)  # a second large file, so that one can arrive and the other not
    names = sorted([*names, "model.safetensors"])
    before = content(folder)
    for kind in UPLOAD:
        hub.objects.clear()
        hub.fault = Fault(kind, what, first=int(kind in ("put", "verify")))
        start = time.monotonic()
        status, said = child.publish(folder, f"alice/at-{kind}")
        assert time.monotonic() - start < 10, "half a second of patience: the client is not left to its own"
        assert status == 3 and hub.fault.seen > hub.fault.first, kind
        assert content(folder) == before
        repository = hub.repositories.get(f"alice/at-{kind}", Repository(False))
        assert not repository.commits and not repository.files, "all or nothing"
        if what == "drop":
            assert "closed the connection" in said or "no good answer from 127.0.0.1" in said
        else:
            assert f"the Hub answered {what}, " in said
        assert f"The result is safe in {folder}" in said and "Traceback" not in said
        hub.fault = None
        program, option, module, *words = shlex.split(printed_command(said))
        assert (program, option, module) == ("python", "-m", "lpl_finetuning.publish")
        assert child.call("main", words)[0] == 0
        assert hub.repositories[f"alice/at-{kind}"].commits == [names]
        assert hub.repositories[f"alice/at-{kind}"].files == {name: before[name] for name in names}


def test_a_commit_whose_answer_is_lost_is_not_made_twice(lora, hub, child):
    folder, names = lora
    hub.fault = Fault("commit", "drop after")
    status, said = child.publish(folder, "alice/run")
    assert status == 3 and hub.repositories["alice/run"].commits == [names], "all, not nothing"
    hub.fault = None
    assert child.call("main", shlex.split(printed_command(said))[3:])[0] == 0
    assert hub.repositories["alice/run"].commits == [names]


def test_a_short_failure_passes_unnoticed_and_a_long_one_ends_in_time(lora, hub, child):
    """The client repeats what failed once; it does not wait for minutes because a server asks for it."""
    folder, names = lora
    for kind, what in [("preupload", 503), ("put", 429), ("batch", "drop")]:
        hub.objects.clear()
        hub.fault = Fault(kind, what, times=1)
        assert child.call("main", [str(folder), "--hub_model_id", f"alice/{kind}"])[0] == 0
        assert hub.repositories[f"alice/{kind}"].commits == [names]
    limit = {"ratelimit": '"api";r=0;t=300', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}
    for headers in ({"Retry-After": "300"}, limit):
        hub.fault = Fault("preupload", 429, headers=headers)
        start = time.monotonic()
        status, _, said = child.call("main", [str(folder), "--hub_model_id", "alice/waits"])
        assert status == 3 and time.monotonic() - start < 5 and "the Hub answered 429, too many requests" in said


def test_only_failures_use_up_patience():
    """Requests of one address follow each other as often as they succeed, as the verification of many files does."""
    request = httpx2.Request("POST", "http://127.0.0.1/verify")
    patience = hub_module.Patience(0)
    for _ in range(5):
        patience.before(request)
        patience.after(httpx2.Response(200, request=request))
    with pytest.raises(TimeoutError, match="no good answer from 127"):
        for _ in range(5):
            patience.before(request)
            time.sleep(0.001)


def test_a_silent_server_is_given_up(lora, hub, child):
    folder, _ = lora
    hub.fault = Fault("create", "stall")
    start = time.monotonic()
    status, said = child.publish(folder, "alice/run")
    assert status == 3 and 10 < time.monotonic() - start < 25 and "ReadTimeout" in said


def test_the_printed_command_runs_in_a_shell(hub, tmp_path):
    """As a process, from another folder, with a name that needs quoting; 'python' is that of the environment."""
    folder, names = lora_folder(tmp_path / "it's a $HOME; run")
    hub.fault = Fault("commit", 503)
    options = dict(
        cwd=tmp_path, env=environment(hub, tmp_path / "home", HF_TOKEN=SECRET), capture_output=True, text=True
    )
    words = [
        sys.executable,
        "-m",
        "lpl_finetuning.publish",
        folder.name,
        "--hub_model_id",
        "run",
        "--hub_private_repo",
    ]
    first = subprocess.run([*words, "--patience", "0.5"], **options)
    assert first.returncode == 3 and first.stdout == ""
    hub.fault = None
    command = printed_command(first.stderr)
    assert shlex.split(command)[3:] == [folder.name, "--hub_model_id", "run", "--hub_private_repo"]
    second = subprocess.run(command, shell=True, **options)
    assert second.returncode == 0, second.stderr
    assert second.stdout == f"Published: {hub.url}/alice/run\n"
    assert hub.repositories["alice/run"].commits == [names] and hub.repositories["alice/run"].private
    assert SECRET not in first.stderr + second.stdout + second.stderr


def test_ctrl_c_is_a_failure_like_others(hub, tmp_path):
    folder, _ = lora_folder(tmp_path / "out")
    hub.fault = Fault("commit", "stall")
    program = "import signal, sys\nfrom lpl_finetuning import publish\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it\n"
    program += "publish.main(sys.argv[1:])"
    process = start(
        [sys.executable, "-c", program, str(folder), "--hub_model_id", "alice/run"], cwd=tmp_path,
        env=environment(hub, tmp_path / "home", HF_TOKEN=SECRET), stderr=subprocess.PIPE, text=True,
        fresh=True,  # HF_ENDPOINT is read when the client is imported
    )  # fmt: skip
    deadline = time.time() + 30
    while "commit" not in hub.requests and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 3 and "interrupted" in said and "Traceback" not in said
    assert "python " in printed_command(said)


def test_xet_storage_that_fails(hub, tmp_path, monkeypatch):
    """The upload that most installations make goes past the HTTP client: its failures are told alike, and in time."""
    folder, _ = lora_folder(tmp_path / "out")
    hub.fault = Fault("cas", 503)
    more = {"HF_HUB_DISABLE_XET": "0", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_TOKEN": SECRET}
    result = subprocess.run(
        [sys.executable, "-m", "lpl_finetuning.publish", str(folder), "--hub_model_id", "alice/run"],
        env=environment(hub, tmp_path / "home", **more), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 3 and "503" in result.stderr
    assert 0 < hub.requests.count("cas") <= 6, "two steps, each tried three times"
    assert not hub.repositories["alice/run"].commits and SECRET not in result.stderr
    name = "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"
    with hub_module.brisk_xet(20):
        assert os.environ[name] == "2"
    assert name not in os.environ
    monkeypatch.setenv(name, "7")
    with hub_module.brisk_xet(20):
        assert os.environ[name] == "7", "what the user has set stays"
    assert os.environ[name] == "7"


def test_mistakes_end_in_status_2_before_anything_is_sent(hub, child, tmp_path):
    folder, _ = lora_folder(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for words, token, said in [
        ([folder, "--hub_model_id", "my run"], SECRET, "--hub_model_id my run"),
        ([folder, "--hub_model_id", "a/b/c"], SECRET, "--hub_model_id a/b/c"),
        ([folder], None, "HF_TOKEN"),
        ([tmp_path / "empty"], SECRET, "nothing to publish"),
        ([tmp_path / "missing"], SECRET, "no such folder"),
        ([folder, "--hub_model_idd", "x"], SECRET, "did you mean --hub_model_id?"),
        ([], SECRET, "folder"),
    ]:
        status, _, printed = child.call("main", list(map(str, words)), token=token)
        assert status == 2 and printed.startswith("error: ") and said in printed
    assert not hub.requests
    assert child.call("main", [str(folder)])[0] == 0 and list(hub.repositories) == ["alice/out"], "the folder's name"


# ---------------------------------------------------------------------------------------------------------------------
# Before training


def test_access_is_checked_and_the_name_completed(hub, child):
    status, value, said = child.call("check_access", "run", SECRET, True)
    assert (status, value, said) == (0, "alice/run", "")
    assert hub.repositories["alice/run"].private
    assert child.call("check_access", "run")[1] == "alice/run", "one that exists will do"


def test_refusals_come_before_training(hub, child):
    """A mistake of the user's ends in a UserError that names the flag."""
    hub.repositories["alice/run"] = Repository(False)
    refusals = [
        ("alice/run", "hf_wrong", "401"),
        ("alice/run", "hf_bob", "403"),  # it exists and can be read: only the permission to write is missing
        ("alice/new", "hf_bob", "403"),
        ("someone/run", SECRET, "403"),
    ]
    for name, token, said in refusals:
        status, value, _ = child.call("check_access", name, token)
        assert status == "UserError" and said in value, (name, token)
        assert all(word in value for word in ("HF_TOKEN", "--hub_token", "--hub_model_id"))
    assert [len(repository.commits) for repository in hub.repositories.values()] == [0]
    for name in ("a/b/c", "my run", "-x", "alice/"):
        status, value, _ = child.call("check_access", name)
        assert status == "UserError" and f"--hub_model_id {name}" in value
    status, value, _ = child.call("check_access", "run", token=None)
    assert status == "UserError" and "HF_TOKEN" in value and "hf auth login" in value
    for token in (f"{SECRET} x", f"{SECRET}\nx", f"{SECRET}é"):
        status, value, _ = child.call("check_access", "run", token)
        assert status == "UserError" and "--hub_token" in value
    for refusal in (400, 401, 403, 404):
        for kind, name in [("create", "alice/new"), ("access", "alice/run")]:
            hub.fault = Fault(kind, refusal)
            assert child.call("check_access", name)[0] == "UserError"
    hub.fault = Fault("create", 403)
    assert child.call("check_access", "alice/run")[:2] == [0, "alice/run"], "may write there, though not create others"


def test_a_dry_run_asks_and_creates_nothing(hub, child):
    """A wrong token and another's repository are refused, a name that is free is completed, and nothing is made."""
    options = (False, 0.5, False)  # private, patience, create
    assert child.call("check_access", "run", SECRET, *options)[:2] == [0, "alice/run"]
    assert child.call("check_access", "alice/new", SECRET, *options)[:2] == [0, "alice/new"]
    for name, token, said in (("run", "hf_wrong", "401"), ("alice/run", "hf_bob", "can't create it"),
                              ("someone/run", SECRET, "can't create it")):  # fmt: skip
        status, value, _ = child.call("check_access", name, token, *options)
        assert status == "UserError" and said in value and "--hub_model_id" in value, (name, token, value)
    assert not hub.repositories and "create" not in hub.requests
    hub.repositories["alice/run"] = Repository(False)
    assert child.call("check_access", "alice/run", SECRET, *options)[:2] == [0, "alice/run"]
    status, value, _ = child.call("check_access", "alice/run", "hf_bob", *options)
    assert status == "UserError" and "403" in value


def test_a_hub_that_is_down_does_not_stop_training(hub, child):
    """A warning, and the name as it was given or, where that much was learnt, completed."""
    for kind, name in [("create", "run"), ("access", "alice/run")]:
        for what in (429, 500, 503, "drop"):
            hub.fault = Fault(kind, what)
            status, value, said = child.call("check_access", "run", SECRET, False, 0.5)
            assert (status, value) == (0, name) and said.startswith("warning: "), (kind, what)


def test_offline_mode_and_no_network(hub, tmp_path):
    """HF_HUB_OFFLINE contradicts publishing; a closed port is a Hub that is down. Neither torch nor the client load
    with the module."""
    program = "\n".join([
        "import sys; from lpl_finetuning import errors; from lpl_finetuning.results import hub",
        "assert not {'torch', 'huggingface_hub', 'httpx2'} & sys.modules.keys()",
        "try: print(hub.check_access('alice/run'))",
        "except errors.UserError as error: print('UserError', error)",
    ])  # fmt: skip
    run = {}
    for name, more in {"offline": {"HF_HUB_OFFLINE": "1"}, "closed": {"HF_ENDPOINT": "http://127.0.0.1:9"}}.items():
        own = environment(hub, tmp_path / "home", HF_TOKEN=SECRET, **{"HF_ENDPOINT": hub.url, **more})
        run[name] = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True)
    assert run["offline"].stdout.startswith("UserError --push_to_hub needs the network"), run["offline"]
    assert run["closed"].stdout.startswith("warning: ") and "Connection refused" in run["closed"].stdout
    assert run["closed"].stdout.endswith("\nalice/run\n") and not hub.requests


# ---------------------------------------------------------------------------------------------------------------------
# The token


def test_the_token_is_shown_nowhere(hub, child, tmp_path):
    """Not when it is given as a flag, not when the server repeats it, not in the folder. Every other call of the child
    looks for it in all that is printed, too."""
    folder, _ = lora_folder(tmp_path / "out")
    write_card(folder, CARD)
    repeats = {"X-Error-Message": f"who is Bearer {SECRET}?"}
    faults = [None, Fault("commit", 503, headers=repeats), Fault("put", 401, headers=repeats), Fault("create", "drop")]
    for number, fault in enumerate(faults):
        hub.objects.clear()
        hub.fault = fault
        words = [folder, "--hub_model_id", f"alice/run{number}", "--patience", "0.5", "--hub_token", SECRET]
        status, _, said = child.call("main", list(map(str, words)), token=None)
        assert status == (3 if fault else 0)
        assert "who is Bearer ***?" in said or not (fault and fault.headers), "the server's message came through"
    written = b"".join(value for value in content(folder).values() if isinstance(value, bytes))
    uploaded = b"".join(value for each in hub.repositories.values() for value in each.files.values())
    assert SECRET.encode() not in written + uploaded


# ---------------------------------------------------------------------------------------------------------------------
# The model card


CARD = Card(
    name="alice/apples",
    family=SDXL,
    base_model="someone/base-xl",
    lora="LoRA",
    lpl={"weight": "auto", "share": 0.2, "norm": "standard", "pow law": True, "threshold": None},
    training={"steps": 2000, "learning rate": 1e-4, "scheduler": "a|b", "precision": "bf16"},
    dataset="someone/pictures",
    num_images=96,
    prompts=("a red apple", "the sun"),
    images_per_prompt=2,
)


def card_folder(folder, images=4):
    folder.mkdir(exist_ok=True)
    for number in range(images):
        Image.new("RGB", (8, 8)).save(folder / f"image_{number}.png")
    return folder


def test_the_card_of_a_lora(tmp_path):
    """Metadata that the Hub's own client reads back, and the text around it."""
    folder = card_folder(tmp_path / "out")
    write_card(folder, CARD)
    assert metadata_load(folder / "README.md") == {
        "base_model": "someone/base-xl",
        "datasets": ["someone/pictures"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion-xl", "text-to-image", "diffusers", "diffusers-training", "lora", "lpl"],
        "widget": [
            {"text": prompt, "output": {"url": f"image_{number}.png"}}
            for number, prompt in enumerate(["a red apple", "a red apple", "the sun", "the sun"])
        ],
    }
    said = ModelCard.load(folder / "README.md").text
    for part in ["# apples\n", "<Gallery />", "[someone/pictures](https://huggingface.co/datasets/someone/pictures)",
                 "| weight | auto |", "| share | 0.2 |", "| pow law | yes |", "| learning rate | 0.0001 |",
                 "| scheduler | a\\|b |", 'pipe.load_lora_weights("alice/apples")',
                 'from_pretrained("someone/base-xl"']:  # fmt: skip
        assert part in said, part
    assert "threshold" not in said and "None" not in said
    assert said.index("# apples") < said.index("<Gallery />") < said.index("A LoRA for") < said.index("```python")


def test_cards_of_other_runs(tmp_path):
    """SD3, whole pipelines, no LPL, no images: each leaves out what it does not have."""
    full = replace(CARD, family=SD3, lora=None, lpl={}, base_model="someone/base-3")
    write_card(card_folder(tmp_path / "full", images=0), full)
    card = ModelCard.load(tmp_path / "full" / "README.md")
    assert card.data.tags == ["sd3", "text-to-image", "diffusers", "diffusers-training"]
    assert "widget" not in card.data.to_dict() and "Gallery" not in card.text
    assert 'StableDiffusion3Pipeline.from_pretrained("alice/apples"' in card.text and "lora" not in card.text.lower()
    assert "without the latent perceptual loss" in card.text and "## Latent perceptual loss" not in card.text
    write_card(card_folder(tmp_path / "some", images=3), CARD)
    widget = metadata_load(tmp_path / "some" / "README.md")["widget"]
    assert [image["output"]["url"] for image in widget] == ["image_0.png", "image_1.png", "image_2.png"]


def test_trigger_words_are_in_the_card_its_metadata_and_its_example(tmp_path):
    """As Hub pages expect them, and in the prompt of the snippet, whether the drawn prompts have them or not."""
    for prompts, example in [
        ((), "'sks dog'"), (("the sun",), "'sks dog, the sun'"), (("A Sks Dog runs",), "'A Sks Dog runs'")
    ]:  # fmt: skip
        folder = card_folder(tmp_path / str(len(example)), images=len(prompts))
        write_card(folder, replace(CARD, lora="DoRA", trigger="sks dog", prompts=prompts, images_per_prompt=1))
        card = ModelCard.load(folder / "README.md")
        assert card.data.instance_prompt == "sks dog" and "Put `sks dog` into the prompt" in card.text
        assert f"pipe({example}).images[0]" in card.text and "A DoRA for" in card.text
        [shown] = card.data.widget
        assert shown["text"] == (prompts[0] if prompts else "sks dog") and ("output" in shown) == bool(prompts)
        assert ("<Gallery />" in card.text) == bool(prompts)


def test_prompts_are_kept_whatever_is_in_them(tmp_path):
    prompts = [
        "a: b # c",
        "---\nlicense: mit\n---",
        "日本語 🍎 'x' \"y\"",
        "- [x]",
        "",
        "```\n</Gallery>",
        "null",
        "C:\\x",
    ]
    folder = card_folder(tmp_path / "out", images=len(prompts))
    for first in range(len(prompts)):
        rotated = (*prompts[first:], *prompts[:first])
        write_card(folder, replace(CARD, prompts=rotated, images_per_prompt=1))
        card = ModelCard.load(folder / "README.md")
        assert [image["text"] for image in card.data.widget] == [prompt or " " for prompt in rotated]
        [python] = re.findall(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)
        compile(python, "snippet", "exec")
        assert card.data.license is None and card.text.count("## ") == 3


def test_local_folders_are_not_named(tmp_path, monkeypatch):
    """Neither base model, data set nor a setting gives away a path or who owns it, whatever way it is written."""
    home = tmp_path / "home" / "carol"
    base, data = home / "secret-base", home / "secret-data"
    for folder in (base, data):
        folder.mkdir(parents=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    out = card_folder(home / "out")
    for prefix in (f"{home}/", "", "./", "../carol/", "~/"):
        settings = {
            "VAE": f"{prefix}secret-base",
            "list": [f"{home}/a", 1],
            "steps": 3,
            "ratio": "1/2",
            "long": "x" * 999,
            "empty": "",
        }
        local = dict(base_model=f"{prefix}secret-base", dataset=f"{prefix}secret-data", training=settings)
        for lora in (True, False):
            write_card(out, replace(CARD, lora=lora, **local))
            said = (out / "README.md").read_text(encoding="utf-8")
            assert not any(word in said for word in ("carol", "secret", str(tmp_path), "home"))
            metadata = metadata_load(out / "README.md")
            assert not metadata.keys() & {"base_model", "datasets", "license"}
            assert "a private collection of 96 images" in said and "a local Stable Diffusion XL model" in said
            assert "| VAE | a local file |" in said and "| ratio | 1/2 |" in said
            assert "| empty |  |" in said


LICENCES = [
    ("license: openrail++", {"license": "openrail++"}),
    ("license: other\nlicense_name: sai\nlicense_link: https://x.org/L", {"license": "other", "license_name": "sai",
                                                                       "license_link": "https://x.org/L"}),
    ("license: other\nlicense_name: sai\nlicense_link: LICENSE.md", {"license": "other", "license_name": "sai",
                                                                    "license_link": "LICENSE.md"}),
    ("tags: [x]", {}), ("license_name: sai", {}), ("license: [", {}), ("- a\n- b", {}),
]  # fmt: skip


@pytest.mark.parametrize(("front", "licence"), LICENCES)
def test_the_licence_is_the_base_models(front, licence, tmp_path, capsys):
    """From a local folder's card; a link to a file of that folder means nothing elsewhere."""
    text(tmp_path / "base" / "README.md", f"---\n{front}\n---\n# Base\n")
    write_card(card_folder(tmp_path / "out"), replace(CARD, base_model=str(tmp_path / "base")))
    found = metadata_load(tmp_path / "out" / "README.md")
    kept = {key: value for key, value in licence.items() if value != "LICENSE.md"}
    assert {key: value for key, value in found.items() if key.startswith("license")} == kept
    assert ("found no licence" in capsys.readouterr().out) == (not licence)


def test_the_licence_of_a_base_model_on_the_hub(hub, child):
    hub.repositories["alice/base"] = Repository(False)
    for front, licence in LICENCES:
        hub.repositories["alice/base"].files["README.md"] = f"---\n{front}\n---\n".encode()
        shutil.rmtree(child.log.parent / "hub", ignore_errors=True)
        status, value, _ = child.call("base_licence", "alice/base")
        wanted = {**licence, "license_link": "https://huggingface.co/alice/base/blob/main/LICENSE.md"}
        assert (status, value) == (0, wanted if "LICENSE.md" in licence.values() else licence)
    assert child.call("base_licence", "alice/missing")[:2] == [0, {}]
    shutil.rmtree(child.log.parent / "hub")
    hub.fault = Fault("read", 503)
    start = time.monotonic()
    assert child.call("base_licence", "alice/base")[:2] == [0, {}] and time.monotonic() - start < 10


def test_the_snippets_run(tmp_path, monkeypatch):
    """As they stand, with folders of the names that they load from the Hub; pictures take 2 steps."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    monkeypatch.chdir(tmp_path)
    card = replace(CARD, base_model="owner/base", training={}, prompts=('it\'s "red"',))
    for name, lora in {"lora": True, "full": False}.items():
        write_card(card_folder(tmp_path / name), replace(card, lora=lora, prediction_type="v_prediction"))
    shutil.copytree(ROOT / "examples" / "tiny-sdxl", tmp_path / "owner" / "base")
    shutil.copytree(ROOT / "examples" / "tiny-sdxl", tmp_path / "alice" / "apples")
    unet = StableDiffusionXLPipeline.from_pretrained("owner/base").unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights("alice/apples", unet_lora_layers=get_peft_model_state_dict(unet))
    few = functools.partialmethod(StableDiffusionXLPipeline.__call__, num_inference_steps=2)
    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", few)
    drawn = {}
    for name in ("lora", "full"):
        said = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        [python] = re.findall(r"```python\n(.*?)```", said, re.DOTALL)
        torch.manual_seed(0)
        scope = {}
        exec(python, scope)
        drawn[name] = scope["pipe"]
        assert np.asarray(scope["image"]).std() > 1
    assert drawn["lora"].get_active_adapters() == ["default_0"]
    assert drawn["lora"].scheduler.config.prediction_type == "v_prediction"
    assert drawn["full"].scheduler.config.prediction_type == "epsilon"
