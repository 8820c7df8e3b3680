"""What the rules for tiny configurations miss, by family: values by dotted name."""

OVERRIDES = {
    "qwen2_vl": {"vision_config.hidden_size": 512},
}
