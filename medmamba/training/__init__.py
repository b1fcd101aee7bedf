"""Training of one fold: sampling and augmentation, losses, the loop, checkpoints."""
