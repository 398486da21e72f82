"""The doors: public calls through which a checkpoint enters a model. One file each, over one way of wrapping."""
