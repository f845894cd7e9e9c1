"""Golden numbers of transformers 4.57 for what its successors dropped or broke.

Head masks, relative positions, 3-D masks, legacy caches, and cross-attention to an encoder of another length.
Run from the root of the repository, with the versions that `transformers_4_57.json` names, in an environment
of its own:

    OMP_NUM_THREADS=1 python -m tests.golden.make_transformers_4_57

It writes `transformers_4_57.json` (versions; settings and tensors of the models; cases) and
`transformers_4_57.safetensors` (inputs, outputs and gradients, float64) beside itself.  Weights are not in
them: `tests/golden/formula.py` gives them.  A second run gives the same bytes.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.formula import integers, scalar, uniform, weight

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {"is_decoder": True}
CROSS = {"is_decoder": True, "add_cross_attention": True}
RELATIVE = {"position_embedding_type": "relative_key"}
RELATIVE_QUERY = {"position_embedding_type": "relative_key_query"}
MODELS = {
    "encoder": ("MegatronBertModel", {}),
    "relative_key": ("MegatronBertModel", RELATIVE),
    "relative_key_query": ("MegatronBertModel", RELATIVE_QUERY),
    "decoder": ("MegatronBertModel", DECODER),
    "cross": ("MegatronBertModel", CROSS),
    "cross_relative": ("MegatronBertModel", {**CROSS, **RELATIVE_QUERY}),
    "causal": ("MegatronBertForCausalLM", DECODER),
    "causal_relative_key": ("MegatronBertForCausalLM", {**DECODER, **RELATIVE}),
    "causal_relative_key_query": ("MegatronBertForCausalLM", {**DECODER, **RELATIVE_QUERY}),
    "causal_cross": ("MegatronBertForCausalLM", CROSS),
}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one model, and those of them whose gradients are kept, with all parameters'.

    A case without ``has_gradients`` keeps outputs only.  ``is_stepwise`` feeds one token at a time to a cache.
    """

    model: str
    inputs: Tensors
    differentiable: tuple[str, ...] = ()
    has_gradients: bool = False
    is_stepwise: bool = False


def padding(lengths: tuple[int, ...], width: int) -> Tensor:
    """2-D mask of rows with padding behind."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def sparse(name: str, batch: int, queries: int, keys: int) -> Tensor:
    """3-D mask, a third of it zeros, in which every query sees at least one key."""
    mask = (uniform(name, (batch, queries, keys), low=0, high=1) > 1 / 3).long()
    mask[:, torch.arange(queries), torch.arange(queries) % keys] = 1
    return mask


def text(width: int) -> Tensors:
    ids = integers(f"ids {width}", (2, width), low=0, high=SIZES["vocab_size"])
    return {"input_ids": ids, "token_type_ids": integers(f"types {width}", (2, width), low=0, high=2)}


def encoded(width: int) -> Tensor:
    return uniform(f"encoder {width}", (2, width, SIZES["hidden_size"]))


def cases() -> dict[str, Case]:
    """All cases by name."""
    padded = {**text(7), "attention_mask": padding((7, 4), 7)}
    crossed = {**text(5), "attention_mask": padding((5, 3), 5), "encoder_hidden_states": encoded(8)}
    crossed["encoder_attention_mask"] = padding((6, 8), 8)
    heads_2d = uniform("head mask 2-D", (2, 4), low=0, high=1)
    heads_2d[0, 3], heads_2d[1, 0] = 0, 0
    heads_1d = torch.tensor([1.0, 0.0, 0.25, 1.5], dtype=torch.float64)
    heads, grads = ("head_mask",), {"has_gradients": True}
    return {
        "head_mask_1d": Case("encoder", {**padded, "head_mask": heads_1d}, heads, **grads),
        "head_mask_2d": Case("encoder", {**padded, "head_mask": heads_2d}, heads, **grads),
        "mask_3d": Case("encoder", {**text(7), "attention_mask": sparse("mask", 2, 7, 7)}, **grads),
        "relative_key": Case("relative_key", padded, **grads),
        "relative_key_query": Case("relative_key_query", padded, **grads),
        "decoder_mask_3d": Case("decoder", {**text(7), "attention_mask": sparse("mask", 2, 7, 7)}),
        "cross": Case("cross", crossed, ("encoder_hidden_states",), **grads),
        "cross_head_mask": Case("cross", {**crossed, "head_mask": heads_2d}),
        "cross_mask_3d": Case("cross", {**crossed, "encoder_attention_mask": sparse("cross", 2, 5, 8)}),
        "cross_relative": Case("cross_relative", crossed),
        **causal_cases(),
    }


def causal_cases() -> dict[str, Case]:
    """Each decoder at once and a token at a time; the second row of one batch is padded in front."""
    ids = {"input_ids": text(7)["input_ids"]}
    crossed = {"encoder_hidden_states": encoded(5), "encoder_attention_mask": padding((5, 2), 5)}
    inputs = {
        "causal": ids,
        "causal_padded": {**ids, "attention_mask": padding((7, 4), 7).flip(1)},
        "causal_relative_key": ids,
        "causal_relative_key_query": ids,
        "causal_cross": {**ids, **crossed},
    }
    models = {name: name.removesuffix("_padded") for name in inputs}
    at_once = {name: Case(models[name], given) for name, given in inputs.items()}
    steps = {f"{name}_steps": Case(models[name], given, is_stepwise=True) for name, given in inputs.items()}
    return at_once | steps


def prefix_of(model: torch.nn.Module) -> str:
    return "bert." if type(model).__name__ == "MegatronBertModel" else ""


def build(name: str) -> torch.nn.Module:
    architecture, settings = MODELS[name]
    config = transformers.MegatronBertConfig(**SIZES, **settings)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager")
    model = model.to(torch.float64).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(weight(prefix_of(model) + key, tuple(parameter.shape)))
    return model


def describe(model: torch.nn.Module) -> dict[str, object]:
    """Class, config.json and tensors as the library saves them."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(directory) / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
    return {"architecture": type(model).__name__, "config": config, "tensors": shapes}


