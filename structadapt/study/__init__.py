"""Which adapter, rank, scale and learning rate survive GRPO: grids of runs, and what they say."""
