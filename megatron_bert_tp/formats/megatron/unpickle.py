"""Files of `torch.save` to safetensors and plain values: `python -m megatron_bert_tp.formats.megatron.unpickle`.

This is the only module that unpickles, and `isolated.py` runs it as a process of its own under limits.  It reads
``jobs.json`` in the folder that it is given, and writes ``N.safetensors`` and ``N.json`` there for job ``N``.
"""

import json
import resource
import sys
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.durable import readable
from megatron_bert_tp.checkpoint.tensor_file import KINDS, Content, write_tensor_file
from megatron_bert_tp.errors import FormatError
from megatron_bert_tp.formats.megatron.pickle_globals import Bag, is_zip, stand_ins

JOBS = "jobs.json"
REFUSED = 3
"""Exit code with a message for the user on standard output."""
_SPARE = 256 * 10**6  # bytes beyond what torch holds after its import, and 1.3 times the largest file
_DEEPEST, _MOST_NODES = 16, 200_000  # of the tree of tensors
_MOST_ARGUMENTS, _LONGEST_TEXT = 10_000, 1000
_LARGEST_NUMBER = 2**62
_SIZES = Path("/proc/self/statm")


def main(arguments: list[str]) -> int:
    """Convert what the jobs of the folder ``arguments[0]`` name; one child does all files of a checkpoint."""
    folder = Path(arguments[0])
    jobs = json.loads((folder / JOBS).read_bytes())
    torch.set_num_threads(1)
    limit_resources(max(Path(path).stat().st_size for _label, path in jobs), jobs_seconds=len(jobs) * 600)
    try:
        extract_all(jobs, folder)
    except FormatError as error:
        print(error)
        return REFUSED
    return 0


def limit_resources(largest: int, *, jobs_seconds: int) -> None:
    """Keep this process from more memory, disk and time than files of ``largest`` bytes need."""
    allowed = {
        resource.RLIMIT_FSIZE: 2 * largest + _SPARE,
        resource.RLIMIT_CPU: jobs_seconds,
        resource.RLIMIT_CORE: 0,
    }
    if _SIZES.is_file():  # Linux; elsewhere the system does not say, nor keep, the size of a process
        now = int(_SIZES.read_text().split()[0]) * resource.getpagesize()
        allowed[resource.RLIMIT_AS] = now + int(1.3 * largest) + _SPARE
    for kind, value in allowed.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def extract_all(jobs: list[tuple[str, str]], folder: Path) -> None:
    """Do every job, a label for messages and a path; FormatError when a file is damaged or refused."""
    for number, (label, path) in enumerate(jobs):
        try:
            _extract(Path(path), folder / str(number))
        except FormatError as error:
            raise FormatError(f"{label}: {error}") from error
        except MemoryError as error:
            raise FormatError(f"{label}: needs more memory than a file of its size should") from error
        except OSError as error:
            raise FormatError(f"{label}: cannot be converted: {error}") from error


def _extract(path: Path, target: Path) -> None:
    content = _load(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _model_tensors(content):
        if name in tensors:
            raise FormatError(f"holds {name} twice, in a dictionary and as a dotted name")
        tensors[name] = tensor
    largest = path.stat().st_size
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    if total > 2 * largest:
        raise FormatError(f"its tensors have {readable(total)}, but the file {readable(largest)}; it is refused")
    facts = {"arguments": _plain(content.get("args")), "version": _version(content)}
    target.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    write_tensor_file(
        target.with_suffix(".safetensors"),
        [
            Content(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: [tensor])  # type: ignore[misc]
            for name, tensor in tensors.items()
        ],
    )


def _load(path: Path) -> Mapping[str, object]:
    """Content of a file, in which all but tensors, containers and plain values are stubs."""
    try:
        with torch.serialization.safe_globals(list(stand_ins(path))):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except (FormatError, MemoryError, OSError):
        raise
    except Exception as error:  # a damaged or hostile pickle fails in any way
        raise FormatError(f"cannot be read: it is damaged, or refused by torch ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise FormatError(f"must hold a dictionary, not a {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    """What torch complains of, without its advice on how to load the file all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line or "reduce" in line]
    return (telling or lines or [type(error).__name__])[0].partition(" Please use ")[0][:300]


def _model_tensors(content: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model as ``CHUNK:dotted.name``; chunks are the virtual stages, else there is chunk 0."""
    chunks = {key: value for key, value in content.items() if isinstance(key, str) and key.startswith("model")}
    numbered = [f"model{number}" for number in range(len(chunks))]
    keys = ["model"] if list(chunks) == ["model"] else numbered
    if not chunks or chunks.keys() != set(keys):
        found = ", ".join(str(key)[:40] for key in list(content)[:10])
        raise FormatError(f"must hold 'model', or 'model0', 'model1' and so on; it holds: {found or 'nothing'}")
    for number, key in enumerate(keys):
        for name, tensor in _leaves(chunks[key]):
            yield f"{number}:{name}", _checked(name, tensor)


def _leaves(tree: object) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries under their dotted names, but what Transformer Engine keeps beside them."""
    waiting: list[tuple[str, int, object]] = [("", 0, tree)]
    for _ in range(_MOST_NODES):
        if not waiting:
            return
        name, depth, value = waiting.pop()
        if isinstance(value, Tensor) and not name.endswith("_extra_state"):
            yield name, value.detach()
        elif isinstance(value, dict) and depth < _DEEPEST:
            prefix = f"{name}." if name else ""
            waiting += [(f"{prefix}{key}", depth + 1, part) for key, part in value.items() if isinstance(key, str)]
    raise FormatError(f"its dictionaries have more than {_MOST_NODES} entries; no MegatronBert has")


def _checked(name: str, tensor: Tensor) -> Tensor:
    """``tensor``, if it is made of plain numbers."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in KINDS
    if not plain or not tensor.dtype.is_floating_point:
        raise FormatError(f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; no plain numbers")
    return tensor


def _plain(arguments: object) -> dict[str, object]:
    """The whole numbers, numbers, truths and short texts among the arguments of a training."""
    values = getattr(arguments, "values", None) if isinstance(arguments, Bag) else arguments
    if not isinstance(values, dict):
        return {}
    kept = {key: value for key, value in values.items() if isinstance(key, str) and _is_plain(value)}
    if len(kept) > _MOST_ARGUMENTS:
        raise FormatError(f"has {len(kept)} arguments; more than {_MOST_ARGUMENTS} are not credible")
    return kept


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    if isinstance(value, float):
        return isfinite(value)
    return isinstance(value, bool) or (isinstance(value, int) and abs(value) < _LARGEST_NUMBER)


def _version(content: Mapping[str, object]) -> float:
    """Checkpoint version; a file without one is of version 0."""
    version = content.get("checkpoint_version", 0)
    if isinstance(version, bool) or not isinstance(version, int | float):
        raise FormatError(f"its checkpoint_version is a {type(version).__name__}, not a number")
    return float(version)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
