"""The tests, in the rooms of the package. They use the real libraries with tiny real checkpoints."""
