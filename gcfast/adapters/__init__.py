"""Front ends of other libraries: their classes and calls, explained by gcfast.

Each module is named after the library whose call it answers, and is imported where that library is
installed; elsewhere it raises :class:`gcfast.MissingExtraError`.
"""
