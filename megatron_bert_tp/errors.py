"""Errors that a user can act on: each message names the rule, the value and the way out."""


class MegatronBertError(Exception):
    """Base of all errors whose message is meant for the user; entry points print it and exit with 2."""


class ConfigError(MegatronBertError):
    """One or more settings are wrong; the message lists all of them."""


class LayoutError(MegatronBertError):
    """Sizes do not fit the requested tensor x pipeline x data layout."""


class DataError(MegatronBertError):
    """A corpus, vocabulary or sample is missing, damaged or cannot be used."""


class ScheduleError(MegatronBertError):
    """A pipeline schedule deadlocks or does not fit the number of stages."""


class CheckpointError(MegatronBertError):
    """A checkpoint is missing, damaged or belongs to another model."""


class FormatError(MegatronBertError):
    """A foreign weight file cannot be read as a MegatronBert."""


class TrainingError(MegatronBertError):
    """A run cannot go on, such as with a loss that is no number."""


class ArgumentError(MegatronBertError, ValueError):
    """An argument of a model's method is missing, misshapen or cannot work with this model."""
