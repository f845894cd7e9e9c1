"""Every head trains under a pipeline through the executor: loss and gradients are those of the family's class.

With dropout, in float64: the class computes the whole batch in one process and in one call, the pipeline in
microbatches, so that nothing but the names of the dropout bits makes the two agree.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_bert_tp
from megatron_bert_tp.family.config import MegatronBertConfig
from megatron_bert_tp.model.initialisation import initialise_
from megatron_bert_tp.model.shape import HEADS, ModelShape, tensor_shapes
from megatron_bert_tp.model.stage import MegatronBertStage
from megatron_bert_tp.objectives.tasks import count_labels, loss_of_step, task_loss, terms_of
from megatron_bert_tp.parallel.collectives import sum_over_
from megatron_bert_tp.pipeline.partition import partition
from tests.comparison import Piece, gradient_pieces, join, own_piece, relative_errors
from tests.support import (
    CPU,
    IGNORED,
    ODD_SHAPE,
    Layout,
    build_executor,
    build_gradients,
    build_mesh,
    program_of,
    with_dropout,
)

SEED = 4
NUM_ROWS, WIDTH, CHOICES = 12, 11, 3
NUM_MICROBATCHES = 4
FIRST = 99  # sample number of the first row
SHAPE = with_dropout(replace(ODD_SHAPE, num_labels=3, position_embedding_type="relative_key_query"))
LAYOUTS = [Layout(pipeline=2), Layout(pipeline=2, tensor=2), Layout(tensor=4), Layout(data=2, pipeline=2)]
HEADED = [name for name in HEADS if name != "MegatronBertModel"]
# Sums of some thousand numbers near 1, in another order.
EXACT = 1e-10


@dataclass(frozen=True)
class TaskBatch:
    """Rows with the labels of every head, of which each reads its own."""

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    sample_numbers: tuple[int, ...]
    masked_positions: Tensor
    masked_labels: Tensor
    next_sentence_labels: Tensor
    labels: Tensor
    start_positions: Tensor
    end_positions: Tensor
    packed_lengths: None = None
    position_ids: None = None


@dataclass(frozen=True)
class Case:
    """A class and what its labels are."""

    architecture: str
    problem_type: str | None = None

    def __str__(self) -> str:
        return self.problem_type or self.architecture.removeprefix("MegatronBertFor")

    @property
    def shape(self) -> ModelShape:
        return replace(SHAPE, is_decoder=self.architecture == "MegatronBertForCausalLM")


CASES = [
    *(Case(name) for name in HEADED if "Sequence" not in name),
    *(
        Case("MegatronBertForSequenceClassification", kind)
        for kind in ("regression", "single_label_classification", "multi_label_classification")
    ),
]


def draw(*shape: int, below: int, seed: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def dense_labels(case: Case) -> dict[str, Tensor]:
    """Arguments of the class for the whole batch."""
    words = draw(NUM_ROWS, WIDTH, below=SHAPE.vocab_size, seed=1)
    words[draw(NUM_ROWS, WIDTH, below=3, seed=2) > 0] = IGNORED
    pairs = draw(NUM_ROWS, below=2, seed=3)
    classes = draw(NUM_ROWS, below=SHAPE.num_labels, seed=4)
    tokens = draw(NUM_ROWS, WIDTH, below=SHAPE.num_labels, seed=5)
    tokens[:, ::4] = IGNORED
    match case.architecture.removeprefix("MegatronBertFor"):
        case "PreTraining":
            return {"labels": words, "next_sentence_label": pairs}
        case "MaskedLM":
            return {"labels": words}
        case "CausalLM":
            return {"labels": draw(NUM_ROWS, WIDTH, below=SHAPE.vocab_size, seed=6)}
        case "NextSentencePrediction":
            return {"labels": pairs}
        case "MultipleChoice":
            return {"labels": draw(NUM_ROWS // CHOICES, below=CHOICES, seed=7)}
        case "TokenClassification":
            return {"labels": tokens}
        case "QuestionAnswering":
            ends = draw(2, NUM_ROWS, below=WIDTH + 3, seed=8)
            return {"start_positions": ends[0], "end_positions": ends[1]}
    if case.problem_type == "single_label_classification":
        return {"labels": classes}
    return {"labels": F.one_hot(classes, SHAPE.num_labels).double()}


def inputs() -> dict[str, Tensor]:
    lengths = torch.tensor([11, 7, 9, 11, 4, 11, 8, 11, 5, 6, 11, 10])
    ids = draw(NUM_ROWS, WIDTH, below=SHAPE.vocab_size - 1, seed=9) + 1
    return {
        "input_ids": ids,
        "attention_mask": torch.arange(WIDTH) < lengths[:, None],
        "token_type_ids": draw(NUM_ROWS, WIDTH, below=2, seed=10),
    }


def rows_of(case: Case, labels: dict[str, Tensor], rows: slice) -> TaskBatch:
    """Some rows as a microbatch."""
    given = {name: value[rows] for name, value in inputs().items()}
    words = labels.get("labels", torch.zeros(0))[rows] if "LM" in str(case) or "Pre" in str(case) else None
    if str(case) == "CausalLM":
        words = F.pad(words[:, 1:], (0, 1), value=IGNORED)
    places = torch.zeros(0, dtype=torch.long) if words is None else (words.flatten() != IGNORED).nonzero()[:, 0]
    none = torch.zeros(NUM_ROWS)
    own = labels.get("labels", none)
    chosen = slice(rows.start // CHOICES, rows.stop // CHOICES) if str(case) == "MultipleChoice" else rows
    return TaskBatch(
        **given,
        sample_numbers=tuple(range(FIRST + rows.start, FIRST + rows.stop)),
        masked_positions=places,
        masked_labels=places if words is None else words.flatten()[places],
        next_sentence_labels=labels.get("next_sentence_label", own)[rows],
        labels=own[chosen],
        start_positions=labels.get("start_positions", none)[rows],
        end_positions=labels.get("end_positions", none)[rows],
    )


def train(case: Case, layout: Layout) -> tuple[float, list[Piece]]:
    """Loss of a step, and this rank's gradients, of a stage under the executor."""
    mesh, shape, head = build_mesh(layout), case.shape, HEADS[case.architecture]
    plan = partition(shape.num_hidden_layers, mesh.pipeline.size)[mesh.pipeline.rank]
    stage = MegatronBertStage(shape, plan, axis=mesh.tensor, head=head, seed=SEED, dtype=torch.float64)
    initialise_(stage, seed=SEED)
    terms = terms_of(head, shape, tensor=mesh.tensor, problem_type=case.problem_type)
    size = NUM_ROWS // NUM_MICROBATCHES
    cuts = [slice(first, first + size) for first in range(0, NUM_ROWS, size)]
    batches = [rows_of(case, dense_labels(case), cut) for cut in cuts][mesh.data.rank :: mesh.data.size]
    counts = count_labels(terms, batches, mesh.data, CPU)
    names = list(tensor_shapes(shape, head))
    gradients = build_gradients(stage, mesh, names)
    gradients.begin(len(batches))
    executor = build_executor(stage, lambda output, batch: task_loss(terms, output, batch, counts), mesh)
    statistics = executor.run(program_of("1f1b", mesh, len(batches)), batches)
    sums = torch.stack(statistics).sum(0) if statistics else torch.zeros(len(terms), dtype=torch.float64)
    sum_over_(sum_over_(sums, mesh.pipeline), mesh.data)
    gradients.reduce_and_norm()
    return loss_of_step(terms, sums, counts), [own_piece(part, gradient) for part, gradient in gradients.own]


