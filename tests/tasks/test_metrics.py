"""Metrics are those of scikit-learn and scipy, and of hand-made tables."""

import math
import sys

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.tasks.metrics import MEASURES, check_libraries, measured
from megatron_bert_tp.tasks.task import TASKS, Kind

DRAWS = np.random.default_rng(3)
CLASSES = DRAWS.integers(0, 4, (2, 500))
PAIRS = DRAWS.integers(0, 2, (2, 500))
HOLDS = DRAWS.integers(0, 2, (2, 300, 5))
VALUES = DRAWS.standard_normal((2, 400)).round(1)  # with many equal ones, whose ranks are shared


def test_all_metrics_of_the_tasks_exist():
    for task in TASKS.values():
        if task.kind in MEASURES:
            assert set(task.metrics) <= MEASURES[task.kind].keys()


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("accuracy", CLASSES, sklearn_metrics.accuracy_score(*CLASSES)),
        ("f1", PAIRS, sklearn_metrics.f1_score(*PAIRS)),
        ("f1_macro", CLASSES, sklearn_metrics.f1_score(*CLASSES, average="macro")),
        ("matthews", CLASSES, sklearn_metrics.matthews_corrcoef(*CLASSES)),
        ("matthews", PAIRS, sklearn_metrics.matthews_corrcoef(*PAIRS)),
    ],
)
def test_classes_are_measured_as_by_scikit_learn(name, numbers, expected):
    assert measured(Kind.CLASS, [name], *numbers) == {name: expected}


def test_several_classes_are_measured_as_by_scikit_learn():
    found = measured(Kind.CLASSES, TASKS["multi-label"].metrics, *HOLDS)
    assert found == {
        "f1_micro": sklearn_metrics.f1_score(*HOLDS, average="micro"),
        # The mean of the same five numbers.
        "f1_macro": pytest.approx(sklearn_metrics.f1_score(*HOLDS, average="macro"), rel=1e-15),
        "exact_match": sklearn_metrics.accuracy_score(*HOLDS),
    }


def test_values_are_measured_as_by_scipy_and_scikit_learn():
    found = measured(Kind.NUMBER, TASKS["regression"].metrics, *VALUES)
    assert found == {
        "pearson": stats.pearsonr(*VALUES)[0],
        "spearman": stats.spearmanr(*VALUES)[0],
        "mean_squared_error": sklearn_metrics.mean_squared_error(*VALUES),
    }


def test_classes_by_hand():
    expected, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    # Class 1: found 2 of 3, 1 too many.  Class 0: found 4 of 5, 1 too many.
    found = measured(Kind.CLASS, ["accuracy", "f1", "f1_macro", "matthews"], expected, predicted)
    assert found == pytest.approx(
        {
            "accuracy": 6 / 8,
            "f1": 2 / 3,
            "f1_macro": (2 / 3 + 4 / 5) / 2,
            "matthews": (2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5),
        },
        rel=1e-15,
    )


def test_several_classes_by_hand():
    expected = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    predicted = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    found = measured(Kind.CLASSES, ["f1_micro", "f1_macro", "exact_match"], expected, predicted)
    # Classes: 2 found, 1 too many; 1 found, 1 missed; nothing of the third.
    assert found == pytest.approx(
        {"f1_micro": 2 * 3 / (2 * 3 + 2), "f1_macro": (4 / 5 + 2 / 3 + 0) / 3, "exact_match": 2 / 4}, rel=1e-15
    )


def test_one_class_that_holds_or_not_is_measured_by_that_class():
    expected, predicted = np.array([[1], [0], [0], [0]]), np.array([[1], [1], [0], [0]])
    found = measured(Kind.CLASSES, ["f1_micro", "f1_macro", "exact_match"], expected, predicted)
    assert found == pytest.approx({"f1_micro": 2 / 3, "f1_macro": 2 / 3, "exact_match": 3 / 4}, rel=1e-15)


def test_values_by_hand():
    expected, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    found = measured(Kind.NUMBER, ["pearson", "spearman", "mean_squared_error"], expected, predicted)
    # About the means 2.5 and 4: 4.5 - 0.5 - 1 + 9 over the root of 5 times 50.  Ranks: one pair is swapped.
    assert found == pytest.approx(
        {"pearson": 13 / math.sqrt(5 * 50), "spearman": 1 - 6 * 2 / (4 * 15), "mean_squared_error": 38 / 4},
        rel=1e-15,
    )


@pytest.mark.parametrize(
    ("expected", "predicted"),
    [
        ([1, 1, 1], [1, 1, 1]),
        ([0, 0, 0], [0, 0, 0]),
        ([0, 1, 0], [0, 0, 0]),
        ([1, 1], [0, 0]),
        ([1], [1]),
        ([0], [1]),
    ],
)
def test_no_metric_of_classes_that_do_not_vary_is_nan_or_warns(expected, predicted):
    sides = np.array(expected), np.array(predicted)
    found = measured(Kind.CLASS, list(MEASURES[Kind.CLASS]), *sides)
    assert found["matthews"] == 0
    assert found["f1"] == (1 if min(expected) == min(predicted) == 1 else 0)
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize(
    ("expected", "predicted"), [([1.0, 2.0], [3.0, 3.0]), ([2.0, 2.0], [1.0, 3.0]), ([1.0], [1.0])]
)
def test_the_correlation_with_what_does_not_vary_is_nothing(expected, predicted):
    found = measured(Kind.NUMBER, ["pearson", "spearman"], np.array(expected), np.array(predicted))
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_a_library_that_is_missing_is_named_with_the_way_to_it(monkeypatch):
    for kind in Kind:
        check_libraries(kind)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)  # makes its import fail
    message = r"need scikit-learn; install it with `pip install 'megatron-bert-tp\[tasks\]'`"
    with pytest.raises(ConfigError, match=message):
        check_libraries(Kind.CLASS)
    with pytest.raises(ConfigError, match=message):
        measured(Kind.CLASS, ["accuracy"], np.zeros(2), np.zeros(2))
    check_libraries(Kind.ANSWER)
