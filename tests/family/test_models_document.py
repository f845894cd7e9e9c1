"""The table of arguments in docs/models.md is that of the classes here and in `transformers`."""

import inspect
import re
import typing

import pytest
import transformers

import megatron_bert_tp
from megatron_bert_tp.model.shape import HEADS
from tests.sources import ROOT

DOCUMENT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
NAMES = {name.removeprefix("MegatronBert").removeprefix("For"): name for name in HEADS}


def table() -> dict[str, dict[str, tuple[str, str]]]:
    """What stands in the table: argument, class, then ours and theirs."""
    lines = DOCUMENT.split("| argument | Model |")[1].splitlines()
    columns = ["Model", *(cell.strip() for cell in lines[0].strip("| ").split("|"))]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line.startswith("|")]
    end = next((i for i, line in enumerate(lines[2:]) if not line.startswith("|")), len(rows))
    return {
        row[0].strip("`"): {name: tuple(cell.split(" / ")) for name, cell in zip(columns, row[1:], strict=True)}
        for row in rows[:end]
    }


def ours(architecture: str) -> set[str]:
    parameters = inspect.signature(getattr(megatron_bert_tp, architecture).forward).parameters.values()
    named = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"self"}
    (more,) = (each for each in parameters if each.kind is each.VAR_KEYWORD)
    return named | set(typing.get_args(more.annotation)[0].__annotations__)


def theirs(architecture: str) -> set[str]:
    parameters = inspect.signature(getattr(transformers, architecture).forward).parameters.values()
    assert any(each.kind is each.VAR_KEYWORD for each in parameters), "which is why the rest is ignored"
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"self"}


@pytest.mark.parametrize(("column", "architecture"), NAMES.items(), ids=NAMES)
def test_the_table_says_what_each_class_takes(column, architecture):
    cells = {argument: row[column] for argument, row in table().items()}
    assert {argument for argument, (here, _) in cells.items() if here == "yes"} == ours(architecture)
    assert {argument for argument, (_, there) in cells.items() if there == "yes"} == theirs(architecture)
    assert {here for here, _ in cells.values()} <= {"yes", "-"}
    assert {there for _, there in cells.values()} <= {"yes", "ignored"}


@pytest.mark.parametrize("architecture", HEADS)
def test_an_argument_that_a_class_does_not_take_is_an_error(architecture):
    config = megatron_bert_tp.MegatronBertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4
    )
    model = getattr(megatron_bert_tp, architecture)(config)
    refused = [argument for argument, row in table().items() if row[_column(architecture)][0] == "-"]
    for argument in [*refused, "attention_masks"]:
        with pytest.raises(TypeError, match=re.escape(f"does not take '{argument}'")):
            model(**{argument: None})


def _column(architecture: str) -> str:
    return next(column for column, name in NAMES.items() if name == architecture)
