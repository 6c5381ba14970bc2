"""The sizes at which search is measured: queries, gallery, dimensions."""

CASES = {
    "a": (1_000, 100_000, 512),
    "b": (10_000, 10_000, 2_048),
    "c": (1_000, 1_000_000, 128),
    "small": (1_000, 20_000, 256),
    "narrow": (1_000, 100_000, 128),
    "gpu": (10_000, 1_000_000, 512),
    "tiny": (50, 3_000, 32),
}
