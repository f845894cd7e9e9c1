"""Import, save at a random layout, load at another, export: for any model the bytes are those of the start."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.directories import Keep, partial_directory
from megatron_bert_tp.checkpoint.load import load_parts_
from megatron_bert_tp.checkpoint.model import ARCHITECTURE, MODEL
from megatron_bert_tp.checkpoint.read import Checkpoint, Reader
from megatron_bert_tp.checkpoint.save import commit_checkpoint, prepare_directory, write_rectangles
from megatron_bert_tp.checkpoint.slices import rectangles
from megatron_bert_tp.family.files import reader_of
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_writer import write_directory
from megatron_bert_tp.model.shape import (
    ACTIVATIONS,
    HEADS,
    POSITION_EMBEDDING_TYPES,
    Head,
    ModelShape,
    tensor_shapes,
)
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition
from tests.formats.conftest import assert_same_bytes

NUM_MODELS = 200
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def any_model(draw: random.Random) -> tuple[ModelShape, Head]:
    """Odd vocabularies, layers that stages do not divide, 1 to 8 heads, every choice that there is."""
    heads = draw.choice((1, 2, 3, 4, 5, 6, 7, 8))
    is_decoder = draw.random() < 0.3
    shape = ModelShape(
        vocab_size=draw.randrange(3, 140),
        hidden_size=heads * draw.choice((1, 2, 4)),
        num_hidden_layers=draw.randrange(1, 6),
        num_attention_heads=heads,
        intermediate_size=heads * draw.randrange(1, 6),
        max_position_embeddings=draw.randrange(2, 12),
        type_vocab_size=draw.randrange(1, 4),
        tie_word_embeddings=draw.random() < 0.6,
        hidden_act=draw.choice(ACTIVATIONS),
        position_embedding_type=draw.choice(POSITION_EMBEDDING_TYPES),
        is_decoder=is_decoder,
        add_cross_attention=is_decoder and draw.random() < 0.5,
        num_labels=draw.choice((1, 2, 3, 7)),
    )
    return shape, draw.choice(list(HEADS.values()))


def any_layout(draw: random.Random, shape: ModelShape) -> tuple[int, int]:
    """Tensor and pipeline sizes that the model allows."""
    heads, inside = shape.num_attention_heads, shape.intermediate_size
    tensor = draw.choice([size for size in range(1, 9) if heads % size == 0 and inside % size == 0])
    pipeline = 1 if shape.add_cross_attention else draw.randrange(1, shape.num_hidden_layers + 1)
    return tensor, pipeline


def stages(shape: ModelShape, head: Head, layout: tuple[int, int], dtype: torch.dtype) -> list[MegatronBertStage]:
    tensor, pipeline = layout
    return [
        MegatronBertStage(shape, plan, axis=Axis("tensor", tuple(range(tensor)), rank), head=head, dtype=dtype)
        for plan in partition(shape.num_hidden_layers, pipeline)
        for rank in range(tensor)
    ]


def load(read: Reader, shape: ModelShape, head: Head, layout: tuple[int, int], dtype: torch.dtype):
    made = stages(shape, head, layout, dtype)
    for stage in made:
        load_parts_(stage.parts(), read)
    return made


def save(root: Path, made: list[MegatronBertStage]) -> None:
    partial = partial_directory(root, 1, "made")
    prepare_directory(partial)
    for rank, stage in enumerate(made):
        held = rectangles("weight", [(part, part.view(part.parameter)) for part in stage.parts()])
        write_rectangles(partial, rank, held)
    facts = {MODEL: asdict(made[0].shape), ARCHITECTURE: made[0].head.architecture}
    commit_checkpoint(partial, 1, len(made), facts=facts, attachments={}, keep=Keep(last=1))


def any_tensors(shape: ModelShape, head: Head, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator).to(dtype) for name, size in tensor_shapes(shape, head).items()
    }


@pytest.mark.parametrize("tenth", range(10))
def test_import_save_load_export_is_the_identity(tmp_path, tenth):
    for number in range(tenth * NUM_MODELS // 10, (tenth + 1) * NUM_MODELS // 10):
        draw, folder = random.Random(number), tmp_path / str(number)
        (shape, head), dtype = any_model(draw), draw.choice(DTYPES)
        start = any_tensors(shape, head, dtype, number)
        write_directory(folder / "start", shape, reader_of(start), {}, head=head)
        from_huggingface(folder / "start", folder / "imported")
        checkpoint = Checkpoint.open(folder / "imported")
        save(folder / "first", load(checkpoint.weight, shape, head, any_layout(draw, shape), dtype))
        checkpoint = Checkpoint.open(folder / "first")
        save(folder / "second", load(checkpoint.weight, shape, head, any_layout(draw, shape), dtype))
        to_huggingface(folder / "second", folder / "end")
        assert_same_bytes(folder / "start", folder / "end")
        settings = [json.loads((folder / name / "config.json").read_text()) for name in ("start", "end")]
        assert settings[0] == settings[1]
        found = HuggingFaceDirectory.open(folder / "end")
        assert (found.shape, found.head) == (shape, head), number
        for name, size in tensor_shapes(shape, head).items():
            read = found.read(name, (0,) * len(size), size)
            assert read.dtype == dtype
            assert torch.equal(read, start[name]), name


def test_the_models_are_as_different_as_they_are_meant_to_be():
    models = [any_model(random.Random(number)) for number in range(NUM_MODELS)]
    assert {head.architecture for _, head in models} == set(HEADS)
    assert {shape.hidden_act for shape, _ in models} == set(ACTIVATIONS)
    assert {shape.position_embedding_type for shape, _ in models} == set(POSITION_EMBEDDING_TYPES)
    assert {(shape.tie_word_embeddings, shape.add_cross_attention) for shape, _ in models} == {
        (tied, crossed) for tied in (True, False) for crossed in (True, False)
    }
    layouts = [any_layout(random.Random(number), shape) for number, (shape, _) in enumerate(models)]
    assert any(shape.vocab_size % tensor for (shape, _), (tensor, _) in zip(models, layouts, strict=True))
    assert any(shape.num_hidden_layers % p for (shape, _), (_, p) in zip(models, layouts, strict=True))
