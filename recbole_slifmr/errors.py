"""Errors that a person can act on: one line that says what, where and what to do."""


class DataError(ValueError):
    """The data set cannot be used as it is."""


class SettingError(ValueError):
    """A setting is unknown or has a value that cannot be used."""


class UnknownSettingWarning(UserWarning):
    """A setting that neither RecBole nor the model reads."""


class ProcessError(RuntimeError):
    """A process of a distributed run failed; its traceback is the error's note."""
