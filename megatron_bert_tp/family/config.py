"""Settings of a model under the names of `transformers.MegatronBertConfig`, and where they are kept."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Self, cast

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.model import parse_shape
from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.formats.huggingface_config import CONFIG, config_of, read_config
from megatron_bert_tp.model.shape import HEADS, ModelShape

_NUM_LABELS = 2
_OF_FROM_PRETRAINED = ("dtype", "mesh", "seed", "ignore_mismatched_sizes")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_BARE = HEADS["MegatronBertModel"]
_SHAPE = {each.name for each in fields(ModelShape)}


@dataclass
class MegatronBertConfig:
    """Numbers and choices of a model, with Hugging Face's defaults: those of the cased 345M.

    ``id2label``, ``label2id`` and ``num_labels`` say the same: one of them is enough.  ``extra`` holds keys of a
    `config.json` that mean nothing here, to be written again.  An unknown name raises, as does a value that
    cannot be.
    """

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    num_labels: int = _NUM_LABELS
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    extra: dict[str, JSON] = field(default_factory=dict)

    model_type = "megatron-bert"

    def __post_init__(self) -> None:
        if self.id2label is None and self.label2id:
            self.id2label = {number: name for name, number in self.label2id.items()}
        if self.id2label is not None:
            self.id2label = _labels(self.id2label)
            if self.num_labels == _NUM_LABELS:  # not given
                self.num_labels = len(self.id2label)
            self._check_labels()
        if self.id2label is not None and self.label2id is None:
            self.label2id = {name: number for number, name in self.id2label.items()}
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ConfigError(f"problem_type is {self.problem_type!r}; choose one of {', '.join(PROBLEM_TYPES)}")
        _ = self.shape

    def _check_labels(self) -> None:
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ConfigError(
                f"num_labels is {self.num_labels}, but id2label names {len(self.id2label)}; give as many names as "
                "labels, or set one of them alone"
            )

    @property
    def shape(self) -> ModelShape:
        """The numbers that decide tensors and computing; ConfigError lists all that are impossible."""
        values: dict[str, JSON] = {name: getattr(self, name) for name in _SHAPE}
        return parse_shape(values, source="MegatronBertConfig", error=ConfigError)

    @property
    def settings(self) -> dict[str, JSON]:
        """What a `config.json` holds beside the shape; ConfigError when labels and their number disagree."""
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        names = known.keys() - _SHAPE - {"extra"}
        defaults = {each.name: each.default for each in fields(self)}
        written = {name: known[name] for name in sorted(names) if known[name] != defaults[name]}
        self._check_labels()
        if self.id2label is not None:
            written["id2label"] = {str(number): name for number, name in self.id2label.items()}
        return {**self.extra, **written}

    @classmethod
    def from_shape(cls, shape: ModelShape, settings: Mapping[str, JSON]) -> Self:
        """Settings from the numbers of a model and the other keys of a `config.json`."""
        known = {each.name for each in fields(cls)} - _SHAPE - {"extra"}
        labels = settings.get("id2label") or None
        names = {name: value for name, value in settings.items() if name in known and name != "id2label"}
        extra = {name: value for name, value in settings.items() if name not in known}
        return cls(**asdict(shape), **names, id2label=labels, extra=extra)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, directory: str | Path, **overrides: object) -> Self:
        """Settings of a Hugging Face directory, ``overrides`` over them; FormatError when it has none."""
        read = read_config(Path(directory) / CONFIG)
        return cls.from_shape(read.shape, read.settings).replaced(**overrides)

    def replaced(self, **overrides: object) -> Self:
        """The same with other values; ConfigError for a name that there is not."""
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in overrides.keys() - known.keys():
            near = get_close_matches(name, [*known, *_OF_FROM_PRETRAINED], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"MegatronBertConfig has no setting {name!r}; {hint}")
        if overrides.get("num_labels", self.num_labels) != self.num_labels and "id2label" not in overrides:
            known |= {"id2label": None, "label2id": None}
        if "id2label" in overrides:
            known |= {"num_labels": len(cast(Mapping[int, str], overrides["id2label"])), "label2id": None}
        return type(self)(**{**known, **overrides})

    def to_dict(self) -> dict[str, JSON]:
        """Content of a `config.json`, without the class and the number format that only a model knows."""
        written = config_of(self.shape, _BARE, "float32", self.settings)
        return {name: value for name, value in written.items() if name not in ("architectures", "dtype")}

    def to_json_string(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` into ``directory``, which is made if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / CONFIG).write_text(self.to_json_string(), encoding="utf-8")


def _labels(given: Mapping[int, str]) -> dict[int, str]:
    """Names by number, which may be text as in JSON; ConfigError unless they are numbered from 0 on."""
    try:
        labels = {int(number): name for number, name in given.items()}
    except (TypeError, ValueError):
        labels = {}
    if sorted(labels) != list(range(len(given))) or not all(isinstance(name, str) for name in labels.values()):
        raise ConfigError(f"id2label and label2id must number names from 0 on, as {{0: 'no', 1: 'yes'}}: {given}")
    return labels
