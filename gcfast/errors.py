"""The errors of gcfast that are not a wrong argument.

Wrong arguments are ``ValueError`` (shape, device, range) and ``TypeError`` (kind, dtype).
"""


class GcfastError(Exception):
    """Base class of everything that can go wrong outside the caller's arguments."""


class NoDatabaseError(GcfastError):
    """An explanation was asked for before there was a database to explain from."""


class ModelMismatchError(GcfastError):
    """The database was built with another model, other weights or another layer."""


class DamagedDatabaseError(GcfastError):
    """A file of the database is missing, truncated or not what was written."""


class MissingExtraError(GcfastError):
    """An optional dependency is needed and not installed."""


class UnsupportedModelError(GcfastError):
    """The model cannot be explained as it is (compiled, scripted, a layer that runs twice, …)."""
