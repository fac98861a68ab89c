"""CLAMP's text tower on two families of language models: what it reads, and what it leaves alone."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

import tinylm
from latteflow.models.errors import ModelError
from latteflow.models.methods.clamp import ClampSettings
from latteflow.models.methods.clamp.losses import contrastive, distillation
from latteflow.models.methods.clamp.masks import positions, read_only_mask
from latteflow.models.methods.clamp.tower import ClampTower
from latteflow.models.methods.clamp.wrapper import WRAPPERS, Tokens, Wrapper, normal
from latteflow.models.vectors import unit

FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma3"])
MASKS = pytest.mark.parametrize("mask", ["bidirectional", "causal", "isolated"])
TEXTS = ["a red shape", "a", "an image of two green and three blue shapes"]


def tower(family: tinylm.Family = "llama", seed: int = 0, **settings: Any) -> ClampTower:
    cfg = ClampSettings(**{"prompts": 4, "pool_heads": 4} | settings)
    return ClampTower(tinylm.language_model(family), tinylm.tokenizer(), cfg, 32, seed=seed).eval()


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def digest(module: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if "lora_" not in name:
            found.update(name.replace("base_layer.", "").encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def in_one_pass(clamp: ClampTower, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """States of texts and prompts from one pass over both under the whole mask: what two passes must come to."""
    mask = read_only_mask(tokens.valid, len(clamp.prompts), clamp.settings.prompt_mask)[:, None]
    embeds = clamp.lm.get_input_embeddings()(tokens.ids)
    states = clamp.lm.base_model(
        inputs_embeds=torch.cat([embeds, clamp.prompts.expand(len(embeds), -1, -1)], 1),
        attention_mask=torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
        position_ids=positions(tokens.valid, len(clamp.prompts)),
        use_cache=False,
    ).last_hidden_state
    return states.split([tokens.ids.shape[1], len(clamp.prompts)], 1)


def padded_left(tokens: Tokens) -> Tokens:
    shift = (~tokens.valid).sum(1)
    place = (torch.arange(tokens.ids.shape[1]) - shift[:, None]) % tokens.ids.shape[1]
    return Tokens(tokens.ids.gather(1, place), tokens.valid.gather(1, place))


# --- what the tower reads ---------------------------------------------------------------------------------------------


@FAMILIES
@MASKS
@torch.no_grad()
def test_two_passes_are_one_under_the_mask(family, mask):
    clamp = tower(family, prompt_mask=mask)
    tokens = clamp.wrapper(TEXTS)
    close(clamp(tokens), unit(clamp.pool(in_one_pass(clamp, tokens)[1])))


@FAMILIES
@MASKS
@torch.no_grad()
def test_padding_does_not_matter(family, mask):
    clamp = tower(family, prompt_mask=mask)
    tokens = clamp.wrapper(TEXTS)
    alone = torch.cat([clamp(clamp.wrapper([text])) for text in TEXTS])
    close(clamp(tokens), alone)
    close(clamp(padded_left(tokens)), alone)
    wide = Tokens(torch.nn.functional.pad(tokens.ids, (0, 9)), torch.nn.functional.pad(tokens.valid, (0, 9)))
    close(clamp(wide), alone)


@FAMILIES
@torch.no_grad()
def test_text_states_do_not_depend_on_the_prompts(family):
    clamp = tower(family)
    tokens = clamp.wrapper(TEXTS)
    before = in_one_pass(clamp, tokens)[0]
    plain = clamp.lm.base_model(input_ids=tokens.ids, attention_mask=tokens.valid.long()).last_hidden_state
    close(before[tokens.valid], plain[tokens.valid], 2e-6)
    clamp.prompts += 3
    assert in_one_pass(clamp, tokens)[0][tokens.valid].equal(before[tokens.valid])


@torch.no_grad()
@pytest.mark.parametrize(("mask", "others"), [("bidirectional", [0, 1, 3]), ("causal", [3]), ("isolated", [])])
def test_prompts_see_each_other_as_the_mask_says(mask, others):
    clamp = tower(prompt_mask=mask)
    tokens = clamp.wrapper(TEXTS[:1])
    before = in_one_pass(clamp, tokens)[1][0]
    clamp.prompts[2] += 1
    change = (in_one_pass(clamp, tokens)[1][0] - before).abs().amax(1) > 1e-6
    assert change.nonzero().flatten().tolist() == sorted([2, *others])


@FAMILIES
@torch.no_grad()
def test_without_lora_the_language_model_is_untouched_bit_for_bit(family):
    reference, clamp = tinylm.language_model(family), tower(family, lora_rank=4)
    for name, p in clamp.lm.named_parameters():
        if "lora_B" in name:
            p += 0.1
    tokens = clamp.wrapper(TEXTS)
    expected = reference.base_model(input_ids=tokens.ids).last_hidden_state
    with clamp.without_lora():
        assert clamp.lm.base_model(input_ids=tokens.ids).last_hidden_state.equal(expected)
    assert not clamp.lm.base_model(input_ids=tokens.ids).last_hidden_state.equal(expected)
    ids = torch.tensor([tinylm.tokenizer()("a photo")["input_ids"]])
    written = reference.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, attention_mask=ids * 0 + 1)
    assert clamp.generate("a photo", tokens=24) == tinylm.tokenizer().decode(written[0, ids.shape[1] :], True)


def test_text_features_do_not_depend_on_batch_order_or_dropout():
    clamp = tower(lora_rank=4, lora_dropout=0.5).train()
    found = clamp.text_features([*TEXTS, TEXTS[0]], batch=2)
    close(found, clamp.text_features([TEXTS[0], *TEXTS[::-1]], batch=3)[[3, 2, 1, 0]])
    close(found.norm(dim=1), torch.ones(4))
    assert clamp.training and clamp.text_features([]).shape == (0, 32)


# --- the wrapper ------------------------------------------------------------------------------------------------------


def told(tokens: Tokens, row: int = 0) -> str:
    return tinylm.tokenizer().decode(tokens.ids[row][tokens.valid[row]])


def test_the_papers_sentence_around_a_name():
    wrap = Wrapper("attributes", tinylm.tokenizer(), 48, 512)
    assert told(wrap(["forest_road"])) == (
        "<s>USER: A photo of a forest road. A forest road has the following visual attributes.\nASSISTANT: 1."
    )
    assert [normal(x) for x in ("ForestRoad", " A red  iPhone. ", "x_ y")] == ["Forest Road", "A red iPhone", "x y"]


@pytest.mark.parametrize(
    ("name", "max_tokens", "room"), [("attributes", 5, 400), ("attributes", 48, 11), ("single", 48, 5)]
)
def test_what_is_too_long_is_cut_in_the_text_and_counted(name, max_tokens, room):
    fixed = len("<" + WRAPPERS[name].replace("{}", ""))  # a token for each letter, and the beginning
    wrap = Wrapper(name, tinylm.tokenizer(), max_tokens, fixed + room)
    tokens = wrap(["abcdefghijklm", "abc", "abcde"])
    assert tokens.n_cut == 1 and tokens.ids.shape[1] <= fixed + room
    assert told(tokens) == told(tokens, 2) == "<s>" + wrap.sentence.replace("{}", "abcde")
    assert told(tokens, 1) == "<s>" + wrap.sentence.replace("{}", "abc")


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize(("lora", "most"), [(0, 0.4), (4, 0.05)])
def test_fifty_random_pairs_are_learned_and_the_language_model_is_not(family, lora, most):
    """The spec's property: 5.2 and chance at the start, retrieval of all after 100 steps."""
    clamp = tower(family, prompts=24, lora_rank=lora, lora_dropout=0.0)
    before = digest(clamp.lm)
    generator = torch.Generator().manual_seed(0)
    images = unit(torch.randn(50, 32, generator=generator))
    tokens = Tokens(torch.randint(2, 258, (50, 6), generator=generator), torch.ones(50, 6, dtype=torch.bool))
    states = None if lora else clamp.read(tokens)
    optimizer = torch.optim.AdamW([p for p in clamp.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(100):
        texts = clamp(tokens) if states is None else clamp.encode(tokens.valid, states)
        loss = contrastive(images, texts, clamp.log_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 3.5 and losses[-1] < most
    with torch.no_grad():
        assert ((images @ clamp(tokens).T).argmax(1) == torch.arange(50)).all()
    assert digest(clamp.lm) == before


# --- bad input --------------------------------------------------------------------------------------------------------


def test_one_pair_has_nothing_to_tell_apart():
    one = unit(torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"n >= 2, got \(1, 4\)"):
        contrastive(one, one, 1.0)
    with pytest.raises(ValueError, match="learned from the others of its batch"):
        distillation(one, one, one @ one.T, teacher_scale=1.0, student_scale=1.0)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        ClampSettings(batch_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_rank": 2, "lora_targets": ["q_proj", "qkv"]},
            "qkv match.* no matrix of LlamaForCausalLM; it has down_proj",
        ),
        ({"pool_heads": 5}, "pool_heads 5 does not divide the CLIP's width 32"),
        ({"prompts": 200}, "leaves none for a text"),
    ],
)
def test_what_cannot_work_is_told(settings, message):
    lm = tinylm.language_model(context=256)
    with pytest.raises(ModelError, match=message):
        ClampTower(lm, tinylm.tokenizer(), ClampSettings(**settings), 32)


def test_half_precision_is_not_for_a_cpu():
    with pytest.raises(ModelError, match="float16 overflows"):
        ClampTower(tinylm.language_model().half(), tinylm.tokenizer(), ClampSettings(), 32)
    clamp = ClampTower(tinylm.language_model().bfloat16(), tinylm.tokenizer(), ClampSettings(lora_rank=2), 32)
    assert {p.dtype for p in clamp.adapter().values()} == {torch.float32}
    assert clamp.text_features(TEXTS).dtype == torch.float32


def test_layers_without_attention_are_refused():
    lm = tinylm.language_model("gemma3")
    lm.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="has layers of linear_attention"):
        ClampTower(lm, tinylm.tokenizer(), ClampSettings(), 32)


def test_an_adapter_fits_its_own_tower_only():
    first, second = tower(lora_rank=4, seed=1), tower(lora_rank=4, seed=2)
    second.load_adapter(first.adapter())
    assert second.text_features(TEXTS).equal(first.text_features(TEXTS))
    with pytest.raises(ModelError, match="does not fit this tower: prompts differ"):
        second.load_adapter(tower(lora_rank=4, prompts=5).adapter())
    with pytest.raises(ModelError, match="does not fit this tower: lm"):
        second.load_adapter(tower().adapter())
