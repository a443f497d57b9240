"""Random unit vectors for the oracles of facility location."""

import numpy as np
from sftkit.curate.similarity import Vectors, unit_vectors


def scattered(random: np.random.Generator, size: int) -> Vectors:
    """Random rows, some of them copies or nearly, at times one of zeros."""
    dimensions = int(random.integers(2, 20))
    base = random.normal(size=(max(size // 2, 1), dimensions))
    vectors = base[random.integers(len(base), size=size)] + random.choice([0, 1e-6, 0.1]) * random.normal(size=(size, dimensions))
    if random.random() < 0.2:
        vectors[0] = 0
    return unit_vectors(vectors)
