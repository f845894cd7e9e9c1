"""The command line of `python -m megatron_bert_tp.convert`, without torch, so that help comes at once."""

import argparse
import re
from pathlib import Path

PROGRAM = "python -m megatron_bert_tp.convert"
DTYPES = ("float32", "bfloat16", "float16", "float64")
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
_UNITS = {
    **{name: 10 ** (3 * power) for power, name in enumerate(("", "KB", "MB", "GB", "TB"))},
    **{name: 2 ** (10 * power) for power, name in enumerate(("B", "KIB", "MIB", "GIB", "TIB"))},
}
_USAGE = """%(prog)s from-hf DIRECTORY OUT [--dtype D]
       %(prog)s to-hf CHECKPOINT OUT [--dtype D] [--max-shard-size 5GB]
       %(prog)s from-ngc SOURCE OUT [--vocab-size N] [--hf-epsilon] [--hidden-act A]
                 [--num-attention-heads N] [--dtype D] [--tokenizer FILE]
       %(prog)s to-ngc SOURCE OUT --tensor T --pipeline P [--dtype D]
       %(prog)s inspect PATH [--tensors]"""


def parser() -> argparse.ArgumentParser:
    """Parser of all five commands; ``command`` is the one that was chosen."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=_USAGE,
        description="Checkpoints, Hugging Face directories and Megatron-LM files, one into another.",
        epilog="OUT must not exist, or be empty. `COMMAND --help` is this text.",
        allow_abbrev=False,
    )
    ways = made.add_subparsers(prog=PROGRAM, dest="command", required=True, metavar="COMMAND")
    _add_from_huggingface_(ways)
    _add_to_huggingface_(ways)
    _add_from_megatron_(ways)
    _add_to_megatron_(ways)
    inspect = ways.add_parser("inspect", help="what any of these is, and whether it is whole", allow_abbrev=False)
    inspect.add_argument("path", type=Path, metavar="PATH", help="a file or a folder of any of these formats")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor with shape and number format")
    return made


def num_bytes(text: str) -> int:
    """Bytes of a size such as ``5GB`` (decimal) or ``5GiB`` (binary)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper(), 0) if match else 0
    size = int(float(match[1]) * unit) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 5GB or 500MB")
    return size


def _add_from_huggingface_(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    way = ways.add_parser("from-hf", help="a Hugging Face directory to a checkpoint of step 0", allow_abbrev=False)
    way.add_argument(
        "directory",
        type=Path,
        metavar="DIRECTORY",
        help="config.json with model.safetensors or pytorch_model.bin, or their shards",
    )
    _add_out_(way)


def _add_to_huggingface_(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "a checkpoint to a directory that transformers reads"
    way = ways.add_parser("to-hf", help=text, allow_abbrev=False)
    way.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint, folder of checkpoints, or folder of a run",
    )
    _add_out_(way)
    way.add_argument(
        "--max-shard-size", type=num_bytes, metavar="SIZE", help="cut the weights into files of at most this size"
    )


def _add_from_megatron_(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "NVIDIA's megatron_bert_345m or any Megatron-LM checkpoint to a Hugging Face directory"
    way = ways.add_parser("from-ngc", help=text, allow_abbrev=False)
    way.add_argument("source", type=Path, metavar="SOURCE", help="zip, folder or .pt file")
    _add_out_(way)
    way.add_argument("--vocab-size", type=_natural, metavar="N", help="entries that are no padding")
    way.add_argument(
        "--hf-epsilon", action="store_true", help="write the LayerNorm epsilon of Hugging Face's converter, 1e-12"
    )
    way.add_argument("--hidden-act", choices=ACTIVATIONS, help="activation, where the file does not say it")
    way.add_argument(
        "--num-attention-heads", type=_natural, metavar="N", help="heads, where the file does not say them"
    )
    way.add_argument("--tokenizer", type=Path, metavar="FILE", help="vocab.txt to put beside it")


def _add_to_megatron_(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    way = ways.add_parser("to-ngc", help="to a folder that Megatron-LM reads", allow_abbrev=False)
    way.add_argument("source", type=Path, metavar="SOURCE", help="Hugging Face directory or checkpoint")
    _add_out_(way)
    way.add_argument("--tensor", type=_natural, required=True, metavar="T", help="tensor size to write for")
    way.add_argument("--pipeline", type=_natural, required=True, metavar="P", help="pipeline size to write for")


def _add_out_(way: argparse.ArgumentParser) -> None:
    way.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    way.add_argument("--dtype", choices=DTYPES, help="number format to write, instead of that of the source")


def _natural(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
