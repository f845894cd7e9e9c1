"""All nine classes of the family in and out, against the real `transformers`."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_bert_tp.checkpoint.model import head_of
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import CheckpointError, FormatError
from megatron_bert_tp.formats.convert import from_huggingface, to_huggingface
from megatron_bert_tp.formats.huggingface import HuggingFaceDirectory
from megatron_bert_tp.formats.huggingface_writer import write_directory
from megatron_bert_tp.formats.weights import ModelSource, open_weights
from megatron_bert_tp.model.shape import HEADS, PRETRAINING, tensor_shapes
from tests.formats.conftest import ODD, assert_same_bytes, build, save_pickled, settings_of, tensors

BARE = "MegatronBertModel"
CLASSIFIER = "MegatronBertForSequenceClassification"
DECODER = {"is_decoder": True, "add_cross_attention": True}
LABELS = {"id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}
SETTINGS = {
    "MegatronBertForCausalLM": DECODER,
    CLASSIFIER: {**LABELS, "problem_type": "single_label_classification", "classifier_dropout": 0.2},
    "MegatronBertForTokenClassification": {"num_labels": 7},
}


def round_trip(directory, tmp_path, **options):
    from_huggingface(directory, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "exported", **options)
    return tmp_path / "exported"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", HEADS)
def test_every_class_comes_back_with_the_same_bytes_and_settings(saved, tmp_path, architecture, tied):
    original = saved(architecture=architecture, tied=tied, **SETTINGS.get(architecture, {}))
    exported = round_trip(original, tmp_path)
    assert_same_bytes(original, exported)
    assert settings_of(exported) == settings_of(original)
    assert head_of(Checkpoint.open(tmp_path / "checkpoint")) == HEADS[architecture]


@pytest.mark.parametrize("architecture", HEADS)
def test_pickled_weights_of_every_class_give_what_safetensors_give(saved, tmp_path, architecture):
    original = saved("original", architecture=architecture, dtype=torch.float16)
    pickled = saved("pickled", architecture=architecture, dtype=torch.float16)
    prefix = "" if architecture == BARE else "bert."
    save_pickled(pickled, **{f"{prefix}embeddings.position_ids": torch.arange(20)[None]})
    exported = round_trip(pickled, tmp_path)
    assert_same_bytes(original, exported)
    assert settings_of(exported) == settings_of(original)


@pytest.mark.parametrize("architecture", [BARE, PRETRAINING.architecture, "MegatronBertForMaskedLM", CLASSIFIER])
@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_shards_hold_the_same_and_load_without_missing_keys(saved, tmp_path, architecture, limit):
    original = saved(architecture=architecture, shards=True)
    exported = round_trip(original, tmp_path, max_shard_bytes=limit)
    assert_same_bytes(original, exported)
    model, info = getattr(transformers, architecture).from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    expected = build(architecture).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    files = sorted(exported.glob("*.safetensors"))
    if limit == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        return
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    theirs = json.loads((original / "model.safetensors.index.json").read_text())
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert all(index["weight_map"][name] == file.name for file in files for name in load_file(file))
    sizes = {file: [value.nbytes for value in load_file(file).values()] for file in files}
    assert all(sum(held) <= limit or len(held) == 1 for held in sizes.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_number_format_can_change_on_the_way_in_and_on_the_way_out(saved, tmp_path, dtype):
    original = saved(architecture=CLASSIFIER)
    from_huggingface(original, tmp_path / "in", dtype=dtype)
    to_huggingface(tmp_path / "in", tmp_path / "one")
    from_huggingface(original, tmp_path / "same")
    to_huggingface(tmp_path / "same", tmp_path / "other", dtype=dtype)
    assert_same_bytes(tmp_path / "one", tmp_path / "other")
    expected = build(CLASSIFIER).to(dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "one").items())
    assert settings_of(tmp_path / "one") == settings_of(tmp_path / "other")
    assert settings_of(tmp_path / "one")["dtype"] == str(dtype).removeprefix("torch.")


def test_a_number_that_does_not_fit_the_format_is_never_an_infinity(saved, tmp_path):
    original = saved()
    path = original / "model.safetensors"
    values = load_file(path)
    values["bert.pooler.dense.bias"][3] = 70_000
    save_file(values, path)
    with pytest.raises(FormatError, match=r"pooler\.dense\.bias: has numbers up to 7e\+04, but float16 ends at"):
        from_huggingface(original, tmp_path / "checkpoint", dtype=torch.float16)
    assert not (tmp_path / "checkpoint").exists()
    from_huggingface(original, tmp_path / "checkpoint", dtype=torch.bfloat16)
    with pytest.raises(FormatError, match="float16 ends at"):
        to_huggingface(tmp_path / "checkpoint", tmp_path / "out", dtype=torch.float16)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint", "original"]


def with_prefix(name: str) -> str:
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("source", [PRETRAINING.architecture, BARE, "MegatronBertForTokenClassification"])
def test_what_is_new_and_unused_in_another_class_is_what_transformers_says(saved, source, pickled):
    directory = saved(architecture=source)
    if pickled:
        save_pickled(directory)
    for architecture, head in HEADS.items():
        if architecture == source or (source.endswith("TokenClassification") and head.linear == "classifier"):
            continue  # a classifier of the same name is not new
        found = HuggingFaceDirectory.open(directory, head)
        _model, info = getattr(transformers, architecture).from_pretrained(directory, output_loading_info=True)
        missing = {with_prefix(name) for name in info["missing_keys"]}
        if "cls.predictions.bias" in missing:
            missing.discard("cls.predictions.decoder.bias")  # the same number under its second name
        assert set(found.new) == missing, architecture
        assert set(found.unused) == {with_prefix(name) for name in info["unexpected_keys"]}, architecture
        for name in found.new:
            with pytest.raises(FormatError, match=f"has no {name}; it is new in a {architecture}"):
                found.read(name, (0,), (1,))


def test_a_directory_read_as_its_own_class_must_be_whole(saved):
    directory = saved()
    path = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "cls.seq_relationship.bias"}, path)
    for head in (None, PRETRAINING):
        with pytest.raises(FormatError, match=r"missing: cls\.seq_relationship\.bias"):
            HuggingFaceDirectory.open(directory, head)
    assert HuggingFaceDirectory.open(directory, HEADS[CLASSIFIER]).new == ("classifier.weight", "classifier.bias")


def test_no_class_may_lack_a_tensor_of_the_encoder(saved):
    directory = saved()
    path = directory / "model.safetensors"
    lost = "bert.encoder.layer.3.ln.weight"
    save_file({k: v for k, v in load_file(path).items() if k != lost}, path)
    with pytest.raises(FormatError, match=f"missing: {lost}"):
        HuggingFaceDirectory.open(directory, HEADS[CLASSIFIER])


def test_no_class_may_have_more_layers_than_the_settings_say(saved):
    directory = saved()
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 4}))
    with pytest.raises(FormatError, match=r"unexpected: bert\.encoder\.layer\.4\."):
        HuggingFaceDirectory.open(directory, HEADS[CLASSIFIER])


def test_another_number_of_labels_is_refused_with_both_shapes_and_the_way_out(saved):
    directory = saved(architecture=CLASSIFIER, num_labels=3)
    assert HuggingFaceDirectory.open(directory, num_labels=3).settings["id2label"]["2"] == "LABEL_2"
    with pytest.raises(FormatError) as raised:
        HuggingFaceDirectory.open(directory, HEADS["MegatronBertForTokenClassification"], num_labels=5)
    assert "classifier.weight has the shape (3, 16), but 5 outputs are asked for, which is (5, 16)" in str(
        raised.value
    )
    assert "ask for 3, or start from a directory without this layer" in str(raised.value)


def test_a_new_classifier_has_the_labels_that_are_asked_for_and_not_the_names_of_others(saved):
    directory = saved(**LABELS)
    found = HuggingFaceDirectory.open(directory, HEADS[CLASSIFIER], num_labels=5)
    assert tensor_shapes(found.shape, found.head)["classifier.weight"] == (5, 16)
    assert not found.settings.keys() & LABELS.keys()


@pytest.mark.parametrize("architecture", HEADS)
def test_a_class_that_is_not_named_is_judged_from_the_tensors(saved, architecture):
    directory = saved(architecture=architecture, **SETTINGS.get(architecture, {}))
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "architectures": None}))
    assert HuggingFaceDirectory.open(directory).head == HEADS[architecture]


def test_a_regression_is_told_from_a_choice_by_its_labels(saved):
    directory = saved(architecture=CLASSIFIER, num_labels=1)
    path = directory / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))
    assert HuggingFaceDirectory.open(directory).head.architecture == CLASSIFIER


def test_a_bare_model_without_pooler_goes_through(saved, tmp_path):
    directory = saved(architecture=BARE)
    path = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("pooler.")}, path)
    exported = round_trip(directory, tmp_path)
    assert_same_bytes(directory, exported)
    assert HuggingFaceDirectory.open(exported, HEADS[BARE]).new == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    )
    assert ModelSource.open(tmp_path / "checkpoint").head == replace(HEADS[BARE], has_pooler=False)


def test_the_prefix_of_the_files_does_not_matter(saved):
    """Some files of a whole model have none, and some of a bare one have it."""
    for name, architecture in (("whole", PRETRAINING.architecture), ("bare", BARE)):
        directory = saved(name, architecture=architecture)
        path = directory / "model.safetensors"
        values = load_file(path)
        expected = next(value for key, value in values.items() if key.endswith("ln.weight"))
        key = next(key for key in values if key.endswith("ln.weight"))
        other = {
            (k.removeprefix("bert.") if architecture != BARE else f"bert.{k}"): value
            for k, value in values.items()
        }
        save_file(other, path)
        read = HuggingFaceDirectory.open(directory).read
        assert torch.equal(read(with_prefix(key), (0,), (16,)), expected)


def test_a_tensor_with_and_without_prefix_is_ambiguous(saved):
    directory = saved(architecture=BARE)
    path = directory / "model.safetensors"
    save_file({**load_file(path), "bert.encoder.ln.bias": torch.zeros(16)}, path)
    with pytest.raises(FormatError, match=r"encoder\.ln\.bias with and without the prefix 'bert\.'"):
        HuggingFaceDirectory.open(directory)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_go_through(saved, tmp_path, kind):
    """In a file of transformers 4: version 5 neither writes the setting by itself nor knows the tensors."""
    original = saved()
    path, settings = original / "model.safetensors", json.loads((original / "config.json").read_text())
    name = "bert.encoder.layer.{}.attention.self.distance_embedding.weight"
    distances = {name.format(layer): torch.randn(2 * 20 - 1, 4) for layer in range(5)}
    save_file({**load_file(path), **distances}, path)
    (original / "config.json").write_text(json.dumps({**settings, "position_embedding_type": kind}))
    exported = round_trip(original, tmp_path)
    assert_same_bytes(original, exported)
    assert settings_of(exported) == settings_of(original)
    assert f"computes without the distances ({kind})" in (exported / "README.md").read_text()


@pytest.mark.parametrize(("written", "read"), [("swish", "silu"), ("gelu_new", "gelu_new"), ("relu", "relu")])
def test_every_activation_is_read_and_a_second_name_of_one(saved, written, read):
    assert HuggingFaceDirectory.open(saved(hidden_act=written)).shape.hidden_act == read


def test_keys_that_mean_nothing_here_are_kept(saved, tmp_path):
    original = saved()
    path = original / "config.json"
    more = {"gradient_checkpointing": False, "_name_or_path": "me/model", "nested": {"a": [1, None, 2.5]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    assert HuggingFaceDirectory.open(original).settings.items() >= more.items()
    assert settings_of(round_trip(original, tmp_path)) == settings_of(original)


def test_what_the_model_says_itself_is_no_setting(saved):
    assert saved_settings(saved()) == {"bos_token_id", "eos_token_id", "use_cache"}
    assert saved_settings(saved("more", **LABELS)) >= LABELS.keys()


def saved_settings(directory):
    return HuggingFaceDirectory.open(directory).settings.keys()


def test_labels_without_names_get_those_of_transformers(tmp_path):
    shape, head = replace(ODD, num_labels=3), HEADS[CLASSIFIER]
    write_directory(tmp_path / "out", shape, lambda _name, _offsets, extent: torch.ones(extent), {}, head=head)
    build(CLASSIFIER, num_labels=3).save_pretrained(tmp_path / "theirs")
    assert settings_of(tmp_path / "out") == settings_of(tmp_path / "theirs")


def test_settings_of_the_caller_do_not_contradict_the_model(tmp_path):
    def read(_name, _offsets, extent):
        return torch.ones(extent)

    settings = {"num_hidden_layers": 9, "dtype": "int8", "architectures": ["A"], "problem_type": "regression"}
    write_directory(tmp_path / "out", ODD, read, {}, head=HEADS[CLASSIFIER], settings=settings)
    written = settings_of(tmp_path / "out")
    assert (written["num_hidden_layers"], written["dtype"], written["architectures"]) == (
        5,
        "float32",
        [CLASSIFIER],
    )
    assert written["problem_type"] == "regression"
    with pytest.raises(FormatError, match="id2label names 3 classes, but the model has num_labels 2"):
        write_directory(tmp_path / "wrong", ODD, read, {}, head=HEADS[CLASSIFIER], settings=LABELS)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("form", ["directory", "checkpoint"])
def test_pretraining_starts_from_its_own_class_alone(saved, tmp_path, form):
    directory = saved(architecture="MegatronBertForMaskedLM")
    from_huggingface(directory, tmp_path / "checkpoint")
    path, error = {
        "directory": (directory, FormatError),
        "checkpoint": (tmp_path / "checkpoint", CheckpointError),
    }[form]
    with pytest.raises(error) as raised:
        open_weights(path, ODD, verify=True)
    assert "are of a MegatronBertForMaskedLM, but pretraining needs those of a MegatronBertForPreTraining" in str(
        raised.value
    )
    assert "bert.pooler.dense.weight, bert.pooler.dense.bias, cls.seq_relationship.weight" in str(raised.value)
