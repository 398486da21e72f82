"""What `check` raises where it cannot check."""


class CannotCheck(Exception):
    """There is nothing to check; the message is one line for the user."""
