"""Does FlyLoRA lose less by merging than LoRA, with shared or independent projections? arXiv 2510.08396, table 2."""
