"""Combinations of settings of a task: what does not fit is told, and what would be ignored is refused."""

import pytest

from megatron_bert_tp.config.rule import WORLD_SIZE
from megatron_bert_tp.config.settings import all_settings
from megatron_bert_tp.config.task_rules import EVALUATION_RULES, FINETUNING_RULES, model_problems
from megatron_bert_tp.config.task_schema import TaskName, TaskRun
from megatron_bert_tp.config.task_table import TASKS, Kind

TWO_FILES = "data.validation=[dev_matched.tsv, dev_mismatched.tsv]"
NO_VALIDATION = "data.validation=null"
TABLE = "task.name=classification"
CHOICES = ("task.name=multiple-choice", "task.columns.choices=[a, b]")
SQUAD = ("task.name=squad", "data.sequence_length=384")

# Overrides of the valid settings, part of the rule, part of the way out.
BROKEN = [
    (["task.class_weights=[1, 2]", "task.balanced=true"], "exclude each other", "keep one of the two"),
    (["task.name=mnli", "task.class_weights=[1, 2]"], "a weight for each of the 3 labels", "[1.0, 1.0, 1.0]"),
    ([TABLE, "task.labels=[a, b, c]", "task.class_weights=[1, 2]"], "3 labels: a, b and c", "class_weights out"),
    (
        ["task.name=sts-b", "task.balanced=true"],
        "is read where one class of several or a class for each word is learned, and sts-b learns a number",
        "leave task.balanced out",
    ),
    (["task.name=multi-label", "task.class_weights=[1, 2]"], "multi-label learns several classes", "leave"),
    (["task.name=race", "task.class_weights=[1, 2, 3, 4]"], "race learns the best of several texts", "leave"),
    ([*SQUAD, "task.balanced=true"], "squad learns a span of a context", "leave task.balanced out"),
    ([*SQUAD, "task.label_smoothing=0.1"], "squad learns a span of a context", "task.label_smoothing out"),
    (["task.name=sts-b", "task.label_smoothing=0.1"], "sts-b learns a number", "task.label_smoothing out"),
    (["task.name=multi-label", "task.label_smoothing=0.1"], "multi-label learns several classes", "leave"),
    (["task.name=regression", "task.labels=[a, b]"], "regression learns a number", "leave task.labels out"),
    (["task.name=race", "task.labels=[A, B]"], "race learns the best of several texts", "leave task.labels"),
    (["task.name=rte", "task.columns.pair=b"], "and task.name is rte", "leave task.columns.pair out"),
    (["task.name=rte", "task.columns.pair=text"], "and task.name is rte", "leave task.columns.pair out"),
    (["task.name=token-classification", "task.labels=O"], "must hold two labels at least", "name all labels"),
    ([TABLE, "task.columns.choices=a"], "is read for multiple-choice alone", "leave task.columns.choices out"),
    ([TABLE, "task.columns.label=text"], "text is named twice", "a column for each of task.columns.text"),
    ([TABLE, "task.columns.pair=label"], "label is named twice", "a column for each"),
    ([CHOICES[0]], "is required where task.name is multiple-choice", "name the columns of the choices"),
    ([CHOICES[0], "task.columns.choices=[a, text]"], "text is named twice", "a column for each"),
    (["task.name=token-classification", "task.labels=[O, PER]"], "not PER", "[O, B-person, I-person]"),
    (["task.name=token-classification", "task.labels=[O, B-]"], "not B-", "write them in IOB2"),
    (["task.name=token-classification", "task.labels=[B-a, I-a]"], "must be O and tags", "write them in IOB2"),
    (["task.name=squad"], "must be below 125 = data.sequence_length (128) - 3", "use at most 62"),
    ([*SQUAD, "task.overlap=381"], "must be below 381", "or use at most 190"),
    ([*SQUAD, "run.metric=accuracy"], "a metric of squad: f1, exact_match, best_f1 or best_exact_match", "f1"),
    ([*SQUAD, "run.metric=best_f1", "task.unanswerable=false"], "a metric of squad: f1 or exact_match", "f1"),
    (
        ["task.name=mrpc", "run.metric=best_f1"],
        "must be a metric of mrpc: f1 or accuracy",
        "choose f1 or accuracy",
    ),
    (
        ["optimizer.epochs=2", "optimizer.steps=50"],
        "and optimizer.steps (50) both say",
        "optimizer.epochs=null, or optimizer.steps=null",
    ),
    (["optimizer.epochs=3", "optimizer.steps=50"], "and optimizer.steps (50) both say", "optimizer.epochs=null"),
    (["task.name=multi-label", "task.separator=''"], "must not be empty", ""),
    (["data.most_train=null", "data.draw=1"], "is read with data.most_train alone", "or set data.most_train"),
    (["run.seeds=[1, 2]", "run.resume=runs/a/checkpoints/step_1"], "run.seeds asks for 2", "use run.resume: auto"),
    ([NO_VALIDATION, "run.patience=3"], "needs data.validation", "or leave run.patience out"),
    ([NO_VALIDATION, "run.metric=accuracy"], "needs data.validation", "or leave run.metric out"),
    ([NO_VALIDATION, "run.evaluate_every=9"], "needs data.validation", "or leave run.evaluate_every out"),
    (["task.name=race", "run.metric=accuracy_dev"], "must be a metric of race", "choose accuracy"),
    (["task.name=mnli", TWO_FILES, "run.metric=f1_matched"], "must be a metric of mnli", "choose accuracy"),
    (["task.name=mnli", TWO_FILES, "run.metric=accuracy_"], "must be a metric of mnli", "choose accuracy"),
    (["optimizer.schedule=constant", "optimizer.final_learning_rate=1e-6"], "is never reached", "such as linear"),
    (["optimizer.name=sgd", "optimizer.beta2=0.5"], "is read by adamw or lamb alone", "leave optimizer.beta2"),
    (["run.fused=apex", "optimizer.name=sgd"], "optimizer.name is sgd", "set run.fused: torch"),
    (["parallel.schedule=zb-v"], "must be 2 where parallel.schedule is zb-v", "use 2"),
    (["parallel.schedule=file"], "is required where parallel.schedule is file", "name the file"),
    (
        ["parallel.packing=packed"],
        "must be at least data.sequence_length (128)",
        "parallel.microbatch_tokens: 1024",
    ),
    (
        ["parallel.packing=bins", "parallel.microbatch_tokens=120"],
        "must be at least data.sequence_length (128) rounded up to 8",
        "parallel.microbatch_tokens: 1024",
    ),
]
FINE = [
    ["task.label_smoothing=0.1", "task.balanced=true"],
    ["task.label_smoothing=0.1", "task.class_weights=[1, 0.5]"],
    ["task.labels=[positive, negative]"],
    [TABLE, "task.class_weights=[1, 2, 3]"],
    [TABLE, "task.columns={text: a, pair: b, label: c, id: d}"],
    ["task.name=multi-label", "task.labels=one", "task.separator=';'"],
    ["task.name=race", "task.label_smoothing=0.1"],
    ["task.name=race", "run.metric=accuracy_middle"],
    ["task.name=mnli", TWO_FILES, "run.metric=accuracy_mismatched"],
    [*CHOICES, "task.columns.pair=b0"],
    ["task.name=token-classification", "task.labels=[O, B-a, I-a]", "task.class_weights=[1, 2, 2]"],
    ["task.name=token-classification", "task.scheme=iob1", "task.unit=document", "task.balanced=true"],
    [*SQUAD, "task.overlap=380", "task.unanswerable=false", "task.n_best=5", "run.metric=exact_match"],
    [*SQUAD, "run.metric=best_f1"],
    [*SQUAD, "run.metric=best_exact_match", "task.unanswerable=true"],
    ["optimizer.steps=50"],
    ["optimizer.steps=50", "optimizer.epochs=null"],
    ["optimizer.epochs=null"],
    ["optimizer.epochs=0.5"],
    ["optimizer.name=lamb", "optimizer.layer_decay=0.9"],
    ["run.fused=apex", "parallel.tensor=1", "optimizer.layer_decay=0.9"],
    ["optimizer.schedule=constant", "optimizer.warmup_share=0"],
    ["run.seeds=7", "run.resume=runs/a/checkpoints/step_1"],
    ["run.seeds=[3, 1, 2]", "run.patience=2", "run.metric=accuracy"],
    [NO_VALIDATION],
    ["data.most_train=100", "data.draw=1"],
    ["parallel.schedule=interleaved", "parallel.virtual=3"],
    ["parallel.packing=packed", "parallel.microbatch=null", "parallel.microbatch_tokens=128"],
]


