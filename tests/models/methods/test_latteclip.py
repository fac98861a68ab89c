"""The trainer: what it trains, what it leaves alone, edges and errors. The equations are in tests/golden."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import open_clip
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from latteflow.models.methods.adaptation import TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import _group_sampler, classify, latte_step, tune, update_prototypes
from latteflow.models.methods.training import NonFiniteLossError
from latteflow.models.schedule import warmup_cosine
from latteflow.models.towers.blocks import ignores_padding, text_features
from latteflow.models.towers.embedded import EmbeddedClip
from latteflow.models.vectors import unit

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 40, "width": 16, "heads": 2, "layers": 3},
}
N, CLASSES, DIM = 24, 3, 8


def domain(seed: int = 0, n: int = N, class_noise: float = 0.35, noise: float = 0.35) -> tuple[TuneData, torch.Tensor]:
    """Images around class directions that lie off the class texts, described by texts near the truth; and the truth."""
    generator = torch.Generator().manual_seed(seed)

    def around(rows: torch.Tensor, scale: float) -> torch.Tensor:
        return unit(rows + scale * torch.randn(rows.shape, generator=generator))

    classes = around(torch.zeros(CLASSES, DIM), 1)
    truth = torch.arange(n) % CLASSES
    class_texts = around(classes, class_noise)
    images = around(classes[truth], noise)
    z = classify(images, class_texts).argmax(1)
    texts = around(classes[truth], noise)
    return TuneData(
        pseudo_labels=z, class_texts=class_texts, image_texts=texts, group_texts=texts, group_classes=z,
        image_embeds=3 * images,
    ), truth  # fmt: skip


def tokens(rows: int, seed: int = 0) -> torch.Tensor:
    """Token rows of 3 to 6 tokens, the end token (39) included, padded with 0 to 10."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (rows, 1), generator=generator)
    place = torch.arange(10)
    words = torch.randint(1, 39, (rows, 10), generator=generator)
    return torch.where(place < lengths - 1, words, torch.where(place == lengths - 1, 39, 0))


def tiny_clip(custom: bool = False, **text: object) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cfg = copy.deepcopy(TINY)
        cfg["text_cfg"] |= text
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg).eval()


def pixel_domain(n: int = 12) -> tuple[TuneData, list[torch.Tensor | None]]:
    images = torch.rand((n, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    calls: list[torch.Tensor | None] = []

    def pixels(rows: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
        calls.append(seeds)
        return images[rows] + (0 if seeds is None else 0.1 * (seeds % 1009 / 1009)[:, None, None, None])

    return TuneData(
        pseudo_labels=torch.arange(n) % CLASSES, class_texts=tokens(CLASSES), image_texts=tokens(n, 1),
        group_texts=tokens(5, 2), group_classes=torch.tensor([0, 0, 1, 2, 2]), pixels=pixels,
    ), calls  # fmt: skip


def config(**options: object) -> LatteClipSettings:
    small = {"epochs": 3, "batch_size": 8, "warmup": 2, "scale": 20.0, "train": "prototypes"}
    return LatteClipSettings(**{**small, **options})


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 1.1}, {"alpha": -0.1}, {"batch_size": 0}, {"epochs": 0}, {"lr": -1.0}, {"betas": (0.9, 1.0)},
        {"train": "everything"}, {"beta": 0.01},
        {"use_class_texts": False, "use_image_texts": False, "use_group_texts": False},
    ],
)  # fmt: skip
def test_wrong_configuration_is_refused(wrong):
    with pytest.raises(ValidationError):
        LatteClipSettings(**wrong)


def test_every_field_is_described_and_the_configuration_is_frozen():
    fields = LatteClipSettings.model_json_schema()["properties"]
    assert fields.keys() == LatteClipSettings.model_fields.keys()
    assert all(field["description"] for field in fields.values())
    with pytest.raises(ValidationError):
        LatteClipSettings().alpha = 0.5


