"""A tiny configuration of any family of transformers, made from the family's default one.

Widths are all divided by the same number, so that what has to be equal or to divide another still does; layers,
experts, vocabularies and images are cut to a few.
"""

import re


# What widths are divided by, and how many attention heads there are (None: as many as usual), in the order in which
# they are tried: a family may need widths that one of them spoils.
PLANS = ((16, 4), (16, 2), (8, 4), (16, None), (32, 4), (4, 4), (1, None))
VOCABULARY = 256
NUM_TEXT_TOKENS = 128  # ids of special tokens lie above
NUM_EXPERTS = 4
NUM_EXPERTS_PER_TOKEN = 2
NUM_PATCHES = 4  # a side of an image

_WIDTH = re.compile(
    r"hidden|size|dim|width|channels|ffn|inner|d_model|d_ff|d_kv|n_embd|embd|embed|rank|features|mlp|mrope_section|"
    r"intermediate|filters|planes|units|latent|proj|d_state|axes"
)
_NO_WIDTH = re.compile(
    r"vocab|image|img|patch|kernel|window|stride|position|(^|_)num_|^n_(?!embd|inner)|pool|grid|crop|chunk|batch|token|"
    r"context|codebook|block|layers|tile|temporal|spatial|resolution|cache|seq|memory|sample|group|"
    r"bucket|conv_(size|dim_)|input_size|max_|min_|mel|rate|length|expert_capacity|_id$|shard|buffer|heads$"
)
_HEADS = re.compile(r"^(((encoder|decoder|num)_)?attention_heads|n_heads?|(num_)?heads)$")
_SHARED_HEADS = re.compile(r"^(num_key_value_heads|num_kv_heads|n_kv_heads|n_head_kv)$")
_HEAD_WIDTH = re.compile(
    r"^((\w+_)?(qk|v|global|swa|attention|rope|nope)_head_dim|head_dim|d_kv|kv_channels|rotary_dim)$"
)
_LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)$|^(encoder|decoder)_layers$|^depth$|^(\w+_)?num_layers(_\w+)?$")
_EXPERTS = re.compile(r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_moe_experts|n_experts)$")
_EXPERTS_PER_TOKEN = re.compile(r"^(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|experts_top_k|moe_top_k)$")
_AT_MOST_ONE = re.compile(r"^(first_k_dense_replace|n_group|num_expert_group|topk_group|top_k_group)$")
_IMAGE = re.compile(r"^(image_size|img_size|input_image_size)$")
_SPREAD = re.compile(r"^(initializer_range|init_std)$")
_IDS = re.compile(r"(_id|_ids|_token|token_index|_token_ids?)$")


def tiny_config(config_class, plan, shrink_images=True, overrides=None):
    """A tiny configuration of this class.

    Args:
        config_class: a configuration class of transformers that has defaults.
        plan: what widths are divided by and the number of heads, from `PLANS`.
        shrink_images: whether images have a few patches a side; otherwise they keep their size.
        overrides: values by dotted name, which stand above all rules.
    """
    values = config_class().to_dict()
    _Rules(*plan, shrink_images).shrink(values)
    for name, value in (overrides or {}).items():
        *path, last = name.split(".")
        inner = values
        for part in path:
            inner = inner[part]
        inner[last] = value
    config = config_class.from_dict(values)
    for part in configs_in(config):
        _divide_rotary_axes(part)
    return config


def configs_in(config):
    """A configuration, and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from configs_in(inner)


def _divide_rotary_axes(config):
    """Time, height and width share the rotary features, in numbers that a model may have for its usual width only."""
    if "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()):
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(width * config.rope_parameters.get("partial_rotary_factor", 1)) // 2
    side = half * 5 // 16
    config.rope_parameters["mrope_section"] = [half - 2 * side, side, side]


class _Rules:
    def __init__(self, divisor, num_heads, shrink_images):
        self.divisor, self.num_heads, self.shrink_images = divisor, num_heads, shrink_images
        self.special_ids = {}

    def shrink(self, values):
        """Change the values of a configuration, and of those inside it, in place."""
        self._cut_layers(values)
        usual_heads = next((v for n, v in values.items() if _HEADS.search(n) and type(v) is int), 1)
        patch = values.get("patch_size")
        for name, value in values.items():
            if isinstance(value, dict):
                if all(isinstance(key, str) for key in value) and name != "label2id":
                    self.shrink(value)
            elif isinstance(value, list) and value and all(type(item) is int for item in value):
                values[name] = [self._integer(name, item, patch) for item in value]
            elif type(value) is int:
                is_of_heads = _HEADS.search(name) or _SHARED_HEADS.search(name) or _HEAD_WIDTH.search(name)
                values[name] = (
                    self._of_heads(name, value, usual_heads) if is_of_heads else self._integer(name, value, patch)
                )
            elif isinstance(value, float):
                values[name] = 0.0 if "drop" in name else max(value, 0.1) if _SPREAD.search(name) else value
            elif name == "apply_spec_augment":
                values[name] = False

    def _of_heads(self, name, value, usual):
        """Fewer and wider heads: with as few as usual, many would have a width that is odd."""
        num_heads = usual if self.num_heads is None else min(self.num_heads, usual)
        if _HEAD_WIDTH.search(name):
            return max(value * usual // (num_heads * self.divisor), 1)
        if self.num_heads is None or value == 1:
            return value
        return min(value, num_heads) if value >= usual or _HEADS.search(name) else max(num_heads // 2, 1)

    def _integer(self, name, value, patch):
        if "vocab" in name:
            return min(value, VOCABULARY)
        if name == "upsample_groups":  # a group for each feature
            return max(value // self.divisor, 1)
        if _IDS.search(name):
            return self._special_id(value)
        if _EXPERTS.search(name):
            return min(value, NUM_EXPERTS)
        if _EXPERTS_PER_TOKEN.search(name):
            return min(value, NUM_EXPERTS_PER_TOKEN)
        if _AT_MOST_ONE.search(name):
            return min(value, 1)
        if _IMAGE.search(name) and self.shrink_images and isinstance(patch, int):
            return min(value, NUM_PATCHES * patch)
        if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value > 3:
            return max(value // self.divisor, 1)
        return value

    def _special_id(self, value):
        """The same id for the same token in every part; ids that fit are left."""
        if value < NUM_TEXT_TOKENS:
            return value
        return self.special_ids.setdefault(value, VOCABULARY - 1 - len(self.special_ids))

    def _cut_layers(self, values):
        """Two layers, or one of every kind where lists have an entry for each layer."""
        numbers = {name: value for name, value in values.items() if type(value) is int and _LAYERS.search(name)}
        stages = values.get("out_features") or []  # of a backbone, whose layers are its stages
        fewest = max(2, len(stages))
        for name, number in numbers.items():
            if number <= fewest:
                continue
            lists = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == number}
            kinds = list(zip(*lists.values(), strict=True))
            chosen = sorted({kinds.index(kind) for kind in kinds if kinds}) if kinds else []
            kept = chosen[:4] if len(chosen) > 1 else list(range(fewest))
            values[name] = len(kept)
            if f"stage{number}" in stages:
                values["out_features"] = [f"stage{i + 1}" for i in range(len(kept) - len(stages), len(kept))]
                values["out_indices"] = None
            for key, value in lists.items():
                values[key] = [value[i] for i in kept]
            for key, value in values.items():
                if isinstance(value, dict) and value and all(str(index).isdigit() for index in value):
                    by_index = {int(index): item for index, item in value.items()}
                    values[key] = {i: by_index[old] for i, old in enumerate(kept) if old in by_index}