@pytest.mark.parametrize(("overrides", "rule", "way_out"), BROKEN, ids=[" ".join(row[0]) for row in BROKEN])
def test_what_does_not_fit_is_told_alone_with_a_way_out(task_complaint, overrides, rule, way_out):
    message = task_complaint({}, *overrides)
    assert message.startswith("1 problem ")
    assert rule in message
    assert way_out in message.partition("->")[2]


@pytest.mark.parametrize("overrides", FINE, ids=" ".join)
def test_what_fits_is_accepted(load_a_task, overrides):
    assert load_a_task({}, *overrides)


def test_a_single_value_is_a_list_of_one(load_a_task):
    config = load_a_task(
        {"run.seeds": "7", "data.test": "test.tsv", "task.name": "multi-label", "task.labels": "a"}
    )
    assert (config.run.seeds, config.data.test, config.task.labels) == ((7,), ("test.tsv",), ("a",))


# Evaluation


def test_an_evaluation_needs_something_to_evaluate_and_nothing_to_learn_from(load_a_task, task_complaint):
    nothing = {"data.train": None, "data.validation": None}
    assert "or data.test is required for an evaluation" in task_complaint(nothing, purpose="evaluate")
    for given in ("data.validation", "data.test"):
        assert load_a_task({**nothing, given: "dev.tsv"}, purpose="evaluate")
    assert "is required for fine-tuning" in task_complaint({"data.train": None})


