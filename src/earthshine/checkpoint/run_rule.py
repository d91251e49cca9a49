"""What whoever uses a run's model must share with its training: tokenizer, how texts became ids, attention masks.

Torch-free: it is in the manifest of each checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

from earthshine.checkpoint.manifest import newest
from earthshine.console import log
from earthshine.data.tokenization import Tokenization
from earthshine.errors import ConfigError


@dataclass(frozen=True)
class RunRule:
    """path: the run. tokenization: None where its checkpoints are too old to have it.

    document_attention: whether attention stayed within documents.
    """

    path: Path
    tokenization: Tokenization | None
    document_attention: bool

    def require_tokenizer(self, sha256: str, what: str, fix: str) -> None:
        """Raise ConfigError when `what`, made with or being the tokenizer.json of that hash, is not the run's."""
        if self.tokenization is None:
            log(f"{self.path} does not record the tokenizer of its data (older checkpoints do not): {what} is used.")
        elif sha256 != self.tokenization.tokenizer_sha256:
            raise ConfigError(
                f"{what} has the sha256 {sha256}, but {self.path} was trained with the tokenizer.json of sha256 "
                f"{self.tokenization.tokenizer_sha256}: the same ids would be other texts. {fix}"
            )


def run_rule(model: str | Path) -> RunRule | None:
    """The rule of a run folder or a checkpoint; None for a Hugging Face directory, or where no manifest can be read."""
    manifest = newest(Path(model))
    if manifest is None:
        return None
    data = manifest.job.get("data")
    within = data.get("document_attention", True) if isinstance(data, dict) else True
    return RunRule(Path(model), manifest.tokenization, within is not False)
