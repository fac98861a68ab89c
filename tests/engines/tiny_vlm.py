"""A real vision-language model of the SmolVLM family (Idefics3), tiny and with random weights, for tests without a hub.

Its texts are noise; engines, batches, orders and failures are as with any other. Run as a program, as it needs the
transformers of the environment that vLLM lives in: ``python tests/engines/tiny_vlm.py FOLDER``.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ON_CPU = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment in which vLLM runs without a GPU, a hub or a network."""


def vllm_python() -> str:
    """The interpreter that has vLLM: this one, or that of ``make .venv-vllm/.installed``."""
    beside = ROOT / ".venv-vllm" / "bin" / "python"
    return str(beside) if beside.exists() else sys.executable


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serve(model: Path, port: int, batch: int = 8) -> Iterator[subprocess.Popen[bytes]]:
    """vLLM's server with a tiny model, under the name tiny."""
    # What `vllm serve` runs; the command itself asks for a package by the name of the build for GPUs.
    command = [
        vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", str(batch),
        "--served-model-name", "tiny", "--limit-mm-per-prompt", json.dumps({"image": 4}),
    ]  # fmt: skip
    environment = {**os.environ, **ON_CPU, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, **quiet)
    try:
        limit = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < limit, "the server did not start"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the engine's own process
        process.wait()


SIDE_PX = 64
CONTEXT = 512
SPECIAL = [
    "<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]  # fmt: skip
CHAT = """\
<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:\
{% if message['content'] is string %} {{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


def tokenizer():
    """Bytes with a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = pre_tokenizers.ByteLevel
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = bytes_(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=bytes_.alphabet())
    raw.train_from_iterator(["Describe what the pictures have in common to the eye, in less than 20 words."], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[2:],
    )  # fmt: skip
    wrapped.image_token, wrapped.fake_image_token, wrapped.global_image_token = SPECIAL[3:6]
    wrapped.end_of_utterance_token = SPECIAL[2]
    wrapped.image_token_id = wrapped.convert_tokens_to_ids(SPECIAL[3])
    wrapped.fake_image_token_id = wrapped.convert_tokens_to_ids(SPECIAL[4])
    wrapped.chat_template = CHAT
    return wrapped


def build(folder: str) -> None:
    """Write model and processor as a folder that transformers and vLLM load."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    torch.manual_seed(0)
    words = tokenizer()
    size = {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision = Idefics3VisionConfig(hidden_size=64, intermediate_size=128, image_size=SIDE_PX, patch_size=16, **size)
    text = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_key_value_heads=4, vocab_size=len(words),
        max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, **size,
    )  # fmt: skip
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=words.image_token_id, scale_factor=2, pad_token_id=0
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    edge = {"longest_edge": SIDE_PX}
    pixels = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = Idefics3Processor(image_processor=pixels, tokenizer=words, image_seq_len=4, chat_template=CHAT)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    build(sys.argv[1])
