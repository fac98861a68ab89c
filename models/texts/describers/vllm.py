"""vLLM in this process: continuous batching, fed while it works."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING, Any

from latteflow.models.errors import ModelError
from latteflow.models.settings import VllmSettings
from latteflow.models.texts.describers import EngineStopped, Prompt, Text
from latteflow.models.texts.describers.prompted import ANSWER

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from PIL.Image import Image

AHEAD = 64
"""Prompts whose images are decoded before the engine takes them."""
PATIENCE_S, LIVENESS_S = 0.005, 1.0
_JUST_THE_PROMPT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The chat template of a base model, which goes on with a text; its answer is the rest of the line."""


def open_vllm(settings: VllmSettings) -> VllmEngine:
    """The engine, kept for the life of the process: starting one takes from seconds to minutes.

    It does not depend on what is asked or how large images are shown, so texts about images and about pairs share one.
    """
    return _open(settings.model_dump_json(exclude={"prompts", "longest_px"}))


@functools.lru_cache(maxsize=1)
def _open(settings: str) -> VllmEngine:
    return VllmEngine(VllmSettings.model_validate_json(settings))


class VllmEngine:
    """An :class:`~models.texts.describers.Engine`. Use :func:`open_vllm`.

    Raises:
        ModelError: vLLM is not installed, there is no such model, or it does not fit into memory.
    """

    def __init__(self, settings: VllmSettings) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            import vllm
            from vllm.sampling_params import StructuredOutputsParams
        except ImportError as error:
            raise ModelError(
                f"the describer `kind: vllm` needs the package vllm ({error}), in an environment of its own: "
                "docs/describers.md, *Two environments*; or use `kind: openai` with a server"
            ) from error
        self.version = f"vllm {vllm.__version__}"
        self.waited = 0.0
        self._model = settings.model
        self._batch, self._in_flight = settings.max_batch, 2 * settings.max_batch
        others = multiprocessing.active_children()
        try:
            self._llm = vllm.LLM(
                model=settings.model,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                dtype=settings.dtype,
                max_model_len=settings.max_context,
                max_num_seqs=settings.max_batch,
                tensor_parallel_size=settings.tensor_parallel,
                gpu_memory_utilization=settings.gpu_memory,
                limit_mm_per_prompt={"image": settings.max_images},
                enable_prefix_caching=True,
                seed=0,
                **settings.extra,
            )
        except Exception as error:  # whatever the many loaders below raise
            raise ModelError(
                f"vLLM cannot start with model {settings.model!r}: {_short(error)}. Check the name or path; "
                "if memory is short, lower `gpu_memory` (without a GPU: the share of the machine's memory), "
                "`max_context` or `max_batch`, or choose a smaller or quantized model"
            ) from error
        is_base = self._is_base()
        self._template = _JUST_THE_PROMPT if is_base else None
        self._sampling = functools.partial(
            vllm.SamplingParams,
            stop=["\n"] if is_base else None,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            structured_outputs=StructuredOutputsParams(json=json.dumps(ANSWER)) if settings.structured else None,
        )
        self._cores = [process for process in multiprocessing.active_children() if process not in others]
        self._steps = _Steps(self._llm.llm_engine.step)

    @property
    def llm(self) -> Any:
        """vLLM's own object, for what is not describing."""
        return self._llm

    def _is_base(self) -> bool:
        """Whether there is no chat template for the model, neither its own nor one that vLLM knows for its family."""
        try:
            asked = self._llm.enqueue_chat([[{"role": "user", "content": "a"}]], use_tqdm=False)
        except ValueError as error:
            if "chat template" in str(error):
                return True
            raise
        self._llm.llm_engine.abort_request([_number(each) for each in asked])
        return False

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Text]]:
        """See :meth:`models.texts.describers.Engine.generate`."""
        begin, self._waited_s = time.perf_counter(), 0.0
        engine = self._llm.llm_engine
        places: dict[str, int] = {}
        order = iter(enumerate(prompts))
        ahead: deque[tuple[int, Future[list[Image]]]] = deque()
        threads = min(16, 2 * (os.cpu_count() or 1))
        pool = ThreadPoolExecutor(threads)
        ahead.extend((place, pool.submit(prompt.images)) for place, prompt in islice(order, AHEAD))
        try:
            while True:
                while ahead and len(places) < self._in_flight and self._is_worth_waiting(ahead[0][1], len(places)):
                    place, decoded = ahead.popleft()
                    try:
                        places[self._ask(prompts[place], decoded.result())] = place
                    except EngineStopped:
                        raise
                    except Exception as why:  # a hostile image may raise anything; it is one row
                        yield place, Text.failed(why)
                    if (coming := next(order, None)) is not None:
                        ahead.append((coming[0], pool.submit(coming[1].images)))
                if not places:
                    break
                for output in self._step():
                    if output.finished and output.request_id in places:
                        yield places.pop(output.request_id), _text(output)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if places:  # the reader went away; the engine stays for the next
                engine.abort_request(list(places))
            self.waited = self._waited_s / max(time.perf_counter() - begin, 1e-9)

    def _is_worth_waiting(self, decoded: Future[list[Image]], in_flight: int) -> bool:
        """Take the next prompt before the engine's next step: a step with few prompts takes almost as long as one with
        many, so a little patience pays while the batch is not full; without any prompt there is nothing else to do."""
        if not decoded.done():
            start = time.perf_counter()
            wait([decoded], None if not in_flight else PATIENCE_S if in_flight < self._batch else 0)
            self._waited_s += time.perf_counter() - start
        return decoded.done()

    def _ask(self, prompt: Prompt, images: list[Image]) -> str:
        content: list[dict[str, Any]] = [{"type": "image_pil", "image_pil": image} for image in images]
        message = {"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}
        try:
            (request,) = self._llm.enqueue_chat(
                [[message]], self._sampling(seed=prompt.seed), use_tqdm=False, chat_template=self._template
            )
        except Exception as error:
            raise self._stopped(error) if _is_dead(error) else error from error
        return _number(request)

    def _step(self) -> list[Any]:
        try:
            if not self._llm.llm_engine.has_unfinished_requests():
                raise RuntimeError("it lost requests")
            return self._steps.next(self._cores)
        except Exception as error:
            raise self._stopped(error) from error

    def _stopped(self, error: Exception) -> EngineStopped:
        _open.cache_clear()  # what is left of this engine answers nothing any more
        return EngineStopped(
            f"vLLM with model {self._model!r} stopped: {_short(error)}. What was written is kept; run again to go on. "
            "If memory was short, lower `max_batch` or `max_context`"
        )


def _number(request: Any) -> str:
    """Outputs come under the number, without vLLM's random ending."""
    return str(request).split("-")[0]


class _Steps:
    """Steps of the engine, in a thread: vLLM waits for ever for a core process that was killed."""

    def __init__(self, step: Callable[[], list[Any]]) -> None:
        self._step = step
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()  # daemon: the program can end while it waits

    def next(self, cores: Sequence[BaseProcess]) -> list[Any]:
        if not cores:  # the engine is in this process, and its threads are bound to this one
            return list(self._step())
        self._asked.put(None)
        while True:
            try:
                found = self._done.get(timeout=LIVENESS_S)
            except queue.Empty:
                if all(core.is_alive() for core in cores):
                    continue
                raise RuntimeError("its process was killed, perhaps for want of memory") from None
            if isinstance(found, Exception):
                raise found
            return found

    def _run(self) -> None:
        while True:
            self._asked.get()
            try:
                self._done.put(list(self._step()))
            except Exception as error:
                self._done.put(error)


def _text(output: Any) -> Text:
    (answer,) = output.outputs
    return Text(
        answer.text,
        finish_reason="length" if answer.finish_reason == "length" else "stop",
        prompt_tokens=len(output.prompt_token_ids or ()),
        output_tokens=len(answer.token_ids),
    )


def _is_dead(error: Exception) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, (EngineDeadError, MemoryError))


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
