"""The tasks by name; the table stands in `config.task_table`, where the rules of settings read it too."""

from megatron_bert_tp.config.task_table import ARCHITECTURES, PROBLEM_TYPES, TASKS, Kind, Task

__all__ = ["ARCHITECTURES", "PROBLEM_TYPES", "TASKS", "Kind", "Task"]
