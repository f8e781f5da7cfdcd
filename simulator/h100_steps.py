"""Steps of the engine on one H100 80GB, as benchmarks/results/engine-h100.json had them.

Written by `python -m benchmarks.simulator_steps`.
"""

# Model, sequences that decode, context of each, tokens of a prompt, seconds.
STEPS: tuple[tuple[str, int, int, int, float], ...] = (
    ("8B", 1, 512, 0, 0.0062474),
    ("8B", 32, 512, 0, 0.00723),
    ("8B", 64, 1024, 0, 0.0096866),
    ("8B", 0, 0, 128, 0.0075783),
    ("8B", 0, 0, 1024, 0.02466),
    ("8B", 0, 0, 4096, 0.10332),
    ("1B", 1, 512, 0, 0.0013737),
    ("1B", 32, 512, 0, 0.0016743),
    ("1B", 64, 1024, 0, 0.0023337),
    ("1B", 0, 0, 128, 0.00185),
    ("1B", 0, 0, 1024, 0.0044157),
    ("1B", 0, 0, 4096, 0.017435),
)
