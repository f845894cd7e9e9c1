"""Our classes against transformers 4.57, kept as golden numbers: what later versions dropped or broke.

`tests/golden/make_transformers_4_57.py` made them.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_bert_tp.parallel.mesh import ParallelMesh
from tests.comparison import is_key_bias
from tests.family.passes import (
    Answer,
    Bounds,
    Call,
    RankAnswer,
    all_outputs,
    differences,
    guarded,
    idle_gradients,
    joined,
    load,
    make_call,
    mesh_of,
    on_ranks,
)
from tests.golden.formula import weight
from tests.sources import assert_none

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers_4_57.json"
ABOUT = json.loads(GOLDEN.read_text(encoding="utf-8"))
CASES = sorted(ABOUT["cases"])
AT_ONCE = [name for name in CASES if not ABOUT["cases"][name]["is_stepwise"]]
STEPWISE = [name for name in CASES if ABOUT["cases"][name]["is_stepwise"]]
WITH_CACHE = [name for name in STEPWISE if name != "causal_padded_steps"]
SIZES = (1, 2, 4)
EXACT = Bounds(outputs=1e-10, gradients=1e-10, idle=1e-12)
FEW = 3  # tokens that a cache holds before the rest comes

Found = dict[str, Answer | str]


@cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN.with_suffix(".safetensors"))


def part_of(case: str, part: str) -> dict[str, Tensor]:
    """Inputs, outputs, gradients or cache of one case."""
    start = f"{case}.{part}."
    return {key.removeprefix(start): value for key, value in golden().items() if key.startswith(start)}


def architecture_of(case: str) -> str:
    return ABOUT["models"][ABOUT["cases"][case]["model"]]["architecture"]


def write_model(directory: Path, about: dict[str, object]) -> None:
    """Directory as transformers 4.57 would save it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(about["config"]), encoding="utf-8")
    prefix = "bert." if about["architecture"] == "MegatronBertModel" else ""
    tensors = {name: weight(prefix + name, tuple(shape)) for name, shape in about["tensors"].items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for name, about in ABOUT["models"].items():
        write_model(folder / name, about)
    return folder


def load_golden(case: str, folder: Path, mesh: ParallelMesh | None) -> torch.nn.Module:
    model = load(architecture_of(case), folder / ABOUT["cases"][case]["model"], mesh, torch.float64)
    return model.eval()


def run_case(case: str, folder: Path, mesh: ParallelMesh | None) -> RankAnswer:
    model = load_golden(case, folder, mesh)
    gradients = part_of(case, "input_gradients")
    call = Call(
        inputs=part_of(case, "inputs"),
        switches={"output_attentions": True, "use_cache": False},
        differentiable=tuple(gradients),
        has_gradients=bool(part_of(case, "gradients")),
    )
    return make_call(model, call, torch.float64)


@torch.no_grad()
def run_stepwise(case: str, folder: Path, mesh: ParallelMesh | None, lengths: tuple[int, ...]) -> RankAnswer:
    """Logits of a sequence that comes in pieces of these lengths."""
    model = load_golden(case, folder, mesh)
    inputs = part_of(case, "inputs")
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    past, start, logits = None, 0, []
    for length in lengths:
        seen = {} if mask is None else {"attention_mask": mask[:, : start + length]}
        piece = ids[:, start : start + length]
        output = model(input_ids=piece, **seen, **inputs, past_key_values=past, use_cache=True)
        past, start = output.past_key_values, start + length
        logits.append(output.logits)
    return RankAnswer({"logits": torch.cat(logits, 1)}, {}, [])


def run_all(size: int, folder: Path) -> dict[str, RankAnswer | str]:
    """Every case on this rank; a stepwise one also with its first tokens together."""
    width = part_of(STEPWISE[0], "inputs")["input_ids"].shape[1]
    mesh = mesh_of(size)
    found = {case: guarded(run_case, case, folder, mesh) for case in AT_ONCE}
    for case in STEPWISE:
        found[case] = guarded(run_stepwise, case, folder, mesh, (1,) * width)
        found[f"{case} after {FEW}"] = guarded(run_stepwise, case, folder, mesh, (FEW, 1, width - FEW - 1))
    return found


@pytest.fixture(scope="module")
def found_at(ranks, models) -> Callable[[int], Found]:
    """Answers of all cases at one tensor size, which is run once."""
    known: dict[int, Found] = {}

    def found_at(size: int) -> Found:
        if size not in known:
            answers = on_ranks(ranks, size, run_all, models)
            known[size] = {case: guarded(joined, [answer[case] for answer in answers]) for case in answers[0]}
        return known[size]

    return found_at


@pytest.mark.parametrize("case", AT_ONCE)
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_equal_transformers_4(found_at, case, size):
    outputs, gradients = part_of(case, "outputs"), part_of(case, "gradients")
    truth = Answer(outputs, part_of(case, "input_gradients"), gradients)
    assert_none(differences(found_at(size)[case], truth, EXACT, idle_gradients(gradients)))


def test_key_biases_have_gradients_only_where_keys_meet_distances():
    """So that a comparison of all gradients does not take them for noise there."""
    idle = {case: idle_gradients(part_of(case, "gradients")) for case in ("relative_key", "relative_key_query")}
    assert {name for name in idle["relative_key"] if is_key_bias(name)}
    assert not idle["relative_key_query"]


@pytest.mark.parametrize("case", STEPWISE)
@pytest.mark.parametrize("size", SIZES)
def test_decoding_token_by_token_equals_transformers_4(found_at, case, size):
    truth = Answer(part_of(case, "outputs"), {}, {})
    assert_none(differences(found_at(size)[case], truth, EXACT, frozenset()))


@pytest.mark.parametrize("case", WITH_CACHE)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_may_come_in_pieces_of_any_length(found_at, case, size):
    """The last piece has several tokens, of which each sees those before it (4.57 misplaces relative ones)."""
    truth = Answer(part_of(case, "outputs"), {}, {})
    assert_none(differences(found_at(size)[f"{case} after {FEW}"], truth, EXACT, frozenset()))


def test_padding_in_front_changes_no_logits_of_real_tokens_after_it(found_at):
    """Also with several tokens at once, where rows of padding see nothing and their own numbers mean nothing."""
    real = part_of("causal_padded", "inputs")["attention_mask"].bool()
    found = found_at(1)[f"causal_padded_steps after {FEW}"]
    assert isinstance(found, Answer), found
    assert (found.outputs["logits"] - part_of("causal_padded", "outputs")["logits"])[real].abs().max() < 1e-10


def legacy_cache_of(case: str) -> tuple[tuple[Tensor, ...], ...]:
    named = part_of(case, "cache")
    places = sorted({tuple(map(int, key.split("."))) for key in named})
    layers = sorted({layer for layer, _ in places})
    return tuple(tuple(named[f"{n}.{place}"] for at, place in places if at == n) for n in layers)


@pytest.mark.parametrize("case", ["causal_steps", "causal_cross_steps"])
def test_a_legacy_cache_of_transformers_4_is_taken_up(models, case):
    model = load_golden(case, models, None)
    inputs = part_of(case, "inputs")
    ids = inputs.pop("input_ids")[:, FEW:]
    with torch.no_grad():
        output = model(input_ids=ids, **inputs, past_key_values=legacy_cache_of(case), use_cache=True)
    assert (all_outputs(output)["logits"] - part_of(case, "outputs")["logits"][:, FEW:]).abs().max() < 1e-10


@pytest.mark.parametrize("case", ["causal_steps", "causal_cross_steps"])
def test_our_cache_reads_like_a_legacy_cache(models, case):
    """``past_key_values[layer]`` is (key, value), with an encoder's (key, value) after them."""
    model = load_golden(case, models, None)
    inputs = part_of(case, "inputs")
    ids = inputs.pop("input_ids")[:, :FEW]
    with torch.no_grad():
        past = model(input_ids=ids, **inputs, use_cache=True).past_key_values
    for layer, expected in enumerate(legacy_cache_of(case)):
        for ours, theirs in zip(past[layer], expected, strict=False):
            assert (ours - theirs).abs().max() < 1e-10
