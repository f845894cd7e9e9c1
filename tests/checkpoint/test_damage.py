"""Whatever is missing, damaged or foreign is named, with a way out, before a weight is used."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bert_tp.checkpoint.directories import latest_checkpoint
from megatron_bert_tp.checkpoint.model import check_model
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.errors import CheckpointError
from tests.checkpoint.layouts import ODD, TINY, save

SHARD = "rank_00001.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("original")
    save(root, TINY, 4, tensor=2)
    return root


@pytest.fixture
def root(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoints"))


@pytest.fixture
def step(root) -> Path:
    return root / "step_00000004"


def test_a_run_a_root_and_a_step_can_be_opened(root, step, tmp_path):
    assert {Checkpoint.open(path).directory for path in (tmp_path, root, step)} == {step}


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("region", [0.0, 0.25, 0.5, 0.75, 0.9999])
def test_a_flipped_bit_in_a_shard_is_found_and_named(step, region):
    flip(step / SHARD, int(region * (step / SHARD).stat().st_size))
    checkpoint = Checkpoint.open(step)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: its content does not fit the SHA-256"):
        checkpoint.verify()


def test_every_flipped_bit_in_the_manifest_is_found(step):
    """Those too that turn a space into another one."""
    path = step / "manifest.json"
    size = path.stat().st_size
    for position in range(0, size, 37):
        for bit in (0, position % 8):
            flip(path, position, bit)
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                Checkpoint.open(step)
            flip(path, position, bit)
    Checkpoint.open(step)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_shard_is_found_at_opening(step, kept):
    path = step / SHARD
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{SHARD}: has \d+ bytes, but manifest.json says \d+"):
        Checkpoint.open(step)


def test_a_shard_that_grew_is_found_at_opening(step):
    with (step / SHARD).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=rf"{SHARD}: has \d+ bytes, but manifest.json says \d+"):
        Checkpoint.open(step)


def test_a_missing_shard_is_found_at_opening(step):
    (step / SHARD).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD}: is missing"):
        Checkpoint.open(step)


def test_a_shard_of_another_checkpoint_is_not_read(step):
    manifest = json.loads((step / "manifest.json").read_text())
    for row in manifest["slices"]:
        if row["name"] == "weight/bert.encoder.ln.weight":
            row["dtype"] = "float64"
    rewrite(step, manifest)
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        Checkpoint.open(step).weight("bert.encoder.ln.weight", (0,), (8,))


def test_a_damaged_header_is_an_error_of_the_file(step):
    flip(step / "rank_00000.safetensors", 3)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: .* cannot be read"):
        Checkpoint.open(step).weight("bert.encoder.ln.weight", (0,), (8,))


def test_a_directory_without_manifest_is_no_checkpoint(step):
    (step / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint found; looked for .*manifest\.json, .*latest"):
        Checkpoint.open(step)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object, not a list"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("{}", "not the manifest of a checkpoint"),
        ('{"format": "megatron_bert_tp checkpoint", "version": 99}', "format version 99.* reads 1"),
        ('{"format": "megatron_bert_tp checkpoint", "version": 1}', "does not fit its SHA-256"),
    ],
)
def test_a_manifest_that_is_none_is_refused(step, text, message):
    (step / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"manifest\.json: .*{message}"):
        Checkpoint.open(step)


def rewrite(step: Path, manifest: dict[str, object]) -> None:
    """Write a manifest whose SHA-256 fits, as a malicious author would."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    text = json.dumps({**body, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}, indent=1)
    (step / "manifest.json").write_text(f"{text}\n")


