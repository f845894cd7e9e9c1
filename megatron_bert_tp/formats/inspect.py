"""What a file or a folder is: format, class, sizes, layout, tensors, and whether it is whole.

Nothing is unpickled but the tensors of a `pytorch_model.bin`; Megatron's files are told by their names.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from megatron_bert_tp.checkpoint.directories import POINTER
from megatron_bert_tp.checkpoint.durable import check_regular, printable, readable
from megatron_bert_tp.checkpoint.manifest import MANIFEST
from megatron_bert_tp.checkpoint.model import check_tensors, head_of, shape_of
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.slices import by_name
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.card import SETTINGS
from megatron_bert_tp.formats.classes import head_in, internal_name
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_config import CONFIG
from megatron_bert_tp.formats.megatron.archive import member_names, read_member
from megatron_bert_tp.formats.megatron.rank_files import FILE, TRACKER, find_grid, grid_size
from megatron_bert_tp.formats.megatron.wholeness import check_whole, check_whole_member
from megatron_bert_tp.formats.recognition import is_checkpoint, is_huggingface
from megatron_bert_tp.formats.stored_tensors import DTYPES, StoredTensor, open_tensors, weight_files
from megatron_bert_tp.model.shape import Head, ModelShape, tensor_shapes

_WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.")
_ITERATION = re.compile(r"iter_(\d+)")
_LARGEST_TRACKER = 100  # bytes


def describe(path: Path, *, list_tensors: bool = False) -> Iterator[str]:
    """Lines that say what is at ``path``; with ``list_tensors`` also one for each tensor.

    FormatError or CheckpointError, after what is known was given, when it is none of the formats or damaged.
    """
    if path.is_dir():
        yield from _describe_folder(path, list_tensors)
    elif path.suffix in (".safetensors", ".bin"):
        yield from _tensor_file(path, list_tensors)
    elif path.is_file():
        yield from _torch_or_zip_file(path)
    else:
        raise FormatError(f"{path}: there is no such file or folder, or it is a pipe or a device")


def _describe_folder(path: Path, list_tensors: bool) -> Iterator[str]:
    if is_huggingface(path):
        return _huggingface(path, list_tensors)
    if is_checkpoint(path):
        return _checkpoint(path, list_tensors)
    return _megatron_folder(path)


def _line(title: str, value: object) -> str:
    return f"{title:<12}{value}"


def _model_lines(shape: ModelShape, head: Head) -> Iterator[str]:
    yield _line("class", head.architecture)
    labels = f", labels {shape.num_labels}" if head.linear and head.num_outputs is None else ""
    yield _line(
        "sizes",
        f"layers {shape.num_hidden_layers}, hidden {shape.hidden_size}, heads {shape.num_attention_heads}, "
        f"intermediate {shape.intermediate_size}, vocabulary {shape.vocab_size}, "
        f"positions {shape.max_position_embeddings}{labels}",
    )
    tied = "tied" if shape.tie_word_embeddings else "untied"
    kinds = [f"activation {shape.hidden_act}", f"positions {shape.position_embedding_type}", f"embeddings {tied}"]
    kinds += ["decoder"] if shape.is_decoder else []
    kinds += ["cross-attention"] if shape.add_cross_attention else []
    yield _line("kind", ", ".join(kinds))
    yield _line("parameters", f"{sum(prod(size) for size in tensor_shapes(shape, head).values()):,}")


def _count(kinds: Iterable[str]) -> str:
    """Number formats, the most frequent first, with their counts where there are several."""
    counts = Counter(kinds).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{kind} ({count})" for kind, count in counts)


# Hugging Face


def _huggingface(path: Path, list_tensors: bool) -> Iterator[str]:
    files = weight_files(path)
    directory = HuggingFaceDirectory.open(path)
    yield _line("format", f"Hugging Face directory, {_written_as(files)}")
    yield from _model_lines(directory.shape, directory.head)
    yield from _tensor_lines(open_tensors(files), list_tensors)
    yield _line("bytes", readable(sum(file.stat().st_size for file in files)))
    yield _line("tokenizer", ", ".join(directory.tokenizer_files) or "none")
    yield _line("whole", "every tensor of the class is there, in its shape")


def _written_as(files: list[Path]) -> str:
    if len(files) == 1:
        return files[0].name
    return f"{len(files)} files {files[0].name} .. {files[-1].name}"


def _tensor_file(path: Path, list_tensors: bool) -> Iterator[str]:
    stored = open_tensors([path])
    yield _line("format", "safetensors file" if path.suffix == ".safetensors" else "torch.save file of tensors")
    tensors = {internal_name(name): tensor for name, tensor in stored.items()}
    yield from _class_lines(tensors)
    yield from _tensor_lines(stored, list_tensors)
    yield _line("bytes", readable(path.stat().st_size))
    if (path.parent / MANIFEST).is_file():
        yield _line("part of", f"the checkpoint {path.parent}, which knows its SHA-256; inspect that")


def _class_lines(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Class and sizes as far as the tensors of one file say them; the settings say the rest."""
    layers = {int(found[1]) for found in map(_LAYER.match, tensors) if found}
    words = tensors.get(_WORD_EMBEDDINGS)
    if words is None or len(words.shape) != 2 or "bert.encoder.ln.weight" not in tensors:
        yield _line("class", "not known: the file does not hold a whole MegatronBert")
        return
    vocabulary, hidden = words.shape
    shape = ModelShape(vocabulary, hidden, len(layers), 1, 1, 1, 1)
    yield _line("class", f"{head_in(tensors, shape, None).architecture}, judged from the tensors")
    yield _line("sizes", f"layers {len(layers)}, hidden {hidden}, vocabulary {vocabulary}")
    yield _line("parameters", f"{sum(prod(tensor.shape) for tensor in tensors.values()):,}")


