"""Checkpoints of every kind that Megatron-LM wrote become the model that they were made from."""

import json
import types
from argparse import Namespace
from itertools import product

import pytest
import torch
from transformers import AutoTokenizer

from megatron_bert_tp.errors import DataError, FormatError
from megatron_bert_tp.formats.megatron.convert import from_megatron
from tests.formats.megatron import synthetic
from tests.formats.megatron.comparison import assert_same_model, bring, load
from tests.formats.megatron.synthetic import PADDED, WORDS, Kind, write

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "mlm"])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("version", [None, 1.0, 2.0, 3.0])
def test_every_kind_becomes_the_same_model(models, tmp_path, version, names, tensor, pipeline, binary):
    kind = Kind(version=version, names=names, tensor=tensor, pipeline=pipeline, binary=binary)
    bring(write(models[binary], kind, tmp_path / "source"), tmp_path / "out")
    assert_same_model(tmp_path / "out", models[binary])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == PADDED
    assert config["layer_norm_eps"] == 1e-5
    assert config["hidden_act"] == "gelu"
    assert config["type_vocab_size"] == (2 if binary else 1)


@pytest.mark.parametrize(
    "kind",
    [
        Kind(version=0),
        Kind(version=0, tensor=4),
        Kind(version=1.0, tensor=4, pipeline=4),
        Kind(shuffled=True, tensor=2, pipeline=2),
        Kind(virtual=2),
        Kind(virtual=2, pipeline=2),
        Kind(virtual=2, pipeline=2, version=1.0, tensor=2, shuffled=True),
        Kind(names="flat", version=None),
        Kind(names="flat", version=None, tensor=2, binary=False, shuffled=True),
        Kind(names="core"),
        Kind(names="core", version=None),
        Kind(names="core", tensor=2, pipeline=2),
        Kind(names="core", version=None, arguments=None, tensor=2, binary=False),
        Kind(arguments=None),
        Kind(version=None, arguments=None, tensor=2, pipeline=2),
    ],
    ids=str,
)
def test_other_kinds_become_the_same_model(models, tmp_path, kind):
    bring(write(models[kind.binary], kind, tmp_path / "source"), tmp_path / "out", **_heads(kind))
    if kind.arguments is None:
        path = tmp_path / "out" / "config.json"
        assert json.loads(path.read_text())["layer_norm_eps"] == 1e-5
    assert_same_model(tmp_path / "out", models[kind.binary])


def _heads(kind: Kind) -> dict[str, int]:
    return {} if kind.arguments is not None else {"num_attention_heads": synthetic.HEADS}


def test_the_local_specification_of_megatron_core_is_read(models, tmp_path):
    source = write(models[True], Kind(), tmp_path / "source")
    path = source / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = synthetic.content(models[True], Kind(names="core"), 0, 0)
    plain = synthetic.content(models[True], Kind(), 0, 0)["model"]["language_model"]["encoder"]
    tensors = {name: value for name, value in content["model"].items() if "layer_norm_" not in name}
    for number, leaf in product(range(synthetic.LAYERS), ("weight", "bias")):
        layer = f"layers.{number}"
        tensors[f"encoder.{layer}.input_layernorm.{leaf}"] = plain[f"{layer}.input_layernorm.{leaf}"]
        norm = plain[f"{layer}.post_attention_layernorm.{leaf}"]
        tensors[f"encoder.{layer}.pre_mlp_layernorm.{leaf}"] = norm
    torch.save({**content, "model": tensors}, path)
    bring(source, tmp_path / "out")
    assert_same_model(tmp_path / "out", models[True])


# What is decided


def config_after(models, tmp_path, kind: Kind = Kind(), **wishes: object) -> tuple[dict, str]:  # noqa: B008
    told = bring(write(models[kind.binary], kind, tmp_path / "source"), tmp_path / "out", **wishes)
    return json.loads((tmp_path / "out" / "config.json").read_text()), "\n".join(told)


@pytest.mark.parametrize(
    ("arguments", "wishes", "expected", "reason"),
    [
        ({}, {}, "gelu", "sets neither openai_gelu nor bias_gelu_fusion"),
        ({"bias_gelu_fusion": True}, {}, "gelu_new", "bias_gelu_fusion is set in the file"),
        ({"bias_gelu_fusion": False}, {}, "gelu", "bias_gelu_fusion is off"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, {}, "gelu_new", "openai_gelu is set"),
        ({"bias_gelu_fusion": True}, {"hidden_act": "gelu"}, "gelu", "as asked for"),
        (None, {}, "gelu", "sets neither"),
    ],
)
def test_the_activation_is_decided_and_told(models, tmp_path, arguments, wishes, expected, reason):
    config, told = config_after(models, tmp_path, Kind(arguments=arguments), **wishes)
    assert config["hidden_act"] == expected
    assert f"hidden_act {expected}: " in told
    assert reason in told


@pytest.mark.parametrize(
    ("arguments", "wishes", "expected", "reason"),
    [
        ({"layernorm_epsilon": 1e-6}, {}, 1e-6, "layernorm_epsilon of the file"),
        ({"layernorm_epsilon": 1e-6}, {"huggingface_epsilon": True}, 1e-12, "like Hugging Face's converter"),
        (None, {}, 1e-5, "the default of Megatron-LM"),
        (None, {"huggingface_epsilon": True}, 1e-12, "as asked for"),
    ],
)
def test_the_epsilon_is_decided_and_told(models, tmp_path, arguments, wishes, expected, reason):
    config, told = config_after(models, tmp_path, Kind(arguments=arguments), **wishes)
    assert config["layer_norm_eps"] == expected
    assert f"layer_norm_eps {expected}: " in told
    assert reason in told


