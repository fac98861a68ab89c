"""CLAMP's text tower: a frozen language model, learned prompts that read its text, and a pool (arXiv 2312.01629).

A text is read in two passes. The language model reads the text as it always does; then the prompts go through it
with the text's keys and values as their past. As no text token sees a prompt, this is exactly one pass over both under
:func:`models.methods.clamp.masks.read_only_mask`, but the first half is the untouched model, and without LoRA it is the
same at every step: its keys and values can be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latteflow.models.errors import ModelError
from latteflow.models.methods.clamp import ClampSettings
from latteflow.models.methods.clamp.masks import positions, read_only_mask
from latteflow.models.methods.clamp.pooling import AttentionPool
from latteflow.models.methods.clamp.wrapper import Tokens, Wrapper
from latteflow.models.vectors import unit

FIRST_SCALE, MAX_SCALE = 1 / 0.07, 100.0
_ATTENTION_KINDS = {"full_attention", "sliding_attention"}

States = list[tuple[Tensor, Tensor]]
"""Keys and values of a text in each layer, `(n, heads, length, head width)`."""


class ClampTower(nn.Module):
    """Texts to unit features in a CLIP's space.

    Args:
        lm: a Hugging Face causal language model. It stays as it is but for LoRA, which is put into it.
        tokenizer: its own.
        settings: how many prompts, which mask, LoRA, pool, wrapper.
        width: of the CLIP's features.
        seed: of what is learned, before it is.

    Raises:
        ModelError: the language model cannot serve: layers without attention, no room for the wrapper, LoRA names that
            match nothing, float16 on a CPU.
    """

    def __init__(self, lm: Any, tokenizer: Any, settings: ClampSettings, width: int, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.lm = lm.requires_grad_(False).eval()
        if lm.dtype == torch.float16 and lm.device.type == "cpu":
            raise ModelError("clamp.dtype float16 overflows and is slow on a CPU; use float32 or bfloat16")
        self.wrapper = Wrapper(settings.wrapper, tokenizer, settings.max_tokens, _context(lm) - settings.prompts)
        table = lm.get_input_embeddings()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            # The rule of RPO: near the end of text, whose embedding the model knows.
            end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
            start = table(torch.tensor([end], device=table.weight.device)).float()
            noise = unit(torch.randn(settings.prompts, start.shape[1], device=start.device))
            self.prompts = nn.Parameter(start + 0.1 * noise)
            self.pool = AttentionPool(start.shape[1], width, settings.pool_heads).to(start.device)
            self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE, device=start.device).log())
            if settings.lora_rank:
                _add_lora(lm, settings)

    @property
    def device(self) -> torch.device:
        return self.prompts.device

    def train(self, mode: bool = True) -> ClampTower:
        """Training turns on LoRA's dropout, and no other: the language model is frozen."""
        super().train(mode)
        self.lm.eval()
        for layer in _lora_layers(self.lm):
            layer.lora_dropout.train(mode)
        return self

    def read(self, tokens: Tokens) -> States:
        """What the language model keeps of the texts: nothing of ours but LoRA takes part."""
        from transformers import DynamicCache

        is_right_padded = bool((tokens.valid[:, :-1] >= tokens.valid[:, 1:]).all())
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.settings.lora_rank)):
            found = self.lm.base_model(
                input_ids=tokens.ids.to(self.device),
                # Causal attention never looks at padding on the right.
                attention_mask=None if is_right_padded else tokens.valid.to(self.device),
                position_ids=None if is_right_padded else positions(tokens.valid, 0).to(self.device),
                past_key_values=DynamicCache(),
                use_cache=True,
            )
        return [(layer.keys, layer.values) for layer in found.past_key_values.layers]

    def encode(self, valid: Tensor, states: States) -> Tensor:
        """Unit features `(n, width)` float32 of texts that were read; arguments as for :meth:`ask`."""
        return self.pooled(self.ask(valid, states))

    def pooled(self, asked: Tensor) -> Tensor:
        """Unit features `(n, width)` of what :meth:`ask` gave."""
        with torch.autocast(self.device.type, enabled=False):  # half precision loses small differences of similarity
            return unit(self.pool(asked.float()))

    def ask(self, valid: Tensor, states: States) -> Tensor:
        """Last hidden states at the prompts, `(n, prompts, width of the language model)`.

        Args:
            valid: False where a text is padded, `(n, length)` bool.
            states: of :meth:`read`.
        """
        from transformers import DynamicCache

        n, length = valid.shape
        count = len(self.prompts)
        dtype = self.lm.dtype
        mask = read_only_mask(valid.to(self.device), count, self.settings.prompt_mask)[:, None, length:]
        last: Tensor = self.lm.base_model(
            inputs_embeds=self.prompts.to(dtype).expand(n, -1, -1),
            attention_mask=torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill(
                ~mask, torch.finfo(dtype).min
            ),
            position_ids=positions(valid, count)[:, length:].to(self.device),
            past_key_values=DynamicCache(states),
            use_cache=True,
        ).last_hidden_state
        return last

    def forward(self, tokens: Tokens) -> Tensor:
        """Unit features `(n, width)` of wrapped texts."""
        return self.encode(tokens.valid, self.read(tokens))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], batch: int = 32) -> Tensor:
        """Unit features `(len(texts), width)` of class names or descriptions, without gradient or dropout."""
        was, tokens = self.training, self.wrapper(texts)
        self.eval()
        try:
            order = tokens.valid.sum(1).argsort(stable=True)
            parts = [self(tokens[rows]) for rows in order.split(batch)] if len(texts) else []
        finally:
            self.train(was)
        return torch.cat(parts)[order.argsort()] if parts else self.prompts.new_zeros(0, self.pool.out.out_features)

    @torch.no_grad()
    def generate(self, prompt: str, *, tokens: int = 32, lora: bool = False) -> str:
        """What the language model writes after a prompt, greedily. Learned prompts and pool have no part in it.

        Args:
            lora: leave LoRA in place; without, this is exactly the model as it came.
        """
        tokenizer = self.wrapper.tokenizer
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=self.device)
        was = self.training
        self.eval()
        with contextlib.nullcontext() if lora else self.without_lora():
            found = self.lm.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        self.train(was)
        text: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    @contextlib.contextmanager
    def without_lora(self) -> Iterator[None]:
        """The language model as it came."""
        layers = _lora_layers(self.lm)
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def adapter(self) -> dict[str, Tensor]:
        """All that was learned, by name; the language model is not in it."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """Put in what was learned.

        Raises:
            ModelError: it belongs to a tower of other settings or another language model.
        """
        own = self.adapter()
        wrong = sorted(own.keys() ^ adapter.keys()) or [n for n in own if own[n].shape != adapter[n].shape]
        if wrong:
            raise ModelError(
                f"the adapter does not fit this tower: {', '.join(wrong[:3])} differ(s); use the settings and the "
                "language model it was made with"
            )
        for name, tensor in adapter.items():
            own[name].copy_(tensor)


def _context(lm: Any) -> int:
    """Tokens that every layer of the model sees together.

    Raises:
        ModelError: a layer has no attention, whose past cannot be masked.
    """
    config = lm.config.get_text_config(decoder=True)
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS
    if others:
        raise ModelError(
            f"clamp.lm: {type(lm).__name__} has layers of {', '.join(sorted(others))}; prompts that only read need "
            "attention in every layer, as in Llama, Qwen, Mistral or Gemma"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # Within the window a sliding layer sees all there is, as the method has it.
    return min(window or config.max_position_embeddings, config.max_position_embeddings)


def _lora_layers(lm: nn.Module) -> list[Any]:
    return [module for module in lm.modules() if hasattr(module, "lora_A")]


def _add_lora(lm: Any, settings: ClampSettings) -> None:
    """Put low-rank updates beside the named matrices (2.4).

    Raises:
        ModelError: peft is not installed, or a name matches nothing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError("clamp.lora_rank needs the package peft; run: pip install 'latteflow[clamp]'") from error

    head = lm.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, m in lm.named_modules() if m is not head and _is_matrix(m)}
    missing = [name for name in settings.lora_targets if name not in names]
    if missing:
        raise ModelError(
            f"clamp.lora_targets: {', '.join(missing)} match(es) no matrix of {type(lm).__name__}; "
            f"it has {', '.join(sorted(names))}"
        )
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_targets),
        bias="none",
    )
    inject_adapter_in_model(config, lm)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # as GPT-2 names its own
