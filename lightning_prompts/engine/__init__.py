"""The engine of a search: the batch of problems, checkpoints, and the base classes of methods and data modules."""
