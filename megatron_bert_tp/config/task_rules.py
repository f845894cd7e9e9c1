"""Rules that tie several settings of a task together, and those that need the sizes of its weights."""

from collections.abc import Mapping

from megatron_bert_tp.config.dropout_rules import DROPOUT_RULES
from megatron_bert_tp.config.dump import flat
from megatron_bert_tp.config.parallel_rules import BATCH_RULES, LAYOUT_RULES, MODEL_RULES
from megatron_bert_tp.config.problems import Problem, listed
from megatron_bert_tp.config.rule import Broken, Rule, broken_rules
from megatron_bert_tp.config.run_rules import RUN_RULES
from megatron_bert_tp.config.task_kind_rules import TASK_KIND_RULES
from megatron_bert_tp.config.task_schema import TaskRun
from megatron_bert_tp.config.task_table import TASKS, Kind
from megatron_bert_tp.config.update_rules import UPDATE_RULES

_FILES = ("data.train", "data.validation", "data.test")
_SIZES = (
    "num_attention_heads",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "type_vocab_size",
)
_PAIRS = {"mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli"}
_LEVELS = ("middle", "high")  # the groups that RACE's own folders make
_KEYWORDS = ("auto", "never")  # of run.resume; anything else names a checkpoint


def model_problems(config: TaskRun, sizes: Mapping[str, int]) -> list[Problem]:
    """What of ``config`` does not fit the weights that it starts from.

    ``sizes`` are those of their config.json, under Hugging Face's names: num_attention_heads, intermediate_size,
    num_hidden_layers, max_position_embeddings and type_vocab_size at least (KeyError without one).
    """
    values = {**flat(config), **{f"model.{name}": sizes[name] for name in _SIZES}}
    return broken_rules(_WEIGHTS_RULES, values, None)


def _sequence_fits_positions(sequence: int, positions: int) -> Broken | None:
    if sequence <= positions:
        return None
    return Broken(f"must not be above the positions of the weights ({positions})", f"use at most {positions}")


def _frozen_are_there(frozen: int | None, layers: int) -> Broken | None:
    if frozen is None or frozen <= layers:
        return None
    return Broken(
        f"must not be above the layers of the weights ({layers})",
        f"use at most {layers}, where the head alone learns",
    )


def _pairs_have_two_segments(types: int, name: str, pair: str | None) -> Broken | None:
    # Columns are refused for tasks whose files are no tables, so a pair of them is one of a table.
    is_pair = name in _PAIRS or TASKS[name].kind in (Kind.CHOICE, Kind.ANSWER) or pair is not None
    if types >= 2 or not is_pair:
        return None
    return Broken(
        f"of the weights must be at least 2 for task.name = {name!r}: its samples are pairs of texts",
        "start from weights with two token types",
    )


def _files_differ(files: tuple[str, ...] | None) -> Broken | None:
    twice = sorted({file for file in files or () if files and files.count(file) > 1})
    return Broken("must name each file or folder once", f"name {listed(twice, 'and')} once") if twice else None


def _there_is_training(train: tuple[str, ...] | None) -> Broken | None:
    if train is not None:
        return None
    return Broken("is required for fine-tuning", "name the files to learn from: data.train=FILE")


def _something_is_evaluated(validation: tuple[str, ...] | None, test: tuple[str, ...] | None) -> Broken | None:
    if validation is not None or test is not None:
        return None
    return Broken(
        "or data.test is required for an evaluation",
        "name files with labels (data.validation=FILE) or to predict (data.test=FILE)",
    )


def _draw_is_read(draw: int, most: int | None) -> Broken | None:
    if most is not None or draw == 0:
        return None
    return Broken("is read with data.most_train alone", "leave data.draw out, or set data.most_train")


def _length_is_said_once(epochs: float | None, steps: int | None) -> Broken | None:
    if steps is None or epochs is None:
        return None
    # A file of configs/finetune has epochs, so that leaving them out is not always a way.
    return Broken(
        f"and optimizer.steps ({steps}) both say how long the run is",
        "take one back: optimizer.epochs=null, or optimizer.steps=null",
    )


def _seeds_differ(seeds: tuple[int, ...] | None) -> Broken | None:
    twice = sorted({seed for seed in seeds or () if seeds and seeds.count(seed) > 1})
    return Broken("must name each seed once", f"name {listed(twice, 'and')} once") if twice else None


def _seeds_begin_alike(resume: str, seeds: tuple[int, ...] | None) -> Broken | None:
    if resume in _KEYWORDS or seeds is None or len(seeds) == 1:
        return None
    return Broken(
        f"names a checkpoint of one run, and run.seeds asks for {len(seeds)}",
        "use run.resume: auto, where each run goes on by itself, or leave run.seeds out",
    )


def _is_measured(path: str) -> Rule:
    """The rule that a setting of evaluations is given with something to evaluate."""

    def check(value: object, validation: tuple[str, ...] | None) -> Broken | None:
        if value is None or validation is not None:
            return None
        return Broken("needs data.validation, which is null", f"name files with labels, or leave {path} out")

    return Rule((path, "data.validation"), check)


def _metric_is_the_tasks(
    metric: str | None, name: str, validation: tuple[str, ...] | None, unanswerable: bool | None
) -> Broken | None:
    if metric is None or validation is None:
        return None
    known = TASKS[name].metrics + (() if unanswerable is False else TASKS[name].threshold_metrics)
    if any(_is_named(metric, each, name, len(validation)) for each in known):
        return None
    return Broken(
        f"must be a metric of {name}: {listed(known)}, or that of a part of several, such as {known[0]}_NAME",
        f"choose {listed(known)}",
    )


def _is_named(metric: str, known: str, name: str, num_files: int) -> bool:
    """Whether it is that metric, of all validation data or of a part, by whose name it then ends."""
    part = metric.removeprefix(f"{known}_")
    if part == metric:
        return metric == known
    return bool(part) and (num_files > 1 or (name == "race" and part in _LEVELS))


_WEIGHTS_RULES: tuple[Rule, ...] = (
    *MODEL_RULES,
    Rule(("data.sequence_length", "model.max_position_embeddings"), _sequence_fits_positions),
    Rule(("model.frozen_layers", "model.num_hidden_layers"), _frozen_are_there),
    Rule(("model.type_vocab_size", "task.name", "task.columns.pair"), _pairs_have_two_segments),
)
EVALUATION_RULES: tuple[Rule, ...] = (
    *DROPOUT_RULES,
    *TASK_KIND_RULES,
    *(Rule((path,), _files_differ) for path in _FILES),
    Rule(("data.validation", "data.test"), _something_is_evaluated),
    *LAYOUT_RULES,
    *RUN_RULES,
)
"""Rules of an evaluation, which makes no optimizer steps."""
FINETUNING_RULES: tuple[Rule, ...] = (
    *DROPOUT_RULES,
    *TASK_KIND_RULES,
    *(Rule((path,), _files_differ) for path in _FILES),
    Rule(("data.train",), _there_is_training),
    Rule(("data.draw", "data.most_train"), _draw_is_read),
    Rule(("optimizer.epochs", "optimizer.steps"), _length_is_said_once),
    *UPDATE_RULES,
    *LAYOUT_RULES,
    *BATCH_RULES,
    Rule(("run.seeds",), _seeds_differ),
    Rule(("run.resume", "run.seeds"), _seeds_begin_alike),
    *map(_is_measured, ("run.evaluate_every", "run.metric", "run.patience")),
    Rule(("run.metric", "task.name", "data.validation", "task.unanswerable"), _metric_is_the_tasks),
    *RUN_RULES,
)
