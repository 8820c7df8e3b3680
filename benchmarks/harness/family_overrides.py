"""What the rules for tiny configurations miss, by family: values by dotted name."""

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
# In place of a backbone of timm.
_OUT_OF_TRANSFORMERS = {"backbone_config": {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}}
_THREE_STAGES = {"backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
_LAST_STAGE = {"backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "hidden_size": 256, "mamba_d_state": 16}
_GROUPS_OF_32 = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64}  # in their group norms
_TINY_SAM = {
    "vision_config.image_size": 64,
    "vision_config.window_size": 2,
    "vision_config.global_attn_indexes": [1],
    "prompt_encoder_config.image_size": 64,
    "prompt_encoder_config.image_embedding_size": 4,
}

OVERRIDES = {
    "bailing_hybrid": {"num_experts_per_tok": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "conditional_detr": _OUT_OF_TRANSFORMERS,
    "dab_detr": {**_OUT_OF_TRANSFORMERS, "query_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _THREE_STAGES,
    "detr": _OUT_OF_TRANSFORMERS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 256, "pad_token_id": 1, "mask_token_id": 32},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "hiera": {"masked_unit_size": [8, 8], "query_stride": [2, 2]},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "kimi_linear": {"num_experts_per_tok": 2},
    "reformer": {"axial_pos_shape": [3, 4], "axial_pos_embds_dim": [8, 8], "hidden_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mask2former": _GROUPS_OF_32,
    "maskformer": {"fpn_feature_size": 64, "mask_feature_size": 64},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 2},
    "oneformer": {"conv_dim": 64, "mask_dim": 64, "hidden_dim": 64},
    "qwen2_vl": {"vision_config.hidden_size": 512},
    "sam": _TINY_SAM,
    "sam_hq": _TINY_SAM,
    "seamless_m4t": {"feature_projection_input_dim": 80},
    "seamless_m4t_v2": {"feature_projection_input_dim": 80},
    "swin2sr": {"image_size": 16, "depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "window_size": 4},
    "table_transformer": _LAST_STAGE,
    "vivit": {"image_size": 32, "num_frames": 4},
    "wav2vec2_bert": {"vocab_size": 32},
    "wav2vec2_conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
}
