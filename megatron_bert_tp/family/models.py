"""The nine classes of `transformers`' MegatronBert page: each is a head, its arguments and its loss.

All take ``input_ids``, ``attention_mask`` and ``token_type_ids`` by place, and the rest by name: see
`family.arguments.Arguments`.  With ``return_dict=False`` they give a plain tuple.  Losses are means over the
labels that are not ignored, and 0 where all are.
"""

import logging
from dataclasses import replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from megatron_bert_tp.errors import ArgumentError
from megatron_bert_tp.family.arguments import (
    Arguments,
    CrossArguments,
    DecoderArguments,
    EncoderArguments,
)
from megatron_bert_tp.family.base import PretrainedModel
from megatron_bert_tp.family.choices import flattened
from megatron_bert_tp.family.config import MegatronBertConfig
from megatron_bert_tp.family.generation import CausalModel, GenerationSettings, generate
from megatron_bert_tp.family.heads import kept_positions, labels_of_next_words, whole_vocabulary, words_loss
from megatron_bert_tp.family.outputs import (
    AnswerOutput,
    BaseOutput,
    CausalOutput,
    LogitsOutput,
    PreTrainingOutput,
)
from megatron_bert_tp.family.passes import Passed
from megatron_bert_tp.model.heads import Pooler
from megatron_bert_tp.model.shape import HEADS, Head
from megatron_bert_tp.objectives.label_losses import (
    LABEL_LOSSES,
    CrossEntropy,
    answer_labels,
    mean_loss,
    problem_type_of,
)

log = logging.getLogger(__name__)


class MegatronBertModel(PretrainedModel):
    """Encoder, or decoder with ``is_decoder``, without a head; the pooler can be left out."""

    head = HEADS["MegatronBertModel"]
    pooler: Pooler
    prefix = ""
    OPTIONS = ("add_pooling_layer",)

    def __init__(self, config: MegatronBertConfig, add_pooling_layer: bool = True, **options: Any) -> None:
        """``options`` as for `PretrainedModel`."""
        self.__dict__["head"] = self.head_with(add_pooling_layer)
        super().__init__(config, **options)

    @classmethod
    def head_with(cls, add_pooling_layer: bool = True) -> Head:
        """The head, with or without the pooler."""
        return replace(HEADS[cls.__name__], has_pooler=add_pooling_layer)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **more: Unpack[DecoderArguments],
    ) -> BaseOutput | tuple[Any, ...]:
        """Hidden states ``[batch, sequence, hidden]`` and pooled output ``[batch, hidden]``."""
        arguments = Arguments.of(DecoderArguments, (input_ids, attention_mask, token_type_ids), more)
        passed = self.encode(arguments)
        output = BaseOutput(
            last_hidden_state=passed.hidden,
            pooler_output=self.pooler(passed.hidden) if self.head.has_pooler else None,
            past_key_values=passed.cache,
            hidden_states=passed.states,
            attentions=passed.attentions,
            cross_attentions=passed.cross_attentions,
        )
        return self.answer(output, arguments)


class MegatronBertForPreTraining(PretrainedModel):
    """Masked language model and next-sentence prediction, as in pretraining."""

    head = HEADS["MegatronBertForPreTraining"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **more: Unpack[EncoderArguments],
    ) -> PreTrainingOutput | tuple[Any, ...]:
        """``labels`` ``[batch, sequence]`` with -100 at what is not masked, ``next_sentence_label`` ``[batch]``.

        Label 0: B follows A, 1: it is random.  The loss is the plain sum of those of the labels that are given.
        """
        arguments = Arguments.of(EncoderArguments, (input_ids, attention_mask, token_type_ids), more)
        passed = self.encode(arguments)
        words = self.cls.predictions(passed.hidden)
        pairs = self.cls.seq_relationship(self.bert.pooler(passed.hidden))
        losses = words_loss(self.cls.predictions, words, labels), _class_loss(pairs, next_sentence_label)
        given = [loss for loss in losses if loss is not None]
        output = PreTrainingOutput(
            loss=torch.stack(given).sum() if given else None,
            prediction_logits=whole_vocabulary(self.cls.predictions, words),
            seq_relationship_logits=pairs,
            hidden_states=passed.states,
            attentions=passed.attentions,
            masked_lm_loss=losses[0],
            next_sentence_loss=losses[1],
        )
        return self.answer(output, arguments)


