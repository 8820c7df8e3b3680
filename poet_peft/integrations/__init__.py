"""POET in the frameworks that people train with. Each module needs its framework, and nothing imports any of them."""
