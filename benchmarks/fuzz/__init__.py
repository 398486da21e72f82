"""A fuzzer of loads: random models and files, loaded in every mode, each verdict held against the bytes."""
