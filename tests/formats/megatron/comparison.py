"""Importing, and what the real `transformers` finds in the result."""

import json
import sys
from pathlib import Path

import torch

from megatron_bert_tp.formats.megatron.convert import from_megatron
from tests.formats.megatron.synthetic import WORDS, Model

TOKENS = torch.tensor([[2, 17, 999, 5, 0, 3], [8, 8, 1, 40, 700, 31]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


def bring(source: Path, out: Path, **wishes: object) -> list[str]:
    """Import, and return what was told."""
    told: list[str] = []
    from_megatron(source, out, tell=told.append, **wishes)
    return told


def load(out: Path) -> Model:
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    model, info = getattr(sys.modules["transformers"], kind).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_model(out: Path, expected: Model) -> None:
    """Every tensor, on the words that are no padding, and the logits."""
    found = load(out)
    assert type(found) is type(expected)
    there, here = found.state_dict(), expected.state_dict()
    assert there.keys() == here.keys()
    for name, value in here.items():
        assert torch.equal(there[name][: len(value)], value), name
    with torch.no_grad():
        ours, theirs = (model(TOKENS, attention_mask=MASK) for model in (found, expected))
    logits = "prediction_logits" if "prediction_logits" in theirs else "logits"
    assert (ours[logits][..., :WORDS] - theirs[logits]).abs().max() <= 1e-6
    if "seq_relationship_logits" in theirs:
        assert (ours.seq_relationship_logits - theirs.seq_relationship_logits).abs().max() <= 1e-6
