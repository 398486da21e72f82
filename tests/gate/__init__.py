"""`python -m tiedquiet check` on folders that are sound, broken or malicious."""
