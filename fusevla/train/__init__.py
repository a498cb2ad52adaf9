"""What changes the weights: freezing, the optimizer, one step, checkpoints and the loop around them."""
