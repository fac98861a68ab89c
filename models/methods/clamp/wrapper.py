"""The sentence that a text stands in when the language model reads it, the same in training and evaluation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latteflow.models.errors import ModelError

WRAPPERS = {
    "attributes": "USER: A photo of a {}. A {} has the following visual attributes.\nASSISTANT: 1.",
    "single": "USER: {} Describe its visual attributes.\nASSISTANT: 1.",
}
"""By name; `attributes` is the paper's. `single` holds the text once, for long descriptions."""


def normal(text: str) -> str:
    """A class name or description as words: no underscores or CamelCase, one space between, no full stop at the end.

    >>> normal("Golden_Retriever"), normal("ForestRoad"), normal(" A red  iPhone. ")
    ('Golden Retriever', 'Forest Road', 'A red iPhone')
    """
    words = text.replace("_", " ").split()
    if len(words) == 1 and words[0][0].isupper():
        words = re.split(r"(?<=[a-z])(?=[A-Z])", words[0])
    return " ".join(words).rstrip(". ")


@dataclass(frozen=True)
class Tokens:
    """Texts as a language model reads them, padded on the right.

    Attributes:
        ids: `(n, length)` int64; 0 in the padding.
        valid: False in the padding, `(n, length)` bool.
        n_cut: texts that were too long and lost their end.
    """

    ids: Tensor
    valid: Tensor
    n_cut: int = 0

    def __getitem__(self, rows: Any) -> Tokens:
        """Some rows, without the padding that none of them needs."""
        longest = int(self.valid[rows].sum(1).max())
        return Tokens(self.ids[rows, :longest], self.valid[rows, :longest])


class Wrapper:
    """Puts texts into their sentence and cuts them, not the sentence, to what fits.

    Args:
        name: of :data:`WRAPPERS`.
        tokenizer: of a Hugging Face model; needs neither a padding token nor a chat template.
        max_tokens: of a text, wherever it stands in the sentence.
        context: tokens that the model can read.

    Raises:
        ModelError: the sentence alone does not fit.
    """

    def __init__(self, name: str, tokenizer: Any, max_tokens: int, context: int) -> None:
        self.sentence, self.tokenizer = WRAPPERS[name], tokenizer
        slots = self.sentence.count("{}")
        fixed = len(self._ids(self.sentence.replace("{}", "")))
        self.limit = min(max_tokens, (context - fixed) // slots)
        if self.limit < 1:
            raise ModelError(
                f"clamp.wrapper {name!r} takes {fixed} of {context} tokens, which leaves none for a text; "
                "use a language model with a longer context, or fewer clamp.prompts"
            )

    @property
    def digest(self) -> str:
        """sha256 of the sentence; an adapter remembers it."""
        return hashlib.sha256(self.sentence.encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokens of the wrapped texts, one row for each."""
        cut = [self._cut(normal(text)) for text in texts]
        rows = [torch.tensor(self._ids(self.sentence.replace("{}", text))) for text, _ in cut]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1, dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        return Tokens(ids, torch.arange(ids.shape[1]) < lengths[:, None], sum(was for _, was in cut))

    def _cut(self, text: str) -> tuple[str, bool]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in found["offset_mapping"]]
        return (text[: ends[self.limit - 1]], True) if len(ends) > self.limit else (text, False)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]  # with a beginning, if the model has one
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