def put(manifest: dict[str, object], path: tuple[str | int, ...], value: object) -> None:
    *parents, last = path
    place: object = manifest
    for key in parents:
        place = place[key]  # type: ignore[index]
    place[last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("slices", 0, "file"), "../../secret", "'../../secret' is not the plain name"),
        (("slices", 0, "file"), "/etc/passwd", "is not the plain name"),
        (("slices", 0, "file"), "other.safetensors", "files without size and SHA-256: other"),
        (("slices", 0, "file"), None, "None is not the plain name"),
        (("files", "../x"), {"size": 1, "sha256": ""}, "'../x' is not the plain name"),
        (("files", ".."), {"size": 1, "sha256": ""}, "'..' is not the plain name"),
        (("attachments",), ["a/b"], "'a/b' is not the plain name"),
        (("attachments",), ["vocab.txt"], "files without size and SHA-256: vocab.txt"),
        (("files", SHARD, "size"), "12", "size of a file must be a number from 0 on, not '12'"),
        (("files", SHARD, "sha256"), 12, "SHA-256 of a file must be text"),
        (("files",), [], "files must be an object"),
        (("slices",), {}, "slices must be a list"),
        (("slices", 0), 3, "slice must be an object"),
        (("slices", 0, "dtype"), "object", "dtype 'object' is none of"),
        (("slices", 0, "name"), 3, "slice 3"),
        (("slices", 0, "shape"), [1.5], "shape must be a number"),
        (("slices", 0, "offsets", 0), -1, "offsets must be a number from 0 on, not -1"),
        (("slices", 0, "extent", 0), True, "extent must be a number"),
        (("slices", 0, "offsets"), [0], "does not lie inside the shape"),
        (("slices", 0, "shape", 0), 10**15, "disagree|numbers of shape"),
        (("step",), -1, "step must be a number"),
        (("facts",), None, "facts must be an object"),
    ],
)
def test_a_manifest_made_to_mislead_is_refused(step, path, value, message):
    manifest = json.loads((step / "manifest.json").read_text())
    put(manifest, path, value)
    rewrite(step, manifest)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(step)


def test_a_pointer_to_a_missing_directory_names_what_there_is(root):
    (root / "latest").write_text("step_00000099\n")
    with pytest.raises(CheckpointError, match=r"latest: names step_00000099.*write one of step_00000004 into it"):
        latest_checkpoint(root)


@pytest.mark.parametrize("content", [b"", b"../../elsewhere", b"/etc", b"\xff\xfe", b"step_4"])
def test_a_damaged_pointer_is_named(root, content):
    (root / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest: must hold the name of a checkpoint"):
        Checkpoint.open(root)


def test_nothing_saved_is_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_a_checkpoint_of_another_size_lists_all_numbers_that_differ(step):
    other = replace(TINY, vocab_size=10, num_hidden_layers=2, hidden_dropout_prob=0.5, initializer_range=0.1)
    with pytest.raises(CheckpointError) as raised:
        check_model(Checkpoint.open(step), other)
    message = str(raised.value)
    assert "model.vocab_size: 9 there, 10 in the settings" in message
    assert "model.num_hidden_layers: 1 there, 2 in the settings" in message
    assert "dropout" not in message
    assert "initializer_range" not in message


def test_dropout_may_differ(step):
    check_model(Checkpoint.open(step), replace(TINY, hidden_dropout_prob=0.5, initializer_range=0.1))


def test_tied_weights_differ_from_untied_ones(step):
    with pytest.raises(CheckpointError, match=r"model\.tie_word_embeddings: True there, False"):
        check_model(Checkpoint.open(step), replace(TINY, tie_word_embeddings=False))


def test_facts_that_do_not_fit_the_tensors_are_noticed(tmp_path):
    facts = {"model": {**vars(TINY), "vocab_size": 1003}}
    path = save(tmp_path, TINY, facts=facts)
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: \(9, 8\), should be \(1003, 8\)"):
        check_model(Checkpoint.open(path), replace(TINY, vocab_size=1003))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "facts do not say the model"),
        ({}, "vocab_size: is missing"),
        ({**vars(ODD), "hidden_size": "16"}, "hidden_size: '16' is not a whole number"),
        ({**vars(ODD), "num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is not"),
        ({**vars(ODD), "tie_word_embeddings": 1}, "tie_word_embeddings: 1 is not true or false"),
        ({**vars(ODD), "layer_norm_eps": None}, "layer_norm_eps: None is not a number"),
        ({**vars(ODD), "hidden_size": True}, "hidden_size: True is not a whole number"),
        ({**vars(ODD), "num_attention_heads": 3}, r"hidden_size \(16\) must be a multiple"),
    ],
)
def test_facts_that_describe_no_model_are_refused(tmp_path, model, message):
    path = save(tmp_path, TINY, facts={"model": model})
    with pytest.raises(CheckpointError, match=message):
        check_model(Checkpoint.open(path), TINY)
