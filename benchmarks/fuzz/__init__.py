"""A fuzzer of loads: random models and files, loaded in every mode, each verdict compared with the bytes."""
