"""Going on from given words with a causal language model: greedy or sampled, with or without a cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.family.config import MegatronBertConfig
from megatron_bert_tp.family.outputs import CausalOutput


class GenerationSettings(TypedDict, total=False):
    """Keywords of `generate`, all optional."""

    max_length: int | None
    max_new_tokens: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    use_cache: bool
    seed: int
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    encoder_hidden_states: Tensor | None
    encoder_attention_mask: Tensor | None


@dataclass(frozen=True)
class Sampling:
    """How the next word is drawn; ``top_k`` 0 and ``top_p`` 1 leave all words in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """ArgumentError for numbers that make no distribution."""
        if not 1e-6 <= self.temperature <= 1e6:
            raise ArgumentError(
                f"temperature is {self.temperature}; it must be from 1e-6 to 1e6; leave do_sample out for the "
                "likeliest words"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ArgumentError(
                f"top_k is {self.top_k} and top_p is {self.top_p}; top_k must be 0 (off) or more, and top_p above "
                "0 and at most 1 (off)"
            )


class CausalModel(Protocol):
    """What generation needs of a model."""

    config: MegatronBertConfig
    training: bool

    def __call__(self, input_ids: Tensor, **arguments: object) -> CausalOutput:
        """Logits ``[batch, kept, vocabulary]`` and the cache."""


@dataclass(frozen=True)
class _Text:
    """What there is so far: words and mask ``[batch, sequence]``, and which samples go on ``[batch]`` bool."""

    words: Tensor
    mask: Tensor
    goes_on: Tensor


@dataclass(frozen=True)
class _Plan:
    """What one call of `generate` comes down to: ``end`` words in all, ``stop`` words ``[any]``."""

    end: int
    choose: Callable[[Tensor], Tensor]
    stop: Tensor
    fill: int
    use_cache: bool
    token_types: Tensor | None
    encoder_hidden_states: Tensor | None
    encoder_attention_mask: Tensor | None


def kept_words(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits ``[batch, vocabulary]`` after the temperature, those of words that are out at minus infinity.

    First the ``top_k`` likeliest stay (Fan et al. 2018); of these, as few of the likeliest as have ``top_p`` of
    the probability together (Holtzman et al. 2020), one at least.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(descending=True, stable=True)
        before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        is_out = torch.zeros_like(logits, dtype=torch.bool).scatter(1, places, before >= sampling.top_p)
        logits = logits.masked_fill(is_out, -torch.inf)
    return logits


def chooser(sampling: Sampling | None, seed: int) -> Callable[[Tensor], Tensor]:
    """Function from logits ``[batch, vocabulary]`` to words ``[batch]``; without ``sampling`` the likeliest.

    Draws come from ``seed`` on the CPU, so all tensor ranks draw the same.
    """
    if sampling is None:
        return lambda logits: logits.argmax(-1)
    sampling.check()
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        probabilities = kept_words(logits.double(), sampling).softmax(-1).cpu()
        # By the inverse of the distribution: a rounding of the logits moves a draw only at the edge of a word.
        draws = torch.rand(len(probabilities), 1, dtype=torch.float64, generator=generator)
        sums = probabilities.cumsum(-1)
        return torch.searchsorted(sums, draws * sums[:, -1:], right=True).squeeze(1).to(logits.device)

    return draw


@torch.no_grad()
def generate(
    model: CausalModel,
    input_ids: Tensor,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """Words ``[batch, length]``: ``input_ids`` ``[batch, sequence]`` and what the model says comes after.

    Ends at ``max_length`` words in all or ``max_new_tokens`` more (neither: as many as there are positions), or
    when every sample has said ``eos_token_id``, or one of several (default: those of the settings; none: never);
    a sample that has is filled with ``pad_token_id``.  Pad prompts on the left and hide the padding with
    ``attention_mask``: then positions begin at the first real word.  Greedy unless ``do_sample``, whose draws come
    from ``seed``.  The cache changes the speed and not the words.  ArgumentError for settings that cannot be.
    """
    config = model.config
    _check_model(model)
    _check_prompt(input_ids, attention_mask)
    sampling = Sampling(temperature, top_k, top_p)
    if not do_sample and sampling != Sampling():
        raise ArgumentError(f"{sampling} has no effect on greedy decoding; give do_sample=True, or leave it out")
    plan = _Plan(
        end=_end(input_ids.shape[1], max_length, max_new_tokens, config.max_position_embeddings),
        choose=chooser(sampling if do_sample else None, seed),
        stop=_stop_words(config.eos_token_id if eos_token_id is None else eos_token_id),
        fill=config.pad_token_id if pad_token_id is None else pad_token_id,
        use_cache=use_cache,
        token_types=token_type_ids,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
    )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    goes_on = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    return _continued(model, _Text(input_ids, mask, goes_on), plan).words


def _continued(model: CausalModel, text: _Text, plan: _Plan) -> _Text:
    """One word after another, of which only the new ones go through the model where there is a cache."""
    cache = None
    while text.words.shape[1] < plan.end and text.goes_on.any():
        seen = cache.get_seq_length() if cache is not None else 0
        output = model(
            text.words[:, seen:],
            attention_mask=text.mask,
            token_type_ids=_types(plan.token_types, text.words)[:, seen:],
            position_ids=None if model.config.shape.is_relative else _positions(text.mask)[:, seen:],
            past_key_values=cache,
            use_cache=plan.use_cache,
            logits_to_keep=1,
            return_dict=True,
            encoder_hidden_states=plan.encoder_hidden_states,
            encoder_attention_mask=plan.encoder_attention_mask,
        )
        cache = output.past_key_values
        text = _longer(text, plan.choose(output.logits[:, -1]), stop=plan.stop, fill=plan.fill)
    return text


def _check_model(model: CausalModel) -> None:
    if not model.config.is_decoder:
        raise ArgumentError("generate() needs a decoder: make the model with is_decoder=True")
    if model.training:
        raise ArgumentError("generate() would drop activations at random; call eval() on the model first")


def _end(length: int, max_length: int | None, max_new_tokens: int | None, positions: int) -> int:
    """Words in all."""
    if max_length is not None and max_new_tokens is not None:
        raise ArgumentError("give max_length or max_new_tokens, not both")
    end = max_length if max_length is not None else positions
    end = length + max_new_tokens if max_new_tokens is not None else end
    if not length < end <= positions:
        raise ArgumentError(
            f"from {length} words to {end}: the end must lie after the prompt, and the model has {positions} "
            "positions"
        )
    return end


def _stop_words(given: int | Sequence[int] | None) -> Tensor:
    """``[words]`` int64, any of which ends a sample."""
    words = () if given is None else (given,) if isinstance(given, int) else given
    return torch.tensor(words, dtype=torch.long)


def _check_prompt(input_ids: Tensor, mask: Tensor | None) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape or (mask is not None and mask.shape != input_ids.shape):
        told = "" if mask is None else f", and attention_mask {tuple(mask.shape)}"
        raise ArgumentError(
            f"the prompt has the shape {tuple(input_ids.shape)}{told}; give [batch, sequence], one word at least, "
            "and a mask of that shape"
        )


def _types(given: Tensor | None, words: Tensor) -> Tensor:
    """Segment of each word; what comes after the prompt belongs to its last segment, as in `transformers`."""
    if given is None:
        return torch.zeros_like(words)
    return torch.cat([given, given[:, -1:].expand(-1, words.shape[1] - given.shape[1])], 1)


def _positions(mask: Tensor) -> Tensor:
    """Position of each word among the real ones; padding before them is at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _longer(text: _Text, chosen: Tensor, *, stop: Tensor, fill: int) -> _Text:
    """One word more; samples that have ended get ``fill``, which nobody looks at."""
    words = torch.where(text.goes_on, chosen, fill)
    goes_on = text.goes_on & ~torch.isin(words, stop.to(words.device))
    return _Text(
        torch.cat([text.words, words[:, None]], 1),
        torch.cat([text.mask, torch.ones_like(words)[:, None]], 1),
        goes_on,
    )
