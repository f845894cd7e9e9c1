"""Stages whose dropout is computed by Triton kernels: in Triton's interpreter, and on a GPU where there is one."""

import pytest

from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis
from megatron_bert_tp.pipeline.partition import partition
from tests.parallel.triton_checks.processes import check, needs_gpu, needs_triton
from tests.support import ODD_SHAPE


@needs_triton
@pytest.mark.slow  # a minute; the kernels themselves are in the quick set
def test_stages_in_the_interpreter(tmp_path):
    check("stage", tmp_path, is_interpreted=True)


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_stages_on_a_gpu(tmp_path):
    check("stage", tmp_path, is_interpreted=False)


def test_who_computes_dropout_is_given_and_torch_where_it_is_not():
    plan, axis = partition(ODD_SHAPE.num_hidden_layers, 1)[0], Axis.alone("tensor")
    assert MegatronBertStage(ODD_SHAPE, plan, axis=axis).kernels == "torch"
    assert MegatronBertStage(ODD_SHAPE, plan, axis=axis, kernels="triton").kernels == "triton"
