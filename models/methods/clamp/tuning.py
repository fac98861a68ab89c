"""CLAMP as a method: a language model learns to read the domain's texts as its CLIP does, and then the class names."""

from __future__ import annotations

import logging

from latteflow.models.methods.adaptation import Adapted
from latteflow.models.methods.clamp import ClampSettings, lm
from latteflow.models.methods.clamp.adapter import pack
from latteflow.models.methods.clamp.tower import ClampTower
from latteflow.models.methods.clamp.training import Clamp, ClampData
from latteflow.models.methods.method import Given
from latteflow.models.methods.training import train

log = logging.getLogger("latteflow.models")


def tune_clamp(cfg: ClampSettings, given: Given) -> Adapted:
    """Train a tower, or go on with it; the classifier is the class names as it then reads them.

    A class is its name, as in evaluation: the wrapper is its sentence. The teacher reads it in the domain's sentences.

    Raises:
        ValueError: there are no captions, or fewer than two images.
    """
    features, captions = given.data.image_features, given.data.captions
    if captions is None:
        raise ValueError("clamp reads texts themselves, and there are none")
    data = ClampData(
        image_features=features,
        texts=captions.texts,
        teacher=captions.teacher,
        teacher_scale=given.scale,
        image_texts=captions.image_texts.cpu(),
        group_texts=captions.group_texts,
        class_texts=[[number] for number in captions.class_names],
        pseudo_labels=given.data.pseudo_labels.cpu(),
    )
    model, tokenizer = lm.load(cfg, features.device)
    method = Clamp(ClampTower(model, tokenizer, cfg, features.shape[1], seed=given.seed), data, seed=given.seed)
    log.info("clamp texts=%d cut=%d", len(data.texts), method.tokens.n_cut)
    history = train(method, given.training, seed=given.seed, **given.engine)
    tower = method.tower.eval()
    classes = tower.text_features([captions.texts[number] for number in captions.class_names])
    return Adapted(prototypes=classes, scale=given.scale, history=history, adapter=pack(tower))
