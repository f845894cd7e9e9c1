"""The files of tasks, read into examples; without torch, so that bad files are told at once."""
