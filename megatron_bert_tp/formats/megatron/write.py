"""The files of Megatron-LM's checkpoint version 3.0: one for each tensor rank of each stage."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from megatron_bert_tp.checkpoint.read import Reader
from megatron_bert_tp.formats.megatron.arguments import LOGICAL_ROWS
from megatron_bert_tp.formats.megatron.names import BIAS, BLOCKS, FUSED, LAYER_PARTS, TOKEN_TYPES, WORDS, split_dim
from megatron_bert_tp.formats.megatron.qkv import NEWEST, fuse
from megatron_bert_tp.formats.number_formats import dtype_of
from megatron_bert_tp.model.shape import Head, ModelShape, tensor_shapes

ACTIVATIONS = {"gelu": False, "gelu_new": True}
"""Activations that Megatron-LM has, and whether it calls them openai_gelu: tanh in the MLP and in the LM head."""
PADDED_BIAS = -10_000.0
"""Bias of padded rows: finite in every number format, and its exponential is 0 beside those of real logits."""
PAD_ROWS_TO = 128
"""Megatron-LM's default of ``--make-vocab-size-divisible-by``; the unit is this times the tensor size."""
_WRITTEN_PARTS = {part: name for name, part in reversed(list(LAYER_PARTS.items()))}  # the first name of each

Tree = dict[str, object]


