"""What a checkpoint holds of one rank, and how a rank is filled from one: weights, moments, counters."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bert_tp.checkpoint.durable import JSON
from megatron_bert_tp.checkpoint.load import fill_, load_rectangles_
from megatron_bert_tp.checkpoint.model import check_model
from megatron_bert_tp.checkpoint.read import Checkpoint
from megatron_bert_tp.checkpoint.slices import Rectangle, rectangles
from megatron_bert_tp.data.tokenizer import Tokenizer
from megatron_bert_tp.errors import CheckpointError, DataError
from megatron_bert_tp.formats.tokenizer_files import LIBRARY, VOCABULARY
from megatron_bert_tp.formats.weights import ModelSource, open_encoder_weights, open_weights
from megatron_bert_tp.model.chunks import Chunks
from megatron_bert_tp.model.initialisation import initialise_parts_
from megatron_bert_tp.model.shape import PRETRAINING, tensor_shapes
from megatron_bert_tp.optim.loss_scale import LossScale
from megatron_bert_tp.optim.rules import kinds_of, moment_of, restart_
from megatron_bert_tp.parallel.mesh import ParallelMesh
from megatron_bert_tp.parallel.narrow import is_narrow
from megatron_bert_tp.parallel.ownership import is_master
from megatron_bert_tp.parallel.sharding import Part
from megatron_bert_tp.training.anomalies import NORMS, SKIPPED
from megatron_bert_tp.training.recipe import Recipe
from megatron_bert_tp.training.update import Updater

UPDATES, LOSS_SCALE = "updates", "loss_scale"
"""Facts of a checkpoint: updates of the weights, skipped steps left out; and what scales the loss of float16."""

Held = Iterable[tuple[Part, Tensor]]
Fill = Callable[[Held], None]


def held_rectangles(chunks: Chunks, updater: Updater, optimizer_name: str, mesh: ParallelMesh) -> list[Rectangle]:
    """What this rank writes: weights, those of narrow parameters in float32, and moments.

    With a sharded optimizer every data rank writes its own rows, else the first one writes all.
    """
    owned = updater.weights.owned
    held = []
    if mesh.data.is_first or updater.weights.is_sharded:
        held = rectangles("weight", [(each.part, each.weight) for each in owned])
        for kind in kinds_of(optimizer_name):
            moment = moment_of(updater.optimizer, kind)
            held += rectangles(kind, [(each.part, moment(each)) for each in owned])
    if mesh.data.is_first:
        known = {part.name for part, _ in updater.idle}
        idle = [part for part in idle_parts(chunks, updater) if part.name not in known]
        held += rectangles("weight", updater.idle)
        held += rectangles("weight", [(part, part.view(part.parameter)) for part in idle])
    return held


def idle_parts(chunks: Chunks, updater: Updater) -> list[Part]:
    """Parts that nothing moves: frozen ones, and positions that nothing reads."""
    moved = {each.part.name for each in updater.weights.owned}
    return [part for part in chunks.parts() if part.name not in moved]


def facts_of(updater: Updater) -> Mapping[str, JSON]:
    """Counters of the update, and what the next step is judged by."""
    scale, history = updater.loss_scale, updater.history
    judged_by: dict[str, JSON] = {NORMS: list(history.norms), SKIPPED: history.skipped_in_a_row}
    return {UPDATES: updater.updates_done, **judged_by, **({} if scale is None else {LOSS_SCALE: scale.facts()})}


def weights_source(recipe: Recipe, checkpoint: Checkpoint | None, *, checks: bool) -> Fill:
    """Where weights come from: the checkpoint, else ``model.weights``, else the seed.

    ``checks`` is set on one rank, which verifies files for all.
    """
    shape, seed = recipe.shape, recipe.optimizer.seed
    if checkpoint is not None:
        check_model(checkpoint, shape, recipe.head)
        return lambda held: fill_(held, checkpoint.weight)
    if recipe.weights is None:
        return lambda held: initialise_parts_(held, shape, seed=seed)
    if recipe.head == PRETRAINING:
        read = open_weights(recipe.weights, shape, verify=checks)
        if checks:
            (tokenizer,) = recipe.tokenizer_files.values()
            _check_vocabulary(recipe.weights, tokenizer)
        return lambda held: fill_(held, read)
    source = open_encoder_weights(recipe.weights, verify=checks)
    there = tensor_shapes(source.shape, source.head)
    if not recipe.takes_head:
        there = {name: size for name, size in there.items() if not name.startswith(f"{recipe.head.linear}.")}

    def fill(held: Held) -> None:
        """What the source has, and the rest, a new head, from the seed."""
        rows = list(held)
        fill_([row for row in rows if row[0].source in there], source.read)
        initialise_parts_([row for row in rows if row[0].source not in there], shape, seed=seed)

    return fill


def fill_masters_(chunks: Chunks, updater: Updater, fill: Fill) -> None:
    """Fill the float32 weights of narrow parameters: rounded first, they would begin elsewhere.

    Those of parts that nothing moves are made here, on the host.
    """
    fill((each.part, each.weight) for each in updater.weights.owned if is_master(each))
    narrow = [part for part in idle_parts(chunks, updater) if is_narrow(part.parameter)]
    updater.idle = [(part, torch.zeros(part.local_shape)) for part in narrow]
    fill(updater.idle)


def load_moments_(updater: Updater, optimizer_name: str, checkpoint: Checkpoint) -> None:
    """Go on with the moments of a checkpoint, wherever its ranks had them."""
    restart_(updater.optimizer, updater.updates_done)
    for kind in kinds_of(optimizer_name):
        moment = moment_of(updater.optimizer, kind)
        load_rectangles_(kind, [(each.part, moment(each)) for each in updater.weights.owned], checkpoint)


def updates_of(checkpoint: Checkpoint) -> int:
    """Updates that led to a checkpoint."""
    updates = checkpoint.facts.get(UPDATES, checkpoint.step)
    if not isinstance(updates, int):
        raise CheckpointError(
            f"{checkpoint.directory}: its number of updates is {updates!r:.100}; start a new run from its weights "
            "with model.weights="
        )
    return updates


def loss_scale_of(checkpoint: Checkpoint) -> LossScale | None:
    """Scale of the loss at a checkpoint; None where its run had none."""
    facts = checkpoint.facts.get(LOSS_SCALE)
    return None if facts is None else LossScale.from_facts(facts)


def _check_vocabulary(weights: Path, tokenizer: Path) -> None:
    """DataError when the weights come with another vocabulary than that of the run: a row is the word of an id."""
    files = ModelSource.open(weights).tokenizer_files
    own = next((files[name] for name in (LIBRARY, VOCABULARY) if name in files), None)
    if own is None:
        return
    theirs, ours = (Tokenizer.load(path, True).vocabulary.entries for path in (own, tokenizer))
    if theirs != ours:
        raise DataError(
            f"{tokenizer} has {len(ours)} entries that are not the {len(theirs)} of {own}, with which the weights "
            f"of {weights} were trained; set data.tokenizer={own} and make the corpus with it"
        )
