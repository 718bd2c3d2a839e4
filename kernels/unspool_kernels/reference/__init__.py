"""The kernels in plain torch: exact in float64, differentiable, on any device. Other backends are tested against them.

Sizes: B sequences, T tokens, H state heads, G query heads per state head, K key features, V value channels,
D channels of a head, W tokens of window, M sinks (or memory slots).
"""
