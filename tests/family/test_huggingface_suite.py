"""What Hugging Face's own test-suite asks of each class, at its sizes and in one process."""

import pytest
import torch
import transformers
from torch import Tensor
from transformers.utils import logging

import megatron_bert_tp
from megatron_bert_tp import MegatronBertConfig
from megatron_bert_tp.errors import ArgumentError
from tests.family.cases import ARCHITECTURES, BASE, CAUSAL, CHOICE, MASKED, PRETRAINING
from tests.family.hugging_face import (
    BATCH,
    CHOICES,
    HEADS,
    HIDDEN,
    LAYERS,
    NO_DROPOUT,
    SHAPES,
    SIZES,
    WIDTH,
    inputs_of,
    labels_of,
    make,
    settings_of,
)
from tests.family.passes import all_outputs, objective_of
from tests.sources import assert_none

logging.disable_progress_bar()
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}
each_class = pytest.mark.parametrize("architecture", ARCHITECTURES)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@each_class
def test_outputs_have_the_shapes_of_hugging_face(architecture):
    found = all_outputs(make(architecture)(**inputs_of(architecture)))
    assert {name: tuple(value.shape) for name, value in found.items()} == SHAPES[architecture]
    assert_none(f"{name} is not finite" for name, value in found.items() if not value.isfinite().all())


@each_class
def test_labels_add_a_loss_that_is_one_number(architecture):
    output = make(architecture)(**inputs_of(architecture), **labels_of(architecture))
    expected = SHAPES[architecture] | ({} if architecture == BASE else {"loss": ()})
    assert {name: tuple(value.shape) for name, value in all_outputs(output).items()} == expected


@each_class
def test_only_ids_are_needed_and_the_defaults_are_ones_and_segment_zero(architecture):
    model, ids = make(architecture), inputs_of(architecture)["input_ids"]
    given = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    # A mask, even of ones, may lead to another kernel: same numbers, rounded otherwise.
    alone, explicit = all_outputs(model(ids)), all_outputs(model(ids, **given))
    assert alone.keys() == explicit.keys()
    assert all((alone[name] - explicit[name]).abs().max() < 1e-6 for name in alone)


@each_class
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_have_any_dtype(architecture, dtype):
    model, inputs = make(architecture), inputs_of(architecture)
    other = {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}
    assert_equal(all_outputs(model(**other)), all_outputs(model(**inputs)))


@each_class
def test_every_layer_gives_its_states_and_attentions(architecture):
    output = make(architecture)(**inputs_of(architecture), **EVERYTHING)
    rows = BATCH * CHOICES if architecture == CHOICE else BATCH
    assert [tuple(each.shape) for each in output.hidden_states] == [(rows, WIDTH, HIDDEN)] * (LAYERS + 1)
    assert [tuple(each.shape) for each in output.attentions] == [(rows, HEADS, WIDTH, WIDTH)] * LAYERS
    assert all(torch.allclose(each.sum(-1), torch.ones(())) for each in output.attentions)


def test_the_last_hidden_state_is_the_last_of_all_states():
    output = make(BASE)(**inputs_of(BASE), **EVERYTHING)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@each_class
def test_settings_may_ask_for_states_and_attentions(architecture):
    """As in Hugging Face, where an argument wins over the settings."""
    model, inputs = make(architecture, **EVERYTHING), inputs_of(architecture)
    asked = all_outputs(make(architecture)(**inputs, **EVERYTHING))
    assert_equal(all_outputs(model(**inputs)), asked)
    assert model(**inputs, output_attentions=False).attentions is None


@each_class
def test_without_return_dict_the_values_come_as_a_tuple(architecture):
    model, arguments = make(architecture), {**inputs_of(architecture), **labels_of(architecture), **EVERYTHING}
    values, output = model(**arguments, return_dict=False), model(**arguments)
    theirs = getattr(transformers, architecture)(transformers.MegatronBertConfig(**settings_of(architecture)))
    assert type(values) is tuple
    # Ours may say more than theirs (the two parts of a pretraining loss), after all that they say.
    expected = theirs.eval()(**arguments, return_dict=False)
    assert len(values) >= len(expected)
    for ours, their in zip(values, expected, strict=False):
        assert getattr(ours, "shape", None) == getattr(their, "shape", None)
    assert values[0].equal(output[0])


