"""Patterns and fields that set every part of the frame in which a model's mixers stand, for `tiny`."""

ROPE = {"rope_theta": 100.0, "partial_rotary_factor": 0.5}
LONG = ROPE | {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EACH = {"full_attention": YARN, "sliding_attention": ROPE | {"rope_type": "linear", "factor": 2.0}}
WINDOW = {"sliding_window": 5}
GATED = {"gated_mlp": True, "mlp_bias": False, "hidden_act": "silu"}

FRAMES = {
    "root mean square norms": ("AR", {"norm": "rms"}),
    "an eps": ("AR", {"norm_eps": 0.1}),
    "gains less one": ("AR", {"norm": "rms", "zero_centered_norms": True, "qk_norm": "head"}),
    "norms around": ("ARMS", {"norm": "rms", "norm_placement": "around", "use_parallel_residual": False}),
    "norms inside": ("ARS", {"norm": "rms", "norm_placement": "inside", "use_parallel_residual": False}),
    "layer norms inside, in parallel": ("AR", {"norm_placement": "inside"}),
    "a gate": ("AR", GATED),
    "no biases": ("AR", {"attention_bias": False, "mlp_bias": False}),
    "a bias of the output alone": ("AR", {"attention_bias": False, "attention_out_bias": True}),
    "biases but the output's": ("AR", {"attention_out_bias": False}),
    "shared heads": ("AR", {"num_key_value_heads": 2, "retention_num_kv_heads": 1}),
    "wide heads": ("AR", {"head_dim": 12, "retention_head_dim": 6}),
    "normed heads": ("AR", {"qk_norm": "head", "num_key_value_heads": 2}),
    "heads normed as one": ("AR", {"qk_norm": "all", "retention_num_kv_heads": 2}),
    "learned positions": ("ARMS", {"position_embedding_type": "learned", "max_position_embeddings": 40}),
    "no positions": ("ARMS", {"position_embedding_type": "none"}),
    "windows": ("WAWR", WINDOW),
    "windows alone": ("WW", WINDOW | {"num_key_value_heads": 2}),
    "windows with learned positions": ("WR", WINDOW | {"position_embedding_type": "learned"}),
    "angles of windows": ("WAR", WINDOW | {"rope_parameters": EACH}),
    "layers that do not rotate": ("ARAR", {"no_rope_layers": [0, 1]}),
    "linear": ("AR", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("AR", {"rope_parameters": YARN}),
    "llama3": ("AR", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "proportional": ("AR", {"rope_parameters": ROPE | {"rope_type": "proportional", "factor": 3.0}}),
    "dynamic": (
        "AR",
        {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "factor": 2.5} | ROPE},
    ),
    "longrope": (
        "AR",
        {"rope_parameters": LONG | {"original_max_position_embeddings": 40}, "max_position_embeddings": 80},
    ),
    "scales": ("AR", {"embedding_scale": 3, "residual_scale": 0.5, "logits_scale": 0.25}),
    "scales of scores": ("AA", {"attention_scale": 0.9, "scale_attention_by_layer": True}),
    "caps": ("AWR", WINDOW | {"attention_softcap": 1.5, "final_softcap": 2.0}),
    "learned decays": ("RA", {"retention_learned_decay": True}),
    "learned decays from others": (
        "RA",
        {"retention_learned_decay": True, "retention_log_decay": [-1.0, -0.5, -0.1, -0.01]},
    ),
    "odd shares of channels": ("MS", {"expand": 1.5, "mamba2_num_heads": 6}),
    "everything": (
        "WARMS",
        {
            **(WINDOW | GATED | {"norm": "rms", "zero_centered_norms": True, "norm_placement": "around"}),
            "qk_norm": "head",
            "num_key_value_heads": 2,
            "head_dim": 12,
            "retention_num_kv_heads": 2,
            "embedding_scale": 2.0,
            "residual_scale": 0.7,
            "attention_softcap": 3.0,
            "final_softcap": 9.0,
            "rope_parameters": EACH,
            "retention_learned_decay": True,
            "use_parallel_residual": False,
        },
    ),
}
