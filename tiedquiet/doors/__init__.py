"""The doors: public calls through which a checkpoint comes into a model. A file for each, over one way of wrapping."""