class MegatronBertForMaskedLM(PretrainedModel):
    """Masked language model alone."""

    head = HEADS["MegatronBertForMaskedLM"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **more: Unpack[CrossArguments],
    ) -> LogitsOutput | tuple[Any, ...]:
        """Logits ``[batch, sequence, vocabulary]``; ``labels`` ``[batch, sequence]``, -100 where there is none."""
        arguments = Arguments.of(CrossArguments, (input_ids, attention_mask, token_type_ids), more)
        passed = self.encode(arguments)
        words = self.cls.predictions(passed.hidden)
        loss = words_loss(self.cls.predictions, words, labels)
        output = _logits_output(loss, whole_vocabulary(self.cls.predictions, words), passed)
        return self.answer(output, arguments)


class MegatronBertForCausalLM(PretrainedModel):
    """Language model from left to right; the settings need ``is_decoder``."""

    head = HEADS["MegatronBertForCausalLM"]

    def __init__(self, config: MegatronBertConfig, **options: Any) -> None:
        """``options`` as for `PretrainedModel`."""
        if not config.is_decoder:
            log.warning("is_decoder is not set, so every position of this language model sees those after it")
        super().__init__(config, **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Unpack[DecoderArguments],
    ) -> CausalOutput | tuple[Any, ...]:
        """``labels`` ``[batch, sequence]`` are the words themselves: each position has to tell the next one.

        ``logits_to_keep`` computes the logits of that many last positions only (0: all), or of the positions that
        it lists.  Labels turn the cache off.
        """
        if labels is not None:
            more["use_cache"] = False
        arguments = Arguments.of(DecoderArguments, (input_ids, attention_mask, token_type_ids), more)
        is_cut = isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
        if labels is not None and is_cut:
            raise ArgumentError("labels need the logits of all positions; leave logits_to_keep at 0")
        passed = self.encode(arguments)
        words = self.cls.predictions(kept_positions(passed.hidden, logits_to_keep))
        targets = None if labels is None else labels_of_next_words(labels)
        output = CausalOutput(
            loss=words_loss(self.cls.predictions, words, targets),
            logits=whole_vocabulary(self.cls.predictions, words),
            past_key_values=passed.cache,
            hidden_states=passed.states,
            attentions=passed.attentions,
            cross_attentions=passed.cross_attentions,
        )
        return self.answer(output, arguments)

    def generate(self, input_ids: Tensor, **settings: Unpack[GenerationSettings]) -> Tensor:
        """Go on from ``input_ids`` ``[batch, sequence]``; see `family.generation.generate`."""
        return generate(cast(CausalModel, self), input_ids, **settings)


class MegatronBertForNextSentencePrediction(PretrainedModel):
    """Whether the second segment follows the first."""

    head = HEADS["MegatronBertForNextSentencePrediction"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **more: Unpack[EncoderArguments],
    ) -> LogitsOutput | tuple[Any, ...]:
        """Logits ``[batch, 2]``; ``labels`` ``[batch]``: 0 where B follows A, 1 where it is random."""
        arguments = Arguments.of(EncoderArguments, (input_ids, attention_mask, token_type_ids), more)
        passed = self.encode(arguments)
        logits = self.cls.seq_relationship(self.bert.pooler(passed.hidden))
        return self.answer(_logits_output(_class_loss(logits, labels), logits, passed), arguments)


