"""What the nine classes share: one stage of all layers, its weights, files and embeddings."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from megatron_bert_tp.checkpoint.load import load_parts_
from megatron_bert_tp.checkpoint.read import Reader
from megatron_bert_tp.errors import ArgumentError, ConfigError, LayoutError, MegatronBertError
from megatron_bert_tp.family.arguments import Arguments
from megatron_bert_tp.family.clipping import clip_
from megatron_bert_tp.family.config import MegatronBertConfig
from megatron_bert_tp.family.files import (
    WORDS,
    agreed,
    check_sizes,
    dtype_named,
    gather_whole,
    open_pretrained,
    reader_of,
    shard_bytes,
    whole_tensors,
    write_pretrained,
)
from megatron_bert_tp.family.outputs import Output
from megatron_bert_tp.family.passes import Passed, run_trunk
from megatron_bert_tp.family.vocabulary import (
    embedding_of,
    make_rows_,
    name_decoder_bias,
    resized_rows,
    set_projection_,
    take_decoder_bias,
)
from megatron_bert_tp.formats.huggingface import BIAS, DECODER_WEIGHT
from megatron_bert_tp.model.heads import LanguageHeads, MaskedLanguageModelHead, classify
from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.shape import Head, tied_names
from megatron_bert_tp.model.stage import MegatronBertStage, Trunk
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.parallel.random_bits import RandomBits
from megatron_bert_tp.parallel.sharding import Part, parts
from megatron_bert_tp.pipeline.partition import partition

log = logging.getLogger(__name__)
OutputT = TypeVar("OutputT", bound=Output)


class PretrainedModel(nn.Module):
    """All layers and one head in this process, or this rank's share of them with a mesh of tensor > 1.

    Outputs are whole and equal on all tensor ranks, and so are the gradients of what is not split.  The model
    has one leaf for tied embeddings, as any optimizer expects; its dropout bits come from ``seed`` and sample
    numbers, which count up by themselves in training unless they are given.  A mesh with a pipeline raises
    LayoutError: there a `MegatronBertStage` with the same head runs under the executor.
    """

    head: Head
    bert: Trunk
    cls: LanguageHeads
    prefix: ClassVar[str] = "bert."
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    """Arguments of the constructor that a class has beside these."""

    def __init__(
        self,
        config: MegatronBertConfig,
        *,
        mesh: ParallelMesh | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        weights: Reader | None = None,
    ) -> None:
        """``weights`` fills the parameters; without it they are drawn from ``seed``."""
        super().__init__()
        if not isinstance(config, MegatronBertConfig):
            raise ConfigError(
                f"config is a {type(config).__module__}.{type(config).__name__}; give a MegatronBertConfig of "
                "this package, which reads the other's files: MegatronBertConfig.from_pretrained(directory)"
            )
        self.config, self.seed, self.mesh = config, seed, mesh or ParallelMesh.alone()
        self.loading_info: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}
        self.samples_seen = 0
        """Samples of each data rank that were trained on: dropout bits go on from there, so keep it on resume."""
        if self.mesh.pipeline.size > 1:
            raise LayoutError(
                f"a {type(self).__name__} computes all layers in one call, and this mesh has a pipeline of "
                f"{self.mesh.pipeline.size} stages; use a mesh with pipeline 1, or build a MegatronBertStage with "
                f"head={self.head.architecture} for the executor"
            )
        plan = partition(config.num_hidden_layers, 1)[0]
        stage = MegatronBertStage(config.shape, plan, axis=self.mesh.tensor, head=self.head, dtype=dtype)
        if weights is None:
            initialise_(stage, seed=seed)
        else:
            load_parts_(stage.parts(), weights)
        for name, child in (stage if self.prefix else stage.bert).named_children():
            self.add_module(name, child)
        self.tie_weights()
        if config.shape.is_relative:  # nothing reads them; DistributedDataParallel would wait for their gradient
            self.trunk.embeddings.position_embeddings.weight.requires_grad_(False)
        self.register_state_dict_post_hook(name_decoder_bias)
        self.register_load_state_dict_pre_hook(take_decoder_bias)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        mesh: ParallelMesh | None = None,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        ignore_mismatched_sizes: bool = False,
        **overrides: Any,
    ) -> Self:
        """Model in evaluation mode from a Hugging Face directory, or a checkpoint, of any of the nine classes.

        ``dtype``, also by name, is that of the files unless given; ``overrides`` are settings of
        `MegatronBertConfig`.  Tensors of the head that the files lack, and cross-attention and distances that the
        settings add, are drawn from ``seed``; the log and `loading_info` say which.  With a mesh, every rank reads
        only its share.
        """
        options = {name: overrides.pop(name) for name in cls.OPTIONS if name in overrides}
        source = open_pretrained(
            Path(directory),
            cls.head_with(**options),
            overrides,
            seed=seed,
            ignores_sizes=ignore_mismatched_sizes,
        )
        made = source.dtype if dtype is None else dtype_named(dtype)
        model = cls(source.config, mesh=mesh, dtype=made, seed=seed, weights=source.read, **options)
        model.loading_info = {"missing_keys": list(source.new), "unexpected_keys": list(source.unused)}
        if (source.new or source.unused) and model.mesh.is_first:
            new, unused = (", ".join(names) or "none" for names in (source.new, source.unused))
            log.warning("%s: new in a %s, drawn at random: %s; unused: %s", directory, cls.__name__, new, unused)
        return model.eval()

    @classmethod
    def head_with(cls) -> Head:
        """Head of the class under its own options."""
        return cls.head

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int | str | None = None) -> None:
        """Write config.json and whole weights, as `transformers` reads them, beside what is there already.

        Under tensor parallelism every rank must call it, and the first one writes.  ``max_shard_size`` is in
        bytes, or text such as ``5GB``.  FormatError on every rank when it cannot be written, or a model stands
        there already; ConfigError when the settings are not those of the model any more.
        """
        axis, failure = self.mesh.tensor, None
        if not self.mesh.data.is_first:
            return
        check_sizes(self.parts(), self.config, self.head)
        most = None if max_shard_size is None else shard_bytes(max_shard_size)
        wholes = whole_tensors(self.parts(), axis)
        try:
            if axis.is_first:
                write_pretrained(
                    Path(directory), self.config, self.head, wholes, max_shard_bytes=most
                )
        except (MegatronBertError, OSError) as error:
            failure = error
        agreed(failure, axis)

    def parts(self) -> list[Part]:
        """Every named rectangle of a tensor on this rank; names carry the prefix ``bert.`` in every class.

        ConfigError when the settings tie embeddings that are two tensors by now.
        """
        aliases = tied_names(self.config.shape, self.head)
        if aliases and self.cls.predictions.decoder.weight is not self.trunk.embeddings.word_embeddings.weight:
            raise ConfigError(
                "tie_word_embeddings is set, but the word embeddings and the projection on the vocabulary are two "
                "tensors by now; call tie_weights(), or set config.tie_word_embeddings=False to keep both"
            )
        named = parts(self, self.mesh.tensor, aliases)
        return named if self.prefix else [replace(part, name=f"bert.{part.name}") for part in named]

    @property
    def trunk(self) -> Trunk:
        """Embeddings, encoder and pooler."""
        return self.bert if self.prefix else cast(Trunk, self)

    @property
    def predictions(self) -> MaskedLanguageModelHead | None:
        """Language-model head, where the class has one."""
        return self.cls.predictions if self.head.has_predictions else None

    @property
    def base_model(self) -> nn.Module:
        """What stands below the head, as `trunk`."""
        return self.trunk

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Numbers in the whole model, or of those that need a gradient; shared ones once, padding not at all."""
        return sum(
            prod(part.shape)
            for part in self.parts()
            if part.alias_of is None and (part.parameter.requires_grad or not only_trainable)
        )

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale all gradients so that their norm is at most ``max_norm``; returns the norm before, in float64.

        The norm is that of the whole model, equal on all tensor ranks, which must all call it.  torch's own
        function would see this rank's share alone and let replicated weights drift apart.
        """
        return clip_(self.parts(), self.mesh.tensor, max_norm)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, object] | None = None
    ) -> None:
        """Keep only the input of each layer in training, and compute its inside again in the backward.

        Of torch's two ways it is the one with ``use_reentrant=False``; ArgumentError for anything else.
        """
        asked = dict(gradient_checkpointing_kwargs or {})
        if asked.pop("use_reentrant", False) or asked:
            raise ArgumentError(
                f"gradient_checkpointing_kwargs is {gradient_checkpointing_kwargs}; only use_reentrant=False is "
                "there"
            )
        self.trunk.encoder.recomputes = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.trunk.encoder.recomputes = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward."""
        return self.trunk.encoder.recomputes

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings; ``weight`` holds this rank's rows."""
        return self.trunk.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Exchange the word embeddings; call `tie_weights` to have the projection follow.

        ArgumentError for another number of words: `resize_token_embeddings` changes it everywhere.
        """
        rows = getattr(value, "full_shapes", {"weight": tuple(value.weight.shape)})["weight"][0]  # type: ignore[arg-type]
        if rows != self.config.vocab_size:
            raise ArgumentError(
                f"the embeddings have {rows} words, and the model {self.config.vocab_size}; use "
                "resize_token_embeddings, and then set embeddings of that size"
            )
        self.trunk.embeddings.word_embeddings = embedding_of(value, self.mesh.tensor)  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        """The projection on the vocabulary, where the class has one."""
        return None if self.predictions is None else self.predictions.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Exchange the projection on the vocabulary; ArgumentError when the class has none."""
        if self.predictions is None:
            raise ArgumentError(f"a {type(self).__name__} has no output embeddings")
        set_projection_(self.predictions, value, self.mesh.tensor)

    def tie_weights(self) -> None:
        """Let the projection on the vocabulary use the weight of the word embeddings, if the settings tie them."""
        if self.predictions is not None and self.config.tie_word_embeddings:
            self.predictions.decoder.weight = self.trunk.embeddings.word_embeddings.weight

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Word embeddings, projection and bias for another number of words; returns the embeddings.

        New words come last and start as the mean of the old ones, or, without ``mean_resizing``, as new weights
        do.  Every tensor rank must call it.  Optimizers must be made anew: parameters are other objects.
        """
        num_rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            num_rows = -(-num_rows // pad_to_multiple_of) * pad_to_multiple_of
        if num_rows != self.config.vocab_size:
            resize_(self, num_rows, deviation=None if mean_resizing else self.config.initializer_range)
        return self.get_input_embeddings()

    def encode(self, arguments: Arguments) -> Passed:
        """Embeddings and all layers; in training with dropout."""
        bits = RandomBits(self.seed, self._sample_numbers(arguments)) if self.training else None
        return run_trunk(self.trunk, arguments, self.config, bits=bits, axis=self.mesh.tensor)

    def classify(self, states: Tensor, passed: Passed) -> Tensor:
        """Logits of the linear head on pooled ``[batch, hidden]`` or all positions' states."""
        assert self.head.linear is not None
        probability = self.config.hidden_dropout_prob if self.head.has_dropout else 0.0
        return classify(self.get_submodule(self.head.linear), states, passed.bits, probability)

    def _sample_numbers(self, arguments: Arguments) -> tuple[int, ...]:
        """Names of the dropout bits: given, or counted over all calls and data ranks."""
        num_samples, data = arguments.words.shape[0], self.mesh.data
        if arguments.sample_numbers is not None:
            if len(arguments.sample_numbers) != num_samples:
                raise ArgumentError(
                    f"sample_numbers has {len(arguments.sample_numbers)} entries for {num_samples} samples"
                )
            return arguments.sample_numbers
        first = self.samples_seen
        self.samples_seen += num_samples
        return tuple(number * data.size + data.rank for number in range(first, first + num_samples))

    def answer(self, output: OutputT, arguments: Arguments) -> OutputT | tuple[Any, ...]:
        """The output, or a plain tuple of it where that is asked for."""
        named = self.config.return_dict if arguments.return_dict is None else arguments.return_dict
        return output if named else output.to_tuple()


def resize_(model: PretrainedModel, num_rows: int, *, deviation: float | None) -> None:
    """Give ``model`` a vocabulary of ``num_rows`` words; new rows as for `resized_rows`."""
    config = model.config.replaced(vocab_size=num_rows)  # refuses a size without [PAD]
    axis = model.mesh.tensor
    wholes = {part.name: gather_whole(part, axis) for part in model.parts() if part.alias_of is None}
    generator = torch.Generator().manual_seed(model.seed)
    for name in (WORDS, DECODER_WEIGHT, BIAS):
        if name in wholes:
            wholes[name] = resized_rows(wholes[name], num_rows, deviation=deviation, generator=generator)
    make_rows_(model.trunk.embeddings, model.predictions, num_rows, axis=axis)
    model.config.vocab_size = config.vocab_size
    model.tie_weights()
    changed = [part for part in model.parts() if part.source in (WORDS, DECODER_WEIGHT, BIAS)]
    load_parts_(changed, reader_of(wholes))
