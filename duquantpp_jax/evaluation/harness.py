"""lm-eval asks, a model of this package answers: float, quantized or packed.

`python -m duquantpp_jax.evaluation.harness run --model duquantpp --model_args pretrained=DIR` is
lm-eval's own command, after its model has been registered; lm-eval finds models in no other way.

    loglikelihood           sum_t log q_t over the continuation, and whether each t is the likeliest
    loglikelihood_rolling   sum_t log q_t over a text, in windows of the model's length
    generate_until          the likeliest tokens, or drawn ones, up to a stop string

Requests are scored by length, in batches that fill all devices (scoring.py, continuing.py). The
prefix of a text is BOS, or the end of sequence where there is none; a context that is too long
loses its beginning. Both are as in lm-eval's `hf`.

Source: lm-eval 0.4.13, api/model.py and models/huggingface.py.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from duquantpp_jax.checkpoints import load_any, load_tokenizer
from duquantpp_jax.checkpoints.hugging_face import chat_prompt
from duquantpp_jax.evaluation.continuing import Continuing, Wish
from duquantpp_jax.evaluation.predict import BATCH_ROWS, Predictor
from duquantpp_jax.evaluation.scoring import Scorer
from duquantpp_jax.models.sampling import Sampling
from duquantpp_jax.ptq import stores
from duquantpp_jax.ptq.layout import implemented
from duquantpp_jax.recipes import import_modules

TASKS = Path(__file__).parent / "tasks"
"""The tasks that need no network, for `--include_path`."""
STEPS = 16
"""Tokens that are drawn before stop strings are looked for."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the number of new tokens, the first of them first."""


