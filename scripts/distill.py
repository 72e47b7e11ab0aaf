"""Distillation: a student of a few of SmolLM2's layers learns from what the engine samples.

Each step the teacher writes new text, and reports the likeliest tokens of every place with their
log-probabilities; the student moves towards these once. The loss is KL(teacher || student) over
those tokens, and all others taken as one: at most the KL over the whole vocabulary. Before and
after, an engine of the student scores text of the teacher that it was not trained on.

    python scripts/distill.py --steps 50 --seed 0 --plot distill.png
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from folojax import LLM, RequestOutput, SamplingParams, outputs_to_arrays
from folojax.models.core.dense_attend import dense_attend

LENGTH = 48
"""N of the training arrays: prompts have about 8 tokens, completions MAX_TOKENS."""

MAX_TOKENS = 32
NUM_TOP = 20
"""J: tokens of a place that the teacher reports."""

OPENINGS = ("The best thing about", "A short story about", "Three facts about", "How to explain")
TOPICS = (
    *("the sea", "old trains", "good bread", "the moon", "chess", "honey bees", "a long winter"),
    *("music", "small towns", "tall trees", "learning to swim", "the desert", "volcanoes", "tea"),
)


def make_student(model: Any, params: Any, num_layers: int) -> tuple[Any, Any]:
    """The teacher with evenly spaced layers left, the first and the last among them.

    Its arrays are copies: a trainer gives its own away at every step.
    """
    kept = np.linspace(0, model.config.num_layers - 1, num_layers).round().astype(int)
    student = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    student |= {f"layers_{i}": params[f"layers_{layer}"] for i, layer in enumerate(kept)}
    config = dataclasses.replace(model.config, num_layers=num_layers)
    return model.clone(config=config), jax.tree.map(jnp.copy, student)


def targets(outputs: Sequence[RequestOutput]) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens at each place of an output and their log-probabilities, [B, N, J]."""
    samples = [(output, one) for output in outputs for one in output.outputs]
    ids = np.zeros((len(samples), LENGTH, NUM_TOP), np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    for row, (output, one) in enumerate(samples):
        for place, entries in enumerate(one.logprobs or [], len(output.prompt_token_ids)):
            # The sampled token is among them, likely or not.
            top = sorted(entries.items(), key=lambda entry: entry[1].rank)[:NUM_TOP]
            ids[row, place] = [token for token, _ in top]
            logprobs[row, place] = [entry.logprob for _, entry in top]
    return ids, logprobs


def divergence(params: Any, tokens: Any, ids: Any, logprobs: Any, *, model: Any) -> Any:
    """KL(teacher || student) at each place [B, N] over J tokens and the rest; nats.

    Args:
        params: The student's.
        tokens: [B, N].
        ids: J different tokens of each place, [B, N, J].
        logprobs: The teacher's of these, given all tokens before the place.
        model: The student.
    """

    def with_rest(top: Any) -> Any:
        mass = jnp.minimum(jnp.exp(top).sum(axis=-1, keepdims=True), 1 - 1e-6)
        return jnp.concatenate([top, jnp.log1p(-mass)], axis=-1)

    @jax.checkpoint  # the logits of one sequence at a time are in memory
    def of_one(row: tuple[Any, Any, Any]) -> Any:
        tokens, ids, logprobs = row
        positions = jnp.arange(len(tokens))
        hidden, _ = model.apply({"params": params}, tokens, positions, None, dense_attend)
        before = jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))
        ours = jnp.take_along_axis(jnp.roll(before, 1, axis=0), ids, axis=1)
        return optax.losses.kl_divergence(with_rest(ours), jnp.exp(with_rest(logprobs)))

    return jax.lax.map(of_one, (tokens, ids, logprobs))


def make_train_step(model: Any, optimizer: optax.GradientTransformation) -> Any:
    """The jitted update; parameters and optimiser state are donated to it."""

    def loss(params: Any, tokens: Any, mask: Any, ids: Any, logprobs: Any) -> Any:
        found = divergence(params, tokens, ids, logprobs, model=model)
        return jnp.where(mask, found, 0.0).sum() / mask.sum()

    def train(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(train, donate_argnums=(0, 1))


def nats_per_token(llm: LLM, outputs: Sequence[RequestOutput]) -> float:
    """What a model pays for text of the teacher, scored by its engine."""
    prompts = [output.prompt_token_ids for output in outputs]
    texts = [output.outputs[0].token_ids for output in outputs]
    scores = llm.score(prompts, texts, use_tqdm=False)
    return -sum(score.cumulative_logprob for score in scores) / sum(map(len, texts))


def train(args: argparse.Namespace) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Runs all steps; returns the loss and the seconds of each, and costs of held-out text."""
    limits: dict[str, Any] = {"max_model_len": 64, "page_size": 16, "max_num_seqs": args.batch}
    limits |= {"num_pages": 4 * args.batch, "seed": args.seed}
    teacher = LLM(dtype="float32", **limits)
    model, params = make_student(teacher.model, teacher.params, args.layers)
    student = LLM((model, params), **limits)
    rng = np.random.default_rng(args.seed)
    prompts = [f"{a} {b}" for a, b in itertools.product(OPENINGS, TOPICS)]
    order = rng.permutation(len(prompts))
    prompts, unseen = ([prompts[i] for i in part] for part in (order[8:], order[:8]))
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=NUM_TOP)
    held_out = teacher.generate(unseen, sampling, use_tqdm=False)
    told = {"teacher": nats_per_token(teacher, held_out)}
    told["before"] = nats_per_token(student, held_out)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.learning_rate))
    step, state = make_train_step(model, optimizer), optimizer.init(params)
    history: list[dict[str, float]] = []
    with tqdm(range(args.steps), desc="distill") as bar:
        for _ in bar:
            start = time.perf_counter()
            picked = [prompts[i] for i in rng.integers(len(prompts), size=args.batch)]
            outputs = teacher.generate(picked, sampling, use_tqdm=False)
            arrays = outputs_to_arrays(outputs, length=LENGTH)
            batch = arrays.tokens, arrays.mask, *targets(outputs)
            params, state, loss = step(params, state, *batch)
            history.append({"kl": float(loss), "seconds": time.perf_counter() - start})
            bar.set_postfix(kl=f"{history[-1]['kl']:.3f}")
    student.update_params(params)
    told["after"] = nats_per_token(student, held_out)
    return history, told


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Saves the curve of the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.plot([entry["kl"] for entry in history])
    pyplot.xlabel("step")
    pyplot.ylabel("KL(teacher || student), nats a token")
    pyplot.savefig(path, dpi=120)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--layers", type=int, default=6, help="of the student")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("distill.png"))
    parser.add_argument("--log", type=Path, help="writes a JSON line a step")
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot at the end needs matplotlib: pip install matplotlib")
    history, told = train(args)
    if args.log is not None:
        args.log.write_text("".join(json.dumps(entry) + "\n" for entry in history))
    plot(history, args.plot)
    ends = max(1, min(5, len(history) // 2))
    first, last = (np.mean([e["kl"] for e in h]) for h in (history[:ends], history[-ends:]))
    print(f"KL {first:.3f} -> {last:.3f} nats a token (means of {ends} steps)")
    print(
        f"text of the teacher that was held out, nats a token: student {told['before']:.3f} -> "
        f"{told['after']:.3f}; the teacher itself {told['teacher']:.3f}"
    )


if __name__ == "__main__":
    main()