def _tensor_lines(tensors: Mapping[str, StoredTensor], list_tensors: bool) -> Iterator[str]:
    yield _line("dtype", _count(_dtype_name(tensor) for tensor in tensors.values()) if tensors else "none")
    yield _line("tensors", len(tensors))
    if list_tensors:
        for name, tensor in sorted(tensors.items()):
            yield _tensor_line(name, tensor.shape, _dtype_name(tensor))


def _dtype_name(tensor: StoredTensor) -> str:
    return str(DTYPES.get(tensor.kind, tensor.kind)).removeprefix("torch.")


def _tensor_line(name: str, shape: tuple[int, ...], dtype: str) -> str:
    return f"  {printable(name)}  {list(shape)}  {printable(dtype)}"


# Our checkpoints


def _checkpoint(path: Path, list_tensors: bool) -> Iterator[str]:
    checkpoint = Checkpoint.open(path)
    weights, rows = checkpoint.shapes("weight"), checkpoint.manifest.slices
    yield _line("format", "checkpoint of megatron_bert_tp")
    yield _line("folder", checkpoint.directory)
    yield _line("step", checkpoint.step)
    shape, head = shape_of(checkpoint), head_of(checkpoint)
    yield from _model_lines(shape, head)
    check_tensors(checkpoint, shape, head)
    yield _line(
        "dtype", _count(group[0].dtype for name, group in by_name(rows).items() if name in _weights(weights))
    )
    yield _line("layout", _layout(checkpoint))
    moments = sorted({row.name.partition("/")[0] for row in rows} - {"weight"})
    yield _line("optimizer", f"state is there: {', '.join(moments)}" if moments else "no state; weights alone")
    yield _line("tensors", len(by_name(rows)))
    if list_tensors:
        for name, group in sorted(by_name(rows).items()):
            yield _tensor_line(name, group[0].shape, group[0].dtype)
    yield _line("bytes", readable(checkpoint.size))
    checkpoint.verify()
    yield _line("whole", f"every SHA-256 holds ({len(checkpoint.manifest.files)} files)")


def _weights(names: Iterable[str]) -> set[str]:
    return {f"weight/{name}" for name in names}


def _layout(checkpoint: Checkpoint) -> str:
    """Ranks that wrote, and the sizes where the settings of the run say them."""
    ranks = {row.file for row in checkpoint.manifest.slices}
    text = f"written by {len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'}"
    settings = checkpoint.facts.get(SETTINGS)
    parallel = settings.get("parallel") if isinstance(settings, Mapping) else None
    if not isinstance(parallel, Mapping):
        return text
    return f"{text}, tensor {parallel.get('tensor')} x pipeline {parallel.get('pipeline')}"


# Megatron-LM


def _megatron_folder(path: Path) -> Iterator[str]:
    patterns = (FILE, f"mp_rank_*/{FILE}", f"*/mp_rank_*/{FILE}", TRACKER, f"*/{TRACKER}")
    found = [each for pattern in patterns for each in sorted(path.glob(pattern))]
    if not any(each.name == FILE for each in found):
        raise FormatError(
            f"{path}: is no format that is known here; looked for {CONFIG}, {MANIFEST}, {POINTER}, "
            f"mp_rank_XX/{FILE}"
        )
    paths = [each.relative_to(path).as_posix() for each in found]

    def read_text(name: str) -> str:
        check_regular(path / name, FormatError)
        with (path / name).open(encoding="utf-8", errors="replace") as file:
            return file.read(_LARGEST_TRACKER)

    grid = find_grid(paths, read_text, source=str(path))
    files = list(grid.values())
    for name in files:
        check_whole(path / name)
    size = sum((path / name).stat().st_size for name in files)
    yield from _megatron_lines("Megatron-LM folder", files, size, layout=grid_size(grid))


def _torch_or_zip_file(path: Path) -> Iterator[str]:
    if not zipfile.is_zipfile(path):
        if path.name != FILE:
            raise FormatError(
                f"{path}: is no format that is known here: neither safetensors, nor a zip, nor {FILE}"
            )
        check_whole(path)
        yield from _megatron_lines("Megatron-LM file of one rank, legacy pickle", [path.name], path.stat().st_size)
        return
    names = member_names(path)
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        check_whole(path)
        title = "Megatron-LM file of one rank" if path.name == FILE else "torch.save file, perhaps of Megatron-LM"
        yield from _megatron_lines(title, [path.name], path.stat().st_size)
        return

    def read_text(name: str) -> str:
        return read_member(path, name, largest=_LARGEST_TRACKER).decode(errors="replace")

    grid = find_grid(names, read_text, source=str(path))
    for name in grid.values():
        check_whole_member(path, name)
    title = "zip of a Megatron-LM folder, as NVIDIA's megatron_bert_345m"
    yield from _megatron_lines(title, list(grid.values()), path.stat().st_size, layout=grid_size(grid))


def _megatron_lines(
    title: str, files: list[str], size: int, *, layout: tuple[int, int] | None = None
) -> Iterator[str]:
    yield _line("format", title)
    step = _ITERATION.search(files[0])
    if step or "release/" in files[0]:
        yield _line("step", int(step[1]) if step else "release")
    if layout is not None:
        yield _line("layout", f"tensor {layout[0]} x pipeline {layout[1]}")
    yield _line("files", f"{len(files)}: {', '.join(files[:4])}{', ..' if len(files) > 4 else ''}")
    yield _line("bytes", readable(size))
    yield _line("more", "is in its pickle, which is not unpickled here; `convert from-ngc` reads it")
