"""Checkpoints: what is in one, the folders that they are in, and writing them while training goes on."""