def test_defaults_follow_what_is_trained():
    assert LatteClipSettings().n_epochs(2000) == 40 and LatteClipSettings().n_epochs(10**6) == 1
    assert LatteClipSettings(batch_size=512).n_epochs(2000) == 160 and LatteClipSettings(epochs=3).n_epochs(2000) == 3
    assert LatteClipSettings().first_scale(100.0) == 10 and LatteClipSettings(scale=30.0).first_scale(100.0) == 30
    assert LatteClipSettings(train="all").first_scale(100.0) == 100
    assert [LatteClipSettings(train=t).peak_lr for t in ("prototypes", "projections", "all")] == [0, 1e-5, 1e-7]


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["epoch", "live"])
def test_loop_is_the_step_repeated(mixer):
    """Two steps of half the images each, one epoch, one group per class: the same by hand."""
    data, _ = domain()
    data = replace(data, group_texts=unit(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9))),
                   group_classes=torch.tensor([2, 0, 1]))  # fmt: skip
    cfg = config(epochs=1, batch_size=N // 2, mixer_prototypes=mixer, alpha=0.3)
    result = tune(cfg, data)

    groups = data.group_texts[torch.tensor([1, 2, 0])]
    first = prototypes = unit(data.class_texts)
    losses = []
    for rows in torch.randperm(N, generator=torch.Generator().manual_seed(0)).chunk(2):
        z = data.pseudo_labels[rows]
        step = latte_step(
            cfg, unit(data.image_embeds[rows]), data.class_texts, data.image_texts[rows], groups[z], z, prototypes,
            scale=20.0, mixer_prototypes=first if mixer == "epoch" else prototypes,
        )  # fmt: skip
        prototypes = update_prototypes(prototypes, step.labels, step.contributions)
        losses.append(float(step.losses["tuned_loss"]))
    torch.testing.assert_close(result.prototypes, prototypes)
    assert result.history[0]["tuned_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert result.image_map is result.text_map is result.clip is None
    assert result.scale == pytest.approx(20)


@pytest.mark.parametrize("train", ["prototypes", "projections"])
@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement"])
def test_seed_decides_everything_and_global_state_nothing(train, sampling):
    data, _ = domain()
    cfg = config(train=train, sampling=sampling)
    torch.manual_seed(1)
    one, state = tune(cfg, data), torch.random.get_rng_state()
    torch.manual_seed(2)
    two = tune(cfg, data)
    torch.manual_seed(1)
    assert torch.equal(one.prototypes, two.prototypes) and one.history == two.history
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(one.prototypes, tune(cfg, data, seed=1).prototypes)


def test_history_and_callback():
    data, _ = domain()
    heard: list[tuple[int, dict[str, float]]] = []
    result = tune(config(train="projections", lr=0.01), data, on_epoch=lambda *entry: heard.append(entry))
    assert [stats for _, stats in heard] == result.history and [epoch for epoch, _ in heard] == [0, 1, 2]
    last = result.history[-1]
    assert last["step"] == 9 and last["lr"] == pytest.approx(warmup_cosine(8, 0.01, 2, 9))
    assert last["loss"] == pytest.approx(last["tuned_loss"] + last["zero_shot_loss"], rel=1e-5)
    assert last["class_weight"] + last["image_weight"] + last["group_weight"] == pytest.approx(1, rel=1e-5)
    assert 0 <= last["agreement"] <= 1 and last["drift"] > 0


@pytest.mark.parametrize("labels", ["zero_shot", "tuned"])
def test_one_kind_of_label_has_one_loss(labels):
    data, _ = domain()
    stats = tune(config(labels=labels), data).history[-1]
    assert {key for key in stats if key.endswith("_loss")} == {f"{labels}_loss"}


def test_projections_fold_into_the_towers_and_lower_the_loss():
    data, _ = domain()
    centre = 0.1 * torch.ones(DIM)
    data = replace(data, centre=centre)
    cfg = config(train="projections", text_tower="trainable", lr=0.03, epochs=20, warmup=0, alpha=0.05)
    result = tune(cfg, data)
    assert result.image_map is not None and result.text_map is not None
    assert not torch.allclose(result.image_map, torch.eye(DIM), atol=1e-2)
    assert not torch.allclose(result.text_map, torch.eye(DIM), atol=1e-3)
    frozen = tune(cfg.model_copy(update={"train": "prototypes"}), data)
    assert result.history[-1]["loss"] < frozen.history[-1]["loss"] - 0.1

    # The class a text map is folded into: features of the mapped embeds are what the loop saw.
    mapped = replace(
        data, image_embeds=(data.image_embeds - centre) @ result.image_map, centre=None,
        class_texts=data.class_texts @ result.text_map, image_texts=data.image_texts @ result.text_map,
        group_texts=data.group_texts @ result.text_map,
    )  # fmt: skip
    resumed = tune(config(epochs=1, batch_size=N, alpha=0.0), mapped)
    torch.testing.assert_close(resumed.prototypes, unit(data.class_texts @ result.text_map))


def test_frozen_text_tower_has_no_text_map():
    data, _ = domain()
    result = tune(config(train="projections"), data)
    assert result.text_map is None and result.image_map is not None


def test_projections_with_learning_rate_0_are_prototypes():
    data, _ = domain()
    torch.testing.assert_close(
        tune(config(train="projections", lr=0.0), data).prototypes, tune(config(), data).prototypes
    )


@pytest.mark.slow
def test_descriptions_near_the_truth_help():
    gains = []
    for seed in range(5):
        data, truth = domain(seed, n=300, class_noise=0.6)
        result = tune(config(epochs=60, batch_size=100, alpha=0.05), data)
        tuned = classify(unit(data.image_embeds), result.prototypes).argmax(1)
        gains.append(float((tuned == truth).float().mean() - (data.pseudo_labels == truth).float().mean()))
    assert sum(gains) / 5 > 0.03 and min(gains) > -0.02, gains


# --- missing texts and edges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["prototypes", "projections"])
def test_a_missing_description_has_no_influence(train):
    data, _ = domain()
    has = torch.arange(N) % 4 > 0
    one = tune(config(train=train), replace(data, has_image_text=has))
    other = torch.where(has[:, None], data.image_texts, torch.tensor([1.0] + [0.0] * (DIM - 1)))
    two = tune(config(train=train), replace(data, has_image_text=has, image_texts=other))
    assert torch.equal(one.prototypes, two.prototypes) and one.history == two.history
    assert not torch.equal(one.prototypes, tune(config(train=train), data).prototypes)


def test_no_description_at_all_is_the_switch_off():
    data, _ = domain()
    without = tune(config(), replace(data, image_texts=None, group_texts=None, group_classes=None))
    off = tune(config(use_image_texts=False, use_group_texts=False), data)
    assert torch.equal(without.prototypes, off.prototypes) and without.history == off.history


def test_a_sample_without_any_text_keeps_its_prototype_as_target():
    data, _ = domain()
    nothing = torch.zeros(N, dtype=torch.bool)
    cfg = config(use_class_texts=False)
    step = latte_step(
        cfg, unit(data.image_embeds), data.class_texts, data.image_texts, data.group_texts, data.pseudo_labels,
        unit(data.class_texts), 10.0, has_image_text=nothing, has_group_text=nothing,
    )  # fmt: skip
    torch.testing.assert_close(step.contributions, unit(data.class_texts)[step.labels])
    assert not step.weights.any()


def test_groups_are_drawn_uniformly_from_their_class():
    classes = torch.tensor([2, 0, 2, 0, 0, 3, 2])
    draw = _group_sampler(classes, 5, torch.device("cpu"))
    labels = torch.tensor([0, 1, 2, 3, 4]).repeat(6000)
    rows, found = draw(labels, torch.Generator().manual_seed(0))
    assert found.tolist() == [True, False, True, True, False] * 6000
    assert torch.equal(classes[rows[found]], labels[found])
    counts = torch.bincount(rows[found], minlength=7)
    assert counts[5] == 6000
    assert all(abs(int(counts[i]) - 2000) < 200 for i in (0, 1, 2, 3, 4, 6))


def test_a_batch_larger_than_the_domain():
    data, _ = domain()
    for sampling, steps in (("with_replacement", 1), ("without_replacement", 1)):
        assert tune(config(batch_size=1000, epochs=1, sampling=sampling), data).history[0]["step"] == steps


@pytest.mark.parametrize("train", ["prototypes", "projections"])
def test_one_image_of_two_classes(train):
    data = TuneData(pseudo_labels=torch.tensor([1]), class_texts=torch.eye(2), image_embeds=torch.tensor([[0.6, 0.8]]),
                    image_texts=torch.tensor([[0.8, 0.6]]))  # fmt: skip
    result = tune(config(train=train), data)
    assert result.history[-1]["loss"] == 0  # one pair has nothing to be told from
    assert result.prototypes[0].tolist() == [1, 0]
    assert result.prototypes[1, 0] > 0.001
    assert result.prototypes.isfinite().all()


def test_one_class_in_all_pseudo_labels():
    data, _ = domain()
    result = tune(config(labels="zero_shot", alpha=0.1), replace(data, pseudo_labels=torch.full((N,), 1)))
    assert torch.equal(result.prototypes[[0, 2]], unit(data.class_texts)[[0, 2]])
    assert not torch.equal(result.prototypes[1], unit(data.class_texts)[1])


def test_several_templates_are_averaged():
    data, _ = domain()
    generator = torch.Generator().manual_seed(3)
    templates = torch.randn((CLASSES, 4, DIM), generator=generator)
    result = tune(config(alpha=0.0), replace(data, class_texts=templates))
    torch.testing.assert_close(result.prototypes, unit(unit(templates).mean(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_texts": torch.eye(DIM)[:1]}, "at least 2 classes"),
        ({"pseudo_labels": torch.full((N,), 3)}, "0 to 2, got 3 to 3"),
        ({"pseudo_labels": torch.zeros(N)}, "int64"),
        ({"image_texts": torch.zeros(2, DIM)}, "image_texts must have 24 rows"),
        ({"has_image_text": torch.ones(3, dtype=torch.bool)}, "has_image_text must have 24 rows"),
        ({"group_classes": None}, "belong together"),
        ({"group_classes": torch.tensor([0, 1])}, "group_texts must have 2 rows"),
    ],
)
def test_data_that_does_not_fit_is_refused(change, message):
    data, _ = domain()
    with pytest.raises(ValueError, match=message):
        replace(data, **change)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"train": "all"}, {}, "needs clip and pixels"),
        ({"train": "last_blocks"}, {}, "needs clip and pixels"),
        ({}, {"image_embeds": None}, "needs image_embeds"),
        ({}, {"class_texts": tokens(CLASSES)}, "class_texts are tokens"),
        ({}, {"image_embeds": torch.ones(N, 5), "centre": None}, r"\[5, 8\] wide"),
        ({"mixer_axis": "column"}, {}, "batch as large as the embedding is wide|needs a batch as large"),
    ],
)
def test_configuration_that_cannot_work_is_refused(options, change, message):
    data, _ = domain()
    with pytest.raises(ValueError, match=message):
        tune(config(**{"batch_size": 6, **options}), replace(data, **change))


