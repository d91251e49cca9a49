"""Prompts encoded as the model's data was: same tokenizer, same beginning, special tokens' spellings treated alike."""

from pathlib import Path

from earthshine.checkpoint.run_rule import run_rule
from earthshine.console import log
from earthshine.data.tokenizer import load_tokenizer
from earthshine.errors import ConfigError
from earthshine.files import sha256_file


class Prompts:
    """Encodes prompts for one model.

    A run's prompts follow the rule that its data records. Where there is none (a Hugging Face directory, or an older
    run), a prompt begins as the tokenizer begins a text, and a special token's spelling is text.
    """

    def __init__(self, model: str | Path, tokenizer: str | Path | None = None, *, special_tokens: bool = False) -> None:
        """model: a run or a Hugging Face directory. tokenizer: by default the model's own.

        special_tokens: take the spelling of a special token for that token, whatever the data's rule is.
        Raises ConfigError for a tokenizer that cannot be read, or is not the one that a run was trained with.
        """
        rule = run_rule(model)
        recorded = rule.tokenization if rule else None
        if rule and tokenizer is None:
            raise ConfigError(f"tokenizer: {model} is a run, which holds none; name the one of its data (--tokenizer).")
        path = Path(tokenizer or model)
        self.tokenizer = load_tokenizer(path)
        models_own = Path(model) / "tokenizer.json"
        if rule:
            fix = "Give the tokenizer that its data was prepared with (--tokenizer)."
            rule.require_tokenizer(self.tokenizer.sha256, f"tokenizer={self.tokenizer.path}", fix)
        elif models_own.is_file() and sha256_file(models_own) != self.tokenizer.sha256:
            log(
                f"warning: {path} is not {models_own}: unless the two hold the same vocabulary, the text means nothing."
            )
        if recorded:
            self.tokenizer = load_tokenizer(path, recorded.eod)  # so that no spelling in a text becomes it
        known = recorded if recorded and recorded.recorded else None
        self._bos_ids = known.bos_ids if known else self.tokenizer.bos_ids
        self.special_tokens = special_tokens or bool(known and known.special_spellings == "tokens")
        if rule and not known and self._bos_ids:
            log(
                f"{model} was trained on shards that do not record how texts became ids: a prompt begins with the "
                f"tokenizer's beginning token (ids {list(self._bos_ids)}), which they may not hold."
            )

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt."""
        spelled = self.tokenizer.spelled(text)
        if spelled and not self.special_tokens:
            log(f"the prompt spells {spelled!r}, which is text; --special-tokens makes it the special token.")
        return self.tokenizer.encode_prompt(text, special=self.special_tokens, bos_ids=self._bos_ids)
