"""A single file as base model: it is unpacked once into a folder of the cache, in diffusers' layout. No torch.

Configurations and vocabularies come with the package, in `pipelines/`, or from --config_from. The folder's small files
are written when the flags are checked, the weights when a run begins. The folder can be deleted when no run needs it.
"""

import functools
import gzip
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lpl_finetuning.base_model import (
    fingerprint_of,
    hub_like,
    hub_problem,
    is_listed,
    is_lora_file,
    read_object,
    tensors_of,
    weight_files,
    weight_problem,
)
from lpl_finetuning.errors import UserError, counted, first_names, require
from lpl_finetuning.files import (
    alone,
    cache_folder,
    check_free_space,
    digest,
    format_bytes,
    remembered_sha256,
    write_whole,
)
from lpl_finetuning.single_file import (
    SD3_FILE,
    SDXL_FILE,
    UNUSED,
    check_pieces,
    plain_vae_pieces,
    read_header,
    read_single_file,
    schedule_of,
    transformer_config,
    vae_pieces,
)

PIPELINES = Path(__file__).parent / "pipelines"
SOURCE = "source.json"  # in an unpacked folder, written last: {"file": name, "sha256": hex, "stamp": [size, time]}

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # of the dtypes that are read
CHUNK = 64 * 2**20  # bytes that are copied at a time
WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
SMALL = ("*.json", "*.txt", "*.model")  # configurations and tokenizers


