"""Shapes with names that say why."""

# B, T, Hq, Hk, Hv, K, V
RETENTION = {
    "one token": (2, 1, 2, 2, 2, 4, 3),
    "odd everything": (2, 7, 3, 3, 3, 5, 11),
    "exactly one chunk": (1, 32, 2, 2, 2, 16, 16),
    "one token past a chunk": (2, 33, 1, 1, 1, 8, 8),
    "many chunks, padded": (1, 203, 2, 2, 2, 16, 8),
    "wide heads": (1, 70, 2, 2, 2, 64, 64),
    "one key head for four queries": (2, 20, 4, 1, 2, 8, 4),
    "shared queries": (2, 20, 2, 4, 4, 8, 4),
}

# B, T, D, N, G (None: b and c without groups)
SELECTIVE_SCAN = {
    "one token": (2, 1, 4, 3, None),
    "odd everything": (2, 7, 5, 3, None),
    "several chunks": (2, 45, 6, 16, None),
    "a row of two chunks": (1, 34, 5, 3, None),
    "exactly two chunks": (1, 32, 8, 4, None),
    "one state": (2, 20, 4, 1, None),
    "three groups": (2, 17, 6, 4, 3),
    "one group, named": (2, 9, 6, 4, 1),
    "wider than a vector": (1, 18, 70, 16, None),
}

# B, T, D, W
CAUSAL_CONV1D = {
    "one token": (2, 1, 3, 4),
    "shorter than the filter": (2, 2, 3, 4),
    "Mamba's": (2, 20, 6, 4),
    "no memory": (1, 5, 3, 1),
    "two taps": (2, 6, 5, 2),
    "three taps, wider than a vector": (1, 7, 35, 3),
    "many taps": (2, 12, 3, 9),
}

# cu_seqlens: where packed sequences begin and end
PACKED = {
    "one sequence": (0, 21),
    "two": (0, 4, 21),
    "of one token, of none, and longer than a chunk": (0, 1, 1, 40, 47),
    "empty ones at both ends": (0, 0, 16, 32, 32),
}
