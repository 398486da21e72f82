"""`python -m tiedquiet check` on folders that are well, broken or malicious."""
