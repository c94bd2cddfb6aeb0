"""SIGKILL while pictures are made: none is half written, and the next run makes what is missing, the same."""

import signal
import sys
import time

from PIL import Image

from tests import children

CODE = """
import sys, torch
from lpl_finetuning.evaluation.generation import GenerationSettings, generate
from lpl_finetuning.evaluation.models import find_source, load_pipeline
torch.set_num_threads(1)
pipeline = load_pipeline(find_source(sys.argv[1]), torch.float32, "cpu")
captions = {f"{number:02d}": f"the sun {number}" for number in range(int(sys.argv[3]))}
generate(pipeline, captions, GenerationSettings(2, (1.0, 2.0), batch_size=1), sys.argv[2], "a model", bar=False)
"""


def words(model, folder, count):
    """The command that makes `count` pictures for each of two guidances."""
    return [sys.executable, "-c", CODE, str(model), str(folder), str(count)]


def test_killed_and_resumed(sdxl_folder, tmp_path):
    count = 30
    children.run(words(sdxl_folder, tmp_path / "whole", count), check=True, cwd=children.ROOT)
    for at in (1, 17, 35):
        process = children.start(words(sdxl_folder, tmp_path / "killed", count), cwd=children.ROOT)
        while len(list((tmp_path / "killed").rglob("[0-9]*.png"))) < at and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL, "it ended before it was killed"
        there = list((tmp_path / "killed").rglob("[0-9]*.png"))
        assert at <= len(there) < 2 * count
        for path in there:
            Image.open(path).load()
    kept = {path: path.stat().st_mtime_ns for path in there}
    (tmp_path / "killed/guidance-1/.tmp-left").write_bytes(b"half a picture")
    children.run(words(sdxl_folder, tmp_path / "killed", count), check=True, cwd=children.ROOT)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    files = {path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()
    }
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
