"""Models become Megatron-LM checkpoints of any layout, in the form that its own source writes, and come back."""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_bert_tp.errors import FormatError, LayoutError
from megatron_bert_tp.formats.megatron.convert import from_megatron, to_megatron
from megatron_bert_tp.model.shape import HEADS, PRETRAINING, Head, ModelShape
from tests.formats.conftest import tensors
from tests.formats.megatron import synthetic
from tests.formats.megatron.synthetic import PADDED, WORDS, Kind, Model

pytestmark = pytest.mark.usefixtures("in_process")
MASKED = HEADS["MegatronBertForMaskedLM"]
LAYOUTS = [(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2)]
SHAPE = ModelShape(
    vocab_size=WORDS,
    hidden_size=synthetic.HIDDEN,
    num_hidden_layers=synthetic.LAYERS,
    num_attention_heads=synthetic.HEADS,
    intermediate_size=synthetic.INNER,
    max_position_embeddings=synthetic.POSITIONS,
    type_vocab_size=2,
    layer_norm_eps=synthetic.EPSILON,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)


def export(model: Model, out: Path, *, head: Head = PRETRAINING, tensor: int = 1, pipeline: int = 1, **other):
    state = model.state_dict()

    def read(name: str, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        return state[name][tuple(slice(first, first + size) for first, size in zip(offsets, extent, strict=True))]

    shape = replace(SHAPE, type_vocab_size=model.config.type_vocab_size, **other.pop("shape", {}))
    settings = {"lowercase": True, **other}
    return to_megatron(shape, head, read, out, tensor=tensor, pipeline=pipeline, **settings)


def rank_files(out: Path) -> dict[str, dict]:
    """Content of every file under its folder's name; written by us, so it may be unpickled."""
    return {path.parent.name: torch.load(path, weights_only=False) for path in sorted(out.glob("release/*/*.pt"))}


def assert_same_tree(found: dict, expected: dict, *, padded: int) -> None:
    """Same names, shapes and numbers; of tensors of ``padded`` rows only the shape, for their padding differs."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same_tree(found[name], value, padded=padded)
        else:
            assert found[name].shape == value.shape, name
            assert len(value) == padded or torch.equal(found[name], value), name


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "mlm"])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_there_and_back_is_the_identity(models, tmp_path, tensor, pipeline, binary):
    model = models[binary]
    head = PRETRAINING if binary else MASKED
    told = export(model, tmp_path / "ngc", head=head, tensor=tensor, pipeline=pipeline)
    assert told.startswith(f"{tmp_path / 'ngc'}: Megatron-LM checkpoint for {tensor} x {pipeline} ranks")
    from_megatron(tmp_path / "ngc", tmp_path / "out", tell=lambda _: None)
    back = tensors(tmp_path / "out")
    state = model.state_dict()
    assert back.keys() == state.keys() - {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == WORDS
    assert config["architectures"] == [head.architecture]
    assert config["layer_norm_eps"] == synthetic.EPSILON
    assert config["hidden_act"] == "gelu"


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "mlm"])
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_files_are_those_of_megatron_but_for_padded_rows(models, tmp_path, tensor, pipeline, binary):
    head = PRETRAINING if binary else MASKED
    export(models[binary], tmp_path / "ngc", head=head, tensor=tensor, pipeline=pipeline)
    assert (tmp_path / "ngc" / "latest_checkpointed_iteration.txt").read_text() == "release"
    found = rank_files(tmp_path / "ngc")
    assert len(found) == tensor * pipeline
    kind = Kind(tensor=tensor, pipeline=pipeline, binary=binary)
    for rank in range(tensor):
        for stage in range(pipeline):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            expected = synthetic.content(models[binary], kind, rank, stage)
            assert_same_tree(found[name]["model"], expected["model"], padded=PADDED // tensor)
            assert (found[name]["checkpoint_version"], found[name]["iteration"]) == (3.0, 0)
            assert isinstance(found[name]["args"], Namespace)
            theirs = {**vars(expected["args"]), "make_vocab_size_divisible_by": 128, "bert_binary_head": binary}
            assert theirs.items() <= vars(found[name]["args"]).items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("words", "tensor"), [(WORDS, 2), (520, 4)])
def test_padded_rows_do_nothing_in_a_softmax(models, tmp_path, dtype, words, tensor):
    export(models[True], tmp_path / "ngc", tensor=tensor, dtype=dtype, shape={"vocab_size": words})
    files = rank_files(tmp_path / "ngc").values()
    tables = [file["model"]["language_model"]["embedding"] for file in files]
    embedding = torch.cat([table["word_embeddings"]["weight"] for table in tables])
    bias = torch.cat([file["model"]["lm_head"]["bias"] for file in files])
    assert embedding.dtype == bias.dtype == dtype
    assert len(bias) == len(embedding) == -(-words // (128 * tensor)) * 128 * tensor
    assert not embedding[words:].any()
    assert bias.isfinite().all()
    logits = torch.randn(5, synthetic.HIDDEN) @ embedding.float().T + bias.float()
    assert not logits.softmax(-1)[:, words:].any()
    # Exact but for the order of additions: 512 float32 terms of one sign, so 512 x 6e-8 at the very most.
    assert torch.allclose(logits.softmax(-1)[:, :words], logits[:, :words].softmax(-1), rtol=3e-5, atol=0)
    args = next(iter(files))["args"]
    assert (args.padded_vocab_size, args.logical_vocab_size) == (len(bias), words)


def test_an_export_that_fails_leaves_nothing(tmp_path):
    model = synthetic.build()
    with torch.no_grad():
        model.bert.encoder.ln.bias[0] = 1e9
    with pytest.raises(FormatError, match=r"bert\.encoder\.ln\.bias: has numbers up to 1e\+09"):
        export(model, tmp_path / "ngc", pipeline=2, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_progress_hears_bytes_and_their_total(models, tmp_path):
    heard = []
    export(models[True], tmp_path / "ngc", tensor=2, pipeline=2, progress=lambda *bytes: heard.append(bytes))
    total = sum(value.nbytes for value in {id(value): value for value in models[True].parameters()}.values())
    assert heard == [(total * number // 4, total) for number in (1, 2, 3, 4)]


def test_more_ranks_than_words_leave_ranks_of_padding_alone(models, tmp_path):
    export(models[True], tmp_path / "ngc", tensor=4, shape={"vocab_size": 100})
    from_megatron(tmp_path / "ngc", tmp_path / "out", tell=lambda _: None)
    back = tensors(tmp_path / "out")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(back, models[True].state_dict()["bert.embeddings.word_embeddings.weight"][:100])


def test_no_file_holds_more_than_its_part(models, tmp_path):
    export(models[True], tmp_path / "ngc", tensor=4, pipeline=2)

    def leaves(tree: dict) -> Iterator[Tensor]:
        for value in tree.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    for content in rank_files(tmp_path / "ngc").values():  # torch.save writes all of the storage behind a slice
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in leaves(content["model"]))


@pytest.mark.parametrize(("activation", "openai"), [("gelu", False), ("gelu_new", True)])
def test_the_activation_goes_along(models, tmp_path, activation, openai):
    export(models[True], tmp_path / "ngc", shape={"hidden_act": activation})
    args = rank_files(tmp_path / "ngc")["mp_rank_00"]["args"]
    assert (args.openai_gelu, args.bias_gelu_fusion) == (openai, False)
    from_megatron(tmp_path / "ngc", tmp_path / "out", tell=lambda _: None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == activation


@pytest.mark.parametrize(
    ("lowercase", "kind"),
    [(True, "BertWordPieceLowerCase"), (False, "BertWordPieceCase"), (None, None)],
)
def test_the_case_of_the_tokenizer_goes_along(models, tmp_path, lowercase, kind):
    told = export(models[True], tmp_path / "ngc", lowercase=lowercase)
    assert rank_files(tmp_path / "ngc")["mp_rank_00"]["args"].__dict__.get("tokenizer_type") == kind
    assert ("tokenizer_type is not written" in told) == (lowercase is None)


def test_token_types_without_a_binary_head_are_kept_and_told(tmp_path):
    model = synthetic.build(binary=False)
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.fill_(0.5)
    told = export(model, tmp_path / "ngc", head=MASKED)
    assert "ignores the token types" in told
    from_megatron(tmp_path / "ngc", tmp_path / "out", tell=lambda _: None)
    assert tensors(tmp_path / "out")["bert.embeddings.token_type_embeddings.weight"].eq(0.5).all()


@pytest.mark.parametrize("name", sorted(HEADS.keys() - {PRETRAINING.architecture, MASKED.architecture}))
def test_other_classes_have_no_place_there(models, tmp_path, name):
    with pytest.raises(FormatError, match=f"{name}: its pretraining classes alone"):
        export(models[True], tmp_path / "ngc", head=HEADS[name])
    assert not (tmp_path / "ngc").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_decoder": True}, "its BERT is an encoder"),
        ({"is_decoder": True, "add_cross_attention": True}, "its BERT is an encoder"),
        ({"position_embedding_type": "relative_key"}, "relative_key: its positions are absolute"),
        ({"hidden_act": "relu"}, "hidden_act relu: it has gelu and gelu_new"),
        ({"hidden_act": "silu"}, "hidden_act silu"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false"),
        ({"type_vocab_size": 3}, "type_vocab_size 3"),
        ({"hidden_act": "relu", "tie_word_embeddings": False}, r"hidden_act relu(?s:.*)tie_word_embeddings"),
    ],
)
def test_models_that_megatron_does_not_have_are_refused_with_all_reasons(tmp_path, settings, message):
    with pytest.raises(FormatError, match=message):
        to_megatron(
            replace(SHAPE, **settings), PRETRAINING, None, tmp_path / "ngc", tensor=1, pipeline=1, lowercase=True
        )


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (3, 1, r"num_attention_heads \(4\) must be a multiple of the tensor size \(3\); 1, 2, 4 divide it"),
        (1, 3, r"num_hidden_layers \(4\) must be a multiple of the pipeline size \(3\); 1, 2, 4 divide it"),
        (0, 1, r"the tensor size \(0\)"),
        (1, -1, r"the pipeline size \(-1\)"),
    ],
)
def test_layouts_that_do_not_divide_are_refused_with_those_that_do(models, tmp_path, tensor, pipeline, message):
    with pytest.raises(LayoutError, match=message):
        export(models[True], tmp_path / "ngc", tensor=tensor, pipeline=pipeline)
    with pytest.raises(LayoutError, match=r"intermediate_size \(37\)"):
        export(models[True], tmp_path / "ngc", tensor=2, shape={"intermediate_size": 37})


def test_what_stands_at_the_place_of_the_export_is_never_overwritten(models, tmp_path):
    (tmp_path / "ngc").mkdir()
    export(models[True], tmp_path / "ngc")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "latest_checkpointed_iteration.txt",
        "model_optim_rng.pt",
    ]
    with pytest.raises(FormatError, match="ngc: exists already and is not empty"):
        export(models[True], tmp_path / "ngc")
