"""The public ops: each checks its arguments once and hands the call to a backend. Import them from their modules.

Sizes: N packed tokens, S sequences, P slots, H state heads, G query heads per state head, K key features, V value
channels, R state rows, C or D channels, M states per channel. `step` is a call with one token per sequence. Inputs are
float32, float16, bfloat16 or float64, all the same, and so are the outputs; gates are float32 (float64 with float64
inputs); states are float32 or float16 (float64 likewise), updated in place. Sums are formed in float32 or wider.
`slots` is int32 [S] and `cu_seqlens` int32 [S + 1]; see `contract` for what they mean, for `backend`, and for `check`.
"""
