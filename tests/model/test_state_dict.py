"""Names: the tensors of a stage are called as in Hugging Face, whatever the storage."""

import pytest
import torch
from torch import nn

from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.shape import tensor_shapes, tied_names
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition
from tests.support import ODD_SHAPE

ALONE = Axis.alone("tensor")
WHOLE = partition(ODD_SHAPE.num_hidden_layers, 1)[0]


@pytest.fixture
def stage() -> MegatronBertStage:
    stage = MegatronBertStage(ODD_SHAPE, WHOLE, axis=ALONE)
    initialise_(stage, seed=1)
    return stage


def test_state_dict_has_the_names_of_hugging_face(stage):
    assert stage.state_dict().keys() == tensor_shapes(ODD_SHAPE).keys() | tied_names(ODD_SHAPE).keys()


def test_state_dict_loads_back(stage):
    fresh = MegatronBertStage(ODD_SHAPE, WHOLE, axis=ALONE)
    fresh.load_state_dict(stage.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), stage.parameters(), strict=True))


def test_missing_block_is_reported(stage):
    state = stage.state_dict()
    del state["bert.encoder.layer.2.attention.self.key.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer\.2\.attention\.self\.query_key_value\.weight"):
        MegatronBertStage(ODD_SHAPE, WHOLE, axis=ALONE).load_state_dict(state)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_rectangles_of_all_ranks_cover_every_tensor_once(size, num_stages):
    """One rank answers for each element; tied copies and replicas do not count again."""
    times = {name: torch.zeros(shape) for name, shape in tensor_shapes(ODD_SHAPE).items()}
    for plan in partition(ODD_SHAPE.num_hidden_layers, num_stages):
        for rank in range(size):
            stage = MegatronBertStage(ODD_SHAPE, plan, axis=Axis("tensor", tuple(range(size)), rank))
            for part in stage.parts():
                if part.is_counted_here:
                    part.cut(times[part.name]).add_(1)
    assert [name for name, count in times.items() if not (count == 1).all()] == []


def test_tied_embeddings_share_storage_but_not_gradients(stage):
    lookup, projection = stage.bert.embeddings.word_embeddings.weight, stage.cls.predictions.decoder.weight
    assert isinstance(projection, nn.Parameter)
    assert lookup is not projection
    assert lookup.data_ptr() == projection.data_ptr()
    tied = stage.tied()
    assert tied.lookup is lookup
    assert tied.projection is projection


def test_row_of_the_padding_token_starts_at_zero(stage):
    weight = stage.bert.embeddings.word_embeddings.weight
    assert not weight[ODD_SHAPE.pad_token_id].any()
    assert weight[1 : ODD_SHAPE.vocab_size].any(-1).all()
    assert not weight[ODD_SHAPE.vocab_size :].any(), "rows past the vocabulary"
