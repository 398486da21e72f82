"""`python -m tests.compat`: the truth table on many releases of transformers."""
