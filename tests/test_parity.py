"""`transformers`' MegatronBertForPreTraining with the same random weights gives the same numbers."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.data.batch import Batch
from megatron_bert_tp.model.shape import ModelShape, tensor_shapes
from tests.comparison import is_key_bias, join_steps, relative_errors
from tests.support import IGNORED, ODD_SHAPE, Layout, Recipe, batches_of_step, predict
from tests.trainers import train_on_made

RECIPE = Recipe(dtype=torch.float32, num_steps=10)
UNTIED = replace(RECIPE, shape=replace(ODD_SHAPE, tie_word_embeddings=False), num_steps=3)
LAYOUTS = [Layout(), Layout(tensor=2), Layout(tensor=4), Layout(pipeline=2, tensor=2)]
LOGITS = 1e-5
GRADIENTS = 1e-4
WEIGHTS = 1e-4


@dataclass(frozen=True)
class Reference:
    """What a plain loop over the `transformers` model gives."""

    initial: dict[str, Tensor]
    logits: tuple[Tensor, Tensor]
    losses: list[float]
    first_gradients: dict[str, Tensor]
    key_bias_gradient: float
    weights: dict[str, Tensor]


def name_of(layout: Layout) -> str:
    return f"pipeline{layout.pipeline}-tensor{layout.tensor}"


def build_transformers_model(shape: ModelShape):
    # Imported here: the worker processes import this file too, and have no need of transformers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import MegatronBertConfig, MegatronBertForPreTraining

        sizes = {name: value for name, value in vars(shape).items() if name != "num_labels"}
        model = MegatronBertForPreTraining._from_config(MegatronBertConfig(**sizes), attn_implementation="eager")
    return model.train()


def parameters_by_name(model, shape: ModelShape) -> dict[str, Tensor]:
    """Parameters under the names of this package's tensors.

    With untied embeddings `transformers` unties the two names of the decoder's bias as well, and the model then
    computes with ``decoder.bias`` and leaves ``cls.predictions.bias`` without use.
    """
    parameters = dict(model.named_parameters())
    if not shape.tie_word_embeddings:
        parameters["cls.predictions.bias"] = parameters["cls.predictions.decoder.bias"]
    return {name: parameters[name] for name in tensor_shapes(shape)}


def fill_at_random_(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random values in every tensor, biases and LayerNorms too; returns a copy by name."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.normal_(1.0 if name.endswith(("ln.weight", "LayerNorm.weight")) else 0.0, 0.2)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def as_one_batch(batches: list[Batch]) -> dict[str, Tensor]:
    """The microbatches of a step as one padded batch with labels at every position."""
    width = max(batch.input_ids.shape[1] for batch in batches)
    fields: dict[str, list[Tensor]] = {
        key: [] for key in ("input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label")
    }
    for batch in batches:
        labels = torch.full(batch.input_ids.shape, IGNORED)
        is_real = batch.masked_labels != IGNORED
        labels.view(-1)[batch.masked_positions[is_real]] = batch.masked_labels[is_real]
        mask = torch.ones_like(labels) if batch.attention_mask is None else batch.attention_mask.long()
        padding = (0, width - labels.shape[1])
        fields["input_ids"].append(F.pad(batch.input_ids, padding, value=0))
        fields["token_type_ids"].append(F.pad(batch.token_type_ids, padding))
        fields["attention_mask"].append(F.pad(mask, padding))
        fields["labels"].append(F.pad(labels, padding, value=IGNORED))
        fields["next_sentence_label"].append(batch.next_sentence_labels)
    return {key: torch.cat(values) for key, values in fields.items()}


def groups(parameters: dict[str, Tensor]) -> list[dict[str, object]]:
    """As in BERT's own training: a decay of 0.01, but not on biases and LayerNorms, which have one dim."""
    by_dim = [[p for p in parameters.values() if (p.dim() > 1) == is_decayed] for is_decayed in (True, False)]
    return [{"params": by_dim[0], "weight_decay": 0.01}, {"params": by_dim[1], "weight_decay": 0.0}]


