"""Looking without changing: what norm layers do, and what checkpoints hold of them."""