def test_an_evaluation_takes_batches_and_update_rules_that_no_step_could_take(load_a_task, task_complaint):
    settings = ["optimizer.global_batch=60", "run.fused=apex", "run.device=cpu", "optimizer.epochs=1"]
    assert task_complaint({}, *settings).startswith("2 problems ")
    assert load_a_task({}, *settings, purpose="evaluate")


def test_an_evaluation_keeps_the_rules_of_tasks_and_layouts(task_complaint):
    overrides = ["task.n_best=5", "parallel.virtual=2", "run.stop_after=soon"]
    assert task_complaint({}, *overrides, purpose="evaluate", world_size=3).startswith("4 problems ")


# The sizes of the weights

SIZES = {
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
}


@pytest.mark.parametrize(
    ("overrides", "sizes", "path", "rule"),
    [
        (["parallel.tensor=3"], {}, "parallel.tensor", "must divide model.num_attention_heads (4)"),
        (["parallel.tensor=4"], {"intermediate_size": 98}, "parallel.tensor", "model.intermediate_size (98)"),
        (["parallel.pipeline=6"], {}, "parallel.pipeline", "must not be above model.num_hidden_layers (5)"),
        (
            ["parallel.schedule=interleaved", "parallel.virtual=3"],
            {},
            "parallel.pipeline",
            "x parallel.virtual (3) must not be above model.num_hidden_layers (5)",
        ),
        (["data.sequence_length=129"], {}, "data.sequence_length", "the positions of the weights (128)"),
        (["model.frozen_layers=6"], {}, "model.frozen_layers", "the layers of the weights (5)"),
        (["task.name=rte"], {"type_vocab_size": 1}, "model.type_vocab_size", "task.name = 'rte'"),
        (["task.name=race"], {"type_vocab_size": 1}, "model.type_vocab_size", "its samples are pairs"),
        (
            ["task.name=squad", "task.overlap=64"],
            {"type_vocab_size": 1},
            "model.type_vocab_size",
            "its samples are pairs",
        ),
        ([*CHOICES], {"type_vocab_size": 1}, "model.type_vocab_size", "its samples are pairs"),
        ([TABLE, "task.columns.pair=b"], {"type_vocab_size": 1}, "model.type_vocab_size", "are pairs of texts"),
    ],
)
def test_what_the_weights_cannot_do_is_told(load_a_task, overrides, sizes, path, rule):
    config = load_a_task({}, *overrides)
    (problem,) = model_problems(config, {**SIZES, **sizes})
    assert problem.path == path
    assert rule in problem.rule


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.frozen_layers=5", "parallel.tensor=4", "parallel.pipeline=5"],
        ["model.frozen_layers=0"],
        ["parallel.schedule=interleaved", "parallel.virtual=2"],
    ],
)
def test_weights_that_fit_have_no_problem(load_a_task, overrides):
    assert model_problems(load_a_task({}, *overrides), SIZES) == []


@pytest.mark.parametrize("overrides", [[], [TABLE], ["task.name=cola"], ["task.name=token-classification"]])
def test_single_texts_need_one_token_type(load_a_task, overrides):
    assert model_problems(load_a_task({}, *overrides), {**SIZES, "type_vocab_size": 1}) == []


def test_a_size_that_is_missing_is_an_error_not_a_rule_passed_over(load_a_task):
    with pytest.raises(KeyError, match="num_hidden_layers"):
        model_problems(load_a_task(), {name: n for name, n in SIZES.items() if name != "num_hidden_layers"})


# The tables


def test_every_rule_reads_settings_that_exist():
    """A rule with a misspelt path would never run."""
    paths = {path for rule in (*FINETUNING_RULES, *EVALUATION_RULES) for path in rule.paths}
    assert paths - set(all_settings(TaskRun)) - {WORLD_SIZE} == set()


def test_every_task_has_a_row_in_the_table_and_every_kind_a_task():
    assert tuple(TASKS) == TaskName.__args__
    assert {task.kind for task in TASKS.values()} == set(Kind)
    assert all(task.metrics and len(set(task.metrics)) == len(task.metrics) for task in TASKS.values())


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_with_its_own_metrics_and_nothing_but_what_it_needs(load_a_task, name):
    needs = {"multiple-choice": {"task.columns.choices": "[a, b]"}, "squad": {"task.overlap": "64"}}
    for metric in TASKS[name].metrics:
        config = load_a_task({"task.name": name, "run.metric": metric, **needs.get(name, {})})
        assert config.task.name == name
