"""Which of the nine classes a file of weights is of, and which of its tensors belong to the class alone."""

from collections.abc import Mapping
from dataclasses import replace

from megatron_bert_tp.formats.stored_tensors import StoredTensor
from megatron_bert_tp.model.shape import HEADS, Head, ModelShape

PREFIX = "bert."
BARE = HEADS["MegatronBertModel"]
_OF_HEADS = ("bert.pooler.", "cls.", "classifier.", "qa_outputs.")
_OF_THE_ENCODER = ("embeddings.", "encoder.", "pooler.")
_IGNORED = {"bert.embeddings.position_ids"}  # a buffer that transformers saved before 4.31


def is_of_a_head(name: str) -> bool:
    """Whether a tensor belongs to what stands on the encoder, the pooler included."""
    return name.startswith(_OF_HEADS)


def internal_name(name: str) -> str:
    """Name of a tensor with the prefix that files of a bare `MegatronBertModel` leave out."""
    return f"{PREFIX}{name}" if name.startswith(_OF_THE_ENCODER) else name


def name_in_file(name: str, head: Head) -> str:
    """Name of a tensor in a file of the class."""
    return name.removeprefix(PREFIX) if head.architecture == BARE.architecture else name


def is_ignored(name: str) -> bool:
    """Whether old files hold something under this name that is no weight."""
    return name in _IGNORED


def head_in(tensors: Mapping[str, StoredTensor], shape: ModelShape, named: Head | None) -> Head:
    """The class of a file: the one that its settings name, else the one that its tensors make likely.

    A bare model that was saved with ``add_pooling_layer=False`` comes without its pooler.
    """
    head = named or _judged(tensors, shape)
    if head == BARE and not _has(tensors, "bert.pooler."):
        return replace(BARE, has_pooler=False)
    return head


def _judged(tensors: Mapping[str, StoredTensor], shape: ModelShape) -> Head:
    """The class whose tensors are there; what two classes have in common is told apart by the settings."""
    has_predictions, has_next_sentence = _has(tensors, "cls.predictions."), _has(tensors, "cls.seq_relationship.")
    linear = next((name for name in ("classifier", "qa_outputs") if f"{name}.weight" in tensors), None)
    candidates = [
        head
        for head in HEADS.values()
        if (head.has_predictions, head.has_next_sentence, head.linear)
        == (has_predictions, has_next_sentence, linear)
    ]
    if has_predictions and not has_next_sentence:
        return HEADS["MegatronBertForCausalLM" if shape.is_decoder else "MegatronBertForMaskedLM"]
    if linear == "classifier":
        return _judged_classifier(tensors, shape)
    return candidates[0] if candidates else BARE


def _judged_classifier(tensors: Mapping[str, StoredTensor], shape: ModelShape) -> Head:
    """One output for a pooled text is a choice, or a regression where the settings say one label."""
    if not _has(tensors, "bert.pooler."):
        return HEADS["MegatronBertForTokenClassification"]
    is_choice = tensors["classifier.weight"].shape[:1] == (1,) and shape.num_labels != 1
    return HEADS["MegatronBertForMultipleChoice" if is_choice else "MegatronBertForSequenceClassification"]


def _has(tensors: Mapping[str, StoredTensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)