def test_column_mode_runs_where_batch_and_width_agree():
    data, _ = domain()
    options = {"mixer_axis": "column", "zero_shot_class_weight": "shared"}
    assert math.isfinite(tune(config(batch_size=DIM, **options), data).history[-1]["loss"])


def test_non_finite_loss_names_the_step():
    data, _ = domain()
    embeds = data.image_embeds.clone()
    embeds[5] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"step \d+: tuned_loss nan") as caught:
        tune(config(), replace(data, image_embeds=embeds))
    assert 5 in caught.value.rows["images"] and caught.value.step < 3


# --- the towers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("text_tower", ["trainable", "frozen"])
@pytest.mark.parametrize("train", ["last_blocks", "all"])
def test_towers_train_what_they_should(train, text_tower, custom):
    clip, (data, _) = tiny_clip(custom), pixel_domain()
    before = copy.deepcopy(clip.state_dict())
    cfg = config(train=train, text_tower=text_tower, n_blocks=1, lr=1e-3, epochs=2, alpha=0.3)
    result = tune(cfg, data, clip=clip)
    assert result.clip is not None and result.clip is not clip
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
    changed = {name for name, value in result.clip.state_dict().items() if not torch.equal(before[name], value)}

    text = "text." if custom else ""
    is_image = {name: name.startswith("visual.") for name in before}
    if train == "all":
        # The first image token's position and the like all learn; so does every text tensor that a used token reaches.
        expected = {name for name in before if is_image[name] or text_tower == "trainable"} | {"logit_scale"}
    else:
        prefixes = ["visual.transformer.resblocks.2.", "visual.ln_post", "visual.proj"]
        if text_tower == "trainable":
            prefixes += [f"{text}transformer.resblocks.2.", f"{text}ln_final", f"{text}text_projection"]
        expected = {name for name in before if name.startswith(tuple(prefixes))} | {"logit_scale"}
    assert changed == expected
    assert not any(p.requires_grad for p in result.clip.parameters())
    assert float(result.clip.logit_scale) == pytest.approx(math.log(result.scale))