@dataclass(frozen=True, eq=False)
class Unpacked:
    """A single file, and the folder that it is unpacked into.

    Attributes:
        parts: {weight file below the folder: (prefix of its names in the single file, {name: Piece})}.
        borrowed: {part: folder} of parts that the file lacks, whose weights are linked to.
        config_from: where these parts come from: a folder, or a name on the Hub, from which the weights are fetched.
        said: lines of the plan on what the file is and says.
    """

    path: Path
    folder: Path
    parts: Mapping
    borrowed: Mapping = field(default_factory=dict)
    config_from: str | None = None
    said: tuple = ()

    @property
    def is_made(self):
        """Whether all weights are in the folder, from the file as it is now."""
        return self._kept().get("stamp") == self._stamp() and self._has_weights()

    def _kept(self):
        """The content of the folder's `SOURCE`; {} without."""
        path = self.folder / SOURCE
        return read_object(path) if path.is_file() else {}

    def _stamp(self):
        """What changes when the single file's content does: size and time of the last change, in ns."""
        status = self.path.stat()
        return [status.st_size, status.st_mtime_ns]

    def _has_weights(self):
        """Whether the folder has the weights of all parts."""
        linked = [self.folder / part for part in self.borrowed]
        own = all((self.folder / file).is_file() for file in self.parts)
        return own and all(path.is_file() for part in linked for path in [*part.glob("*.safetensors")] or [part])

    @functools.cached_property
    def size(self):
        """Bytes of the weights."""
        header, _ = tensors_of(self.path)
        return sum(bytes_of_piece(piece, prefix, header) for prefix, pieces in self.parts.values()
                   for piece in pieces.values())  # fmt: skip

    def make(self):
        """Write the weights, unless they are there. One process of the machine writes them, and the others wait."""
        if self.is_made:
            return
        try:
            with alone(self.folder / ".lock"):
                if not self.is_made and not self._is_same_copy():
                    self._write()
        except OSError as error:
            raise UserError(f"{self.folder}: {self.path.name} can't be unpacked there ({error.strerror or error}); "
                            "make room, or name a folder on another disk with --cache_dir") from None  # fmt: skip

    def _is_same_copy(self):
        """Whether the folder has the weights of this very content, whose file was copied or touched since."""
        kept = self._kept()
        if not self._has_weights() or kept.get("sha256") != remembered_sha256(self.path):
            return False
        write_whole(self.folder / SOURCE, json.dumps(kept | {"stamp": self._stamp()}).encode())
        return True

    def _write(self):
        check_free_space(self.folder, self.size, f"{self.path.name}, unpacked,")
        print(f"Unpacking {self.path.name} once, {format_bytes(self.size)}, into {self.folder}", flush=True)
        stamp = self._stamp()
        (self.folder / SOURCE).unlink(missing_ok=True)
        for file, (prefix, pieces) in self.parts.items():
            write_part(self.path, prefix, pieces, self.folder / file)
        if self.borrowed:
            flag, source = f"--config_from {self.config_from}", config_folder(self.config_from, tuple(self.borrowed))
            for part in self.borrowed:
                link_weights(borrowed_weights(flag, source, part), self.folder / part)
        kept = {"file": self.path.name, "sha256": remembered_sha256(self.path), "stamp": stamp}
        write_whole(self.folder / SOURCE, json.dumps(kept).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def dtype_of_piece(piece, prefix, header):
    """The safetensors dtype of a piece; the identity has the dtype of most tensors of the part."""
    if piece.source is not None:
        return header[prefix + piece.source]["dtype"]
    return next(entry["dtype"] for name, entry in header.items() if name.startswith(prefix))


def bytes_of_piece(piece, prefix, header):
    """Bytes of the tensor that a piece makes."""
    count = 1
    for side in piece.shape:
        count *= side
    return count * BYTES[dtype_of_piece(piece, prefix, header)]


def write_part(source, prefix, pieces, target):
    """Write a part's safetensors file, cut out of a single file; it is whole or not there.

    Args:
        source: the single file; prefix: of the part's names in it; pieces: {name: Piece}.
    """
    header, begins = tensors_of(source)
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    ordered = sorted(pieces, key=lambda name: -BYTES[dtype_of_piece(pieces[name], prefix, header)])  # aligned
    for name in ordered:
        begin, end = end, end + bytes_of_piece(pieces[name], prefix, header)
        dtype = dtype_of_piece(pieces[name], prefix, header)
        entries[name] = {"dtype": dtype, "shape": list(pieces[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{target.name}")
    with open(source, "rb") as single, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            for data in data_of(single, pieces[name], prefix, header, begins):
                file.write(data)
    os.replace(temporary, target)


def data_of(single, piece, prefix, header, begins):
    """Yield the bytes of a tensor in chunks. single: the file, open; begins: byte at which its data begin."""
    import numpy

    kind = f"u{BYTES[dtype_of_piece(piece, prefix, header)]}"
    if piece.source is None:
        yield identity_bytes(piece.shape, dtype_of_piece(piece, prefix, header))
        return
    first, last = header[prefix + piece.source]["data_offsets"]
    if piece.transposed:
        single.seek(begins + first)
        stored = numpy.frombuffer(single.read(last - first), kind)
        yield numpy.ascontiguousarray(stored.reshape(piece.source_shape).T).tobytes()
        return
    for number, count in piece.cuts:
        share = (last - first) // count
        single.seek(begins + first + number * share)
        while share:
            data = single.read(min(share, CHUNK))
            if not data:
                raise OSError("the single file ended early")
            share -= len(data)
            yield data


ONES = {"F64": b"\0\0\0\0\0\0\xf0?", "F32": b"\0\0\x80?", "BF16": b"\x80?", "F16": b"\0<", "F8_E4M3": b"8",
        "F8_E5M2": b"<"}  # fmt: skip


def identity_bytes(shape, dtype):
    """The bytes of the identity matrix."""
    data, one = bytearray(shape[0] * shape[1] * BYTES[dtype]), ONES[dtype]
    for row in range(min(shape)):
        begin = (row * shape[1] + row) * len(one)
        data[begin : begin + len(one)] = one
    return bytes(data)


def link_weights(source, target):
    """Link the weights of a part of another pipeline's folder into a folder."""
    for path in [*weight_files(str(source), source, None), *source.glob("*.safetensors.index.json")]:
        link = target / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.absolute())


# ---------------------------------------------------------------------------------------------------------------------
# Configurations and tokenizers


@functools.cache
def clip_vocabulary():
    """{file name: bytes} of CLIP's tokenizer. The vocabulary follows from the merges.

    It has the 256 bytes as letters, the same at the end of a word, what each merge makes, and two marks.
    """
    merges = gzip.decompress((PIPELINES / "vocabularies" / "clip_merges.txt.gz").read_bytes())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    words = ["".join(line.split()) for line in merges.decode().splitlines()[1:] if line]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({name: number for number, name in enumerate(names)}, ensure_ascii=False)
    return {"merges.txt": merges, "vocab.json": vocabulary.encode()}


@functools.cache
def t5_vocabulary():
    """{file name: bytes} of T5's tokenizer."""
    return {"tokenizer.json": gzip.decompress((PIPELINES / "vocabularies" / "t5_tokenizer.json.gz").read_bytes())}


def packaged_files(folder):
    """{path below a pipeline's folder: bytes} of the package's configurations and tokenizers. folder: "sdxl"."""
    files = {path.relative_to(PIPELINES / folder).as_posix(): path.read_bytes()
             for path in (PIPELINES / folder).rglob("*.json")}  # fmt: skip
    for part in {name.split("/")[0] for name in files if name.startswith("tokenizer")}:
        vocabulary = t5_vocabulary() if part == "tokenizer_3" else clip_vocabulary()
        files |= {f"{part}/{name}": content for name, content in vocabulary.items()}
    return files


def files_from(folder):
    """{path below a pipeline's folder: bytes} of its configurations and tokenizers."""
    paths = [path for pattern in SMALL for path in folder.glob(f"*/{pattern}") if ".index." not in path.name]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in [folder / "model_index.json", *paths]}


def config_folder(config_from, weights_of=()):
    """The folder of --config_from, fetched where it is a name on the Hub.

    Args:
        weights_of: parts whose weights are needed too.
    """
    flag = f"--config_from {config_from}"
    if Path(config_from).is_dir():
        return Path(config_from)
    require(hub_like(config_from), f"{flag}: there is no such folder, and Hub names have the form owner/name")
    return fetched(flag, config_from, weights_of)


def check_configurations(flag, folder, layout):
    """Refuse a --config_from of another family."""
    index = folder / "model_index.json"
    kind = str(read_object(index).get("_class_name")) if index.is_file() else "folder without a model_index.json"
    require(kind.startswith(layout.pipeline), f"{flag} is a {kind}; the file is {layout.title}: give a "
            f"{layout.pipeline}Pipeline")  # fmt: skip
    return folder


def fetched(flag, name, weights_of):
    """The folder of a pipeline of the Hub in its cache, with its small files and the weights of some parts."""
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", *(f"*/{pattern}" for pattern in SMALL)]
    patterns += [f"{part}/*.safetensors" for part in weights_of]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.fp16*", "*.bf16*"],
                                      local_files_only=bool(hub_problem())))  # fmt: skip
    except Exception as error:  # no network, no such model, no access: many kinds
        problem = hub_problem() or " ".join(str(error).split())
        raise UserError(f"{flag}: can't be had from the Hub ({problem}); give the folder of a pipeline") from None


