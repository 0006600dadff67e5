"""What is searched together: the batch and its rows."""