@pytest.mark.parametrize("train", ["last_blocks", "all"])
def test_the_towers_of_a_coca_train_without_its_decoder(train):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cfg = copy.deepcopy(TINY)
        cfg["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        cfg["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
        decoder = {"context_length": 10, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
        clip = open_clip.CoCa(**cfg, multimodal_cfg=decoder).eval()
        for parameter in clip.text_decoder.parameters():  # some are left as the memory was, NaN now and then
            torch.nn.init.normal_(parameter)
    before = copy.deepcopy(clip.state_dict())
    result = tune(config(train=train, n_blocks=1, lr=1e-3, epochs=2, alpha=0.3), pixel_domain()[0], clip=clip)
    changed = {name for name, value in result.clip.state_dict().items() if not torch.equal(before[name], value)}
    assert {"visual.proj", "visual.attn_pool.query", "text.text_projection", "logit_scale"} <= changed
    assert not any(name.startswith("text_decoder.") for name in changed)


def test_last_blocks_of_the_embedded_model():
    words = Tokenizer(WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = EmbeddedClip(words.to_str(), n_anchors=6)
        clip.text_anchors.normal_()
        torch.nn.init.normal_(clip.text_projection)
        pixels = torch.randn(4, 3, 224, 224)
    data = TuneData(
        pseudo_labels=torch.tensor([0, 1, 1, 0]), class_texts=torch.tensor([[1, 2, 0], [2, 1, 1]]),
        image_texts=torch.tensor([[1, 0, 0], [2, 2, 0], [1, 2, 0], [2, 1, 0]]), pixels=lambda rows, _: pixels[rows],
    )  # fmt: skip
    result = tune(config(train="last_blocks", n_blocks=1, lr=1e-3, alpha=0.3), data, clip=clip)
    before = clip.state_dict()
    changed = {name for name, value in result.clip.state_dict().items() if not torch.equal(before[name], value)}
    learned = ("visual.blocks.6.", "visual.conv_head", "visual.bn2", "image_projection", "text.layers.5.",
               "text_projection", "logit_scale")  # fmt: skip
    assert changed == {name for name, _ in clip.named_parameters() if name.startswith(learned)}


def test_augmentation_can_be_turned_off():
    clip = tiny_clip()
    for augment in (True, False):
        data, calls = pixel_domain()
        tune(config(train="all", augment=augment, epochs=1), data, clip=clip)
        assert calls and all((seeds is not None) == augment for seeds in calls)


def test_tokens_serve_cached_images_too():
    clip, (data, _) = tiny_clip(), pixel_domain()
    with torch.no_grad():
        embeds = clip.encode_image(data.pixels(torch.arange(12), None))
        texts = {name: clip.encode_text(getattr(data, name)) for name in ("class_texts", "image_texts", "group_texts")}
    by_tokens = tune(config(train="projections"), replace(data, image_embeds=embeds), clip=clip)
    by_embeds = tune(config(train="projections"), replace(data, image_embeds=embeds, **texts), clip=clip)
    torch.testing.assert_close(by_tokens.prototypes, by_embeds.prototypes)
    torch.testing.assert_close(by_tokens.image_map, by_embeds.image_map)


@pytest.mark.parametrize("custom", [False, True])
def test_cut_padding_changes_nothing(custom):
    clip = tiny_clip(custom)
    rows = tokens(4)
    with torch.no_grad():
        torch.testing.assert_close(
            text_features(clip, rows, trim=True), unit(clip.encode_text(rows)), atol=1e-6, rtol=1e-5
        )
    assert ignores_padding(clip, rows)


def test_a_text_tower_that_reads_padding_keeps_it():
    clip = tiny_clip(custom=True, no_causal_mask=True, pool_type="last")
    assert not ignores_padding(clip, tokens(2))


def test_unknown_towers_are_refused_with_a_way_out():
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))

    data, _ = pixel_domain()
    with pytest.raises(ValueError, match=r"Other has its blocks.*use train='projections'"):
        tune(config(train="last_blocks"), data, clip=Other())


def test_embeds_cannot_train_a_text_tower():
    data, _ = pixel_domain()
    with pytest.raises(ValueError, match="image_texts are embeds, but the text tower trains"):
        tune(config(train="all"), replace(data, image_texts=torch.ones(12, 8)), clip=tiny_clip())
