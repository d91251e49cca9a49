"""The vocabulary of a model that starts from scratch: large enough for its token shards, where nobody has set it."""

from collections.abc import Sequence
from dataclasses import replace

from earthshine.config import parse_json
from earthshine.data.usage import vocabulary
from earthshine.train.job import Scratch, TrainJob


def fit_vocabulary(job: TrainJob, overrides: Sequence[str] = ()) -> tuple[TrainJob, str]:
    """The job of a recipe with the vocabulary that its token shards need, and a line that says so, "" where none is.

    A model that starts from scratch gets one row per token id of its data and held-out data, where the recipe has
    fewer. Nothing changes where the recipe has enough, for a warm start (its weights decide), where `overrides`
    (already applied) name the size, or where the shards cannot be read. Not for jobs of a JSON file, which always names
    the size: so config.json of a run resumes the model that the run has.
    """
    paths = [*(source.path for source in job.data.sources), job.heldout.path]
    needed = max(map(vocabulary, paths))
    if not isinstance(job.init, Scratch) or any(map(_names_vocabulary, overrides)):
        return job, ""
    size = job.init.model.vocab_size
    if needed <= size:
        return job, ""
    model = replace(job.init.model, vocab_size=needed)
    line = f"init.model.vocab_size: {size} -> {needed}, the number of token ids in the shards"
    return replace(job, init=replace(job.init, model=model)), line


def _names_vocabulary(override: str) -> bool:
    """Whether path=value sets init.model.vocab_size, itself or in an object around it."""
    path, _, text = override.partition("=")
    where = ["init", "model", "vocab_size"]
    keys = path.split(".")
    if keys != where[: len(keys)]:
        return False
    try:
        value = parse_json(text)
    except ValueError:
        value = text
    for key in where[len(keys) :]:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True