class MegatronBertForSequenceClassification(PretrainedModel):
    """Classes, several labels, or numbers for a whole sequence."""

    head = HEADS["MegatronBertForSequenceClassification"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **more: Unpack[EncoderArguments],
    ) -> LogitsOutput | tuple[Any, ...]:
        """Logits ``[batch, num_labels]``.

        ``labels``: ``[batch]`` int64 classes; ``[batch, num_labels]`` floats of 0 and 1 for several that may hold
        at once; or ``[batch]`` or ``[batch, num_labels]`` numbers.  ``config.problem_type`` says which, and is set
        on first use by number of labels and number format, as `transformers` does it.
        """
        arguments = Arguments.of(EncoderArguments, (input_ids, attention_mask, token_type_ids), more)
        passed = self.encode(arguments)
        logits = self.classify(self.bert.pooler(passed.hidden), passed)
        loss = None
        if labels is not None:
            if self.config.problem_type is None:
                self.config.problem_type = problem_type_of(labels, self.config.num_labels)
            loss = mean_loss(LABEL_LOSSES[self.config.problem_type], logits, labels)
        return self.answer(_logits_output(loss, logits, passed), arguments)


class MegatronBertForMultipleChoice(PretrainedModel):
    """Which of several continuations is right."""

    head = HEADS["MegatronBertForMultipleChoice"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **more: Unpack[EncoderArguments],
    ) -> LogitsOutput | tuple[Any, ...]:
        """Inputs ``[batch, choices, sequence]``, logits ``[batch, choices]``, ``labels`` ``[batch]``."""
        arguments, num_choices = flattened(
            Arguments.of(EncoderArguments, (input_ids, attention_mask, token_type_ids), more)
        )
        passed = self.encode(arguments)
        logits = self.classify(self.bert.pooler(passed.hidden), passed).view(-1, num_choices)
        return self.answer(_logits_output(_class_loss(logits, labels), logits, passed), arguments)


class MegatronBertForTokenClassification(PretrainedModel):
    """A class for every token."""

    head = HEADS["MegatronBertForTokenClassification"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **more: Unpack[EncoderArguments],
    ) -> LogitsOutput | tuple[Any, ...]:
        """Logits ``[batch, sequence, num_labels]``; ``labels`` ``[batch, sequence]``, -100 where there is none."""
        arguments = Arguments.of(EncoderArguments, (input_ids, attention_mask, token_type_ids), more)
        passed = self.encode(arguments)
        logits = self.classify(passed.hidden, passed)
        return self.answer(_logits_output(_class_loss(logits, labels), logits, passed), arguments)


class MegatronBertForQuestionAnswering(PretrainedModel):
    """Where the answer begins and ends."""

    head = HEADS["MegatronBertForQuestionAnswering"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **more: Unpack[EncoderArguments],
    ) -> AnswerOutput | tuple[Any, ...]:
        """Logits ``[batch, sequence]`` of either end; positions ``[batch]`` beyond the sequence are ignored.

        The loss is the mean of the two, and there is one only if both positions are given.
        """
        arguments = Arguments.of(EncoderArguments, (input_ids, attention_mask, token_type_ids), more)
        if (start_positions is None) != (end_positions is None):
            raise ArgumentError("give start_positions and end_positions, or neither; the loss needs both")
        passed = self.encode(arguments)
        starts, ends = self.classify(passed.hidden, passed).unbind(-1)
        output = AnswerOutput(
            loss=_answer_loss((starts, ends), (start_positions, end_positions)),
            start_logits=starts,
            end_logits=ends,
            hidden_states=passed.states,
            attentions=passed.attentions,
        )
        return self.answer(output, arguments)


def _class_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    return None if labels is None else mean_loss(CrossEntropy(), logits, labels)


def _answer_loss(logits: tuple[Tensor, ...], positions: tuple[Tensor | None, ...]) -> Tensor | None:
    losses = [
        mean_loss(CrossEntropy(), each, answer_labels(position, each.shape[1]))
        for each, position in zip(logits, positions, strict=True)
        if position is not None
    ]
    return torch.stack(losses).mean() if losses else None


def _logits_output(loss: Tensor | None, logits: Tensor, passed: Passed) -> LogitsOutput:
    return LogitsOutput(loss=loss, logits=logits, hidden_states=passed.states, attentions=passed.attentions)
