"""Steps of the engine on one H100 80GB, as benchmarks/results/engine-h100.json had them.

Written by `python -m benchmarks.simulator_steps`.
"""

# Model, sequences that decode, context of each, tokens of a prompt, seconds.
STEPS: tuple[tuple[str, int, int, int, float], ...] = (
    ("8B", 1, 512, 0, 0.0062352),
    ("8B", 32, 512, 0, 0.0073131),
    ("8B", 64, 1024, 0, 0.0096972),
    ("8B", 0, 0, 128, 0.0074927),
    ("8B", 0, 0, 1024, 0.024491),
    ("8B", 0, 0, 4096, 0.10314),
    ("1B", 1, 512, 0, 0.0013661),
    ("1B", 32, 512, 0, 0.0016577),
    ("1B", 64, 1024, 0, 0.0023398),
    ("1B", 0, 0, 128, 0.0020893),
    ("1B", 0, 0, 1024, 0.0046563),
    ("1B", 0, 0, 4096, 0.017428),
)