def answer_loss(output, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """The class' loss without what it has of padding, which depends on how a batch is padded."""
    is_token = inputs()["attention_mask"]

    def half(logits: Tensor, places: Tensor) -> Tensor:
        labels = places.masked_fill(places >= is_token.sum(1), IGNORED)
        return F.cross_entropy(logits.masked_fill(~is_token, -torch.inf), labels)

    return (half(output.start_logits, start_positions) + half(output.end_logits, end_positions)) / 2


def truth(case: Case) -> tuple[float, dict[str, Tensor]]:
    """The same from the family's class: one process, one call."""
    settings = {"problem_type": case.problem_type} if case.problem_type else {}
    config = MegatronBertConfig.from_shape(case.shape, settings)
    model = getattr(megatron_bert_tp, case.architecture)(config, dtype=torch.float64, seed=SEED).train()
    given, numbers = inputs(), tuple(range(FIRST, FIRST + NUM_ROWS))
    if str(case) == "MultipleChoice":  # its choices are numbered by sample x choices + choice
        given = {name: value.view(NUM_ROWS // CHOICES, CHOICES, WIDTH) for name, value in given.items()}
        numbers = tuple(range(FIRST // CHOICES, (FIRST + NUM_ROWS) // CHOICES))
    output = model(**given, **dense_labels(case), sample_numbers=numbers)
    loss = output.loss if str(case) != "QuestionAnswering" else answer_loss(output, **dense_labels(case))
    loss.backward()
    return loss.item(), join(gradient_pieces(part for part in model.parts() if part.alias_of is None))


@pytest.fixture(scope="module")
def truth_of():
    known = {}

    def truth_of(case: Case) -> tuple[float, dict[str, Tensor]]:
        if case not in known:
            known[case] = truth(case)
        return known[case]

    return truth_of


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: f"d{each.data}p{each.pipeline}t{each.tensor}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_head_trains_as_its_class_does(ranks, truth_of, case, layout):
    loss, gradients = truth_of(case)
    answers = ranks.run(layout.world, train, case, layout)
    assert all(answer[0] == pytest.approx(loss, rel=EXACT) for answer in answers)
    found = join([piece for _, pieces in answers for piece in pieces])
    assert found.keys() == gradients.keys()
    errors = relative_errors(found, gradients)
    # With k . d in the scores even the bias of the keys has a gradient of its own.
    assert {name: e for name, e in errors.items() if e > EXACT} == {}


def test_heads_without_pooled_output_have_no_pooler_and_language_models_no_classifier():
    names = {name: {n.split(".")[0] for n in stage_names(name)} for name in HEADS}
    assert names["MegatronBertForTokenClassification"] == {"bert", "classifier"}
    assert names["MegatronBertForQuestionAnswering"] == {"bert", "qa_outputs"}
    assert names["MegatronBertForMaskedLM"] == {"bert", "cls"}
    assert not any("pooler" in name for name in stage_names("MegatronBertForMaskedLM"))
    assert any("pooler" in name for name in stage_names("MegatronBertForSequenceClassification"))


def stage_names(architecture: str) -> list[str]:
    from megatron_bert_tp.parallel.mesh import Axis

    plan = partition(SHAPE.num_hidden_layers, 1)[0]
    stage = MegatronBertStage(SHAPE, plan, axis=Axis.alone("tensor"), head=HEADS[architecture])
    return [part.name for part in stage.parts()]
