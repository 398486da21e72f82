"""The ways in that need no code: Python's start-up files and autowrapt."""


def on_import(_: object) -> None:
    """Do nothing: autowrapt calls this when transformers is imported, and importing tiedquiet enabled it."""
