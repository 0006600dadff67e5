"""The folder of a run: records, results, and how they are written."""
