"""``--help`` is made from the schemas."""

import re

import pytest

from megatron_bert_tp.config.help import settings_help
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_sections, all_settings
from megatron_bert_tp.config.task_schema import TaskRun

BOTH = pytest.mark.parametrize("root", [Config, TaskRun])


def blocks(root: type) -> dict[str, str]:
    """Text of every section under its path."""
    return {block.partition(":")[0]: block for block in settings_help(root).split("\n\n")[1:]}


@BOTH
def test_help_lists_every_section_and_setting_with_default_and_meaning(root):
    assert list(blocks(root)) == list(all_sections(root))
    for path, row in all_settings(root).items():
        section, _, name = path.rpartition(".")
        (line,) = [line for line in blocks(root)[section].splitlines() if line.startswith(f"  {name} ")]
        assert ("required" in line) == row.is_required
        words = re.sub(r"\s+", " ", blocks(root)[section])
        assert all(word in words for word in row.meaning.split())


def test_help_shows_choices_and_limits():
    text = settings_help(Config)
    assert re.search(r"packing +none \| bins \| packed +none +rows of", text)
    assert re.search(r"beta2 +number >= 0, < 1 +0\.999 ", text)
    assert re.search(r"weights +text \| null +null ", text)
    assert re.search(r"split +3 numbers +\[96, 4, 0\] ", text)


def test_help_of_tasks_shows_lists_and_words_that_may_be_null():
    text = settings_help(TaskRun)
    assert re.search(r"seeds +integer, or a list \| null >= 0 +null +a run", text)
    assert re.search(r"class_weights +number, or a list \| null > 0 +null ", text)
    assert re.search(r"unanswerable +true \| false \| null +null ", text)
    assert "cola | sst-2 | mrpc" in re.sub(r"\s+", " ", text)


@BOTH
def test_the_batch_and_the_steps_stand_first_in_the_optimizer(root):
    rows = blocks(root)["optimizer"].splitlines()[1:]
    assert [row.split()[0] for row in rows[:3]] == ["name", "global_batch", "steps"]


@BOTH
def test_help_fits_100_columns_and_aligns_each_section(root):
    assert max(map(len, settings_help(root).splitlines())) <= 100
    for section, block in blocks(root).items():
        rows = [row for path, row in all_settings(root).items() if path.rpartition(".")[0] == section]
        starts = set()
        for row in rows:
            (line,) = [line for line in block.splitlines() if line.startswith(f"  {row.path.rpartition('.')[2]} ")]
            starts.add(line.index("  " + " ".join(row.meaning.split()[:2])))
        assert len(starts) == 1
