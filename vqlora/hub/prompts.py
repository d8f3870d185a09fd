"""From a clip and a request to token ids: the checkpoint's chat template around the text that stands for the
clip, and labels on the answer alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from vqlora.hub.checkpoint import Checkpoint
from vqlora.hub.families import Shown
from vqlora.hub.pixels import frame_pixels

REQUEST = "Describe the video."


class Prompts:
    """Rows for one checkpoint. `request` is what is asked where a caption is the answer.

    given    all that is read: the chat template's text up to the answer, the clip in it
    learned  the answer up to the token that ends it

    Without a chat template a row is the clip, the request and the answer, a line each. Raises ValueError for
    a template that does not show the clip.
    """

    def __init__(self, checkpoint: Checkpoint, request: str = REQUEST):
        self.checkpoint, self.request, self.family = checkpoint, request, checkpoint.family
        self.tokenizer = checkpoint.tokenizer
        config = checkpoint.config
        self.token_id = getattr(config, self.family.token, None)
        if self.token_id is None:  # older classes call it an index
            self.token_id = getattr(config, self.family.token.replace("_id", "_index"))
        self.token = self.tokenizer.convert_ids_to_tokens(self.token_id)
        self.mark = self._word(*self.family.mark) if self.family.mark else self.token
        self.template = self.family.template or checkpoint.template
        self._known: dict[str, list[int]] = {}

    # What `vqlora.data.batches.Collator.draw` asks for: (request, answer).

    def caption(self, text: str) -> tuple[str, str]:
        return self.request, text

    def question(self, text: str, answer: str) -> tuple[str, str]:
        return text, answer

    def see(
        self, frames: np.ndarray, seconds: tuple[float, ...], duration_s: float
    ) -> tuple[np.ndarray, Shown]:
        """Frames uint8 `[T, H, W, 3]` -> (pixels float32 `[T, 3, h, w]`, what the text tells of them)."""
        numbers, count = self.checkpoint.numbers, len(frames)
        pixels = frame_pixels(frames, numbers, self.family.sizes(numbers, *frames.shape[:3]))
        tokens = self.family.tokens(self.checkpoint.config, *pixels.shape[-2:])
        joined = numbers["temporal_patch_size"] if self.family.joined else 1
        return pixels, Shown(-(-count // joined), tokens, self.token, seconds, duration_s, self._word)

    def row(self, shown: Shown, request: str, answer: str) -> tuple[list[int], list[int]]:
        """(given, learned) token ids."""
        before, after = self._chat(shown, request, answer)
        given = self._ids(self._expand(before, shown), start=True)
        placed = sum(i == self.token_id for i in given)
        if placed < shown.steps * shown.tokens:
            raise ValueError(
                f"base: {self.checkpoint.source!r}: its chat template shows {placed} of the "
                f"{shown.steps * shown.tokens} tokens of a clip; expected {self.mark!r} in its text "
                "for a message with a video"
            )
        return given, self._until_end(answer, after)

    def _chat(self, shown: Shown, request: str, answer: str) -> tuple[str, str]:
        """The text before the answer, and from the answer on."""
        marks = shown.steps if self.family.images else 1
        if self.template is None:
            return f"{self.mark * marks}\n{request}\n", answer
        kind = {"type": "image"} if self.family.images else {"type": "video"}
        asked: list[Any] = [
            [kind] * marks + [{"type": "text", "text": request}],
            f"{self.mark * marks}\n{request}",
        ]
        told: list[Any] = [[{"type": "text", "text": answer}], answer]
        for question, reply in zip(asked, told, strict=True):  # templates of text models take strings alone
            messages = [{"role": "user", "content": question}]
            try:
                before = self._render(messages, add_generation_prompt=True)
                whole = self._render([*messages, {"role": "assistant", "content": reply}])
            except (TemplateError, TypeError):
                continue
            if before.count(self.mark) == marks:
                after = whole[len(before) :] if whole.startswith(before) else ""
                return before, after if answer in after else answer
        raise ValueError(
            f"base: {self.checkpoint.source!r}: its chat template does not show a video; expected "
            f"{self.mark!r} in its text for a message with one"
        )

    def _render(self, messages: list[dict], **how) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, **how
        )

    def _expand(self, text: str, shown: Shown) -> str:
        wrapped = self.mark.join(self.family.around)
        mark = wrapped if all(self.family.around) and wrapped in text else self.mark
        return self.family.tidy(text.replace(mark, self.family.text(shown)), self._word)

    def _until_end(self, answer: str, after: str) -> list[int]:
        """Ids of the answer and of what ends it: the first special token behind it, else the end of text."""
        place = after.index(answer) + len(answer)
        ids, ends = self._ids(after[:place]), self._ids(after[place:]) if after[place:] else []
        special = {*self.tokenizer.all_special_ids, *self.checkpoint.ends}
        for number, token in enumerate(ends):
            if token in special:
                return [*ids, *ends[: number + 1]]
        return [*ids, self.tokenizer.eos_token_id]

    def _ids(self, text: str, start: bool = False) -> list[int]:
        """Token ids; at the start with what the tokenizer puts first, unless the template wrote it."""
        if start:
            bos = self.tokenizer.bos_token
            ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
            return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def _word(self, name: str, usual: str) -> str:
        return getattr(self.tokenizer, name, None) or usual
