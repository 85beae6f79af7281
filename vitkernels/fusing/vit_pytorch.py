"""Where pickles of 0.1.0 look for what `rearrange` has."""

from .rearrange import ToPatchEmbedding as ToPatchEmbedding
