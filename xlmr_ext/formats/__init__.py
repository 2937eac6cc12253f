"""Files of other libraries: how each lays out a model."""
