"""What a rotated linear layer computes: `reference` is the specification, `paths` are the ways to be faster."""
