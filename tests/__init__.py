"""The tests, laid out like the package. They use the real libraries with tiny real checkpoints."""
