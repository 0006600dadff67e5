"""DPO-Diff (arXiv 2407.01606): the method, and where its words come from."""
