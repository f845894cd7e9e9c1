"""How well numbers of classes, classes that hold, and values are predicted, by scikit-learn and scipy.

All metrics are in [0, 1], but for correlations in [-1, 1] and the mean squared error.  None is ever NaN: an F1 of
nothing is 0, and so is the correlation with what does not vary.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt

from megatron_bert_tp.errors import ConfigError
from megatron_bert_tp.tasks.task import Kind

Numbers = npt.NDArray[np.integer] | npt.NDArray[np.floating]
Measure = Callable[[Numbers, Numbers], float]

_EXTRA = "pip install 'megatron-bert-tp[tasks]'"
_SKLEARN, _SCIPY, _SEQEVAL = "sklearn.metrics", "scipy.stats", "seqeval.metrics"
_LIBRARIES = {
    Kind.CLASS: (_SKLEARN,),
    Kind.CLASSES: (_SKLEARN,),
    Kind.NUMBER: (_SKLEARN, _SCIPY),
    Kind.CHOICE: (_SKLEARN,),
    Kind.ANSWER: (),
    Kind.TAGS: (_SKLEARN, _SEQEVAL),
}


def measured(kind: Kind, names: Sequence[str], expected: Numbers, predicted: Numbers) -> dict[str, float]:
    """The metrics of these names.

    Both arrays are ``[examples]``, numbers of classes or choices, or values; for several classes
    ``[examples, classes]`` of 0 and 1.
    """
    return {name: MEASURES[kind][name](expected, predicted) for name in names}


def check_libraries(kind: Kind) -> None:
    """ConfigError where a library that measures tasks of this kind is not installed: before hours of training."""
    for name in _LIBRARIES[kind]:
        library(name)


def library(name: str) -> ModuleType:
    """Module of a library that only measuring needs; ConfigError says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("sklearn", "scikit-learn")
        raise ConfigError(f"the metrics of this task need {package}; install it with `{_EXTRA}`") from error


def accuracy(expected: Numbers, predicted: Numbers) -> float:
    """Share of equal numbers; of rows where all classes are right."""
    return float(library(_SKLEARN).accuracy_score(expected, predicted))


def f1(expected: Numbers, predicted: Numbers) -> float:
    """F1 of class 1, as MRPC and QQP are measured: both in the task's own order of the classes."""
    score = library(_SKLEARN).f1_score(expected, predicted, labels=[1], average="macro", zero_division=0.0)
    return float(score)


def f1_macro(expected: Numbers, predicted: Numbers) -> float:
    """Mean F1 of the classes that are expected or predicted anywhere."""
    return float(library(_SKLEARN).f1_score(expected, predicted, average="macro", zero_division=0.0))


def matthews(expected: Numbers, predicted: Numbers) -> float:
    """Matthews' correlation; 0 where only one class is expected or predicted."""
    if _is_constant(expected) or _is_constant(predicted):
        return 0.0
    return float(library(_SKLEARN).matthews_corrcoef(expected, predicted))


def classes_f1_micro(expected: Numbers, predicted: Numbers) -> float:
    """F1 of all pairs of an example and a class that holds for it."""
    return float(library(_SKLEARN).f1_score(expected.ravel(), predicted.ravel(), zero_division=0.0))


def classes_f1_macro(expected: Numbers, predicted: Numbers) -> float:
    """Mean of the F1 of every class; 0 for one that neither holds nor is predicted."""
    # Class by class, as scikit-learn would read a table with a single class as something else.
    pairs = zip(expected.T, predicted.T, strict=True)
    return float(np.mean([classes_f1_micro(*pair) for pair in pairs]))


def exact_match(expected: Numbers, predicted: Numbers) -> float:
    """Share of examples for which all classes are right."""
    return float(np.all(expected == predicted, axis=1).mean())


def pearson(expected: Numbers, predicted: Numbers) -> float:
    """Linear correlation; 0 where one side does not vary."""
    if _is_constant(expected) or _is_constant(predicted):
        return 0.0
    return float(library(_SCIPY).pearsonr(expected, predicted).statistic)


def spearman(expected: Numbers, predicted: Numbers) -> float:
    """Correlation of ranks; 0 where one side does not vary."""
    if _is_constant(expected) or _is_constant(predicted):
        return 0.0
    return float(library(_SCIPY).spearmanr(expected, predicted).statistic)


def mean_squared_error(expected: Numbers, predicted: Numbers) -> float:
    """Mean of the squared differences."""
    return float(library(_SKLEARN).mean_squared_error(expected, predicted))


MEASURES: Mapping[Kind, Mapping[str, Measure]] = {
    Kind.CLASS: {"accuracy": accuracy, "f1": f1, "f1_macro": f1_macro, "matthews": matthews},
    Kind.CLASSES: {"f1_micro": classes_f1_micro, "f1_macro": classes_f1_macro, "exact_match": exact_match},
    Kind.NUMBER: {"pearson": pearson, "spearman": spearman, "mean_squared_error": mean_squared_error},
    Kind.CHOICE: {"accuracy": accuracy},
}


def _is_constant(values: Numbers) -> bool:
    return bool((values == values[0]).all())
