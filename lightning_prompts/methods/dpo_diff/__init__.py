"""DPO-Diff (arXiv 2407.01606): the method, and the sources of its words."""
