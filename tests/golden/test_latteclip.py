"""LatteCLIP against its golden numbers (method description, section 7) and the invariants of 7.1.

The numbers come from the authors' released step, executed on the same fixture, and from an independent numpy version.
They are never to be regenerated from this code.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import (
    Step,
    classify,
    latte_step,
    margins,
    mix,
    targets,
    unit,
    update_prototypes,
)
from latteflow.models.methods.losses import clip_loss
from latteflow.models.schedule import steps_per_epoch, warmup_cosine
from latteflow.models.texts.collage import collage, layout

F64 = torch.float64
PROTOTYPES = [[1, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0]]
IMAGES = [[0.8, 0.6, 0, 0], [0.6, 0, 0.8, 0], [0, 0, 0.6, 0.8], [1, 0, 0, 0]]
IMAGE_TEXTS = [[0.8, 0.6, 0, 0], [0, 0.6, 0.8, 0], [0.6, 0, 0.8, 0], [0.96, 0.28, 0, 0]]
GROUP_TEXTS = [[0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0.8, 0.6, 0], [0.8, 0, 0, 0.6]]
CLASS_TEXTS = [[0.96, 0, 0.28, 0], [0.6, 0.8, 0, 0], [0, 0.28, 0.96, 0]]
ZERO_SHOT = torch.tensor([0, 2, 2, 1])
ORDER = [2, 0, 3, 1]
SCALE = 10.0
RELEASED = {"mixer_axis": "column", "zero_shot_class_weight": "shared"}

PRECISIONS = pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-7), (torch.float32, 1e-5)], ids=["f64", "f32"])


def run(dtype: torch.dtype = F64, order: list[int] | None = None, mixer: Tensor | None = None, **options) -> Step:
    """One step on the fixture, in another order of the batch if asked."""
    order = order or [0, 1, 2, 3]
    prototypes = options.pop("prototypes", torch.tensor(PROTOTYPES, dtype=dtype))
    images, image_texts, group_texts = (
        torch.tensor(rows, dtype=dtype)[order] for rows in (IMAGES, IMAGE_TEXTS, GROUP_TEXTS)
    )
    class_texts = torch.tensor(CLASS_TEXTS, dtype=dtype)
    labels = options.pop("zero_shot", ZERO_SHOT)[order]
    cfg = LatteClipSettings(**options)
    return latte_step(
        cfg, images, class_texts, image_texts, group_texts, labels, prototypes, SCALE, mixer_prototypes=mixer
    )


def total(step: Step) -> Tensor:
    return torch.stack(list(step.losses.values())).sum()


def updated(step: Step, prototypes: Tensor | None = None) -> Tensor:
    if prototypes is None:
        prototypes = torch.tensor(PROTOTYPES, dtype=step.contributions.dtype)
    return update_prototypes(prototypes, step.labels, step.contributions)


def close(got: Tensor | float, expected: object, atol: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=F64).detach(), torch.tensor(expected, dtype=F64), atol=atol, rtol=0
    )


# --- T1 ---------------------------------------------------------------------------------------------------------------

CLASS_WEIGHTS = {"y": [0.400001, 0.736001, 0.736001, 0.384001], "z": [0.384001, 0.736001, 0.736001, 0.400001]}
IMAGE_WEIGHTS = [0.160001, 0.320001, 0.200001, 0.160001]
GROUP_WEIGHTS = [0.400001, 1.000001, 0.040001, 0.320001]


@PRECISIONS
def test_t1_margins(dtype, atol):
    prototypes = torch.tensor(PROTOTYPES, dtype=dtype)
    close(margins(torch.tensor(IMAGE_TEXTS, dtype=dtype), prototypes), IMAGE_WEIGHTS, atol)
    close(margins(torch.tensor(GROUP_TEXTS, dtype=dtype), prototypes), GROUP_WEIGHTS, atol)
    by_class = margins(torch.tensor(CLASS_TEXTS, dtype=dtype), prototypes)
    close(by_class[torch.tensor([1, 2, 2, 0])], CLASS_WEIGHTS["y"], atol)
    close(by_class[ZERO_SHOT], CLASS_WEIGHTS["z"], atol)


@PRECISIONS
def test_t1_mix_of_sample_0_in_the_zero_shot_branch(dtype, atol):
    texts = torch.tensor([[CLASS_TEXTS[0]], [IMAGE_TEXTS[0]], [GROUP_TEXTS[0]]], dtype=dtype)
    weights = torch.tensor([[0.384001], [0.160001], [0.400001]], dtype=dtype)
    close(mix(texts, weights), [[0.78033900, 0.44067805, 0.11389824, 0]], atol)


def test_t1_normalized_weights():
    step = run(labels="zero_shot")
    close(step.weights[:, 0], [0.406779, 0.169492, 0.423729], 1e-6)


# --- T2 ---------------------------------------------------------------------------------------------------------------

T2 = {
    "row": {
        "tuned_loss": 0.51233297,
        "zero_shot_loss": 1.89917873,
        "total": 2.41151170,
        "tuned_target": [
            [0.60033333, 0.79966667, 0.00000000, 0.00000000],
            [0.00000000, 0.00193619, 0.99954552, 0.00000000],
            [0.00122951, 0.00243935, 0.99912459, 0.00000000],
            [0.99900741, 0.00051852, 0.00124444, 0.00222222],
        ],
        "zero_shot_target": [
            [0.99780339, 0.00440678, 0.00113898, 0.00000000],
            [0.00000000, 0.00193619, 0.99954552, 0.00000000],
            [0.00122951, 0.00243935, 0.99912459, 0.00000000],
            [0.60138182, 0.79614545, 0.00000000, 0.00218182],
        ],
        "tuned_mix": [
            [0.63333344, 0.76666656, 0.00000000, 0.00000000],
            [0.00000000, 0.19361882, 0.95455248, 0.00000000],
            [0.12295106, 0.24393478, 0.91245863, 0.00000000],
            [0.90074076, 0.05185200, 0.12444434, 0.22222215],
        ],
        "zero_shot_mix": [
            [0.78033900, 0.44067805, 0.11389824, 0.00000000],
            [0.00000000, 0.19361882, 0.95455248, 0.00000000],
            [0.12295106, 0.24393478, 0.91245863, 0.00000000],
            [0.73818198, 0.41454527, 0.00000000, 0.21818176],
        ],
        "new": [
            [0.99999563, 0.00246657, 0.00119361, 0.00111288],
            [0.60155425, 0.79883120, 0.00000000, 0.00109217],
            [0.00061516, 0.00218922, 0.99999741, 0.00000000],
        ],
    },
    "column": {
        "tuned_loss": 0.51204274,
        "zero_shot_loss": 1.90349444,
        "total": 2.41553717,
        "tuned_target": [
            [0.60033333, 0.80246666, 0.00000000, 0.00000000],
            [0.00000000, 0.00193619, 0.99954552, 0.00000000],
            [0.00122951, 0.00243935, 0.99912459, 0.00000000],
            [0.99918518, 0.00051852, 0.00238518, 0.00222222],
        ],
        "zero_shot_target": [
            [0.99796610, 0.00440678, 0.00218305, 0.00000000],
            [0.00000000, 0.00193619, 0.99954552, 0.00000000],
            [0.00122951, 0.00243935, 0.99912459, 0.00000000],
            [0.60138182, 0.79919999, 0.00000000, 0.00218182],
        ],
        "tuned_mix": [
            [0.63333344, 1.04666569, 0.00000000, 0.00000000],
            [0.00000000, 0.19361882, 0.95455248, 0.00000000],
            [0.12295106, 0.24393478, 0.91245863, 0.00000000],
            [0.91851848, 0.05185200, 0.23851801, 0.22222215],
        ],
        "zero_shot_mix": [
            [0.79661014, 0.44067805, 0.21830469, 0.00000000],
            [0.00000000, 0.19361882, 0.95455248, 0.00000000],
            [0.12295106, 0.24393478, 0.91245863, 0.00000000],
            [0.73818198, 0.71999877, 0.00000000, 0.21818176],
        ],
        "new": [
            [0.99999372, 0.00246615, 0.00228736, 0.00111269],
            [0.60014831, 0.79988800, 0.00000000, 0.00108962],
            [0.00061516, 0.00218922, 0.99999741, 0.00000000],
        ],
    },
}
MODES = {"row": {}, "column": RELEASED}


@PRECISIONS
@pytest.mark.parametrize("mode", MODES)
def test_t2_one_step(mode, dtype, atol):
    expected, step = T2[mode], run(dtype, **MODES[mode])
    assert step.tuned_labels.tolist() == [1, 2, 2, 0]
    assert step.labels.tolist() == [1, 2, 2, 0, 0, 2, 2, 1]
    close(step.contributions[:4], expected["tuned_target"], atol)
    close(step.contributions[4:], expected["zero_shot_target"], atol)
    close(step.losses["tuned_loss"], expected["tuned_loss"], atol)
    close(step.losses["zero_shot_loss"], expected["zero_shot_loss"], atol)
    close(total(step), expected["total"], atol)
    close(updated(step), expected["new"], atol)


@PRECISIONS
@pytest.mark.parametrize("mode", MODES)
def test_t2_mix(mode, dtype, atol):
    # Shares of the targets show the mix only to five digits, so here it is alone: alpha = 1 makes T = m.
    step = run(dtype, alpha=1, **MODES[mode])
    close(step.contributions[:4], T2[mode]["tuned_mix"], atol)
    close(step.contributions[4:], T2[mode]["zero_shot_mix"], atol)


@PRECISIONS
@pytest.mark.parametrize(
    ("mode", "loss", "new"),
    [
        (
            "row",
            1.92768310,
            [
                [0.98737361, 0.13211101, 0.06393047, 0.05960650],
                [0.67776127, 0.73302989, 0.00000000, 0.05750506],
                [0.03157750, 0.11237682, 0.99316379, 0.00000000],
            ],
        ),
        (
            "column",
            2.12453343,
            [
                [0.98234213, 0.13023318, 0.12079156, 0.05875925],
                [0.60620084, 0.79364674, 0.00000000, 0.05143347],
                [0.03157750, 0.11237682, 0.99316379, 0.00000000],
            ],
        ),
    ],
)
def test_t2_with_alpha_one_half(mode, loss, new, dtype, atol):
    step = run(dtype, alpha=0.5, **MODES[mode])
    close(total(step), loss, atol)
    close(updated(step), new, atol)


@pytest.mark.parametrize(
    ("switch", "new_a"),
    [
        ("use_class_texts", [0.999989, 0.004191, 0, 0.002005]),
        ("use_image_texts", [0.999996, 0.002044, 0.001452, 0.001366]),
        ("use_group_texts", [0.999997, 0.001295, 0.001978, 0]),
    ],
)
def test_t2_without_one_kind_of_text(switch, new_a):
    close(updated(run(**{switch: False}))[0], new_a, 6e-7)  # given to six digits


# --- T3 ---------------------------------------------------------------------------------------------------------------

T3 = [
    (
        "row",
        "epoch",
        [1.92768310, 1.84005558, 1.79650019],
        [
            [0.95886139, 0.23674798, 0.11456585, 0.10681713],
            [0.73307764, 0.67232927, 0.00000000, 0.10281303],
            [0.05562803, 0.19796693, 0.97862895, 0.00000000],
        ],
    ),
    (
        "row",
        "live",
        [1.92768310, 1.81569301, 1.75071681],
        [
            [0.96133991, 0.22541846, 0.12050054, 0.10242908],
            [0.73516168, 0.66983554, 0.00000000, 0.10420003],
            [0.04099083, 0.24080150, 0.96970840, 0.00000000],
        ],
    ),
    (
        "column",
        "epoch",
        [2.12453343, 2.09653841, 2.08460727],
        [
            [0.94387734, 0.22991472, 0.21324641, 0.10373406],
            [0.60952835, 0.78797800, 0.00000000, 0.08698196],
            [0.05562803, 0.19796693, 0.97862895, 0.00000000],
        ],
    ),
    (
        "column",
        "live",
        [2.12453343, 2.14003824, 2.12206345],
        [
            [0.93386037, 0.22150148, 0.25872300, 0.10910690],
            [0.54700786, 0.83285935, 0.00000000, 0.08442577],
            [0.03056303, 0.23036262, 0.97262478, 0.00000000],
        ],
    ),
]


@PRECISIONS
@pytest.mark.parametrize(("mode", "mixer", "losses", "final"), T3)
def test_t3_three_steps_of_one_epoch(mode, mixer, losses, final, dtype, atol):
    first = prototypes = torch.tensor(PROTOTYPES, dtype=dtype)
    for loss in losses:
        reference = first if mixer == "epoch" else prototypes
        step = run(dtype, mixer=reference, prototypes=prototypes, alpha=0.5, **MODES[mode])
        assert step.tuned_labels.tolist() == [1, 2, 2, 0]
        close(total(step), loss, atol)
        prototypes = updated(step, prototypes)
    close(prototypes, final, atol)


# --- T4 ---------------------------------------------------------------------------------------------------------------


@PRECISIONS
def test_t4_loss(dtype, atol):
    images = torch.tensor([[1, 0], [0.6, 0.8]], dtype=dtype)
    texts = torch.tensor([[0.8, 0.6], [0, 1]], dtype=dtype)
    loss = clip_loss(images, texts, 10.0)
    assert loss.dtype == dtype
    close(loss, 0.89211807, atol)


@PRECISIONS
def test_t4_floor_of_duplicates(dtype, atol):
    pairs = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=dtype)
    close(clip_loss(pairs, pairs, 100.0), 0.82395922, atol)
    assert clip_loss(pairs, pairs, 100.0) == pytest.approx(0.75 * math.log(3), abs=atol)


# --- T5 ---------------------------------------------------------------------------------------------------------------


def gradients(freeze_texts: bool = False) -> dict[str, Tensor]:
    raw = {
        name: torch.tensor(rows, dtype=F64, requires_grad=True)
        for name, rows in {"V": IMAGES, "I": IMAGE_TEXTS, "G": GROUP_TEXTS, "K": CLASS_TEXTS}.items()
    }
    log_scale = torch.tensor(math.log(SCALE), dtype=F64, requires_grad=True)
    prototypes = torch.tensor(PROTOTYPES, dtype=F64, requires_grad=True)
    texts = [unit(raw[name].detach() if freeze_texts else raw[name]) for name in "KIG"]
    step = latte_step(LatteClipSettings(), unit(raw["V"]), *texts, ZERO_SHOT, prototypes, log_scale.exp())
    total(step).backward()
    return {name: x.grad for name, x in raw.items()} | {"log_scale": log_scale.grad, "mu": prototypes.grad}


def test_t5_gradients():
    grad = gradients()
    close(
        grad["V"],
        [
            [-0.96601378, 1.28801837, -0.00019603, 0.00569871],
            [-0.69261760, 0.02186278, 0.51946320, 0.00024309],
            [0.00097847, -0.00280317, -1.22210378, 0.91657783],
            [0.00000000, -1.88988219, 0.00410453, -0.00575244],
        ],
        1e-7,
    )
    close(grad["I"][0], [0.00148035, -0.00197380, 0.00015069, 0.00000436], 1e-7)
    close(grad["G"][0], [0.00432306, -0.00324230, 0.00037673, 0.00001091], 1e-7)
    close(grad["K"][0], [0.00007963, -0.00426263, -0.00027301, 0.00001109], 1e-7)
    close(grad["log_scale"], 1.53583179, 1e-7)
    assert grad["mu"] is None  # prototypes are constants of the loss


def test_t5_text_gradient_is_the_weighted_target_gradient():
    """dL/dI_0 = sum over branches of alpha w_I / (w_C + w_I + w_G) dL/dT_0, orthogonal to I_0."""
    image_text = torch.tensor(IMAGE_TEXTS, dtype=F64)[0]
    images = torch.tensor(IMAGES, dtype=F64)
    expected = torch.zeros(4, dtype=F64)
    step = run()
    for branch, contributions in (("y", step.contributions[:4]), ("z", step.contributions[4:])):
        target = contributions.detach().clone().requires_grad_()
        clip_loss(images, target, SCALE).backward()
        share = IMAGE_WEIGHTS[0] / (CLASS_WEIGHTS[branch][0] + IMAGE_WEIGHTS[0] + GROUP_WEIGHTS[0])
        expected += 0.01 * share * target.grad[0]
    expected -= (expected @ image_text) * image_text
    close(gradients()["I"][0], expected.tolist(), 1e-12)


def test_t5_frozen_texts_leave_the_image_gradient_alone():
    frozen = gradients(freeze_texts=True)
    assert frozen["I"] is frozen["G"] is frozen["K"] is None
    close(frozen["V"], gradients()["V"].tolist(), 1e-15)


# --- T6 ---------------------------------------------------------------------------------------------------------------


def test_t6_moving_average():
    mu, expected = torch.tensor([[1.0, 0.0]], dtype=F64), {
        1: [0.9999489887, 0.0101004948],
        10: [0.9949225667, 0.1006433616],
        100: [0.6441642430, 0.7648871996],
        900: [0.0002350674, 0.9999999724],
    }  # fmt: skip
    label, mixed = torch.tensor([0]), torch.tensor([[0.0, 1.0]], dtype=F64)
    for step in range(1, 901):
        mu = update_prototypes(mu, label, targets(mu, label, mixed, 0.01))
        if step in expected:
            close(mu[0], expected[step], 1e-9)


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 1.0e-8), (4, 5.0e-8), (9, 1.0e-7), (10, 1.0e-7), (11, 9.999969e-8), (455, 5.0e-8), (899, 3.115009e-13)],
)
def test_t6_schedule(step, lr):
    assert warmup_cosine(step, base=1e-7, warmup=10, total=900) == pytest.approx(lr, rel=2e-7)


@pytest.mark.parametrize(
    ("images", "workers", "epochs", "per_epoch", "total_steps"),
    [
        (5777, 3, 50, 12, 600),  # Caltech101
        (3948, 3, 100, 9, 900),  # DTD
        (18900, 3, 15, 39, 585),  # EuroSAT
        (6667, 3, 50, 15, 750),  # FGVC Aircraft
        (5726, 4, 50, 12, 600),  # Flowers102
        (70700, 3, 15, 141, 2115),  # Food101
        (3680, 3, 100, 9, 900),  # Oxford Pets
        (8144, 3, 50, 18, 900),  # Stanford Cars
        (19850, 3, 15, 39, 585),  # SUN397
        (9537, 3, 50, 21, 1050),  # UCF101
    ],
)
def test_t6_steps_per_epoch(images, workers, epochs, per_epoch, total_steps):
    assert steps_per_epoch(images, 512, workers) == per_epoch
    assert epochs * steps_per_epoch(images, 512, workers) == total_steps


SIZES = [(640, 480), (300, 400), (512, 512), (1000, 500)]
BOXES = [(326, 244, 0, 41), (244, 326, 387, 0), (326, 326, 0, 346), (326, 163, 346, 427)]


def test_t6_collage_geometry():
    assert layout(SIZES) == BOXES


def test_t6_collage_pixels():
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10)]
    canvas = collage([Image.new("RGB", size, colour) for size, colour in zip(SIZES, colours, strict=True)])
    assert canvas.size == (672, 672) and canvas.mode == "RGB"
    expected = Image.new("RGB", (672, 672))
    for (w, h, x, y), colour in zip(BOXES, colours, strict=True):
        expected.paste(colour, (x, y, x + w, y + h))
    assert canvas.tobytes() == expected.tobytes()


# --- invariants of 7.1 ------------------------------------------------------------------------------------------------


@st.composite
def problems(draw, **options):
    """Random unit features of n images, c classes in d dimensions, with their labels, and a configuration."""
    n, c, d = draw(st.integers(1, 9)), draw(st.integers(2, 6)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    images, image_texts, group_texts = (unit(torch.randn(n, d, generator=generator, dtype=F64)) for _ in range(3))
    class_texts, prototypes = (unit(torch.randn(c, d, generator=generator, dtype=F64)) for _ in range(2))
    labels = torch.randint(c, (n,), generator=generator)
    cfg = LatteClipSettings(**{"alpha": draw(st.floats(0, 1)), **options})
    return cfg, images, class_texts, image_texts, group_texts, labels, prototypes, SCALE


few = settings(max_examples=60, deadline=None)


@few
@given(problems())
def test_prototypes_stay_unit_and_absent_classes_stay_bit_identical(problem):
    step, prototypes = latte_step(*problem), problem[6]
    new = update_prototypes(prototypes, step.labels, step.contributions)
    close(new.norm(dim=1), [1.0] * len(new), 1e-12)
    absent = [k for k in range(len(prototypes)) if k not in step.labels.tolist()]
    assert torch.equal(new[absent], prototypes[absent])


@few
@given(problems())
def test_weights_are_a_convex_combination_without_gradient(problem):
    cfg, images, *texts, labels, prototypes, scale = problem
    step = latte_step(cfg, images, *(t.requires_grad_() for t in texts), labels, prototypes, scale)
    assert (step.weights > 0).all() and not step.weights.requires_grad
    close(step.weights.sum(0), [1.0] * len(labels), 1e-12)
    mixed = latte_step(cfg.model_copy(update={"alpha": 1.0}), *problem[1:]).contributions
    assert mixed.norm(dim=1).max() <= 1 + 1e-12


@few
@given(problems(), st.randoms(use_true_random=False))
def test_row_mode_does_not_care_about_the_order_of_the_batch(problem, random):
    cfg, images, class_texts, image_texts, group_texts, labels, prototypes, scale = problem
    order = list(range(len(labels)))
    random.shuffle(order)
    one = latte_step(*problem)
    two = latte_step(
        cfg, images[order], class_texts, image_texts[order], group_texts[order], labels[order], prototypes, scale
    )
    close(total(two), float(total(one)), 1e-9)
    close(two.contributions[: len(order)], one.contributions[order].tolist(), 1e-12)
    close(
        update_prototypes(prototypes, two.labels, two.contributions),
        update_prototypes(prototypes, one.labels, one.contributions).tolist(),
        1e-9,
    )


def test_column_mode_does_care():
    one, two = (run(alpha=0.5, order=order, **RELEASED) for order in (None, ORDER))
    assert abs(total(one) - total(two)) == pytest.approx(0.11478, abs=1e-5)
    assert (updated(one) - updated(two)).abs().max() == pytest.approx(0.12730, abs=1e-5)


@few
@given(problems(alpha=0.0))
def test_alpha_0_changes_no_prototype(problem):
    step, prototypes = latte_step(*problem), problem[6]
    assert torch.equal(step.contributions, prototypes[step.labels])
    close(update_prototypes(prototypes, step.labels, step.contributions), prototypes.tolist(), 1e-12)


@few
@given(problems())
def test_equal_labels_make_equal_branches(problem):
    cfg, *tensors = problem
    tensors[4] = classify(tensors[0], tensors[5]).argmax(1)
    both = latte_step(cfg, *tensors)
    close(both.losses["tuned_loss"], float(both.losses["zero_shot_loss"]), 1e-12)
    once = latte_step(cfg.model_copy(update={"labels": "tuned"}), *tensors)
    close(
        update_prototypes(tensors[5], both.labels, both.contributions),
        update_prototypes(tensors[5], once.labels, once.contributions).tolist(),
        1e-12,
    )


@few
@given(problems())
def test_every_image_contributes_twice(problem):
    assert len(latte_step(*problem).labels) == 2 * len(problem[1])


@few
@given(problems())
def test_margin_of_a_prototype_is_one_minus_its_nearest_other(problem):
    prototypes = problem[6]
    cosines = (prototypes @ prototypes.T).fill_diagonal_(-2)
    close(margins(prototypes, prototypes), (1 - cosines.amax(1) + 1e-6).tolist(), 1e-12)


def test_image_and_group_weights_are_those_of_both_branches():
    for labels in ("tuned", "zero_shot"):
        weights = run(labels=labels).weights
        close(weights[1] / weights[2], [i / g for i, g in zip(IMAGE_WEIGHTS, GROUP_WEIGHTS, strict=True)], 1e-12)


def test_margins_in_half_precision_are_float32():
    texts, prototypes = (torch.tensor(rows, dtype=torch.bfloat16) for rows in (IMAGE_TEXTS, PROTOTYPES))
    assert margins(texts, prototypes).dtype == torch.float32
    assert clip_loss(texts, texts, 100.0).dtype == torch.float32
