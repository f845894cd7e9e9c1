"""What cannot be is told with rule, value and way out: arguments, settings, files and layouts."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import megatron_bert_tp
from megatron_bert_tp import (
    MegatronBertConfig,
    MegatronBertForCausalLM,
    MegatronBertForPreTraining,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertModel,
)
from megatron_bert_tp.errors import ArgumentError, ConfigError, FormatError, LayoutError
from megatron_bert_tp.model.shape import HEADS
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.parallel.mesh import Axis, ParallelMesh
from megatron_bert_tp.pipeline.partition import partition
from tests.support import Layout, build_mesh

SIZES = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 12,
}  # fmt: skip
IDS = torch.arange(10).view(2, 5)
EMBEDDED = torch.zeros(2, 5, 16)


def encoder() -> MegatronBertModel:
    return MegatronBertModel(MegatronBertConfig(**SIZES)).eval()


def decoder(**settings: Any) -> MegatronBertForCausalLM:
    return MegatronBertForCausalLM(MegatronBertConfig(**SIZES, is_decoder=True, **settings)).eval()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"input_ids": IDS + 30}, "input_ids go from 30 to 39, but must be from 0 to 36; was the text"),
        ({"input_ids": -IDS}, "input_ids go from -9 to 0"),
        ({"input_ids": IDS[0]}, r"the shape \(5,\); input_ids are \[batch, sequence\]"),
        ({"input_ids": torch.zeros(1, 13, dtype=torch.long)}, "has 13 positions.*max_position_embeddings is 12"),
        ({"inputs_embeds": EMBEDDED.double()}, "inputs_embeds are torch.float64 with 16 features"),
        ({"inputs_embeds": EMBEDDED[..., :8]}, "with 8 features, and the model is torch.float32 with 16"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention_mask has the shape \(2, 6\), but there are 5 keys"),
        ({"attention_mask": torch.ones(2, 5, 4)}, r"the shape \(2, 5, 4\), but there are 5 queries and 5 keys"),
        ({"attention_mask": torch.ones(2, 1, 5, 4)}, r"the shape \(2, 1, 5, 4\); give \[batch, keys\]"),
        ({"head_mask": torch.ones(3)}, r"head_mask has the shape \(3,\); give \[heads\].* 4 heads and 2 layers"),
        ({"head_mask": torch.ones(3, 4)}, r"head_mask has the shape \(3, 4\)"),
        ({"encoder_hidden_states": EMBEDDED}, "encoder_hidden_states is for decoders.*is_decoder=True"),
        ({"position_ids": torch.arange(9, 14)[None]}, "position_ids go from 9 to 13, but must be from 0 to 11"),
        ({"token_type_ids": IDS}, "token_type_ids go from 0 to 9, but must be from 0 to 1"),
        ({"use_cache": True}, "use_cache is for decoders"),
        ({"past_key_values": [[EMBEDDED[:, None]] * 2] * 2}, "has 1 heads, but this rank has 4"),
        ({"sample_numbers": (1, 2, 3)}, "sample_numbers has 3 entries for 2 samples"),
    ],
)
def test_arguments_that_do_not_fit_are_told(given, told):
    arguments = {**({} if "inputs_embeds" in given else {"input_ids": IDS}), **given}
    with pytest.raises((ArgumentError, LayoutError), match=told):
        encoder().train("sample_numbers" in given)(**arguments)


def test_a_cache_that_does_not_fit_is_told():
    model = decoder()
    cache = model(IDS).past_key_values
    with pytest.raises(ArgumentError, match="has 1 layers, but the model has 2"):
        model(IDS, past_key_values=cache.to_legacy_cache()[:1])
    with pytest.raises(ArgumentError, match="has 3 entries; give"):
        model(IDS, past_key_values=[layer + layer[:1] for layer in cache])
    with pytest.raises(ArgumentError, match="past_key_values is for decoders"):
        encoder()(IDS, past_key_values=cache)
    with pytest.raises(ArgumentError, match="has 15 positions, cached ones included"):
        model(torch.zeros(2, 10, dtype=torch.long), past_key_values=cache)
    with pytest.raises(LayoutError, match="there are 6 keys; the keys of a cache count too"):
        model(IDS[:, :1], torch.ones(2, 1), past_key_values=cache)


def test_arguments_without_an_effect_are_told():
    model = decoder(add_cross_attention=True, position_embedding_type="relative_key")
    with pytest.raises(ArgumentError, match=r"position_ids have no effect with .* 'relative_key'"):
        model(IDS, position_ids=torch.arange(5)[None])
    with pytest.raises(ArgumentError, match="encoder_attention_mask is there without encoder_hidden_states"):
        model(IDS, encoder_attention_mask=torch.ones(2, 4))
    with pytest.raises(ArgumentError, match="has no effect on greedy decoding; give do_sample=True"):
        model.generate(IDS, temperature=0.5, max_new_tokens=2)
    for misspelled, meant in {"label": "labels", "attention_masks": "attention_mask"}.items():
        with pytest.raises(TypeError, match=f"does not take '{misspelled}'; did you mean {meant}"):
            model(IDS, **{misspelled: IDS})


def test_a_decoder_without_cross_attention_has_nowhere_to_look():
    with pytest.raises(ArgumentError, match="add_cross_attention=True"):
        decoder()(IDS, encoder_hidden_states=EMBEDDED)


def test_relative_positions_end_where_the_embedding_does():
    model = decoder(add_cross_attention=True, position_embedding_type="relative_key")
    assert model(IDS, encoder_hidden_states=torch.zeros(2, 12, 16)).logits.shape == (2, 5, 37)
    with pytest.raises(LayoutError, match=r"max_position_embeddings \(12\), but there are 5 queries and 13 keys"):
        model(IDS, encoder_hidden_states=torch.zeros(2, 13, 16))


def test_multiple_choice_needs_its_choices():
    model = megatron_bert_tp.MegatronBertForMultipleChoice(MegatronBertConfig(**SIZES))
    with pytest.raises(ArgumentError, match=r"\(2, 5\); give \[batch, choices, sequence\]"):
        model(IDS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is not one of gelu, gelu_new, relu, silu"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type: 'rotary' is not one of absolute"),
        ({"hidden_size": 15}, r"hidden_size \(15\) must be a multiple of num_attention_heads \(4\)"),
        ({"add_cross_attention": True}, "add_cross_attention needs is_decoder"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"pad_token_id": 37}, r"pad_token_id \(37\) below vocab_size \(37\)"),
    ],
)
def test_settings_that_make_no_model_are_told(settings, told):
    with pytest.raises(ConfigError, match=told):
        MegatronBertConfig(**{**SIZES, **settings})


def test_a_misspelled_setting_is_not_taken(tmp_path):
    encoder().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="hidden_sise"):
        MegatronBertConfig(hidden_sise=8)
    with pytest.raises(ConfigError, match="no setting 'num_label'; did you mean num_labels"):
        MegatronBertForSequenceClassification.from_pretrained(tmp_path, num_label=3)


def test_weights_of_other_sizes_are_told_and_can_be_drawn_anew(tmp_path):
    MegatronBertForSequenceClassification(MegatronBertConfig(**SIZES, num_labels=3)).save_pretrained(tmp_path)
    told = r"classifier.weight: \(3, 16\) there, \(5, 16\) asked for(?s:.*)ignore_mismatched_sizes"
    with pytest.raises(ConfigError, match=told):
        MegatronBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = MegatronBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert model.loading_info["missing_keys"] == ["classifier.weight", "classifier.bias"]
    assert model.classifier.weight.shape == (5, 16)
    for sizes in ({"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"num_attention_heads": 2}):
        with pytest.raises(ConfigError, match=r"its model has num_.* [24], and [123] was|no bert\.encoder"):
            MegatronBertForSequenceClassification.from_pretrained(tmp_path, **sizes)
    with pytest.raises(ConfigError, match=r"word_embeddings.weight: \(37, 16\) there, \(37, 8\) asked for"):
        MegatronBertForSequenceClassification.from_pretrained(
            tmp_path, hidden_size=8, ignore_mismatched_sizes=True
        )


def test_a_folder_that_is_not_there_is_told():
    with pytest.raises(FormatError, match=r"no such folder.*names of a hub are not looked up"):
        MegatronBertModel.from_pretrained("nvidia/megatron-bert-uncased-345m")


def test_settings_of_another_package_are_told():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"config is a transformers\..*; give a MegatronBertConfig of this"):
        MegatronBertModel(transformers.MegatronBertConfig(**SIZES))


def test_cross_attention_can_be_added_to_weights_without(tmp_path):
    encoder().save_pretrained(tmp_path)
    model = MegatronBertModel.from_pretrained(tmp_path, is_decoder=True, add_cross_attention=True)
    missing = model.loading_info["missing_keys"]
    assert len(missing) == 20
    assert all(".crossattention." in name for name in missing)
    assert model(IDS, encoder_hidden_states=EMBEDDED).cross_attentions is None


def test_what_is_new_and_unused_is_told(tmp_path, caplog):
    MegatronBertForPreTraining(MegatronBertConfig(**SIZES)).save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        MegatronBertForQuestionAnswering.from_pretrained(tmp_path)
    (message,) = caplog.messages
    assert "new in a MegatronBertForQuestionAnswering" in message
    assert "drawn at random: qa_outputs.weight, qa_outputs.bias; unused" in message
    assert "unused: bert.pooler.dense.weight" in message


def test_a_model_is_never_written_over(tmp_path):
    first = encoder()
    first.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FormatError, match=r"config.json: exists already; remove the model there"):
        MegatronBertModel(MegatronBertConfig(**SIZES), seed=1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.parent.iterdir() if "saving" in path.name) == []


def test_a_model_is_saved_beside_a_tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    encoder().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"vocab.txt", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MegatronBertModel"]


@pytest.mark.parametrize("architecture", HEADS)
def test_a_mesh_with_a_pipeline_is_refused_with_the_way_out(architecture):
    two_stages = Axis("pipeline", (0, 1), 0)
    mesh = replace(ParallelMesh.alone(), pipeline=two_stages, tied=two_stages)
    with pytest.raises(LayoutError, match=rf"a pipeline of 2 stages(?s:.*)head={architecture} for the executor"):
        getattr(megatron_bert_tp, architecture)(MegatronBertConfig(**SIZES), mesh=mesh)


def test_a_pipeline_has_no_way_to_send_the_states_of_an_encoder():
    shape = MegatronBertConfig(**SIZES, is_decoder=True, add_cross_attention=True).shape
    with pytest.raises(LayoutError, match="use a pipeline size of 1"):
        MegatronBertStage(shape, partition(2, 2)[0], axis=Axis.alone("tensor"))


@pytest.mark.parametrize(
    ("architecture", "labels", "told"),
    [
        ("MegatronBertForSequenceClassification", torch.tensor([0, 3]), "labels hold 3; a label is from 0 to 1"),
        ("MegatronBertForSequenceClassification", torch.tensor([0]), r"the shape \(1,\); it must be \(2,\)"),
        ("MegatronBertForSequenceClassification", torch.rand(1, 4), r"the shape \(1, 4\); it must be \(2, 2\)"),
        ("MegatronBertForTokenClassification", torch.zeros(2, 4).long(), r"\(2, 4\); it must be \(2, 5\)"),
        ("MegatronBertForMaskedLM", torch.zeros(10).long(), r"\(10,\); it must be \(2, 5\)"),
    ],
)
def test_labels_that_do_not_fit_are_told(architecture, labels, told):
    with pytest.raises(ArgumentError, match=told):
        getattr(megatron_bert_tp, architecture)(MegatronBertConfig(**SIZES))(IDS, labels=labels)


def test_settings_that_no_longer_fit_the_model_are_not_saved(tmp_path):
    model = MegatronBertForSequenceClassification(MegatronBertConfig(**SIZES))
    model.config.num_labels = 5
    with pytest.raises(ConfigError, match=r"has the shape \(2, 16\), but the settings say \(5, 16\)"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_that_are_tied_no_more_are_told_and_not_lost(tmp_path):
    model = megatron_bert_tp.MegatronBertForMaskedLM(MegatronBertConfig(**SIZES)).eval()
    model.set_output_embeddings(torch.nn.Linear(16, 37))
    with pytest.raises(ConfigError, match=r"two tensors by now; call tie_weights\(\), or set config.tie_word"):
        model.save_pretrained(tmp_path / "out")
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "out")
    again = megatron_bert_tp.MegatronBertForMaskedLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_labels_and_their_number_agree(tmp_path):
    with pytest.raises(ConfigError, match="num_labels is 4, but id2label names 3"):
        MegatronBertConfig(**SIZES, num_labels=4, id2label={0: "a", 1: "b", 2: "c"})
    config = MegatronBertConfig(**SIZES, label2id={"a": 0, "b": 1, "c": 2})
    assert (config.num_labels, config.id2label) == (3, {0: "a", 1: "b", 2: "c"})
    MegatronBertForSequenceClassification(config).save_pretrained(tmp_path)
    kept = MegatronBertConfig.from_pretrained(tmp_path, num_labels=3)
    assert kept.id2label == {0: "a", 1: "b", 2: "c"}
    assert MegatronBertConfig.from_pretrained(tmp_path, num_labels=5).id2label is None
    for wrong in ({1: "a", 2: "b"}, {"x": "a"}, {0: 5}):
        with pytest.raises(ConfigError, match="must number names from 0 on"):
            MegatronBertConfig(**SIZES, id2label=wrong)
    with pytest.raises(ConfigError, match="must number names from 0 on"):
        MegatronBertConfig(**SIZES, label2id={"a": "b"})
    config.id2label = {0: "a"}
    with pytest.raises(ConfigError, match="num_labels is 3, but id2label names 1"):
        config.to_dict()


def test_sizes_and_formats_can_be_given_as_text(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert MegatronBertModel.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="max_shard_size: '2XB' is no size"):
        model.save_pretrained(tmp_path / "x", max_shard_size="2XB")
    with pytest.raises(ConfigError, match="max_shard_size is 0"):
        model.save_pretrained(tmp_path / "x", max_shard_size=0)
    with pytest.raises(ConfigError, match="dtype is int8, which is no number format"):
        MegatronBertModel.from_pretrained(tmp_path, dtype="int8")
    with pytest.raises(ConfigError, match="no setting 'torch_dtype'; did you mean dtype"):
        MegatronBertModel.from_pretrained(tmp_path, torch_dtype=torch.float16)


def refused_on_a_rank(folder: str) -> list[str]:
    """What saving over a model, and whole embeddings for split ones, say on each of two tensor ranks."""
    model = MegatronBertForPreTraining(MegatronBertConfig(**SIZES), mesh=build_mesh(Layout(tensor=2)))
    told = []
    for attempt in (
        lambda: model.save_pretrained(folder),
        lambda: model.set_input_embeddings(torch.nn.Embedding(37, 16)),
        lambda: model.set_output_embeddings(torch.nn.Linear(16, 37)),
    ):
        try:
            attempt()
        except (ArgumentError, FormatError) as error:
            told.append(str(error))
    return told


def test_every_rank_is_told_what_cannot_be(ranks, tmp_path):
    encoder().save_pretrained(tmp_path)
    one, other = ranks.run(2, refused_on_a_rank, str(tmp_path))
    assert one == other
    assert [text.split(";")[0].partition(": ")[2] or text.split(";")[0] for text in one] == [
        "exists already",
        "the word embeddings are split over 2 tensor ranks, and Embedding is whole",
        "Linear cannot be the output embeddings",
    ]