# ---------------------------------------------------------------------------------------------------------------------
# From a single file to a folder


def opened(what, single, config_from=None, only=None):
    """({path: bytes}, {weight file: (prefix, pieces)}, {part: folder} of what is borrowed) of a single file.

    Args:
        what: the flag with the file, for messages.
        single: the `SingleFile`.
        config_from: folder or Hub name of a pipeline with what the file lacks; None: the package's configurations.
        only: the parts that are wanted; None: all.

    Raises:
        UserError: parts are missing, or have other tensors than the configurations ask for.
    """
    layout, parts, borrowed = single.layout, {}, {}
    wanted = only or tuple(layout.parts)
    missing = [part for part in wanted if part not in single.prefixes]
    folder = config_folder(config_from) if config_from else None
    if folder:
        check_configurations(f"--config_from {config_from}", folder, layout)
    files = files_from(folder) if folder else packaged_files(layout.folder)
    index = json.loads(files["model_index.json"])
    for part in missing:
        if folder and is_listed(index, part):
            borrowed[part] = folder / part
            if Path(config_from).is_dir():
                borrowed_weights(f"--config_from {config_from}", folder, part)
        elif part not in layout.optional:
            absent = " and no ".join(layout.parts[each].title for each in missing if each not in layout.optional)
            require(False, f"{what} has no {absent} of {layout.title}; give a file with all parts, or --config_from "
                    f"with the folder of a {layout.pipeline}Pipeline that has them")  # fmt: skip
    if "transformer" in wanted and not folder:
        config = transformer_config(single.header, single.prefixes["transformer"])
        files["transformer/config.json"] = json.dumps(config, indent=2).encode()
    for part in [part for part in wanted if part in single.prefixes]:
        config, prefix = json.loads(files.get(f"{part}/config.json", b"{}")), single.prefixes[part]
        require(config, f"--config_from {config_from} has no {part}/config.json; give a whole pipeline")
        pieces = layout.parts[part].pieces(config)
        advice = f"give a whole {layout.title}" + (f", or a --config_from that fits ({config_from} does not)"
                  if folder else ", or --config_from with a pipeline of the same sizes")  # fmt: skip
        check_pieces(what, layout.parts[part].title, pieces, prefix, single.header, advice)
        check_dtypes(what, pieces, prefix, single.header)
        parts[f"{part}/{TEXT_WEIGHTS if part.startswith('text_encoder') else WEIGHTS}"] = prefix, pieces
    absent = [part for part in layout.parts if part not in (*borrowed, *(file.split("/")[0] for file in parts))]
    return without(files, absent), parts, borrowed


