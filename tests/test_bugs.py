"""Bugs that were fixed, each by the test that stays; most stand beside their subject:

- the gradient norm of a float64 model squared the gradients in place:
  `tests/parallel/test_gradients.py::test_norm_leaves_the_gradients_alone`;
- the norm counted replicated tensors once per tensor rank:
  `tests/parallel/test_gradients.py::test_norm_counts_every_parameter_once_and_clip_equals_torch`;
- `load_state_dict` did not find the fused query, key and value under Hugging Face's names:
  `tests/model/test_state_dict.py::test_state_dict_loads_back`; on a tensor rank, here;
- an id between the size of the vocabulary and `model.vocab_size` was taken for a word:
  `tests/training/test_bad_input.py::test_ids_beyond_the_vocabulary_are_named_with_sentence_and_id`;
- a `model.pad_token_id` that is not the one of the vocabulary was taken:
  `tests/training/test_bad_input.py::test_another_padding_token_than_the_one_of_the_vocabulary_is_refused`.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from megatron_bert_tp.checkpoint.directories import latest_checkpoint, step_directory
from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition
from megatron_bert_tp.training.processes import keep_freed_memory
from tests.support import ODD_SHAPE


@pytest.mark.parametrize("rank", range(4))
def test_the_share_of_a_tensor_rank_loads_back_under_the_names_of_hugging_face(rank):
    axis, (_, plan) = Axis("tensor", (0, 1, 2, 3), rank), partition(ODD_SHAPE.num_hidden_layers, 2)
    stage, fresh = (MegatronBertStage(ODD_SHAPE, plan, axis=axis) for _ in range(2))
    initialise_(stage, seed=1)
    state = stage.state_dict()
    assert "bert.encoder.layer.4.attention.self.key.weight" in state
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), stage.parameters(), strict=True))


def test_every_memory_setting_is_made_though_one_is_refused(monkeypatch):
    """The first refusal left the others unmade."""
    made: list[int] = []
    library = SimpleNamespace(mallopt=lambda key, _value: made.append(key) or len(made) > 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    monkeypatch.setattr("sys.platform", "linux")
    assert not keep_freed_memory()
    assert len(made) == 3


def test_checkpoints_without_a_pointer_are_not_taken_for_none(tmp_path):
    # A run whose `latest` was removed began anew at step 0 beside its checkpoints.
    for step in (3, 10, 6):
        step_directory(tmp_path, step).mkdir()
    assert latest_checkpoint(tmp_path) == step_directory(tmp_path, 10)
