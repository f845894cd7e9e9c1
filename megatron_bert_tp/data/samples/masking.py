"""Which tokens are hidden from the masked language model, and what is shown in their place."""

from dataclasses import dataclass

import numpy as np

from megatron_bert_tp.config.schema import MaskingConfig
from megatron_bert_tp.data.draws import Ints, Purpose, below, draw, streams, uniform
from megatron_bert_tp.data.samples.pairs import Rows
from megatron_bert_tp.data.samples.span_masking import Flags, choose_tokens
from megatron_bert_tp.data.tokenizer import Vocabulary


@dataclass(frozen=True)
class MaskedRows:
    """Rows as the model sees them, and the tokens that it has to restore."""

    ids: Ints
    """``[samples, width]`` with [MASK] or another token where hidden."""
    is_masked: Flags
    """``[samples, width]``, True at tokens to restore, those shown unchanged included."""
    labels: Ints
    """``[samples, width]`` the ids before masking."""


def mask_rows(
    rows: Rows, vocabulary: Vocabulary, masking: MaskingConfig, *, seed: int, numbers: Ints
) -> MaskedRows:
    """Hide spans of words drawn by (seed, sample number); special tokens are never hidden.

    A row of n text tokens gets ``probability`` x n masked tokens, rounded up or down at random so that
    the mean is exact, at least 1 and at most ``maximum``; fewer only where no word left is short enough.
    Which, says `choose_tokens`.  Each masked token is shown as [MASK], as a random ordinary token or
    unchanged (Devlin et al. 2018, section 3.1).
    """
    begins_word = _begins_word(rows, vocabulary, masking)
    is_masked = choose_tokens(rows.is_text, begins_word, masking, seed=seed, numbers=numbers)
    shown = rows.ids.copy()
    shown[is_masked] = _shown(rows.ids, is_masked, vocabulary, masking, seed=seed, numbers=numbers)
    return MaskedRows(shown, is_masked, rows.ids)


def _begins_word(rows: Rows, vocabulary: Vocabulary, masking: MaskingConfig) -> Flags:
    """``[samples, width]`` True at the first token of each unit that is hidden whole.

    A word that truncation has cut begins with the first token of A or B, a piece.
    """
    if not masking.whole_words:
        return rows.is_text
    begins = vocabulary.starts_word[rows.ids]
    begins[:, 1:] |= ~rows.is_text[:, :-1]
    return begins & rows.is_text


def _shown(
    ids: Ints,
    is_masked: Flags,
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
