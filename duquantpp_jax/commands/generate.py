"""`duquantpp generate`: a float or quantized model continues texts."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load_any, load_tokenizer
from duquantpp_jax.checkpoints.hugging_face import chat_prompt
from duquantpp_jax.checkpoints.packed import said
from duquantpp_jax.checkpoints.source import source
from duquantpp_jax.commands.options.generate import GenerateOptions
from duquantpp_jax.core.mesh import DATA
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.decoder import COMPUTE
from duquantpp_jax.models.sampling import Sampling, generate
from duquantpp_jax.ptq import stores as cache
from duquantpp_jax.ptq.layout import CUT, for_writing, implemented, is_packed, kernels_here
from duquantpp_jax.ptq.sharding import cut, host_memory, mesh_of
from duquantpp_jax.recipes import checked_seed, import_modules

ASKED = """do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
repetition_penalty no_repeat_ngram_size diversity_penalty penalty_alpha guidance_scale num_beams
exponential_decay_length_penalty dola_layers constraints force_words_ids sequence_bias bad_words_ids
suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id watermarking_config
token_healing stop_strings min_length min_new_tokens"""
"""Fields of generation_config.json that change which tokens a row has; docs/fields.md has all."""


NO_BOS = (
    "no beginning-of-sequence token stands before the prompt, as it does before rows that evaluate "
    "measures: give --bos to a model that has learned with it"
)
"""A model that has always seen this token may write nonsense without it."""
BETWEEN = "----"
"""The line between two texts."""
LEFT = ("model", "prompt", "imports", "terminal")
"""Options that are not among those of a result."""


def left_out(model: Path) -> str | None:
    """One line about what a checkpoint asks of generation and `generate` does not do by itself.

    As in transformers config.json is asked where there is no generation_config.json.
    """
    name, place = "generation_config.json", source(model)
    content = place.companions().get(name)
    fields, name = (json.loads(content()), name) if content else (place.fields(), "config.json")
    neutral = (None, False, 0, 1, [], {})
    asked = {n: fields[n] for n in ASKED.split() if n in fields}
    asked = {n: v for n, v in asked.items() if v is True or v not in neutral}
    if not asked:
        return None
    given = ", ".join(f"{name} = {json.dumps(value):.40}" for name, value in asked.items())
    return f"{name} asks for {given}: only the options of generate count"


def continued(
    options: GenerateOptions, report: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Each prompt and its continuation, as text; of a chat the answer alone.

    Args:
      report: Called with a line about the time that it took, and one about a missing first token.
    """
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    import_modules(options.imports)
    mesh = None if options.mesh is None else mesh_of(options.mesh)
    if mesh is not None and mesh.shape[DATA] > 1:
        raise ValueError(f"--mesh {options.mesh}: prompts are one batch: give model=N alone")
    with host_memory(mesh):
        model, linear, state = load_any(options.model, options.activation_format)
    model = model.computing(COMPUTE[options.compute])
    if (used := said(options.model, linear)) is not None:
        print(f"{options.model}: {used}", file=sys.stderr)
    if (note := left_out(options.model)) is not None:
        print(f"{options.model}: {note}", file=sys.stderr)
    config, tokenizer = model.config, load_tokenizer(options.model, model.config)
    if mesh is not None and options.implementation == "triton":
        raise ValueError(CUT)
    implementation = "xla" if mesh is not None else options.implementation
    turned = {"rotate_keys": options.rotate_keys, "implementation": implementation}
    store = cache.store(options.cache, config.head_dim, **turned)
    prompts = [_ids(options, text, tokenizer, config) for text in options.prompt]
    longest, new = max(map(len, prompts)), options.max_new_tokens
    room = config.max_position_embeddings - longest
    if room < 1:
        raise ValueError(
            f"a prompt has {longest} tokens, which leaves no room in the "
            f"{config.max_position_embeddings} positions of this model: give a shorter one"
        )
    if not 1 <= new <= room:
        raise ValueError(
            f"--max-new-tokens {new} is out of range: after {longest} tokens of prompt this model "
            f"has {room} of its {config.max_position_embeddings} positions left"
        )
    key = jax.random.key(checked_seed(options.seed))
    if len(prompts) > 1:  # a text is the same whatever is continued beside it
        key = jnp.stack([key] * len(prompts))
    if implementation == "xla":  # what triton is for, for_writing says
        linear = implemented(linear, implementation)
    if implementation != "xla" and (kernels := kernels_here()) is not None:
        print(kernels, file=sys.stderr)
    if mesh is None:
        state = for_writing(linear, state, jax.local_devices()[0], options.implementation)
        if is_packed(state):
            print(f"{options.model}: token by token with packed weights (triton)", file=sys.stderr)
    else:
        model, linear, state = cut(mesh, model, linear, state)
    how: Any = {"linear": linear, "state": state, "store": store, "sampling": sampling}
    times = [time.perf_counter()]
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        given = model, prompts, key
        answers = generate(*given, new=new, **how, ready=lambda: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    for answer in answers:
        if answer[-1] < 0:
            raise ValueError(
                f"the model gave NaN for token {len(answer)} after the prompt: no text is printed"
            )
    read, written = np.diff(times)
    later = sum(map(len, answers)) - len(answers)
    rate = f", then {later / written:.1f} tokens a second" if later else ""
    bos = config.bos_token_id
    if bos is not None and not options.chat and any(prompt[0] != bos for prompt in prompts):
        report(NO_BOS)
    report(f"{read:.1f} s for programs, prompts and first tokens{rate}")
    pairs = zip(prompts, answers, strict=True)
    return [tokenizer.decode(own if options.chat else [*prompt, *own]) for prompt, own in pairs]


def _ids(
    options: GenerateOptions, text: str, tokenizer: Tokenizer, config: DecoderConfig
) -> list[int]:
    """The tokens of a prompt, at least one."""
    text = chat_prompt(options.model, text) if options.chat else text
    prompt = tokenizer.encode(text, add_special_tokens=not options.chat).ids
    if options.bos:
        if config.bos_token_id is None:
            raise ValueError(f"{options.model}/config.json names no bos_token_id: leave out --bos")
        prompt = [config.bos_token_id, *prompt]
    if not prompt:
        raise ValueError("--prompt is empty: give a word to start from, or --bos")
    return prompt


def run(options: GenerateOptions) -> int:
    """Runs the command and prints the texts; returns the exit code."""
    if not options.prompt:
        raise ValueError("--prompt is empty: give a text to continue")
    texts = continued(options, lambda line: print(line, file=sys.stderr))
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name not in LEFT}
    several = len(texts) > 1
    result: dict[str, Any] = {"model": options.model.resolve().name}
    result |= {"prompt": list(options.prompt) if several else options.prompt[0]}
    result |= {"text": texts if several else texts[0], "options": asked}

    def show() -> None:
        for number, text in enumerate(texts):
            print(*[BETWEEN] * (number > 0), files.printable(text) if sys.stdout.isatty() else text,
                  sep="\n")  # fmt: skip

    options.terminal.give(result, show)
    return 0
