"""How a model attends, by its name among the presets or by its config.json, as Hugging Face has it.

Field names, and what they are where a file leaves them out, are those of transformers'
configuration classes, with which a test compares them. What would be attended to in another way
than kernels do is refused, never guessed.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gqa_cutlass.codegen.files import read_json, unreadable
from gqa_cutlass.codegen.models import FULL, MODELS, SLIDING, Attention, LayerType
from gqa_cutlass.codegen.schema.kinds import DType
from gqa_cutlass.errors import InputError, shown

_ALLOWED = "a config.json of Hugging Face, a folder with one, or a preset of `gqa-cutlass models`"
_FILE = "config.json"
_MOST = 1 << 20  # of a number in it
_ANY_LAYERS = 64  # have every kind of layer that a pattern has, where a file does not say how many
# Names of one field, the usual one first.
_Q_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LENGTH = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
_WINDOW_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")
_DTYPE = ("dtype", "torch_dtype")
_TEXT = ("text_config", "llm_config", "language_config")  # of models that also see or hear
# What files of these types may leave out. Every n-th layer of a pattern has no window.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window_pattern": 4},
    "exaone4": {"sliding_window_pattern": 4},
    "gemma": {"head_dim": 256},
    "gemma2": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "sliding_window_pattern": 2,
    },
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
        "sliding_window_pattern": 2,
    },
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "olmo3": {"sliding_window_pattern": 4},
    "qwen3": {"head_dim": 128},
}  # fmt: skip
_WITH_SINKS, _WITH_ALIBI = ("gpt_oss",), ("bloom",)
# Kinds of layers that keep no keys and values.
_OTHERS = ("linear_attention", "mamba", "mamba2", "conv", "short_conv", "recurrent")
# Fields by which a model attends in ways that are not read here.
_UNREAD = "layers that differ in a way that is not read"
_REFUSED = {
    "kv_lora_rank": "multi-head latent attention (MLA), whose cache holds one latent vector per "
    "token and no KV heads",
    "attention_chunk_size": "chunked attention",
    "blocksparse_block_size": "block-sparse attention",
    **dict.fromkeys(
        ("hybrid_layer_pattern", "block_configs", "block_types", "attn_type_list",
         "attention_types", "swa_head_dim", "global_head_dim", "attn_config"),
        _UNREAD,
    ),
}  # fmt: skip


def find_model(given: str) -> Attention:
    """How a model attends.

    Args:
        given: A preset's name or the repository that it was read from, in any case; or the path of
            a config.json, or of a folder with one, which comes first.

    Raises:
        InputError: There is no such model or file, or it attends as no kernel does.
    """
    path = Path(given)
    if given and not unreadable(path):
        if path.is_dir() and (path / _FILE).exists():
            path /= _FILE
        if path.exists() and not path.is_dir():
            return read_config(path)
    preset = _preset(given)
    if preset is not None:
        return preset
    names = [model.name for model in MODELS]
    near = difflib.get_close_matches(given.lower().rpartition("/")[2], names, cutoff=0.5)
    what = f"a folder without {_FILE}" if given and _is_folder(path) else "neither file nor preset"
    hint = f" Near: {', '.join(near)}." if near else ""
    raise InputError(f"--model: got {shown(given)}, {what}; allowed: {_ALLOWED}.{hint}")


def read_config(path: Path) -> Attention:
    """How the model of a config.json attends.

    Raises:
        InputError: It is no such file, or the model attends as no kernel does.
    """
    found = read_json("--model", path, _ALLOWED)
    if not isinstance(found, dict):
        raise InputError(f"--model: got {path}, which holds no object; allowed: {_ALLOWED}.")
    return _Reader(path, found).attention()


def _preset(given: str) -> Attention | None:
    wanted = given.lower()
    for model in MODELS:
        if wanted in (model.name, model.source.lower(), model.source.lower().rpartition("/")[2]):
            return model.attention
    return None


def _is_folder(path: Path) -> bool:
    return not unreadable(path) and path.is_dir()


class _Reader:
    """Reads one config.json; errors name the file and the field.

    Args:
        path: The file.
        config: What is in it.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path = path
        parts = [config[name] for name in _TEXT if isinstance(config.get(name), dict)]
        text = parts[0] if parts else config
        self._type = str(text.get("model_type", config.get("model_type", "")))
        outer = {name: config[name] for name in _DTYPE if config.get(name)}
        # null is as good as absent, for all but windows: there it says that there is none.
        given = {n: v for n, v in text.items() if v is not None or n == "sliding_window"}
        self._config: Mapping[str, Any] = {**_DEFAULTS.get(self._type, {}), **outer, **given}

    def attention(self) -> Attention:
        """All of it."""
        for field, what in _REFUSED.items():
            if self._config.get(field):
                self._fail(field, self._config[field], f"{what}; no kernel does that")
        if self._config.get("is_encoder_decoder"):
            self._fail("is_encoder_decoder", True, "models that have a decoder alone")
        kinds = self._kinds()
        kept = {kind: count for kind, count in Counter(kinds).items() if kind in (SLIDING, FULL)}
        if not kept:
            self._fail("layer_types", kinds, "at least one layer that keeps keys and values")
        return Attention(
            name=str(self._path),
            source=str(self._path),
            dtypes=self._dtypes(),
            layer_types=tuple(
                self._layers(kind, kept[kind] if self._has(_LAYERS) else 0)
                for kind in sorted(kept, reverse=True)
            ),
            others=tuple(dict.fromkeys(kind for kind in kinds if kind not in kept)),
        )

    def _layers(self, kind: str, count: int) -> LayerType:
        q_heads = self._number(_Q_HEADS)
        kv_heads = self._kv_heads(q_heads)
        if q_heads % kv_heads:
            self._fail(_KV_HEADS[0], kv_heads, f"divisors of {q_heads} query heads")
        head_dim = self._head_dim(q_heads)
        value_dim = self._number(("v_head_dim",), head_dim)
        return LayerType(
            name=kind, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim,
            head_dim_v=None if value_dim == head_dim else value_dim,
            window=self._window() if kind == SLIDING else 0, softcap=self._softcap(),
            sinks=self._type in _WITH_SINKS, num_layers=count,
            alibi=self._type in _WITH_ALIBI or self._config.get("alibi") is True,
        )  # fmt: skip

    def _kv_heads(self, q_heads: int) -> int:
        c = self._config
        if c.get("multi_query") is True and not c.get("new_decoder_architecture"):
            return 1  # Falcon's and StarCoder's way to say so
        return self._number(_KV_HEADS, q_heads)

    def _head_dim(self, q_heads: int) -> int:
        if "head_dim" in self._config:
            return self._number(("head_dim",))
        hidden = self._number(_HIDDEN)
        if hidden % q_heads:
            self._fail(_HIDDEN[0], hidden, f"multiples of {q_heads} query heads, or a head_dim")
        return hidden // q_heads

    def _kinds(self) -> list[str]:
        """What each layer is."""
        given = self._config.get("layer_types")
        if given is None:
            return self._patterned(self._number(_LAYERS, _ANY_LAYERS))
        if not isinstance(given, list) or not given:
            self._fail("layer_types", given, "a list of names")
        known = (FULL, SLIDING, *_OTHERS)
        kinds = ["full_attention" if kind == "attention" else kind for kind in given]
        if unknown := [kind for kind in kinds if kind not in known]:
            self._fail("layer_types", unknown[0], ", ".join(known))
        if SLIDING in kinds and not self._window():
            return [FULL if kind == SLIDING else kind for kind in kinds]
        return kinds

    def _patterned(self, count: int) -> list[str]:
        """The same of files that say it by numbers."""
        if "full_attention_interval" in self._config:  # Qwen3-Next's
            every = self._number(("full_attention_interval",))
            return [_OTHERS[0] if (layer + 1) % every else FULL for layer in range(count)]
        if not self._window() or self._config.get("use_sliding_window") is False:
            return [FULL] * count
        if self._config.get("use_sliding_window") is True and "max_window_layers" in self._config:
            first = self._number(("max_window_layers",), least=0)
            return [FULL if layer < first else SLIDING for layer in range(count)]
        pattern = next((self._config[n] for n in _WINDOW_PATTERN if n in self._config), None)
        if pattern is None:
            return [SLIDING] * count
        if type(pattern) is int and pattern > 0:
            return [SLIDING if (layer + 1) % pattern else FULL for layer in range(count)]
        if isinstance(pattern, str) and pattern and not set(pattern) - {"L", "G"}:  # local, global
            letters = [pattern[layer % len(pattern)] for layer in range(count)]
            return [SLIDING if letter == "L" else FULL for letter in letters]
        self._fail(_WINDOW_PATTERN[0], pattern, "a positive number, or letters L and G")

    def _window(self) -> int:
        """Tokens; 0 for a window that no sequence outgrows."""
        if not self._config.get("sliding_window"):
            return 0
        window = self._number(("sliding_window",), most=1 << 31)
        longest = self._number(_LENGTH, 1 << 31, most=1 << 31)
        return window if window < longest else 0

    def _softcap(self) -> float:
        value = self._config.get("attn_logit_softcapping", 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            self._fail("attn_logit_softcapping", value, "a number from 0 on")
        return float(value)

    def _dtypes(self) -> tuple[DType, ...]:
        name = next((self._config[n] for n in _DTYPE if n in self._config), "auto")
        known = {"float16": (DType.F16,), "bfloat16": (DType.BF16,), "auto": tuple(DType)}
        return known.get(str(name).removeprefix("torch."), ())

    def _number(
        self, names: tuple[str, ...], default: int = 0, *, least: int = 1, most: int = _MOST
    ) -> int:
        """A field under any of its names; the default, unless that is 0, where it is absent."""
        name = next((n for n in names if n in self._config), None)
        if name is None:
            if default:
                return default
            raise InputError(
                f"--model: got {self._path}, which has no {' or '.join(names)}; allowed: the "
                "config.json of a model with attention layers."
            )
        value = self._config[name]
        if type(value) is not int or not least <= value <= most:
            self._fail(name, value, f"a whole number from {least} to {most}")
        return value

    def _has(self, names: tuple[str, ...]) -> bool:
        return any(name in self._config for name in names)

    def _fail(self, field: str, got: object, allowed: str) -> NoReturn:
        raise InputError(
            f"--model: got {self._path}, whose {field} is {shown(got)}; allowed: {allowed}."
            if field not in _REFUSED
            else f"--model: got {self._path}, whose {field} {shown(got)} asks for {allowed}; "
            "allowed: models with multi-head, grouped-query or multi-query attention."
        )
