"""A plan's tokens before any text was written: what vLLM 0.32 counted for models of the same processor settings."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latteflow.flows.plan import plan
from latteflow.models.settings import VllmSettings
from latteflow.models.texts.describers.tokens import prompt_tokens
from latteflow.tasks.core.domain import Domain

ASKED = "Describe what the picture shows."


def tokenizer() -> Any:
    """Bytes, with Qwen's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=marks, initial_alphabet=letters))
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=marks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The processor of a Qwen2-VL: patches of 14 pixels, 2 x 2 of which are a token."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    folder = tmp_path_factory.mktemp("qwen") / "model"
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    made = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer(), Qwen2VLVideoProcessor(), chat_template=template)
    made.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    return folder


@pytest.mark.parametrize(
    ("sizes", "of_images"), [([], 0), ([(1024, 768)], 37 * 27 + 2), ([(224, 224), (400, 300)], 8 * 8 + 14 * 11 + 4)]
)
def test_images_are_counted_as_the_model_s_own_processor_cuts_them(
    model: Path, sizes: list[tuple[int, int]], of_images: int
) -> None:
    settings = VllmSettings(kind="vllm", model=str(model))
    assert prompt_tokens(settings, [(ASKED, sizes)]) == of_images + len(ASKED.encode())


def test_a_model_that_is_not_here_is_not_asked_for(tmp_path: Path) -> None:
    assert prompt_tokens(VllmSettings(kind="vllm", model="nobody/nothing"), [(ASKED, [(9, 9)])]) is None


def test_a_plan_prices_what_was_never_run(domain: Domain, model: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "train").iterdir():
        Image.open(path).resize((2048, 1536)).save(path)
    text = (tmp_path / "domain.yaml").read_text()
    (tmp_path / "domain.yaml").write_text(
        text.replace("describer: {kind: sidecar, texts: texts.csv}", f"describer: {{kind: vllm, model: {model}}}")
    )
    domain = Domain.load(tmp_path / "domain.yaml")
    each = {planned.label.split()[0]: planned for planned in plan(domain)}
    described, grouped = each["describe"], each["group"]
    assert described.tokens is not None and grouped.tokens is not None and domain.prompt_pack is not None
    asked = len(domain.prompt_pack.image[0].encode())
    assert described.tokens.prompt == described.work * (37 * 27 + 2 + asked)  # `longest_px` is 1024
    assert grouped.tokens.prompt == grouped.work * (24 * 24 + 2 + len(domain.prompt_pack.group[0].encode()))
