"""What to train on: weighted folders of token shards. Torch-free."""

import math
from dataclasses import dataclass

from earthshine.errors import ConfigError
from earthshine.files import expand_home


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder of token shards, as `earthshine prepare` writes them; a `~` in its path is the home folder.

    weight: this source's fraction of the samples (and so of the tokens) is its weight over the sum of all weights.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("data.sources.path='' must name a folder of token shards; write one with prepare.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"data.sources.weight={self.weight} of {self.path} must be finite and greater than 0; "
                f"leave a source out instead of giving it no weight."
            )
        object.__setattr__(self, "path", expand_home(self.path))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The sources of a run, and whether attention stays within a document.

    document_attention: tokens attend only to their own document, and no document's first token is a target (nothing
        before it could predict it). Otherwise a sample is one text and the end-of-document token its only separator.
    """

    sources: tuple[SourceConfig, ...] = ()
    document_attention: bool = True

    def __post_init__(self) -> None:
        paths = [s.path for s in self.sources]
        for path in paths:
            if paths.count(path) > 1:
                raise ConfigError(f"data.sources names {path} {paths.count(path)} times; give it once, with a weight.")
