"""A checkpoint has no layout: whatever saved it, whatever reads it, the numbers are the same."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_bert_tp.checkpoint.directories import Keep
from megatron_bert_tp.checkpoint.load import load_parts_, load_rectangles_
from megatron_bert_tp.checkpoint.model import check_model
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.save import save_checkpoint
from megatron_bert_tp.checkpoint.slices import Rectangle
from megatron_bert_tp.errors import CheckpointError
from megatron_bert_tp.model.initialisation import initial_tensor
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.agreement import Agreement
from tests.checkpoint.layouts import ODD, TINY, OneOfThreads, held, in_threads, save, stages, whole
from tests.support import TIMEOUT

UNTIED = ModelShape(1003, 16, 5, 4, 32, 16, 2, tie_word_embeddings=False)
LAYOUTS = [(1, 1), (2, 2), (4, 1), (1, 5)]
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def truth(shape: ModelShape, seed: int = 3) -> dict[str, torch.Tensor]:
    """Initial weights, whole, straight from seed and name."""
    tensors = {}
    for name, size in tensor_shapes(shape).items():
        tensors[name] = initial_tensor(name, size, seed=seed, deviation=shape.initializer_range)
        if name.endswith("word_embeddings.weight"):
            tensors[name][shape.pad_token_id] = 0
    return tensors


@pytest.mark.parametrize("shape", [ODD, UNTIED, TINY])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_every_layout_saves_the_whole_unpadded_tensors(tmp_path, shape, tensor, pipeline):
    pipeline = min(pipeline, shape.num_hidden_layers)
    checkpoint = Checkpoint.open(save(tmp_path, shape, tensor=tensor, pipeline=pipeline))
    checkpoint.verify()
    check_model(checkpoint, shape)
    assert checkpoint.shapes("weight") == tensor_shapes(shape)
    for name, tensor_read in whole(checkpoint.weight, tensor_shapes(shape)).items():
        assert torch.equal(tensor_read, truth(shape)[name]), name


@pytest.mark.parametrize("shape", [ODD, UNTIED])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_what_one_layout_saved_every_layout_loads(tmp_path, shape, tensor, pipeline):
    checkpoint = Checkpoint.open(save(tmp_path, shape, tensor=2, pipeline=2, kinds=KINDS))
    expected = stages(shape, tensor=tensor, pipeline=pipeline)
    for stage, wanted in zip(stages(shape, tensor=tensor, pipeline=pipeline, seed=4), expected, strict=True):
        load_parts_(stage.parts(), checkpoint.weight)
        assert_equal_parameters(stage, wanted)
        moments = [(part, torch.zeros(part.local_shape)) for part in stage.parts()]
        load_rectangles_("exp_avg_sq", moments, checkpoint)
        for (part, found), same in zip(moments, wanted.parts(), strict=True):
            assert torch.equal(found, 3 * same.view(same.parameter)), part.name


def assert_equal_parameters(stage: MegatronBertStage, wanted: MegatronBertStage) -> None:
    for (name, value), other in zip(stage.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_any_rectangle_can_be_read(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path, ODD, tensor=4))
    name = "bert.embeddings.word_embeddings.weight"
    read = checkpoint.weight(name, (250, 3), (520, 7))  # over three of the four files
    assert torch.equal(read, truth(ODD)[name][250:770, 3:10])
    assert checkpoint.weight(name, (5, 0), (0, 16)).shape == (0, 16)


def test_a_rectangle_outside_the_tensor_is_an_error(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path, ODD))
    with pytest.raises(CheckpointError, match=r"\(1000, 0\) of size \(4, 16\).*\(1003, 16\)"):
        checkpoint.weight("bert.embeddings.word_embeddings.weight", (1000, 0), (4, 16))
    with pytest.raises(CheckpointError, match=r"inside its shape \(1003, 16\)"):
        checkpoint.weight("bert.embeddings.word_embeddings.weight", (0,), (4,))
    with pytest.raises(CheckpointError, match="no tensor weight/nothing"):
        checkpoint.weight("nothing", (0,), (1,))


@pytest.mark.parametrize("num_owners", [2, 3, 8])
def test_what_owners_of_rows_saved_together_any_layout_loads(tmp_path, num_owners):
    """Rows shared out among data ranks: few tensors have as many as divide, some owners have none of a tensor."""
    path = save(tmp_path, ODD, tensor=2, pipeline=2, num_owners=num_owners, kinds=KINDS)
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    for name, found in whole(checkpoint.weight, tensor_shapes(ODD)).items():
        assert torch.equal(found, truth(ODD)[name]), name


def test_a_checkpoint_without_optimizer_state_says_so(tmp_path):
    checkpoint = Checkpoint.open(save(tmp_path, ODD))
    with pytest.raises(CheckpointError, match=r"holds no exp_avg.*model\.weights="):
        load_rectangles_("exp_avg", [], checkpoint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_number_formats_and_scalars_are_kept(tmp_path, dtype):
    tensors = [Rectangle("a/matrix", (2, 3), (0, 0), torch.arange(6).reshape(2, 3).T.contiguous().T.to(dtype))]
    tensors.append(Rectangle("a/scalar", (), (), torch.tensor(7).to(dtype)))
    path = save_checkpoint(tmp_path, 0, tensors, **ALONE).path
    checkpoint = Checkpoint.open(path)
    assert torch.equal(checkpoint.read("a/matrix", (0, 1), (2, 2)), torch.tensor([[1, 2], [4, 5]]).to(dtype))
    assert torch.equal(checkpoint.read("a/scalar", (), ()), torch.tensor(7).to(dtype))


ALONE = {"facts": {}, "attachments": {}, "agreement": Agreement.alone(), "keep": Keep(last=1)}


def test_ranks_without_rectangles_write_no_tensor_file(tmp_path):
    stage = stages(ODD)[0]

    def save_as(agreement: OneOfThreads) -> None:
        given = held(stage) if agreement.rank == 1 else []
        save_checkpoint(tmp_path, 5, given, **{**ALONE, "agreement": agreement})

    assert in_threads(3, save_as) == [None] * 3
    assert sorted(path.name for path in (tmp_path / "step_00000005").iterdir()) == [
        "manifest.json",
        "rank_00001.safetensors",
    ]


def save_as_rank(root: Path) -> str:
    rank = dist.get_rank()
    stage = stages(ODD, tensor=2, pipeline=2)[rank]
    agreement = Agreement.of_world(TIMEOUT)
    return str(save_checkpoint(root, 7, held(stage), **{**ALONE, "agreement": agreement}).path)


def test_four_real_ranks_save_what_one_process_saves(tmp_path, ranks):
    assert ranks.run(4, save_as_rank, tmp_path) == [str(tmp_path / "step_00000007")] * 4
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    assert len(checkpoint.manifest.files) == 4
    for name, value in whole(checkpoint.weight, tensor_shapes(ODD)).items():
        assert torch.equal(value, truth(ODD)[name]), name