@dataclass(frozen=True)
class RankWriter:
    """Content of the file of any rank, read when it is asked for."""

    shape: ModelShape
    head: Head
    read: Reader
    tensor: int
    pipeline: int
    lowercase: bool | None

    def content(self, rank: int, stage: int) -> Tree:
        """What `torch.save` is to write for a tensor rank of a stage."""
        return {
            "args": self._arguments(),
            "checkpoint_version": NEWEST,
            "iteration": 0,
            "model": self._model(rank, stage),
        }

    def remarks(self) -> list[str]:
        """What the user should know about the files."""
        found = []
        if self.lowercase is None:
            found.append("tokenizer_type is not written, for nothing says whether the vocabulary is uncased")
        if self.has_token_types and not self.head.has_next_sentence:
            found.append("Megatron-LM ignores the token types, for there is no binary head")
        return found

    @property
    def size(self) -> int:
        """Bytes of all tensors, but for padding and copies."""
        dtype = dtype_of(self.read, WORDS, self._sizes[WORDS])
        return dtype.itemsize * sum(prod(size) for size in self._sizes.values())

    @property
    def padded_rows(self) -> int:
        """Rows of the vocabulary over all ranks."""
        unit = PAD_ROWS_TO * self.tensor
        return -(-self.shape.vocab_size // unit) * unit

    @cached_property
    def has_token_types(self) -> bool:
        """Whether token types are more than the one row of zeros that stands for none."""
        return self.shape.type_vocab_size > 1 or bool(self._whole(TOKEN_TYPES).any())

    def _model(self, rank: int, stage: int) -> Tree:
        is_first, is_last = stage == 0, stage == self.pipeline - 1
        language_model: Tree = {"encoder": self._encoder(rank, stage)}
        model: Tree = {"language_model": language_model}
        if is_first:
            language_model["embedding"] = self._embedding(rank)
        if is_last:
            model["lm_head"] = self._lm_head(rank)
        if is_last and self.head.has_next_sentence:
            language_model["pooler"] = self._affine("dense.", "bert.pooler.dense", rank)
            model["binary_head"] = self._affine("", "cls.seq_relationship", rank)
        if is_last and not is_first:
            model["word_embeddings_for_head"] = {"weight": self._rows(WORDS, rank, padding=0.0)}
        return model

    def _embedding(self, rank: int) -> Tree:
        tables: Tree = {
            "word_embeddings": {"weight": self._rows(WORDS, rank, padding=0.0)},
            "position_embeddings": {"weight": self._whole("bert.embeddings.position_embeddings.weight")},
        }
        if self.has_token_types:
            tables["tokentype_embeddings"] = {"weight": self._whole(TOKEN_TYPES)}
        return tables

    def _encoder(self, rank: int, stage: int) -> Tree:
        """Layers of a stage, counted from its first, and the last LayerNorm on the last stage."""
        num_layers = self.shape.num_hidden_layers // self.pipeline
        tensors: Tree = {}
        for local in range(num_layers):
            layer = f"bert.encoder.layer.{stage * num_layers + local}"
            for part, name in _WRITTEN_PARTS.items():
                tensors |= self._affine(f"layers.{local}.{name}.", f"{layer}.{part}", rank)
        if stage == self.pipeline - 1:
            tensors |= self._affine("final_layernorm.", "bert.encoder.ln", rank)
        return tensors

    def _lm_head(self, rank: int) -> Tree:
        return {
            "bias": self._rows(BIAS, rank, padding=PADDED_BIAS),
            **self._affine("dense.", "cls.predictions.transform.dense", rank),
            **self._affine("layernorm.", "cls.predictions.transform.LayerNorm", rank),
        }

    def _affine(self, prefix: str, name: str, rank: int) -> Tree:
        part = self._fused if name.endswith(FUSED) else self._part
        return {f"{prefix}{leaf}": part(f"{name}.{leaf}", rank) for leaf in ("weight", "bias")}

    def _fused(self, name: str, rank: int) -> Tensor:
        query, key, value = (
            self._part(name.replace(FUSED, f"attention.self.{block}"), rank, dim=0) for block in BLOCKS
        )
        return fuse(query, key, value, num_heads=self.shape.num_attention_heads // self.tensor)

    def _part(self, name: str, rank: int, dim: int | None = None) -> Tensor:
        """Share of a rank; of all of a tensor where ranks do not share it."""
        size = self._sizes[name]
        dim = split_dim(name) if dim is None else dim
        if dim is None:
            return self._whole(name)
        share = size[dim] // self.tensor
        offsets = tuple(rank * share if axis == dim else 0 for axis in range(len(size)))
        return self.read(name, offsets, (*size[:dim], share, *size[dim + 1 :])).clone()

    def _rows(self, name: str, rank: int, *, padding: float) -> Tensor:
        """Rows of a rank of the vocabulary, with those of the padding that fall to it."""
        rows, *rest = self._sizes[name]
        share = self.padded_rows // self.tensor
        first = min(rank * share, rows)
        held = min((rank + 1) * share, rows) - first
        known = self.read(name, (first, *(0 for _ in rest)), (held, *rest))
        padded = known.new_full((share, *rest), padding)
        padded[:held] = known
        return padded

    def _whole(self, name: str) -> Tensor:
        size = self._sizes[name]
        return self.read(name, (0,) * len(size), size).clone()

    @cached_property
    def _sizes(self) -> Mapping[str, tuple[int, ...]]:
        return tensor_shapes(self.shape, self.head)

    @property
    def _tokenizer_type(self) -> dict[str, str]:
        """The argument that says the case; none where it is not known."""
        if self.lowercase is None:
            return {}
        return {"tokenizer_type": "BertWordPieceLowerCase" if self.lowercase else "BertWordPieceCase"}

    def _arguments(self) -> Namespace:
        """What Megatron-LM compares with its own arguments, takes over, or reads of a checkpoint."""
        shape = self.shape
        layers, positions = shape.num_hidden_layers, shape.max_position_embeddings
        return Namespace(
            attention_dropout=shape.attention_probs_dropout_prob,
            add_position_embedding=True,
            apply_residual_connection_post_layernorm=False,
            bert_binary_head=self.head.has_next_sentence,
            bias_gelu_fusion=False,
            consumed_train_samples=0,
            consumed_valid_samples=0,
            data_parallel_random_init=False,
            encoder_num_layers=layers,
            encoder_seq_length=positions,
            ffn_hidden_size=shape.intermediate_size,
            hidden_dropout=shape.hidden_dropout_prob,
            hidden_size=shape.hidden_size,
            init_method_std=shape.initializer_range,
            kv_channels=shape.head_size,
            layernorm_epsilon=shape.layer_norm_eps,
            make_vocab_size_divisible_by=PAD_ROWS_TO,
            max_position_embeddings=positions,
            num_attention_heads=shape.num_attention_heads,
            num_layers=layers,
            onnx_safe=None,
            openai_gelu=ACTIVATIONS[shape.hidden_act],
            padded_vocab_size=self.padded_rows,
            pipeline_model_parallel_size=self.pipeline,
            seq_length=positions,
            tensor_model_parallel_size=self.tensor,
            virtual_pipeline_model_parallel_size=None,
            **self._tokenizer_type,
            **{LOGICAL_ROWS: shape.vocab_size},
        )