def run_reference(recipe: Recipe) -> Reference:
    model = build_transformers_model(recipe.shape)
    parameters = parameters_by_name(model, recipe.shape)
    initial = fill_at_random_(parameters)
    optimizer = torch.optim.AdamW(groups(parameters), lr=recipe.rate, eps=1e-8)
    losses, gradients, key_bias = [], [], []
    for step in range(recipe.num_steps):
        batch = as_one_batch(batches_of_step(step, shape=recipe.shape))
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        if step == 0:
            masked = output.prediction_logits[batch["labels"] != IGNORED].detach()
            logits = masked, output.seq_relationship_logits.detach()
        losses.append(output.loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
        key_bias += [g.abs().max().item() for name, g in gradients[-1].items() if is_key_bias(name)]
        optimizer.step()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Reference(initial, logits, losses, gradients[0], max(key_bias), weights)


@pytest.fixture(scope="module")
def reference_of() -> Callable[[Recipe], Reference]:
    known: dict[Recipe, Reference] = {}

    def reference_of(recipe: Recipe) -> Reference:
        if recipe not in known:
            known[recipe] = run_reference(recipe)
        return known[recipe]

    return reference_of


def joined_logits(answers: list[list[tuple[Tensor, Tensor]]], layout: Layout) -> tuple[Tensor, Tensor]:
    """Masked logits of real labels over the logical vocabulary, and pair logits, of a whole step."""
    last = answers[-layout.tensor :]
    masked = [torch.cat([logits for logits, _ in shards], -1) for shards in zip(*last, strict=True)]
    batches = batches_of_step(0, shape=RECIPE.shape)
    rows = [part[b.masked_labels != IGNORED] for part, b in zip(masked, batches, strict=True)]
    return torch.cat(rows)[:, : RECIPE.shape.vocab_size], torch.cat([pairs for _, pairs in last[0]])


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_logits_equal_transformers(ranks, reference_of, layout):
    reference = reference_of(RECIPE)
    found = joined_logits(ranks.run(layout.world, predict, RECIPE, layout, reference.initial), layout)
    for ours, theirs in zip(found, reference.logits, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < LOGITS


def assert_follows_transformers(
    ranks, settings: Path, reference: Reference, recipe: Recipe, layout: Layout
) -> None:
    steps = join_steps(ranks.run(layout.world, train_on_made, settings, recipe, layout, reference.initial))
    for step, loss in zip(steps, reference.losses, strict=True):
        assert step.losses.loss == pytest.approx(loss, rel=GRADIENTS)
    errors = relative_errors(steps[0].gradients, reference.first_gradients)
    assert {name: e for name, e in errors.items() if e > GRADIENTS and not is_key_bias(name)} == {}
    errors = relative_errors(steps[-1].weights, reference.weights)
    assert {name: e for name, e in errors.items() if e > WEIGHTS and not is_key_bias(name)} == {}
    assert_same_key_biases(steps, reference, recipe)


def assert_same_key_biases(steps, reference: Reference, recipe: Recipe) -> None:
    """Adam moves by at most rate x |g| / eps, and by the rate; the two runs may go opposite ways."""
    ours = max(g.abs().max().item() for s in steps for name, g in s.gradients.items() if is_key_bias(name))
    noise = max(ours, reference.key_bias_gradient)
    # Rounding of the sums that cancel: a thousand units in the last place of the largest gradient.
    largest = max(g.abs().max().item() for g in reference.first_gradients.values())
    assert noise < 1000 * torch.finfo(recipe.dtype).eps * largest
    bound = 2 * recipe.num_steps * recipe.rate * min(1, noise / 1e-8)
    for name in filter(is_key_bias, reference.weights):
        assert (steps[-1].weights[name] - reference.weights[name]).abs().max() <= bound


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_ten_steps_of_adamw_equal_a_plain_loop_over_transformers(ranks, data, reference_of, layout):
    assert_follows_transformers(ranks, data, reference_of(RECIPE), RECIPE, layout)


def test_untied_embeddings_follow_transformers_too(ranks, data, reference_of):
    assert_follows_transformers(ranks, data, reference_of(UNTIED), UNTIED, Layout(pipeline=2, tensor=2))


def test_padding_row_is_not_trained_by_the_lookup(ranks, data, reference_of):
    """With untied weights it has no gradient at all, though [PAD] stands among the attended tokens."""
    recipe = replace(UNTIED, num_steps=1)
    name = "bert.embeddings.word_embeddings.weight"
    (step,) = join_steps(ranks.run(2, train_on_made, data, recipe, Layout(tensor=2)))
    assert not step.gradients[name][0].any()
    assert not reference_of(UNTIED).first_gradients[name][0].any()
