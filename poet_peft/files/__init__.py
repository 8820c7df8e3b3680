"""What is written to disk and read from it: `keys` of an adapter file, `adapter` files, `training_checkpoints`."""
