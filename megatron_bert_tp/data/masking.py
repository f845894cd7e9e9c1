"""Which tokens are hidden from the masked language model, and what is shown in their place."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.draws import Ints, Purpose, below, draw, streams, uniform
from megatron_bert_tp.data.pairs import Rows
from megatron_bert_tp.data.tokenizer import Vocabulary

_NEVER_FITS = np.iinfo(np.int64).max  # tokens of a word that is not there


@dataclass(frozen=True)
class MaskedRows:
    """Rows as the model sees them, and the tokens that it has to restore."""

    ids: Ints
    """``[samples, width]`` with [MASK] or another token where hidden."""
    is_masked: npt.NDArray[np.bool_]
    """``[samples, width]``, True at tokens to restore, those shown unchanged included."""
    labels: Ints
    """``[samples, width]`` the ids before masking."""


def mask_rows(
    rows: Rows, vocabulary: Vocabulary, masking: MaskingConfig, *, seed: int, numbers: Ints
) -> MaskedRows:
    """Hide words drawn by (seed, sample number); special tokens are never hidden.

    A row of n text tokens gets ``probability`` x n masked tokens, rounded up or down at random so that
    the mean is exact, and at least 1; fewer only where no word left is short enough.  Each masked token
    is shown as [MASK], as a random ordinary token or unchanged (Devlin et al. 2018, section 3.1).
    """
    is_masked = _choose_tokens(rows, vocabulary, masking, seed=seed, numbers=numbers)
    shown = rows.ids.copy()
    shown[is_masked] = _shown(rows.ids, is_masked, vocabulary, masking, seed=seed, numbers=numbers)
    return MaskedRows(shown, is_masked, rows.ids)


def _choose_tokens(
    rows: Rows, vocabulary: Vocabulary, masking: MaskingConfig, *, seed: int, numbers: Ints
) -> npt.NDArray[np.bool_]:
    starts = rows.is_text
    if masking.whole_words:
        starts = starts & (vocabulary.starts_word[rows.ids] | rows.begins)
    word: Ints = np.cumsum(starts, axis=1)  # of each token, from 1; special tokens repeat the word before them
    word[~rows.is_text] = 0
    sizes = _word_sizes(word, num_words=int(starts.sum(axis=1).max()))
    stream = streams(seed, Purpose.WORD, numbers)[:, None]
    bits = draw(stream, np.arange(sizes.shape[1] + 1))
    num_text = rows.is_text.sum(axis=1)
    budget = np.floor(masking.probability * num_text + uniform(bits[:, 0])).astype(np.int64)
    order = np.argsort(bits[:, 1:], axis=1)
    is_chosen = np.zeros((len(word), sizes.shape[1] + 1), dtype=np.bool_)
    in_order = _fill(np.take_along_axis(sizes, order, axis=1), np.maximum(budget, 1))
    np.put_along_axis(is_chosen, order + 1, in_order, axis=1)
    return np.take_along_axis(is_chosen, word, axis=1)


def _word_sizes(word: Ints, *, num_words: int) -> Ints:
    """``[samples, num_words]`` tokens of each word; never fitting where a row has fewer words."""
    row = np.arange(len(word))[:, None] * (num_words + 1)
    sizes = np.bincount((row + word).ravel(), minlength=len(word) * (num_words + 1))
    sizes = sizes.reshape(len(word), num_words + 1)[:, 1:]
    return np.where(sizes, sizes, _NEVER_FITS)


def _fill(sizes: Ints, budget: Ints) -> npt.NDArray[np.bool_]:
    """For each row, take words from left to right that still fit into the budget, passing over those that do not.

    Each round takes the words up to the first that does not fit.  What is left only shrinks, so a word
    that was passed over never fits later, and the next round can begin without it.
    """
    taken = np.zeros(sizes.shape, dtype=np.bool_)
    left = budget[:, None]
    while True:
        candidates = np.where((sizes <= left) & ~taken, sizes, 0)
        new = (candidates > 0) & (np.cumsum(candidates, axis=1) <= left)
        if not new.any():
            return taken
        taken |= new
        left = left - np.where(new, candidates, 0).sum(axis=1, keepdims=True)


def _shown(
    ids: Ints,
    is_masked: npt.NDArray[np.bool_],
    vocabulary: Vocabulary,
    masking: MaskingConfig,
    *,
    seed: int,
    numbers: Ints,
) -> Ints:
    """``[masked]`` what is shown at the masked places, row by row."""
    row, column = np.nonzero(is_masked)
    kind = uniform(draw(streams(seed, Purpose.REPLACEMENT, numbers)[row], column))
    token = draw(streams(seed, Purpose.REPLACEMENT_TOKEN, numbers)[row], column)
    ordinary = vocabulary.ordinary_ids
    is_random = kind < masking.mask_share + masking.random_share
    shown = np.where(is_random, ordinary[below(token, len(ordinary))], ids[is_masked])
    return np.where(kind < masking.mask_share, vocabulary.mask_id, shown)