@pytest.mark.parametrize(("heads", "expected"), [(None, 1), (2, 2)])
def test_the_number_of_heads_is_assumed_or_given(models, tmp_path, heads, expected):
    config, told = config_after(models, tmp_path, Kind(arguments=None), num_attention_heads=heads)
    assert config["num_attention_heads"] == expected
    assert ("num_attention_heads 1: assumed, 64 features each" in told) == (heads is None)


@pytest.mark.parametrize(
    ("recorded", "wished", "expected"),
    [(None, None, PADDED), (None, 1000, 1000), (1001, None, 1001), (1001, 9, 9)],
)
def test_rows_are_kept_unless_fewer_are_recorded_or_given(models, tmp_path, recorded, wished, expected):
    arguments = {} if recorded is None else {"logical_vocab_size": recorded}
    config, told = config_after(models, tmp_path, Kind(arguments=arguments, tensor=2), vocab_size=wished)
    assert config["vocab_size"] == expected
    assert f"vocab_size {expected}: " in told
    rows = load(tmp_path / "out").bert.embeddings.word_embeddings.weight
    whole = synthetic._padded(models[True].state_dict()["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(rows, whole[:expected])


def test_arguments_become_settings(models, tmp_path):
    arguments = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "init_method_std": 0.05}
    config, _ = config_after(models, tmp_path, Kind(arguments=arguments))
    expected = {
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "initializer_range": 0.05,
        "num_attention_heads": synthetic.HEADS,
        "intermediate_size": synthetic.INNER,
        "max_position_embeddings": synthetic.POSITIONS,
        "num_hidden_layers": synthetic.LAYERS,
        "tie_word_embeddings": True,
    }
    assert {name: config[name] for name in expected} == expected


def test_missing_token_types_are_told(models, tmp_path):
    _, told = config_after(models, tmp_path, Kind(binary=False))
    assert "type_vocab_size 1: the file has no token types" in told


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_number_format_of_the_file_is_kept_or_changed(tmp_path, dtype):
    model = synthetic.build().to(dtype)
    source = write(model, Kind(tensor=2), tmp_path / "source")
    bring(source, tmp_path / "kept", vocab_size=WORDS)
    bring(source, tmp_path / "changed", vocab_size=WORDS, dtype=torch.float32)
    kept, changed = load(tmp_path / "kept"), load(tmp_path / "changed")
    assert {value.dtype for value in kept.state_dict().values()} == {dtype}
    for name, value in model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
        assert torch.equal(changed.state_dict()[name], value.float()), name


@pytest.mark.parametrize("kind", ["BertWordPieceLowerCase", "BertWordPieceCase", "Other"])
@pytest.mark.parametrize(("last", "lower"), [("b", True), ("A", False)])
def test_a_vocabulary_goes_along_in_its_own_case_and_a_contradiction_is_told(models, tmp_path, kind, last, lower):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", last]
    (tmp_path / "bert-vocab.txt").write_text("\n".join(words) + "\n")
    source = write(models[True], Kind(arguments={"tokenizer_type": kind}), tmp_path / "source")
    told: list[str] = []
    from_megatron(source, tmp_path / "out", tokenizer=tmp_path / "bert-vocab.txt", tell=told.append)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("A a").input_ids == [2, 5 if lower else 6, 5, 3]
    contradicts = kind == ("BertWordPieceCase" if lower else "BertWordPieceLowerCase")
    assert any("tokenizer_type in the file says" in line for line in told) == contradicts


def test_a_tokenizer_that_is_no_vocabulary_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "mine.txt").write_text("hello\n")
    with pytest.raises(DataError, match=r"mine\.txt: a vocabulary must contain"):
        from_megatron(tmp_path / "none", tmp_path / "out", tokenizer=tmp_path / "mine.txt", tell=print)


def test_the_result_is_told(models, tmp_path):
    source = write(models[False], Kind(binary=False), tmp_path / "source")
    told = from_megatron(source, tmp_path / "out", tell=lambda _: None)
    assert told.startswith(f"{tmp_path / 'out'}: Hugging Face directory of a MegatronBertForMaskedLM, ")
    assert told.endswith(", without a tokenizer")


def test_what_stands_at_the_place_of_the_result_is_never_overwritten(models, tmp_path):
    source = write(models[True], Kind(), tmp_path / "source")
    with pytest.raises(FormatError, match="source: exists already and is not empty"):
        bring(source, source)


def test_the_newest_iteration_is_the_one_that_the_tracker_names(models, tmp_path):
    write(models[True], Kind(), tmp_path / "source", iteration="iter_0000100")
    write(synthetic.build(seed=4), Kind(), tmp_path / "source", iteration="iter_0000020")
    (tmp_path / "source" / "latest_checkpointed_iteration.txt").write_text("100\n")
    bring(tmp_path / "source", tmp_path / "out")
    assert_same_model(tmp_path / "out", models[True])
    bring(tmp_path / "source" / "iter_0000020", tmp_path / "other")
    assert_same_model(tmp_path / "other", synthetic.build(seed=4))


def test_bags_of_other_kinds_hold_arguments_too(models, tmp_path):
    source = write(models[True], Kind(), tmp_path / "source")
    path = source / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = synthetic.content(models[True], Kind(), 0, 0)
    assert isinstance(content["args"], Namespace)
    torch.save({**content, "args": types.SimpleNamespace(**vars(content["args"]))}, path)
    bring(source, tmp_path / "out")
    assert load(tmp_path / "out").config.num_attention_heads == synthetic.HEADS
