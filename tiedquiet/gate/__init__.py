"""The gate: `python -m tiedquiet check` compares a loaded model with the bytes of its checkpoint's files."""