def needed() -> None:
    """Raises ValueError unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-eval: pip install 'duquantpp_jax[eval]'")


def model_class() -> type:
    """The `TemplateLM`, registered with lm-eval as duquantpp; lm-eval is imported here."""
    needed()
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import (  # pyright: ignore[reportMissingImports]
        model_registry,
        register_model,
    )
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
    from tqdm import tqdm

    if "duquantpp" in model_registry:
        return model_registry.get("duquantpp")

    @register_model("duquantpp")
    class DuQuantPPLM(TemplateLM):
        """A model of this package.

        Attributes:
          predictor: It, on all devices.
        """

        def __init__(
            self,
            pretrained: str,
            activation_format: str | None = None,
            cache: str = "float32",
            rows: int = BATCH_ROWS,
            max_length: int | None = None,
            imports: str = "",
            batch_size: Any = None,
            max_batch_size: Any = None,
            device: Any = None,
        ):
            """Args:
              pretrained: A model's directory, as of `duquantpp evaluate --model`.
              activation_format: Of the inputs of packed weights.
              cache: Format of the key-value cache where texts are generated.
              rows: Most rows of a batch on each device.
              max_length: Most tokens of an input; the model's positions by default.
              imports: Modules to import first, with + between them.
              batch_size, max_batch_size, device: lm-eval gives them; not used: JAX chooses the
                devices, and `rows` is the batch.

            Raises:
              ValueError: The model cannot be loaded, or an argument is out of range.
            """
            super().__init__()
            import_modules(tuple(filter(None, imports.split("+"))))
            loaded = Predictor(*load_any(pretrained, activation_format))
            config = loaded.model.config
            if (max_length or config.max_position_embeddings) < 2 or rows < 1:
                raise ValueError(f"max_length={max_length}, rows={rows}: give 2 and 1 at least")
            self.max_length = int(max_length or config.max_position_embeddings)
            self.scorer = Scorer(loaded, batch_rows=int(rows))
            self.predictor, self.directory = self.scorer.predictor, pretrained
            self.hf_tokenizer = load_tokenizer(pretrained, config)
            alone = self.scorer.sharding.mesh.size == 1  # several share rows: kernels are not cut
            how = None if alone else "xla"
            self.store = stores.store(cache, config.head_dim, implementation=how)
            linear = implemented(self.predictor.linear, how)
            self.writer = dataclasses.replace(self.predictor, linear=linear)

        @property
        def eot_token_id(self) -> int | None:
            ends = self.predictor.model.config.eos_token_id
            return ends[0] if isinstance(ends, tuple) else ends

        @property
        def prefix_token_id(self) -> int:
            begin = self.predictor.model.config.bos_token_id
            prefix = self.eot_token_id if begin is None else begin
            if prefix is None:
                raise ValueError(
                    f"{self.directory}/config.json names neither bos_token_id nor eos_token_id, "
                    "and a text needs a token before it: add the model's own"
                )
            return prefix

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            if add_special_tokens is None:
                begin = self.hf_tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
                add_special_tokens = not (begin and string.startswith(begin))
            return self.hf_tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            rows, targets = [], []
            for _, context, continuation in requests:
                if not context or not 1 <= len(continuation) <= self.max_length:
                    raise ValueError(
                        f"a context of {len(context)} tokens and a continuation of "
                        f"{len(continuation)}: give at least a token each, at most "
                        f"{self.max_length}"
                    )
                rows.append([*context, *continuation][-(self.max_length + 1) :])
                targets.append(len(continuation))
            scored = self._with_bar(rows, "scoring", disable_tqdm) if rows else []
            answers = []
            for request, row, score, count in zip(requests, rows, scored, targets, strict=True):
                log_q, first = score.log_q[-count:], score.likeliest[-count:, 0]
                answer = float(log_q.sum()), bool((first == row[-count:]).all())
                answers.append(answer)
                if request[0] is not None:
                    self.cache_hook.add_partial("loglikelihood", request[0], answer)
            return answers

        def _with_bar(self, rows: list[list[int]], what: str, silent: bool) -> Any:
            with tqdm(total=len(rows), desc=what, disable=silent) as bar:

                def advance(done: int, _: int) -> None:
                    bar.update(done - bar.n)

                return self.scorer(rows, advance)

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            windows: list[tuple[None, list[int], list[int]]] = []
            counts = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                own = [(None, *make_disjoint_window(part)) for part in parts]
                windows, counts = windows + own, [*counts, len(own)]
            scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
            sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
            for request, total in zip(requests, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            wishes = [self._wish(*request.args) for request in requests]
            order = sorted(range(len(wishes)), key=lambda n: -len(wishes[n].prompt))
            step = self.scorer.batch_rows * self.scorer.sharding.mesh.size
            texts = [""] * len(wishes)
            for first in tqdm(range(0, len(order), step), desc="writing", disable=disable_tqdm):
                numbers = order[first : first + step]
                batch = Continuing(
                    self.writer,
                    self.hf_tokenizer,
                    self.store,
                    [wishes[number] for number in numbers],
                    count=step,
                    sharding=self.scorer.sharding,
                )
                while not batch.done:
                    batch.proceed(STEPS)
                for number, row in zip(numbers, batch.rows, strict=True):
                    texts[number] = row.text
            for request, text in zip(requests, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return texts

        def _wish(self, context: str, settings: Mapping[str, Any]) -> Wish:
            """What a task asks for, as `Continuing` takes it."""
            left = dict(settings)
            limits = [left.pop(name, None) for name in LIMITS]
            new = int(next((limit for limit in limits if limit is not None), 256))
            stop, warm = left.pop("until", None) or [], float(left.pop("temperature", 0.0) or 0)
            warm = warm if left.pop("do_sample", warm > 0) else 0.0
            sampling = Sampling(warm, int(left.pop("top_k", 0)), float(left.pop("top_p", 1.0)))
            seed = int(left.pop("seed", 0))
            if left:
                raise ValueError(f"a task asks for {', '.join(left)}, which is not supported here")
            if not 1 <= new < self.max_length:
                raise ValueError(
                    f"{new} new tokens are asked for: give 1 to {self.max_length - 1}, as the "
                    f"model takes {self.max_length}"
                )
            ids = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
            stop = (stop,) if isinstance(stop, str) else tuple(filter(None, stop))
            return Wish(ids, new, sampling, seed, stop)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return chat_prompt(self.directory, chat_history, answered=not add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return None  # lm-eval records it; the model's own is used

        @property
        def tokenizer_name(self) -> str:
            return str(self.directory).replace("/", "__")

    return DuQuantPPLM


if __name__ == "__main__":
    try:
        model_class()
    except ValueError as error:
        sys.exit(f"duquantpp: {error}")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