def borrowed_weights(flag, folder, part):
    """The folder of a part of another pipeline, whose weights are there and whole."""
    paths = weight_files(flag, folder / part, None)
    problem = next((f"{path.name} {found}" for path in paths if (found := weight_problem(path))), None)
    require(paths and all(path.suffix == ".safetensors" for path in paths) and not problem,
            f"{flag}: {part}/ {problem or 'has no weights as .safetensors'}; give a pipeline that has what the file "
            "lacks")  # fmt: skip
    return folder / part


def check_dtypes(what, pieces, prefix, header):
    """Refuse tensors of whole numbers: a quantized model."""
    kinds = {dtype_of_piece(piece, prefix, header) for piece in pieces.values()} - BYTES.keys()
    require(not kinds, f"{what} has tensors of {first_names(sorted(kinds))}, which can't be trained; give the same "
            "model in float16, bfloat16 or float32")  # fmt: skip


def without(files, absent):
    """The files of a pipeline without some parts and their tokenizers."""
    names = {*absent, *(part.replace("text_encoder", "tokenizer") for part in absent)}
    index = json.loads(files["model_index.json"])
    index |= {name: [None, None] for name in names if name in index}
    kept = {name: content for name, content in files.items() if name.split("/")[0] not in names}
    return kept | {"model_index.json": json.dumps(index, indent=2).encode()}


def surplus(what, single, parts):
    """Names in the file that no part has a place for; UserError where the denoiser has such."""
    used = {prefix + piece.source for prefix, pieces in parts.values() for piece in pieces.values() if piece.source}
    left = [name for name in single.header if name not in used and not UNUSED.fullmatch(name)]
    prefix, layout = single.prefixes[single.layout.denoiser], single.layout
    lost = [name for name in left if name.startswith(prefix) and prefix]
    require(not lost, f"{what}: {len(lost)} of its {len(single.header)} tensors have no place in {layout.title} "
            f"({first_names(lost)}); give a plain model")  # fmt: skip
    return left


def schedule_in_file(single):
    """(prediction_type, zero_snr) that the folder's scheduler gets; flags win over it when the model is loaded."""
    kind = "v_prediction" if "v_prediction" in single.marks.values() else "epsilon"
    return kind, bool(single.zero_snr) and kind != "epsilon"


def with_schedule(files, prediction_type, zero_snr):
    """The files of an SDXL pipeline with a scheduler of this prediction.

    With zero terminal SNR sampling must begin at the last timestep: spacing "trailing".
    """
    settings = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    settings |= {"timestep_spacing": "trailing"} if zero_snr else {}
    name = "scheduler/scheduler_config.json"
    config = json.loads(files[name]) if name in files else {}
    return files | {name: json.dumps(config | settings, indent=2).encode()}, settings