@each_class
def test_outputs_are_read_by_name_key_and_place(architecture):
    output = make(architecture)(**inputs_of(architecture), **labels_of(architecture))
    first = "last_hidden_state" if architecture == BASE else "loss"
    assert next(iter(output.keys())) == first
    assert output[0] is output[first] is getattr(output, first)
    assert output.to_tuple()[0] is output[0]
    assert all(a is b for a, b in zip(output[:2], output.to_tuple()[:2], strict=True))
    assert "attentions" not in output
    with pytest.raises(KeyError, match="attentions"):
        output["attentions"]


@each_class
def test_evaluation_is_deterministic(architecture):
    model, inputs = make(architecture), inputs_of(architecture)
    assert_equal(all_outputs(model(**inputs)), all_outputs(model(**inputs)))


@each_class
def test_training_drops_and_evaluation_does_not(architecture):
    model, inputs = make(architecture), inputs_of(architecture)
    still = all_outputs(model(**inputs))
    moved = all_outputs(model.train()(**inputs))
    assert_none(f"{name} has no dropout" for name in still if torch.equal(still[name], moved[name]))
    assert_equal(all_outputs(model.eval()(**inputs)), still)


@each_class
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_computes_about_the_same(architecture, dtype, bound):
    """Within some units in the last place of numbers up to 4 (2^-8 and 2^-11 of them); masks stay finite."""
    model, inputs = make(architecture), inputs_of(architecture)
    expected = all_outputs(model(**inputs))
    found = all_outputs(model.to(dtype)(**inputs))
    assert {value.dtype for value in found.values()} == {dtype}
    assert all((found[name].float() - expected[name]).abs().max() < bound for name in expected)


@each_class
def test_embeddings_may_be_given_for_ids(architecture):
    model, inputs = make(architecture), inputs_of(architecture)
    expected = all_outputs(model(**inputs))
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_equal(all_outputs(model(**inputs)), expected)


@each_class
def test_ids_and_embeddings_together_or_neither_are_refused(architecture):
    model, inputs = make(architecture), inputs_of(architecture)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ArgumentError, match=r"input_ids.*inputs_embeds"):
        model(**inputs, inputs_embeds=embedded)
    with pytest.raises(ArgumentError, match=r"input_ids.*inputs_embeds"):
        model(attention_mask=inputs["attention_mask"])


@each_class
def test_an_unknown_argument_is_refused(architecture):
    """Hugging Face 5 takes any and ignores it."""
    with pytest.raises(TypeError, match="head_masks"):
        make(architecture)(**inputs_of(architecture), head_masks=torch.ones(4))


# Files


@each_class
def test_saved_model_loads_with_equal_outputs(architecture, tmp_path):
    model, inputs = make(architecture), inputs_of(architecture)
    model.save_pretrained(tmp_path)
    loaded = getattr(megatron_bert_tp, architecture).from_pretrained(tmp_path)
    assert not loaded.training
    assert_equal(all_outputs(loaded(**inputs)), all_outputs(model(**inputs)))


@each_class
def test_transformers_finds_every_tensor_in_what_we_save(architecture, tmp_path):
    model, inputs = make(architecture), inputs_of(architecture)
    model.save_pretrained(tmp_path)
    theirs, told = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in told.items() if value} == {}
    ours, expected = all_outputs(model(**inputs)), all_outputs(theirs(**inputs))
    assert ours.keys() == expected.keys()
    assert all((ours[name] - expected[name]).abs().max() < 1e-5 for name in ours)


