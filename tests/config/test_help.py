"""``--help`` is made from the schema."""

import re

from megatron_bert_tp.config.help import settings_help
from megatron_bert_tp.config.settings import all_sections, all_settings


def blocks() -> dict[str, str]:
    """Text of every section under its path."""
    return {block.partition(":")[0]: block for block in settings_help().split("\n\n")[1:]}


def test_help_lists_every_section_and_setting_with_default_and_meaning():
    assert list(blocks()) == list(all_sections())
    for path, row in all_settings().items():
        section, _, name = path.rpartition(".")
        (line,) = [line for line in blocks()[section].splitlines() if line.startswith(f"  {name} ")]
        assert ("required" in line) == row.is_required
        words = re.sub(r"\s+", " ", blocks()[section])
        assert all(word in words for word in row.meaning.split())


def test_help_shows_choices_and_limits():
    text = settings_help()
    assert re.search(r"packing +none \| bins \| packed +none +rows of", text)
    assert re.search(r"beta2 +number >= 0, < 1 +0\.999 ", text)
    assert re.search(r"weights +text \| null +null ", text)
    assert re.search(r"split +3 numbers +\[96, 4, 0\] ", text)


def test_help_fits_100_columns_and_aligns_each_section():
    assert max(map(len, settings_help().splitlines())) <= 100
    for section, block in blocks().items():
        rows = [row for path, row in all_settings().items() if path.rpartition(".")[0] == section]
        starts = set()
        for row in rows:
            (line,) = [line for line in block.splitlines() if line.startswith(f"  {row.path.rpartition('.')[2]} ")]
            starts.add(line.index("  " + " ".join(row.meaning.split()[:2])))
        assert len(starts) == 1