def write_small(folder, files):
    """Write small files into a folder, those that are not there in the same words."""
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_whole(path, content)


def folder_of(cache_dir, path, files, parts, borrowed):
    """The folder of the cache that a file is unpacked into; another content or configuration gets another folder."""
    small = {name: content.decode("utf-8", "replace") for name, content in files.items()}
    key = digest(content=fingerprint_of([path]), files=small, parts=sorted(parts),
                 borrowed={part: str(folder.absolute()) for part, folder in borrowed.items()})  # fmt: skip
    name = re.sub(r"[^\w.-]+", "_", path.stem, flags=re.ASCII)[:40]
    return cache_folder(cache_dir) / "base-models" / f"{name}-{key[:12]}"


def plan_lines(single, unpacked, left=()):
    """Lines of the plan on a single file."""
    said = [f"{place} says {kind}" for place, kind in single.marks.items()]
    said += [f"{place} says zero terminal SNR" for place in single.zero_snr]
    nothing = "it says nothing of its prediction, which is epsilon then; --prediction_type says otherwise"
    words = [f"Base model: {single.path.name} is {single.layout.title} in one file"]
    if single.layout is SDXL_FILE:
        words.append("; ".join(said) or nothing)
    elif "text_encoder_3" not in {file.split("/")[0] for file in (*unpacked.parts, *unpacked.borrowed)}:
        words.append("it has no T5")
    if unpacked.borrowed:
        words.append(f"{', '.join(unpacked.borrowed)} from {next(iter(unpacked.borrowed.values())).parent}")
    if left:
        words.append(f"left out: {counted(len(left), 'tensor')} that no {single.layout.title} has "
                     f"({first_names(left)})")  # fmt: skip
    return "; ".join(words), where_line(unpacked)


def where_line(unpacked):
    """The line of the plan on where a single file is unpacked."""
    return (f"            {'unpacked in' if unpacked.is_made else 'to be unpacked into'} {unpacked.folder} "
            f"({format_bytes(unpacked.size)}), which can be deleted when no run needs it")  # fmt: skip


def open_base_file(args, base):
    """The `BaseModel` whose pipeline is the folder of a single file, where the flag names a file.

    Raises:
        UserError: the file is something else than a whole model of the family.
    """
    path, family = Path(base.name), base.family
    if not path.is_file():
        return base
    what = base.flag()
    single = read_single_file(path, what)
    check_family(what, single, family)
    if family.denoiser:
        schedule_of(single, getattr(args, "prediction_type", None), getattr(args, "rescale_betas_zero_snr", None),
                    what, "--rescale_betas_zero_snr")  # fmt: skip
    only = None if family.denoiser else (family.autoencoder.name,)
    files, parts, borrowed = opened(what, single, args.config_from, only)
    left = surplus(what, single, parts) if family.denoiser else ()
    if single.layout is SDXL_FILE:
        files, _ = with_schedule(files, *schedule_in_file(single))
    return placed(args, base, path, files, parts, borrowed, lambda unpacked: plan_lines(single, unpacked, left))


def check_family(what, single, family):
    """Refuse a single file of another family than the script's."""
    layout = single.layout
    other = next((script for start, script in family.other_scripts.items() if layout.pipeline == start), None)
    require(layout.pipeline.startswith(family.pipeline), f"{what} is {layout.title} in one file; this script trains "
            f"{family.pipeline} models: " + (f"use {other}" if other else "give one of those"))  # fmt: skip