@each_class
def test_saved_settings_are_those_of_the_model(architecture, tmp_path):
    settings = settings_of(architecture)
    make(architecture).save_pretrained(tmp_path)
    loaded = MegatronBertConfig.from_pretrained(tmp_path)
    theirs = transformers.MegatronBertConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert {name: getattr(theirs, name) for name in settings} == settings
    assert theirs.architectures == [architecture]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precision_is_that_of_the_file_unless_it_is_asked_for(dtype, tmp_path):
    theirs = transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**SIZES))
    theirs.to(dtype).save_pretrained(tmp_path)
    for asked, expected in ((None, dtype), (torch.float32, torch.float32)):
        loaded = megatron_bert_tp.MegatronBertForMaskedLM.from_pretrained(tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loading_another_class_tells_the_names_that_transformers_tells(architecture, tmp_path):
    """Names new in the class, and those of the file without use in it."""
    make(PRETRAINING, is_decoder=architecture == CAUSAL).save_pretrained(tmp_path)
    ours = getattr(megatron_bert_tp, architecture).from_pretrained(tmp_path).loading_info
    _, theirs = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys"):
        # Their base class has names without the prefix.
        bare = [{name.removeprefix("bert.") for name in told[kind]} for told in (ours, theirs)]
        assert bare[0] == bare[1]


def test_settings_may_be_changed_while_loading(tmp_path):
    """As the documentation's example of a language model does it."""
    make(MASKED, **NO_DROPOUT).save_pretrained(tmp_path)
    ours = megatron_bert_tp.MegatronBertForCausalLM.from_pretrained(tmp_path, is_decoder=True)
    theirs = transformers.MegatronBertForCausalLM.from_pretrained(tmp_path, is_decoder=True)
    inputs = inputs_of(CAUSAL)
    assert (ours(**inputs).logits - theirs(**inputs).logits).abs().max() < 1e-5


# Weights


@each_class
def test_weights_start_as_documented(architecture):
    """Normal with ``initializer_range``, within five standard errors; zero biases; LayerNorms of one; no [PAD]."""
    told, deviation = [], 0.02
    for part in make(architecture).parts():
        values = part.view(part.parameter.detach())
        if part.source.endswith("word_embeddings.weight"):
            assert not values[0].any()
            values = values[1:]
        if part.source.endswith("bias") or part.source.endswith(("ln.weight", "LayerNorm.weight")):
            expected = 0.0 if part.source.endswith("bias") else 1.0
            told += [] if (values == expected).all() else [f"{part.source} is not {expected}"]
            continue
        error = deviation / values.numel() ** 0.5
        if values.mean().abs() > 5 * error or (values.std() - deviation).abs() > 5 * error / 2**0.5:
            told.append(f"{part.source}: mean {values.mean():.1e}, deviation {values.std():.1e}")
    assert_none(told)


@each_class
def test_every_parameter_is_trained(architecture):
    model = make(architecture).train()
    objective_of(model(**inputs_of(architecture), **labels_of(architecture))).backward()
    assert_none(part.name for part in model.parts() if part.parameter.grad is None)


@each_class
def test_recomputed_layers_give_the_same_gradients_and_keep_less(architecture):
    """With dropout on, whose bits the second forward pass of a layer must draw again."""

    def run(is_recomputed: bool) -> tuple[dict[str, Tensor], int]:
        model = make(architecture).train()
        if is_recomputed:
            model.gradient_checkpointing_enable()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            output = model(**inputs_of(architecture), **labels_of(architecture))
        objective_of(output).backward()
        return {part.name: part.view(part.parameter.grad).clone() for part in model.parts()}, sum(kept)

    plain, kept = run(False)
    recomputed, kept_then = run(True)
    assert_equal(plain, recomputed)
    assert kept_then < kept / 2


def test_recomputing_can_be_switched_off_again():
    model = make(MASKED)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_the_pooler_may_be_left_out():
    settings = MegatronBertConfig(**SIZES)
    model = megatron_bert_tp.MegatronBertModel(settings, add_pooling_layer=False)
    assert [part.name for part in model.parts() if "pooler" in part.name] == []
    assert model.eval()(**inputs_of(BASE)).pooler_output is None


# Training


def test_three_steps_of_adamw_over_the_parameters_follow_transformers(tmp_path):
    """A tied weight is one parameter: an optimizer with moments must not see it twice."""
    settings = {**SIZES, **NO_DROPOUT}
    theirs = transformers.MegatronBertForPreTraining(transformers.MegatronBertConfig(**settings))
    theirs = theirs.to(torch.float64)
    theirs.save_pretrained(tmp_path)
    ours = megatron_bert_tp.MegatronBertForPreTraining.from_pretrained(tmp_path)
    architecture = type(ours).__name__
    arguments = {**inputs_of(architecture), **labels_of(architecture)}
    losses = []
    for model in (ours.train(), theirs.train()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**arguments).loss
            loss.backward()
            optimizer.step()
        losses.append(model(**arguments).loss.item())
    # Steps of key biases follow rounding noise, but the loss does not see them.
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
