"""The gate: `python -m tiedquiet check` holds a checkpoint's model against the bytes of its files."""