def open_vae_file(args, base):
    """The `BaseModel` whose autoencoder is the folder of a single file, where the flag names a file.

    The configuration is that of the pipeline's own autoencoder, whose latents the denoiser knows.
    """
    part = base.family.autoencoder
    if not base.vae or not Path(base.vae).is_file():
        return base
    path, what = Path(base.vae), f"--{part.flag} {base.vae}"
    header, _ = read_header(what, path)
    require(not is_lora_file(path), f"{what} is a LoRA; give an AutoencoderKL as .safetensors, or a folder")
    config = base.file("config.json", part.name)
    require(config, f"{base.flag()}: {part.name}/config.json is missing, which the single file of --{part.flag} needs "
            "too; download the model again")  # fmt: skip
    prefix, pieces = vae_in(what, header, read_object(config))
    advice = "give an autoencoder of the base model's sizes"
    check_pieces(what, "autoencoder", pieces, prefix, header, advice)
    check_dtypes(what, pieces, prefix, header)
    line = f"Autoencoder: {path.name}, a single file, with the configuration of the base model's"
    return placed(args, base, path, {"config.json": config.read_bytes()}, {WEIGHTS: (prefix, pieces)}, {},
                  lambda unpacked: (line, where_line(unpacked)), part)  # fmt: skip


def lone_vae(what, path):
    """(content of config.json, prefix, {name: Piece}) of the autoencoder in a single file that stands alone, or in one
    of a whole model. The configuration is that of SDXL or of SD3, by the channels of the latents.

    Raises:
        UserError: the file has no such autoencoder.
    """
    header, _ = read_header(what, path)
    require(not is_lora_file(path), f"{what} is a LoRA; give an AutoencoderKL as .safetensors, or a folder")
    contents = [packaged_files(layout.folder)["vae/config.json"] for layout in (SDXL_FILE, SD3_FILE)]
    contents = {json.loads(content)["latent_channels"]: content for content in contents}
    prefix, _ = vae_in(what, header, json.loads(contents[4]))
    shape = header.get(f"{prefix}decoder.conv_in.weight", {}).get("shape", [0, 0])
    require(shape[1] in contents, f"{what} has latents of {shape[1]} channels; those of SDXL have 4, those of SD3 16")
    content = contents[shape[1]]
    prefix, pieces = vae_in(what, header, json.loads(content))
    check_pieces(what, "autoencoder", pieces, prefix, header, "give an AutoencoderKL of SDXL's or SD3's sizes")
    check_dtypes(what, pieces, prefix, header)
    return content, prefix, pieces


def vae_folder(what, path, cache_dir):
    """The folder of the cache that the autoencoder of a single file is unpacked into: see `lone_vae`."""
    content, prefix, pieces = lone_vae(what, path)
    files, parts = {"config.json": content}, {WEIGHTS: (prefix, pieces)}
    folder = folder_of(cache_dir, path, files, parts, {})
    write_small(folder, files)
    Unpacked(path, folder, parts).make()
    return folder


def vae_in(what, header, config):
    """(prefix, {name: Piece}) of the autoencoder in a file: LDM's or diffusers' layout, alone or in a whole model."""
    for prefix in ("first_stage_model.", "vae.", ""):
        for start, pieces in (("decoder.up.", vae_pieces), ("decoder.up_blocks.", plain_vae_pieces)):
            if any(name.startswith(prefix + start) for name in header):
                return prefix, pieces(config)
    require(False, f"{what} has no autoencoder: it holds {first_names(list(header)[:2], len(header))}; give an "
            "AutoencoderKL as .safetensors")  # fmt: skip


def placed(args, base, path, files, parts, borrowed, lines, part=None):
    """The `BaseModel` with the folder of a single file in the place of the file, its small files written.

    Args:
        lines: function of the `Unpacked` that returns lines of the plan.
        part: the `Part` that the file replaces; None for the whole pipeline.
    """
    folder = folder_of(args.cache_dir, path, files, parts, borrowed)
    unpacked = Unpacked(path, folder, parts, borrowed, args.config_from)
    try:
        write_small(folder, files)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error}), and {path.name} is unpacked there; "
                        "name another folder with --cache_dir") from None  # fmt: skip
    if not args.dry_run and not unpacked.is_made:
        check_free_space(folder, unpacked.size, f"{path.name}, unpacked,")
    unpacked = replace(unpacked, said=tuple(lines(unpacked)))
    changed = {"vae": str(folder)} if part else {"name": str(folder)}
    return replace(base, **changed, unpacked=base.unpacked | {str(folder): unpacked})
