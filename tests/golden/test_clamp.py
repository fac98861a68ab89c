"""The golden numbers of CLAMP: masks, pooling, losses, LoRA, schedule. Sections as in docs/methods.md."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gptscore import score
from latteflow.models.methods.clamp.concepts import concept_counts
from latteflow.models.methods.clamp.losses import contrastive, distillation
from latteflow.models.methods.clamp.masks import positions, read_only_mask
from latteflow.models.methods.clamp.pooling import AttentionPool, attend
from latteflow.models.schedule import warmup_cosine
from latteflow.models.vectors import unit

F64 = torch.float64


def close(found: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=atol, rtol=0)


def rows(text: str) -> list[list[int]]:
    return [[int(x) for x in line.split()] for line in text.strip().splitlines()]


# --- G1: masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prompt_rows"),
    [
        ("bidirectional", "1 1 1 1 1\n1 1 1 1 1"),
        ("causal", "1 1 1 1 0\n1 1 1 1 1"),
        ("isolated", "1 1 1 0 0\n1 1 1 0 0"),
    ],
)
def test_g1_masks(kind, prompt_rows):
    mask = read_only_mask(torch.ones(1, 3, dtype=torch.bool), 2, kind)[0]
    assert mask.int().tolist() == rows("1 0 0 0 0\n1 1 0 0 0\n1 1 1 0 0\n" + prompt_rows)


def test_g1_right_padding():
    valid = torch.tensor([[True, True, True, False]])
    assert read_only_mask(valid, 2)[0].int().tolist() == rows(
        "1 0 0 0 0 0\n1 1 0 0 0 0\n1 1 1 0 0 0\n1 1 1 0 0 0\n1 1 1 0 1 1\n1 1 1 0 1 1"
    )
    assert positions(valid, 2).tolist() == [[0, 1, 2, 2, 3, 4]]


def test_g1_left_padding_sees_itself_and_nobody_sees_it():
    valid = torch.tensor([[False, True, True, True]])
    assert read_only_mask(valid, 2)[0].int().tolist() == rows(
        "1 0 0 0 0 0\n0 1 0 0 0 0\n0 1 1 0 0 0\n0 1 1 1 0 0\n0 1 1 1 1 1\n0 1 1 1 1 1"
    )
    assert positions(valid, 2).tolist() == [[0, 0, 1, 2, 3, 4]]


# --- G2: what a mask means to one layer -------------------------------------------------------------------------------

TEXT = [[1, 0], [0, 1], [1, 1]]


def attention(prompts: list[list[int]], mask: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.tensor(TEXT + prompts, dtype=F64)
    weights = (x @ x.T / math.sqrt(2)).masked_fill(~mask, -torch.inf).softmax(1)
    return weights @ x, weights


@pytest.mark.parametrize(
    ("prompts", "outputs"),
    [
        ([[2, 0], [0, 2]], [[1.549591, 0.262043], [0.262043, 1.549591]]),
        ([[-3, 1], [1, 5]], [[-2.979737, 1.013796], [0.999999, 4.999995]]),
    ],
)
def test_g2_texts_do_not_read_prompts(prompts, outputs):
    mask = read_only_mask(torch.ones(1, 3, dtype=torch.bool), 2)[0]
    found, weights = attention(prompts, mask)
    close(found, [[1, 0], [0.330238, 0.669762], [0.751745, 0.751745], *outputs])
    if prompts == [[2, 0], [0, 2]]:
        close(weights[3], [0.151527, 0.036839, 0.151527, 0.623268, 0.036839])


def test_g2_causal_prompts_and_what_full_attention_would_do():
    prompts = [[2, 0], [0, 2]]
    causal = read_only_mask(torch.ones(1, 3, dtype=torch.bool), 2, "causal")[0]
    close(attention(prompts, causal)[0][3:], [[1.608859, 0.195570], [0.262043, 1.549591]])
    full = attention(prompts, torch.ones(5, 5, dtype=torch.bool))[0][:3]
    close(full, [[1.207803, 0.494432], [0.494432, 1.207803], [0.876304, 0.876304]])


# --- G3: attention pooling --------------------------------------------------------------------------------------------

Z = torch.tensor([[[1, 0, 0, 1], [0, 2, 1, 0], [1, 1, 1, 1]]], dtype=F64)
QUERY = torch.tensor([1, 0, 0, 2], dtype=F64)


def test_g3_one_head():
    basis = torch.eye(3, 4, dtype=F64)[None]
    close(attend(QUERY, Z, basis, 1)[0, :3], [0.449816, 0.100368, 0.449816])
    close(attend(QUERY, Z, Z, 1)[0], [0.899632, 0.650551, 0.550184, 0.899632])


def test_g3_two_heads():
    first, last = torch.tensor([[[1, 0] * 2, [0, 1] * 2, [0, 0] * 2], [[0, 0] * 2, [0, 1] * 2, [1, 0] * 2]], dtype=F64)
    a, b = attend(QUERY, Z, first[None], 2)[0], attend(QUERY, Z, last[None], 2)[0]
    close(torch.stack([a[0], a[1], b[0]]), [0.401112, 0.197776, 0.401112])
    close(torch.stack([a[2], a[3], b[2]]), [0.445808, 0.108383, 0.445808])
    pooled = attend(QUERY, Z, Z, 2)[0]
    close(pooled, [0.802224, 0.796664, 0.554192, 0.891617])
    mapped = pooled @ torch.tensor([[1, 0], [0, 1], [1, 0], [0, -1]], dtype=F64)
    close(mapped, [1.356416, -0.094953])
    close(unit(mapped), [0.997559, -0.069832])


def test_g3_a_zero_query_is_the_mean():
    close(attend(torch.zeros(4, dtype=F64), Z, Z, 2)[0], [2 / 3, 1, 2 / 3, 2 / 3])


def test_g3_size_of_the_papers_pool():
    assert sum(p.numel() for p in AttentionPool(5120, 512, 8).parameters()) == 5_780_992


# --- G4: losses -------------------------------------------------------------------------------------------------------

IMAGES, TEXTS = ([[1, 0], [3, 4], [0, 1]], [[2, 1], [1, 1], [0, 1]])
TEACHER_IMAGES, TEACHER_TEXTS = ([[1, 0, 0], [1, 1, 0], [0, 1, 1]], [[1, 0, 1], [1, 1, 0], [0, 1, 1]])
TAU, TAU_D = 10.0, 20.0
V, T, TV, TT = (unit(torch.tensor(x, dtype=F64)) for x in (IMAGES, TEXTS, TEACHER_IMAGES, TEACHER_TEXTS))


def test_g4a_contrastive():
    close(TAU * V @ T.T, [[8.944272, 7.071068, 0], [8.944272, 9.899495, 8], [4.472136, 7.071068, 10]])
    close(contrastive(V, T, TAU, reduction="sum"), 1.564528)
    close(contrastive(V, T, TAU), 0.260755)


def test_g4a_gradient():
    raw = torch.tensor(TEXTS, dtype=F64, requires_grad=True)
    contrastive(V, unit(raw), TAU).backward()
    close(raw.grad, [[-0.209130, 0.418259], [0.102178, -0.102178], [0.216981, 0]])


def distilled(**changes: object) -> Tensor:
    options = {"teacher_scale": TAU_D, "student_scale": TAU_D} | changes
    return distillation(V, T, TV @ TT.T, **options)


def test_g4b_distillation():
    close(TV @ TT.T, [[0.707107, 0.707107, 0], [0.5, 1, 0.5], [0.5, 0.5, 1]])
    close(distilled(reduction="sum"), 2.055856)
    close(distilled(), 0.342643)
    close(distilled(student_scale=TAU), 0.284041)  # native
    # The cross-entropy form is larger by the teacher's entropy; the student first would be another number.
    teacher = TAU_D * TV @ TT.T
    entropies = [-(x.softmax(1) * x.log_softmax(1)).sum(1).mean() for x in (teacher, teacher.T)]
    close(distilled() + sum(entropies) / 2, 0.488401)
    close(distillation(TV, TT, V @ T.T, teacher_scale=TAU_D, student_scale=TAU_D), 0.514511)


def test_g4c_total():
    close(contrastive(V, T, TAU, reduction="sum") + distilled(reduction="sum"), 3.620384)
    close(contrastive(V, T, TAU) + distilled(), 0.603397)
    close(contrastive(V, T, TAU) + distilled(student_scale=TAU), 0.544796)


def test_g4d_equal_texts_are_not_negatives():
    ids = torch.tensor([7, 7, 3])
    close(contrastive(V, T, TAU, text_ids=ids), 0.065196)
    close(contrastive(V, T, TAU, text_ids=torch.arange(3)), 0.260755)


# --- G5: likelihood score ---------------------------------------------------------------------------------------------


def test_g5_length_normalised_likelihood():
    a, b = [-0.2, -1.0, -2.4], [-0.2, -1.0, -1.5, -0.9, -0.1]
    assert [score(x, "sum") for x in (a, b)] == pytest.approx([-3.6, -3.7])
    assert [score(x, "mean") for x in (a, b)] == pytest.approx([-1.2, -0.74])
    assert [score(x, "class_tokens_mean", prefix=2) for x in (a, b)] == pytest.approx([-2.4, -0.833333], abs=1e-6)


# --- G6: LoRA and schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "matrix", "moved"), [(1, [[1.5, -1], [1, -1]], [-0.5, -1]), (2, [[2, -2], [2, -3]], None)]
)
def test_g6_lora(alpha, matrix, moved):
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential()
    model.add_module("w", nn.Linear(2, 2, bias=False))
    nn.init.eye_(model.w.weight)
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=alpha, target_modules=["w"]), model)
    close(model(torch.tensor([1.0, 2.0])), [1, 2])  # starts as it was
    nn.init.constant_(model.w.lora_B["default"].weight, 0)
    model.w.lora_B["default"].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
    model.w.lora_A["default"].weight.data.copy_(torch.tensor([[0.5, -1.0]]))
    close(model(torch.eye(2)).T, matrix)
    if moved:
        close(model(torch.tensor([1.0, 2.0])), moved)


@pytest.mark.parametrize(
    ("step", "lr", "tolerance"),
    [
        (0, 4.098361e-7, 1e-13),
        (609, 2.5e-4, 1e-9),
        (1219, 5e-4, 1e-12),
        (1220, 5e-4, 1e-12),
        (30268, 2.50007e-4, 1e-9),
        (59316, 3.7e-13, 1e-14),
    ],
)
def test_g6_schedule(step, lr, tolerance):
    assert warmup_cosine(step, 5e-4, 1220, 59317) == pytest.approx(lr, abs=tolerance)
    assert 59317 * 8192 == 485_924_864


# --- G7: the paper's tables, and how often a class is spoken of -------------------------------------------------------

COLUMNS = ("LLaVA", "MiniGPT-4", "LiT", "CLAMP", "CLIP")
HIGH = """
ImageNet 30.7 24.0 64.0 63.0 64.7
Country211 3.6 4.8 11.7 12.7 15.9
GTSRB 34.6 31.7 43.2 31.8 43.5
STL-10 98.2 93.1 97.6 96.4 97.0
SUN397 43.3 36.4 65.5 66.4 69.2
Caltech-101 65.1 63.1 82.2 81.1 84.9
CIFAR-100 12.5 30.2 67.9 65.3 67.6
CIFAR-10 54.8 60.8 91.9 88.4 91.8
EuroSAT 33.4 31.4 47.7 47.8 45.0
Flowers-102 12.5 30.2 66.5 64.9 65.0
KITTI 37.7 31.5 18.7 24.2 15.2
RESISC45 39.1 26.7 50.4 42.6 53.4
"""
LOW = """
Cars 5.6 8.9 74.6 78.7 82.3
Aircraft 6.7 6.5 9.4 16.3 17.0
MNIST 84.9 58.4 36.4 45.7 33.9
SST2 62.8 52.9 48.4 51.5 53.7
CLEVR-distance 9.1 9.1 11.0 11.2 24.5
CLEVR-count 12.5 12.7 13.3 14.9 21.5
Retinopathy 2.3 2.3 2.3 4.4 2.3
DMLab 21.3 12.4 19.7 14.9 14.7
DTD 26.1 21.1 36.1 49.3 47.6
PatchCamelyon 49.2 50.8 56.4 50.2 52.5
Pets 15.1 26.8 80.8 78.3 86.6
SVHN 54.2 45.5 17.0 28.3 19.0
"""


def means(table: str) -> list[float]:
    values = [[float(x) for x in line.split()[1:]] for line in table.strip().splitlines()]
    return [sum(column) / len(values) for column in zip(*values, strict=True)]


def test_g7_means_of_the_published_table():
    assert means(HIGH + LOW.lstrip()) == pytest.approx([33.9708, 32.1375, 46.3625, 47.0125, 48.7000], abs=5e-5)
    assert means(HIGH)[2:] == pytest.approx([58.9417, 57.0500, 59.4333], abs=5e-5)
    assert means(LOW)[2:] == pytest.approx([33.7833, 36.9750, 37.9667], abs=5e-5)
    lora, prefix = [63.0, 78.7, 65.3, 49.3, 47.8, 64.9, 28.3], [61.1, 74.8, 68.1, 52.7, 42.8, 59.4, 31.6]
    assert [sum(x) / 7 for x in (lora, prefix)] == pytest.approx([56.7571, 55.7857], abs=5e-5)


@pytest.mark.parametrize(("least", "coverage", "count"), [(6, 0.5, 4.0), (5, 0.75, 5.25)])
def test_g7_concepts(least, coverage, count):
    texts = ["a dog"] * 10 + ["one cat"] * 5 + ["the red car there"] * 6 + ["sky"] * 4
    found = concept_counts(texts, ["dog", "cat", "red car", "unicorn"], least=least)
    assert sum(n > 0 for n in found) / 4 == coverage and sum(found) / 4 == count
