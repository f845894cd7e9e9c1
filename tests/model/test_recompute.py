"""What is computed again, or put off, changes no bit of any gradient; and it does keep less."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.model.recompute import Recompute
from megatron_bert_tp.parallel.mesh import Axis
from tests.model.stages import SMALL, Model, Way, batches_of, built, kept_of, loss_of, run_all
from tests.support import with_dropout

RECOMPUTES = {
    "none": Recompute(),
    "selective": Recompute("selective"),
    "full": Recompute("full"),
    "selective every 2": Recompute("selective", every=2),
    "full every 2": Recompute("full", every=2),
}
MODELS = {
    "dropout": Model(),
    "no dropout": Model(with_dropout(SMALL, 0.0)),
    "packed": Model(is_packed=True),
    "distances": Model(replace(with_dropout(SMALL), position_embedding_type="relative_key")),
    "float32": Model(dtype=torch.float32),
    "packed, float32, no dropout": Model(with_dropout(SMALL, 0.0), dtype=torch.float32, is_packed=True),
    "bfloat16": Model(dtype=torch.bfloat16),
    "untied": Model(replace(with_dropout(SMALL), tie_word_embeddings=False)),
}
LAYOUTS = {"one": Way(), "tensor 2": Way(tensor=2), "split": Way(tensor=2, splits_sequence=True)}


@pytest.mark.parametrize("layout", ["one", "tensor 2", pytest.param("split", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_the_same_to_the_bit(ranks, layout):
    way = LAYOUTS[layout]
    jobs = {
        (model, recompute, puts_off): (
            MODELS[model], replace(way, recompute=RECOMPUTES[recompute], puts_off=puts_off)
        )
        for model, recompute, puts_off in product(MODELS, RECOMPUTES, (False, True))
    }
    for answer in ranks.run(way.tensor, run_all, jobs):
        for (model, recompute, puts_off), result in answer.items():
            truth, case = answer[model, "none", False], (model, recompute, puts_off)
            assert result.losses == truth.losses, case
            assert len(result.gradients) == len(truth.gradients) > 20, case
            for ours, theirs in zip(result.gradients, truth.gradients, strict=True):
                assert ours.name == theirs.name
                assert torch.equal(ours.values, theirs.values), (*case, ours.name)


def kept_sizes(recompute: Recompute) -> list[int]:
    return kept_of(Model(dtype=torch.float32), Way(recompute=recompute), Axis.alone("tensor"))


# 3 samples of 13 tokens, 4 heads: probabilities and their mask of dropout.
PROBABILITIES = 3 * 4 * 13 * 13
HIDDEN = 3 * 13 * SMALL.hidden_size


def test_selective_keeps_nothing_of_the_size_of_probabilities():
    everything, selective = kept_sizes(Recompute()), kept_sizes(Recompute("selective"))
    assert everything.count(PROBABILITIES) == 2 * SMALL.num_hidden_layers
    assert selective.count(PROBABILITIES) == 0
    # Queries, keys and values once each, and the joined heads, as without; not the heads before they are joined.
    assert selective.count(3 * HIDDEN) == everything.count(3 * HIDDEN) == SMALL.num_hidden_layers
    assert sum(selective) < sum(everything)


def test_every_second_layer_keeps_the_probabilities():
    # Layers 0 and 2 of three compute again.
    assert kept_sizes(Recompute("selective", every=2)).count(PROBABILITIES) == 2


def test_full_keeps_only_the_inputs_of_layers():
    full, without = kept_sizes(Recompute("full")), kept_sizes(Recompute())
    assert full.count(3 * HIDDEN) == full.count(PROBABILITIES) == 0
    # The inputs of the layers and of the final LayerNorm, and the mask of dropout of the embeddings.
    assert full.count(HIDDEN) == SMALL.num_hidden_layers + 2
    assert sum(full) < sum(without) / 5


def test_recomputes_of_the_encoder_is_the_full_recompute():
    encoder = built(Model(), Way(), Axis.alone("tensor")).bert.encoder
    assert encoder.recomputes is False
    encoder.recomputes = True
    assert encoder.recompute == Recompute("full")
    assert encoder.recomputes is True
    encoder.recomputes = False
    assert encoder.recompute == Recompute()


def test_evaluation_computes_nothing_again():
    stage = built(Model(), Way(recompute=Recompute("full")), Axis.alone("tensor")).eval()
    calls = []
    stage.bert.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    (batch,) = batches_of(Model(), [(13, 9, 11)])
    loss_of(stage, stage(None, batch), batch).backward()
    assert len(calls) == 1


def test_unknown_kinds_and_intervals_are_refused():
    with pytest.raises(ConfigError, match="recompute is 'some'; it must be one of none, selective, full"):
        Recompute("some")
    with pytest.raises(ConfigError, match="every is 0; it must be at least 1"):
        Recompute("full", every=0)
