"""`earthshine generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from earthshine.cli.options import ModelPath, Precision, load, print_json

DESCRIPTION = "Continue a prompt with a model's own words, using a key-value cache."
EXAMPLES = (
    ("the most likely continuation", "earthshine generate models/llama-8x --prompt 'def main():'"),
    ("sampled", "earthshine generate models/llama-8x --prompt 'Once' --temperature 0.8 --top-k 50 --seed 1"),
    ("a run, whose tokenizer is elsewhere", "earthshine generate runs/a --tokenizer models/llama --prompt 'The'"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: ModelPath
    """Hugging Face directory, or a run folder (its latest checkpoint)."""

    prompt: str
    """Text to continue."""

    tokenizer: Annotated[Path | None, "PATH"] = None
    """A tokenizer.json, or a folder with one; by default the model's own."""

    special_tokens: bool = False
    """Read special tokens that the prompt spells out (a chat's marks) as those tokens; by default as in the run's data,
    and as plain text for a Hugging Face directory."""

    max_new_tokens: int = 64
    """Largest number of tokens to add."""

    temperature: float = 0.0
    """0 takes the most likely token each time; otherwise logits are divided by this and sampled."""

    top_k: int = 0
    """Sample from this many most likely tokens; 0: from all."""

    seed: int = 0
    """Sampling seed."""

    precision: Precision = "float32"
    """Compute dtype."""

    trust: bool = False
    """Read a checkpoint that was not made on this machine."""

    json: bool = False
    """Print JSON, with the token ids."""


def run(options: Options) -> None:
    from earthshine.evaluate.generate import generate, stop_ids
    from earthshine.evaluate.prompts import Prompts

    prompts = Prompts(options.model, options.tokenizer, special_tokens=options.special_tokens)
    prompt_ids = prompts.encode(options.prompt)
    model = load(options.model, options.precision, options.trust)
    new_ids = generate(
        model,
        prompt_ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        eos_ids=stop_ids(options.model, model.config),
    )
    text = prompts.tokenizer.decode_continuation(prompt_ids, new_ids)
    if options.json:
        print_json({"prompt": options.prompt, "text": text, "prompt_ids": prompt_ids, "new_ids": new_ids})
    else:
        print(options.prompt + text)
