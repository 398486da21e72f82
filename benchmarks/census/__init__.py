"""Every class of transformers with ties, saved and loaded back in many ways; what tiedquiet says against the bytes."""
