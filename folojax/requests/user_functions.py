"""What a user builds into an engine: functions, and layers whose residual stream is read."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from folojax.sampling.logits_processors import LogitsProcessor, RequestState
from folojax.steps.layers import ActivationEdit, layer_numbers


@dataclasses.dataclass(frozen=True)
class UserFunctions:
    """Logits processors and activation edits, in the order in which they apply, and taps.

    Of each there may be one or several; afterwards all are tuples.

    Raises:
        ValueError: something is of another type, two of a kind have one name, or an edit has no
            layer.
    """

    processors: tuple[LogitsProcessor, ...] = ()
    activation_edits: tuple[ActivationEdit, ...] = ()
    residual_layers: tuple[int, ...] = ()  # behind which the residual stream is read

    def __post_init__(self) -> None:
        for name in ("processors", "activation_edits"):
            given: Any = getattr(self, name)
            several = tuple(given) if isinstance(given, Iterable) else (given,)
            object.__setattr__(self, name, several)
        layers = layer_numbers(self.residual_layers, "activation_taps")
        object.__setattr__(self, "residual_layers", layers)
        problems = []
        kinds: dict[str, tuple[tuple[Any, ...], type]] = {
            "logits_processors": (self.processors, LogitsProcessor),
            "activation_edits": (self.activation_edits, ActivationEdit),
        }
        for kind, (functions, wanted) in kinds.items():
            others = sorted({type(o).__name__ for o in functions if not isinstance(o, wanted)})
            if others:
                raise ValueError(
                    f"{kind} holds a {', a '.join(others)}; it must hold {wanted.__name__}s, which "
                    "give a function the name that SamplingParams asks for it by"
                )
            names = [one.name for one in functions]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                problems.append(f"{kind} has {twice} more than once; names must differ")
        edits = [one for one in self.activation_edits if not one.layers]
        problems += [f"activation edit {one.name!r} has no layers" for one in edits]
        if len(set(self.residual_layers)) < len(self.residual_layers):
            problems.append(f"activation_taps is {list(self.residual_layers)}; layers must differ")
        if problems:
            raise ValueError("; ".join(problems))

    def check_strict(self, is_strict: bool) -> None:
        """Raises a ValueError if there are any in an engine that compiles only what is planned."""
        edits = [one.name for one in self.activation_edits]
        names = [*(one.name for one in self.processors), *edits, *self.residual_layers]
        if is_strict and names:
            raise ValueError(
                "strict is True and there are logits_processors, activation_edits or "
                f"activation_taps ({names}), which no compile plan lists: leave "
                "them out, or set strict to False"
            )

    def check_layers(self, num_layers: int) -> None:
        """Raises a ValueError if an edit or a tap names a layer that the model lacks."""
        named = {f"activation edit {one.name!r}": one.layers for one in self.activation_edits}
        for who, layers in (named | {"activation_taps": self.residual_layers}).items():
            wrong = [layer for layer in layers if not 0 <= layer < num_layers]
            if wrong:
                raise ValueError(
                    f"{who} names layers {wrong}; the model has layers 0 to {num_layers - 1}"
                )

    def argument_problems(
        self, names: Collection[str], extra_args: Mapping[str, Any]
    ) -> Iterator[str]:
        """Says what is wrong with a request's arguments for the processors of these names."""
        on = [one for one in self.processors if one.name in names]
        known = {name for one in on for name in one.arguments}
        if unknown := sorted(extra_args.keys() - known):
            yield (
                f"extra_args has {unknown}; the logits processors that are on take {sorted(known)}"
            )
        for one in on:
            usual = _text(jax.tree.map(jnp.asarray, one.init()))
            try:
                found = _text(jax.tree.map(jnp.asarray, one.start(extra_args)))
            # It is the user's, and raises what it likes.
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if found != usual:
                yield (
                    f"extra_args is {extra_args!r}: init of logits processor {one.name!r} gives "
                    f"{found}; without, it gives {usual}"
                )

    def residual_bytes(self, module: Any) -> int:
        """What the residual stream of one token takes behind those layers, in the model's dtype."""
        width = module.config.hidden_size
        return len(self.residual_layers) * width * jnp.dtype(module.dtype).itemsize

    def check_results(self, vocab_size: int, hidden_size: int, dtype: Any) -> None:
        """Raises a ValueError if a function returns other shapes than it is given.

        They are traced for it, and not run. In a step such results would be broadcast in silence.

        Args:
            vocab_size: V of the logits.
            hidden_size: E of the residual stream.
            dtype: Of that.
        """
        logits = jax.ShapeDtypeStruct((vocab_size,), jnp.float32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        hidden = jax.ShapeDtypeStruct((hidden_size,), dtype)
        problems = []
        for one in self.processors:
            value = jax.tree.map(jnp.asarray, one.init())
            found = jax.eval_shape(
                lambda logits, value, last, num, one=one: one.apply(
                    logits, RequestState(value, last, num)
                ),
                *(logits, value, count, count),
            )
            name = f"logits processor {one.name!r}"
            if not isinstance(found, tuple | list) or len(found) != 2:
                problems.append(f"{name} must return a pair, logits and value")
                continue
            if getattr(found[0], "shape", None) != logits.shape:
                problems.append(f"{name} returns logits {_text(found[0])}, of {_text(logits)}")
            if _text(found[1]) != _text(value):
                problems.append(
                    f"{name} returns the value {_text(found[1])}; init makes {_text(value)}"
                )
        for edit in self.activation_edits:
            for layer in edit.layers:
                found = jax.eval_shape(lambda x, e=edit, i=layer: e.apply(x, i), hidden)
                if getattr(found, "shape", None) != hidden.shape:
                    problems.append(
                        f"activation edit {edit.name!r} returns {_text(found)}, of {_text(hidden)}"
                    )
                    break
        if problems:
            raise ValueError("; ".join(problems) + ": shapes must be as they came")


def _text(tree: Any) -> str:
    """Dtypes and shapes of a pytree of arrays."""
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)).replace("'", "")


NO_FUNCTIONS = UserFunctions()