def call(model: torch.nn.Module, case: Case) -> Tensors:
    """Outputs, and gradients of `formula.scalar` of those that are not attentions."""
    inputs = {k: v.clone().requires_grad_(k in case.differentiable) for k, v in case.inputs.items()}
    # With a cache, even an empty one, 4.57 takes all queries to stand at the last position.
    output = model(**inputs, output_attentions=True, use_cache=False)
    plain = {k: output[k] for k in ("last_hidden_state", "pooler_output", "logits") if k in output}
    answer = {f"outputs.{name}": value for name, value in plain.items()}
    for name in ("attentions", "cross_attentions"):
        answer |= {f"outputs.{name}.{layer}": value for layer, value in enumerate(output.get(name) or ())}
    if case.has_gradients:
        scalar(plain).backward()
        parameters = {prefix_of(model) + key: value for key, value in model.named_parameters()}
        answer |= {f"gradients.{key}": p.grad for key, p in parameters.items() if p.grad is not None}
        answer |= {f"input_gradients.{key}": inputs[key].grad for key in case.differentiable}
        model.zero_grad()
    return answer


def legacy_cache(layers: tuple[tuple[Tensor | None, ...], ...]) -> Tensors:
    """Tensors by layer and place; a decoder without encoder has None in the places of its keys and values."""
    named = ((f"cache.{n}.{place}", v) for n, layer in enumerate(layers) for place, v in enumerate(layer))
    return {name: value.clone() for name, value in named if value is not None}


@torch.no_grad()
def call_stepwise(model: torch.nn.Module, case: Case) -> Tensors:
    """Logits of every token given alone, and the legacy cache after the third."""
    rest = {k: v for k, v in case.inputs.items() if k not in ("input_ids", "attention_mask")}
    ids, mask = case.inputs["input_ids"], case.inputs.get("attention_mask")
    cache, logits, answer = None, [], {}
    for step in range(ids.shape[1]):
        seen = {} if mask is None else {"attention_mask": mask[:, : step + 1]}
        token = ids[:, step : step + 1]
        output = model(token, **seen, **rest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
        if step == 2:
            answer = legacy_cache(cache.to_legacy_cache())
    return answer | {"outputs.logits": torch.cat(logits, 1)}


def main() -> None:
    torch.set_num_threads(1)
    models = {name: build(name) for name in MODELS}
    tensors: Tensors = {}
    for name, case in cases().items():
        run: Callable[[torch.nn.Module, Case], Tensors] = call_stepwise if case.is_stepwise else call
        answer = {f"inputs.{key}": value for key, value in case.inputs.items()} | run(models[case.model], case)
        tensors |= {f"{name}.{key}": value.detach().clone() for key, value in answer.items()}
    made_with = {each.__name__: each.__version__ for each in (transformers, torch, numpy, safetensors)}
    about = {
        "made_with": made_with,
        "models": {name: describe(model) for name, model in models.items()},
        "cases": {k: {"model": c.model, "is_stepwise": c.is_stepwise} for k, c in cases().items()},
    }
    save_file(tensors, HERE / "transformers_4_57.safetensors")
    (HERE / "transformers_4_57.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
