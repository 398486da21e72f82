"""The proof: what the files hold, what was read, and what became of it. It knows no library's loading functions."""
